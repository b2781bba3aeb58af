"""Devices without hardware: real arm64 adbd and sshd in namespaces, with qemu executing their programs.

Times measured there mean nothing; files, exit codes, errors and arm64 arithmetic are real.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from devices.transports import last_line

from . import host, machines, roots
from .machines import MACHINES, LabError

__all__ = ["MACHINES", "Emulated", "LabError", "lacks", "start"]

_START_LIMIT_S = 90
_KERNEL = (6, 7)
"""The first Linux with a binfmt_misc in every user namespace."""
_DATA_MB = 1536
"""Room for files on the device. Only what they fill takes memory."""
PACKAGES = {"adb": "adb", "mmdebstrap": "mmdebstrap", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
"""Program → Debian package it comes from."""
TOOLS = {"cmake": "cmake", "make": "make", "g++": "g++", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
"""Likewise, for building programs for the devices. The lab runs without them."""


@dataclass(frozen=True)
class Emulated:
    """A running device, with the faults that can happen to one."""

    name: str
    port: int
    """Where it answers on this host's 127.0.0.1."""
    environment: dict[str, str]
    """The variables that its YAML and its clients read."""
    init: int
    """Process id, on this host, of the device's process 1."""
    data: Path
    """Its files, as a path on this host that is valid while it runs."""

    def processes(self) -> dict[int, str]:
        """Process id on this host → command line, of all processes of the device except its process 1."""
        space = _namespace_of(self.init)
        lines = {}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if pid != self.init and space and _namespace_of(pid) == space:
                with suppress(FileNotFoundError, ProcessLookupError):  # it may end in between
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    lines[pid] = " ".join(words).strip()
        return lines

    def freeze(self) -> None:
        """Stop answering; connections stay open."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue after `freeze`."""
        self._signal_all(signal.SIGCONT)

    def unplug(self) -> None:
        """Take its network down; its processes continue."""
        os.kill(self.init, signal.SIGUSR1)

    def plug(self) -> None:
        """Bring its network up again."""
        os.kill(self.init, signal.SIGUSR2)

    def crash(self) -> None:
        """Kill all its processes; its files stay. Returns when its daemon is back."""
        killed = self.processes().keys()
        self._signal_all(signal.SIGKILL)
        deadline = time.monotonic() + _START_LIMIT_S
        while killed & self.processes().keys() or not _listens(self.init, MACHINES[self.name].port):
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: its daemon did not come back")
            time.sleep(0.02)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _namespace_of(pid: int) -> str:
    """The pid namespace of a process; empty when the process has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _listens(pid: int, port: int) -> bool:
    """Whether a socket listens on that port in that process's network namespace."""
    tables = (Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    columns = (line.split() for lines in tables for line in lines)
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in columns)


def missing(packages: dict[str, str]) -> list[str]:
    """Those packages whose programs this machine lacks."""
    return sorted({package for program, package in packages.items() if not shutil.which(program)})


def lacks() -> str | None:
    """What this machine lacks to run the lab; None: nothing."""
    if os.uname().sysname != "Linux":
        return "Linux, whose namespaces it is made of"
    if packages := missing(PACKAGES):
        return f"Debian's {', '.join(packages)}: make lab"
    if os.geteuid() != 0:
        return "root: it makes namespaces and mounts"
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if release < _KERNEL:
        return f"Linux {_KERNEL[0]}.{_KERNEL[1]}, for a binfmt_misc of its own; this is {os.uname().release}"
    separate = ["unshare", "--user", "--mount", "--net", "--pid", "--ipc", "--fork", "true"]
    if subprocess.run(separate, capture_output=True, check=False).returncode:
        return "a kernel or container that allows user namespaces (docker: --privileged)"
    return None


@contextmanager
def start(name: str, *, data_mb: int = _DATA_MB) -> Iterator[Emulated]:
    """A running emulated device. It ends with the block, and with this process however that ends. Raises LabError."""
    if lack := lacks():
        raise LabError(f"the lab needs {lack}")
    machine = MACHINES[name]
    root, qemu = roots.root_of(machine), roots.qemu()
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        side = machines.SIDES[name](Path(scratch))
        spec = host.Spec(name, str(root), str(qemu), data_mb, scratch, side.secrets, side.companion)
        with _running(spec, Path(scratch) / "log") as answer:
            environment = side.environment(answer["port"])
            data = Path(f"/proc/{answer['init']}/root{root}") / machine.data
            yield Emulated(name, answer["port"], environment, answer["init"], data)


@contextmanager
def _running(spec: host.Spec, log: Path) -> Iterator[dict[str, int]]:
    """Run the process that holds the device; yields what it printed when the device answered."""
    with log.open("wb") as errors:
        holder = subprocess.Popen(
            [sys.executable, "-m", "devices.lab.host", spec.dump()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is not for it: it ends with its stdin
        )
    assert holder.stdin
    assert holder.stdout
    try:
        readable, _, _ = select.select([holder.stdout], [], [], _START_LIMIT_S)
        line = holder.stdout.readline() if readable else b""
        if not line:
            raise LabError(f"the emulated device did not start: {last_line(log.read_text(errors='replace'))}")
        yield json.loads(line)
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()
