"""Kinds of KV cache: asked for by name, refused by name, in the plan, its id and its command, and in the file."""

import shutil

import pytest
import yaml

from export import formats, manifest, plan
from export.build import request
from export.errors import ExportError
from export.formats import admission
from export.plan import load_plan
from tests.support.artifacts import reseal

PLAN = ("tiny", "int4-g32", "onnx-cpu")


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("coreml", "int8", "Core ML's states are of float16 only; it takes --cache float16"),
        ("coreml", "float32", "Core ML's states are of float16 only"),
        ("onnx-cpu", "float16", r"convert the whole cache .* \(0.54 times .*; it takes --cache float32 or int8"),
        ("onnx-cpu", "bfloat16", "GroupQueryAttention has no kernel for it on CPUs"),
        ("executorch-xnnpack", "float16", "six times the time of float32; it takes --cache float32 or bfloat16"),
    ],
)
def test_a_kind_that_the_runtime_has_not_is_refused_before_any_work(target, kind, words):
    with pytest.raises(ExportError, match=f"^target '{target}' with a cache of {kind}: .*{words}"):
        request.asked("tiny", "int4-g32", [target], cache=kind)


@pytest.mark.parametrize(
    ("context", "kind", "ending", "options"),
    [
        (None, None, "", []),
        (256, "float32", "", []),  # what the YAMLs have
        (None, "int8", "_int8", ["--cache", "int8"]),
        (512, None, "_512", ["--context", "512"]),
        (512, "int8", "_512_int8", ["--context", "512", "--cache", "int8"]),
    ],
)
def test_what_differs_from_the_yamls_ends_the_id_and_is_in_the_command(context, kind, ending, options):
    asked = load_plan(*PLAN, context, cache=kind)
    assert asked.id == f"tiny_int4-g32_onnx-cpu{ending}"
    assert request.words(asked, None) == ["-m", "export", *PLAN, *options]
    assert formats.cache_of(asked) == (kind or "float32")
    fields = asked.model_dump(mode="json")
    assert {"context", "cache"} & set(fields) == {option.strip("-") for option in options if option.startswith("--")}


@pytest.fixture
def own_target(tmp_path, monkeypatch):
    """Changes the YAML of a target."""
    (tmp_path / "configs/targets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        fields = yaml.safe_load((manifest.ROOT / "configs/targets/onnx-cpu.yaml").read_text()) | changes
        kept = {name: value for name, value in fields.items() if value is not None}
        (tmp_path / "configs/targets/onnx-cpu.yaml").write_text(yaml.safe_dump(kept))

    return write


def test_a_targets_yaml_chooses_for_all_its_artifacts(own_target):
    own_target(cache="int8")
    (asked,), _ = request.asked(*PLAN[:2], [PLAN[2]])
    assert (formats.cache_of(asked), asked.id) == ("int8", "tiny_int4-g32_onnx-cpu")
    assert "--cache" not in request.words(asked, None)
    back = load_plan(*PLAN, cache="float32")
    assert (back.id, request.words(back, None)[-2:]) == ("tiny_int4-g32_onnx-cpu_float32", ["--cache", "float32"])


def test_a_yaml_of_before_there_was_a_choice_has_the_formats_first_kind(own_target):
    own_target(cache=None, cache_limits=None)
    (asked,), _ = request.asked(*PLAN[:2], [PLAN[2]])
    assert (formats.cache_of(asked), asked.target.cache) == ("float32", None)
    with pytest.raises(ExportError, match=r"no limit would judge what it loses; give cache_limits\.int8 in configs/ta"):
        request.asked(*PLAN[:2], [PLAN[2]], cache="int8")


def test_every_target_has_a_kind_of_its_own_and_limits_for_the_others():
    for name in plan.names("targets"):
        target = plan.load_named(plan.Target, "targets", name)
        first, *others = formats.load(target.backend).CACHES
        assert (target.cache, set(target.cache_limits)) == (first, set(others))


def test_an_artifact_of_before_there_was_a_choice_is_as_its_format_wrote_it(tiny, tmp_path):
    folder = shutil.copytree(tiny("coreml"), tmp_path / "artifact")
    described = manifest.read(folder)
    old = described.plan.target.model_copy(update={"cache": None})
    reseal(folder, plan=described.plan.model_copy(update={"target": old}))
    assert "cache" not in manifest.read(folder).plan.target.model_dump()
    assert admission.admit(folder).contract.kv.dtype == "float16"


def test_a_cache_that_the_plan_does_not_have_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("onnx-cpu"), tmp_path / "artifact")
    described = manifest.read(folder)
    asked = described.plan.model_copy(update={"cache": "int8"})
    reseal(folder, plan=asked, id=asked.id)
    with pytest.raises(ExportError, match=r"contract\.kv\.dtype is 'float32', expected 'int8'"):
        admission.admit(folder)
