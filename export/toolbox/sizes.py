"""What the bytes of a model file are for: sizes by module, and the scheme of every layer."""

from export.architecture import EMBEDDING, HEAD, Architecture, Strict
from export.formats import Contents, StoredTensor

MODULES = ("embedding", "head", "rotations", "attention", "mlp", "norms", "scales", "other tensors", "graph")
"""Categories of bytes; `graph` is the rest of the files: nodes, names, padding."""


class ModuleSize(Strict):
    """Bytes of one kind of weight in one dtype."""

    module: str
    dtype: str
    tensors: int
    bytes: int


class LayerScheme(Strict):
    """How one matrix is stored."""

    name: str
    scheme: str
    """`int4 g32`, `int8 per channel`, or a float dtype."""
    bytes: int
    """With its scales; 0 if it is stored as another tensor."""


def with_tied_head(contents: Contents, architecture: Architecture) -> Contents:
    """The contents, with a tied head that is stored as the embedding listed under its own name, too."""
    tensors = contents.tensors
    if not architecture.tie_word_embeddings or any(tensor.name == HEAD for tensor in tensors):
        return contents
    head = (tensor.model_copy(update={"name": HEAD, "bytes": 0}) for tensor in tensors if tensor.name == EMBEDDING)
    return contents.model_copy(update={"tensors": (*tensors, *head)})


def _module_of(tensor: StoredTensor) -> str:
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
    sizes: dict[tuple[str, str], list[int]] = {}
    for tensor in contents.tensors:
        sizes.setdefault((_module_of(tensor), tensor.dtype), []).append(tensor.bytes)
    sizes["graph", ""] = [contents.bytes - sum(tensor.bytes for tensor in contents.tensors)]
    return tuple(
        ModuleSize(module=module, dtype=dtype, tensors=len(lengths) if dtype else 0, bytes=sum(lengths))
        for (module, dtype), lengths in sorted(sizes.items(), key=lambda item: (MODULES.index(item[0][0]), item[0][1]))
    )


def layer_schemes(contents: Contents) -> tuple[LayerScheme, ...]:
    """Every matrix of the decoder, and every other tensor with scales: embedding, layers in the file's order, head."""
    scales = {tensor.name: tensor for tensor in contents.tensors if tensor.kind == "scales"}
    return tuple(
        LayerScheme(
            name=tensor.name,
            scheme=_scheme_of(tensor, scales.get(tensor.name)),
            bytes=tensor.bytes + (scales[tensor.name].bytes if tensor.name in scales else 0),
        )
        for tensor in sorted(contents.tensors, key=lambda t: {"embedding": 0, "head": 2}.get(_module_of(t), 1))
        if tensor.kind == "weight" and len(tensor.shape) == 2
        if _module_of(tensor) in MODULES[:5] or tensor.name in scales
    )


def _scheme_of(weight: StoredTensor, scales: StoredTensor | None) -> str:
    if scales is None:
        return weight.dtype
    groups = scales.shape[1] if len(scales.shape) > 1 else 1
    return f"{weight.dtype} per channel" if groups == 1 else f"{weight.dtype} g{weight.shape[1] // groups}"
