"""Pages from `.j2` files, for reports, task scores and benchmarks."""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from export.host.text import visible
from export.toolbox import charts
from export.toolbox.tables import markdown

_PAGES = Path(__file__).parent
"""`frame.html.j2` is there, which the HTML pages extend."""


def render(template: Path, **values: object) -> str:
    """A page of `NAME.html.j2`, whose values are escaped, or `NAME.md.j2`, which keeps its last line end."""
    lines = "\n" if template.name.endswith(".md.j2") else ""  # our own; values of HTML that have some are Markup
    environment = Environment(
        loader=FileSystemLoader([template.parent, _PAGES]),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"]),
        finalize=lambda value: visible(value, keep=lines) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=template.name.endswith(".md.j2"),
    )
    environment.globals["chart_style"] = charts.STYLE
    environment.filters |= {"markdown": markdown, "versions": _versions, "breakable": _breakable}
    return environment.get_template(template.name).render(values)


def _versions(tools: Mapping[str, str]) -> str:
    return ", ".join(f"{tool} {version}" for tool, version in tools.items())


def _breakable(name: str) -> Markup:
    """A name or path that a line may end in after each `_` and `/`; copied, it is the same text."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(visible(name)))))  # noqa: S704 – escaped
