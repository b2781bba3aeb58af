"""The script of a `processes.LimitedWorker`: chat templates, which are programs, rendered as transformers does.

Of transformers only the renderer is imported: the packages above it would take three times as long, for nothing here.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

_spec = importlib.util.find_spec("transformers")
assert _spec
assert _spec.origin
for _name, _folder in (("transformers", "."), ("transformers.utils", "utils")):
    _package = types.ModuleType(_name)
    _package.__path__ = [str(Path(_spec.origin).parent / _folder)]
    sys.modules[_name] = _package

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402 – below its packages


def answer(request: dict[str, Any]) -> str:
    """One conversation as text; the request holds the arguments of `render_jinja_template`."""
    [text], _ = render_jinja_template(**request)
    return str(text)
