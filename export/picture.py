"""Where an artifact's bytes go and how every linear is kept, as one SVG; several artifacts below each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .contents import LayerScheme
from .inspection import LAYER, Inspection

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH, MARGIN, NAMES, ROW, BAR = 900, 20, 80, 20, 26
HEAD, GAP, LEGEND = 26, 26, 24
"""Pixels: of a title, between artifacts, of a line of the legend."""
COLOURS = ("#2f6db3", "#d9822b", "#4c9f70", "#a15cb5", "#c8524c", "#7f8c9b", "#c9b037", "#5aa9c4")
STYLE = "text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}"
SMALLEST_LABEL = 60.0
"""A narrower part of the bar has no words on it; its title says them."""


def draw(inspections: Sequence[Inspection]) -> str:
    """A bar of bytes by module and a map of linears for each; framed where the scheme is not the first artifact's."""
    schemes = sorted({one.scheme for found in inspections for one in found.layers if placed(one)})
    modules = list(dict.fromkeys(size.module for found in inspections for size in found.sizes if size.bytes))
    legends = Legends(
        modules=modules,
        schemes=schemes,
        first={one.name: one.scheme for one in inspections[0].layers},
        pixels_per_byte=(WIDTH - 2 * MARGIN) / max(1, *(found.contents.bytes for found in inspections)),
    )
    parts, y = [], float(MARGIN)
    for found in inspections:
        drawn, y = artifact(found, y, legends)
        parts += drawn
        y += GAP
    parts += legend(y, schemes)
    height = y + LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


@dataclass(frozen=True)
class Legends:
    """What all artifacts of a picture share."""

    modules: Sequence[str]
    schemes: Sequence[str]
    first: Mapping[str, str]
    """Linear → scheme in the first artifact."""
    pixels_per_byte: float


def artifact(found: Inspection, y: float, shared: Legends) -> tuple[list[str], float]:
    """Title, bar and map from `y` downwards; where it ends."""
    total = found.contents.bytes
    name = found.manifest.id if found.manifest else found.path.rpartition("/")[2]
    parts = [words(MARGIN, y + 13, f"{name}: {found.contents.format}, {total / 1e6:.1f} MB")]
    y += HEAD
    x = float(MARGIN)
    for module in shared.modules:
        count = sum(size.bytes for size in found.sizes if size.module == module)
        width = shared.pixels_per_byte * count
        said = f"{module} {count / 1e6:.1f} MB"
        parts.append(box((x, y, width, BAR), COLOURS[shared.modules.index(module) % len(COLOURS)], said))
        if width > SMALLEST_LABEL:
            parts.append(words(x + 5, y + 17, f"{module} {count / 1e6:.1f}", fill="#ffffff"))
        x += width
    y += BAR + 10
    cells = {one.name: (*where, one.scheme) for one in found.layers if (where := placed(one))}
    layers = 1 + max((layer for layer, _, _ in cells.values()), default=-1)
    if not layers:
        return parts, y
    width = (WIDTH - 2 * MARGIN - NAMES) / layers
    parts += [words(MARGIN + NAMES - 8, y + i * ROW + 14, kind, "small", "end") for i, kind in enumerate(KINDS)]
    for key, (layer, kind, scheme) in cells.items():
        colour, at = COLOURS[shared.schemes.index(scheme) % len(COLOURS)], MARGIN + NAMES + layer * width
        frame = ' stroke="#24292f" stroke-width="2"' if shared.first.get(key, scheme) != scheme else ""
        place = (at + 1, y + KINDS.index(kind) * ROW + 1, width - 2, ROW - 2)
        parts.append(box(place, colour, f"{key}: {scheme}", frame))
    y += len(KINDS) * ROW
    step = max(1, layers // 10)
    parts += [
        words(MARGIN + NAMES + (i + 0.5) * width, y + 13, str(i), "small", "middle") for i in range(0, layers, step)
    ]
    return parts, y + 16


def placed(one: LayerScheme) -> tuple[int, str] | None:
    """Layer and kind of a linear of the decoder; None for everything else."""
    number = LAYER.search(one.name)
    kind = next((kind for kind in KINDS if kind in one.name), None)
    return (int(number[1]), kind) if number and kind else None


def legend(y: float, schemes: Sequence[str]) -> list[str]:
    """The colours of the map."""
    parts, x = [], float(MARGIN + NAMES)
    for i, scheme in enumerate(schemes):
        parts.append(box((x, y - 11, 14, 14), COLOURS[i % len(COLOURS)], scheme))
        parts.append(words(x + 20, y, scheme, "small"))
        x += 40 + 7 * len(scheme)
    return parts


def box(place: tuple[float, float, float, float], colour: str, title: str, more: str = "") -> str:
    """A rectangle, given by x, y, width and height, that says what it is."""
    x, y, width, height = place
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height}"'
    return f'<rect {size} rx="2" fill="{colour}"{more}><title>{escape(title)}</title></rect>'


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start", fill: str = "") -> str:
    """Text."""
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
