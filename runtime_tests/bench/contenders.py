"""Who takes part, ready to run: our artifacts and the stock ones, built or made where needed. Times nothing."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from export import manifest
from export.errors import ExportError
from export.manifest import ROOT, Manifest
from export.plan import Plan, load_plan
from export.progress import console

from ..jobs import Opening
from . import processes, stock, traffic
from .results import Entry
from .roles import ONNX, RUNTIMES, Role, roles


@dataclass(frozen=True)
class Contender:
    """Ready to run."""

    entry: Entry
    opening: Opening


@dataclass(frozen=True)
class Field:
    """Everyone who takes part, and why others do not."""

    contenders: tuple[Contender, ...]
    missing: dict[str, str]
    made: dict[str, stock.Made]
    """Recipe → what making it took."""
    ours: dict[str, Path]
    """Target → our artifact folder, relative to the checkout."""


class NotBuiltError(ExportError):
    """An artifact of ours that the exporter refuses."""


@dataclass(frozen=True)
class Asked:
    """Which contenders, of which weights."""

    model: str
    quant: str
    source: str | None
    threads: int
    names: tuple[str, ...]
    also: tuple[str, ...] = ()
    """Further recipes of ours to measure beside `quant`."""


def gather(asked: Asked) -> Field:
    """Build what is not there yet; a peer that cannot be had is named, not dropped."""
    wanted = roles(asked.names, asked.also)
    targets = sorted({role.target for role in wanted if role.target}) or [ONNX]
    ours = {target: built(load_plan(asked.model, asked.quant, target), asked.source) for target in targets}
    made: dict[str, stock.Made] = {}
    missing: dict[str, str] = {}
    ready: list[Contender] = []
    for role in wanted:
        try:
            folder = home(role, asked, ours)
            if role.recipe and role.recipe not in made:
                made[role.recipe] = stock.make(
                    role.recipe, manifest.read(ROOT / folder), folder / manifest.FILE, asked.source
                )
            ready.append(contender(role, folder, made, asked.threads))
        except (stock.NotMadeError, NotBuiltError) as error:
            missing[role.name] = str(error)
    if not ready:
        raise ExportError(f"no contender left: {'; '.join(f'{name}: {why}' for name, why in missing.items())}")
    return Field(tuple(ready), missing, made, ours)


def home(role: Role, asked: Asked, ours: dict[str, Path]) -> Path:
    """Our artifact that a role belongs to; it says which checkpoint, cache length and tokenizer."""
    if role.quant and role.target:
        return built(load_plan(asked.model, role.quant, role.target), asked.source)
    return ours[role.target] if role.target else next(iter(ours.values()))


def contender(role: Role, folder: Path, made: dict[str, stock.Made], threads: int) -> Contender:
    """A role with its files."""
    described = manifest.read(ROOT / folder)
    stock_made = made[role.recipe] if role.recipe else None
    place = Path(stock_made.folder) if stock_made else folder
    runtime = RUNTIMES[role.runner]
    entry = Entry(
        name=role.name,
        label=role.label,
        ours=stock_made is None,
        runtime=runtime.label,
        size_bytes=model_bytes(place),
        weight_bytes_per_token=traffic.weight_bytes(
            ROOT / place / (runtime.file or "model.onnx"), described, ours=stock_made is None
        ),
        kv_bytes_per_position=traffic.kv_bytes_per_position(
            described.architecture, runtime.kv_dtype if stock_made else described.contract.kv.dtype
        ),
        against=role.against,
        made_by=stock_made.command if stock_made else "",
        tools=stock_made.tools if stock_made else described.tools,
    )
    opening = Opening(
        runner=role.runner,
        path=str(ROOT / place / runtime.file),
        tokenizer=str(ROOT / folder / "tokenizer.json"),
        context=described.contract.kv.context_length,
        threads=threads,
    )
    return Contender(entry, opening)


def model_bytes(folder: Path) -> int:
    """Size of the model itself: `model.*`, without tokenizer files."""
    return sum(path.stat().st_size for path in (ROOT / folder).glob("model.*"))


def built(plan: Plan, source: str | None) -> Path:
    """Our artifact by the code as it is now, built in a child process unless it is there."""
    folder = stock.BENCH / "ours" / plan.id
    if fresh(folder, plan, source):
        return folder
    console.print(f"  building {folder}", soft_wrap=True)
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    done = processes.run(
        (sys.executable, *export_command(plan, folder, source)), ROOT / f"{folder}.{stock.LOG}", plan.id
    )
    if done.returncode != 0:
        raise NotBuiltError(f"{plan.id}: export failed: {done.last_words}")
    return folder


def export_command(plan: Plan, folder: Path, source: str | None, module: str = "export") -> tuple[str, ...]:
    """Arguments after `python` that build a plan."""
    where = ("--source", source) if source else ()
    return ("-m", module, plan.model.name, plan.quant.name, plan.target.name, "--out", str(folder), *where)


def fresh(folder: Path, plan: Plan, source: str | None) -> bool:
    """Whether a folder holds the plan as the code and configuration of this checkout make it."""
    try:
        found: Manifest = manifest.read(ROOT / folder)
    except ExportError:
        return False
    same = found.plan == plan and found.checkpoint.origin == (source or plan.model.source)
    return same and found.source.sha256 == manifest.source_info().sha256
