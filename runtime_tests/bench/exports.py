"""Exports in child processes, offline: our artifacts and the stock exporters' of the same weights, with their costs.

Stock artifacts are made once and cached under a key of everything that decides them: checkpoint, options, versions of
the tools. Ours are built again where a build would write something else.

python -m runtime_tests.bench.exports MODEL QUANT TARGET --out FOLDER    with an empty quantization cache
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from export import manifest
from export.build import request, skip
from export.checkpoints.origin import chosen_origin, published
from export.errors import ExportError
from export.host import processes
from export.host.console import console, stage
from export.host.disk import locked
from export.manifest import ROOT, Manifest
from export.plan import Plan, load_plan, names

from .results import Cost, ExportCost

BENCH = Path("build") / "bench"
_RECORD = "made.json"
_LOG = "log.txt"
_PROGRESS_EVERY_S = 60.0
_OFFLINE = ("env", "HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false")
"""No tool may fetch weights: each is given those that ours gets."""


class NotMadeError(ExportError):
    """An exporter is not installed, or failed."""


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
    label: str = ""
    """Of an exporter, for people."""


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
    module, arguments = "runtime_tests.bench.runners.llamacpp", ("{gguf}/model.gguf", "{out}/model.gguf", kind)
    label = f"llama.cpp quantize, {kind.upper()}"
    return Recipe(f"llamacpp-{kind}", module, arguments, ("gguf",), ("llama-cpp-python",), label)


def _form(name: str, *tools: str) -> Recipe:
    return Recipe(name, "runtime_tests.bench.forms", (name, "{out}", "{ours}", "{source}"), (), tools)


def _genai(name: str, label: str, *options: str) -> Recipe:
    tools = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "transformers", "torch")
    arguments = (*_GENAI, *options)
    return Recipe(name, "onnxruntime_genai.models.builder", arguments, ("huggingface",), tools, label)


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
            "ExecuTorch export_llm",
        ),
        _genai("genai", "onnxruntime-genai builder"),
        _genai("genai-head8", "onnxruntime-genai builder, int8 head", *_GENAI_HEAD8),
        _llama_cpp("q4_0"),
        _llama_cpp("q4_k_m"),
        _llama_cpp("q8_0"),
    )
}


class Made(Cost):
    """A stock artifact with the cost of making it."""

    folder: str
    """Relative to the checkout."""
    tools: dict[str, str]


def run(arguments: Sequence[str], log: Path, label: str) -> Cost:
    """Run Python from the checkout's root with its output in a log file, and print a line each minute.

    The child is killed when this process is interrupted. Raises NotMadeError with its last words.
    """
    load, started = round(os.getloadavg()[0], 2), time.monotonic()
    printed = started

    def watch(_: str) -> bool:
        nonlocal printed
        if (now := time.monotonic()) - printed > _PROGRESS_EVERY_S:
            printed = now
            console.print(f"  {label}: {(now - started) / 60:.0f} min", soft_wrap=True)
        return False

    with (ROOT / log).open("w+b") as file:
        done = processes.run([*_OFFLINE, sys.executable, *arguments], cwd=ROOT, watch=watch, log=file)
    if done.returncode != 0:
        raise NotMadeError(f"{label}: exit {done.returncode}: {done.last_words} (all of it in {log})")
    return Cost(
        command=shlex.join(["python", *arguments]),
        seconds=done.seconds,
        peak_rss_bytes=done.peak_rss_bytes,
        load_average_1min=load,
    )


def built(plan: Plan, source: str | None) -> Path:
    """The folder of a plan's artifact, relative to the checkout; built unless it holds what a build would write."""
    origin = chosen_origin(source, None)
    plan = request.named(plan, origin)
    folder = BENCH / "ours" / plan.id
    if skip.reasons(plan, origin, ROOT / folder):
        console.print(f"  building {folder}", soft_wrap=True)
        (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
        run((*request.words(plan, source), "--out", str(folder)), _log_of(folder), plan.id)
    return folder


def ours(model: str, quant: str, source: str | None) -> list[ExportCost]:
    """The cost of every target once, from the checkpoint, with an empty quantization cache."""
    return [_cold(load_plan(model, quant, target), source) for target in names("targets")]


def stock(made: Mapping[str, Made]) -> list[ExportCost]:
    """Costs of the stock exporters, measured when their artifacts were made."""
    costs = {
        RECIPES[name].label: artifact.model_dump(include=set(Cost.model_fields)) for name, artifact in made.items()
    }
    return [ExportCost(label=label, **cost) for label, cost in costs.items()]


def _cold(plan: Plan, source: str | None) -> ExportCost:
    with tempfile.TemporaryDirectory(prefix=".cold-", dir=ROOT / BENCH) as scratch, stage("export", plan.id):
        origin = chosen_origin(source, None)
        plan = request.named(plan, origin)
        words = request.words(plan, source)
        arguments = ("-m", "runtime_tests.bench.exports", *words[2:], "--out", str(Path(scratch) / "artifact"))
        cost = run(arguments, _log_of(BENCH / f"cold-{plan.id}"), plan.id)
    label = f"python -m export, {plan.target.name}"
    told = request.words(plan, None if origin is None else published(origin))
    return ExportCost(label=label, **cost.model_dump() | {"command": request.shell(told)})


def make(name: str, beside: Path, source: str | None) -> Made:
    """The folder of a recipe for the checkpoint of our artifact in `beside`, cached or made now.

    Raises NotMadeError.
    """
    recipe, described = RECIPES[name], manifest.read(ROOT / beside)
    require_installed(recipe.tools)
    folder = BENCH / "stock" / f"{described.plan.model.name}-{name}-{_key_of(recipe, described)}"
    if (ROOT / folder / _RECORD).is_file():
        return Made.model_validate_json((ROOT / folder / _RECORD).read_bytes())
    inputs = {needed: make(needed, beside, source).folder for needed in recipe.inputs}
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    with locked(ROOT / folder):
        return _make(recipe, folder, values_of(described) | inputs | {"ours": str(beside), "source": source or ""})


def _make(recipe: Recipe, folder: Path, values: dict[str, str]) -> Made:
    """Run the exporter into a temporary folder, then rename; a failure leaves its log."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(ROOT / part, ignore_errors=True)
    (ROOT / part).mkdir()
    console.print(f"  making {folder} (once)", soft_wrap=True)
    cost = run(command(recipe, values, part), _log_of(folder), recipe.name)
    shown = cost.command.replace(str(part), str(folder))
    made = Made(folder=str(folder), tools=_versions(recipe), **cost.model_dump() | {"command": shown})
    (ROOT / part / _RECORD).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (ROOT / part).rename(ROOT / folder)
    return made


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.{_LOG}")


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


def require_installed(tools: Sequence[str]) -> None:
    """Raises NotMadeError: one of these packages is missing."""
    for tool in tools:
        try:
            version(tool)
        except PackageNotFoundError:
            raise NotMadeError(f"not installed: pip install {tool}") from None


def _export_cold() -> int:
    """`python -m export` with an empty cache, so that nothing comes from an earlier build."""
    from export import pipeline
    from export.__main__ import app
    from export.build.command import run as run_app

    with tempfile.TemporaryDirectory() as cache:
        pipeline.CACHE = Path(cache)
        return run_app(app)


if __name__ == "__main__":
    sys.exit(_export_cold())
