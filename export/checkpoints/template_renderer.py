"""The script of a `processes.LimitedWorker`: chat templates, which are programs, rendered as transformers does.

Of transformers only the renderer is imported: the packages above it would take three times as long, for nothing here.
"""

import importlib.util
import random
import sys
import types
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

_spec = importlib.util.find_spec("transformers")
assert _spec
assert _spec.origin
for _name, _folder in (("transformers", "."), ("transformers.utils", "utils")):
    _package = types.ModuleType(_name)
    _package.__path__ = [str(Path(_spec.origin).parent / _folder)]
    sys.modules[_name] = _package

from transformers.utils import chat_template_utils  # noqa: E402 – below its packages


def answer(request: dict[str, Any]) -> str:
    """One conversation as text; the request holds the arguments of `render_jinja_template`, and `today`."""
    day = request.pop("today")
    chat_template_utils.datetime = datetime if day is None else _on(datetime.fromisoformat(day))
    if day is not None:
        random.seed(0)  # of Jinja's filter `random`
    [text], _ = chat_template_utils.render_jinja_template(**request)
    return str(text)


def _on(day: datetime) -> type[datetime]:
    """A clock that stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(day.year, day.month, day.day, tzinfo=tz)

    return Clock
