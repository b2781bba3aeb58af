"""Text → token windows of one length, for calibration and evaluation. Knows no files."""

from typing import Any

from .errors import ExportError


def cut(text: str, what: str, count: int, length: int, tokenizer: Any) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text; each begins with BOS where prompts do.

    `what` names the text in the error that it is too short.
    """
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    body, stride = length - len(start), len(ids) // count
    if stride < body:
        raise ExportError(f"{what} of {len(ids)} tokens is too short for {count} windows of {length}")
    return [start + ids[i * stride : i * stride + body] for i in range(count)]


def adds_bos(tokenizer: Any) -> bool:
    """Whether plain encoding puts the beginning-of-sequence token first."""
    ids = tokenizer.encode("a")
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
