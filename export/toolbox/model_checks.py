"""python -m export.toolbox.model_checks FOLDER: what is wrong inside a model file, as a JSON list in the last line.

`verify` runs it in a process of its own, since libraries that read a damaged file may crash or never end. Files that
the model names and no build of ours writes are not opened.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export import formats, manifest
from export.build.command import quiet_libraries
from export.errors import ExportError
from export.formats import Contents, Reader, StoredWeight, admission, in_a_line, size
from export.host import processes
from export.manifest import KVLayout, LayerInfo, Manifest, TensorSpec

from .sizes import layer_schemes, with_tied_head


def check(folder: Path) -> list[str]:
    """Every finding; whatever the file holds, it does not raise."""
    described = manifest.read(folder)
    target = described.plan.target
    try:
        return _findings(folder / target.artifact, described, formats.reader(target.backend))
    except ExportError as error:
        return [" ".join(str(error).split())]
    except Exception as error:  # parsers of foreign formats raise what they like
        return [f"{target.artifact}: not readable: {in_a_line(error)}"]


def _findings(file: Path, described: Manifest, reader: Reader) -> list[str]:
    """What is not ours first, then structure: the later checks read the file by its own references."""
    if broken := list(admission.contents(file.parent, described)) or list(reader.structure(file)):
        return broken
    contents = reader.contents(file, described.architecture)
    stored = reader.read_weights(file, described.architecture)
    return [
        *_wrong_interface(contents, described),
        *_wrong_schemes(contents, described),
        *_wrong_weights(stored, described),
    ]


def _wrong_interface(contents: Contents, described: Manifest) -> Iterator[str]:
    """Inputs, outputs and cache of the file that are not the contract's."""
    contract, entry = described.contract, contents.entries[0]
    for side, file, promised in (
        ("input", entry.inputs, contract.inputs),
        ("output", entry.outputs, contract.outputs),
    ):
        if len(file) != len(promised):
            yield f"{side}s: the file has {len(file)}, the contract {len(promised)}"
        else:
            for spec, expected in zip(file, promised, strict=True):
                if difference := _difference(spec, expected):
                    yield f"{side} {expected.name}: {difference} in the file"
    yield from (f"cache: {line}" for line in cache_differences(contract.kv, contents.cache))


def cache_differences(kv: KVLayout, buffers: Sequence[TensorSpec]) -> Iterator[str]:
    """Where the buffers in a file, or the inputs in their place, are not the cache that the manifest describes."""
    shapes = [(one.dtype, [kv.room if isinstance(length, str) else length for length in one.shape]) for one in buffers]
    beside = [(dtype, shape) for dtype, shape in shapes if kv.scale_bytes and shape[-1] == 1]  # scales and zeros
    values = [(dtype, shape) for dtype, shape in shapes if (dtype, shape) not in beside]
    heads = 2 * kv.layers * kv.kv_heads * kv.room
    for name, count, stated in (
        ("numbers", sum(prod(shape) for _, shape in values), heads * kv.head_dim),
        ("bytes of scales", sum(size(dtype, shape) for dtype, shape in beside), heads * kv.scale_bytes),
    ):
        if count != stated:
            yield f"{count} {name} in the file, the contract has {stated}"
    if wrong := [dtype for dtype, _ in values if dtype != kv.dtype]:
        yield f"{wrong[0]} in the file, the contract has {kv.dtype}"


def _difference(file: TensorSpec, promised: TensorSpec) -> str | None:
    """What differs in one tensor; a name, a size or a shape that the file does not state is not compared."""
    if file.name and file.name != promised.name:
        return f"named {file.name!r}"
    if file.dtype != promised.dtype:
        return file.dtype
    pairs = zip(file.shape, promised.shape, strict=False)
    sizes_differ = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    ranks_differ = bool(file.shape) and len(file.shape) != len(promised.shape)
    return f"shape {list(file.shape)}" if ranks_differ or sizes_differ else None


def _wrong_schemes(contents: Contents, described: Manifest) -> Iterator[str]:
    """Matrices that are not stored in the type and groups that the manifest gives."""
    a = described.architecture
    stored = {layer.name: layer.scheme for layer in layer_schemes(with_tied_head(contents, a))}
    for layer in described.quantization.layers:
        columns = a.tensor_shapes()[layer.name][-1] if layer.name in a.tensor_shapes() else 0
        groups = "per channel" if layer.group_size == columns else f"g{layer.group_size}"
        scheme = f"{f'int{layer.bits}' if layer.levels == 'even' else layer.levels} {groups}"
        if stored.get(layer.name) != scheme:
            yield f"{layer.name}: {stored.get(layer.name, 'not there')} in the file, {scheme} in the manifest"


def _wrong_weights(stored: Iterator[StoredWeight], described: Manifest) -> Iterator[str]:
    """Integers and scales that cannot be those of the manifest's layers."""
    missing = {layer.name: layer for layer in described.quantization.layers}
    common = described.plan.quant.common_scales
    shapes = described.architecture.tensor_shapes()
    for weight in stored:
        layer = missing.pop(weight.name, None)
        if layer is None or weight.name not in shapes:
            yield f"{weight.name}: integers in the file, but no such layer in the manifest"
        elif wrong := wrong_numbers(weight, layer, shapes[weight.name], common):
            yield f"{weight.name}: {wrong}"
    yield from (f"{name}: no integers in the file" for name in missing)


def wrong_numbers(weight: StoredWeight, layer: LayerInfo, shape: tuple[int, ...], common: bool) -> str | None:
    """The first fault of one weight [N, K] and its scales [N, K / group]; `common` as in `wrong_scales`."""
    rows, columns = shape
    if weight.qdata.shape != shape:
        return f"integers of shape {weight.qdata.shape}, expected {shape}"
    if weight.scale.shape != (rows, columns // layer.group_size):
        return f"scales of shape {weight.scale.shape}, expected {(rows, columns // layer.group_size)}"
    lowest, highest = -(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1
    if count := int(np.count_nonzero((weight.qdata < lowest) | (weight.qdata > highest))):
        return f"{count} integers outside {lowest}…{highest}"
    return wrong_scales(weight.scale, common)


def wrong_scales(scale: NDArray[np.float32], common: bool) -> str | None:
    """What is wrong with scales: `common` ones are positive bf16, as all runtimes take them, others only finite."""
    if not common:
        count = int(np.count_nonzero(~np.isfinite(scale)))
        return f"{count} scales that are not numbers" if count else None
    if count := int(np.count_nonzero(~(np.isfinite(scale) & (scale > 0)))):
        return f"{count} scales that are not positive numbers"
    if count := int(np.count_nonzero(np.ascontiguousarray(scale, np.float32).view(np.uint32) & 0xFFFF)):
        return f"{count} scales that are no bfloat16"
    return None


if __name__ == "__main__":
    processes.end_with_parent()
    quiet_libraries()
    print(json.dumps(check(Path(sys.argv[1]))))
