"""The page of `check`: what was measured on each compute unit, what was expected, and what to do where it is red."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from export.host import disk
from export.manifest import Manifest
from export.plan import Attention
from export.toolbox.tables import NONE, markdown
from runtime_tests.evidence.record import Environment, Outcome
from runtime_tests.jobs.isolation import Ended
from runtime_tests.sessions import mlpackage

from . import calls

_HEAVY = frozenset({"linear", "matmul", "scaled_dot_product_attention", "softmax"})
"""Operations whose place decides the speed."""
_CORE_ML_BYTES = 3e8
"""Estimated, not measured."""
_MARKS = {True: "", False: "✗ ", None: ""}
_ENDS, _LENGTHS, _STEPS, _MEMORY, _PLAN, _TIME = "ends well", "q", "steps", "memory", "on the CPU", "ms a token"
_IF_RED = {
    _ENDS: "the words are Core ML's. With plain attention green, set `attention: plain` in configs/targets/coreml.yaml"
    ". On some units only: set `compute_units` in devices/host.yaml to others, and `computeUnits` in the app. The "
    "Neural Engine (cpu_ne, all) is known to refuse states with ranged shapes.",
    _LENGTHS: "at one length only, a kernel of Core ML for that shape is wrong: look at the other attention. From q = 2"
    " on it is the causal mask, from q = 1 on a type or an operation; `python -m runtime_tests trace FOLDER` tells "
    "whether the package itself is right.",
    _STEPS: "with all lengths green, the state is lost between calls or written elsewhere: "
    "`python -m runtime_tests.coreml.check --steps 10` and more find the step where it begins.",
    calls.STATES: "Core ML mixes up two states of one model: open a model for each conversation.",
    calls.MASK: "swift-transformers is wrong with this package; the card's own Swift passes whole masks.",
    _MEMORY: "Core ML may hold the embedding in fp16 for its `gather`, {table} more: an app needs room for it.",
    _PLAN: "each hand-over between processors costs time in every layer: look at the other attention, and at its time.",
}  # fmt: skip


class Run(NamedTuple):
    """One package on some units: how its calls ended, and Core ML's plan; None without Core ML."""

    attention: Attention
    units: str
    called: Ended
    planned: Ended | None


class Cell(NamedTuple):
    """One measured value; `holds` is None where it is not judged."""

    text: str
    holds: bool | None = None


def cells(one: Run, described: Manifest) -> dict[str, Cell]:
    """Every check of a run, by name."""
    ended = one.called.outcome is Outcome.PASS
    limits, result = described.plan.target.limits, one.called.result
    how = f"yes, loads in {result['load_ms']:.0f} ms" if ended else f"{one.called.outcome.value}: {one.called.detail}"
    found = {_ENDS: Cell(how, ended)}
    for name, (kl, sqnr) in result.get("compared", {}).items():
        found[name] = Cell(f"{kl:.1e}, {sqnr:.0f} dB", kl <= limits.max_mean_kl and sqnr >= limits.min_sqnr_db)
    if one.planned and one.planned.outcome is Outcome.PASS:
        on_cpu = Counter({name: number for device, name, number in one.planned.result["placed"] if device == "CPU"})
        text = ", ".join(f"{number} {name}" for name, number in on_cpu.most_common()) or "none"
        found[_PLAN] = Cell(text, one.units == "cpu" or not _HEAVY & set(on_cpu))
    elif one.planned:
        found[_PLAN] = Cell(f"{one.planned.outcome.value}: {one.planned.detail}", holds=False)
    if result:
        taken = result["memory_bytes"]
        # the evaluator holds all weights in fp16
        found[_MEMORY] = Cell(disk.size(taken), taken <= most_memory(described) if one.planned else None)
        found[_TIME] = Cell(f"{result['step_ms']:.2f}")
    return found


def most_memory(described: Manifest) -> int:
    """What Core ML itself, weights, caches and the largest call's logits take, half as much again of all but itself."""
    a, kv = described.architecture, described.contract.kv
    cache = 2 * 2 * kv.layers * kv.kv_heads * kv.room * kv.head_dim
    return int(_CORE_ML_BYTES + 1.5 * (described.artifact_bytes + cache + 6 * a.vocab_size * max(calls.LENGTHS)))


def page(
    machine: Environment, shipped: tuple[Attention, str], found: Sequence[tuple[str, Manifest, Sequence[Run]]]
) -> tuple[str, bool]:
    """The page in Markdown, and whether all holds for what is shipped."""
    holds, sections = True, []
    for name, described, runs in found:
        columns = {(one.attention, one.units): cells(one, described) for one in runs}
        holds &= all(cell.holds is not False for cell in columns[shipped].values())
        sections += _section(name, described, columns)
    instead = [] if mlpackage.in_core_ml() else ["**The evaluator in Core ML's place: nothing here is Core ML's.**", ""]
    about = f"{machine.cpu}, {machine.os}; coremltools {machine.tools['coremltools']}."
    verdict = f"Shipped, {' attention on '.join(shipped)}: {'all holds' if holds else 'NOT all holds'}."
    return "\n".join(["# Core ML on this Mac", "", *instead, about, "", verdict, "", *sections]), holds


def _section(name: str, described: Manifest, columns: dict[tuple[Attention, str], dict[str, Cell]]) -> list[str]:
    """The table of one model, and what to do about its red lines."""
    a, limits = described.architecture, described.plan.target.limits
    good = f"KL ≤ {limits.max_mean_kl:g}, ≥ {limits.min_sqnr_db:g} dB"
    expected = {
        _ENDS: "yes",
        _MEMORY: f"≤ {disk.size(most_memory(described))}",
        _PLAN: f"none of {', '.join(sorted(_HEAVY))}, but on cpu",
        _TIME: "the faster attention is the target's",
    }
    checks = list(dict.fromkeys(check for column in columns.values() for check in column))
    measured = {check: [column.get(check, Cell(NONE)) for column in columns.values()] for check in checks}
    rows = [
        (c, expected.get(c, good), *(_MARKS[cell.holds] + cell.text for cell in row)) for c, row in measured.items()
    ]
    red = [check for check, row in measured.items() if any(cell.holds is False for cell in row)]
    table = disk.size(2 * a.vocab_size * a.hidden_size)
    remedies = dict.fromkeys(f"- **{_kind(check)}**: {_IF_RED[_kind(check)].format(table=table)}" for check in red)
    header = ("", "expected", *(f"{attention}, {units}" for attention, units in columns))
    return [f"## {name}", "", markdown([header, *rows]), "", *(["If red:", "", *remedies, ""] if red else [])]


def _kind(check: str) -> str:
    """The key of what to do about a check."""
    if check in _IF_RED:
        return check
    return _LENGTHS if check.startswith("q = ") else _STEPS
