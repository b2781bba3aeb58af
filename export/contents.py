"""What lies in a model file of any format, as typed records: interface, operations, tensors. Knows no format; no torch.

Readers of one format each (`export/readers`) fill it; `inspect`, `diff` and `verify` read it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Literal

from .contract import TensorSpec
from .plan import Architecture, Strict

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODULES = ("embedding", "head", "rotations", "attention", "mlp", "norms", "scales", "other tensors", "graph")
"""Where bytes go; `graph` is what is left of the files: nodes, names, padding."""
BITS = {"int4": 4, "uint4": 4, "nf4": 4, "fp4": 4}
BITS |= {"bool": 8, "int8": 8, "uint8": 8, "float8": 8, "int16": 16, "uint16": 16}
BITS |= {"float16": 16, "bfloat16": 16, "int32": 32, "uint32": 32, "float32": 32}
BITS |= {"int64": 64, "uint64": 64, "float64": 64}


class StoredTensor(Strict):
    """One tensor as the file holds it; of several weights stacked in one matrix, each is one."""

    name: str
    """The checkpoint's name where the artifact is ours, else the file's own."""
    kind: Literal["weight", "scales"]
    dtype: str
    shape: tuple[int, ...]
    """Of integers: as a matrix [N, K], however they are packed."""
    bytes: int
    """Taken in the file; 0: these bytes are counted at another tensor."""


class Entry(Strict):
    """A method or function that a caller may call."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    value: str | None
    """What a method without inputs returns, where that is a constant."""


class Contents(Strict):
    """A model file, read without running it."""

    format: str
    facts: dict[str, str]
    """Versions and other things the format says of itself."""
    entries: tuple[Entry, ...]
    cache: tuple[TensorSpec, ...]
    """KV cache: states, mutable buffers, or past inputs."""
    ops: dict[str, int]
    """Operations by kind, outside delegates."""
    delegate_calls: dict[str, int]
    delegated_ops: dict[str, int]
    """Operations by kind, inside delegates."""
    tensors: tuple[StoredTensor, ...]
    bytes: int
    """Of the whole file or folder."""


class ModuleSize(Strict):
    """Bytes of one kind of weight in one dtype."""

    module: str
    dtype: str
    tensors: int
    bytes: int


class LayerScheme(Strict):
    """How one matrix is kept."""

    name: str
    scheme: str
    """`int4 g32`, `int8 per channel`, or a float dtype."""
    bytes: int
    """With its scales; 0: stored with another tensor."""


def size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a packed tensor; 0 for a dtype without a size of its own."""
    return (prod(shape) * BITS.get(dtype, 0) + 7) // 8


def counted(names: Iterable[str]) -> dict[str, int]:
    """Occurrences, most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def split_rows(name: str, rows: dict[str, int], tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Take the weights stacked in a matrix apart; a name without parts stays as it is."""
    if set(rows) == {name} or not tensor.shape or sum(rows.values()) != tensor.shape[0]:
        yield tensor.model_copy(update={"name": name})
        return
    for part, count in rows.items():
        share = tensor.bytes * count // tensor.shape[0]
        yield tensor.model_copy(update={"name": part, "shape": (count, *tensor.shape[1:]), "bytes": share})


def with_tied_head(tensors: tuple[StoredTensor, ...], architecture: Architecture) -> tuple[StoredTensor, ...]:
    """A tied head that is stored with the embedding, under its own name too."""
    if not architecture.tie_word_embeddings or any(tensor.name == HEAD for tensor in tensors):
        return tensors
    table = (tensor for tensor in tensors if tensor.name == EMBEDDING)
    return (*tensors, *(one.model_copy(update={"name": HEAD, "bytes": 0}) for one in table))


def module_of(tensor: StoredTensor) -> str:
    """Which part of a decoder a tensor belongs to, by its name."""
    if tensor.kind == "scales":
        return "scales"
    if tensor.dtype in ("int32", "int64"):  # shapes and indices, whatever they are named after
        return "other tensors"
    name = tensor.name.lower()
    words = {"norm": "norms", "attn": "attention", "attention": "attention", "mlp": "mlp", "feed_forward": "mlp"}
    words |= {"lm_head": "head", "embed": "embedding", "rotate": "rotations"}
    return next((module for word, module in words.items() if word in name), "other tensors")


def module_sizes(contents: Contents) -> tuple[ModuleSize, ...]:
    """Bytes by module and dtype, in the order of MODULES; they sum to the size of the files."""
    found: dict[tuple[str, str], list[int]] = {}
    for tensor in contents.tensors:
        found.setdefault((module_of(tensor), tensor.dtype), []).append(tensor.bytes)
    rest = contents.bytes - sum(tensor.bytes for tensor in contents.tensors)
    found["graph", ""] = [rest]
    ordered = sorted(found, key=lambda key: (MODULES.index(key[0]), key[1]))
    return tuple(
        ModuleSize(module=module, dtype=dtype, tensors=len(one) if dtype else 0, bytes=sum(one))
        for module, dtype in ordered
        for one in [found[module, dtype]]
    )


def layer_schemes(contents: Contents) -> tuple[LayerScheme, ...]:
    """Every matrix of the decoder, and whatever else has scales: embedding, layers in the file's order, head."""
    scales = {tensor.name: tensor for tensor in contents.tensors if tensor.kind == "scales"}
    return tuple(
        LayerScheme(
            name=tensor.name,
            scheme=scheme_of(tensor, scales.get(tensor.name)),
            bytes=tensor.bytes + (scales[tensor.name].bytes if tensor.name in scales else 0),
        )
        for tensor in sorted(contents.tensors, key=lambda one: {"embedding": 0, "head": 2}.get(module_of(one), 1))
        if tensor.kind == "weight" and len(tensor.shape) == 2
        if module_of(tensor) in MODULES[:5] or tensor.name in scales
    )


def scheme_of(weight: StoredTensor, scales: StoredTensor | None) -> str:
    """A matrix [N, K] and its scales [N, groups], in words."""
    if scales is None:
        return weight.dtype
    groups = scales.shape[1] if len(scales.shape) > 1 else 1
    return f"{weight.dtype} per channel" if groups == 1 else f"{weight.dtype} g{weight.shape[1] // groups}"
