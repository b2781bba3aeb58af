"""How each kind of weight is stored, read off what was quantized: never from what a recipe says of itself. No torch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from export.architecture import EMBEDDING, GATE_UP, HEAD, QKV, ROTATE_IN, ROTATE_OUT
from export.formats import cache_bytes, load
from export.manifest import UNKNOWN, KVLayout, LayerInfo, Manifest

_KINDS = (*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj")
_OTHERS = {EMBEDDING: "embedding", HEAD: "head", ROTATE_IN: "rotations", ROTATE_OUT: "rotations"}
_FLOAT = "float"
_CHOSEN = {
    "rtn": "rounded to nearest",
    "scales": "scales searched on calibration text",
    "gptq": "chosen by GPTQ on calibration text",
    "kept": "rounded to nearest",
}
"""How a recipe's method chooses integers that are not the checkpoint's own."""


class Part(NamedTuple):
    """The weights of one kind that are stored alike."""

    kind: str
    """`q_proj` to `down_proj`, `embedding`, `head` or `rotations`."""
    scheme: str
    """`int4`, `int8`, `nf4`, `fp4` or `float`."""
    group: int | None
    """Inputs that share a scale; None: one scale per output channel, or none at all."""
    names: tuple[str, ...]
    """In execution order."""
    of: int
    """All weights of this kind."""
    sqnr_db: float | None
    """The lowest of them; None: float."""

    @property
    def words(self) -> str:
        """`int4 in groups of 32`, `int8 per channel`, `float`."""
        if self.scheme == _FLOAT:
            return _FLOAT
        return f"{self.scheme} in groups of {self.group}" if self.group else f"{self.scheme} per channel"


def parts(described: Manifest) -> list[Part]:
    """Every matrix of an artifact by kind and scheme; empty where its manifest does not tell."""
    layers = {layer.name: layer for layer in described.quantization.layers}
    if not layers and described.plan.quant.method != "none":
        return []
    architecture = described.architecture
    shapes = {EMBEDDING: (architecture.vocab_size, architecture.hidden_size), **architecture.all_linear_shapes()}
    if architecture.tie_word_embeddings and EMBEDDING in layers:
        layers[HEAD] = layers[EMBEDDING]
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        kinds.setdefault(_kind_of(name), []).append(name)
    found = []
    for kind, names in kinds.items():
        alike: dict[tuple[str, int | None], list[str]] = {}
        for name in names:
            alike.setdefault(_scheme_of(layers.get(name), shapes[name][1]), []).append(name)
        for scheme, members in sorted(alike.items(), key=lambda item: -len(item[1])):
            errors = [layers[name].sqnr_db for name in members if name in layers]
            found.append(Part(kind, *scheme, tuple(members), len(names), min(errors, default=None)))
    return found


def _kind_of(name: str) -> str:
    return _OTHERS.get(name) or next(kind for kind in _KINDS if kind in name).partition(".")[2]


def _scheme_of(layer: LayerInfo | None, columns: int) -> tuple[str, int | None]:
    if layer is None:
        return _FLOAT, None
    scheme = f"int{layer.bits}" if layer.levels == "even" else layer.levels
    return scheme, None if layer.group_size == columns else layer.group_size


def line(described: Manifest) -> str:
    """All of it: `int4 in groups of 32 (210 linears), int8 per channel (embedding and head), rounded to nearest`.

    `unknown`: the manifest does not tell.
    """
    alike: dict[str, list[Part]] = {}
    for part in parts(described):
        alike.setdefault(part.words, []).append(part)
    if not alike:
        return UNKNOWN
    linears = len(described.architecture.linear_shapes())
    ordered = sorted(alike.items(), key=lambda item: -_linears_of(item[1]))
    schemes = [f"{words} ({_members(together, linears)})" for words, together in ordered]
    return ", ".join([*schemes, *_chosen(described)])


def cache(kv: KVLayout) -> str:
    """Of a KV cache: `io, int8, 23.6 MB`, `io, float32, window of 1,024 tokens, 14.7 MB`."""
    policy = f", window of {kv.window:,} tokens" if kv.window else f", the first {kv.sink} stay" if kv.sink else ""
    return f"{kv.kind}, {kv.dtype}{policy}, {cache_bytes(kv) / 1e6:.1f} MB"


def process(described: Manifest) -> str:
    """Memory of a process that runs it in our runner with a full context: `243 MB`, `unknown`."""
    needed = load(described.plan.target.backend).process_bytes(described)
    return UNKNOWN if needed is None else f"{needed / 1e6:,.0f} MB"


def _chosen(described: Manifest) -> Iterator[str]:
    """Where the integers are from."""
    layers, chosen = described.quantization.layers, _CHOSEN.get(described.plan.quant.method)
    kept = sum(layer.kept for layer in layers)
    if kept:
        yield f"{f'{kept} of {len(layers)} with ' * (kept < len(layers))}the checkpoint's own integers"
    if chosen and kept < len(layers):
        yield f"the rest {chosen}" if kept else chosen


def _linears_of(alike: Sequence[Part]) -> int:
    return sum(len(part.names) for part in alike if part.kind not in _OTHERS.values())


def _members(alike: Sequence[Part], linears: int) -> str:
    """`6 of 14 linears, embedding and head`."""
    count = _linears_of(alike)
    words = [f"{count} linears" if count == linears else f"{count} of {linears} linears"] * bool(count)
    words += [part.kind for part in alike if part.kind in _OTHERS.values()]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
