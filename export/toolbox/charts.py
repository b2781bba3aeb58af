"""Charts as SVG text: elements, scales, axes, and the charts made of them.

Colours are CSS variables, which follow light and dark mode. `document` is a file of its own with a background, so that
it stays readable where a page's mode is not the system's; `inline` belongs into a page that holds `STYLE`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape as entities
from typing import NamedTuple

from export.host.text import visible

STYLE = """\
:root { --paper: #ffffff; --ink: #1c2430; --muted: #5b6675; --line: #d5dbe3; --track: #eef1f4; --stock: #9aa7b5;
  --series-0: #3568d4; --series-1: #e0762f; --series-2: #24966e; --series-3: #a34fa8;
  --series-4: #c19a16; --series-5: #5b7083; --series-6: #c8524c; --series-7: #2f93b0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181e; --ink: #e6eaf0; --muted: #9aa6b4; --line: #333c47; --track: #252d36; --stock: #5d6b7a;
    --series-0: #719bf5; --series-1: #f19a5e; --series-2: #4fc49a; --series-3: #cf86d3;
    --series-4: #e0c04f; --series-5: #93a9bd; --series-6: #ef8a84; --series-7: #6cc4dd; }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
text.muted { font-size: 11.5px; fill: var(--muted); }
text.strong { font-weight: 600; }
text.inside { fill: var(--paper); }
.paper { fill: var(--paper); }
.track { fill: var(--track); }
.ours { fill: var(--series-0); }
.stock { fill: var(--stock); }
.grid { stroke: var(--line); stroke-width: 1; }
.rule { stroke: var(--ink); stroke-width: 1.6; }
.sample { fill: var(--paper); stroke: var(--ink); stroke-width: 1; }"""
SERIES = 8
MUTED, STRONG, INSIDE = "muted", "strong", "inside"
"""Classes of text: beside the data, a title or result, on a coloured bar."""
OURS, STOCK = "ours", "stock"

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 12, 10, HEIGHT - 34
"""Edges of an inline chart's axes."""
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINEAR = re.compile(rf"layers\.(\d+)\.\w+\.({'|'.join(_KINDS)})\b")
KINDS = len(_KINDS)
NAMES, CELL = 80, 20
MAP_HEIGHT = KINDS * CELL + 16
"""Of a map of linears: width of the names' column, height of a row, height with the numbers of its layers."""
MOST_TICKS = 7


class Series(NamedTuple):
    """Values over x = 0, 1, 2 and so on."""

    label: str
    values: Sequence[float]
    colour: int


class Point(NamedTuple):
    """One named point of a scatter plot."""

    x: float
    y: float
    name: str
    ours: bool


class Cell(NamedTuple):
    """One linear on a map; `strength` is how opaque it is, 0 to 1."""

    title: str
    colour: int
    strength: float
    framed: bool


class _Scale(NamedTuple):
    """Values from `low` to `high` as pixels from `start` to `end`."""

    low: float
    high: float
    ticks: Sequence[float]
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Pixels; a logarithmic scale puts lower values at its lowest."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _escape(content: str) -> str:
    """XML has no control characters, however they are written."""
    return entities(visible(content))


def _element(name: str, inside: str = "", *, title: str = "", css: str = "", **attributes: float | str) -> str:
    """An element; in names of attributes `_` is a hyphen, numbers get one decimal, empty texts are left out."""
    texts = {"class": css} | {
        key.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for key, value in attributes.items()
    }
    head = name + "".join(f' {key}="{_escape(text)}"' for key, text in texts.items() if text)
    inside = f"<title>{_escape(title)}</title>{inside}" if title else inside
    return f"<{head}>{inside}</{name}>" if inside else f"<{head}/>"


def text(x: float, y: float, content: str, css: str = "", anchor: str = "") -> str:
    """A text; x, y and all other coordinates are pixels."""
    return _element("text", _escape(content), x=x, y=y, css=css, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin line, of a grid or to a name."""
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, css="grid")


def rule(left: float, right: float, y: float) -> str:
    """A range: a line with short ends."""
    ends = "".join(f"M{x:.1f},{y - 5:.1f}v10" for x in (left, right))
    return _element("path", css="rule", d=f"M{left:.1f},{y:.1f}H{right:.1f}{ends}")


def polyline(points: Sequence[tuple[float, float]], series: int, title: str) -> str:
    """A line through points, in a series colour."""
    coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return _element("polyline", title=title, points=coordinates, fill="none", stroke=colour(series), stroke_width=1.8)


def rect(x: float, y: float, width: float, height: float, **style: str) -> str:
    """A rectangle."""
    return _element("rect", x=x, y=y, width=max(width, 0), height=height, rx=3, **style)


def circle(x: float, y: float, r: str = "5.5", **style: str) -> str:
    """A point."""
    return _element("circle", cx=x, cy=y, r=r, **style)


def hover(x: float, y: float, title: str) -> str:
    """A place that shows a name under the pointer."""
    return circle(x, y, "4", title=title, fill="transparent")


def colour(series: int) -> str:
    """A series colour of the palette."""
    return f"var(--series-{series % SERIES})"


def inline(height: float, label: str, parts: Sequence[str]) -> str:
    """A chart inside a page; scales with it."""
    return _element("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def document(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """An SVG file."""
    inside = "\n".join(["", f"<style>\n{STYLE}\n</style>", rect(0, 0, width, height, css="paper"), *parts, ""])
    box, space = f"0 0 {width:g} {height:g}", "http://www.w3.org/2000/svg"
    frame = _element("svg", inside, xmlns=space, viewBox=box, width=width, height=height, role="img", aria_label=label)
    return frame + "\n"


def linear(values: Sequence[float], start: float, end: float) -> _Scale:
    """A range that holds the values, with about four round ticks."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (power * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)) if span / s <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return _Scale(first * step, last * step, [i * step for i in range(first, last + 1)], start, end, log=False)


def logarithmic(values: Sequence[float], start: float, end: float) -> _Scale:
    """1, 2 and 5 times powers of ten around positive values; whole decades where that would be many."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = [factor * 10.0**power for power in range(low - 1, high + 1) for factor in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= min(values))
    last = min(i for i, step in enumerate(steps) if step > max(values))
    ticks = steps[first : last + 1]
    if len(ticks) > MOST_TICKS:
        ticks = [10.0**power for power in range(low, high + 1, max(1, (high - low + 3) // 4))]
        return _Scale(10.0**low, 10.0**high, ticks, start, end, log=True)
    return _Scale(ticks[0], ticks[-1], ticks, start, end, log=True)


def whole(last: float, start: float, end: float) -> _Scale:
    """From 0 to `last`, with about four ticks at whole numbers."""
    return _Scale(0, max(last, 1), range(0, math.floor(last) + 1, max(1, round(last / 4))), start, end, log=False)


def tick_text(value: float) -> str:
    """`0.05`, `2e-03`, `1200`."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 0.01 else f"{value:.4g}"


def axes(x: _Scale, y: _Scale, x_label: str) -> list[str]:
    """Horizontal grid lines with their values, the values of x, and the label of x."""
    grid = [line(x.start, y(tick), x.end, y(tick)) for tick in y.ticks]
    beside = [text(x.start - 6, y(tick) + 4, tick_text(tick), MUTED, "end") for tick in y.ticks]
    below = [text(x(tick), y.start + 16, tick_text(tick), MUTED, "middle") for tick in x.ticks]
    return [*grid, *beside, *below, text((x.start + x.end) / 2, y.start + 31, x_label, MUTED, "middle")]


def lines(series: Sequence[Series], *, label: str, x_label: str, log: bool) -> str:
    """Lines over a common index, on a linear or a logarithmic axis."""
    values = [value for line in series for value in line.values if value > 0 or not log]
    if not values:
        return _nothing(label)
    count = max(len(line.values) for line in series)
    x = whole(count - 1, LEFT, RIGHT)
    y = (logarithmic if log else linear)(values, BOTTOM, TOP)
    drawn = [
        polyline([(x(i), y(value)) for i, value in enumerate(line.values)], line.colour, line.label) for line in series
    ]
    return inline(HEIGHT, label, [*axes(x, y, x_label), *drawn])


def _nothing(label: str) -> str:
    """In place of a chart that has no values for its logarithmic axis."""
    return inline(40, label, [text(0, 24, "all values are zero", MUTED)])


def scatter(points: Sequence[Point], label: str, x_label: str, y_label: str) -> str:
    """A file with named points over a linear x axis and a logarithmic y axis; y must be above 0."""
    width, names = 780, 412
    x = linear([point.x for point in points], 60, 380)
    y = logarithmic([point.y for point in points], 360, 40)
    ordered = sorted(points, key=lambda point: -point.y)
    rows = apart([y(point.y) for point in ordered])
    parts = [text(16, 22, f"{label} ({y_label})", STRONG), *axes(x, y, x_label)]
    parts += [line(x(tick), y.start, x(tick), y.end) for tick in x.ticks]
    for point, row in zip(ordered, rows, strict=True):
        parts += [
            line(x(point.x), y(point.y), names - 8, row),
            circle(x(point.x), y(point.y), css=OURS if point.ours else STOCK),
            text(names, row + 4, point.name, STRONG if point.ours else MUTED),
        ]
    return document(width, max(y.start + 48, rows[-1] + 20), label, parts)


def apart(heights: Sequence[float]) -> list[float]:
    """Heights in ascending order, moved down where they are nearer than a row of text."""
    rows: list[float] = []
    for height in heights:
        rows.append(max(height, rows[-1] + 17) if rows else height)
    return rows


def linear_map(cells: Mapping[str, Cell], left: float, top: float, right: float) -> list[str]:
    """A cell for every linear of the decoder, by tensor name: layers from left to right, a row for each kind."""
    positions = {name: position for name in cells if (position := place_of(name))}
    layers = 1 + max(layer for layer, _ in positions.values())
    width = (right - left - NAMES) / layers
    parts = [text(left + NAMES - 8, top + i * CELL + 14, kind, MUTED, "end") for i, kind in enumerate(_KINDS)]
    for name, (layer, row) in positions.items():
        cell, x = cells[name], left + NAMES + layer * width
        style = {"title": cell.title, "fill": colour(cell.colour), "fill_opacity": f"{cell.strength:.2f}"}
        style |= {"stroke": "var(--ink)", "stroke_width": "2"} if cell.framed else {}
        parts.append(rect(x + 1, top + row * CELL + 1, width - 2, CELL - 2, **style))
    numbers = range(0, layers, max(1, layers // 8))
    y = top + MAP_HEIGHT - 3
    return [*parts, *(text(left + NAMES + (i + 0.5) * width, y, str(i), MUTED, "middle") for i in numbers)]


def place_of(name: str) -> tuple[int, int] | None:
    """Layer and row of a linear of the decoder; None for every other tensor."""
    match = _LINEAR.search(name)
    return (int(match[1]), _KINDS.index(match[2])) if match else None
