"""Brings the C++ runner for `.pte` files to a device."""

from devices import Device, Transport

from . import build, own_runner
from .sdk import MACHINES, Abi, UnavailableError

_ANDROID: dict[str, Abi] = {"arm64-v8a": "aarch64", "x86_64": "x86-64"}


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the runner of the device's YAML, or ours built for its ABI; for Android with a C library of its own."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    reported = transport.abi()
    abi = MACHINES.get(reported) or _ANDROID.get(reported)
    if abi is None:
        raise UnavailableError(f"{device.name}: there is no runner for {reported}; name one of your own as `runner`")
    bundle = build.build(abi)
    remote = f"runners/{bundle.path.name}"
    transport.push(bundle.path, remote, timeout_s=timeout_s)
    if device.transport.bionic or reported not in MACHINES:
        if not bundle.start_alone:
            raise UnavailableError(f"{device.name}: no runner with a C library of its own for {reported}")
        libraries = f"{remote}/loader:{remote}/lib"
        return (f"{remote}/{bundle.start_alone[0]}", "--library-path", libraries, f"{remote}/bin/runner")
    return (f"{remote}/bin/runner",)
