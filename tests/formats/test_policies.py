"""Policies of the KV cache: asked for, refused by name, in the plan, its id and its command, and in the file."""

import shutil

import pytest

from export import manifest
from export.build import request
from export.errors import ExportError
from export.formats import admission, cache_bytes, storage
from export.model import rope_frequencies
from export.plan import load_plan
from tests.support.artifacts import reseal

PLAN = ("tiny", "int4-g32", "onnx-cpu")


@pytest.mark.parametrize("policy", ["window", "window-0", "window-12x", "ring-12", "window--1", ""])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ExportError, match=r"^tiny × int4-g32 × onnx-cpu: policy: "):
        request.asked(*PLAN[:2], [PLAN[2]], policy=policy)


def test_a_window_of_the_whole_context_would_change_nothing():
    with pytest.raises(ExportError, match=r"^--policy window-256: the context has 256 tokens, .* a larger --context$"):
        request.asked(*PLAN[:2], [PLAN[2]], policy="window-256")
    (plan,), _ = request.asked(*PLAN[:2], [PLAN[2]], policy="window-255")
    assert plan.window == 255


def test_a_policy_ends_the_id_and_is_in_the_command():
    asked = load_plan(*PLAN, 512, cache="int8", policy="window-100")
    assert asked.id == "tiny_int4-g32_onnx-cpu_512_int8_window-100"
    options = ["--context", "512", "--cache", "int8", "--policy", "window-100"]
    assert request.words(asked, None) == ["-m", "export", *PLAN, *options]
    assert "policy" not in load_plan(*PLAN).model_dump(mode="json")


def test_the_contract_tells_the_slots_that_are_reused(tiny):
    described = manifest.read(tiny("onnx-cpu", "fp32", None, "window-24", context_length=1024))
    kv = described.contract.kv
    package = manifest.read(tiny("coreml", "fp32", None, "window-24", context_length=1024)).contract
    assert (package.kv.window, package.kv.slots, package.max_prefill) == (24, 280, 257)
    assert package.states[0].shape == (2, 1, kv.kv_heads, 280, kv.head_dim)
    assert (kv.window, kv.slots, kv.context_length) == (24, 24 + 256, 1024)
    assert cache_bytes(kv) == 2 * kv.layers * kv.kv_heads * kv.head_dim * 4 * 280
    assert storage.cache(kv) == f"io, float32, window of 24 tokens, {cache_bytes(kv) / 1e6:.1f} MB"


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("onnx-cpu", r"genai_config|'local_window_size': 24"),
        ("coreml", "model.mlmodel: metadata is not that of the manifest; refused"),
    ],
)
def test_another_window_than_the_files_is_refused(tiny, tmp_path, target, file, window):
    folder = shutil.copytree(tiny(target, "fp32", None, "window-24", context_length=1024), tmp_path / "artifact")
    described = manifest.read(folder)
    kv = described.contract.kv.model_copy(update={"window": window})
    contract = described.contract.model_copy(update={"kv": kv})
    reseal(folder, contract=contract)
    with pytest.raises(ExportError, match=rf"contract\.kv\.window is {window}, expected 24"):
        admission.admit(folder)
    reseal(folder, contract=contract, plan=described.plan.model_copy(update={"policy": window and f"window-{window}"}))
    with pytest.raises(ExportError, match=file):
        admission.admit(folder)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (
            "onnx-cpu",
            {"policy": "sink-129"},
            "^--policy sink-129: at most half of the context, 128 tokens, never leaves$",
        ),
        (
            "onnx-cpu",
            {"policy": "sink-4", "cache": "int8"},
            "a cache of int8 would round them .* takes --cache float32$",
        ),
        ("coreml", {"policy": "sink-4"}, "^target 'coreml' with --policy sink-4: its states are of float16"),
    ],
)
def test_what_a_runtime_cannot_do_exactly_is_refused_before_any_work(target, options, words):
    with pytest.raises(ExportError, match=words):
        request.asked(*PLAN[:2], [target], **options)


def test_slots_that_a_package_has_not_are_refused(tiny, tmp_path):
    """Sessions would take tokens that have left for tokens that are there."""
    folder = shutil.copytree(tiny("coreml", "fp32", None, "window-24", context_length=1024), tmp_path / "artifact")
    described = manifest.read(folder)
    kv = described.contract.kv.model_copy(update={"slots": 300})
    states = tuple(
        spec.model_copy(update={"shape": (*spec.shape[:3], 300, spec.shape[4])}) for spec in described.contract.states
    )
    for change, said in (
        ({"kv": kv}, "the contract's states are not of 300 slots, as its cache is; refused$"),
        ({"states": states}, "the contract's states are not of 280 slots"),
        ({"kv": kv, "states": states}, r"state keyCache is \[2, 1, \d, 280, .*, the contract says .* 300, "),
        ({"max_prefill": 256}, r"input inputIds is \[1, '1…257'\], the contract says \[1, '1…256'\]"),
    ):
        reseal(folder, contract=described.contract.model_copy(update=change))
        with pytest.raises(ExportError, match=said):
            admission.admit(folder)


def test_a_sink_tells_how_far_keys_turn(tiny, tmp_path):
    folder = shutil.copytree(tiny("onnx-cpu", "fp32", None, "sink-4", context_length=64), tmp_path / "artifact")
    described = manifest.read(folder)
    kv = described.contract.kv
    assert (kv.sink, kv.frequencies) == (4, tuple(rope_frequencies(described.architecture).tolist()))
    assert storage.cache(kv).startswith("io, float32, the first 4 stay, ")
    for name, changed in (("sink", {"sink": 5}), ("frequencies", {"frequencies": kv.frequencies[1:]})):
        contract = described.contract.model_copy(update={"kv": kv.model_copy(update=changed)})
        reseal(folder, contract=contract)
        with pytest.raises(ExportError, match=rf"contract\.kv\.{name} is "):
            admission.admit(folder)
