"""Artifacts of the same weights by the stock exporters, made once and kept. Knows nothing about timing.

Kept under a key of everything that decides them: checkpoint, options, versions of the tools.
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

from export.disk import locked
from export.errors import ExportError
from export.manifest import ROOT, Manifest
from export.progress import console

from . import processes
from .recipes import RECIPES, Recipe

BENCH = Path("build") / "bench"
RECORD = "made.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Made:
    """A folder and what making it took."""

    folder: str
    """Relative to the checkout."""
    command: str
    seconds: float
    peak_rss_bytes: int
    load_average_1min: float | None
    """When it started; null where it was not noted."""
    tools: dict[str, str]

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return ROOT / self.folder


class NotMadeError(ExportError):
    """A peer that is not installed, or whose exporter failed."""


def make(name: str, described: Manifest, manifest_path: Path, source: str | None) -> Made:
    """The folder of a recipe for the checkpoint of one of our artifacts, from the store or made now."""
    recipe = RECIPES[name]
    require_installed(recipe)
    key = key_of(recipe, described)
    folder = BENCH / "stock" / f"{described.plan.model.name}-{name}-{key}"
    if (ROOT / folder / RECORD).is_file():
        return Made(**json.loads((ROOT / folder / RECORD).read_text(encoding="utf-8")))
    inputs = {needed: make(needed, described, manifest_path, source).folder for needed in recipe.inputs}
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    with locked(ROOT / folder):
        values = values_of(described) | inputs | {"manifest": str(manifest_path), "source": source or ""}
        return run(recipe, folder, values)


def run(recipe: Recipe, folder: Path, values: dict[str, str]) -> Made:
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
    made = Made(str(folder), shown, done.seconds, done.peak_rss_bytes, load, versions(recipe))
    (ROOT / part / RECORD).write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
    (ROOT / part).rename(ROOT / folder)
    return made


def command(recipe: Recipe, values: dict[str, str], out: Path) -> tuple[str, ...]:
    """Arguments after `python`; an argument that becomes empty is left out."""
    filled = (argument.format(**values, out=out) for argument in recipe.arguments)
    return ("-m", recipe.module, *(argument for argument in filled if argument))


def values_of(described: Manifest) -> dict[str, str]:
    """What options take from the artifact: group size, context length in tokens, special token ids."""
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


def key_of(recipe: Recipe, described: Manifest) -> str:
    """Hash of the checkpoint, the options and the tools, of the inputs too."""
    parts = [
        [recipe.module, recipe.arguments, versions(recipe), values_of(described)],
        [described.checkpoint.origin, described.checkpoint.sha256, described.architecture.model_dump()],
        [key_of(RECIPES[name], described) for name in recipe.inputs],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of the packages that decide the result."""
    return {tool: version(tool) for tool in recipe.tools}


def require_installed(recipe: Recipe) -> None:
    """Refuse a peer whose package is not there, and say how to get it."""
    for tool in recipe.tools:
        try:
            version(tool)
        except PackageNotFoundError:
            raise NotMadeError(f"not installed: pip install {tool}") from None
