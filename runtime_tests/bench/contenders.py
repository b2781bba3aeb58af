"""The contenders of a benchmark, ready to run: our artifacts and the stock ones, made where they are missing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from export import formats, manifest
from export.architecture import Architecture
from export.errors import ExportError
from export.manifest import ROOT, Manifest
from export.plan import WeightScheme, load_plan
from runtime_tests.checks.speed import bytes_per_token, stored_bytes
from runtime_tests.jobs import Opening
from runtime_tests.sessions import session_module

from . import exports, forms
from .results import Entry

SESSION = "session"
"""The runner of any artifact folder of ours."""
ONE_TARGET = "onnx-cpu"
"""The target of ours that is taken where one format is enough."""


class _Runtime(NamedTuple):
    """What a module in `runners` opens; our own sessions are not listed."""

    label: str
    opens_folder: bool = False
    """Instead of the model file in it."""
    stock_kv_dtype: str = "float32"
    """Dtype of keys and values in stock artifacts."""


RUNTIMES = {
    "pte": _Runtime("ExecuTorch Python runtime, stepped"),
    "llm_runner": _Runtime("ExecuTorch TextLLMRunner"),
    "device_runner": _Runtime("our C++ runner"),
    "genai": _Runtime("onnxruntime-genai", opens_folder=True),
    "llamacpp": _Runtime("llama.cpp", stock_kv_dtype="float16"),
}


@dataclass(frozen=True)
class _Role:
    """A contender before anything is built: whose file, in which runtime, compared with which others."""

    name: str
    label: str
    runner: str
    """Module in `runners`."""
    target: str | None
    """The target of ours whose artifact decides context and tokenizer; None: any."""
    recipe: str | None
    """How the stock artifact is made; None: an artifact of ours."""
    against: tuple[str, ...] = ()
    quant: str | None = None
    """Our recipe; None: the one that the benchmark is about."""


@dataclass(frozen=True)
class Contender:
    """A file with the runner that opens it."""

    entry: Entry
    opening: Opening


@dataclass(frozen=True)
class Lineup:
    """All contenders of one run, and those that are missing."""

    contenders: tuple[Contender, ...]
    missing: dict[str, str]
    """Name → reason."""
    made: dict[str, exports.Made]
    """Recipe → the stock artifact with the cost of making it."""
    ours: dict[str, Path]
    """Target → our artifact folder, relative to the checkout."""


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

    model: str
    quant: str
    source: str | None
    threads: int
    names: tuple[str, ...]
    """Of contenders."""
    also: tuple[str, ...]
    """Recipes of ours that are measured beside `quant`."""
    eval_name: str
    accuracy: bool
    export: bool


def _llama_cpp(kind: str) -> _Role:
    return _Role(f"llamacpp-{kind}", f"llama.cpp {kind.upper()}", "llamacpp", None, f"llamacpp-{kind}")


_PTE, _ONNX = "executorch-xnnpack", "onnx-cpu"
_LLAMA_CPP = ("llamacpp-q4_0", "llamacpp-q4_k_m")
_GENAI = ("genai-stock", "genai-stock-head8", *_LLAMA_CPP)
ROLES = (
    _Role("pte", "our .pte", "pte", _PTE, None, ("pte-stock",)),
    _Role("pte-stock", "export_llm .pte", "pte", _PTE, "export_llm"),
    _Role("runner", "our .pte", "llm_runner", _PTE, None, ("runner-stock",)),
    _Role("runner-stock", "export_llm .pte", "llm_runner", _PTE, "export_llm"),
    _Role("device-runner", "our .pte", "device_runner", _PTE, None, ("runner-stock", "pte-stock", *_LLAMA_CPP)),
    _Role("genai", "our ONNX", "genai", _ONNX, None, _GENAI),
    _Role("genai-stock", "genai builder, default (int4 head)", "genai", _ONNX, "genai"),
    _Role("genai-stock-head8", "genai builder, int8 head, float embedding", "genai", _ONNX, "genai-head8"),
    _Role("session", "our ONNX", SESSION, _ONNX, None, _GENAI),
    _llama_cpp("q4_0"),
    _llama_cpp("q4_k_m"),
)
_VARIED = ("device-runner", "genai", "session")
"""Contenders of ours that are measured with the recipes of `--also` too."""


def _roles(names: Sequence[str], also: Sequence[str]) -> list[_Role]:
    """The named contenders; those of _VARIED again as `NAME@RECIPE` for each further recipe of ours."""
    chosen = [role for role in ROLES if role.name in names]
    further = [
        replace(role, name=f"{role.name}@{quant}", label=f"{role.label}, {quant}", quant=quant)
        for quant in also
        for role in chosen
        if role.name in _VARIED
    ]
    return chosen + further


def gather(request: Request) -> Lineup:
    """Build what is missing; a contender that cannot be made is listed with the reason. Raises ExportError: all."""
    chosen = _roles(request.names, request.also)
    targets = sorted({role.target for role in chosen if role.target}) or [ONE_TARGET]
    ours = {
        target: exports.built(load_plan(request.model, request.quant, target), request.source) for target in targets
    }
    made: dict[str, exports.Made] = {}
    missing: dict[str, str] = {}
    ready: list[Contender] = []
    for role in chosen:
        try:
            folder = _home(role, request, ours)
            if role.recipe and role.recipe not in made:
                made[role.recipe] = exports.make(role.recipe, folder, request.source)
            ready.append(_contender(role, folder, made, request.threads))
        except exports.NotMadeError as error:
            missing[role.name] = str(error)
    if not ready:
        raise ExportError(f"no contender left: {'; '.join(f'{name}: {why}' for name, why in missing.items())}")
    return Lineup(tuple(ready), missing, made, ours)


def opening(runner: str, path: Path, folder: Path, threads: int) -> Opening:
    """How a runner opens a file or folder; context and tokenizer are those of our artifact in `folder`."""
    return Opening(
        runner=runner,
        path=str(ROOT / path),
        tokenizer=str(ROOT / folder / "tokenizer.json"),
        context=manifest.read(ROOT / folder).contract.kv.context_length,
        threads=threads,
    )


def model_bytes(folder: Path) -> int:
    """Bytes of the model itself: `model.*`, without tokenizer files."""
    return sum(path.stat().st_size for path in (ROOT / folder).glob("model.*"))


def weight_bytes(model: Path, described: Manifest, *, ours: bool) -> int:
    """Bytes of the weights that the matrix products of one token read; an embedding table that is no head is not read.

    Where the file does not tell, the recipe does: ours, or that of the stock exporter, which quantizes all linears and
    the head alike.
    """
    if model.suffix == Path(forms.GGUF).suffix:
        return _gguf_bytes(model)
    stored = formats.reader(described.plan.target.backend).product_bytes(model)
    if stored is not None:
        return stored
    return bytes_per_token(described) if ours else _alike_bytes(described.architecture, described.plan.quant.linear)


def kv_bytes_per_position(a: Architecture, dtype: str) -> int:
    """Bytes of the keys and values of one position in all layers."""
    return formats.size(dtype, (2, a.num_hidden_layers, a.num_key_value_heads, a.head_dim))


def _home(role: _Role, request: Request, ours: dict[str, Path]) -> Path:
    """The folder of ours that decides a contender's checkpoint, cache length and tokenizer."""
    if role.quant and role.target:
        return exports.built(load_plan(request.model, role.quant, role.target), request.source)
    return ours[role.target] if role.target else next(iter(ours.values()))


