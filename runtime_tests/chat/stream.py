"""The text of an answer while its tokens come."""

import re
from collections.abc import Callable
from typing import Any

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte, of a tokenizer with byte_fallback."""


class TextStream:
    """Shows what later tokens cannot change; all that is shown, joined, is what the tokenizer decodes all tokens to.

    The tokenizers library's own DecodeStream raises where bytes are no UTF-8 (huggingface/tokenizers#1705).
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer`; `show` is called with pieces, never empty."""
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] = []
        self._shown = 0

    @property
    def text(self) -> str:
        """What the tokens so far are decoded to; U+FFFD for bytes that are no UTF-8."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def add(self, token: int) -> None:
        """One more token. The start of a character is held back, and byte tokens until another one ends their run.

        A run of byte tokens is decoded as a whole: one broken byte makes all of them U+FFFD. Special tokens are left
        out before that, so they end no run.
        """
        self._ids.append(token)
        empty = not self._tokenizer.decode([token], skip_special_tokens=True)
        if not empty and not _BYTE.fullmatch(self._tokenizer.id_to_token(token)):
            self._show_until(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Show what was held back: no token comes any more."""
        self._show_until(self.text)

    def _show_until(self, settled: str) -> None:
        if piece := settled[self._shown :]:
            self._shown += len(piece)
            self._show(piece)
