"""Chat templates come with checkpoints and are programs (Jinja): rendered in a child with limits, in a sandbox.

transformers renders them in Jinja's ImmutableSandboxedEnvironment, which keeps them from Python's objects, but not from
endless loops and large strings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from . import limited

HELLO = ({"role": "user", "content": "Hello"},)


def check(tokenizer: Any, origin: str) -> None:
    """Render the shortest conversation, before anybody else renders anything. Raises ExportError: it cannot be."""
    if tokenizer.chat_template:
        render(tokenizer, HELLO, origin)


def render(tokenizer: Any, conversation: Sequence[Mapping[str, str]], origin: str, **options: Any) -> str:
    """A conversation up to where the answer begins, unless the options of `apply_chat_template` say otherwise.

    Raises ExportError: the template fails, or takes too much.
    """
    given = {"add_generation_prompt": True, **options}

    def text() -> str:
        return str(tokenizer.apply_chat_template(list(conversation), tokenize=False, **given))

    return limited.call(f"{origin}: chat template", text)


def token_ids(tokenizer: Any, conversation: Sequence[Mapping[str, str]], origin: str) -> list[int]:
    """The same as token ids; the template brings its own BOS. Raises ExportError."""
    ids: list[int] = tokenizer.encode(render(tokenizer, conversation, origin), add_special_tokens=False)
    return ids
