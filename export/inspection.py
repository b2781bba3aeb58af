"""What an artifact or a bare model file is, without running it: one record, or tables in the terminal."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import manifest, readers
from .contents import Contents, LayerScheme, ModuleSize, layer_schemes, module_sizes, with_tied_head
from .contract import TensorSpec
from .manifest import FileInfo, Manifest
from .plan import Strict

NO_MANIFEST = "no manifest.json: made by another exporter, or copied out of its folder; names are the file's own"
LAYER = re.compile(r"\.(\d+)\.")
Row = tuple[str, ...]


class Inspection(Strict):
    """One artifact. JSON of this is what `inspect --json` prints."""

    path: str
    manifest: Manifest | None
    note: str
    """What could not be said, and why; may be empty."""
    contents: Contents
    sizes: tuple[ModuleSize, ...]
    layers: tuple[LayerScheme, ...]
    files: dict[str, FileInfo]
    """As they are now; only of a folder of ours are they compared with the manifest."""


@dataclass(frozen=True)
class Section:
    """One table; empty ones are not shown."""

    title: str
    columns: Row
    rows: Sequence[Row]


def inspect(path: Path) -> Inspection:
    """Read an artifact folder, or a bare file or package; raises ExportError for what is neither or damaged."""
    if (path / manifest.FILE).is_file():
        described = manifest.read(path)
        reader, file = readers.load(described.plan.target.backend), path / described.plan.target.artifact
        found = readers.contents(reader, file, described.architecture)
        found = found.model_copy(update={"tensors": with_tied_head(found.tensors, described.architecture)})
        files, note = manifest.hash_files(path), ""
    else:
        described, note = None, NO_MANIFEST
        found = readers.contents(readers.recognize(path), path, None)
        files = manifest.hash_files(path) if path.is_dir() else {path.name: manifest.file_info(path)}
    return Inspection(
        path=str(path),
        manifest=described,
        note=note,
        contents=found,
        sizes=module_sizes(found),
        layers=layer_schemes(found),
        files=files,
    )


def show(inspection: Inspection) -> None:
    """Print every table."""
    console = Console(highlight=False)
    print(f"{inspection.path}: {inspection.contents.format}, {inspection.contents.bytes / 1e6:.1f} MB")
    if inspection.note:
        print(inspection.note)
    for section in sections(inspection):
        if section.rows:
            print_section(section, console)


def print_section(section: Section, console: Console) -> None:
    """One table: drawn for a terminal, else columns padded with spaces, whatever the width."""
    print()
    if console.is_terminal:
        drawn = Table(title=section.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for name in section.columns:
            drawn.add_column(name, justify="right" if name in ("bytes", "count", "tensors") else "left")
        for row in section.rows:
            drawn.add_row(*row)
        console.print(drawn)
        return
    print(section.title)
    lines = [section.columns, *section.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(section.columns))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def sections(inspection: Inspection) -> Iterator[Section]:
    """What is shown, in order."""
    found, described = inspection.contents, inspection.manifest
    if described:
        yield Section("manifest", ("field", "value"), about(described))
    yield Section(f"{found.format}", ("field", "value"), list(found.facts.items()))
    yield Section("interface", ("entry", "in or out", "name", "dtype", "shape"), list(interface(found)))
    yield Section("KV cache", ("name", "dtype", "shape"), together([tensor(one) for one in found.cache]))
    yield Section("operations", ("kind", "where", "count"), list(operations(found)))
    sizes = [(one.module, one.dtype, str(one.tensors or ""), f"{one.bytes:,}") for one in inspection.sizes]
    sizes.append(("total", "", "", f"{sum(one.bytes for one in inspection.sizes):,}"))
    yield Section("bytes", ("module", "dtype", "tensors", "bytes"), sizes)
    yield Section("layers", ("layer", "scheme", "count", "bytes"), layers(inspection.layers))
    if described:
        yield Section("tools", ("tool", "version"), list(described.tools.items()))
    yield Section("files", ("file", "bytes", "sha256", ""), list(files(inspection)))


def about(described: Manifest) -> list[Row]:
    """The plan and what came of it."""
    plan, quantization, kv = described.plan, described.quantization, described.contract.kv
    calibration = quantization.calibration
    return [
        ("id", described.id),
        ("model", f"{plan.model.name}, {described.checkpoint.description}, from {described.checkpoint.origin}"),
        ("recipe", f"{plan.quant.name}: {plan.quant.description}"),
        ("target", f"{plan.target.name}: {plan.target.description}"),
        ("bits per weight", f"{quantization.bits_per_weight:.2f}"),
        ("calibrated with", f"{calibration.tokens:,} tokens" if calibration else "no text"),
        ("quantization", quantization.key[:16]),
        ("cache", f"{kv.kind}, {kv.layers} layers × {kv.kv_heads} heads × {kv.head_dim}, {kv.dtype}"),
        ("context", f"{kv.context_length} tokens, at most {described.contract.max_prefill} a call"),
        ("logits", f"of {'the last position' if described.contract.logits == 'last' else 'every position'}"),
        ("lowering", ", ".join(f"{key} {value}" for key, value in described.lowering.items())),
        ("source", f"{described.source.commit[:12]}{' with local changes' if described.source.dirty else ''}"),
    ]


def tensor(spec: TensorSpec) -> Row:
    """Name, dtype, shape."""
    return (spec.name, spec.dtype, "[" + ", ".join(str(one) for one in spec.shape) + "]" if spec.shape else "")


def together(rows: list[Row]) -> list[Row]:
    """Rows that differ in their name only as one: first … last (count)."""
    groups: dict[Row, list[str]] = {}
    for name, *rest in rows:
        groups.setdefault(tuple(rest), []).append(name)
    names = [one[0] if len(one) == 1 else f"{one[0]} … {one[-1]} ({len(one)})" for one in groups.values()]
    return [(name, *rest) for name, rest in zip(names, groups, strict=True)]


def interface(found: Contents) -> Iterator[Row]:
    """Entries with their tensors; of many alike the first and last."""
    for entry in found.entries:
        if entry.value is not None:
            yield (entry.name, "returns", entry.value, "", "")
        for side, specs in (("in", entry.inputs), ("out", entry.outputs)):
            yield from ((entry.name, side, *row) for row in together([tensor(one) for one in specs]))


def operations(found: Contents) -> Iterator[Row]:
    """Counts: delegates first, what they hold, what is left to the runtime's own kernels."""
    yield from ((kind, "delegate call", str(count)) for kind, count in found.delegate_calls.items())
    yield from ((kind, "delegated", str(count)) for kind, count in found.delegated_ops.items())
    yield from ((kind, "graph", str(count)) for kind, count in found.ops.items())


