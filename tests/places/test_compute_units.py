"""`compute_units` of a device's YAML: what Core ML runs on there, whoever opens the package, and in the record."""

import json
import sys

import pytest
from pydantic import ValidationError

import devices
from export import manifest
from runtime_tests import coreml, places
from runtime_tests.device_runner import mlpackage as runner
from runtime_tests.evidence import proof
from runtime_tests.jobs import GenerateJob, isolation
from runtime_tests.places import environment, facts
from runtime_tests.sessions import mlpackage, open_session

JOB = GenerateJob(folder="x", threads=1, prompt=(1,), count=1)


def test_a_device_that_says_nothing_has_its_gpu():
    fields = devices.load("host").model_dump() | {"compute_units": "gpu"}
    with pytest.raises(ValidationError, match="compute_units"):
        devices.Device.model_validate(fields)
    del fields["compute_units"]
    assert devices.Device.model_validate(fields).compute_units == "cpu_gpu"


def test_a_job_on_this_machine_knows_its_devices_units(monkeypatch):
    program = f"import json, os; print(json.dumps({{'result': {{'units': os.environ.get('{mlpackage.UNITS}')}}}}))"
    monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", program))
    monkeypatch.delenv(mlpackage.UNITS, raising=False)
    assert places.ThisMachine(1, "all").run(JOB, limit_s=60).result == {"units": "all"}
    assert isolation.run(JOB, limit_s=60).result == {"units": None}


@pytest.mark.parametrize(("told", "units"), [("cpu_ne", "cpu_ne"), (None, "cpu")])
def test_a_session_runs_on_the_units_of_its_job_or_of_this_machine(monkeypatch, tiny, told, units):
    pytest.importorskip("coremltools")
    folder, asked = tiny("coreml"), []

    def loaded(package, compute_units, cache):
        asked.append((package, compute_units, cache))
        return mlpackage.Evaluated(package, 1)

    monkeypatch.setenv(mlpackage.UNITS, told) if told else monkeypatch.delenv(mlpackage.UNITS, raising=False)
    monkeypatch.setattr(mlpackage, "in_core_ml", lambda: True)
    monkeypatch.setattr(mlpackage, "loaded", loaded)
    host = devices.load("host").model_copy(update={"compute_units": "cpu"})
    monkeypatch.setattr(devices, "load", {"host": host}.__getitem__)
    session = open_session(folder, manifest.read(folder), threads=1)
    assert asked == [(folder / "model.mlpackage", units, manifest.ROOT / "build/compiled")]
    assert session.measures_speed


@pytest.mark.parametrize("units", ["cpu", "cpu_gpu", "cpu_ne", "all"])
def test_coremltools_has_all_units(units):
    ct = pytest.importorskip("coremltools")
    assert mlpackage.unit(units) in ct.ComputeUnit
    with pytest.raises(ValueError, match=r"^LLAMA_COMPUTE_UNITS: 'gpu', expected one of cpu, cpu_gpu, cpu_ne, all$"):
        mlpackage.unit("gpu")


def test_a_runner_is_started_with_its_devices_units():
    class Mac:
        def run(self, command, *, timeout_s):
            return devices.Completed(2, json.dumps({"error": "model", "stage": "usage"}).encode(), b"")

        def push(self, local, remote, *, timeout_s, only=None):
            pass

    device = devices.load("macbook-m3").model_copy(update={"compute_units": "cpu_ne"})
    install = Mac()
    install.run = lambda command, *, timeout_s: devices.Completed(
        0 if command[0] == "sh" else 2, b'{"error": "model, script", "stage": "usage"}', b""
    )
    assert f"{mlpackage.UNITS}=cpu_ne" in runner.install(install, device, timeout_s=1)


def test_a_record_names_the_build_of_the_system_and_the_units(monkeypatch):
    monkeypatch.setattr(coreml, "in_core_ml", lambda: True)
    assert places.ThisMachine(1, "cpu").environment().tools["Core ML"] == "cpu"
    monkeypatch.setattr(coreml, "in_core_ml", lambda: False)
    assert "Core ML" not in environment.current("cpu").tools
    assert 'say os "macOS $(sw_vers -productVersion) ($(sw_vers -buildVersion))"' in facts.SCRIPT


def test_what_was_proven_on_other_units_is_proven_again(monkeypatch, tmp_path):
    """The key of a proof is made before and after a run, of the same machine."""
    asked = []
    monkeypatch.setattr(environment, "current", lambda units=None: asked.append(units))
    proof.without([], devices.load("host"), None, tmp_path / "records.jsonl")
    places.ThisMachine(1, "cpu_gpu").environment()
    assert asked == ["cpu_gpu", "cpu_gpu"]
