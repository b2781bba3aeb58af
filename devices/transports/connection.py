"""From a device's YAML to the device itself, checked to be what the YAML says."""

import re
import shlex
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from . import DeviceError, FloodError, Transport, last_line, marks, processes, visible
from .adb import Adb
from .address import Link
from .device import Attached
from .local import Local
from .processes import Deadline
from .shell import Shell
from .ssh import Apple, Ssh
from .transfer import family

if TYPE_CHECKING:
    from devices import Device

AnyAddress = Annotated[Local | Adb | Ssh | Apple, Field(discriminator="kind")]
_OPEN_S = 30.0
_PROBE = """\
mkdir -p {folder} && cd {folder} && pwd && uname -m || exit 1
[ -w . ] || {{ echo "$PWD is read-only for this user" >&2; exit 1; }}
getconf LONG_BIT 2>/dev/null || echo
command -v getprop >/dev/null && getprop ro.product.cpu.abi && getprop ro.product.model
exit 0
"""
_ABI = re.compile(r"\w[\w-]{0,39}", re.ASCII)
_WIDE = {"aarch64", "arm64", "x86_64", "riscv64"}
"""64-bit kernels, as `uname -m` names them: programs may be 32-bit all the same."""


def open_transport(device: "Device", *, timeout_s: float = _OPEN_S) -> Transport:
    """Reach the device and check what it is; the caller closes it. Raises DeviceError in one line."""
    if device.emulated and not device.transport.is_set():  # no other device may stand in for it
        raise DeviceError(f"{device.name}: not running; python -m devices.lab run {device.name} -- COMMAND starts it")
    deadline = Deadline.after(timeout_s)
    link = device.transport.connect(device.name, deadline)
    try:
        return _attach(link, device, deadline)
    except BaseException:
        link.close()
        raise


def _attach(link: Link, device: "Device", deadline: Deadline) -> Attached:
    """Make the working folder, and check the device against its YAML before anything else runs there."""
    script = marks.enclosed(_PROBE.format(folder=shlex.quote(device.workdir)), mark := marks.new())
    try:
        ended = processes.call(link.client(script), deadline)
    except TimeoutError:
        raise DeviceError(f"{device.name}: no answer within {deadline.limit_s:g} s; check its power") from None
    except FloodError as error:
        raise DeviceError(f"{device.name}: its shell {error}; check what its login prints") from None
    if marks.through_terminal(ended, mark):
        raise DeviceError(
            f"{device.name}: a terminal lies between and would change files (adbd before Android 7; ssh's RequestTTY)"
        )
    if (answer := marks.answer(ended, mark)) is None:
        raise DeviceError(f"{device.name}: {link.explain(marks.erased(ended, mark))}")
    if answer.returncode:
        elsewhere = f"set workdir in devices/{device.name}.yaml to a folder that this user may write"
        raise DeviceError(f"{device.name}: {device.workdir}: {answer.reason}; {elsewhere}")
    folder, architecture, bits, *android = *answer.stdout.decode(errors="replace").split("\n"), "", "", ""
    abi, model = (android[0], last_line(android[1], "")) if android[0] else (architecture, None)
    if not folder.startswith("/") or not _ABI.fullmatch(abi):
        told = f"reports {visible(folder)!r:.200} as its folder, {visible(abi)!r:.200} as its processor"
        raise DeviceError(f"{device.name}: {told}: its shell does not run scripts as sh does")
    if model is None and architecture in _WIDE and bits == "32" and device.runner is None:
        raise DeviceError(
            f"{device.name}: 64-bit kernel ({architecture}), 32-bit programs (getconf LONG_BIT is 32): install its "
            "64-bit system"
        )
    if device.abi and family(device.abi) != family(abi):
        raise DeviceError(f"{device.name}: the device is {abi}, devices/{device.name}.yaml says {device.abi}")
    if reason := device.transport.mismatch(model and visible(model)):
        raise DeviceError(f"{device.name}: {reason}")
    return Attached(Shell(link, folder), abi)
