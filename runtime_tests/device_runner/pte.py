"""Brings the C++ runner for `.pte` files to a device."""

import logging

from devices import Device, Transport
from devices.transports.transfer import family

from . import build, compilers, own_runner, start_failure, started
from .sdk import MACHINES, Abi, UnavailableError

_LOG = logging.getLogger(__name__)
_BIONIC = "arm64-v8a"
"""What only Android reports, over ssh too."""


def require(device: Device, reported: str, _transport: Transport | None, /) -> None:
    """Raise before any work what `install` would: no runner for the ABI, or nothing here to compile it with."""
    compilers.find(_abi(device, reported))


def _abi(device: Device, reported: str) -> Abi:
    """Of the runner, for the ABI that the device reports."""
    if abi := MACHINES.get(family(reported)):
        return abi
    raise UnavailableError(f"{device.name}: there is no runner for {reported}; name one of your own as `runner`")


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the runner of the device's YAML, or ours built for its ABI.

    For Android, and where the device's own C library does not start it, with a C library of its own.
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
    if device.transport.bionic or reported == _BIONIC:
        if not alone:
            raise UnavailableError(f"{device.name}: no runner with a C library of its own for {reported}")
        start = alone
    elif alone and (reason := start_failure(transport, start, timeout_s=timeout_s)):
        words = reason.partition("; ")[0]
        _LOG.warning("%s: %s: the runner is started with the C library that it brings", device.name, words)
        start = alone
    return started(transport, device, start, timeout_s=timeout_s)
