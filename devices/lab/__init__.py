"""Devices without hardware: real arm64 adbd and sshd in namespaces, their programs executed by qemu.

Times measured there mean nothing; files, exit codes, errors and arm64 arithmetic are the real ones.
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

from . import host, roots, sides
from .machines import MACHINES
from .roots import LabError

__all__ = ["MACHINES", "Emulated", "LabError", "install", "lacks", "missing_packages", "start"]

START_LIMIT_S = 90
KERNEL = (6, 7)
"""The first Linux with a binfmt_misc in every user namespace."""
DATA_MB = 1536
"""Room for files on the device: memory is taken only for what is there."""
PACKAGES = {"adb": "adb", "mmdebstrap": "mmdebstrap", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
"""Program → Debian package it comes from."""
TOOLS = {"cmake": "cmake", "make": "make", "g++": "g++", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
"""Likewise: what programs for the devices are built with. They start without."""


@dataclass(frozen=True)
class Emulated:
    """A running device, and what can happen to one."""

    name: str
    port: int
    """Where it answers on this host's 127.0.0.1."""
    environment: dict[str, str]
    """What its YAML and its clients read."""
    init: int
    """Process id here of its process 1."""
    data: Path
    """Its files as seen from here, as long as it runs."""

    def processes(self) -> dict[int, str]:
        """Process id here → command line of everything that runs on the device but its process 1."""
        space = namespace_of(self.init)
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if pid != self.init and space and namespace_of(pid) == space:
                with suppress(FileNotFoundError, ProcessLookupError):  # it may end while we look
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[pid] = " ".join(words).strip()
        return found

    def freeze(self) -> None:
        """It stops answering, its connections stay."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        self._signal_all(signal.SIGCONT)

    def unplug(self) -> None:
        """Its network goes down; what runs there goes on."""
        os.kill(self.init, signal.SIGUSR1)

    def plug(self) -> None:
        """Its network comes up again."""
        os.kill(self.init, signal.SIGUSR2)

    def crash(self) -> None:
        """Everything that runs on it dies; its files stay. Returns when its daemon is back."""
        died = self.processes().keys()
        self._signal_all(signal.SIGKILL)
        deadline = time.monotonic() + START_LIMIT_S
        while died & self.processes().keys() or not listens(self.init, MACHINES[self.name].port):
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: its daemon did not come back")
            time.sleep(0.02)

    def switch_off(self) -> None:
        """It dies at once, with all that runs on it."""
        os.kill(self.init, signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def namespace_of(pid: int) -> str:
    """The pid namespace of a process; empty when it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def listens(pid: int, port: int) -> bool:
    """Whether a socket listens on that port in the network of that process."""
    tables = (Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    columns = (line.split() for lines in tables for line in lines)
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in columns)


def missing_packages() -> list[str]:
    """Debian packages the lab needs and this machine lacks."""
    return missing(PACKAGES)


def missing(packages: dict[str, str]) -> list[str]:
    """Those whose programs are not here."""
    return sorted({package for program, package in packages.items() if not shutil.which(program)})


def lacks() -> str | None:
    """What keeps the lab from running on this machine; None when nothing does."""
    if packages := missing_packages():
        return f"Debian's {', '.join(packages)}: make lab"
    if os.geteuid() != 0:
        return "root: it makes namespaces and mounts"
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if release < KERNEL:
        return f"Linux {KERNEL[0]}.{KERNEL[1]}, for a binfmt_misc of its own; this is {os.uname().release}"
    apart = ["unshare", "--user", "--mount", "--net", "--pid", "--ipc", "--fork", "true"]
    if subprocess.run(apart, capture_output=True, check=False).returncode:
        return "a kernel or container that allows user namespaces (docker: --privileged)"
    return None


def install(packages: list[str]) -> None:
    """Install Debian packages on this machine."""
    if not packages:
        return
    if os.geteuid() != 0:
        raise LabError(f"the lab needs Debian's {', '.join(packages)}: sudo apt-get install {' '.join(packages)}")
    for step in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        ended = subprocess.run(["apt-get", "-qq", *step], stdout=subprocess.DEVNULL, check=False)
        if ended.returncode:
            raise LabError(f"apt-get {' '.join(step)} ended with {ended.returncode}")


@contextmanager
def start(name: str, *, data_mb: int = DATA_MB) -> Iterator[Emulated]:
    """A running emulated device. It ends with the block, and with this process however that ends."""
    if lack := lacks():
        raise LabError(f"the lab needs {lack}")
    machine = MACHINES[name]
    root, qemu = roots.root_of(machine), roots.qemu()
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        side = sides.SIDES[name](Path(scratch))
        spec = host.Spec(
            root=str(root),
            qemu=str(qemu),
            daemon=list(machine.daemon),
            port=machine.port,
            cpu=machine.cpu,
            data=machine.data,
            data_mb=data_mb,
            secrets=side.secrets,
            scratch=scratch,
            companion=side.companion,
        )
        with running(spec, Path(scratch) / "log") as answer:
            environment = side.environment(answer["port"])
            data = Path(f"/proc/{answer['init']}/root{root}") / machine.data
            yield Emulated(name, answer["port"], environment, answer["init"], data)


@contextmanager
def running(spec: host.Spec, log: Path) -> Iterator[dict[str, int]]:
    """The process that holds the device, and what it said when the device answered."""
    with log.open("wb") as errors:
        holder = subprocess.Popen(
            [sys.executable, "-m", "devices.lab.host", spec.dump()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is for us; it ends when its stdin does
        )
    assert holder.stdin
    assert holder.stdout
    try:
        readable, _, _ = select.select([holder.stdout], [], [], START_LIMIT_S)
        line = holder.stdout.readline() if readable else b""
        if not line:
            reason = (log.read_text(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise LabError(f"the emulated device did not start: {reason}")
        yield json.loads(line)
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()
