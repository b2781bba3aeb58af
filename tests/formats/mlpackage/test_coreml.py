"""The Core ML package: its integers and scales, its convention, its logits."""

import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export import card, checkpoints, formats, manifest, pipeline
from export.architecture import EMBEDDING, HEAD
from export.errors import ExportError
from export.formats import admission, mlpackage
from export.manifest import Manifest
from export.plan import Plan, QuantRecipe, WeightScheme, load_plan
from export.quantization import quantize
from export.quantization.store import QuantizedModel
from runtime_tests.sessions import mlpackage as sessions
from runtime_tests.sessions import open_session
from runtime_tests.sessions.mlpackage import Evaluated, PackageSession
from tests.support.metrics import eager_logits, forced_logits, mean_kl, random_tokens, sqnr_db

ct = pytest.importorskip("coremltools")
# coremltools leaves a temporary folder to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

PREFILL, DECODE = 64, 64
SPEC = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan("tiny", "int4-g32", "coreml")


@pytest.fixture(scope="module")
def built(tiny) -> tuple[Path, Manifest]:
    return tiny("coreml"), manifest.read(tiny("coreml"))


@pytest.fixture(scope="module")
def package(built) -> Path:
    return built[0] / "model.mlpackage"


def quantized(plan: Plan) -> QuantizedModel:
    return quantize(checkpoints.load(plan.model, None), plan.quant, pipeline.CACHE)


@pytest.fixture(scope="module")
def model(plan) -> QuantizedModel:
    return quantized(plan)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random_tokens(PREFILL + DECODE, seed=1)


@pytest.fixture(scope="module")
def reference(model, tokens) -> torch.Tensor:
    """Eager logits of every decode step."""
    return eager_logits(model, tokens)[PREFILL - 1 :]


@pytest.fixture
def session(built):
    opened = open_session(*built, threads=1)
    yield opened
    opened.close()


@pytest.fixture
def damaged(built, tmp_path) -> tuple[Path, Manifest]:
    """A copy of the artifact to be damaged."""
    shutil.copytree(built[0], tmp_path / "copy")
    return tmp_path / "copy", built[1]


def read_spec(package: Path) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / SPEC).read_bytes())
    return spec


def blob_of(package: Path, name: str, parameter: str) -> int:
    """Position in weight.bin of a quantized weight's integers or scales."""
    (block,) = read_spec(package).mlProgram.functions["main"].block_specializations.values()
    (op,) = [op for op in block.operations if op.outputs and op.outputs[0].name == name]
    offset = op.inputs[parameter].arguments[0].value.blobFileValue.offset
    header = (package / WEIGHTS).read_bytes()[offset : offset + 64]
    return int.from_bytes(header[16:24], "little")


def flip(package: Path, position: int, mask: int) -> None:
    data = bytearray((package / WEIGHTS).read_bytes())
    data[position] ^= mask
    (package / WEIGHTS).write_bytes(data)


def differing(package: Path, model: QuantizedModel) -> list[str]:
    stored = list(formats.reader("mlpackage").read_weights(package, model.architecture))
    assert sorted(weight.name for weight in stored) == sorted(model.schemes.names)
    pairs = [(weight, model.read(weight.name)) for weight in stored]
    return [
        weight.name
        for weight, expected in pairs
        if not np.array_equal(weight.qdata, expected.qdata.numpy())
        or not np.array_equal(weight.scale, expected.scale.numpy())
    ]


# --- stored weights and interface -----------------------------------------------------------------------------------


def test_integers_and_scales_are_those_quantized_once(package, model):
    assert differing(package, model) == []


@pytest.mark.parametrize(("parameter", "mask"), [("scale", 0x01), ("data", 0x10)])
def test_one_flipped_bit_is_found_by_reading_back(damaged, model, parameter, mask):
    package = damaged[0] / "model.mlpackage"
    flip(package, blob_of(package, "model_layers_1_self_attn_q_proj_k_proj_v_proj_stored", parameter), mask)
    assert differing(package, model) == ["model.layers.1.self_attn.q_proj.weight"]


