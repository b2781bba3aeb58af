"""A rotated checkpoint computes what it computed, one tensor at a time, and goes through every backend."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from export import checkpoints, formats, manifest, pipeline, quantization
from export.architecture import EMBEDDING, ROTATE_IN, ROTATE_OUT
from export.checkpoints.integers import Integers, Unfit
from export.errors import ExportError
from export.plan import CalibrationText, Gptq, Mixture, ModelSpec, QuantRecipe, Rotation, load_named, load_plan
from export.quantization import calibration, rotation
from export.quantization.eager import as_torchao, eager
from export.quantization.sensitivity import gradient_of_sample
from export.quantization.store import Unfinished
from export.toolbox import model_checks
from runtime_tests.checks import speed, weights
from runtime_tests.jobs import WeightsJob
from runtime_tests.sessions import open_session
from tests.support.artifacts import export_with

SCHEME = {"bits": 8, "group_size": None}
TARGETS = ("executorch-xnnpack", "coreml", "onnx-cpu")
LAYER = "model.layers.0"


def plan_of(target="onnx-cpu", seed=0, **fields):
    """The tiny model, rotated and rounded to nearest."""
    plain = load_plan("tiny", "int4-g32", target)
    fields = {"rotation": Rotation(seed=seed, scheme=SCHEME), **fields}
    return plain.model_copy(update={"quant": plain.quant.model_copy(update=fields)})


def opened(**shape):
    """The tiny checkpoint, or one of another shape."""
    model = load_plan("tiny", "int4-g32", "onnx-cpu").model
    changed = model.architecture.model_copy(update=shape)
    return checkpoints.load(model.model_copy(update={"architecture": changed}), None)


def logits(weights, read=None):
    ids = torch.arange(60)[None] * 7 % 512
    with torch.no_grad():
        return eager(read or weights.read, weights.architecture, "none")(ids)[0]


def error(values, expected):
    return float((values - expected).norm() / expected.norm())


@pytest.mark.parametrize("order", [1, 2, 12, 28, 36, 64, 576, 2048])
def test_a_hadamard_matrix_is_one(order):
    matrix = rotation.hadamard(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 22, 43, 172])
def test_orders_without_a_known_hadamard_matrix_have_none(order):
    assert rotation.hadamard(order) is None


@pytest.mark.parametrize("order", [43, 64, 576])
def test_a_random_rotation_is_orthogonal_and_seeded(order):
    draw = lambda seed: rotation.random_orthogonal(order, torch.Generator().manual_seed(seed))  # noqa: E731
    matrix = draw(0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(matrix, draw(0))
    assert not torch.equal(matrix, draw(1))


@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": False}, {"hidden_size": 172, "head_dim": 22}], ids=["tied", "untied", "by QR"]
)
def test_a_rotated_model_computes_what_it_computed(shape):
    weights = opened(**shape)
    rotated = rotation.rotated(weights, plan_of().quant)
    assert error(logits(rotated), logits(weights)) < 1e-5


def not_folded(source, name):
    return rotation.rotate_rows(source.base.read(name), source.stream)


WRONG = {
    "norm not folded": (f"{LAYER}.self_attn.q_proj.weight", not_folded),
    "other norm": (
        f"{LAYER}.mlp.up_proj.weight",
        lambda s, n: rotation.rotate_rows(s.base.read(n) * s.base.read(f"{LAYER}.input_layernorm.weight"), s.stream),
    ),
    "not rotated": (f"{LAYER}.mlp.down_proj.weight", lambda s, n: s.base.read(n)),
    "rotated back": (
        f"{LAYER}.mlp.gate_proj.weight",
        lambda s, n: rotation.rotate_rows(
            s.base.read(n) * s.base.read(f"{LAYER}.post_attention_layernorm.weight"), s.stream.T
        ),
    ),
    "values not taken back": (
        f"{LAYER}.self_attn.o_proj.weight",
        lambda s, n: rotation.rotate_rows(s.base.read(n).T, s.stream).T.contiguous(),
    ),
    "values of another layer": (
        f"{LAYER}.self_attn.v_proj.weight",
        lambda s, n: rotation.rotate_heads(s.read(n).T, s.values("model.layers.1")).T.contiguous(),
    ),
    "norm twice": (f"{LAYER}.input_layernorm.weight", lambda s, n: s.base.read(n)),
    "last norm left out": (ROTATE_OUT, lambda s, n: s.stream.T.float().contiguous()),
    "rotated twice": (ROTATE_OUT, lambda s, n: s.read(n).T.contiguous()),
}


@pytest.mark.parametrize("fold", WRONG)
def test_a_wrong_fold_is_another_model(fold):
    """The comparison above would fail by far with any tensor folded wrongly."""
    name, wrong = WRONG[fold]
    weights = opened()
    rotated = rotation.rotated(weights, plan_of().quant)
    read = lambda weight: wrong(rotated.source, name) if weight == name else rotated.read(weight)  # noqa: E731
    assert error(logits(rotated, read), logits(weights)) > 1e-3


def test_norms_are_ones_and_the_table_stays_as_it_is():
    weights = opened()
    rotated = rotation.rotated(weights, plan_of().quant)
    norms = [name for name in rotated.source.shapes if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(rotated.read(name), torch.ones(256)) for name in norms)
    assert torch.equal(rotated.read(EMBEDDING), weights.read(EMBEDDING))
    assert rotated.architecture.parameters == weights.architecture.parameters


def test_a_recipe_without_rotation_takes_the_checkpoint_itself():
    weights = opened()
    assert rotation.rotated(weights, load_plan("tiny", "int4-g32", "onnx-cpu").quant) is weights


class Spy:
    """A source that notes what is read."""

    def __init__(self, source):
        self.source, self.read_names = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, name):
        self.read_names.append(name)
        return self.source.read(name)


def test_weights_are_read_when_asked_for_and_not_kept():
    weights = opened()
    spy = Spy(weights.source)
    rotated = rotation.rotated(dataclasses.replace(weights, source=spy), plan_of().quant)
    assert spy.read_names == []
    gate, norm = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.post_attention_layernorm.weight"
    first = rotated.read(gate)
    assert sorted(spy.read_names) == [gate, norm]
    assert rotated.read(gate).data_ptr() != first.data_ptr()
    assert len(spy.read_names) == 4
    rotated.read(norm), rotated.read(ROTATE_IN)
    assert len(spy.read_names) == 4


def test_the_seed_decides_every_rotation():
    read = lambda seed, name: rotation.rotated(opened(), plan_of(seed=seed).quant).read(name)  # noqa: E731
    for name in (ROTATE_IN, ROTATE_OUT, f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight"):
        assert torch.equal(read(0, name), read(0, name))
        assert not torch.equal(read(0, name), read(1, name))
    source = rotation.rotated(opened(), plan_of().quant).source
    assert not torch.equal(source.values(LAYER), source.values("model.layers.1"))


def test_the_seed_is_part_of_the_key():
    keys = [quantization.content_key(opened(), plan_of(seed=seed).quant, None) for seed in (0, 1)]
    keys.append(quantization.content_key(opened(), load_plan("tiny", "int4-g32", "onnx-cpu").quant, None))
    assert len(set(keys)) == 3


def test_a_damaged_tensor_is_named_through_the_rotation():
    weights = opened()
    spy = Spy(weights.source)
    spy.read = lambda name: weights.source.read(name) / (0.0 if name == f"{LAYER}.input_layernorm.weight" else 1.0)
    rotated = rotation.rotated(dataclasses.replace(weights, source=spy), plan_of().quant)
    with pytest.raises(ExportError, match=rf"tensor {LAYER}\.input_layernorm\.weight holds"):
        rotated.read(f"{LAYER}.self_attn.q_proj.weight")


def test_integers_of_the_checkpoint_are_kept_only_where_nothing_is_rotated():
    weights = opened()
    spy = Spy(weights.source)
    spy.integers = lambda name: Integers(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1), 8)
    source = rotation.rotated(dataclasses.replace(weights, source=spy), plan_of().quant).source
    assert isinstance(source.integers(EMBEDDING), Integers)
    assert source.integers(f"{LAYER}.mlp.up_proj.weight") == Unfit("the recipe rotates it")
    assert source.integers(ROTATE_IN) is None


def test_a_recipe_that_quantizes_nothing_is_not_rotated():
    fields = load_named(QuantRecipe, "quant", "fp32").model_dump()
    with pytest.raises(ValueError, match="rotation needs a method that quantizes"):
        QuantRecipe.model_validate({**fields, "rotation": {"seed": 0, "scheme": SCHEME}})


def test_a_model_is_not_rotated_by_its_own_yaml():
    fields = load_named(ModelSpec, "models", "tiny").model_dump()
    with pytest.raises(ValueError, match="give `rotation` in a recipe"):
        ModelSpec.model_validate({**fields, "architecture": {**fields["architecture"], "rotated": True}})


def test_an_int8_rotation_by_a_hadamard_matrix_is_exact_but_for_its_scales(tmp_path):
    model = quantization.quantize(opened(), plan_of().quant, tmp_path)
    errors = {layer.name: layer.sqnr_db for layer in model.layers}
    assert errors[ROTATE_IN] > 50
    assert errors[ROTATE_OUT] > 50
    assert set(model.read(ROTATE_IN).qdata.abs().unique().tolist()) <= {126, 127, 128}


TEXT = Mixture(
    name="test",
    description="English",
    length=48,
    held_out_every=4,
    texts=(CalibrationText(file="prose.txt", windows=8),),
    generated=None,
)


def test_calibration_walks_the_rotated_model(tmp_path):
    """The loss it reports on held-out windows is that of the model it made, against the checkpoint as it was."""
    recipe = plan_of(method="gptq", calibration=TEXT, gptq=Gptq(damping=0.01)).quant
    weights = opened()
    model = quantization.quantize(weights, recipe, tmp_path)
    ids = calibration.tokens(weights, TEXT, Unfinished(tmp_path / "none"), "cpu")
    _, held_out = calibration.split(ids, TEXT.held_out_every)
    with torch.no_grad():
        full = eager(weights.read, weights.architecture, "none")(held_out)[0].log_softmax(-1)
        ours = eager(model.read, model.architecture, "none")(held_out)[0].log_softmax(-1)
    kl = float((full.exp() * (full - ours)).sum(-1).mean())
    assert model.calibration.held_out_kl == pytest.approx(kl, rel=1e-2)


def test_gradients_at_the_head_are_rotated_with_the_stream(tmp_path):
    """What decides promotions: the same as of the checkpoint, in rotated coordinates."""
    recipe, weights = plan_of().quant, opened()
    rotated = rotation.rotated(weights, recipe)
    ids, stream = torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 20, 256)

    def gradient(weights, stream):
        calibrator = calibration.Calibrator(weights, recipe, {}, Unfinished(tmp_path), ids, ids)
        return gradient_of_sample(calibrator.head(weights.read), stream, seed=0)

    plain, matrix = gradient(weights, stream), rotated.source.stream
    in_rotated = gradient(rotated, rotation.rotate_rows(stream[0], matrix)[None])
    assert error(in_rotated[0], rotation.rotate_rows(plain[0], matrix)) < 1e-4
    assert error(in_rotated[0], plain[0]) > 0.5


@pytest.fixture(scope="module", params=TARGETS)
def built(request, tmp_path_factory, store):
    """The rotated tiny model in one format."""
    return export_with(store, plan_of(request.param), tmp_path_factory.mktemp("rotated") / "tiny")


def quantized(folder, store):
    return weights.rebuild(manifest.read(folder), None, store)


def test_the_artifact_holds_the_integers_of_both_rotations(built, store):
    comparison = weights.compare(WeightsJob(folder=str(built), source=None, cache=str(store)))
    assert (comparison["differing"], comparison["missing"], comparison["first"]) == (0, [], "")
    described = manifest.read(built)
    stored = formats.reader(described.plan.target.backend).read_weights(
        built / described.plan.target.artifact, described.architecture
    )
    assert {ROTATE_IN, ROTATE_OUT} < {weight.name for weight in stored}


def test_the_artifact_is_as_its_manifest_says(built):
    assert list(model_checks.check(built)) == []


def test_one_wrong_integer_of_a_rotation_is_found(built, store, tmp_path):
    """The same bytes in every format: int8, row by row; ONNX offsets them."""
    codes = quantized(built, store).read(ROTATE_OUT).qdata.numpy()
    forms = [codes.tobytes(), (codes.view(np.uint8) ^ 0x80).tobytes()]
    folder = tmp_path / "broken"
    shutil.copytree(built, folder)
    places = [
        (path, at)
        for path in folder.rglob("*")
        if path.is_file()
        for form in forms
        if (at := path.read_bytes().find(form)) >= 0
    ]
    ((path, at),) = places
    data = bytearray(path.read_bytes())
    data[at + 300] ^= 1
    path.write_bytes(data)
    comparison = weights.compare(WeightsJob(folder=str(folder), source=None, cache=str(store)))
    assert (comparison["differing"], comparison["first"]) == (1, ROTATE_OUT)


def relative_errors(folder, reference):
    """Of the logits after single tokens, where rounding of activations has had no time to grow."""
    described = manifest.read(folder)
    session = open_session(folder, described, threads=2)
    errors = []
    for token in range(5, 12):
        session.reset()
        got = torch.as_tensor(np.asarray(session.feed([token]), np.float32)).flatten()
        with torch.no_grad():
            errors.append(error(got, reference(torch.tensor([[token]]))[0][0, 0]))
    session.close()
    return float(np.median(errors))


def test_the_artifact_computes_what_the_rotated_model_computes(built, store):
    described, model = manifest.read(built), quantized(built, store)
    reference = eager(model.read, model.architecture, described.plan.target.activations)
    assert relative_errors(built, reference) < 0.02
    with torch.no_grad():
        reference.model.rotate_out.weight = torch.nn.Parameter(
            as_torchao(model.read(ROTATE_OUT)).dequantize().T.contiguous()
        )
        assert relative_errors(built, reference) > 0.2


def test_what_a_token_reads_counts_the_rotations(built):
    described = manifest.read(built)
    plain = described.model_copy(update={"architecture": described.architecture.model_copy(update={"rotated": False})})
    assert speed.bytes_per_token(described) - speed.bytes_per_token(plain) == 2 * (256 * 256 + 2 * 256)


def test_a_scheme_of_rotations_that_xnnpack_computes_wrongly_is_refused(tmp_path):
    grouped = Rotation(seed=0, scheme={"bits": 8, "group_size": 32})
    with pytest.raises(ExportError, match=r"model\.rotate_in\.weight: XNNPACK has no int8 groups"):
        pipeline.export(plan_of("executorch-xnnpack", rotation=grouped), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
