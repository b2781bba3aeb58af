"""Two artifacts side by side, of the same or different formats and recipes: what is not the same, and how much."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import backends, inspection, measured, readers
from .backends import StoredWeight
from .contents import MODULES, ModuleSize
from .errors import ExportError
from .headline import Runs, headline
from .inspection import Inspection, Section
from .plan import Strict

NO_WEIGHTS = "integers and scales are compared between artifact folders only"
UNTIMED = "no validation record of one or both on the same device"
OTHER_MACHINE = "{}: validated on different machines ({} and {}), so speed and memory are not compared"
Paired = tuple[str, StoredWeight | None, StoredWeight | None]


class Change(Strict):
    """A field that differs; null where one does not have it."""

    field: str
    a: str | None
    b: str | None


class SizePair(Strict):
    """Bytes of one module in both."""

    module: str
    a: int
    b: int


class WeightDifference(Strict):
    """One quantized tensor whose numbers are not the same."""

    name: str
    integers: int | None
    """How many differ; null: not comparable, `why` says."""
    scales: int | None
    why: str


class Weights(Strict):
    """Integers and scales of all quantized tensors of both."""

    tensors: int
    numbers: int
    differing: tuple[WeightDifference, ...]


class Difference(Strict):
    """A against B. JSON of this is what `diff --json` prints."""

    a: str
    b: str
    headline: str
    """The whole in a line."""
    sizes: tuple[SizePair, ...]
    schemes: tuple[Change, ...]
    weights: Weights | None
    contract: tuple[Change, ...]
    plan: tuple[Change, ...]
    tools: tuple[Change, ...]
    operations: tuple[Change, ...]
    measured: tuple[Change, ...]
    notes: tuple[str, ...]
    """What could not be compared."""


def compare(a: Path, b: Path, records: Sequence[Path]) -> Difference:
    """Read both, weights too where both are artifact folders; nothing is run. Records files may be missing."""
    one, other = inspection.inspect(a), inspection.inspect(b)
    both = one.manifest is not None and other.manifest is not None
    bytes_of = tuple(sizes(one.sizes, other.sizes))
    schemes = changes({x.name: x.scheme for x in one.layers}, {x.name: x.scheme for x in other.layers})
    numbers = weights(one, other) if both else None
    runs = common_runs(a, b, records) if both else {}
    notes = [] if both else [f"{one.note or other.note}", NO_WEIGHTS]
    return Difference(
        a=str(a),
        b=str(b),
        headline=headline(bytes_of[-1].a, bytes_of[-1].b, changed_layers(schemes, numbers), runs),
        sizes=bytes_of,
        schemes=schemes,
        weights=numbers,
        contract=changes(interface(one), interface(other)),
        plan=changes(*(flat(x.manifest.plan.model_dump(mode="json")) if x.manifest else {} for x in (one, other))),
        tools=changes(*(x.manifest.tools if x.manifest else {} for x in (one, other))),
        operations=changes(operations(one), operations(other)),
        measured=tuple(measurements(runs)),
        notes=tuple(notes + (list(other_machines(runs)) if runs else [UNTIMED])),
    )


def changed_layers(schemes: Sequence[Change], numbers: Weights | None) -> int | None:
    """Quantized weights with another scheme or other numbers; None: their numbers were not compared."""
    if numbers is None:
        return None
    return len({one.field for one in schemes} | {one.name for one in numbers.differing})


def sizes(one: tuple[ModuleSize, ...], other: tuple[ModuleSize, ...]) -> Iterator[SizePair]:
    """Bytes by module, and of the whole."""

    def total(side: tuple[ModuleSize, ...], module: str | None) -> int:
        return sum(size.bytes for size in side if module in (None, size.module))

    for module in (*MODULES, None):
        a, b = total(one, module), total(other, module)
        if a or b:
            yield SizePair(module=module or "total", a=a, b=b)


def flat(value: Any, name: str = "") -> dict[str, str]:
    """A nested record as `target.limits.max_mean_kl` → text."""
    if not isinstance(value, dict | list):
        return {name: str(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, str] = {}
    for key, inner in pairs:
        found |= flat(inner, f"{name}.{key}".lstrip("."))
    return found


def changes(a: dict[str, str], b: dict[str, str]) -> tuple[Change, ...]:
    """Fields whose texts differ, in A's order, then those only B has."""
    return tuple(
        Change(field=key, a=a.get(key), b=b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    )


def interface(of: Inspection) -> dict[str, str]:
    """What a caller sees: tensors of the file, and what the manifest promises of them."""
    found: dict[str, str] = {}
    for entry in of.contents.entries:
        found |= {entry.name: entry.value} if entry.value is not None else {}
        for side, specs in (("input", entry.inputs), ("output", entry.outputs)):
            for i, spec in enumerate(specs):
                _, dtype, shape = inspection.tensor(spec)
                found[f"{entry.name} {side} {spec.name or i}"] = f"{dtype} {shape}".strip()
    if of.manifest:
        contract = of.manifest.contract.model_dump(mode="json")
        found |= flat({key: contract[key] for key in ("kv", "max_prefill", "logits")})
    return found


def operations(of: Inspection) -> dict[str, str]:
    """Counts by kind."""
    return {f"{kind} ({where})": count for kind, where, count in inspection.operations(of.contents)}


def weights(one: Inspection, other: Inspection) -> Weights:
    """Every quantized tensor of both, number by number."""
    tensors = numbers = 0
    differing = []
    for name, a, b in paired(read(one), read(other)):
        tensors += 1
        numbers += a.qdata.size + a.scale.size if a else 0
        found = difference(name, a, b)
        differing += [found] if found else []
    return Weights(tensors=tensors, numbers=numbers, differing=tuple(differing))


def read(of: Inspection) -> Iterator[StoredWeight]:
    """The quantized tensors of an artifact folder."""
    assert of.manifest is not None
    target = of.manifest.plan.target
    file = Path(of.path) / target.artifact
    try:
        yield from backends.load(target.backend).read_weights(file, of.manifest.architecture)
    except (ExportError, OSError):
        raise
    except Exception as error:  # parsers of foreign formats raise what they like
        raise ExportError(f"{file}: integers and scales are not readable: {readers.in_a_line(error)}") from None


def paired(a: Iterator[StoredWeight], b: Iterator[StoredWeight]) -> Iterator[Paired]:
    """Tensors of one name together, whatever order the formats keep them in; few wait at a time."""
    waiting_a: dict[str, StoredWeight] = {}
    waiting_b: dict[str, StoredWeight] = {}
    for one, other in zip_longest(a, b):
        if one is not None:
            waiting_a[one.name] = one
        if other is not None:
            waiting_b[other.name] = other
        for name in sorted(waiting_a.keys() & waiting_b.keys()):
            yield name, waiting_a.pop(name), waiting_b.pop(name)
    yield from ((name, left, None) for name, left in waiting_a.items())
    yield from ((name, None, left) for name, left in waiting_b.items())


def difference(name: str, a: StoredWeight | None, b: StoredWeight | None) -> WeightDifference | None:
    """Numbers of one tensor that differ; None: none."""
    if a is None or b is None:
        return WeightDifference(name=name, integers=None, scales=None, why=f"quantized in {'A' if a else 'B'} only")
    if a.qdata.shape != b.qdata.shape:
        why = f"shapes {a.qdata.shape} and {b.qdata.shape}"
        return WeightDifference(name=name, integers=None, scales=None, why=why)
    integers = int(np.count_nonzero(a.qdata != b.qdata))
    if a.scale.shape != b.scale.shape:
        why = f"{a.scale.shape[1]} and {b.scale.shape[1]} groups"
        return WeightDifference(name=name, integers=integers, scales=None, why=why)
    scales = int(np.count_nonzero(a.scale != b.scale))
    return WeightDifference(name=name, integers=integers, scales=scales, why="") if integers or scales else None


def common_runs(a: Path, b: Path, records: Sequence[Path]) -> Runs:
    """Newest validation of both on each device that ran both."""
    one, other = measured.newest(a, records), measured.newest(b, records)
    return {device: (one[device], other[device]) for device in sorted(one.keys() & other.keys())}


def measurements(runs: Runs) -> Iterator[Change]:
    """What validation found of both."""
    for device, (one, other) in runs.items():
        yield Change(field=f"{device}: verdict", a=one.outcome, b=other.outcome)
        same = one.environment == other.environment
        left, right = (x.numbers() if same else x.losses() for x in (one, other))
        for name in (name for name in left if name in right):
            yield Change(field=f"{device}: {name}", a=number(left[name]), b=number(right[name]))


def other_machines(runs: Runs) -> Iterator[str]:
    """Devices of one name that were two machines."""
    for device, (one, other) in runs.items():
        if one.environment != other.environment:
            yield OTHER_MACHINE.format(device, one.environment, other.environment)


def number(value: float) -> str:
    """Four digits, never an exponent for a rate."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def show(found: Difference) -> None:
    """Print every table that is not empty."""
    print(f"A {found.a}\nB {found.b}\n{found.headline}")
    console = Console(highlight=False)
    for section in sections(found):
        if section.rows:
            inspection.print_section(section, console)
    print()
    for line in (*headlines(found), *found.notes):
        print(line)


def sections(found: Difference) -> Iterator[Section]:
    """What is shown, in order."""
    rows = [(one.module, f"{one.a:,}", f"{one.b:,}", ratio(one)) for one in found.sizes]
    yield Section("bytes by module", ("module", "A", "B", "B / A"), rows)
    schemes = inspection.alike([(name, (a, b)) for name, a, b in map(changed, found.schemes)])
    layers = [(name, *pair, str(len(names))) for name, pair, names in schemes]
    yield Section("scheme of layers", ("layer", "A", "B", "count"), layers)
    differing = found.weights.differing if found.weights else ()
    numbers = [(one.name, shown(one.integers), shown(one.scales), one.why) for one in differing]
    yield Section("differing numbers", ("tensor", "integers", "scales", ""), numbers)
    for title, fields in (
        ("interface", found.contract),
        ("plan", found.plan),
        ("tools", found.tools),
        ("operations", found.operations),
        ("measured by validation", found.measured),
    ):
        yield Section(title, ("field", "A", "B"), [changed(one) for one in fields])


def changed(one: Change) -> tuple[str, str, str]:
    """A dash where a side has no such field."""
    return (one.field, shown(one.a), shown(one.b))


def shown(value: str | int | None) -> str:
    """A cell."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else value


def ratio(one: SizePair) -> str:
    """B over A."""
    return f"{one.b / one.a:.3f}" if one.a else "–"


def headlines(found: Difference) -> Iterator[str]:
    """The few sentences that a reader wants first."""
    total = found.sizes[-1]
    yield f"size: {total.a / 1e6:.2f} MB → {total.b / 1e6:.2f} MB ({ratio(total)})"
    yield f"schemes: {len(found.schemes)} layers differ" if found.schemes else "schemes: the same in every layer"
    if found.weights and found.weights.differing:
        of = found.weights.tensors
        yield f"integers and scales: {len(found.weights.differing)} of {of} quantized tensors differ"
    elif found.weights:
        yield f"integers and scales: identical in {found.weights.tensors} tensors, {found.weights.numbers:,} numbers"
    counts = (("interface", found.contract), ("plan", found.plan), ("tools", found.tools))
    yield ", ".join(f"{name}: {len(fields) or 'no'} differences" for name, fields in counts)


def markdown(found: Difference) -> str:
    """A comment for a pull request: the headline, and every table folded."""
    lines = [f"**{found.headline}**", "", f"A `{found.a}` · B `{found.b}`", ""]
    lines += [f"- {line}" for line in (*headlines(found), *found.notes)]
    for section in (section for section in sections(found) if section.rows):
        summary = f"<details><summary>{section.title} ({len(section.rows)})</summary>"
        lines += ["", summary, "", *as_markdown(section), "", "</details>"]
    return "\n".join(lines)


def as_markdown(section: Section) -> list[str]:
    """A table; bars inside cells would end them."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (section.columns, *section.rows)]
    rule = ["---"] * len(section.columns)
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