def test_weights_that_are_not_fused_are_read_one_by_one(model):
    from export.formats.mlpackage.file import linear_groups

    groups = list(linear_groups(model.architecture, present=set()))
    assert [names for names, _ in groups] == [(name,) for name in model.architecture.linear_shapes()]


def test_tied_table_is_stored_once_and_int4_is_packed(built, package, model):
    a = model.architecture
    linears = sum(n * k for n, k in a.linear_shapes().values())
    once = a.vocab_size * (a.hidden_size + 2) + linears // 2 + linears // 32 * 2
    tables = 2 * model.checkpoint.architecture.head_dim * 2 * 256 + 4 * 256  # cos and sin fp16, slots fp32
    excess = (package / WEIGHTS).stat().st_size - once - tables
    assert 0 <= excess < a.vocab_size * a.hidden_size // 4
    assert built[1].lowering["embedding_and_head"] == "one table"
    assert (built[1].lowering["int4_weights"], built[1].lowering["int8_weights"]) == (4 * a.num_hidden_layers, 1)


def test_two_builds_are_byte_identical(built, plan, tmp_path):
    again = pipeline.export(plan, None, tmp_path / "again")
    assert {k: v for k, v in again.files.items() if "mlpackage" in k} == {
        k: v for k, v in built[1].files.items() if "mlpackage" in k
    }


def test_follows_apples_stateful_convention(built, package, model):
    spec, a, kv = read_spec(package), model.architecture, built[1].contract.kv
    assert spec.specificationVersion == 9  # iOS 18, macOS 15
    inputs = {value.name: value.type.multiArrayType for value in spec.description.input}
    ranges = {
        name: [(size.lowerBound, size.upperBound) for size in array.shapeRange.sizeRanges]
        for name, array in inputs.items()
    }
    long = (1, kv.context_length)
    assert ranges == {"inputIds": [(1, 1), long], "causalMask": [(1, 1), (1, 1), long, long]}
    int32, fp16 = 131072 | 32, 65552
    assert {name: array.dataType for name, array in inputs.items()} == {"inputIds": int32, "causalMask": fp16}
    states = {value.name: value.type.stateType.arrayType for value in spec.description.state}
    shape = [a.num_hidden_layers, 1, a.num_key_value_heads, kv.context_length, a.head_dim]
    assert {name: list(array.shape) for name, array in states.items()} == {"keyCache": shape, "valueCache": shape}
    assert {array.dataType for array in states.values()} == {fp16}
    (output,) = spec.description.output
    assert (output.name, output.type.multiArrayType.dataType) == ("logits", fp16)
    assert spec.description.metadata.userDefined["plan"] == built[1].id
    assert [tensor.name for tensor in built[1].contract.inputs] == list(ranges)


# --- logits ---------------------------------------------------------------------------------------------------------


def test_computes_the_quantized_model_with_a_filled_cache(session, tokens, reference):
    logits = forced_logits(session, tokens, PREFILL)
    assert mean_kl(reference, logits) <= 1e-3
    assert float((reference.argmax(-1) == logits.argmax(-1)).float().mean()) >= 0.98
    assert sqnr_db(reference, logits) >= 50  # the tiny model's distributions are too narrow for KL to show much


def test_pieces_equal_the_whole(session, tokens):
    whole = session.feed(tokens)
    session.reset()
    for first in range(0, len(tokens), 48):
        pieces = session.feed(tokens[first : first + 48])
    assert sqnr_db(whole, pieces) >= 55


@pytest.mark.parametrize("state", ["keyCache", "valueCache"])
def test_a_corrupted_cache_changes_the_logits(session, tokens, reference, state):
    session.feed(tokens[:PREFILL])
    session.model.evaluator.states[state][1, 0, :, 10:20] *= -1
    logits = np.stack([session.feed([token]) for token in tokens[PREFILL:]])
    assert sqnr_db(reference[1:], logits) < 40


def test_a_cache_that_is_not_reset_changes_the_logits(session, tokens, reference):
    session.feed(tokens[:PREFILL][::-1])
    session.rewind(0)
    session.feed(tokens[:1])
    session.tokens = [*tokens[: PREFILL - 1]]  # as if all had been fed
    assert sqnr_db(reference[0], session.feed(tokens[PREFILL - 1 : PREFILL])) < 40


