"""What a build will take: printed before it starts, and refused when it is not there. Reads and writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from export import checkpoints, formats, quantization
from export.architecture import Architecture
from export.checkpoints.origin import Origin, origin_of
from export.errors import ExportError
from export.host import disk, memory
from export.host.console import console
from export.plan import Plan
from export.quantization import schemes

_LIBRARIES_BYTES, _CUDA_BYTES = 380_000_000, 450_000_000
"""Measured: this process with torch, torchao and transformers imported; what a torch with CUDA takes besides."""
_DESCRIPTION_BYTES = 1_000_000
_TOKEN_BYTES = 150
"""On disk: card and manifest; tokenizer files, for each token."""


@dataclass(frozen=True)
class Estimate:
    """The most that one build takes, from shapes, recipe and target."""

    plan_id: str
    memory_bytes: int
    """Resident in the process: its libraries, tensors, and the pages of mapped files, which a kernel short of memory
    could drop, but would have to read again and again."""
    out_bytes: int
    """On the disk of the artifact, temporary files included."""
    largest_file_bytes: int
    cache_bytes: int
    """On the disk of the cache; 0 when the quantized model is there already."""


def estimate(plan: Plan, source: Origin | None, architecture: Architecture, cache: Path) -> Estimate:
    """Memory is the most that any stage takes: quantizing, reading the result back, lowering."""
    counts = schemes.of_recipe(plan.quant, architecture).counts()
    needs = formats.load(plan.target.backend).needs(plan, architecture)
    origin = origin_of(plan.model, source)
    stored = not counts.integers or quantization.is_stored(origin, plan.quant, architecture, cache)
    quantizing = 0 if stored else quantization.memory_bytes(plan.quant, architecture)
    return Estimate(
        plan_id=plan.id,
        memory_bytes=_LIBRARIES_BYTES
        + (_CUDA_BYTES if with_cuda() else 0)
        + checkpoints.memory_bytes(origin, architecture)
        + max(quantizing, counts.store_bytes if counts.integers else 0, needs.memory_bytes),
        out_bytes=needs.disk_bytes + _DESCRIPTION_BYTES + _TOKEN_BYTES * architecture.vocab_size,
        largest_file_bytes=int(schemes.largest(plan.quant, architecture).stored_bits(float_bits=16) / 8),
        cache_bytes=0 if stored else counts.store_bytes,
    )


def with_cuda() -> bool:
    """Whether the torch that is installed brings CUDA's libraries, used or not."""
    package = find_spec("torch")
    assert package
    return any((Path(folder) / "lib/libtorch_cuda.so").is_file() for folder in package.submodule_search_locations or ())


def require(needed: Estimate, out: Path, cache: Path) -> None:
    """Print what the build takes and what there is.

    Raises ExportError: too little memory, too little disk where the artifact or the cache goes, or a limit on files.
    """
    room = memory.within_reach()
    memory_line = f"{disk.size(needed.memory_bytes)} memory ({disk.size(room.bytes)} available)"
    console.print(f"  needs {memory_line}, {disk_line([needed], out.parent, cache)}", soft_wrap=True)
    if needed.memory_bytes > room.bytes:
        missing = disk.size(needed.memory_bytes - room.bytes)
        raise ExportError(
            f"{needed.plan_id}: needs {disk.size(needed.memory_bytes)} of memory, {disk.size(room.bytes)} are "
            f"available ({room.limited_by}), {missing} are missing; end other programs, raise the limit or use a "
            "larger machine"
        )
    require_disk([needed], out.parent, cache)


def require_disk(builds: Sequence[Estimate], folder: Path, cache: Path) -> None:
    """Refuse builds into `folder` that share their quantized model and that the disks cannot take.

    Raises ExportError: too little disk for all of them, or a limit on the size of files.
    """
    for place, needed_bytes in _by_disk(builds, folder, cache):
        disk.require_room(place, needed_bytes)
    for build in builds:
        disk.require_file(cache, build.cache_bytes)
        disk.require_file(folder, build.largest_file_bytes)


def disk_line(builds: Sequence[Estimate], folder: Path, cache: Path) -> str:
    """For people: `1.7 GB disk (61.0 GB free)`; both folders where they are on different disks."""
    disks = _by_disk(builds, folder, cache)
    return ", ".join(
        f"{disk.size(needed_bytes)} disk{f' at {place}' if len(disks) > 1 else ''} "
        f"({disk.size(disk.free_bytes(place))} free)"
        for place, needed_bytes in disks
    )


def _by_disk(builds: Sequence[Estimate], folder: Path, cache: Path) -> list[tuple[Path, int]]:
    """Folders on different disks and the bytes that go to each; the quantized model is written once."""
    artifacts, quantized = sum(build.out_bytes for build in builds), max(build.cache_bytes for build in builds)
    if not quantized or disk.device(folder) == disk.device(cache):
        return [(folder, artifacts + quantized)]
    return [(folder, artifacts), (cache, quantized)]
