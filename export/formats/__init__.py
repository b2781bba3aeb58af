"""Formats: how a quantized model is written for a runtime, and read back. One package here for each, found by name.

A target YAML names the package. Its `__init__.py` (`Format`) is light: the libraries that write and read the format
are imported where they are used. `read.py` (`Reader`) reports what a finished file holds, `vocabulary.py`
(`Vocabulary`) whether it holds anything that we do not write. `usage.md.j2` shows on the model card how to run an
artifact; its first line names the library.
"""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from export.architecture import Architecture, Strict
from export.errors import ExportError, absence, suggestion
from export.manifest import CacheScales, IOContract, KVLayout, Manifest, TensorSpec, TokenizerIds
from export.plan import Cache, Plan, leads_out

if TYPE_CHECKING:
    from export.quantization.store import QuantizedModel

_LIBRARIES = ("torch", "torchao", "transformers", "jinja2")
"""Packages that decide every artifact's bytes; a format adds its own."""
_SLACK = 256
"""Slots beyond a window: by so many tokens the cache can be rewound, and so many more than one fit in a call that
writes into slots that go round; in ONNX as many leave at once."""
_DTYPE = re.compile(r"(?:b?float|u?int|nf|fp)([1-9]\d?)")
"""A dtype's name ends with its bits."""


@dataclass(frozen=True)
class Build:
    """What is lowered for which plan, and the folder it is written to."""

    plan: Plan
    tokenizer: TokenizerIds
    folder: Path


@dataclass(frozen=True)
class Lowered:
    """The files of one lowering, described."""

    contract: IOContract
    facts: dict[str, int | float | str]
    """Counts that show what the runtime will run natively: delegates, nodes, bytes of shared weights."""
    cache_scales: CacheScales | None = None
    """Where the cache has constant scales: what they were measured on."""


@dataclass(frozen=True)
class Needs:
    """The most that lowering takes at a time."""

    memory_bytes: int
    """Held beyond the libraries that every build imports: the format's own libraries, tensors, mapped files."""
    disk_bytes: int
    """Written beside the artifact folder's final place, temporary files included."""


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight, read from a finished file."""

    name: str
    qdata: NDArray[np.int8]
    """[N, K]"""
    scale: NDArray[np.float32]
    """[N, K / group]; one column where the scheme is per channel."""


class StoredTensor(Strict):
    """One tensor in a file; several weights stacked in one matrix count as one tensor each."""

    name: str
    """The checkpoint's name where the artifact is ours, else the file's own."""
    kind: Literal["weight", "scales"]
    dtype: str
    shape: tuple[int, ...]
    """Of packed integers: of the matrix [N, K] that they encode."""
    bytes: int
    """Size in the file; 0 if these bytes are counted at another tensor."""


class Entry(Strict):
    """A method or function that a caller may call."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    value: str | None
    """The constant that a method without inputs returns."""


class Contents(Strict):
    """A model file, read without running it."""

    format: str
    facts: dict[str, str]
    """Versions and other metadata."""
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


class Format(Protocol):
    """`export/formats/NAME/__init__.py`."""

    FILES: tuple[str, ...]
    """All that `lower` writes, in every artifact; the model, or a part of it, comes first."""
    TOOLS: tuple[str, ...]
    """Packages whose versions decide the bytes of this format's artifacts."""
    CACHES: tuple[Cache, ...]
    """Kinds of KV cache that its runtime computes with; first what artifacts have where nothing else is asked for."""
    NO_CACHES: Mapping[Cache, str]
    """Why others are refused, as far as there is more to say than that the runtime has none."""
    NO_POLICIES: Mapping[str, str]
    """Why a kind of policy is refused; those that are not here it has."""
    LOGGERS: tuple[str, ...]
    """Loggers of its libraries that warn about optional parts; the commands print only their errors."""

    def check(self, plan: Plan, architecture: Architecture) -> None:
        """Raise ExportError, naming layer, rule and remedy, if the runtime would refuse or miscompute the plan."""

    def needs(self, plan: Plan, architecture: Architecture) -> Needs:
        """Memory and disk of `lower`, from the shapes alone: at most tens of per cent too high, rarely too low.

        Also called for plans that `check` refuses.
        """

    def tokenizer_notes(self, folder: Path) -> tuple[str, ...]:
        """Where the format's stock client, if it is installed, reads the tokenizer otherwise than tokenizer.json."""

    def lower(self, model: "QuantizedModel", build: Build) -> Lowered:
        """Write the artifact's files into `build.folder`."""

    def process_bytes(self, described: Manifest) -> int | None:
        """Memory at the peak of a process that runs an artifact in our runner, every slot filled; None: unknown."""


