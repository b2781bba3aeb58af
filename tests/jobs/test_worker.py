"""How the child of a job waits: asleep where nothing is timed, and as the runtime does where it is what users get.

And what it imports: nothing that takes seconds and that its job does not use.
"""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runtime_tests import jobs
from runtime_tests.jobs import worker

SPEED = jobs.BandwidthJob(threads=1)
REFERENCE = jobs.ReferenceJob.model_construct(action="reference")
LOGITS = jobs.LogitsJob.model_construct(action="logits")


@pytest.mark.parametrize(("job", "waits"), [(SPEED, None), (REFERENCE, "passive"), (LOGITS, "passive")])
def test_threads_wait_asleep_only_where_nothing_is_timed(monkeypatch, job, waits):
    seen = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(worker.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a job\n")))
    monkeypatch.setattr(worker.processes, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker.jobs.AnyJob, "model_validate_json", lambda _: SimpleNamespace(root=job))
    monkeypatch.setattr(worker, "answer", lambda _: seen.append(os.environ.get("OMP_WAIT_POLICY")) or {"result": {}})
    assert worker.main() == 0
    assert seen == [waits]


@pytest.mark.parametrize("package", ["coremltools", "executorch", "torchao"])
def test_no_job_imports_more_than_it_uses(package):
    pytest.importorskip(package)
    parts = ("coreml.evaluator", "reference", "checks.weights", *(["sessions.pte"] if package == "executorch" else []))
    heavy = {"coremltools", "executorch.exir", "torch._dynamo", "torch._inductor", "torchao", "scipy", "transformers"}
    asked = (
        f"import sys; {'; '.join(f'import runtime_tests.{part}' for part in parts)}; "
        "from export.formats.mlpackage import read; from export.model import Llama; "
        "from export.plan import ModelSpec, load_named; Llama(load_named(ModelSpec, 'models', 'tiny').architecture); "
        f"print(*{heavy} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
