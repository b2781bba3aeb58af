"""A runner of the user's own, named in a device's YAML: any program that keeps to docs/runner.md."""

from devices import Device, Transport
from export.errors import ExportError
from export.manifest import ROOT


def own_runner(transport: Transport, device: Device, timeout_s: float) -> tuple[str, ...]:
    """Push it; a relative path starts at the project's folder."""
    assert device.runner is not None
    path = ROOT / device.runner
    if not path.is_file():
        raise ExportError(f"devices/{device.name}.yaml: runner: no file {path}; build it first, or set it to null")
    place = f"runners/{path.name}"
    transport.push(path, place, timeout_s=timeout_s)
    return (place,)