class Reader(Protocol):
    """`export/formats/NAME/read.py`: reads files of this or any other exporter without running them.

    A damaged file may raise any exception; `contents` below turns it into one line.
    """

    FORMAT: str

    def recognizes(self, path: Path) -> bool:
        """Whether the first bytes, or the files of a folder, say that this is the format."""

    def contents(self, path: Path, architecture: Architecture | None) -> Contents:
        """All of the file. With an architecture, tensors of our own artifacts get the checkpoint's names."""

    def structure(self, path: Path) -> Iterator[str]:
        """Violations of the format's own rules, in words. May end this process: native code reads the file."""

    def read_weights(self, path: Path, architecture: Architecture) -> Iterator[StoredWeight]:
        """Every quantized weight of a finished artifact under the checkpoint's names, fused projections split."""

    def product_bytes(self, artifact: Path) -> int | None:
        """Bytes of the weights that matrix products read, in a file of any exporter; None if the format hides them."""


class Vocabulary(Protocol):
    """`export/formats/NAME/vocabulary.py`: reads a stranger's files before any other code does, quickly."""

    def foreign(self, folder: Path, described: Manifest) -> Iterator[str]:
        """Operators, options, references and data in an artifact's files that no build writes, one line each.

        A damaged file may raise any exception.
        """


def names() -> list[str]:
    """Names of all formats, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def load(name: str) -> Format:
    """The format of that name, without its libraries."""
    return cast(Format, _module(name, ""))


def reader(name: str) -> Reader:
    """The module that reads the format of that name."""
    return cast(Reader, _module(name, ".read"))


def vocabulary(name: str) -> Vocabulary:
    """The module that knows all that the format of that name writes."""
    return cast(Vocabulary, _module(name, ".vocabulary"))


def _module(name: str, part: str) -> ModuleType:
    if name not in names():
        raise ExportError(f"unknown backend {name!r} in the target YAML; {suggestion(name, names())}")
    return importlib.import_module(f"{__name__}.{name}{part}")


def recognize(path: Path) -> Reader:
    """The reader of a bare file or package."""
    readers = [reader(name) for name in names()]
    match = next((candidate for candidate in readers if candidate.recognizes(path)), None)
    if match is None:
        known = ", ".join(candidate.FORMAT for candidate in readers)
        raise ExportError(f"{path}: neither an artifact folder nor a file of a known format ({known})")
    return match


def contents(reader: Reader, path: Path, architecture: Architecture | None) -> Contents:
    """Read a file. Raises ExportError, in one line, whatever its parser raises for a damaged one."""
    if not (path.is_file() or path.is_dir()):
        raise ExportError(f"{path}: {absence(path)}; build the artifact again")
    try:
        return reader.contents(path, architecture)
    except (ExportError, OSError):
        raise
    except Exception as error:  # parsers of foreign formats raise anything
        raise ExportError(f"{path}: not readable as {reader.FORMAT}: {in_a_line(error)}") from None


def tool_versions() -> dict[str, str]:
    """Versions of the installed packages that decide the bytes of any artifact."""
    versions = {}
    for tool in [*_LIBRARIES, *(tool for name in names() for tool in load(name).TOOLS)]:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            versions[tool] = "not installed"
    return versions


def loggers() -> list[str]:
    """Loggers of every format's libraries."""
    return [logger for name in names() for logger in load(name).LOGGERS]


def refuse_any_scales(plan: Plan, why: str) -> None:
    """Raise ExportError where scales come from a checkpoint unchanged and the runtime takes only a subset (`why`)."""
    if not plan.quant.common_scales:
        raise ExportError(
            f"recipe {plan.quant.name!r} on {plan.target.name!r}: {why}, and a checkpoint's own may be different; "
            "use the target onnx-cpu, or int4-g32, which rounds again"
        )


def refuse_plain_attention(plan: Plan) -> None:
    """Raise ExportError where attention is one operation of the runtime, which has no parts to choose."""
    if plan.target.attention != "fused":
        raise ExportError(
            f"target {plan.target.name!r}: attention {plan.target.attention!r} is Core ML's; set `attention: fused`"
        )


def cache_of(plan: Plan) -> Cache:
    """The kind of KV cache that a plan asks for: by itself, by its target's YAML, or else the format's first."""
    return plan.cache or plan.target.cache or load(plan.target.backend).CACHES[0]


def check_cache(plan: Plan) -> None:
    """Raise ExportError where the runtime has no such cache, or nothing would judge what it costs."""
    backend, kind, target = load(plan.target.backend), cache_of(plan), plan.target.name
    if kind not in backend.CACHES:
        reason = backend.NO_CACHES.get(kind, "its runtime has none")
        raise ExportError(
            f"target {target!r} with a cache of {kind}: {reason}; it takes --cache {' or '.join(backend.CACHES)}"
        )
    if kind != backend.CACHES[0] and kind not in plan.target.cache_limits:
        raise ExportError(
            f"target {target!r} with a cache of {kind}: no limit would judge what it loses; "
            f"give cache_limits.{kind} in configs/targets/{target}.yaml"
        )


