"""Small SVG plots as text, coloured by CSS variables so that they follow light and dark mode. Know only numbers."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 52, 12, 10, 34
HEIGHT = 230
BAR_ROW = 46
TRACK = 312
DOT_ROW = 30


class Bar(NamedTuple):
    """One horizontal bar; `samples` are dots on it, in the unit of the value."""

    label: str
    value: float
    text: str
    samples: Sequence[float]
    colour: int


class Series(NamedTuple):
    """One line of a plot, over x = 0, 1, 2 and so on."""

    label: str
    values: Sequence[float]
    colour: int


def colour(index: int) -> str:
    """A series colour of the page's palette."""
    return f"var(--series-{index % 6})"


def svg(height: float, label: str, parts: Sequence[str]) -> str:
    """The frame around drawn parts; scales with the page."""
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """A text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars from zero: label above, value beside, every sample as a dot."""
    largest = max([1e-12, *(max(row.value, *row.samples, 0.0) for row in rows)])
    parts = [part for i, row in enumerate(rows) for part in bar(row, i * BAR_ROW, (TRACK - 4) / largest)]
    return svg(len(rows) * BAR_ROW + 4, label, parts)


def bar(row: Bar, y: float, scale: float) -> list[str]:
    """One row of `bars`."""
    track = f'<rect x="0" y="{y + 20}" width="{TRACK}" height="12" rx="3" class="track"/>'
    body = (
        f'<rect x="0" y="{y + 20}" width="{max(row.value * scale, 2):.1f}" height="12" rx="3" '
        f'fill="{colour(row.colour)}"><title>{escape(row.label)}: {escape(row.text)}</title></rect>'
    )
    dots = [
        f'<circle cx="{sample * scale:.1f}" cy="{y + 26}" r="2.6" class="sample"><title>{sample:.4g}</title></circle>'
        for sample in row.samples
    ]
    return [text(0, y + 14, row.label), text(WIDTH, y + 31, row.text, "value", "end"), track, body, *dots]


def dots(rows: Sequence[str], series: Sequence[Series], label: str) -> str:
    """One row per name, one dot per series on a decimal logarithmic axis."""
    values = [value for one in series for value in one.values if value > 0]
    if not values:
        return svg(40, label, [text(0, 24, "all values are zero", "muted")])
    low, high, ticks = log_axis(values)
    left, bottom = 92, 14 + len(rows) * DOT_ROW

    def place(value: float) -> float:
        return left + (math.log10(max(value, 10**low)) - low) / (high - low) * (WIDTH - left - 24)

    parts = [
        f'<line x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="4" y2="{bottom}" class="grid"/>'
        + text(place(tick), bottom + 16, tick_text(tick), "muted", "middle")
        for tick in ticks
    ]
    for i, row in enumerate(rows):
        y = 14 + (i + 0.5) * DOT_ROW
        parts.append(text(left - 10, y + 4, row, "", "end"))
        parts.append(f'<line x1="{left}" x2="{WIDTH - 24}" y1="{y}" y2="{y}" class="grid"/>')
        parts += [
            f'<circle cx="{place(one.values[i]):.1f}" cy="{y}" r="5.5" fill="{colour(one.colour)}">'
            f"<title>{escape(row)}, {escape(one.label)}: {one.values[i]:.2e}</title></circle>"
            for one in series
        ]
    return svg(bottom + 22, label, parts)


def lines(series: Sequence[Series], *, label: str, x_label: str, log: bool) -> str:
    """Lines over a common index, on a linear or a decimal logarithmic axis."""
    values = [value for one in series for value in one.values if value > 0 or not log]
    if not values:
        return svg(40, label, [text(0, 24, "all values are zero", "muted")])
    low, high, ticks = log_axis(values) if log else linear_axis(values)
    count = max(len(one.values) for one in series)

    def place_y(value: float) -> float:
        level = math.log10(max(value, 10**low)) if log else value
        return HEIGHT - BOTTOM - (level - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def place_x(index: int) -> float:
        return LEFT + index / max(count - 1, 1) * (WIDTH - LEFT - RIGHT)

    parts = [grid_line(tick, place_y(tick)) for tick in ticks]
    parts += [text(place_x(i), HEIGHT - 18, str(i), "muted", "middle") for i in x_ticks(count)]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "muted", "middle"))
    parts += [path(one, place_x, place_y) for one in series]
    return svg(HEIGHT, label, parts)


def path(one: Series, place_x: Callable[[int], float], place_y: Callable[[float], float]) -> str:
    """The line itself."""
    points = " ".join(f"{place_x(i):.1f},{place_y(value):.1f}" for i, value in enumerate(one.values))
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour(one.colour)}" stroke-width="1.8" '
        f'stroke-linejoin="round"><title>{escape(one.label)}</title></polyline>'
    )


def grid_line(value: float, y: float) -> str:
    """A horizontal line with its value."""
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
    return line + text(LEFT - 6, y + 4, tick_text(value), "muted", "end")


def tick_text(value: float) -> str:
    """A short number."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 0.01 else f"{value:.4g}"


def log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Whole decades around positive values: lowest and highest exponent, ticks."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    step = max(1, (high - low + 3) // 4)
    return low, high, [10.0**exponent for exponent in range(low, high + 1, step)]


def linear_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """A range that holds the values, with about four round ticks."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = next(s for s in round_steps(span) if span / s <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def round_steps(span: float) -> list[float]:
    """Steps of 1, 2 and 5 times powers of ten around a span."""
    power = 10.0 ** math.floor(math.log10(span))
    return [power * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)]


def x_ticks(count: int) -> list[int]:
    """Indices to label."""
    step = max(1, round((count - 1) / 4))
    return list(range(0, count, step))
