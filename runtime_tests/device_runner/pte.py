"""Brings the C++ runner for `.pte` files to a device."""

import logging
import os

from devices import Device, Transport
from devices.transports.transfer import family

from . import build, compilers, own_runner, sdk, start_failure, started
from .sdk import MACHINES, Abi, UnavailableError

_LOG = logging.getLogger(__name__)
_BIONIC = "arm64-v8a"
"""What only Android reports, over ssh too."""


def require(device: Device, reported: str, _transport: Transport | None, /) -> None:
    """Raise before any work what `install` would: no runner for the ABI, or nothing here to compile it with."""
    compilers.find(abi := _abi(device, reported))
    if abi == "arm64-v8a":  # of the user's own making
        sdk.find(abi, build.BUILD / "sdk")


def _abi(device: Device, reported: str) -> Abi:
    """Of the runner, for the ABI that the device reports; Android's own where an ExecuTorch for that is named."""
    if os.environ.get(sdk.ANDROID) and _is_android(device, reported) and family(reported) == "aarch64":
        return "arm64-v8a"
    if abi := MACHINES.get(family(reported)):
        return abi
    raise UnavailableError(f"{device.name}: there is no runner for {reported}; name one of your own as `runner`")


def _is_android(device: Device, reported: str) -> bool:
    return device.transport.bionic or reported == _BIONIC


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the runner of the device's YAML, or ours built for its ABI.

    With a C library of its own where the device's does not start it; on Android, unless it was built for that.
    """
    if device.runner:
        return own_runner(transport, device, timeout_s)
    bundle = build.build(_abi(device, reported := transport.abi()))
    remote = f"runners/{bundle.path.name}"
    transport.push(bundle.path, remote, timeout_s=timeout_s)
    start: tuple[str, ...] = (f"{remote}/bin/runner",)
    alone: tuple[str, ...] = ()
    if bundle.start_alone:
        alone = (f"{remote}/{bundle.start_alone[0]}", "--library-path", f"{remote}/loader:{remote}/lib", *start)
    if bundle.abi != "arm64-v8a" and _is_android(device, reported):
        if not alone:
            raise UnavailableError(f"{device.name}: no runner with a C library of its own for {reported}")
        start = alone
    elif alone and (reason := start_failure(transport, start, timeout_s=timeout_s)):
        words = reason.partition("; ")[0]
        _LOG.warning("%s: %s: the runner is started with the C library that it brings", device.name, words)
        start = alone
    return started(transport, device, start, timeout_s=timeout_s)
