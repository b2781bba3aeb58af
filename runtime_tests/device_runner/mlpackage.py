"""Brings coremltools and a Python runner to a Mac.

The Mac needs Python 3.11 to 3.13 and a way to the package index: a virtual environment is made in the working folder,
once, of wheels whose sha256 are in the lock.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

from devices import Device, Transport
from export.errors import ExportError
from runtime_tests.sessions.mlpackage import UNITS

from . import own_runner, started
from .onnx_kv import CACHE, push_sessions
from .sdk import locked, refuse_changed, with_dependencies

_ENVIRONMENT = "runners/coremltools"
_PYTHON = f"{_ENVIRONMENT}/bin/python"
_REQUIREMENTS = "runners/coremltools.txt"
_INSTALL = f"install --quiet --no-deps --only-binary=:all: --require-hashes --requirement {_REQUIREMENTS}"
"""Wheels only: what a source archive is built with would come without digests."""
FIND_PYTHON = """\
PATH="$PATH:/opt/homebrew/bin:/usr/local/bin"
for python in python3.13 python3.12 python3.11 python3; do
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && break; python=
done
[ "$python" ] || { echo "it has no Python 3.11 to 3.13: brew install python@3.12" >&2; exit 1; }"""
"""A shell of ssh does not have Homebrew's programs, and `python3` is Apple's 3.9 or one newer than the wheels."""


def require(device: Device, _abi: str, _transport: Transport | None, /) -> None:
    """Raise ExportError before any work: it is a phone, whose states are lost."""
    if device.transport.bridged:
        raise ExportError(
            f"{device.name}: coremltools' remote tools run a phone's predictions without their state, so a filled KV "
            "cache can be neither checked nor timed on it; validate on the Mac, or name a bridge to an app as `runner`"
        )


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the runner of the device's YAML, or install ours. Raises ExportError for a phone, whose states are lost."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    require(device, "", transport)
    number = version("coremltools")
    check = ["sh", "-c", f"{_PYTHON} -c 'import coremltools as c; assert c.__version__ == \"{number}\"'"]
    if transport.run(check, timeout_s=timeout_s).returncode:
        with tempfile.TemporaryDirectory() as scratch:
            pinned = Path(scratch) / "requirements.txt"
            pinned.write_text("\n".join(map(locked, with_dependencies("coremltools", "numpy"))), encoding="utf-8")
            transport.push(pinned, _REQUIREMENTS, timeout_s=timeout_s)
        script = f'{FIND_PYTHON}\n"$python" -m venv --clear {_ENVIRONMENT} && {_PYTHON} -m pip {_INSTALL}'
        installed = transport.run(["sh", "-c", script], timeout_s=timeout_s)
        if installed.returncode:
            refuse_changed(installed.stderr.decode(errors="replace"))
            raise ExportError(f"{device.name}: coremltools=={number} cannot be installed there: {installed.reason}")
    push_sessions(transport, timeout_s)
    settings = ("env", "PYTHONPATH=runners", f"PYTHONPYCACHEPREFIX={CACHE}", f"{UNITS}={device.compute_units}")
    return started(transport, device, (*settings, _PYTHON, "-m", "sessions.mlpackage"), timeout_s=timeout_s)