def _contender(role: _Role, folder: Path, made: dict[str, exports.Made], threads: int) -> Contender:
    described = manifest.read(ROOT / folder)
    stock_made = made[role.recipe] if role.recipe else None
    place = Path(stock_made.folder) if stock_made else folder
    file = place / (described.plan.target.artifact if role.target else forms.GGUF)
    runtime = RUNTIMES.get(role.runner) or _Runtime(session_module(described).RUNTIME, opens_folder=True)
    kv_dtype = runtime.stock_kv_dtype if stock_made else described.contract.kv.dtype
    entry = Entry(
        name=role.name,
        label=role.label,
        ours=stock_made is None,
        runtime=runtime.label,
        size_bytes=model_bytes(place),
        weight_bytes_per_token=weight_bytes(ROOT / file, described, ours=stock_made is None),
        kv_bytes_per_position=kv_bytes_per_position(described.architecture, kv_dtype),
        against=role.against,
        made_by=stock_made.command if stock_made else "",
        tools=stock_made.tools if stock_made else described.tools,
    )
    return Contender(entry, opening(role.runner, place if runtime.opens_folder else file, folder, threads))


def _gguf_bytes(model: Path) -> int:
    """All matrices; the embedding only where it is the head too."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(model).tensors}
    untied = "output.weight" in tensors
    return sum(
        int(tensor.n_bytes)
        for name, tensor in tensors.items()
        if len(tensor.shape) > 1 and not (untied and name == "token_embd.weight")
    )


def _alike_bytes(a: Architecture, scheme: WeightScheme | None) -> int:
    """All linears and the head in one scheme, with 16-bit scales."""
    shapes = [(a.vocab_size, a.hidden_size), *a.linear_shapes().values()]
    return int(sum(stored_bytes(shape, scheme) for shape in shapes))
