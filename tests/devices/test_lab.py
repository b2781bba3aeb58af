"""The lab leaves nothing behind on the machine it runs on, however it ends."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devices import lab
from devices.lab import LabError, roots
from tests.support.processes import emulated, left_running

pytestmark = pytest.mark.linux
ROOT = Path(__file__).parents[2]
DEVICES = list(lab.MACHINES)


def surroundings():
    """What a careless emulation would change on the host."""
    formats = Path("/proc/sys/fs/binfmt_misc")
    return Path("/proc/self/mounts").read_text(), sorted(path.name for path in formats.glob("*"))


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_ends_with_its_block(name):
    before = surroundings()
    with emulated(name) as machine:
        assert surroundings() == before
        assert machine.processes()
        scratch = Path(machine.environment.get("EMULATED_PI5_SSH_CONFIG") or adb_socket(machine)).parent
        assert scratch.exists()
    assert left_running(str(scratch)) == []
    assert not Path(f"/proc/{machine.init}").exists()
    assert not scratch.exists()


def adb_socket(machine):
    return machine.environment["ADB_SERVER_SOCKET"].partition(":")[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", DEVICES)
def test_a_device_ends_with_the_process_that_started_it(name, how):
    with emulated(name):  # another one that stays: the asserts below must not see its end
        script = "echo $PPID; env; exec sleep 7801.5"
        command = [sys.executable, "-m", "devices.lab", "run", name, "--", "sh", "-c", script]
        starter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
        try:
            variables = {"emulated-android": b"ADB_SERVER_SOCKET=", "emulated-pi5": b"EMULATED_PI5_SSH_CONFIG="}
            scratch = next(line for line in starter.stdout if line.startswith(variables[name])).strip()
            folder = Path(scratch.decode().partition("=")[2].removeprefix("localfilesystem:")).parent
            # a terminal signals all of them
            os.kill(starter.pid, how) if how == signal.SIGKILL else os.killpg(starter.pid, how)
            starter.wait(timeout=30)
            assert left_running(str(folder), patience_s=20) == []
            assert not folder.exists()
            assert left_running("7801.5") == []
        finally:
            starter.kill()
            starter.wait()
            starter.stdout.close()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(LabError, match="the lab needs Debian's adb, mmdebstrap, openssh-client: make lab"),
        lab.start(DEVICES[0]),
    ):
        pass


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"geteuid": lambda: 1000}, "the lab needs root"),
        (
            {"geteuid": lambda: 0, "uname": lambda: os.uname_result(("Linux", "desk", "6.1.0-17-amd64", "", "x86_64"))},
            "Linux 6.7, .* this is 6.1.0",
        ),
        (
            {"uname": lambda: os.uname_result(("Darwin", "mac", "24.1.0", "", "arm64"))},
            "the lab needs Linux, whose namespaces",
        ),
    ],
)
def test_a_machine_that_cannot_is_told_why(monkeypatch, lacking, message):
    monkeypatch.setattr(lab, "missing", lambda _: [])
    for name, answer in lacking.items():
        monkeypatch.setattr(lab.os, name, answer)
    with pytest.raises(LabError, match=message), lab.start(DEVICES[0]):
        pass


def test_a_command_keeps_its_exit_status_on_devices_that_need_no_lab():
    command = [sys.executable, "-m", "devices.lab", "run", "host", "--", "sh", "-c", "exit 9"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9


def test_a_root_that_cannot_be_made_is_not_there(monkeypatch, tmp_path):
    def fail(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise LabError("no mirror")

    monkeypatch.setattr(roots, "CACHE", tmp_path)
    with pytest.raises(LabError, match="no mirror"):
        roots.made("root", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_locks_two_builders_make_one_root(monkeypatch, tmp_path, notes):
    """The lock saves work only: the slower of two takes what the faster has made."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(roots, "CACHE", tmp_path)
    monkeypatch.setattr(roots.fcntl, "flock", refuse)

    def faster(folder):
        folder.mkdir()
        (folder / "whole").write_text("faster")

    def slower(folder):
        roots.made("root", faster)
        folder.mkdir()
        (folder / "whole").write_text("slower")

    assert (roots.made("root", slower) / "whole").read_text() == "faster"
    assert notes[0] == f"{tmp_path}/.lock: this file system has no locks (No locks available): go on without"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "root"]
