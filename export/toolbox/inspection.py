"""What an artifact or a bare model file is, without running it: a record, tables in the terminal, a picture."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from export import formats, manifest
from export.architecture import Strict
from export.errors import ExportError, absence
from export.formats import Contents, admission, storage
from export.host.console import Plain, say
from export.manifest import FileInfo, Manifest, TensorSpec

from .charts import CELL, INSIDE, MAP_HEIGHT, MUTED, NAMES, Cell, colour, document, linear_map, place_of, rect, text
from .sizes import LayerScheme, ModuleSize, layer_schemes, module_sizes, with_tied_head
from .tables import Row, plain

NO_MANIFEST = "no manifest.json: made by another exporter, or copied out of its folder; names are the file's own"
_LAYER = re.compile(r"\.(\d+)\.")


class Inspection(Strict):
    """One artifact. JSON of this is what `inspect --json` prints."""

    path: str
    manifest: Manifest | None
    note: str
    """What is not known, and why; may be empty."""
    contents: Contents
    sizes: tuple[ModuleSize, ...]
    layers: tuple[LayerScheme, ...]
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class Section:
    """One table; empty ones are not shown."""

    title: str
    columns: Row
    rows: Sequence[Row]


def inspect(path: Path) -> Inspection:
    """Read an artifact folder that is admitted, or a bare file or package. Raises ExportError: neither, or damaged."""
    if (path / manifest.FILE).is_file():
        described, note = admission.admit(path), ""
        files = described.files
        reader, file = formats.reader(described.plan.target.backend), path / described.plan.target.artifact
        contents = formats.contents(reader, file, described.architecture)
        contents = with_tied_head(contents, described.architecture)
    elif not (path.is_dir() or path.is_file()):
        raise ExportError(f"{path}: {absence(path)}; give an artifact folder or a model file")
    else:
        described, note = None, NO_MANIFEST
        files = manifest.hash_files(path) if path.is_dir() else {path.name: manifest.file_info(path)}
        contents = formats.contents(formats.recognize(path), path, None)
    return Inspection(
        path=str(path),
        manifest=described,
        note=note,
        contents=contents,
        sizes=module_sizes(contents),
        layers=layer_schemes(contents),
        files=files,
    )


def show(inspection: Inspection) -> None:
    """Print every table."""
    say(f"{inspection.path}: {inspection.contents.format}, {inspection.contents.bytes / 1e6:.1f} MB")
    if inspection.note:
        say(inspection.note)
    print_sections(_sections(inspection), Plain())


def print_sections(sections: Iterable[Section], console: Plain) -> None:
    """Every table that has rows: drawn for a terminal, else columns padded with spaces, whatever the width."""
    for section in (section for section in sections if section.rows):
        say("")
        if not console.is_terminal:
            say(section.title, *(f"  {line}" for line in plain([section.columns, *section.rows])))
            continue
        table = Table(title=section.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for name in section.columns:
            table.add_column(name, justify="right" if name in ("bytes", "count", "tensors") else "left")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)


def _sections(inspection: Inspection) -> Iterator[Section]:
    """The tables, in order."""
    contents, described = inspection.contents, inspection.manifest
    if described:
        yield Section("manifest", ("field", "value"), _about(described))
    yield Section(f"{contents.format}", ("field", "value"), list(contents.facts.items()))
    yield Section("interface", ("entry", "in or out", "name", "dtype", "shape"), list(_interface(contents)))
    yield Section("KV cache", ("name", "dtype", "shape"), _together([tensor(spec) for spec in contents.cache]))
    yield Section("operations", ("kind", "where", "count"), list(operations(contents)))
    sizes = [(size.module, size.dtype, str(size.tensors or ""), f"{size.bytes:,}") for size in inspection.sizes]
    sizes.append(("total", "", "", f"{sum(size.bytes for size in inspection.sizes):,}"))
    yield Section("bytes", ("module", "dtype", "tensors", "bytes"), sizes)
    yield Section("layers", ("layer", "scheme", "count", "bytes"), _layers(inspection.layers))
    if described:
        yield Section("tools", ("tool", "version"), list(described.tools.items()))
    files = [(name, f"{info.bytes:,}", info.sha256) for name, info in inspection.files.items()]
    yield Section("files", ("file", "bytes", "sha256"), files)


def _about(described: Manifest) -> list[Row]:
    """Rows for the plan and its results."""
    plan, quantization, kv = described.plan, described.quantization, described.contract.kv
    calibration = quantization.calibration
    return [
        ("id", described.id),
        ("model", f"{plan.model.name}, {described.checkpoint.description}, from {described.checkpoint.origin}"),
        ("recipe", f"{plan.quant.name}: {storage.line(described)}"),
        ("target", f"{plan.target.name}: {plan.target.description}"),
        ("bits per weight", f"{quantization.bits_per_weight:.2f}"),
        ("calibrated with", f"{calibration.tokens:,} tokens" if calibration else "no text"),
        ("quantization", quantization.key[:16]),
        ("cache", f"{storage.cache(kv)}: {kv.layers} layers × {kv.kv_heads} heads × {kv.head_dim}"),
        ("context", f"{kv.context_length} tokens, at most {described.contract.max_prefill} a call"),
        ("logits", f"of {'the last position' if described.contract.logits == 'last' else 'every position'}"),
        ("lowering", ", ".join(f"{key} {value}" for key, value in described.lowering.items())),
        ("source", described.source.revision),
    ]


def tensor(spec: TensorSpec) -> Row:
    """Name, dtype, shape."""
    return (spec.name, spec.dtype, "[" + ", ".join(map(str, spec.shape)) + "]" if spec.shape else "")


def _together(rows: list[Row]) -> list[Row]:
    """Rows that differ in their name only as one: `first … last (count)`."""
    groups: dict[Row, list[str]] = {}
    for name, *rest in rows:
        groups.setdefault(tuple(rest), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})", *rest)
        for rest, names in groups.items()
    ]


def _interface(contents: Contents) -> Iterator[Row]:
    """Entries with their tensors."""
    for entry in contents.entries:
        if entry.value is not None:
            yield (entry.name, "returns", entry.value, "", "")
        for side, specs in (("in", entry.inputs), ("out", entry.outputs)):
            yield from ((entry.name, side, *row) for row in _together([tensor(spec) for spec in specs]))


def operations(contents: Contents) -> Iterator[Row]:
    """Kind, place and count of operations: delegates, what they hold, what is left to the runtime's own kernels."""
    for place, counts in (
        ("delegate call", contents.delegate_calls),
        ("delegated", contents.delegated_ops),
        ("graph", contents.ops),
    ):
        yield from ((kind, place, str(count)) for kind, count in counts.items())


