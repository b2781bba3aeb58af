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
    globs = list(islice(_globs(pattern), _MOST_GLOBS + 1))
    if len(globs) > _MOST_GLOBS:
        raise ExportError(f"layers: {pattern!r} stands for more than {_MOST_GLOBS} patterns; write * for a part of it")
    counted = (_FROM_THE_END.sub(lambda found: str(layers - int(found[1])), glob) for glob in globs)
    regex = re.compile("|".join(map(translate, counted)))
    return [name for name in names if regex.match(name.removesuffix(".weight"))]


def _globs(pattern: str) -> Iterator[str]:
    """Patterns without braces: `{a,2..4}` stands for a, 2, 3 and 4."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    for part in found[1].split(","):
        ends = _RANGE.fullmatch(part)
        choices = map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
        for choice in choices:
            yield from _globs(f"{pattern[: found.start()]}{choice}{pattern[found.end() :]}")
