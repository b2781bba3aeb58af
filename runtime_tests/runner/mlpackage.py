"""Brings coremltools and a Python runner to a Mac. Knows no artifact.

The Mac needs Python 3 and a way to the package index: a virtual environment is made in the working folder, once.
"""

from importlib.metadata import version

from devices import Device, Transport
from export.errors import ExportError

from .onnx_kv import CACHE, push_board
from .own import own_runner

ENVIRONMENT = "runners/coremltools"
PYTHON = f"{ENVIRONMENT}/bin/python"


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the device's own runner, or make ours ready. Raises ExportError where states cannot be kept."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    if device.transport.kind == "apple" and device.transport.phone is not None:
        raise ExportError(
            f"{device.name}: coremltools' remote tools run a phone's predictions without their state, so a filled KV "
            "cache can be neither checked nor timed on it; validate on the Mac, or name a bridge to an app as `runner`"
        )
    wanted = f"coremltools=={version('coremltools')}"
    check = ["sh", "-c", f"{PYTHON} -c 'import coremltools as c; assert c.__version__ == \"{version('coremltools')}\"'"]
    if transport.run(check, timeout_s=timeout_s).returncode:
        script = f"python3 -m venv {ENVIRONMENT} && {PYTHON} -m pip install --quiet {wanted} numpy"
        made = transport.run(["sh", "-c", script], timeout_s=timeout_s)
        if made.returncode:
            last = (made.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise ExportError(f"{device.name}: {wanted} cannot be installed there: {last}")
    push_board(transport, timeout_s)
    return ("env", "PYTHONPATH=runners", f"PYTHONPYCACHEPREFIX={CACHE}", PYTHON, "-m", "board.coreml_main")
