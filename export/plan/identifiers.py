"""Names that are safe wherever they come to stand, and how one is made of any text."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

from export.errors import ExportError

_NAME = re.compile(r"\w(?:[\w-]|\.(?!\.)){0,79}")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_PART = 255
"""Bytes of a file's name that every file system takes."""
_LONGEST_CLEANED = 80


def require_name(text: str) -> str:
    """The text. Raises ValueError: it is no name."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:100]!r} is no name: at most 80 letters, digits, _, - and single dots")
    return text


def cleaned(text: str) -> str:
    """The name that a text has where only a name may stand: `my model (v2)` is `my-model-v2`.

    Raises ExportError: nothing of it can stand in a name.
    """
    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text))
    single = re.sub(r"\.{2,}", ".", plain).lstrip("-.")
    short = single.encode()[:_LONGEST_CLEANED].decode(errors="ignore").rstrip("-.")
    if not _NAME.fullmatch(short):
        raise ExportError(f"{text[:100]!r}: no name for an artifact can be made of it; give one with --name")
    return short


def leads_out(name: str) -> str | None:
    """Why the name of a file leads out of its folder, in words; None: it stays inside, as far as a name tells."""
    parts = name.replace("\\", "/").split("/")
    if (parts[0] == "" and len(parts) > 1) or re.match(r"[A-Za-z]:[\\/]", name):
        return "is absolute"
    return "climbs out with `..`" if ".." in parts else None


def not_a_file_name(text: str) -> str | None:
    """Why a text is no name of a file below a folder, in words; None: it is one, like `sub/file`."""
    parts = text.split("/")
    odd = (
        "\\" in text
        or not {"", "."}.isdisjoint(parts)
        or max(len(part.encode(errors="surrogatepass")) for part in parts) > _LONGEST_PART
    )
    return leads_out(text) or ("is no file name" if odd or _CONTROLS.search(text) else None)


def _require_file_name(text: str) -> str:
    if reason := not_a_file_name(text):
        raise ValueError(f"{text[:100]!r} {reason}")
    return text


Name = Annotated[str, AfterValidator(require_name)]
"""Of a plan, model, recipe, target, format, session or device: safe in a path, a shell and an import by itself."""
FileName = Annotated[str, AfterValidator(_require_file_name)]
"""Of a file below a folder that is known otherwise, relative to it."""
