"""Android devices through the `adb` program. Knows nothing of what runs there."""

import importlib.util
import os
import shutil
import threading
import time
from pathlib import Path

from . import processes
from .processes import Deadline
from .transport import DeviceError, DeviceLostError

READY = "device"
PASSING = {"authorizing", "connecting"}
ADVICE = {
    "unauthorized": "unlock its screen and allow USB debugging for this computer",
    "offline": "it does not answer: unplug it and plug it in again, or restart it",
    "recovery": "it is in recovery mode: restart it",
    "sideload": "it is in sideload mode: restart it",
    "bootloader": "it is in its bootloader: restart it",
    "no permissions": "this user may not open it: install Debian's package android-sdk-platform-tools-common",
}
_starting = threading.Lock()
"""The first adb of a machine starts a server: one at a time."""


class AdbLink:
    """The shell of one Android device."""

    # 1: adb's own errors, 255: the connection ended
    unsure = frozenset({1, 255})

    def __init__(self, name: str, program: str, serial: str) -> None:
        self.name = name
        self._program = program
        self._serial = serial

    def client(self, script: str) -> list[str]:
        require_server()
        return [self._program, "-s", self._serial, "shell", script]

    def explain(self, _stderr: bytes, /) -> str:
        try:
            state = states(self._program, Deadline.after(5)).get(self._serial)
        except DeviceError as error:
            return str(error)
        return advice(self._serial, state) if state != READY else "the connection was interrupted; run again"

    def close(self) -> None:
        pass


def find() -> str:
    """The adb program: $ADB, else the one on PATH, else the one inside the Python package adbutils."""
    if chosen := os.environ.get("ADB"):
        if shutil.which(chosen) is None:
            raise DeviceError(f"ADB={chosen}: no such program")
        return chosen
    if found := shutil.which("adb"):
        return found
    bundled = importlib.util.find_spec("adbutils")
    if bundled and bundled.origin:
        program = Path(bundled.origin).parent / "binaries" / "adb"
        if program.exists():
            return str(program)
    raise DeviceError("adb is not installed: install Debian's package adb or Android's platform-tools, or set ADB")


def connect(name: str, serial: str | None, variable: str, deadline: Deadline) -> AdbLink:
    """The device of that serial; without one, the only one attached. `variable` is what settles an open choice."""
    program = find()
    attached = states(program, deadline)
    if serial is None:
        if not attached:
            raise DeviceError(f"{name}: no Android device is attached")
        if len(attached) > 1:
            raise DeviceError(f"{name}: {len(attached)} devices are attached ({', '.join(attached)}): set {variable}")
        (serial,) = attached
    passing = PASSING
    if attached.get(serial) != READY and ":" in serial:
        # A network device; what these print is no answer, its state afterwards is. One that was lost stays listed as
        # connected, and a new one is offline until it answers.
        call(program, ["disconnect", serial], deadline)
        call(program, ["connect", serial], deadline)
        passing = PASSING | {"offline"}
    while (state := states(program, deadline).get(serial)) in passing and deadline.left_s():
        time.sleep(0.1)
    if state != READY:
        raise DeviceError(f"{name}: {advice(serial, state)}")
    return AdbLink(name, program, serial)


def states(program: str, deadline: Deadline) -> dict[str, str]:
    """Serial → state of every device adb knows."""
    with _starting:
        lines = call(program, ["devices"], deadline).splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def require_server() -> None:
    """Raise DeviceLostError where a server of a place of its own was named and is gone: adb would start another."""
    kind, _, path = os.environ.get("ADB_SERVER_SOCKET", "").partition(":")
    if kind == "localfilesystem" and not Path(path).is_socket():
        raise DeviceLostError(f"the adb server at {path} ended")


def call(program: str, arguments: list[str], deadline: Deadline) -> str:
    """One question to the adb server."""
    require_server()
    try:
        ended = processes.call([program, *arguments], deadline)
    except TimeoutError:
        raise DeviceError(f"adb {arguments[0]}: no answer within {deadline.limit_s:g} s; try adb kill-server") from None
    if ended.returncode and arguments[0] not in {"connect", "disconnect"}:
        reason = ended.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise DeviceError(f"adb {arguments[0]}: {reason[-1]}")
    return ended.stdout.decode(errors="replace")


def advice(serial: str, state: str | None) -> str:
    """What a state means and what to do, in one line."""
    if state is None:
        return f"{serial} is not attached: connect it, or name another (adb devices lists them)"
    known = next((text for start, text in ADVICE.items() if state.startswith(start)), "restart it")
    return f"{serial} is {state}: {known}"
