"""How the child of a job waits: asleep where nothing is timed, and as the runtime does where it is what users get."""

import io
import os
from types import SimpleNamespace

import pytest

from runtime_tests import jobs
from runtime_tests.jobs import worker

SPEED = jobs.BandwidthJob(threads=1)
REFERENCE = jobs.ReferenceJob.model_construct(action="reference")


@pytest.mark.parametrize(("job", "waits"), [(SPEED, None), (REFERENCE, "passive")])
def test_threads_wait_asleep_only_where_nothing_is_timed(monkeypatch, job, waits):
    seen = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(worker.sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    monkeypatch.setattr(worker.processes, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker.jobs.AnyJob, "model_validate_json", lambda _: SimpleNamespace(root=job))
    monkeypatch.setattr(worker, "answer", lambda _: seen.append(os.environ.get("OMP_WAIT_POLICY")) or {"result": {}})
    assert worker.main() == 0
    assert seen == [waits]