@pytest.mark.parametrize("parameter", ["scale", "data"])
def test_a_flipped_byte_changes_the_logits(damaged, session, tokens, parameter):
    package = damaged[0] / "model.mlpackage"
    position = blob_of(package, "model_layers_1_self_attn_q_proj_k_proj_v_proj_stored", parameter)
    flip(package, position + 1, 0x7F)
    broken = open_session(*damaged, threads=1)
    assert not np.array_equal(session.feed(tokens), broken.feed(tokens))


def as_swift_transformers_calls(session, tokens):
    """It passes zeros of shape [1, 1, 1, tokens + 1] as mask, also for a prompt, and so never writes slot 0."""
    state, logits = session.model.make_state(), []
    for first, end in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, len(tokens)))]:
        mask = np.zeros((1, 1, 1, end + 1), np.float16)
        inputs = {"inputIds": np.array([tokens[first:end]], np.int32), "causalMask": mask}
        logits.append(session.model.predict(inputs, state)["logits"][0, -1])
    return np.stack(logits).astype(np.float32)


def test_swift_transformers_calls_give_the_same_logits(session, tokens, reference):
    assert sqnr_db(reference, as_swift_transformers_calls(session, tokens)) >= 50


def test_swift_transformers_calls_go_round_in_a_window(tiny, model):
    """Its masks hide nothing, so the program alone knows what has left; slot 0 is written after the others."""
    described = manifest.read(folder := tiny("coreml", "int4-g32", None, "window-24", context_length=1024))
    ids = random_tokens(described.contract.kv.room + 20, vocab=250)
    called = as_swift_transformers_calls(open_session(folder, described, threads=1), ids)
    assert sqnr_db(eager_logits(model, ids, 24)[PREFILL - 1 :], called) >= 50


class _Muted(QuantizedModel):
    """Some tokens have a row of zeros in the embedding, as reserved ones may, and so keys of zeros in every layer."""

    tokens = (300, 301)

    def _read(self, name, file):
        read = super()._read(name, file)
        if name in (EMBEDDING, HEAD):
            read.qdata[list(self.tokens)] = 0
        return read


@pytest.fixture(scope="module", params=["fused", "plain"])
def muted(request, model, built, tmp_path_factory):
    """Such a model and a session of its package."""
    changed = _Muted(**vars(model))
    package = tmp_path_factory.mktemp("muted") / "model.mlpackage"
    mlpackage.convert(changed, built[1].contract, package, request.param)
    return changed, PackageSession(Evaluated(package, 1), built[1].contract, measures_speed=False)


@pytest.mark.parametrize("slots", [(0,), (5,), (0, 1), (0, PREFILL)])
def test_a_written_key_of_zeros_is_attended_to(muted, tokens, slots):
    """Beside an empty slot it would look alike, and be hidden: in our convention, and where slot 0 stays empty."""
    model, session = muted
    tokens = [300 + slot % 2 if slot in slots else token for slot, token in enumerate(tokens[: PREFILL + 3])]
    reference = eager_logits(model, tokens)[PREFILL - 1 :]
    session.reset()
    assert sqnr_db(reference, forced_logits(session, tokens, PREFILL)) >= 50
    assert sqnr_db(reference, as_swift_transformers_calls(session, tokens)) >= 50


def test_attention_as_its_parts_is_another_plan_and_loses_no_more(built, plan, model, tokens, reference, tmp_path):
    target = plan.target.model_copy(update={"attention": "plain"})
    described = pipeline.export(plan.model_copy(update={"target": target}), None, tmp_path / "plain")
    assert admission.admit(tmp_path / "plain") == described
    assert '"attention":"plain"' in described.plan.model_dump_json()
    assert '"attention"' not in built[1].plan.model_dump_json()
    assert described.lowering["attention_ops"] == model.architecture.num_hidden_layers
    assert differing(tmp_path / "plain/model.mlpackage", model) == []
    fused, plain = (
        forced_logits(open_session(folder, described, threads=1), tokens, PREFILL)
        for folder in (built[0], tmp_path / "plain")
    )
    assert mean_kl(reference, plain) <= 1e-4
    assert 1e-7 < mean_kl(fused, plain) <= 5e-5


