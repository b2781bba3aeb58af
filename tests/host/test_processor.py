"""How much of a machine a process may use: affinity and shares of control groups, memory that macOS gives up."""

import os
import re
import struct
import subprocess
import sys

import pytest

from export.host import darwin, memory, processor
from export.manifest import ROOT
from export.quantization import nearest
from runtime_tests.sessions import footprint


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def shares(tmp_path):
    def of(line):
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cgroup").write_text(line)
        return list(processor.shares(tmp_path / "proc", tmp_path / "cgroup"))

    return of


@pytest.mark.parametrize(
    ("quota", "processors"),
    [
        ("200000 100000", [2]),
        ("150000 100000", [1]),
        ("50000 100000", [1]),
        ("max 100000", []),
        ("6400000 100000", [64]),
    ],
)
def test_a_share_of_version_2(tmp_path, shares, quota, processors):
    """`docker run --cpus=2` writes the first; no share counts as a whole processor that is not one."""
    group(tmp_path / "cgroup", cpu__max=quota)
    assert shares("0::/\n") == processors


def test_a_share_above_counts_too(tmp_path, shares):
    group(tmp_path / "cgroup/pod/app", cpu__max="max 100000")
    group(tmp_path / "cgroup/pod", cpu__max="300000 100000")
    assert shares("0::/pod/app\n") == [3]


def test_a_share_of_version_1(tmp_path, shares):
    group(tmp_path / "cgroup/cpu/docker/x", cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    group(tmp_path / "cgroup/cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert shares("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n") == [4]


def test_a_system_without_control_groups_shares_nothing(tmp_path):
    assert list(processor.shares(tmp_path, tmp_path)) == []


@pytest.mark.parametrize(("given", "then"), [({}, "1"), ({"OMP_NUM_THREADS": "7"}, "7")])
def test_torch_takes_no_more_threads_than_the_share(given, then):
    code = (
        "from export.host import processor; processor.shares = lambda: iter([1])\n"
        "processor._allowed = lambda: 64\nprocessor.limit_threads(); import os; print(os.environ['OMP_NUM_THREADS'])"
    )
    around = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    done = subprocess.run(
        [sys.executable, "-c", code], env=around, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{then}\n"


def test_without_a_share_threads_are_left_as_they_are(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processor, "shares", lambda: iter(()))
    processor.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("gigabytes", "processors", "blocks"), [(128, 64, 64), (8, 64, 9), (2, 8, 2), (0.5, 2, 1), (24, 2, 2)]
)
def test_blocks_in_flight_are_as_many_as_processors_and_memory_hold(monkeypatch, gigabytes, processors, blocks):
    monkeypatch.setattr(processor, "usable", lambda: processors)
    monkeypatch.setattr(memory, "free", lambda: memory.Room(int(gigabytes * 1e9), "this machine"))
    assert nearest.blocks_at_once() == blocks


@pytest.mark.parametrize(("level", "gives_up"), [(49, 2**34 * 49 // 100), (None, 4.8e9)])
def test_macos_gives_up_more_than_is_free(monkeypatch, level, gives_up):
    """`memory_pressure` of a 16 GB Mac in use: `System-wide memory free percentage: 49%`; psutil has 4.8 GB."""
    told = type("", (), {"total": 2**34, "available": 4.8e9})
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: told)
    monkeypatch.setattr(memory, "cgroup_rooms", lambda: iter(()))
    assert memory.free().bytes == 4.8e9
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(darwin, "sysctl", {"kern.memorystatus_level": level}.get)
    assert memory.free().bytes == gives_up


def test_memory_of_a_container_is_what_its_group_has(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cgroup").write_text("0::/\n")
    group(tmp_path / "cgroup", memory__max=2**30)
    assert memory.total_bytes(tmp_path / "proc", tmp_path / "cgroup") == 2**30


RUSAGE_INFO_V4 = """
    user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size phys_footprint
    proc_start_abstime proc_exit_abstime child_user_time child_system_time child_pkg_idle_wkups
    child_interrupt_wkups child_pageins child_elapsed_abstime diskio_bytesread diskio_byteswritten
    cpu_time_qos_default cpu_time_qos_maintenance cpu_time_qos_background cpu_time_qos_utility
    cpu_time_qos_legacy cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time
    serviced_system_time logical_writes lifetime_max_phys_footprint instructions cycles billed_energy
    serviced_energy interval_max_phys_footprint runnable_time
"""
"""Fields of the `struct rusage_info_v4` of <sys/resource.h> after 16 bytes of UUID, without their `ri_`."""


def test_a_footprint_is_read_at_its_place_in_the_kernels_answer():
    fields = re.findall(r"\w+", RUSAGE_INFO_V4)
    values = {"phys_footprint": 3 * 10**9, "lifetime_max_phys_footprint": 5 * 10**9}
    usage = bytes(16) + struct.pack(f"{len(fields)}Q", *(values.get(name, 7) for name in fields))
    assert footprint.footprint(usage) == (3 * 10**9, 5 * 10**9)


def test_linux_tells_what_is_resident():
    status = "Name:\tpython\nVmHWM:\t  123456 kB\nVmRSS:\t    1000 kB\n"
    assert footprint.in_status(status, "VmHWM:") == 123456 * 1024
    assert footprint.in_status("Name:\tsh\n", "VmHWM:") == 0
    assert 10**7 < footprint.held_bytes() <= footprint.peak_bytes() < 10**11
