"""Where calibration computes: every tensor on the device of its layer, integers never taken for another processor's."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from export import build, checkpoints, quantization
from export.build import skip
from export.build.command import run
from export.errors import ExportError
from export.manifest import CalibrationInfo
from export.plan import CalibrationText, Mixture, load_plan
from export.quantization import layerwise, processors, schemes, sensitivity
from export.quantization.calibration import Calibrator
from export.quantization.nearest import Rounded
from export.quantization.store import Result
from runtime_tests.bench.studies import calibrations

_PROMOTED = "int4-mixed"
_HERE = processors.name("cpu")


class _Numbers(TorchDispatchMode):
    """Tensors without values read as ones: what matters is where they are."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def gpu():
    """The name of a device that holds no values; operators refuse to mix it with the CPU, as those of a GPU do."""
    _setup_privateuseone_for_python_backend("fakegpu")
    return "fakegpu"


def tables(a, length, device=None):
    """As `rope_tables`, which computes by numpy: without values."""
    return tuple(torch.empty(length, a.head_dim // 2).to(device) for _ in range(2))


@pytest.fixture
def elsewhere(gpu, monkeypatch):
    """A device, and a mode in which tensors can be there."""
    monkeypatch.setattr(torch, "Generator", lambda _device: SimpleNamespace(manual_seed=lambda _seed: None))
    for module in (layerwise, sensitivity):
        monkeypatch.setattr(module, "rope_tables", tables)
    with FakeTensorMode(), _Numbers():
        yield gpu


@dataclass(frozen=True)
class _Weights:
    """A checkpoint whose weights have shapes only; they are read in the memory of the CPU, as all are."""

    architecture: object

    def read(self, name):
        return torch.empty(self.architecture.tensor_shapes()[name])

    def integers(self, _name):
        return None


class _Nowhere:
    """Unfinished work that is never kept."""

    def read(self, _name):
        return None

    def write(self, _name, rounded):
        assert rounded.qdata.device.type == "cpu"

    read_sensitivities = read_windows = lambda self: None
    write_sensitivities = write_windows = lambda self, _measured: None

    def of(self, _names):
        return self


def calibrator(recipe, device, monkeypatch):
    monkeypatch.setattr(processors, "name", str)
    plan = load_plan("tiny", recipe, "onnx-cpu")
    small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 8, "num_hidden_layers": 1}
    architecture = plan.quant.reshaped(plan.model.architecture.model_copy(update=small))
    weights = _Weights(architecture)
    base = schemes.of_recipe(plan.quant, architecture).by_name
    outside = {name: rounded_to_nothing(weights.read(name), scheme) for name, scheme in base.items()}
    for name in architecture.linear_shapes():
        del outside[name]
    used, held_out = (torch.zeros(count, 16, dtype=torch.int64, device=device) for count in (6, 2))
    return Calibrator(weights, plan.quant, outside, _Nowhere(), used, held_out)


def listed(tensors):
    return tensors if isinstance(tensors, list) else [tensors]


def rounded_to_nothing(weight, scheme):
    groups = weight.shape[1] // (scheme.group_size or weight.shape[1])
    return Rounded(torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight), groups), 0.0, 0.0, 0.0)


def test_scales_are_searched_where_the_layers_are(elsewhere, monkeypatch):
    result = calibrator("int4-g32-scales", elsewhere, monkeypatch).search_scales()
    assert {rounded.qdata.device.type for rounded in result.tensors.values()} == {"cpu"}
    assert result.calibration.processor == elsewhere


@pytest.mark.parametrize("recipe", ["int4-g32-gptq", "int4-g32-gptq-rotated"])
def test_gptq_computes_where_the_layers_are(recipe, elsewhere, monkeypatch):
    calibration_of = calibrator(recipe, elsewhere, monkeypatch)
    result = calibration_of.gptq(calibration_of.base, _Nowhere())
    assert result.calibration.processor == elsewhere


def test_sensitivities_are_measured_where_the_layers_are(elsewhere, monkeypatch):
    # PyTorch's engine knows only devices that were there when it began; a gradient lies where its tensor does
    monkeypatch.setattr(torch.autograd, "grad", lambda _out, to, _of: [torch.empty_like(x) for x in listed(to)])
    measured = calibrator(_PROMOTED, elsewhere, monkeypatch).sensitivities()
    assert len(measured) == 7


@pytest.mark.parametrize(
    ("recipe", "walk"),
    [("int4-g32-scales", Calibrator.search_scales), (_PROMOTED, Calibrator.sensitivities)],
)
def test_a_table_that_stays_behind_is_refused_as_a_gpu_would(recipe, walk, elsewhere, monkeypatch):
    """The twin: where the RoPE tables are not moved, the first layer refuses them."""
    for module in (layerwise, sensitivity):
        monkeypatch.setattr(module, "rope_tables", lambda a, length, _device: tables(a, length))
    with pytest.raises(FakeTensorDeviceMismatchError):
        walk(calibrator(recipe, elsewhere, monkeypatch))