def layers(schemes: tuple[LayerScheme, ...]) -> list[Row]:
    """Every matrix, of layers that are alike one row; one that shares another's bytes says so."""
    sizes = {one.name: one.bytes for one in schemes}
    rows: list[Row] = []
    for name, (scheme,), names in alike([(one.name, (one.scheme,)) for one in schemes]):
        total = sum(sizes[one] for one in names)
        rows.append((name, scheme, str(len(names)), f"{total:,}" if total else "shared"))
    return rows


def alike(named: Sequence[tuple[str, Row]]) -> list[tuple[str, Row, list[str]]]:
    """Names that differ in the number of their layer only, and have the same values, as one: `model.layers.0–29.…`."""
    groups: dict[tuple[str, Row], list[str]] = {}
    for name, values in named:
        groups.setdefault((LAYER.sub(".*.", name, count=1), values), []).append(name)
    return [(pattern.replace("*", numbers(names), 1), values, names) for (pattern, values), names in groups.items()]


def numbers(names: Sequence[str]) -> str:
    """Numbers of layers, runs of them as one: `0–3,7`."""
    runs: list[list[int]] = []
    for number in sorted(int(found[1]) for name in names if (found := LAYER.search(name))):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def files(inspection: Inspection) -> Iterator[Row]:
    """Size and digest of each; a word where it is not what the manifest says."""
    said = inspection.manifest.files if inspection.manifest else inspection.files
    for name, info in inspection.files.items():
        word = "" if said.get(name) == info else "differs from the manifest" if name in said else "not in the manifest"
        yield (name, f"{info.bytes:,}", info.sha256, word)
    for name in sorted(said.keys() - inspection.files.keys()):
        yield (name, "", "", "missing")
