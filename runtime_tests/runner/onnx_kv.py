"""Brings onnxruntime and a Python runner to a Linux board. Knows no artifact.

The board needs only its own Python: onnxruntime and numpy are wheels for its ABI and its Python, fetched here.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from devices import Device, Transport
from export.errors import ExportError

from .build import BUILD
from .own import own_runner
from .sdk import UnavailableError, settle

BOARD = Path(__file__).parent / "board"
PYTHON = "import sys; print(*sys.version_info[:2], sep='.')"
UNUSED = {
    "numpy": ("core", "_core/include", "distutils", "f2py", "ma", "polynomial", "random", "testing"),
    "onnxruntime": ("backend", "datasets", "quantization", "tools", "transformers"),
}
LEFT_OUT = ("/tests/", ".pyi", ".pxd", *(f"/{name}/{part}/" for name, parts in UNUSED.items() for part in parts))
"""Parts of the wheels that no runner imports: two thirds of their files, and every file is sent by itself."""
CACHE = "runners/pycache"
"""Bytecode is kept, but not among the files that were pushed: those stay what they are here."""


def install(transport: Transport, device: Device, *, timeout_s: float) -> tuple[str, ...]:
    """Push the device's own runner, or ours with the packages it needs."""
    if device.runner:
        return own_runner(transport, device, timeout_s)
    asked = transport.run(["python3", "-c", PYTHON], timeout_s=60)
    if asked.returncode:
        raise ExportError(f"{device.name}: no python3 there, which the ONNX runner needs; install Python 3.11 or later")
    packages = site_packages(transport.abi(), asked.stdout.decode().strip())
    place = f"runners/{packages.name}"
    transport.push(packages, place, timeout_s=timeout_s)
    push_board(transport, timeout_s)
    return ("env", f"PYTHONPATH={place}:runners", f"PYTHONPYCACHEPREFIX={CACHE}", "python3", "-m", "board.onnx_main")


def push_board(transport: Transport, timeout_s: float) -> None:
    """The runners in Python."""
    for source in sorted(BOARD.glob("*.py")):
        transport.push(source, f"runners/board/{source.name}", timeout_s=timeout_s)


def site_packages(abi: str, python: str) -> Path:
    """onnxruntime (of this environment's version) and numpy for a board, unpacked once; whole or not at all."""
    place = BUILD / f"onnxruntime-{version('onnxruntime')}-numpy-{version('numpy')}-{abi}-{python}"
    if place.is_dir():
        return place
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".part-") as scratch:
        download(abi, python, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not any(part in f"/{name}" for part in LEFT_OUT)]
                archive.extractall(unpacked, names)
        for folder in unpacked.glob("*.dist-info"):
            shutil.rmtree(folder)
        return settle(unpacked, place)


def download(abi: str, python: str, into: Path) -> None:
    """The two wheels, or one line of why not."""
    wanted = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
    tags = [f"manylinux_2_{glibc}_{abi}" for glibc in (28, 27, 17)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += ["--abi", f"cp{python.replace('.', '')}", *(word for tag in tags for word in ("--platform", tag))]
    done = subprocess.run([*command, "--dest", str(into), *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UnavailableError(f"{', '.join(wanted)} for Python {python} on {abi}: {last}")
