"""The release gate's page: for each artifact what changed since the release before, every comparison, the verdict."""

from collections.abc import Iterator, Sequence

from export.host.text import code
from export.host.text import markdown as escaped
from export.toolbox import tables
from runtime_tests.evidence.gate import Gated

from . import ci

_COLUMNS = ("", "before", "now", "change", "limit", "verdict")


def render(gated: Sequence[Gated]) -> str:
    """Markdown: the verdict over all, then each artifact."""
    failed = sum(not one.holds for one in gated)
    open_ = sum(change.verdict == "inconclusive" for one in gated for change in one.changes)
    verdict = f"{failed} of {len(gated)} artifacts do not hold" if failed else "nothing is worse than its limit"
    left = f", noise left {open_} comparison{'s' if open_ > 1 else ''} open" if open_ else ""
    lines = [f"## Against the release before: {verdict}{left}"]
    for one in gated:
        lines += ["", *_of(one)]
    return "\n".join(lines) + "\n"


def _of(one: Gated) -> Iterator[str]:
    yield f"### {code(one.new)}: {_verdict(one)}"
    yield ""
    if one.problem:
        yield f"- {escaped(one.problem)}"
    if one.old:
        yield f"- against {code(one.old)}"
        yield f"- changed: {escaped(one.changed)}"
    if one.speed:
        yield f"- speed not compared: {escaped(one.speed)}"
    if one.changes:
        yield ""
        yield tables.markdown([_COLUMNS, *(ci.change_row(change) for change in one.changes)])


def _verdict(one: Gated) -> str:
    if one.problem:
        return "**fail**" if one.changes else "**not compared**"
    if one.worse:
        return f"**fail** ({escaped(', '.join(one.worse))})"
    if one.undecided:
        return f"**open** ({escaped(', '.join(one.undecided))}; more windows decide, as of `--eval domains`)"
    return "pass"