def _layers(schemes: tuple[LayerScheme, ...]) -> list[Row]:
    """One row for the same matrix of equal layers; `shared` where it has no bytes of its own."""
    sizes = {layer.name: layer.bytes for layer in schemes}
    rows: list[Row] = []
    for name, (scheme,), names in alike([(layer.name, (layer.scheme,)) for layer in schemes]):
        total = sum(sizes[layer] for layer in names)
        rows.append((name, scheme, str(len(names)), f"{total:,}" if total else "shared"))
    return rows


def alike(named: Sequence[tuple[str, Row]]) -> list[tuple[str, Row, list[str]]]:
    """Group names with the same values that differ in their layer's number only: `model.layers.0–29.…`."""
    groups: dict[tuple[str, Row], list[str]] = {}
    for name, values in named:
        groups.setdefault((_LAYER.sub(".*.", name, count=1), values), []).append(name)
    return [(pattern.replace("*", numbers(names), 1), values, names) for (pattern, values), names in groups.items()]


def numbers(names: Sequence[str]) -> str:
    """Numbers of the layers that these tensors are of, as ranges: `0–3,7`."""
    runs: list[list[int]] = []
    for number in sorted(int(match[1]) for name in names if (match := _LAYER.search(name))):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


WIDTH, MARGIN, _BAR = 900, 20, 26
_SMALLEST_LABEL = 60.0
"""A narrower part of the bar has a title (a tooltip) only."""


def draw(inspections: Sequence[Inspection]) -> str:
    """For each a bar of bytes by module and a map of linears, framed where the scheme is not the first artifact's."""
    linears = [{layer.name: layer.scheme for layer in side.layers if place_of(layer.name)} for side in inspections]
    schemes = sorted({scheme for scheme_of in linears for scheme in scheme_of.values()})
    modules = list(dict.fromkeys(size.module for side in inspections for size in side.sizes if size.bytes))
    largest = max(1, *(side.contents.bytes for side in inspections))
    parts, y = [], float(MARGIN)
    for side, scheme_of in zip(inspections, linears, strict=True):
        name = side.manifest.id if side.manifest else side.path.rpartition("/")[2]
        parts.append(text(MARGIN, y + 13, f"{name}: {side.contents.format}, {side.contents.bytes / 1e6:.1f} MB"))
        parts += _bar(side, modules, y + 26, (WIDTH - 2 * MARGIN) / largest)
        y += _BAR + 36
        if scheme_of:
            parts += linear_map(_cells(scheme_of, linears[0], schemes), MARGIN, y, WIDTH - MARGIN)
            y += MAP_HEIGHT
        y += 26
    return document(WIDTH, y + 24, "bytes by module and schemes of linears", [*parts, *_legend(y, schemes)])


def _bar(side: Inspection, modules: Sequence[str], y: float, pixels_per_byte: float) -> list[str]:
    parts, x = [], float(MARGIN)
    for i, module in enumerate(modules):
        count = sum(size.bytes for size in side.sizes if size.module == module)
        width, label = pixels_per_byte * count, f"{module} {count / 1e6:.1f}"
        parts.append(rect(x, y, width, _BAR, title=f"{label} MB", fill=colour(i)))
        if width > _SMALLEST_LABEL:
            parts.append(text(x + 5, y + 17, label, INSIDE))
        x += width
    return parts


def _cells(scheme_of: Mapping[str, str], first: Mapping[str, str], schemes: Sequence[str]) -> dict[str, Cell]:
    return {
        name: Cell(f"{name}: {scheme}", schemes.index(scheme), 1, framed=first.get(name, scheme) != scheme)
        for name, scheme in scheme_of.items()
    }


def _legend(y: float, schemes: Sequence[str]) -> list[str]:
    parts, x = [], float(MARGIN + NAMES)
    for i, scheme in enumerate(schemes):
        parts.append(rect(x, y - 11, 14, 14, title=scheme, fill=colour(i)))
        parts.append(text(x + CELL, y, scheme, MUTED))
        x += 40 + 7 * len(scheme)
    return parts
