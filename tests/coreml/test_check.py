"""What `make mac-check` says of a Mac: tried with the evaluator in Core ML's place, and with models that are wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from export import manifest
from export.build.command import run as run_app
from runtime_tests.coreml import calls, check, findings
from runtime_tests.coreml.findings import Run
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import CoreMLJob, CoreMLPlanJob, isolation, worker
from runtime_tests.jobs.isolation import Ended
from runtime_tests.places import environment
from runtime_tests.sessions import mlpackage

pytest.importorskip("coremltools")
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
STEPS = 4
SHIPPED = ("fused", "cpu_gpu")


@pytest.fixture(scope="module", autouse=True)
def short():
    """As many kinds of calls, of fewer tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "LENGTHS", (1, 2, 5, 16))
        patch.setattr(calls, "CONTEXT", 64)
        yield


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("coreml")


@pytest.fixture(scope="module")
def described(folder):
    return manifest.read(folder)


@pytest.fixture(scope="module")
def ask(folder, tmp_path_factory):
    """Make the calls in a runtime: the evaluator, or what a test puts into Core ML's place."""
    reference = str(tmp_path_factory.mktemp("reference") / "logits.npz")

    def called(units):
        job = CoreMLJob(folder=str(folder), compute_units=units, threads=1, steps=STEPS, reference=reference)
        return isolation.interpret(0, json.dumps({"result": calls.answer(job)}), "")

    called(None)
    return called


class Wrong(mlpackage.Evaluated):
    """Core ML with one fault."""

    def __init__(self, package, fault):
        super().__init__(package, 1)
        self.fault = fault

    def make_state(self):
        self.last = super().make_state()
        return self.last

    def predict(self, inputs, state):
        ids, mask = inputs.values()
        outputs = super().predict(inputs, self.last if self.fault == "one state for all" else state)
        narrow = mask.shape[2] < ids.size
        wrong = {"several rows": ids.size > 1 and not narrow, "narrow masks": narrow, "not a number": ids.size == 16}
        if wrong.get(self.fault):
            outputs["logits"] = outputs["logits"] * np.float32("nan" if self.fault == "not a number" else -1)
        return outputs


@pytest.mark.parametrize(
    ("fault", "red"),
    [
        ("none", set()),
        ("several rows", {"q = 2", "q = 5", "q = 16"}),
        ("not a number", {"q = 16"}),
        ("one state for all", {calls.STATES}),
        ("narrow masks", {calls.MASK}),
    ],
)
def test_a_fault_of_core_ml_is_red_where_it_is_and_nowhere_else(monkeypatch, ask, described, fault, red):
    asked = []

    def loaded(package, units, cache):
        asked.append((units, cache))
        return Wrong(package, fault)

    monkeypatch.setattr(mlpackage, "in_core_ml", lambda: True)
    monkeypatch.setattr(mlpackage, "loaded", loaded)
    one = Run("fused", "cpu_gpu", ask("cpu_gpu"), None)
    assert asked == [("cpu_gpu", mlpackage.cache_here())]
    found = findings.cells(one, described)
    assert {name for name, cell in found.items() if cell.holds is False} == red
    assert {"q = 1", f"{STEPS} steps"} <= {name for name, cell in found.items() if cell.holds}
    text, holds = findings.page(environment.current(), SHIPPED, [("tiny", described, [one])])
    assert holds is not bool(red)
    assert ("If red:" in text) is bool(red)
    assert text.count("✗") == len(red)


def test_a_crash_on_other_units_is_red_in_its_words_and_does_not_decide(ask, described):
    crashed = Run("fused", "cpu", Ended(Outcome.CRASH, "died by SIGSEGV"), None)
    fine = Run("fused", "cpu_gpu", ask("cpu_gpu"), None)
    text, holds = findings.page(environment.current(), SHIPPED, [("tiny", described, [fine, crashed])])
    assert holds
    row, following, *_ = [line for line in text.splitlines() if line.startswith(("| ends well", "| q = 1"))]
    assert row.endswith("| ✗ crash: died by SIGSEGV |")
    assert following.endswith("| – |")
    assert "set `attention: plain` in configs/targets/coreml.yaml" in text
    assert not findings.page(environment.current(), ("fused", "cpu"), [("tiny", described, [fine, crashed])])[1]


@pytest.mark.parametrize(
    ("units", "placed", "holds", "says"),
    [
        ("cpu_gpu", [["GPU", "linear", 9], ["CPU", "cumsum", 1], ["CPU", "add", 2]], True, "2 add, 1 cumsum"),
        ("cpu_gpu", [["GPU", "linear", 9], ["CPU", "softmax", 2]], False, "2 softmax"),
        ("cpu", [["CPU", "linear", 9]], True, "9 linear"),
        ("all", None, False, "run fail: no plan"),
    ],
)
def test_where_operations_run(ask, described, units, placed, holds, says):
    planned = Ended(Outcome.PASS, "", {"placed": placed}) if placed else Ended(Outcome.RUN_FAIL, "no plan")
    cell = findings.cells(Run("fused", units, ask("cpu_gpu"), planned), described)["on the CPU"]
    assert (cell.holds, cell.text) == (holds, says)


def test_memory_is_judged_where_it_is_core_mls(described):
    taken = findings.most_memory(described) + 1
    result = {"load_ms": 1.0, "step_ms": 1.0, "memory_bytes": taken, "compared": {}}
    planned = Ended(Outcome.PASS, "", {"placed": []})
    for plan, holds in ((planned, False), (None, None)):
        found = findings.cells(Run("fused", "cpu_gpu", Ended(Outcome.PASS, "", result), plan), described)
        assert found["memory"].holds is holds


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, in_process, store):
    monkeypatch.setattr("export.pipeline.CACHE", store)
    out = tmp_path / "mac-check"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["check", *words, "--out", str(out)])
        return run_app(check.app), " ".join(capsys.readouterr().err.split()), out

    return run


def test_the_command_without_core_ml(command, monkeypatch):
    monkeypatch.setenv("LLAMA_COREML", "reference")
    code, _, out = command("tiny", f"--steps={STEPS}")
    lines = (out / "index.md").read_text().splitlines()
    assert code == 0
    assert "**The evaluator in Core ML's place: nothing here is Core ML's.**" in lines
    assert "Shipped, fused attention on cpu_gpu: all holds." in lines
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2:] for line in lines if line.startswith("| ")}
    assert cells["q = 16"][0] == "0.0e+00, 200 dB"  # the same package
    assert 50 < float(cells["q = 16"][1].split(", ")[1].split()[0]) < 80  # attention as its parts
    assert sorted(path.name for path in out.iterdir()) == ["index.md", "tiny-fused", "tiny-plain"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has Core ML")
def test_without_a_mac_it_is_one_line_before_any_work(command, monkeypatch):
    monkeypatch.delenv("LLAMA_COREML", raising=False)
    code, error, out = command("tiny")
    assert code == 1
    assert error.startswith("error: mac-check runs Core ML and needs macOS 15 or later; this is Linux")
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has a plan")
def test_jobs_are_answered_by_the_worker(folder, tmp_path):
    job = CoreMLJob(folder=str(folder), compute_units=None, threads=1, steps=1, reference=str(tmp_path / "x.npz"))
    assert worker.answer(job)["result"]["compared"]["q = 1"][0] == 0
    planned = worker.answer(CoreMLPlanJob(package=str(Path(folder) / "model.mlpackage"), compute_units="cpu"))
    assert planned["error"].endswith("Core ML plans its work on a Mac only; this is Linux")
