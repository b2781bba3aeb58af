"""Named points over a linear and a logarithmic axis, their names beside them without overlap. Knows only numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..plots import linear_axis, tick_text
from .svg import MUTED, OURS, STOCK, STRONG, document, dot, line, text

LEFT, RIGHT, TOP, BOTTOM = 60, 380, 40, 360
NAMES = 412
"""Where the names' column begins."""
NAME_ROW = 17


class Point(NamedTuple):
    """Where it is, and what."""

    x: float
    y: float
    name: str
    ours: bool


def draw(points: Sequence[Point], label: str, x_label: str, y_label: str) -> str:
    """A whole file; y is logarithmic, so it must be above 0."""
    x_low, x_high, x_ticks = linear_axis([point.x for point in points])
    y_ticks = log_ticks([point.y for point in points])
    y_low, y_high = math.log10(y_ticks[0]), math.log10(y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    parts = [text(16, 22, f"{label} ({y_label})", STRONG), text((LEFT + RIGHT) / 2, BOTTOM + 36, x_label, MUTED)]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts += [line((x, TOP), (x, BOTTOM)), text(x, BOTTOM + 18, tick_text(tick), MUTED, "middle")]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts += [line((LEFT, y), (RIGHT, y)), text(LEFT - 8, y + 4, tick_text(tick), MUTED, "end")]
    ordered = sorted(points, key=lambda point: -point.y)
    places = [place(point.x, point.y) for point in ordered]
    rows = apart([y for _, y in places])
    for point, (x, y), row in zip(ordered, places, rows, strict=True):
        parts += [
            line((x, y), (NAMES - 8, row)),
            dot(x, y, OURS if point.ours else STOCK),
            text(NAMES, row + 4, point.name, STRONG if point.ours else MUTED),
        ]
    return document(max(BOTTOM + 48, rows[-1] + 20), label, parts)


def apart(heights: Sequence[float]) -> list[float]:
    """Heights in ascending order, moved down where they would be nearer than a row of text."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + NAME_ROW) if found else height)
    return found


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten from below the smallest to above the largest value."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= min(values))
    last = min(i for i, step in enumerate(steps) if step > max(values))
    return steps[first : last + 1]
