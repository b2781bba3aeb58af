"""Core ML packages: in Core ML on a Mac, in our evaluator of the saved package elsewhere.

Copied to Macs as a runner, where it needs only Python 3.9, numpy and coremltools; `Evaluated` is not used there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.manifest import IOContract, Manifest

_FIRST_WITH_STATE = 15
"""macOS; earlier ones have no KV-cache state."""
UNITS = "LLAMA_COMPUTE_UNITS"
"""Environment variable: `compute_units` of the device that a job runs on."""
_NAMES = {"cpu": "CPU_ONLY", "cpu_gpu": "CPU_AND_GPU", "cpu_ne": "CPU_AND_NE", "all": "ALL"}
"""`compute_units` → coremltools' names."""
_KEPT = 4
"""Compiled packages that stay on the disk, those used last."""


def in_core_ml() -> bool:
    """Whether packages run in Core ML here; `LLAMA_COREML=reference` chooses the evaluator on a Mac too."""
    if platform.system() != "Darwin" or os.environ.get("LLAMA_COREML") == "reference":
        return False
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= _FIRST_WITH_STATE


_PAIRS = 2**21
"""Most new tokens × slots of a call: scores of 32 heads are 32 × 2²¹ × 2 bytes = 134 MB."""

RUNTIME = "Core ML" if in_core_ml() else "our evaluator of the saved package"
ABREAST = 8
"""Windows side by side in the evaluator: each has a KV cache, and the head's logits of a prompt."""
PIECE = 512
"""Most tokens per call: the package returns logits of every position, 512 × 128,256 × 2 bytes = 131 MB."""


class PackageSession(Session):
    """One package and one state; `model` has Core ML's `make_state` and `predict`, a state its two functions."""

    def __init__(self, model: Any, contract: IOContract, *, measures_speed: bool) -> None:
        vocab_size = int(contract.outputs[0].shape[-1])
        super().__init__(contract.kv.context_length, min(contract.max_prefill, PIECE), contract.logits, vocab_size)
        self.keep(contract.kv)
        self.measures_speed = measures_speed
        self.ids, self.mask = (spec.name for spec in contract.inputs)
        self.output, self.states = contract.outputs[0].name, tuple(spec.name for spec in contract.states)
        self.model = model
        self.abreast = ABREAST if isinstance(model, Evaluated) else 1
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.state = self.model.make_state()

    def step(self, tokens: Sequence[int], position: int) -> NDArray[np.floating[Any]]:
        self.oldest = max(self.oldest, position + len(tokens) - self.room)  # even where the call fails half-way
        outputs = self.model.predict(self._inputs(tokens, position), state=self.state)
        logits: NDArray[np.floating[Any]] = np.asarray(outputs[self.output])[0]
        return logits

    def longest(self, position: int) -> int:
        most = min(self.largest_call, self.room - position % self.room)
        while most > 1 and most * min(position + most, self.room) > _PAIRS:
            most //= 2
        return most

    def buffers(self) -> dict[str, NDArray[Any]]:
        return {name: np.moveaxis(self.state.read_state(name), 3, 0) for name in self.states}

    def put_back(self, buffers: Mapping[str, NDArray[Any]]) -> None:
        for name, slots in buffers.items():
            self.state.write_state(name, np.ascontiguousarray(np.moveaxis(slots, 0, 3)))

    def feed_windows(self, windows: Sequence[Sequence[int]], prefill: int) -> Iterator[NDArray[np.float32]]:
        """In the evaluator windows side by side, each with a state of its own."""
        if self.abreast == 1:
            yield from super().feed_windows(windows, prefill)
            return
        self.reset()
        for window in windows:
            self._require_room(window[:-1])
        states = [self.model.make_state() for _ in windows]
        ends = [*self.ends(0, prefill), *range(prefill + 1, len(windows[0]))]
        first = 0
        for end in ends:
            outputs = self.model.predict_each([self._inputs(window[first:end], first) for window in windows], states)
            if end >= prefill:
                yield np.stack([one[self.output][0, -1] for one in outputs]).astype(np.float32)
            first = end

    def _inputs(self, tokens: Sequence[int], position: int) -> dict[str, NDArray[Any]]:
        past, new = position, len(tokens)
        rings = self.room < self.context_length  # then only the mask's width is read
        mask = np.zeros((1, 1, 1, past + new), np.float32) if rings else causal_mask(past, new)
        return {self.ids: np.array([tokens], np.int32), self.mask: mask}


def causal_mask(past: int, new: int) -> NDArray[np.float32]:
    """0 for the slots that a new token may attend to, fp16's lowest number for later ones: [1, 1, new, past + new].

    The program reads as many slots of the cache as the mask is wide. float32, which coremltools would make of fp16 too:
    its own conversion has crashed.
    """
    return np.triu(np.full((1, 1, new, past + new), -65504, np.float32), k=past + 1)


class _State:
    """States in the evaluator, as `MLState` of coremltools."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read_state(self, name: str) -> NDArray[Any]:
        """The state's own memory."""
        shared: NDArray[Any] = self.tensors[name].numpy()
        return shared

    def write_state(self, name: str, value: NDArray[Any]) -> None:
        """Overwrite it."""
        self.read_state(name)[:] = value


