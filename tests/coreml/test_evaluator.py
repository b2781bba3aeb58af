"""The evaluator of saved Core ML packages, compared with values that our code did not compute."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export import manifest
from tests.support.metrics import sqnr_db

ct = pytest.importorskip("coremltools")
# coremltools leaves a temporary folder to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

SPEC = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def package(tiny) -> Path:
    return tiny("coreml") / "model.mlpackage"


@pytest.fixture
def damaged(package, tmp_path) -> Path:
    """A copy of the package to be damaged."""
    return Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))


def run(package: Path, *, copying: bool = False) -> torch.Tensor:
    """Logits of a prompt and a decode step through the saved package."""
    from dataclasses import replace

    from runtime_tests.coreml.evaluator import Evaluator

    evaluator = Evaluator(package)
    assert any(step.in_place for step in evaluator.steps)
    if copying:
        evaluator.steps = [replace(step, in_place=False) for step in evaluator.steps]
    prompt, token = torch.arange(40, dtype=torch.int32)[None], torch.tensor([[7]], dtype=torch.int32)
    first = evaluator.predict({"inputIds": prompt, "causalMask": torch.zeros(1, 1, 40, 40).half()})["logits"]
    second = evaluator.predict({"inputIds": token, "causalMask": torch.zeros(1, 1, 1, 41).half()})["logits"]
    return torch.cat([first[0], second[0]]).float()


def test_writing_states_in_place_changes_no_logits(package):
    assert torch.equal(run(package), run(package, copying=True))


def test_windows_side_by_side_compute_what_each_would_alone(tiny, monkeypatch):
    """To the bit, in blocks of each weight too."""
    from runtime_tests.bench.runners.session import SessionRunner
    from runtime_tests.coreml import operations
    from runtime_tests.sessions import mlpackage

    folder = tiny("coreml")
    session = mlpackage.open_session(folder, manifest.read(folder), threads=1)
    session.largest_call = 8
    windows = np.random.default_rng(0).integers(session.vocab_size, size=(3, 16)).tolist()
    alone = []
    for window in windows:
        session.reset()
        alone.append([session.feed(part) for part in (window[:12], *([token] for token in window[12:-1]))])
    monkeypatch.setattr(operations, "_BLOCK_BYTES", 2**14)
    assert session.abreast >= len(windows)
    np.testing.assert_array_equal(np.stack(list(session.feed_windows(windows, 12)), axis=1), alone)
    session.abreast = 2  # the benchmark's files of logits are written so: two windows, then one
    np.testing.assert_array_equal(list(SessionRunner(session).windows(windows, 12)), alone)


def test_windows_side_by_side_are_refused_as_each_would_be(tiny):
    from runtime_tests.sessions import mlpackage
    from runtime_tests.sessions.base import ContextError, TokenError

    folder = tiny("coreml")
    session = mlpackage.open_session(folder, manifest.read(folder), threads=1)
    good, rest = [1] * 4, [1] * session.context_length
    with pytest.raises(TokenError, match="the vocabulary has"):
        next(session.feed_windows([good, [1, session.vocab_size, 1, 1]], 2))
    with pytest.raises(ContextError):
        next(session.feed_windows([[*good, *rest], [*good, *rest]], 2))


def test_both_matrix_product_dtypes_agree(package, monkeypatch):
    from runtime_tests.coreml import evaluator

    results = []
    for dtype in (torch.float16, torch.float32):
        monkeypatch.setattr(evaluator, "matmul_dtype", lambda dtype=dtype: dtype)
        results.append(run(package))
    assert sqnr_db(*results) >= 60


def manifest_with(package: Path, path: str) -> None:
    listed = json.loads((package / "Manifest.json").read_text())
    listed["itemInfoEntries"][listed["rootModelIdentifier"]]["path"] = path
    (package / "Manifest.json").write_text(json.dumps(listed))


def test_evaluator_refuses_items_outside_the_package(damaged):
    from runtime_tests.coreml.package import PackageError, load

    shutil.copy(damaged / SPEC, damaged.parent / "elsewhere.mlmodel")
    manifest_with(damaged, "../../elsewhere.mlmodel")
    with pytest.raises(PackageError, match="outside"):
        load(damaged)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_evaluator_refuses_missing_or_truncated_weights(damaged, damage: Callable[[Path], object]):
    from runtime_tests.coreml.package import PackageError, load

    damage(damaged / WEIGHTS)
    with pytest.raises(PackageError, match=r"weight\.bin"):
        load(damaged)


def evaluate(program: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Save a PyMIL program, run the saved package, return its only output."""
    from runtime_tests.coreml.evaluator import Evaluator

    path = folder / "program.mlpackage"
    converted = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    converted.save(str(path))
    (result,) = Evaluator(path).predict(inputs).values()
    return result


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


