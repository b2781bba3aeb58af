"""What usage texts (`usage.md.j2`) are given beside the manifest: what they ask, versions, strings of a language."""

import re
from collections.abc import Callable
from typing import Any

from export.checkpoints.chat_template import QUESTION
from export.host.text import Markdown
from export.manifest import Manifest

_BEGINNING = "The capital of France is"
_VERSION = re.compile(r"\d[\w.!]*")
"""What may follow `==` in a command; without the local part, as in `2.13.0+cpu`, which no index may have."""
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def context(manifest: Manifest) -> dict[str, Any]:
    """Names for the templates.

    `question` and `text`: what is asked, and what that is as text for the model. Instruct models get it from their chat
    template; base models, which continue a text, have no `question`.
    """
    example = manifest.tokenizer.chat_example
    return {
        "manifest": manifest,
        "question": None if example is None else QUESTION[0]["content"],
        "text": _BEGINNING if example is None else example,
        "bos_count": int(example is None and manifest.tokenizer.adds_bos),
        "version": lambda package: version(manifest.tools, package),
        "install": lambda *packages: install(manifest.tools, *packages),
        "kotlin": kotlin,
        "swift": swift,
        "shell": shell,
    }


def version(tools: dict[str, str], package: str) -> str | None:
    """The version that an artifact was made with, as an index has it; None: unknown."""
    found = _VERSION.match(tools.get(package, ""))
    return found[0] if found else None


def install(tools: dict[str, str], *packages: str) -> str:
    """The command that installs packages in the versions that an artifact was made with."""
    known = ((package, version(tools, package)) for package in packages)
    return " ".join(["pip install", *(f"{package}=={number}" if number else package for package, number in known)])


def kotlin(text: str) -> Markdown:
    """A string literal of Kotlin; characters beyond ASCII are UTF-16 units."""

    def escape(character: str) -> str:
        units = character.encode("utf-16-be").hex()
        return "".join(rf"\u{units[i : i + 4]}" for i in range(0, len(units), 4))

    return _quoted('"', '"\\$', text, escape)


def swift(text: str) -> Markdown:
    """A string literal of Swift."""
    return _quoted('"', '"\\', text, lambda character: rf"\u{{{ord(character):x}}}")


def shell(text: str) -> Markdown:
    """A word of bash and zsh, line ends included."""
    return Markdown("$" + _quoted("'", "'\\", text, lambda character: rf"\U{ord(character):08x}"))


def _quoted(quote: str, special: str, text: str, escape: Callable[[str], str]) -> Markdown:
    """One line of printable ASCII that stands for the text, so no text of others ends a block of code."""

    def written(character: str) -> str:
        if character in special:
            return f"\\{character}"
        return character if " " <= character <= "~" else _NAMED.get(character) or escape(character)

    return Markdown(f"{quote}{''.join(map(written, text))}{quote}")
