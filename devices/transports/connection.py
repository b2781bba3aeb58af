"""From a device's YAML to the device itself, checked to be what the YAML says."""

import shlex
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from . import DeviceError, Transport, processes
from .adb import Adb
from .address import Link
from .device import Attached
from .local import Local
from .processes import Deadline
from .shell import PROOF, Shell
from .ssh import Apple, Ssh

if TYPE_CHECKING:
    from devices import Device

AnyAddress = Annotated[Local | Adb | Ssh | Apple, Field(discriminator="kind")]
_OPEN_S = 30.0
_PROBE = """\
mkdir -p {folder} && cd {folder} && pwd && uname -m || exit 3
command -v getprop >/dev/null && getprop ro.product.cpu.abi && getprop ro.product.model
exit {proof}
"""


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
    script = _PROBE.format(folder=shlex.quote(device.workdir), proof=PROOF)
    try:
        ended = processes.call(link.client(script), deadline)
    except TimeoutError:
        raise DeviceError(f"{device.name}: no answer within {deadline.limit_s:g} s; check its power") from None
    if ended.returncode == 0:
        raise DeviceError(f"{device.name}: its adbd reports no exit status (Android 7 and later do)")
    if ended.returncode != PROOF:
        raise DeviceError(f"{device.name}: {link.explain(ended.stderr)}")
    folder, architecture, *android = ended.stdout.decode().split("\n")
    abi, model = android[:2] if len(android) > 1 else (architecture, None)
    if device.abi not in (None, abi):
        raise DeviceError(f"{device.name}: the device is {abi}, devices/{device.name}.yaml says {device.abi}")
    if reason := device.transport.mismatch(model):
        raise DeviceError(f"{device.name}: {reason}")
    return Attached(Shell(link, folder), abi)