BUILDS: dict[str, Callable[[Any], Any]] = {
    "gather": lambda mb: mb.gather(x=random(5, 3), indices=np.int32([[4, 0, 2]]), axis=0, batch_dims=0),
    "slice_by_index": lambda mb: mb.slice_by_index(
        x=random(3, 1, 4, 6),
        begin=np.int32([1, 0, 1, 2]),
        end=np.int32([2, 0, 4, 6]),
        stride=np.int32([1, 1, 2, 2]),
        end_mask=[False, True, False, False],
        squeeze_mask=[True, False, False, False],
    ),
    "slice_by_size": lambda mb: mb.slice_by_size(x=random(4, 6), begin=np.int32([1, 2]), size=np.int32([2, 3])),
    "reduce_mean": lambda mb: mb.reduce_mean(x=random(2, 3, 4), axes=[-1], keep_dims=True),
    "reduce_max": lambda mb: mb.reduce_max(x=random(2, 3, 4), axes=[0, 2]),
    "equal": lambda mb: mb.equal(x=np.float16([0, 1]), y=np.float16(0)),
    "logical_or": lambda mb: mb.logical_or(x=np.array([True, False]), y=np.array([False, False])),
    "clip": lambda mb: mb.clip(x=random(2, 5), alpha=np.float32(0), beta=np.float32(1)),
    "cumsum": lambda mb: mb.cumsum(x=np.int32([[1, 1, 1]]), axis=1),
    "rsqrt": lambda mb: mb.rsqrt(x=np.abs(random(4)), epsilon=np.float32(1e-5)),
    "softmax": lambda mb: mb.softmax(x=random(2, 5), axis=-1),
    "tile": lambda mb: mb.tile(x=random(1, 2, 3), reps=[1, 3, 1]),
    "concat": lambda mb: mb.concat(values=[random(2, 3), random(4, 3)], axis=0),
    "reshape": lambda mb: mb.reshape(x=random(2, 6), shape=[2, 3, -1]),
    "transpose": lambda mb: mb.transpose(x=random(2, 3, 4), perm=[2, 0, 1]),
    "minimum": lambda mb: mb.minimum(x=random(2, 1, 3), y=random(4, 1)),
    "linear": lambda mb: mb.linear(x=random(2, 4), weight=random(3, 4), bias=random(3)),
    "matmul": lambda mb: mb.matmul(x=random(2, 4), y=random(3, 4), transpose_y=True),
    "attention": lambda mb: mb.scaled_dot_product_attention(
        query=random(1, 2, 3, 8), key=random(1, 2, 5, 8), value=random(1, 2, 5, 8), attn_mask=random(1, 1, 3, 5)
    ),
}


@pytest.mark.parametrize("name", BUILDS)
def test_ops_agree_with_coremltools_own_values(name):
    """coremltools folds constants with numpy code of its own: an independent oracle."""
    from coremltools.converters.mil.mil import Builder, Function

    from runtime_tests.coreml.operations import OPS

    with Function({}, opset_version=ct.target.iOS18):
        built = BUILDS[name](Builder)
    tensors = {
        parameter: [torch.tensor(v.val) for v in var] if isinstance(var, list | tuple) else torch.tensor(var.val)
        for parameter, var in built.op.inputs.items()
        if var is not None
    }
    assert built.val is not None
    np.testing.assert_allclose(OPS[built.op.op_type](tensors).numpy(), built.val, rtol=1e-5, atol=1e-6)


def test_quantized_constants_agree_with_coremltools_own_decompression():
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale

    from runtime_tests.coreml.operations import dequantize
    from runtime_tests.coreml.package import signed_nibbles

    packed = np.arange(256, dtype=np.uint8).repeat(2)[:256]
    data = signed_nibbles(torch.from_numpy(packed), 512).reshape(4, 128)
    low, high = (packed & 15).astype(np.int8), (packed >> 4).astype(np.int8)  # even → low half, odd → high half
    codes = np.stack([low, high], 1).reshape(4, 128)
    assert np.array_equal(data.numpy(), np.where(codes > 7, codes - 16, codes))
    scale = random(4, 4).astype(np.float16)
    expected = constexpr_blockwise_shift_scale.decompress(data.numpy(), scale, None)
    assert np.array_equal(dequantize({"data": data, "scale": torch.from_numpy(scale)}).numpy(), expected)


