"""Brings onnxruntime and a Python runner to a Linux board.

The board needs only its own Python: the wheels of onnxruntime and numpy for its ABI and Python are fetched here.
"""

import re
import shutil
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from devices import Device, Transport
from devices.transports.transfer import family
from export.errors import ExportError

from . import complaints, own_runner, started
from .build import BUILD
from .sdk import UnavailableError, download, settle

SESSIONS = Path(__file__).parents[1] / "sessions"
_MODULES = {f"{name}.py" for name in ("base", "board", "footprint", "mlpackage", "onnx_kv", "saved")}
_VERSION = "import sys; print(*sys.version_info[:2], sep='.')"
_UNUSED = {
    "numpy": ("core", "_core/include", "distutils", "f2py", "ma", "polynomial", "random", "testing"),
    "onnxruntime": ("backend", "datasets", "quantization", "tools", "transformers"),
}
_LEFT_OUT = ("/tests/", ".pyi", ".pxd", *(f"/{name}/{part}/" for name, parts in _UNUSED.items() for part in parts))
"""Parts of the wheels that no runner imports: two thirds of their files, and each file is sent by itself."""
CACHE = "runners/pycache"
"""Bytecode is cached apart from the pushed files, which must stay equal to those on the host."""


def require(device: Device, _abi: str, transport: Transport | None, /) -> None:
    """Raise before any work what `install` would: no Python there."""
    if transport:
        _python(transport, device)


def _python(transport: Transport, device: Device) -> str:
    """`3.11`, of the device. Raises ExportError: it has none that runs."""
    python = transport.run(["python3", "-c", _VERSION], timeout_s=60)
    if not python.returncode and (found := re.search(rb"^(\d+\.\d+)\s*\Z", python.stdout, re.MULTILINE)):
        return found[1].decode()
    reason = complaints.of(python.stderr.decode(errors="replace"), python.returncode)
    raise ExportError(
        f"{device.name}: no python3 there that runs, which the ONNX runner needs ({reason}); install Python 3.11 "
        "or later"
    )


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the runner of the device's YAML, or ours with the packages it needs."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    packages = _site_packages(family(transport.abi()), _python(transport, device))
    remote = f"runners/{packages.name}"
    transport.push(packages, remote, timeout_s=timeout_s)
    push_sessions(transport, timeout_s)
    paths = ("env", f"PYTHONPATH={remote}:runners", f"PYTHONPYCACHEPREFIX={CACHE}")
    return started(transport, device, (*paths, "python3", "-m", "sessions.onnx_kv"), timeout_s=timeout_s)


def push_sessions(transport: Transport, timeout_s: float) -> None:
    """Push the sessions' modules that boards and Macs run, and what they import: each is a runner in Python."""
    transport.push(SESSIONS, "runners/sessions", timeout_s=timeout_s, only=_MODULES)


def _site_packages(abi: str, python: str) -> Path:
    """onnxruntime and numpy for a board, in this environment's versions, unpacked once; whole or not at all."""
    folder = BUILD / f"onnxruntime-{version('onnxruntime')}-numpy-{version('numpy')}-{abi}-{python}"
    if folder.is_dir():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".part-") as scratch:
        packages = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
        platforms = [f"manylinux_2_{glibc}_{abi}" for glibc in (28, 27, 17)]
        try:
            wheels = download(packages, python, platforms, Path(scratch))
        except UnavailableError as error:
            raise UnavailableError(f"{', '.join(packages)} for Python {python} on {abi}: {error}") from None
        unpacked = Path(scratch) / "unpacked"
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not any(part in f"/{name}" for part in _LEFT_OUT)]
                archive.extractall(unpacked, names)
        for described in unpacked.glob("*.dist-info"):
            shutil.rmtree(described)
        return settle(unpacked, folder)
