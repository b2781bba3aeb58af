"""Whether artifacts can be proven on a device: asked before they are built, so that what is missing is said at once."""

from contextlib import closing

from devices import Device, DeviceError, Transport, lab, open_transport
from export.errors import ExportError
from export.plan import Target, load_named
from runtime_tests.device_runner import file_of_own_runner

from .remote import runner_module

_ANSWER_S = 8.0


def require(device: Device) -> None:
    """Return where the device answers, is free and can be given its runners. Nothing is built or pushed.

    Of an emulated device, which runs during a validation only, what this machine lacks to start it.
    Raises ExportError in one line.
    """
    if not device.attached:
        return
    try:
        if device.emulated:
            if lack := lab.lacks():
                raise DeviceError(f"{device.name}: the lab needs {lack}")
            _require_runners(device, str(device.abi), None)
            return
        with closing(open_transport(device, timeout_s=_ANSWER_S)) as transport, transport.lock():
            _require_runners(device, transport.abi(), transport)
    except DeviceError as error:
        raise ExportError(str(error)) from None


def _require_runners(device: Device, abi: str, transport: Transport | None) -> None:
    if device.runner:
        file_of_own_runner(device)
        return
    for session in dict.fromkeys(load_named(Target, "targets", target).session for target in device.targets):
        runner_module(session).require(device, abi, transport)
