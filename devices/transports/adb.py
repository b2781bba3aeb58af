"""Android devices through the `adb` program."""

import importlib.util
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import ClassVar, Literal

from . import Completed, DeviceError, DeviceLostError, FloodError, last_line, packages, processes
from .address import Address, lookup, variable
from .processes import Deadline

_READY = "device"
_PASSING = {"authorizing", "connecting"}
_ADVICE = {
    "unauthorized": "unlock its screen and allow USB debugging for this computer",
    "offline": "it does not answer: unplug it and plug it in again, or restart it",
    "recovery": "it is in recovery mode: restart it",
    "sideload": "it is in sideload mode: restart it",
    "bootloader": "it is in its bootloader: restart it",
    "no permissions": f"this user may not open it: {packages.hint('adb rules')}",
}
_starting = threading.Lock()
"""The first adb of a machine starts a server: one at a time."""


class Adb(Address):
    """An Android device."""

    bionic: ClassVar[bool] = True

    kind: Literal["adb"]
    """Over adb, to Android."""
    serial: str
    """As `adb devices` lists it; an unset variable means the only device attached."""
    model: str | None
    """Regular expression of its `ro.product.model`, so that another phone is not taken for it; null: any."""

    def connect(self, device: str, deadline: Deadline, /) -> "_AdbLink":
        choice = variable(self.serial) or f"transport.serial in devices/{device}.yaml"
        return _connect(device, lookup(self.serial), choice, deadline)

    def mismatch(self, model: str | None) -> str | None:
        if not self.model or re.fullmatch(self.model, model or ""):
            return None
        return f"the attached device is {model or 'not Android'}, not {self.model}"


class _AdbLink:
    def __init__(self, name: str, program: str, serial: str) -> None:
        self.name = name
        self._program = program
        self._serial = serial

    def client(self, script: str) -> list[str]:
        _require_server()
        return [self._program, "-s", self._serial, "shell", script]

    def explain(self, ended: Completed, /) -> str:
        try:
            trouble = _trouble(self._serial, _listed(self._program, Deadline.after(5)))
        except DeviceError as error:
            return str(error)
        words = last_line((ended.stdout + b"\n" + ended.stderr).decode(errors="replace"), "")
        return trouble or f"the connection was interrupted{f' ({words})' if words else ''}; run again"

    def close(self) -> None:
        pass


def find() -> str:
    """The adb program: $ADB, else the one on PATH, else the one inside the Python package adbutils."""
    if chosen := os.environ.get("ADB"):
        if shutil.which(chosen) is None:
            raise DeviceError(f"ADB={chosen}: no such program")
        return chosen
    if installed := shutil.which("adb"):
        return installed
    bundled = importlib.util.find_spec("adbutils")
    if bundled and bundled.origin:
        program = Path(bundled.origin).parent / "binaries" / "adb"
        if program.exists():
            return str(program)
    raise DeviceError(f"adb is not installed: {packages.hint('adb')}, or set ADB to that of Android's platform-tools")


def _connect(name: str, serial: str | None, choice: str, deadline: Deadline) -> _AdbLink:
    """The device of that serial; without one, the only one attached. `choice`: what to set where there are several."""
    program = find()
    listed = _listed(program, deadline)
    if serial is None:
        serials = {serial for serial, _ in listed}
        if not listed:
            raise DeviceError(f"{name}: no Android device is attached")
        if len(serials) > 1:
            all_of_them = ", ".join(serial for serial, _ in listed)
            raise DeviceError(f"{name}: {len(listed)} devices are attached ({all_of_them}): set {choice}")
        (serial,) = serials
    passing = _PASSING
    if _states(serial, listed) != [_READY] and ":" in serial:
        # A network device. Its state afterwards counts, not what these commands print: a lost one stays listed as
        # connected, and a new one is offline until it answers.
        _call(program, ["disconnect", serial], deadline)
        _call(program, ["connect", serial], deadline)
        passing = _PASSING | {"offline"}
        listed = _listed(program, deadline)
    while len(states := _states(serial, listed)) == 1 and states[0] in passing and deadline.left_s():
        time.sleep(0.1)
        listed = _listed(program, deadline)
    if trouble := _trouble(serial, listed):
        raise DeviceError(f"{name}: {trouble}")
    return _AdbLink(name, program, serial)


def _listed(program: str, deadline: Deadline) -> list[tuple[str, str]]:
    """Serial and state of every device adb knows. Cheap devices share one serial."""
    with _starting:
        lines = _call(program, ["devices"], deadline).splitlines()
    return [(serial, state.strip()) for serial, tab, state in (line.partition("\t") for line in lines) if tab]


def _states(serial: str, listed: list[tuple[str, str]]) -> list[str]:
    return [state for name, state in listed if name == serial]


def _require_server() -> None:
    """Raise DeviceLostError where the environment names a server's socket that is gone: adb would start another."""
    kind, _, path = os.environ.get("ADB_SERVER_SOCKET", "").partition(":")
    if kind == "localfilesystem" and not Path(path).is_socket():
        raise DeviceLostError(f"the adb server at {path} ended")


def _call(program: str, arguments: list[str], deadline: Deadline) -> str:
    _require_server()
    try:
        ended = processes.call([program, *arguments], deadline)
    except TimeoutError:
        raise DeviceError(f"adb {arguments[0]}: no answer within {deadline.limit_s:g} s; try adb kill-server") from None
    except FloodError as error:
        raise DeviceError(f"adb {arguments[0]}: {error}") from None
    if ended.returncode and arguments[0] not in {"connect", "disconnect"}:
        raise DeviceError(f"adb {arguments[0]}: {ended.reason}")
    return ended.stdout.decode(errors="replace")


def _trouble(serial: str, listed: list[tuple[str, str]]) -> str | None:
    """Why the device of that serial cannot be used and what to do; None: it can."""
    match _states(serial, listed):
        case []:
            return f"{serial} is not attached: connect it, or name another (adb devices lists them)"
        case ["device"]:
            return None
        case [state]:
            return _advice(serial, state)
        case states:
            others = "one" if len(states) == 2 else "all but one"
            return f"{len(states)} devices have the serial {serial}; unplug {others}"


def _advice(serial: str, state: str) -> str:
    known = next((text for start, text in _ADVICE.items() if state.startswith(start)), "restart it")
    return f"{serial} is {state}: {known}"
