"""Artifacts of the same weights by the stock exporters: how each is made; made once and cached.

Cached under a key of everything that decides them: checkpoint, options, versions of the tools.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from export.errors import ExportError
from export.host.console import console
from export.host.disk import locked
from export.manifest import ROOT, Manifest

from . import processes

BENCH = Path("build") / "bench"
_RECORD = "made.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Recipe:
    """How a child process makes one folder. `{…}` in arguments: `out`, `context`, or the folder of an input."""

    name: str
    module: str
    """Run as `python -m`."""
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    """Recipes whose folders it reads."""
    tools: tuple[str, ...]
    """Packages whose versions decide the result; the first one is the exporter."""


_EXPORT_LLM = (
    "base.model_class=llama3_2",
    "base.checkpoint={meta}/consolidated.00.pth",
    "base.params={meta}/params.json",
    'base.metadata=\'{{"get_bos_id": {bos}, "get_eos_ids": [{eos}]}}\'',
    "model.dtype_override=fp32",
    "model.enable_dynamic_shape=True",
    "model.use_kv_cache=True",
    "model.use_sdpa_with_kv_cache=True",
    "export.max_seq_length={context}",
    "export.max_context_length={context}",
    "export.output_name={out}/model.pte",
    "quantization.qmode=8da4w",
    "quantization.group_size={group}",
    "quantization.embedding_quantize='8,0'",
    "backend.xnnpack.enabled=True",
    "backend.xnnpack.extended_ops=True",
    "hydra.run.dir={out}/hydra",
)
_GENAI = (
    *("-i", "{huggingface}", "-o", "{out}", "-p", "int4", "-e", "cpu", "-c", "{out}/cache"),
    *("--extra_options", "int4_block_size={group}", "int4_accuracy_level=4"),
)
_GENAI_HEAD8 = ("matmul_mixed_precision=last_matmul:int8", "shared_embeddings=false")
"""The one way to an int8 head that works in 0.18: `rtn_last` and `k_quant_last` leave a tied head at int4, and a shared
int8 table refers to a tensor that is not in the file."""


def _llama_cpp(kind: str) -> Recipe:
    module, arguments = "runtime_tests.bench.runners.llama_quantize", ("{gguf}/model.gguf", "{out}/model.gguf", kind)
    return Recipe(f"llamacpp-{kind}", module, arguments, ("gguf",), ("llama-cpp-python",))


def _form(name: str, *tools: str) -> Recipe:
    return Recipe(name, "runtime_tests.bench.forms", (name, "{out}", "{manifest}", "{source}"), (), tools)


def _genai(name: str, *options: str) -> Recipe:
    tools = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "transformers", "torch")
    return Recipe(name, "onnxruntime_genai.models.builder", (*_GENAI, *options), ("huggingface",), tools)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _form("huggingface", "torch", "safetensors"),
        _form("meta", "torch"),
        _form("gguf", "gguf", "torch"),
        Recipe(
            "export_llm",
            "executorch.extension.llm.export.export_llm",
            _EXPORT_LLM,
            ("meta",),
            ("executorch", "torchao", "torch"),
        ),
        _genai("genai"),
        _genai("genai-head8", *_GENAI_HEAD8),
        _llama_cpp("q4_0"),
        _llama_cpp("q4_k_m"),
        _llama_cpp("q8_0"),
    )
}


@dataclass(frozen=True)
class Made:
    """A folder with the cost of making it."""

    folder: str
    """Relative to the checkout."""
    command: str
    seconds: float
    peak_rss_bytes: int
    load_average_1min: float | None
    """When it started; null where it was not recorded."""
    tools: dict[str, str]


class NotMadeError(ExportError):
    """A stock exporter is not installed, or failed."""


def make(name: str, described: Manifest, manifest_path: Path, source: str | None) -> Made:
    """The folder of a recipe for the checkpoint of one of our artifacts, cached or made now. Raises NotMadeError."""
    recipe = RECIPES[name]
    _require_installed(recipe)
    key = _key_of(recipe, described)
    folder = BENCH / "stock" / f"{described.plan.model.name}-{name}-{key}"
    if (ROOT / folder / _RECORD).is_file():
        return Made(**json.loads((ROOT / folder / _RECORD).read_text(encoding="utf-8")))
    inputs = {needed: make(needed, described, manifest_path, source).folder for needed in recipe.inputs}
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    with locked(ROOT / folder):
        values = values_of(described) | inputs | {"manifest": str(manifest_path), "source": source or ""}
        return _run(recipe, folder, values)


def _run(recipe: Recipe, folder: Path, values: dict[str, str]) -> Made:
    """Run the exporter into a temporary folder, then rename; a failure leaves its log."""
    part = folder.with_name(f".{folder.name}.part")
    log = ROOT / folder.with_name(f"{folder.name}.{LOG}")
    shutil.rmtree(ROOT / part, ignore_errors=True)
    (ROOT / part).mkdir()
    console.print(f"  making {folder} (once)", soft_wrap=True)
    load = round(os.getloadavg()[0], 2)
    done = processes.run((sys.executable, *command(recipe, values, part)), log, recipe.name)
    if done.returncode != 0:
        raise NotMadeError(f"exit {done.returncode}: {done.last_words} (all of it in {log.relative_to(ROOT)})")
    shown = " ".join(["python", *map(shlex.quote, command(recipe, values, folder))])
    made = Made(str(folder), shown, done.seconds, done.peak_rss_bytes, load, _versions(recipe))
    (ROOT / part / _RECORD).write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
    (ROOT / part).rename(ROOT / folder)
    return made


def command(recipe: Recipe, values: dict[str, str], out: Path) -> tuple[str, ...]:
    """Arguments after `python`; an argument that becomes empty is left out."""
    filled = (argument.format(**values, out=out) for argument in recipe.arguments)
    return ("-m", recipe.module, *(argument for argument in filled if argument))


def values_of(described: Manifest) -> dict[str, str]:
    """Values of options that the artifact decides: group size, context length in tokens, special token ids."""
    ids, linear = described.tokenizer, described.plan.quant.linear
    if linear is None or linear.bits != 4 or linear.group_size is None:
        raise ExportError(
            f"recipe {described.plan.quant.name!r}: stock artifacts are int4 groupwise; give such a recipe"
        )
    return {
        "group": str(linear.group_size),
        "context": str(described.contract.kv.context_length),
        "bos": str(ids.bos_id if ids.bos_id is not None else ids.eos_ids[0]),
        "eos": ", ".join(map(str, ids.eos_ids)),
    }


def _key_of(recipe: Recipe, described: Manifest) -> str:
    """Hash of the checkpoint, the options and the versions of the tools, those of its inputs included."""
    parts = [
        [recipe.module, recipe.arguments, _versions(recipe), values_of(described)],
        [described.checkpoint.origin, described.checkpoint.sha256, described.architecture.model_dump()],
        [_key_of(RECIPES[name], described) for name in recipe.inputs],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _versions(recipe: Recipe) -> dict[str, str]:
    return {tool: version(tool) for tool in recipe.tools}


def _require_installed(recipe: Recipe) -> None:
    for tool in recipe.tools:
        try:
            version(tool)
        except PackageNotFoundError:
            raise NotMadeError(f"not installed: pip install {tool}") from None
