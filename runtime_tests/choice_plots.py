"""Which linears got more bits and why, drawn from a manifest: the map of layers, and size against expected loss."""

import math
from collections.abc import Sequence
from html import escape

from export.manifest import Candidate, Manifest

from .plots import HEIGHT, LEFT, RIGHT, TOP, WIDTH, colour, grid_line, linear_axis, log_axis, svg, text, tick_text

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES, CELL_GAP, ROW = 74, 1, 22
AXIS = 40


def choice_map(described: Manifest) -> str:
    """A cell for every linear, layers from left to right: filled where promoted, stronger where rounding costs more."""
    candidates = candidates_of(described)
    if not candidates:
        return ""
    layers = described.architecture.num_hidden_layers
    costs = [math.log10(max(one.kl, 1e-12)) for one in candidates]
    low, high = min(costs), max(costs)
    width = (WIDTH - NAMES) / layers
    parts = [text(NAMES - 8, row_y(i) + 15, kind, "muted", "end") for i, kind in enumerate(KINDS)]
    for one, cost in zip(candidates, costs, strict=True):
        layer, kind = place_of(one)
        strength = 0.15 + 0.85 * (cost - low) / ((high - low) or 1)
        parts.append(cell(NAMES + layer * width, row_y(KINDS.index(kind)), width, one, strength))
    step = max(1, layers // 8)
    bottom = row_y(len(KINDS)) + 12
    parts += [text(NAMES + (i + 0.5) * width, bottom, str(i), "muted", "middle") for i in range(0, layers, step)]
    return svg(bottom + 6, "bits of every linear", parts)


def row_y(index: int) -> float:
    """Top of a row of cells."""
    return TOP + index * ROW


def cell(x: float, y: float, width: float, one: Candidate, strength: float) -> str:
    """One linear, framed when promoted."""
    bits = "int8" if one.promoted else "as the recipe says"
    frame = f'stroke="{colour(3)}" stroke-width="2"' if one.promoted else ""
    size = f'width="{width - 2 * CELL_GAP:.1f}" height="{ROW - 2 * CELL_GAP}" rx="2"'
    return (
        f'<rect x="{x + CELL_GAP:.1f}" y="{y + CELL_GAP}" {size} '
        f'fill="{colour(0)}" fill-opacity="{strength:.2f}" {frame}>'
        f"<title>{escape(one.name)}: {bits}; alone costs KL {one.kl:.2e}, promoted {one.promoted_kl:.2e}, "
        f"{one.extra_bytes / 1e3:,.0f} kB more</title></rect>"
    )


def front(described: Manifest) -> str:
    """Expected KL at every size, promoting the best linears first, and the choice that was made."""
    candidates = candidates_of(described)
    info = described.quantization.calibration
    if not candidates or info is None or info.held_out_kl is None:
        return ""
    chosen = [one for one in candidates if one.promoted]
    left = sum(one.promoted_kl if one.promoted else one.kl for one in candidates)
    points = pareto(candidates, smallest_mb(described), info.held_out_kl / left)
    at = (smallest_mb(described) + sum(one.extra_bytes for one in chosen) / 1e6, info.held_out_kl)
    x_low, x_high, x_ticks = linear_axis([x for x, _ in points])
    y_low, y_high, y_ticks = log_axis([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (math.log10(y) - y_low) / (y_high - y_low)
        right = (x - x_low) / (x_high - x_low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - AXIS - up * (HEIGHT - TOP - AXIS)

    parts = [grid_line(tick, place(x_low, tick)[1]) for tick in y_ticks]
    parts += [text(place(tick, y_ticks[0])[0], HEIGHT - 22, tick_text(tick), "muted", "middle") for tick in x_ticks]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "MB of all weights", "muted", "middle"))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{colour(0)}" stroke-width="1.8"/>')
    x, y = place(*at)
    said = f"{at[0]:.1f} MB, KL {at[1]:.4f}, {len(chosen)} of {len(candidates)} linears promoted"
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour(3)}"><title>{said}</title></circle>')
    parts.append(text(WIDTH - RIGHT, TOP + 12, said, "value", "end"))
    return svg(HEIGHT, "size and expected KL", parts)


def pareto(candidates: Sequence[Candidate], smallest: float, scale: float) -> list[tuple[float, float]]:
    """(MB, KL) with the first 0, 1, 2 … candidates promoted; estimates are scaled to the loss that was measured."""
    size, kl = smallest, sum(one.kl for one in candidates)
    points = [(size, kl * scale)]
    for one in candidates:
        size, kl = size + one.extra_bytes / 1e6, kl + one.promoted_kl - one.kl
        points.append((size, max(kl, 1e-12) * scale))
    return points


def smallest_mb(described: Manifest) -> float:
    """All weights without any promotion."""
    parameters = described.architecture.parameters
    extra = sum(one.extra_bytes for one in candidates_of(described) if one.promoted)
    return (parameters * described.quantization.bits_per_weight / 8 - extra) / 1e6


def candidates_of(described: Manifest) -> tuple[Candidate, ...]:
    """Best first; empty where the recipe promotes nothing."""
    info = described.quantization.calibration
    return info.candidates if info else ()


def place_of(one: Candidate) -> tuple[int, str]:
    """Layer and kind of `model.layers.7.mlp.down_proj.weight`."""
    _, _, layer, _, kind, _ = one.name.split(".")
    return int(layer), kind
