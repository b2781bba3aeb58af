"""Two artifacts of any format and recipe side by side: what differs, and how much."""

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import zip_longest
from pathlib import Path

import numpy as np

from export import formats
from export.architecture import Strict
from export.errors import ExportError
from export.formats import StoredWeight, in_a_line
from export.host.console import Plain, say
from export.host.text import code
from export.host.text import markdown as escaped
from export.manifest import flat

from . import evidence, inspection, tables
from .evidence import Rate, Validation
from .inspection import Inspection, Section
from .sizes import MODULES, ModuleSize
from .tables import NONE

UNTIMED = "no validation record of one or both on the same device"
_NO_WEIGHTS = "integers and scales are compared between artifact folders only"
_OTHER_MACHINE = "{}: validated on different machines ({} and {}), so speed and memory are not compared"
_Paired = tuple[str, StoredWeight | None, StoredWeight | None]
_Runs = Mapping[str, tuple[Validation, Validation]]
"""Device → the newest run of A and of B on it."""


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
    """One quantized tensor whose numbers differ."""

    name: str
    integers: int | None
    """How many differ; null: not comparable, `why` gives the reason."""
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
    """Read both, with their weights where both are artifact folders; no model is run. Records files may be missing."""
    left, right = inspection.inspect(a), inspection.inspect(b)
    both = left.manifest is not None and right.manifest is not None
    sizes = tuple(_sizes(left.sizes, right.sizes))
    schemes = _changes(*({layer.name: layer.scheme for layer in side.layers} for side in (left, right)))
    numbers = _weights(left, right) if both else None
    runs = _common_runs(a, b, records) if both else {}
    notes = [] if both else [f"{left.note or right.note}", _NO_WEIGHTS]
    return Difference(
        a=str(a),
        b=str(b),
        headline=_headline(sizes[-1].b - sizes[-1].a, schemes, numbers, runs),
        sizes=sizes,
        schemes=schemes,
        weights=numbers,
        contract=_changes(_interface(left), _interface(right)),
        plan=_changes(*(_plan(side) for side in (left, right))),
        tools=_changes(*(side.manifest.tools if side.manifest else {} for side in (left, right))),
        operations=_changes(_operations(left), _operations(right)),
        measured=tuple(_measurements(runs)),
        notes=tuple(notes + (list(_other_machines(runs)) if runs else [UNTIMED])),
    )


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sizes(left: tuple[ModuleSize, ...], right: tuple[ModuleSize, ...]) -> Iterator[SizePair]:
    """Bytes by module, and in total."""
    for module in (*MODULES, None):
        a, b = (sum(size.bytes for size in side if module in (None, size.module)) for side in (left, right))
        if a or b:
            yield SizePair(module=module or "total", a=a, b=b)


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[Change, ...]:
    """Fields whose texts differ, in A's order, then those only B has."""
    return tuple(
        Change(field=key, a=a.get(key), b=b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    )


def _plan(side: Inspection) -> dict[str, str]:
    fields = flat(side.manifest.plan.model_dump(mode="json")) if side.manifest else {}
    return {name: str(value) for name, value in fields.items()}


def _interface(side: Inspection) -> dict[str, str]:
    """What a caller sees: tensors of the file, and what the manifest promises of them."""
    fields: dict[str, str] = {}
    for entry in side.contents.entries:
        fields |= {entry.name: entry.value} if entry.value is not None else {}
        for direction, specs in (("input", entry.inputs), ("output", entry.outputs)):
            for i, spec in enumerate(specs):
                _, dtype, shape = inspection.tensor(spec)
                fields[f"{entry.name} {direction} {spec.name or i}"] = f"{dtype} {shape}".strip()
    if side.manifest:
        contract = side.manifest.contract.model_dump(mode="json", include={"kv", "max_prefill", "logits"})
        fields |= {name: str(value) for name, value in flat(contract).items()}
    return fields


def _operations(side: Inspection) -> dict[str, str]:
    return {f"{kind} ({place})": count for kind, place, count in inspection.operations(side.contents)}


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weights(left: Inspection, right: Inspection) -> Weights:
    """Every quantized tensor of both, number by number."""
    tensors = numbers = 0
    differing = []
    for name, a, b in paired(_stored(left), _stored(right)):
        tensors += 1
        numbers += a.qdata.size + a.scale.size if a else 0
        if unequal := difference(name, a, b):
            differing.append(unequal)
    return Weights(tensors=tensors, numbers=numbers, differing=tuple(differing))


def _stored(side: Inspection) -> Iterator[StoredWeight]:
    """The quantized tensors of an artifact folder."""
    assert side.manifest is not None
    target = side.manifest.plan.target
    file = Path(side.path) / target.artifact
    try:
        yield from formats.reader(target.backend).read_weights(file, side.manifest.architecture)
    except (ExportError, OSError):
        raise
    except Exception as error:  # parsers of foreign formats raise errors of any type
        raise ExportError(f"{file}: integers and scales are not readable: {in_a_line(error)}") from None


def paired(a: Iterator[StoredWeight], b: Iterator[StoredWeight]) -> Iterator[_Paired]:
    """Tensors of the same name together, whatever the order in either file; few are held at a time."""
    waiting_a: dict[str, StoredWeight] = {}
    waiting_b: dict[str, StoredWeight] = {}
    for left, right in zip_longest(a, b):
        waiting_a |= {left.name: left} if left else {}
        waiting_b |= {right.name: right} if right else {}
        for name in sorted(waiting_a.keys() & waiting_b.keys()):
            yield name, waiting_a.pop(name), waiting_b.pop(name)
    yield from ((name, left, None) for name, left in waiting_a.items())
    yield from ((name, None, right) for name, right in waiting_b.items())


def difference(name: str, a: StoredWeight | None, b: StoredWeight | None) -> WeightDifference | None:
    """Numbers of one tensor that differ; None: none."""
    integers, scales, why = None, None, ""
    if a is None or b is None:
        why = f"quantized in {'A' if a else 'B'} only"
    elif a.qdata.shape != b.qdata.shape:
        why = f"shapes {a.qdata.shape} and {b.qdata.shape}"
    else:
        integers = int(np.count_nonzero(a.qdata != b.qdata))
        if a.scale.shape == b.scale.shape:
            scales = int(np.count_nonzero(a.scale != b.scale))
        else:
            why = f"{a.scale.shape[1]} and {b.scale.shape[1]} groups"
    if not (integers or scales or why):
        return None
    return WeightDifference(name=name, integers=integers, scales=scales, why=why)


# ── validation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _common_runs(a: Path, b: Path, records: Sequence[Path]) -> _Runs:
    """Newest validation of both on each device that ran both."""
    runs_a, runs_b = evidence.newest(a, records), evidence.newest(b, records)
    return {device: (runs_a[device], runs_b[device]) for device in sorted(runs_a.keys() & runs_b.keys())}


def _measurements(runs: _Runs) -> Iterator[Change]:
    for device, (a, b) in runs.items():
        yield Change(field=f"{device}: verdict", a=a.outcome, b=b.outcome)
        same = a.environment == b.environment
        left, right = (run.numbers() if same else run.losses() for run in (a, b))
        for name in (name for name in left if name in right):
            yield Change(field=f"{device}: {name}", a=_number(left[name]), b=_number(right[name]))


def _other_machines(runs: _Runs) -> Iterator[str]:
    """A note for each device name under which two machines ran."""
    for device, (a, b) in runs.items():
        if a.environment != b.environment:
            yield _OTHER_MACHINE.format(device, a.environment, b.environment)


def _number(value: float) -> str:
    """Four digits, never an exponent for a rate."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# ── the headline ────────────────────────────────────────────────────────────────────────────────────────────────────


def _headline(change_bytes: int, schemes: Sequence[Change], numbers: Weights | None, runs: _Runs) -> str:
    """What a reader of a pull request wants first: size, speed, loss, and how much of it changed."""
    parts = [_size(change_bytes)]
    for device, (a, b) in runs.items():
        place = f" on {device}" if len(runs) > 1 else ""
        parts += [f"{part}{place}" for part in _results(a, b)]
    if numbers is not None:
        changed = {scheme.field for scheme in schemes} | {weight.name for weight in numbers.differing}
        parts.append(f"{_tensors(changed)} changed")
    return ", ".join(parts)


def _tensors(names: Set[str]) -> str:
    """`14 linears of 2 layers`, `208 linears of 30 layers and 1 tensor outside`, `no layer`."""
    linears = {name for name in names if name.startswith("model.layers.")}
    layers, outside = {name.split(".")[2] for name in linears}, len(names - linears)
    parts = [f"{_count(len(linears), 'linear')} of {_count(len(layers), 'layer')}"] if linears else []
    parts += [_count(outside, "tensor") + (" outside" if linears else "")] if outside else []
    return " and ".join(parts) or "no layer"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _size(change_bytes: int) -> str:
    """`+3.1 MB`, `−120 bytes`, `same size`."""
    if not change_bytes:
        return "same size"
    if abs(change_bytes) < 10_000:
        return _minus(f"{change_bytes:+,} bytes")
    digits = 1 if abs(change_bytes) >= 1e6 else 2
    return _minus(f"{change_bytes / 1e6:+.{digits}f} MB")


def _results(a: Validation, b: Validation) -> Iterator[str]:
    """Decode rate, KL as shipped, the verdicts where they differ."""
    if a.timed and b.timed and a.environment == b.environment:
        assert a.latency is not None
        assert b.latency is not None
        rate = _rate(a.latency.tests[-1], b.latency.tests[-1])
        doubtful = evidence.INCONCLUSIVE in (a.outcome, b.outcome)
        yield f"decode inconclusive ({rate})" if doubtful else f"decode {rate} in separate runs"
    if a.accuracy.total and b.accuracy.total:
        yield f"KL {a.accuracy.total.mean_kl:.3g} → {b.accuracy.total.mean_kl:.3g}"
    if a.outcome != b.outcome:
        yield f"verdict {a.outcome} → {b.outcome}"


def _rate(a: Rate, b: Rate) -> str:
    """`−4 %` of A's rate. Without an interval: repeats of a run do not show how much another run differs."""
    return _minus(f"{round(100 * (b.avg_ts / a.avg_ts - 1)):+d} %")


def _minus(text: str) -> str:
    """A sign as wide as the plus."""
    return text.replace("-", "−")


# ── what is printed ─────────────────────────────────────────────────────────────────────────────────────────────────


def show(compared: Difference) -> None:
    """Print every table that is not empty."""
    say(f"A {compared.a}", f"B {compared.b}", compared.headline)
    inspection.print_sections(_sections(compared), Plain())
    say("", *_summary(compared), *compared.notes)


def markdown(compared: Difference) -> str:
    """A comment for a pull request: the headline, and every table folded."""
    lines = [f"**{escaped(compared.headline)}**", "", f"A {code(compared.a)} · B {code(compared.b)}", ""]
    lines += [f"- {escaped(line)}" for line in (*_summary(compared), *compared.notes)]
    for section in (section for section in _sections(compared) if section.rows):
        summary = f"<details><summary>{escaped(section.title)} ({len(section.rows)})</summary>"
        lines += ["", summary, "", tables.markdown([section.columns, *section.rows]), "", "</details>"]
    return "\n".join(lines)


def _sections(compared: Difference) -> Iterator[Section]:
    """The tables, in order."""
    sizes = [(size.module, f"{size.a:,}", f"{size.b:,}", _ratio(size)) for size in compared.sizes]
    yield Section("bytes by module", ("module", "A", "B", "B / A"), sizes)
    schemes = inspection.alike([(name, (a, b)) for name, a, b in map(_row, compared.schemes)])
    layers = [(name, *pair, str(len(names))) for name, pair, names in schemes]
    yield Section("scheme of layers", ("layer", "A", "B", "count"), layers)
    differing = compared.weights.differing if compared.weights else ()
    numbers = [(weight.name, _cell(weight.integers), _cell(weight.scales), weight.why) for weight in differing]
    yield Section("differing numbers", ("tensor", "integers", "scales", ""), numbers)
    for title, fields in (
        ("interface", compared.contract),
        ("plan", compared.plan),
        ("tools", compared.tools),
        ("operations", compared.operations),
        ("measured by validation", compared.measured),
    ):
        yield Section(title, ("field", "A", "B"), [_row(change) for change in fields])


def _row(change: Change) -> tuple[str, str, str]:
    return (change.field, _cell(change.a), _cell(change.b))


def _cell(value: str | int | None) -> str:
    return NONE if value is None else f"{value:,}" if isinstance(value, int) else value


def _ratio(size: SizePair) -> str:
    return f"{size.b / size.a:.3f}" if size.a else NONE


def _summary(compared: Difference) -> Iterator[str]:
    """The few sentences that a reader wants first."""
    total = compared.sizes[-1]
    yield f"size: {total.a / 1e6:.2f} MB → {total.b / 1e6:.2f} MB ({_ratio(total)})"
    changed = _tensors({change.field for change in compared.schemes})
    yield f"schemes: {changed} differ" if compared.schemes else "schemes: the same in every layer"
    if weights := compared.weights:
        if count := len(weights.differing):
            yield f"integers and scales: {count} of {weights.tensors} quantized tensors differ"
        else:
            yield f"integers and scales: identical in {weights.tensors} tensors, {weights.numbers:,} numbers"
    counts = (("interface", compared.contract), ("plan", compared.plan), ("tools", compared.tools))
    yield ", ".join(f"{name}: {len(fields) or 'no'} differences" for name, fields in counts)
