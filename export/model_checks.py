"""python -m export.model_checks FOLDER: what is wrong inside an artifact's model file, a JSON list in the last line.

`verify` runs it in a process of its own, since libraries that read a damaged file may crash or never end. Nothing the
file names outside its folder is opened.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import backends, manifest, readers
from .backends import StoredWeight
from .cli import quiet_libraries
from .contents import Contents, layer_schemes, with_tied_head
from .contract import TensorSpec
from .errors import ExportError
from .manifest import LayerInfo, Manifest
from .readers import Reader


def check(folder: Path) -> list[str]:
    """Every finding; never raises for what a file holds."""
    described = manifest.read(folder)
    target = described.plan.target
    try:
        return findings(folder / target.artifact, described, readers.load(target.backend))
    except ExportError as error:
        return [" ".join(str(error).split())]
    except Exception as error:  # parsers of foreign formats raise what they like
        return [f"{target.artifact}: not readable: {readers.in_a_line(error)}"]


def findings(file: Path, described: Manifest, reader: Reader) -> list[str]:
    """References first, then structure: what comes after reads by them."""
    if not file.exists():
        return [f"{file.name}: missing"]
    if found := list(reader.escapes(file)):
        return found
    if found := list(reader.structure(file)):
        return found
    contents = reader.contents(file, described.architecture)
    stored = backends.load(described.plan.target.backend).read_weights(file, described.architecture)
    return [
        *wrong_interface(contents, described),
        *wrong_schemes(contents, described),
        *wrong_weights(stored, described),
    ]


def wrong_interface(contents: Contents, described: Manifest) -> Iterator[str]:
    """Inputs, outputs and cache of the file that are not the contract's."""
    contract, entry = described.contract, contents.entries[0]
    for side, file, promised in (
        ("input", entry.inputs, contract.inputs),
        ("output", entry.outputs, contract.outputs),
    ):
        if len(file) != len(promised):
            yield f"{side}s: the file has {len(file)}, the contract {len(promised)}"
        else:
            pairs = zip(file, promised, strict=True)
            yield from (f"{side} {b.name}: {a} in the file" for b, a in ((p, unlike(f, p)) for f, p in pairs) if a)
    kv = contract.kv
    wanted, numbers = 2 * kv.layers * kv.kv_heads * kv.context_length * kv.head_dim, elements(contents.cache)
    if numbers is not None and numbers != wanted:
        yield f"cache: {numbers} numbers in the file, the contract has {wanted}"
    if any(one.dtype != kv.dtype for one in contents.cache):
        yield f"cache: {contents.cache[0].dtype} in the file, the contract has {kv.dtype}"


def unlike(file: TensorSpec, promised: TensorSpec) -> str | None:
    """What differs of one tensor; a name, a size or a shape that the file does not state is not compared."""
    if file.name and file.name != promised.name:
        return f"named {file.name!r}"
    if file.dtype != promised.dtype:
        return file.dtype
    pairs = zip(file.shape, promised.shape, strict=False)
    sizes_differ = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    ranks_differ = bool(file.shape) and len(file.shape) != len(promised.shape)
    return f"shape {list(file.shape)}" if ranks_differ or sizes_differ else None


def elements(cache: tuple[TensorSpec, ...]) -> int | None:
    """Numbers in all caches; None where a size is left open."""
    total = 0
    for one in cache:
        sizes = [dim for dim in one.shape if isinstance(dim, int)]
        if len(sizes) < len(one.shape):
            return None
        total += int(np.prod(sizes))
    return total


def wrong_schemes(contents: Contents, described: Manifest) -> Iterator[str]:
    """Matrices that are not stored in the type and groups that the manifest gives."""
    a = described.architecture
    named = contents.model_copy(update={"tensors": with_tied_head(contents.tensors, a)})
    stored = {one.name: one.scheme for one in layer_schemes(named)}
    for layer in described.quantization.layers:
        columns = a.tensor_shapes()[layer.name][-1] if layer.name in a.tensor_shapes() else 0
        groups = "per channel" if layer.group_size == columns else f"g{layer.group_size}"
        wanted = f"{f'int{layer.bits}' if layer.levels == 'even' else layer.levels} {groups}"
        if stored.get(layer.name) != wanted:
            yield f"{layer.name}: {stored.get(layer.name, 'not there')} in the file, {wanted} in the manifest"


def wrong_weights(stored: Iterator[StoredWeight], described: Manifest) -> Iterator[str]:
    """Integers and scales that cannot be those of the manifest's layers."""
    left = {layer.name: layer for layer in described.quantization.layers}
    common = described.plan.quant.common_scales
    shapes = described.architecture.tensor_shapes()
    for weight in stored:
        layer = left.pop(weight.name, None)
        if layer is None or weight.name not in shapes:
            yield f"{weight.name}: integers in the file, but no such layer in the manifest"
        elif wrong := wrong_numbers(weight, layer, shapes[weight.name], common):
            yield f"{weight.name}: {wrong}"
    yield from (f"{name}: no integers in the file" for name in left)


def wrong_numbers(weight: StoredWeight, layer: LayerInfo, shape: tuple[int, ...], common: bool) -> str | None:
    """The first thing wrong with one weight [N, K] and its scales [N, K / group], `common` to all runtimes or not."""
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
    """What is wrong with scales: `common` are those that every runtime takes, others need only be numbers."""
    if not common:
        count = int(np.count_nonzero(~np.isfinite(scale)))
        return f"{count} scales that are not numbers" if count else None
    if count := int(np.count_nonzero(~(np.isfinite(scale) & (scale > 0)))):
        return f"{count} scales that are not positive numbers"
    if count := int(np.count_nonzero(np.ascontiguousarray(scale, np.float32).view(np.uint32) & 0xFFFF)):
        return f"{count} scales that are no bfloat16"
    return None


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(check(Path(sys.argv[1]))))
