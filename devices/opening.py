"""From a device's YAML to the device itself, checked to be what the YAML says. Knows no format or model."""

import re
import shlex
from typing import TYPE_CHECKING

from . import adb, address, processes, ssh
from .attached import Attached
from .link import Link
from .local import LocalLink
from .processes import Deadline
from .shell import PROOF, Shell
from .transport import DeviceError, Transport

if TYPE_CHECKING:
    from . import Device

OPEN_S = 30.0
PROBE = """\
mkdir -p {folder} && cd {folder} && pwd && uname -m || exit 3
command -v getprop >/dev/null && getprop ro.product.cpu.abi && getprop ro.product.model
exit {proof}
"""


def open_transport(device: "Device", *, timeout_s: float = OPEN_S) -> Transport:
    """Reach the device and check what it is; the caller closes it. Raises DeviceError in one line."""
    deadline = Deadline.after(timeout_s)
    link = connect(device, deadline)
    try:
        return attach(link, device, deadline)
    except BaseException:
        link.close()
        raise


def connect(device: "Device", deadline: Deadline) -> Link:
    """The way to its shell."""
    where = device.transport
    if device.emulated and not is_running(where):
        raise DeviceError(f"{device.name}: not running; python -m devices.lab run {device.name} -- COMMAND starts it")
    match where:
        case address.Local():
            return LocalLink(device.name)
        case address.Adb():
            variable = address.variable(where.serial) or f"transport.serial in devices/{device.name}.yaml"
            return adb.connect(device.name, address.lookup(where.serial), variable, deadline)
        case address.Ssh() | address.Apple():
            return ssh.connect(device.name, address.resolved(where, device.name), deadline)


def is_running(where: address.Address) -> bool:
    """Whether the lab has set what the YAML takes from the environment: no other device may stand in for it."""
    texts = (text for text in where.model_dump().values() if isinstance(text, str))
    return all(address.lookup(text) for text in texts)


def attach(link: Link, device: "Device", deadline: Deadline) -> Attached:
    """Make the working folder, and check the device against its YAML before anything else runs there."""
    script = PROBE.format(folder=shlex.quote(device.workdir), proof=PROOF)
    try:
        ended = processes.call(link.client(script), deadline)
    except TimeoutError:
        raise DeviceError(f"{device.name}: no answer within {deadline.limit_s:g} s; check its power") from None
    if ended.returncode == 0:
        raise DeviceError(f"{device.name}: its adbd reports no exit status (Android 7 and later do)")
    if ended.returncode != PROOF:
        raise DeviceError(f"{device.name}: {link.explain(ended.stderr)}")
    folder, architecture, *android = ended.stdout.decode().split("\n")
    abi = android[0] if len(android) > 1 else architecture
    if device.abi not in (None, abi):
        raise DeviceError(f"{device.name}: the device is {abi}, devices/{device.name}.yaml says {device.abi}")
    if isinstance(device.transport, address.Adb) and device.transport.model:
        found = android[1] if len(android) > 1 else "not Android"
        if not re.fullmatch(device.transport.model, found):
            raise DeviceError(f"{device.name}: the attached device is {found}, not {device.transport.model}")
    return Attached(Shell(link, folder), abi)
