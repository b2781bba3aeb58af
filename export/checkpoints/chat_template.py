"""Chat templates come with checkpoints and are Jinja programs: rendered in a sandbox in a child process with limits.

transformers renders them in Jinja's ImmutableSandboxedEnvironment, which keeps them from Python's objects, but not from
endless loops and large strings.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.host.processes import LimitedWorker, LimitError, Limits

LIMITS = Limits()
_RENDERER = LimitedWorker(Path(__file__).with_name("template_renderer.py"))
FIXED_DAY = "2024-07-26"
"""For text that must not depend on the day; the default of Llama 3.2's template where it cannot ask."""
HELLO = ({"role": "user", "content": "Hello"},)
QUESTION = ({"role": "user", "content": "What is the capital of France?"},)
"""Of model cards."""


def check(tokenizer: Any, origin: str) -> None:
    """Render the shortest conversation. Raises ExportError: the template fails, or takes too much."""
    if tokenizer.chat_template:
        render(tokenizer, HELLO, origin)


def render(
    tokenizer: Any, conversation: Sequence[Mapping[str, str]], origin: str, today: str | None = None, **options: Any
) -> str:
    """A conversation up to where the answer begins, unless the options of `apply_chat_template` say otherwise.

    `today`: the date (`2024-07-26`) that a template which asks for one gets; None: this day's. With a date given, the
    text is the same every time. Raises ExportError: the template fails, or takes too much.
    """
    subject = f"{origin}: chat template"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # several, none of them the default
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ExportError(
            f"{subject}: there are several ({names}), but none is the default; save one as chat_template.jinja"
        ) from None
    request = {
        "conversations": [list(conversation)],
        "chat_template": template,
        "add_generation_prompt": True,
        "today": today,
        **tokenizer.special_tokens_map,
        **options,
    }
    try:
        text = _RENDERER.ask(request, LIMITS)
    except LimitError as error:
        raise ExportError(f"{subject}: {error}") from None
    if half := re.search("[\ud800-\udfff]", text):
        raise ExportError(f"{subject}: writes half a character ({half[0]!r}), which no tokenizer takes")
    return text


def token_ids(
    tokenizer: Any, conversation: Sequence[Mapping[str, str]], origin: str, today: str | None = None
) -> list[int]:
    """The same as token ids; the template brings its own BOS. Raises ExportError."""
    ids: list[int] = tokenizer.encode(render(tokenizer, conversation, origin, today), add_special_tokens=False)
    return ids
