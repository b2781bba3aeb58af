"""Brings the C++ runner for `.pte` files to a device. Knows no artifact."""

from devices import Device, Transport

from . import build
from .own import own_runner
from .sdk import MACHINES, Abi, UnavailableError

ANDROID: dict[str, Abi] = {"arm64-v8a": "aarch64", "x86_64": "x86-64"}


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the device's own runner, or ours built for its ABI; on Android with a C library of its own."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    reported = transport.abi()
    abi = MACHINES.get(reported) or ANDROID.get(reported)
    if abi is None:
        raise UnavailableError(f"{device.name}: there is no runner for {reported}; name one of your own as `runner`")
    bundle = build.build(abi)
    place = f"runners/{bundle.path.name}"
    transport.push(bundle.path, place, timeout_s=timeout_s)
    if reported not in MACHINES or device.transport.kind == "adb":
        if not bundle.start_alone:
            raise UnavailableError(f"{device.name}: no runner of its own C library for {reported}")
        loader = f"{place}/loader"
        return (f"{place}/{bundle.start_alone[0]}", "--library-path", f"{loader}:{place}/lib", f"{place}/bin/runner")
    return (f"{place}/bin/runner",)