class Evaluated:
    """The evaluator of the saved package with the interface of a Core ML model; its speed means nothing."""

    def __init__(self, package: Path, threads: int, also: tuple[str, ...] = ()) -> None:
        import torch

        from runtime_tests.coreml.evaluator import Evaluator

        self.torch, self.threads = torch, threads
        torch.set_num_threads(1)
        self.evaluator = Evaluator(package, also)

    def make_state(self) -> _State:
        self.evaluator.reset()
        return _State(self.evaluator.states)

    def predict(self, inputs: dict[str, NDArray[Any]], state: _State) -> dict[str, NDArray[Any]]:
        (outputs,) = self.predict_each([inputs], [state])
        return outputs

    def predict_each(
        self, inputs: Sequence[dict[str, NDArray[Any]]], states: Sequence[_State]
    ) -> list[dict[str, NDArray[Any]]]:
        """Several calls with equally many tokens, each with its state, side by side."""
        ids, _mask = inputs[0].values()
        # one row is bound by memory: on a busy machine the barriers of two threads cost ten times the work itself
        self.torch.set_num_threads(1 if ids.size == 1 else self.threads)
        dtypes = self.evaluator.program.inputs  # Core ML converts what it is given, too
        given = [{n: self.torch.from_numpy(array).to(dtypes[n]) for n, array in one.items()} for one in inputs]
        outputs = self.evaluator.predict_each(given, [state.tensors for state in states])
        return [{name: values.numpy() for name, values in one.items()} for one in outputs]


def loaded(package: Path, compute_units: str, cache: Path) -> Any:
    """A package in Core ML, which needs macOS 15 and chooses its number of threads itself. Raises Core ML's errors.

    Compiled first: an MLModel of a package that Core ML refuses loads without it and keeps the reason to itself.
    """
    import coremltools as ct

    return ct.models.CompiledMLModel(str(compiled(package, cache)), compute_units=unit(compute_units))


def unit(compute_units: str) -> Any:
    """coremltools' value for `compute_units` of a device. Raises ValueError: it is none."""
    import coremltools as ct

    if compute_units not in _NAMES:
        raise ValueError(f"{UNITS}: {compute_units!r}, expected one of {', '.join(_NAMES)}")
    return getattr(ct.ComputeUnit, _NAMES[compute_units])


def compiled(package: Path, cache: Path) -> Path:
    """The package as Core ML compiles it, once for each build of the system. Raises Core ML's error where it refuses.

    `cache` is the user's own. Its folders are named by the sha256 of the package's files and the build, so that nothing
    is taken for another package; one appears whole or not at all.
    """
    folder = cache / _identity(package)
    place = folder / f"{package.stem}.mlmodelc"
    if not place.is_dir():
        import coremltools as ct

        cache.mkdir(parents=True, exist_ok=True)
        cache.chmod(0o700)
        made = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        try:
            ct.models.utils.compile_model(str(package), str(made / place.name))
            with suppress(OSError):  # another process was first
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    os.utime(folder)
    _trim(cache)
    return place


def _identity(package: Path) -> str:
    digest = hashlib.sha256(os_build().encode())
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest()


def _trim(cache: Path) -> None:
    """Remove all but the folders used last; what killed processes left ages with them."""
    with suppress(FileNotFoundError):  # another process trims too
        folders = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for folder in folders[:-_KEPT]:
            gone = folder.rename(folder.with_name(f".{folder.name.lstrip('.')}"))  # half removed, it is not found
            shutil.rmtree(gone, ignore_errors=True)


def os_build() -> str:
    """The build of macOS, like 24B83: Core ML is part of it. Empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sw_vers", "-buildVersion"], capture_output=True, text=True, check=True).stdout.strip()


def runtime_calls() -> list[tuple[type[Any], str]]:
    """The prediction of Core ML or of the evaluator."""
    if in_core_ml():
        from coremltools.models import CompiledMLModel

        return [(CompiledMLModel, "predict")]
    from runtime_tests.coreml.evaluator import Evaluator

    return [(Evaluator, "predict")]


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> PackageSession:
    """Load the package of an artifact folder, in Core ML on the units of the job's device or, without one, of host."""
    package = folder / manifest.plan.target.artifact
    if in_core_ml():
        import devices

        units = os.environ.get(UNITS) or devices.load("host").compute_units
        return PackageSession(loaded(package, units, cache_here()), manifest.contract, measures_speed=True)
    return PackageSession(Evaluated(package, threads), manifest.contract, measures_speed=False)


def cache_here() -> Path:
    """Where this machine keeps compiled packages."""
    from export.host import disk
    from export.manifest import ROOT

    return disk.writable_folder(ROOT / "build" / "compiled")


if __name__ == "__main__":
    from coremltools import __version__

    from .board import main

    chosen, beside = os.environ.get(UNITS, "cpu_gpu"), Path(__file__).parents[1] / "compiled"
    sys.exit(
        main(
            "coreml",
            f"Core ML through coremltools {__version__}, {chosen}",
            lambda package, contract, _: PackageSession(loaded(package, chosen, beside), contract, measures_speed=True),
        )
    )
