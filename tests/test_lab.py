"""The lab leaves nothing behind on the machine it runs on, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devices import lab

from .conftest import emulated
from .processes import left_running

ROOT = Path(__file__).parent.parent
DEVICES = list(lab.MACHINES)


def surroundings():
    """What a careless emulation would change."""
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
    with emulated(name):  # so that what is asserted below is not another device's end
        command = [
            sys.executable,
            "-m",
            "devices.lab",
            "run",
            name,
            "--",
            "sh",
            "-c",
            "echo $PPID; env; exec sleep 7801.5",
        ]
        starter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
        try:
            variables = {"emulated-android": b"ADB_SERVER_SOCKET=", "emulated-pi5": b"EMULATED_PI5_SSH_CONFIG="}
            scratch = next(line for line in starter.stdout if line.startswith(variables[name])).strip()
            folder = Path(scratch.decode().partition("=")[2].removeprefix("localfilesystem:")).parent
            os.killpg(starter.pid, how)  # as a terminal does
            starter.wait(timeout=30)
            assert left_running(str(folder), patience_s=20) == []
            assert not folder.exists()
            assert left_running("7801.5") == []
        finally:
            starter.kill()
            starter.wait()
            starter.stdout.close()