# ── integers of one processor are never another's ───────────────────────────────────────────────────────────────────


QUICK = Mixture(
    name="quick",
    description="a few windows",
    length=32,
    held_out_every=2,
    texts=(CalibrationText(file="prose.txt", windows=4),),
    generated=None,
)


@pytest.fixture
def quant():
    return load_plan("tiny", "int4-g32-scales", "onnx-cpu").quant.model_copy(update={"calibration": QUICK})


@pytest.fixture(scope="module")
def opened():
    return checkpoints.load(load_plan("tiny", "int4-g32", "onnx-cpu").model, None)


@pytest.mark.parametrize(("recipe", "kinds"), [("int4-g32", 1), ("int4-g32-scales", 3)])
def test_a_key_names_the_processor_where_something_is_calibrated(recipe, kinds, opened):
    quant = load_plan("tiny", recipe, "onnx-cpu").quant
    known = [processor if quant.calibration else None for processor in (_HERE, "cpu x86_64 other", "cuda NVIDIA H200")]
    assert len({quantization.content_key(opened, quant, processor) for processor in known}) == kinds


def test_integers_of_another_kind_of_processor_need_its_store(opened, tmp_path, quant):
    key = quantization.content_key(opened, quant, "cuda NVIDIA H200")
    with pytest.raises(ExportError, match=rf"calibrated on cuda NVIDIA H200, .* build/cache/quantized-{key[:16]}"):
        quantization.requantize(opened, quant, tmp_path, "cuda NVIDIA H200")


def test_integers_of_a_like_processor_are_computed_again_and_say_so(opened, tmp_path, quant):
    other = f"{_HERE.rpartition(' ')[0]} OTHER"
    again = quantization.requantize(opened, quant, tmp_path, other)
    assert again.calibration.processor == _HERE
    assert again.key == quantization.content_key(opened, quant, _HERE)


def test_a_stored_result_is_used_wherever_it_was_computed(opened, tmp_path, quant, monkeypatch):
    there = quantization.quantize(opened, quant, tmp_path)
    monkeypatch.setattr(processors, "name", lambda _device: "cpu sparc V9")
    assert quantization.requantize(opened, quant, tmp_path, there.calibration.processor).key == there.key


# ── the option ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_is_refused_where_nothing_is_calibrated():
    with pytest.raises(ExportError, match="recipe 'int4-g32' calibrates nothing; leave the option out"):
        load_plan("tiny", "int4-g32", "onnx-cpu", device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_before_a_weight_is_read(tmp_path):
    with pytest.raises(ExportError, match=r"--device cuda: PyTorch .* finds no GPU here; .* or leave the option out"):
        build("tiny", "int4-g32-scales", "onnx-cpu", device="cuda", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_kernels_or_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_a, **_k: raises(RuntimeError("no kernel image is available\nmore")))
    with pytest.raises(ExportError, match=r"^--device cuda: no kernel image is available; leave the option out"):
        processors.require("cuda")
    with (
        pytest.raises(ExportError, match=r"^--device cuda: out of memory; end what else"),
        processors.computing_on("cuda"),
    ):
        raise torch.OutOfMemoryError("out of memory.\nmore")


def raises(error):
    raise error


def test_an_artifact_of_the_other_device_is_built_again(tmp_path):
    build("tiny", "int4-g32", "onnx-cpu", out=tmp_path / "out")
    plan = load_plan("tiny", "int4-g32", "onnx-cpu").model_copy(update={"device": "cuda"})
    assert skip.reasons(plan, None, tmp_path / "out") == ["device: cuda, was cpu"]


# ── devices compared ────────────────────────────────────────────────────────────────────────────────────────────────


def ended(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["calibrations", *words])
    return run(calibrations.app)


def test_devices_are_compared_with_the_first(tmp_path, monkeypatch, capsys):
    weight = torch.zeros(4, 32, dtype=torch.int8)
    other = weight.clone()
    other[0] = 1
    info = CalibrationInfo(texts={}, day=None, tokens=1, held_out_kl=0.25, candidates=(), processor="cpu that")
    results = iter(
        Result({"w": Rounded(integers, torch.ones(4, 1), 1.0, 0.0, 0.0)}, None, info, (), {})
        for integers in (weight, other)
    )
    monkeypatch.setattr(calibrations, "_calibrated", lambda *_: next(results))
    words = ["tiny", "int4-g32-gptq", "--on", "cpu,cpu", "--text", str(tmp_path)]
    assert ended(monkeypatch, *words) == 0
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[5], row[6]) for row in rows] == [("0.2500", ""), ("0.2500", "25.0%")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("int4-g32-scales", "--on", "cpu"), "recipe 'int4-g32-scales': method 'scales' measures no loss"),
        pytest.param(
            ("int4-g32-gptq", "--on", "cuda"),
            "--device cuda: PyTorch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(words, line, tmp_path, monkeypatch, capsys):
    assert ended(monkeypatch, "tiny", *words, "--text", str(tmp_path)) == 1
    assert line in capsys.readouterr().err