def check_policy(plan: Plan) -> None:
    """Raise ExportError where the runtime cannot do it exactly, or it would change nothing."""
    backend, target, context = load(plan.target.backend), plan.target.name, plan.model.context_length
    if plan.policy and (reason := backend.NO_POLICIES.get(plan.policy.partition("-")[0])):
        raise ExportError(f"target {target!r} with --policy {plan.policy}: {reason}")
    if plan.window and plan.window >= context:
        raise ExportError(
            f"--policy {plan.policy}: the context has {context} tokens, which are all in such a window; leave the "
            "option out, or give a larger --context"
        )
    if plan.sink and plan.sink > context // 2:
        raise ExportError(f"--policy {plan.policy}: at most half of the context, {context // 2} tokens, never leaves")
    if plan.sink and (kind := cache_of(plan)) != "float32":
        raise ExportError(
            f"target {target!r} with --policy {plan.policy}: keys that move are turned to their new positions, "
            f"and a cache of {kind} would round them again each time; it takes --cache float32"
        )


def kv_layout(plan: Plan, a: Architecture, kind: Literal["io", "state"], *, scale_bytes: int = 0) -> KVLayout:
    """The contract's description of a KV cache, with a slot for each position of the context.

    Of a cache with a window only those of the window and `_SLACK` more, where these are fewer.
    """
    slots, frequencies = plan.window and plan.window + _SLACK, ()
    if plan.sink:
        from export.model import rope_frequencies  # loads torch, as nothing else here does

        frequencies = tuple(rope_frequencies(a).tolist())
    return KVLayout(
        kind=kind,
        dtype=cache_of(plan),
        layers=a.num_hidden_layers,
        kv_heads=a.num_key_value_heads,
        head_dim=a.head_dim,
        context_length=plan.model.context_length,
        window=plan.window,
        slots=slots if slots and slots < plan.model.context_length else None,
        sink=plan.sink,
        frequencies=frequencies,
        scale_bytes=scale_bytes,
    )


def cache_bytes(kv: KVLayout) -> int:
    """Keys and values of all slots, which are there from the start, with the scales that lie beside them."""
    return 2 * kv.layers * kv.room * kv.kv_heads * (size(kv.dtype, (kv.head_dim,)) + kv.scale_bytes)


def in_a_line(error: BaseException) -> str:
    """An exception of a library in one line of at most some 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def head(path: Path, count: int) -> bytes:
    """The first bytes of a regular file; no bytes of anything else."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(count)


def outside(folder: Path, reference: str) -> str | None:
    """Why a reference inside a file of a folder must not be followed; None if it stays in the folder."""
    if why := leads_out(reference):
        return why
    parts = reference.replace("\\", "/").split("/")
    if ":" in parts[0]:
        return "is absolute"
    if not reference or "\0" in reference:
        return "is no file name"
    step = folder
    for part in parts:
        step /= part
        if step.is_symlink():
            return "leads through a link"
    return None


def size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a packed tensor; 0 for a dtype whose size is unknown."""
    return (prod(shape) * element_bits(dtype) + 7) // 8


def element_bits(dtype: str) -> int:
    """Bits of one number; 0 for a dtype whose size is unknown."""
    match = _DTYPE.fullmatch(dtype)
    return int(match[1]) if match else 8 * (dtype == "bool")


def counted(names: Iterable[str]) -> dict[str, int]:
    """Occurrences, most frequent first."""
    return dict(Counter(sorted(names)).most_common())


def split_rows(name: str, rows: dict[str, int], tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Split a matrix of stacked weights, by name → rows in order; a matrix of one weight only gets its name."""
    if set(rows) == {name} or not tensor.shape or sum(rows.values()) != tensor.shape[0]:
        yield tensor.model_copy(update={"name": name})
        return
    for part, count in rows.items():
        share = tensor.bytes * count // tensor.shape[0]
        yield tensor.model_copy(update={"name": part, "shape": (count, *tensor.shape[1:]), "bytes": share})


def split_weights(
    qdata: NDArray[np.int8], scale: NDArray[np.float32], rows: Mapping[str, int]
) -> Iterator[StoredWeight]:
    """Split stacked integers [N, K] and scales [N, groups] by name → rows, in order."""
    start = 0
    for name, count in rows.items():
        yield StoredWeight(name, qdata[start : start + count], scale[start : start + count])
        start += count
