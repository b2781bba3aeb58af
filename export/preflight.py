"""What a build will take, said before it starts, and refused when it is not there. Reads and writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import backends, disk, memory, quantize, schemes, sources
from .errors import ExportError
from .places import origin_of
from .plan import Architecture, Plan
from .progress import console

LIBRARIES_BYTES = 380_000_000
"""Measured: this process with torch, torchao and transformers imported."""
DESCRIPTION_BYTES = 1_000_000
TOKEN_BYTES = 150
"""On disk: card and manifest; tokenizer files, for each token."""


@dataclass(frozen=True)
class Estimate:
    """What one build takes at the most, from shapes, recipe and target."""

    plan_id: str
    memory_bytes: int
    """Resident in the process: its libraries, tensors, and the pages of files it has mapped, which a kernel short of
    memory could drop, but would have to read again and again."""
    out_bytes: int
    """On the disk of the artifact, temporary files included."""
    largest_file_bytes: int
    cache_bytes: int
    """On the disk of the cache; 0 when the quantized model is there already."""


def estimate(plan: Plan, source: str | None, architecture: Architecture, cache: Path) -> Estimate:
    """Memory is the most that any stage takes: quantizing, reading the result back, lowering."""
    found = schemes.of_recipe(plan.quant, architecture).counts()
    needs = backends.load(plan.target.backend).needs(plan, architecture)
    origin = origin_of(plan.model, source)
    stored = not found.integers or quantize.is_stored(origin, plan.quant, architecture, cache)
    quantizing = 0 if stored else quantize.memory_bytes(plan.quant, architecture)
    return Estimate(
        plan_id=plan.id,
        memory_bytes=LIBRARIES_BYTES
        + sources.memory_bytes(origin, architecture)
        + max(quantizing, found.store_bytes if found.integers else 0, needs.memory_bytes),
        out_bytes=needs.disk_bytes + DESCRIPTION_BYTES + TOKEN_BYTES * architecture.vocab_size,
        largest_file_bytes=int(schemes.largest(plan.quant, architecture).stored_bits(float_bits=16) / 8),
        cache_bytes=0 if stored else found.store_bytes,
    )


def require(wanted: Estimate, out: Path, cache: Path) -> None:
    """Print what the build takes and what there is.

    Raises ExportError: too little memory, too little disk where the artifact or the cache goes, or a limit on files.
    """
    room = memory.within_reach()
    memory_line = f"{disk.size(wanted.memory_bytes)} memory ({disk.size(room.bytes)} available)"
    console.print(f"  needs {memory_line}, {disk_line([wanted], out.parent, cache)}", soft_wrap=True)
    if wanted.memory_bytes > room.bytes:
        missing = disk.size(wanted.memory_bytes - room.bytes)
        raise ExportError(
            f"{wanted.plan_id}: needs {disk.size(wanted.memory_bytes)} of memory, {disk.size(room.bytes)} are "
            f"available ({room.limited_by}), {missing} are missing; end other programs, raise the limit or use a "
            "larger machine"
        )
    require_disk([wanted], out.parent, cache)


def require_disk(wanted: Sequence[Estimate], place: Path, cache: Path) -> None:
    """Refuse what the disks cannot take: builds into `place` that share their quantized model.

    Raises ExportError: too little disk for all of them, or a limit on the size of files.
    """
    for folder, needed in by_disk(wanted, place, cache):
        disk.require_room(folder, needed)
    for one in wanted:
        disk.require_file(cache, one.cache_bytes)
        disk.require_file(place, one.largest_file_bytes)


def disk_line(wanted: Sequence[Estimate], place: Path, cache: Path) -> str:
    """For people: `1.7 GB disk (61.0 GB free)`; both places where they are on different disks."""
    disks = by_disk(wanted, place, cache)
    where = [f" at {folder}" if len(disks) > 1 else "" for folder, _ in disks]
    return ", ".join(
        f"{disk.size(needed)} disk{at} ({disk.size(disk.free_bytes(folder))} free)"
        for (folder, needed), at in zip(disks, where, strict=True)
    )


def by_disk(wanted: Sequence[Estimate], place: Path, cache: Path) -> list[tuple[Path, int]]:
    """Folders on different disks and the bytes that go to each; the quantized model is written once."""
    artifacts, quantized = sum(one.out_bytes for one in wanted), max(one.cache_bytes for one in wanted)
    if not quantized or disk.device(place) == disk.device(cache):
        return [(place, artifacts + quantized)]
    return [(place, artifacts), (cache, quantized)]
