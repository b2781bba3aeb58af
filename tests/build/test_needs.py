"""What a build needs is said before it starts, is about what it takes, and is refused when it is not there."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from export import checkpoints, manifest, pipeline
from export.build import needs
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import digests, disk, memory
from export.plan import load_plan

TARGETS = ("executorch-xnnpack", "coreml", "onnx-cpu")
SIZES = ("tiny", "smollm2-135m", "llama32-1b-instruct", "llama32-3b-instruct")
GB = 1e9


def wanted(model, target, quant="int4-g32", cache=Path("/nowhere"), source="seed:1"):
    plan = load_plan(model, quant, target)
    return needs.estimate(plan, source and parse_origin(source), plan.model.architecture, cache)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    """Figures are those of torch without CUDA, whichever is installed."""
    monkeypatch.setattr(needs, "with_cuda", lambda: False)


def line(stderr):
    (found,) = [each.strip() for each in stderr.splitlines() if each.strip().startswith("needs ")]
    return found


# ── the estimate ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quant", ["int4-g32", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_larger_model_needs_more(target, quant):
    found = [wanted(model, target, quant) for model in SIZES]
    for field in ("memory_bytes", "out_bytes", "largest_file_bytes"):
        sizes = [getattr(one, field) for one in found]
        assert sizes == sorted(set(sizes)), field


@pytest.mark.parametrize(
    ("target", "measured"), [("executorch-xnnpack", 3.16), ("coreml", 2.18), ("onnx-cpu", 2.21)]
)  # fmt: skip
def test_the_estimate_of_1b_is_what_was_measured(target, measured):
    """Peaks of whole processes with seeded weights, GB; `docs/decisions.md` has the others."""
    assert 0.95 * measured < wanted("llama32-1b-instruct", target).memory_bytes / GB < 1.25 * measured


def test_more_of_anything_needs_more():
    plan = load_plan("smollm2-135m", "int4-g32", "executorch-xnnpack")
    small = wanted("smollm2-135m", "executorch-xnnpack").memory_bytes
    for change in ({"vocab_size": 100_000}, {"num_hidden_layers": 60}, {"intermediate_size": 4096}):
        larger = plan.model.architecture.model_copy(update=change)
        assert needs.estimate(plan, parse_origin("seed:1"), larger, Path("/nowhere")).memory_bytes > small, change
    longer = plan.model_copy(update={"model": plan.model.model_copy(update={"context_length": 8192})})
    estimate = needs.estimate(longer, parse_origin("seed:1"), plan.model.architecture, Path("/nowhere"))
    assert estimate.memory_bytes > small


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_that_will_be_refused_has_an_estimate_too(target):
    plan = load_plan("smollm2-135m", "int4-g128", target)
    assert needs.estimate(plan, None, plan.model.architecture, Path("/nowhere")).memory_bytes > 0


def test_what_is_quantized_already_is_not_counted(store, built):
    assert wanted("tiny", "onnx-cpu", cache=store, source=None).cache_bytes == 0
    assert wanted("tiny", "onnx-cpu", cache=store, source="seed:99").cache_bytes > 0
    assert wanted("tiny", "onnx-cpu", "int4-g128", cache=store, source=None).cache_bytes > 0


def test_a_damaged_store_is_not_counted_as_there(tmp_path):
    (tmp_path / "quantized-0.safetensors").write_bytes(b"nonsense")
    assert wanted("tiny", "onnx-cpu", cache=tmp_path, source=None).cache_bytes > 0


def test_a_torch_with_cuda_needs_more_whatever_it_computes_on(monkeypatch, tmp_path):
    without = wanted("tiny", "onnx-cpu").memory_bytes
    monkeypatch.undo()
    (tmp_path / "torch/lib").mkdir(parents=True)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "torch")])
    monkeypatch.setattr(needs, "find_spec", lambda _: found)
    assert wanted("tiny", "onnx-cpu").memory_bytes == without
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    assert wanted("tiny", "onnx-cpu").memory_bytes == without + 450_000_000


@pytest.mark.parametrize("target", TARGETS)
def test_a_real_run_takes_about_what_was_said(target, tmp_path, monkeypatch):
    """Peak of the whole process, with the torch that is installed, and of the disk where its files lie at the end."""
    monkeypatch.undo()
    script = (
        "import sys; from pathlib import Path; from export import pipeline; "
        "from export.plan import load_plan; pipeline.CACHE = Path(sys.argv[2]) / 'cache'; "
        "pipeline.export(load_plan('tiny', 'int4-g32', sys.argv[1]), None, Path(sys.argv[2]) / 'out'); "
        "from runtime_tests.sessions.footprint import peak_bytes; print(peak_bytes())"  # of the child alone
    )
    done = subprocess.run(
        [sys.executable, "-c", script, target, tmp_path],
        cwd=manifest.ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    peak = int(done.stdout.splitlines()[-1])
    said = wanted("tiny", target, cache=tmp_path / "none", source=None)
    assert 0.9 * peak < said.memory_bytes < 1.3 * peak
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert files <= said.out_bytes + said.cache_bytes
    assert line(done.stderr).startswith(f"needs {disk.size(said.memory_bytes)} memory (")


# ── the refusal ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def untouched(monkeypatch, tmp_path):
    """No checkpoint is opened, and nothing is written."""
    for owner, name in ((checkpoints, "load"), (checkpoints, "open_source"), (digests, "remembered_sha256")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(name))
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    yield
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_before_anything_is_read(untouched, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "free", lambda: memory.Room(10, "this machine"))
    monkeypatch.setattr(memory.psutil.Process, "memory_info", lambda _: type("", (), {"rss": 3 * 10**9, "vms": 0}))
    plan = load_plan("llama32-3b-instruct", "int4-g32", "executorch-xnnpack")
    with pytest.raises(
        ExportError,
        match=r"^llama32-3b-\S*: needs 7.3 GB of memory, 3.0 GB are available \(this machine\), 4.3 GB are missing",
    ):
        pipeline.export(plan, None, tmp_path / "out")
    assert "needs 7.3 GB memory (3.0 GB available), " in capsys.readouterr().err


def test_too_little_disk_is_refused_before_anything_is_read(untouched, monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 3 * 10**9)
    plan = load_plan("llama32-3b-instruct", "int4-g32", "onnx-cpu")
    monkeypatch.setattr(memory, "free", lambda: memory.Room(10**12, "this machine"))
    with pytest.raises(ExportError, match=rf"^{tmp_path}: needs 5,[5-6]\d\d.\d MB on the disk, has 3,000.0 MB; free 2"):
        pipeline.export(plan, None, tmp_path / "out")


def test_a_cache_on_another_disk_is_asked_for_itself(monkeypatch, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(disk, "device", lambda folder: folder.name)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**6 if folder.name == "cache" else 10**9)
    with pytest.raises(ExportError, match=rf"^{tmp_path / 'cache'}: needs 147.9 MB on the disk, has 1.0 MB"):
        needs.require(wanted("smollm2-135m", "onnx-cpu"), tmp_path / "out", tmp_path / "cache")
    said = capsys.readouterr().err
    assert f"disk at {tmp_path} (1.0 GB free)" in said
    assert f"0.1 GB disk at {tmp_path / 'cache'} (1.0 MB free)" in said


@pytest.mark.linux
def test_a_limit_on_address_space_is_named_by_the_real_command(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9))

    done = subprocess.run(
        [sys.executable, "-m", "export", "llama32-3b-instruct", "int4-g32", "coreml", "--out", tmp_path / "out"],
        cwd=manifest.ROOT, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    said, error = done.stderr.strip().splitlines()[-2:]
    assert done.returncode == 1
    told = re.match(r"needs (4\.[48] GB) memory \(([1-3]\.\d GB) available\), ", said.strip())  # of both kinds of torch
    assert error.startswith(
        f"error: llama32-3b-instruct_int4-g32_coreml: needs {told[1]} of memory, {told[2]} are available (ulimit -v), "
    )
    assert list(tmp_path.iterdir()) == []


# ── how much there is ───────────────────────────────────────────────────────────────────────────────────────────────


def group(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def rooms(tmp_path, line):
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(line)
    return [(room.bytes, room.limited_by) for room in memory.cgroup_rooms(proc, tmp_path / "cgroup")]


def test_limits_of_control_groups_version_2_count_with_those_above(tmp_path):
    mount = tmp_path / "cgroup"
    stat = "anon 5\ninactive_file 100\nactive_file 20\nfile 300"
    group(mount / "slice", memory__max=9000, memory__current=500, memory__stat=stat)
    group(mount / "slice" / "job", memory__max="max", memory__current=500, memory__stat=stat)
    assert rooms(tmp_path, "0::/slice/job\n") == [(9000 - 500 + 120, "the control group's memory.max")]


def test_limits_of_control_groups_version_1(tmp_path):
    mount = tmp_path / "cgroup" / "memory"
    limit, used = "memory__limit_in_bytes", "memory__usage_in_bytes"
    group(mount, **{limit: 2**63 - 4096, used: 70, "memory__stat": ""})
    group(mount / "docker" / "x", **{limit: 100, used: 170, "memory__stat": "total_inactive_file 30\ninactive_file 7"})
    found = rooms(tmp_path, "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    assert [size for size, _ in found] == [0, 2**63 - 4096 - 70]


def test_a_container_that_sees_the_hosts_path_but_its_own_group(tmp_path):
    group(tmp_path / "cgroup" / "memory", memory__limit_in_bytes=50, memory__usage_in_bytes=20, memory__stat="")
    assert rooms(tmp_path, "4:memory:/docker/abc\n") == [(30, "the control group's memory.limit_in_bytes")]


def test_the_smallest_room_is_the_one(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_rooms", lambda *_: iter([memory.Room(7, "a group"), memory.Room(9, "above")]))
    assert memory.free() == memory.Room(7, "a group")


def test_a_system_without_control_groups_has_no_such_limit(tmp_path):
    assert list(memory.cgroup_rooms(tmp_path, tmp_path)) == []