def test_no_length_is_that_of_a_slice_between_two_slots(package):
    """Core ML has refused such shapes off the CPU; a slice that begins at a constant ends at the mask's width."""
    from runtime_tests.coreml.package import load

    operations = load(package).operations
    made = {name: op for op in operations for name, _ in op.outputs}
    begins = [made[str(op.inputs["begin"][0])] for op in operations if op.kind == "slice_by_index"]
    assert {op.kind for op in begins} == {"const"}


def test_slots_beyond_2048_are_told_apart(model, plan, tmp_path):
    """fp16 holds no odd number there: a token would see the one after it."""
    longer = plan.model_copy(update={"model": plan.model.model_copy(update={"context_length": 2304})})
    mlpackage.convert(model, mlpackage.io_contract(model.architecture, longer), tmp_path / "long.mlpackage", "fused")
    long = Evaluated(tmp_path / "long.mlpackage", 1)

    def first(*tokens):
        mask = np.zeros((1, 1, 1, 2048 + len(tokens)), np.float32)
        mask[..., :2048] = -65504
        inputs = {"inputIds": np.array([tokens], np.int32), "causalMask": mask}
        return long.predict(inputs, long.make_state())["logits"][0, 0].astype(np.float32)

    assert sqnr_db(first(7), first(7, 8)) >= 50
    assert sqnr_db(first(7), first(8, 7)) < 10


def test_context_length_is_a_limit(session):
    session.feed([1] * 256)
    with pytest.raises(ValueError, match="1 tokens at position 256: the context holds 256"):
        session.feed([1])


