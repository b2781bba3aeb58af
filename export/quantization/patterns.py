"""Patterns of names of linears, as a shell writes them: `*.down_proj`, `model.layers.{0,-2..-1}.mlp.*`. No torch."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from itertools import islice

from export.errors import ExportError

_MOST_GLOBS = 256
"""That braces may stand for; of a stranger's manifest, too."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,4})\.\.(-?\d{1,4})")
_FROM_THE_END = re.compile(r"(?<=layers\.)-(\d{1,4})(?=\.)")


def matching(pattern: str, names: Iterable[str], layers: int) -> list[str]:
    """Those of the weights' names that match, `.weight` left out; in a model of so many layers, layer -1 is the last.

    `names` end in `.weight`. Raises ExportError: the braces stand for too much.
    """
    regex = re.compile("|".join(_regex(glob, layers) for glob, _ in _globs(pattern)))
    return [name for name in names if regex.match(name.removesuffix(".weight"))]


def idle(pattern: str, names: Iterable[str], layers: int) -> list[str]:
    """What stands in braces and has no part in any match: 2 and 3 of `model.layers.{0..3}.*`, of two layers."""
    listed, used = dict[tuple[int, str], None](), set[tuple[int, str]]()
    bare = [name.removesuffix(".weight") for name in names]
    for glob, choices in _globs(pattern):
        parts = list(enumerate(choices))
        listed |= dict.fromkeys(parts)
        if any(map(re.compile(_regex(glob, layers)).match, bare)):
            used.update(parts)
    return [choice for part, choice in listed if (part, choice) not in used]


def _regex(glob: str, layers: int) -> str:
    return translate(_FROM_THE_END.sub(lambda found: str(layers - int(found[1])), glob))


def _globs(pattern: str) -> list[tuple[str, tuple[str, ...]]]:
    """All that a pattern stands for, each with what it has chosen. Raises ExportError."""
    globs = list(islice(_expanded(pattern, ()), _MOST_GLOBS + 1))
    if len(globs) > _MOST_GLOBS:
        raise ExportError(f"layers: {pattern!r} stands for more than {_MOST_GLOBS} patterns; write * for a part of it")
    return globs


def _expanded(pattern: str, chosen: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Patterns without braces: `{a,2..4}` stands for a, 2, 3 and 4."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern, chosen
        return
    for part in found[1].split(","):
        ends = _RANGE.fullmatch(part)
        choices = map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
        for choice in choices:
            yield from _expanded(f"{pattern[: found.start()]}{choice}{pattern[found.end() :]}", (*chosen, choice))
