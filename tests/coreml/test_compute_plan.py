"""Where Core ML would run each operation: counted from a plan, refused without a Mac."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.build.command import run as run_app
from export.errors import ExportError
from runtime_tests.coreml import compute_plan


class MLCPUComputeDevice:
    """Named as coremltools names it."""


class MLNeuralEngineComputeDevice:
    """Named as coremltools names it."""


def operation(name, *blocks):
    return SimpleNamespace(operator_name=name, blocks=list(blocks))


def block(*operations):
    return SimpleNamespace(operations=operations)


@pytest.fixture
def plan():
    """Two linears, and a softmax inside a loop; Core ML does not report where the loop itself runs."""
    program = block(
        operation("ios18.const"),
        operation("ios18.linear"),
        operation("linear"),
        operation("while", block(operation("softmax"))),
    )
    devices = {"linear": MLNeuralEngineComputeDevice(), "softmax": MLCPUComputeDevice()}

    def usage(operation):
        device = devices.get(operation.operator_name.removeprefix("ios18."))
        return device and SimpleNamespace(preferred_compute_device=device)

    functions = {"main": SimpleNamespace(block=program)}
    return SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions=functions)),
        get_compute_device_usage_for_mlprogram_operation=usage,
    )


def test_operations_are_counted_by_device(plan):
    placements = compute_plan.counts(plan)
    assert placements == {("NeuralEngine", "linear"): 2, ("CPU", "softmax"): 1, ("not told", "while"): 1}
    page = compute_plan.render("tiny", "cpu_ne", placements)
    assert "plan of `tiny` on cpu_ne" in page
    assert "4 operations: 2 on NeuralEngine, 1 on not told, 1 on CPU" in page
    assert "| NeuralEngine | linear | 2 |" in page


def test_the_compiled_package_is_there_while_its_plan_is_read(plan, monkeypatch, tmp_path):
    """Core ML's own copy goes with the object that made it."""
    ct = pytest.importorskip("coremltools")
    from coremltools.models import compute_plan as theirs

    def compiled(_package, to):
        Path(to).mkdir()
        return to

    def loaded(path, compute_units):
        assert Path(path).is_dir()
        assert Path(path).name == "model.mlmodelc"
        assert compute_units is ct.ComputeUnit.CPU_AND_NE
        return plan

    monkeypatch.setattr(compute_plan.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ct.models.utils, "compile_model", compiled)
    monkeypatch.setattr(theirs.MLComputePlan, "load_from_path", loaded)
    monkeypatch.setattr(compute_plan.mlpackage, "cache_here", lambda: tmp_path / "compiled")
    monkeypatch.setattr(compute_plan.mlpackage, "os_build", lambda: "24B83")
    assert compute_plan.placements(tmp_path / "model.mlpackage", "cpu_ne").total() == 4


def test_a_model_that_is_no_program_is_refused(plan):
    plan.model_structure.program = None
    with pytest.raises(ExportError, match="no ML Program"):
        compute_plan.counts(plan)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has a plan")
@pytest.mark.parametrize(("target", "message"), [("coreml", "on a Mac only"), ("onnx-cpu", "not a Core ML package")])
def test_without_a_mac_or_a_package_the_error_is_one_line(tiny, target, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compute_plan", str(tiny(target)), "--out", str(tmp_path / "ci")])
    assert run_app(compute_plan.app) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert not (tmp_path / "ci").exists()