def test_fp32_recipe_differs_by_fp16_rounding_only(tmp_path, tokens):
    plan = load_plan("tiny", "fp32", "coreml")
    described = pipeline.export(plan, None, tmp_path / "fp32")
    model = quantized(plan)
    reference = eager_logits(model, tokens)[PREFILL - 1 :]
    logits = forced_logits(open_session(tmp_path / "fp32", described, threads=1), tokens, PREFILL)
    assert mean_kl(reference, logits) <= 1e-4
    assert sqnr_db(reference, logits) >= 50
    assert "rounded from float32" in str(described.lowering["float_values"])
    assert list(formats.reader("mlpackage").read_weights(tmp_path / "fp32/model.mlpackage", model.architecture)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # GGUF weights are memory-mapped
def test_smollm2_lowers_and_matches(real):
    folder = real("coreml")
    described = manifest.read(folder)
    model = quantized(described.plan)
    assert differing(folder / "model.mlpackage", model) == []
    tokens = random_tokens(PREFILL + DECODE, seed=1, vocab=40000)
    reference = eager_logits(model, tokens)[PREFILL - 1 :]
    logits = forced_logits(open_session(folder, described, threads=1), tokens, PREFILL)
    assert mean_kl(reference, logits) <= 1e-3


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(plan: Plan, **changes: Any) -> str:
    changed = plan.model_copy(update=changes)
    with pytest.raises(ExportError) as error:
        formats.load("mlpackage").check(changed, plan.model.architecture)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refuses_activation_quantization(plan):
    target = plan.target.model_copy(update={"activations": "int8-per-token"})
    assert "q_proj.weight: activations 'int8-per-token'" in refused(plan, target=target)
    target = plan.target.model_copy(update={"logits": "last"})
    assert "set `logits: all`" in refused(plan, target=target)


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_attention_of_other_runtimes_has_no_parts(target):
    plan = load_plan("tiny", "int4-g32", target)
    plain = plan.target.model_copy(update={"attention": "plain"})
    with pytest.raises(ExportError, match=f"target '{target}': attention 'plain' is Core ML's; set `attention: fused`"):
        formats.load(plan.target.backend).check(plan.model_copy(update={"target": plain}), plan.model.architecture)


def test_refuses_bits_core_ml_cannot_store(plan):
    six = WeightScheme.model_construct(bits=6, group_size=32)
    recipe = QuantRecipe.model_construct(**{**dict(plan.quant), "linear": six})
    assert "model.layers.0.self_attn.q_proj.weight: int6" in refused(plan, quant=recipe)


def test_refuses_an_artifact_that_is_no_package(plan):
    target = plan.target.model_copy(update={"artifact": "model.mlmodel"})
    assert ".mlpackage" in refused(plan, target=target)


def test_refuses_scales_that_fp16_would_round():
    from export.formats.mlpackage.graph import half

    assert half(torch.tensor([2.0**-17]), ["w"], exact=True) == np.float16(2.0**-17)
    with pytest.raises(ExportError, match="scale is not exact"):
        half(torch.tensor([1 + 2.0**-20]), ["w"], exact=True)
    with pytest.raises(ExportError, match="65504"):
        half(torch.tensor([1e5]), ["w"], exact=False)


def test_scales_that_a_gpu_may_flush_are_said_at_the_build_and_on_the_card(plan, built, monkeypatch, capsys, tmp_path):
    line = "scales are subnormal in fp16, and a GPU may take them for zero"
    assert line not in card.render(built[1], [])
    before = built[1].model_copy(update={"lowering": {}})  # of a build that did not count them
    assert line not in card.render(before, [])
    monkeypatch.setattr("export.formats.mlpackage.file._subnormal", lambda scales: 2)
    described = pipeline.export(plan, None, tmp_path / "out")
    assert f"18 {line}; the card says so" in capsys.readouterr().err
    assert f"18 {line}: compare its answers with those of `.cpuOnly`." in card.render(described, [])


@pytest.mark.parametrize(("weights", "for_macs"), [(0.8e9, False), (1.9e9, True)])
def test_the_card_tells_an_app_what_memory_the_model_takes(built, weights, for_macs):
    described = built[1]
    sizes = {name: info.model_copy(update={"bytes": int(weights)}) for name, info in described.files.items()}
    weight_file = f"model.mlpackage/{WEIGHTS}"
    files = described.files | {weight_file: sizes[weight_file]}
    text = card.render(described.model_copy(update={"files": files}), [])
    assert "configuration.computeUnits = .cpuAndGPU" in text
    assert "Array(ids.prefix(256))" in text  # 256 rows of logits at a time
    assert "com.apple.developer.kernel.increased-memory-limit" in text
    assert ("This model is for Macs: its\n1.9 GB do not fit" in text) is for_macs


# platforms


@pytest.mark.parametrize(
    ("system", "machine", "found", "says"),
    [
        (
            "Linux",
            "aarch64",
            "nothing",
            "coremltools is not built for Linux on aarch64; build it on",
        ),
        ("Linux", "aarch64", "sources", "coremltools has no native part for Linux on aarch64, Python"),
        ("Darwin", "arm64", "sources", "coremltools has no native part for Darwin on arm64, Python"),
        ("Linux", "x86_64", "nothing", "coremltools is missing; pip install"),
    ],
)
def test_a_platform_that_writes_no_package_is_refused_before_any_work(  # noqa: PLR0917
    plan, monkeypatch, tmp_path, system, machine, found, says
):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if found == "sources" else None
    monkeypatch.setattr(mlpackage, "find_spec", lambda _name: spec)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(ExportError, match=f"target 'coreml': {says}"):
        mlpackage.check(plan, plan.model.architecture)


def test_here_packages_are_written():
    assert mlpackage.lacks() is None


# on a Mac


@pytest.mark.parametrize(
    ("system", "release", "chosen", "in_core_ml"),
    [
        ("Darwin", "15.1", "", True),
        ("Darwin", "26.0", "", True),
        ("Darwin", "14.6", "", False),
        ("Darwin", "15.1", "reference", False),
        ("Linux", "", "", False),
    ],
)
def test_packages_run_in_core_ml_where_it_has_state_and_nobody_asks_for_the_evaluator(
    monkeypatch, system, release, chosen, in_core_ml
):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), ""))
    monkeypatch.setenv("LLAMA_COREML", chosen)
    assert sessions.in_core_ml() is in_core_ml