def test_slice_update_and_silu_agree_with_torch():
    from runtime_tests.coreml.operations import OPS

    x, update = torch.zeros(2, 3, 4), torch.ones(3, 2)
    region = {"begin": [1, 0, 1], "end": [2, 3, 3], "squeeze_mask": [1, 0, 0]}
    updated = OPS["slice_update"]({"x": x, "update": update, **{k: torch.tensor(v) for k, v in region.items()}})
    assert x.sum() == 0
    assert torch.equal(updated[1, :, 1:3], update)
    assert updated.sum() == update.sum()
    values = torch.randn(100).half()
    assert torch.equal(OPS["silu"]({"x": values}), (values.double() * values.double().sigmoid()).half())


class Accumulator(torch.nn.Module):
    """A stateful model that is not one of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.linear = torch.nn.Embedding(40, 32), torch.nn.Linear(32, 32)
        self.register_buffer("cache", torch.zeros(2, 1, 4, 16, 8))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, new, end = self.embedding(ids), ids.shape[-1], mask.shape[-1]
        for layer in range(2):
            heads = self.linear(x).view(1, new, 4, 8).transpose(1, 2)
            self.cache[layer, :, :, end - new : end, :] = heads
            used = self.cache[layer, :, :, :end, :]
            mixed = torch.nn.functional.scaled_dot_product_attention(heads, used, used, attn_mask=mask)
            x = x + mixed.transpose(1, 2).reshape(1, new, 32)
        return x


@pytest.mark.filterwarnings("ignore")
def test_runs_a_program_from_coremltools_own_front_end(tmp_path):
    from runtime_tests.coreml.evaluator import Evaluator

    model = Accumulator().eval()
    new, end = ct.RangeDim(1, 8, default=1), ct.RangeDim(1, 16, default=1)
    traced = torch.jit.trace(model, (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 7)))
    cache = ct.TensorType(shape=(2, 1, 4, 16, 8), dtype=np.float16)
    converted = ct.convert(
        traced,
        inputs=[
            ct.TensorType(name="ids", shape=(1, new), dtype=np.int32),
            ct.TensorType(name="mask", shape=(1, 1, new, end), dtype=np.float16),
        ],
        states=[ct.StateType(wrapped_type=cache, name="cache")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    converted.save(str(tmp_path / "foreign.mlpackage"))
    evaluator = Evaluator(tmp_path / "foreign.mlpackage")
    model.cache.zero_()
    for start, ids in ((0, [3, 1, 4]), (3, [1]), (4, [5, 9])):
        inputs = torch.tensor([ids], dtype=torch.int32), torch.zeros(1, 1, len(ids), start + len(ids))
        (output,) = evaluator.predict({"ids": inputs[0], "mask": inputs[1].half()}).values()
        assert sqnr_db(model(*inputs), output.float()) > 50


def test_an_unknown_operation_is_named(tmp_path):
    from coremltools.converters.mil.mil import Builder, Function, Program, types

    from runtime_tests.coreml.package import PackageError

    program = Program()
    with Function({"x": Builder.placeholder((4,), types.fp16)}, opset_version=ct.target.iOS18) as function:
        function.set_outputs([Builder.atan(x=function.inputs["x"], name="odd")])
    program.add_function("main", function)
    with pytest.raises(PackageError, match=r"odd.*'atan'"):
        evaluate(program, tmp_path, {"x": torch.ones(4).half()})


def test_norm_survives_activations_whose_square_overflows_fp16(tmp_path):
    from coremltools.converters.mil.mil import Builder, Function, Program, types

    from export.formats.mlpackage.graph import rms_norm

    scale = torch.linspace(0.5, 2, 64)
    fake = SimpleNamespace(
        weights=SimpleNamespace(read=lambda name: scale), architecture=SimpleNamespace(rms_norm_eps=1e-5)
    )
    program = Program()
    with Function({"x": Builder.placeholder((1, 64), types.fp16)}, opset_version=ct.target.iOS18) as function:
        function.set_outputs([rms_norm(fake, function.inputs["x"], "norm.weight")])
    program.add_function("main", function)
    x = torch.randn(1, 64).half() * 3000
    exact = x.double() / x.double().square().mean().sqrt() * scale
    assert torch.allclose(evaluate(program, tmp_path, {"x": x}).double(), exact, rtol=2e-3)
