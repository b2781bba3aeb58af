"""The pieces of a standalone SVG file: a frame whose colours follow light and dark mode. Knows no benchmark.

The file has a background of its own, so that it stays readable where a page's mode is not the system's.
"""

from collections.abc import Sequence
from html import escape

WIDTH = 780
STRONG, MUTED = "strong", "muted"
OURS, STOCK = "ours", "stock"
STYLE = """\
svg { --paper: #ffffff; --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --ours: #3568d4; --stock: #9aa7b5; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #14181e; --ink: #e6eaf0; --soft: #9aa6b4; --line: #333c47; --ours: #719bf5; --stock: #5d6b7a; }
}
.paper { fill: var(--paper); }
.ours { fill: var(--ours); }
.stock { fill: var(--stock); }
.rule { stroke: var(--ink); stroke-width: 1.6; }
.grid { stroke: var(--line); stroke-width: 1; }
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
.muted { font-size: 11.5px; fill: var(--soft); }
.strong { font-weight: 600; }"""


def document(height: float, label: str, parts: Sequence[str]) -> str:
    """A whole file around drawn parts."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height:g}" rx="6"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """A text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str) -> str:
    """A filled bar."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}" rx="3" class="{css}"/>'


def rule(left: float, right: float, y: float) -> str:
    """A range: a line with short ends."""
    ends = "".join(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/>' for x in (left, right))
    return f'<g class="rule"><line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{ends}</g>'


def line(start: tuple[float, float], end: tuple[float, float], css: str = "grid") -> str:
    """A straight line."""
    return f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" class="{css}"/>'


def dot(x: float, y: float, css: str) -> str:
    """A point."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{css}"/>'
