"""Weights → integers: one quantized model for all targets, cached under its content. Formats only encode it."""

from pathlib import Path

from export.checkpoints import Checkpoint
from export.host import disk, memory
from export.host.console import console
from export.manifest import from_checkpoint
from export.plan import Device, QuantRecipe

from . import calibration, processors, rotation, schemes, store, tensorwise
from .keys import content_key, is_stored, origin_key
from .schemes import memory_bytes
from .store import QuantizedModel, Result, Unfinished

__all__ = ["QuantizedModel", "content_key", "is_stored", "memory_bytes", "quantize", "requantize"]


def quantize(checkpoint: Checkpoint, recipe: QuantRecipe, cache: Path, device: Device = "cpu") -> QuantizedModel:
    """Quantize every tensor of the recipe; a stored result of the same inputs is reused."""
    return _quantized(checkpoint, recipe, cache, processors.deciding(recipe, device))


def requantize(checkpoint: Checkpoint, recipe: QuantRecipe, cache: Path, processor: str | None) -> QuantizedModel:
    """The quantized model of an artifact that was calibrated on `processor`, perhaps another machine's.

    Stored integers are used wherever they were computed; else a like processor computes them again, and may differ in
    a few. Raises ExportError: neither is there.
    """
    here = processors.name("cpu")
    stored = _path(cache, content_key(checkpoint, recipe, processor)).is_file()
    alike = processor is not None and not stored and processors.are_alike(processor, here)
    return _quantized(checkpoint, recipe, cache, here if alike else processor)


def _quantized(checkpoint: Checkpoint, recipe: QuantRecipe, cache: Path, processor: str | None) -> QuantizedModel:
    weights = rotation.rotated(checkpoint, recipe)
    schemes.check(recipe, weights.architecture)
    key = content_key(checkpoint, recipe, processor)
    if recipe.method == "none":
        return QuantizedModel(checkpoint, weights, recipe, key, None, (), None)
    path = _path(cache, key)
    with disk.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with disk.turn(path):  # builds of one recipe at the same time quantize once
            if not path.is_file():
                write_store(path, key, weights, recipe, processors.device_of(processor, path.name))
                memory.give_back()  # or the integers' memory is still ours while they are read back
    disk.used(path)
    layers, calibrated = store.read_notes(path, key)
    if line := from_checkpoint(layers):
        console.print(f"  {line}", soft_wrap=True)
    return QuantizedModel(checkpoint, weights, recipe, key, path, layers, calibrated)


def _path(cache: Path, key: str) -> Path:
    return cache / f"quantized-{key[:16]}.safetensors"


def write_store(path: Path, key: str, weights: Checkpoint, recipe: QuantRecipe, device: Device) -> None:
    """Quantize into the store at `path`. The caller holds its lock."""
    base = schemes.of_recipe(recipe, weights.architecture)
    disk.require_room(path.parent, base.counts().store_bytes)
    unfinished = Unfinished(path.with_suffix(".unfinished"))
    notes = {"key": key, "origin_key": origin_key(weights.origin, recipe, weights.architecture)}
    store.write(path, _integers(weights, recipe, unfinished, device), notes)
    unfinished.remove()


def _integers(weights: Checkpoint, recipe: QuantRecipe, unfinished: Unfinished, device: Device) -> Result:
    base = schemes.of_recipe(recipe, weights.architecture)
    match recipe.method:
        case "kept":
            return tensorwise.keep_all(weights, base, recipe.name)
        case "rtn":
            return tensorwise.round_all(weights, base)
        case "scales" | "gptq":
            return calibration.calibrate(weights, recipe, unfinished, device)
    raise AssertionError(recipe.method)
