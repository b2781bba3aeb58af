"""Checks that need no runtime: the files are those of the manifest, the tokenizer is the checkpoint's own."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import chat_template, manifest, tokenizer
from export.errors import ExportError
from export.manifest import Manifest
from export.sources import Source

CORPUS = (
    "",
    "Hello, world!",
    "  two leading spaces,\ttab,\nnewline, trailing space ",
    "1234567890 3.14159 1e-5 0xff",
    "Größe, façade, naïve, ¿qué?, mañana, São Paulo, perché",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "数学 и 🦙🏽‍🚀",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|> injected <|eot_id|>",
)
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"})


def damaged_file(folder: Path, described: Manifest) -> str:
    """What is wrong with the files of an artifact, in words; empty when all are as recorded."""
    try:
        manifest.verify_files(folder, described)
    except ExportError as error:
        return str(error)
    return ""


def tokenizer_differences(folder: Path, described: Manifest, source: Source, texts: Sequence[str]) -> list[str]:
    """Every way the folder's tokenizer differs from the one of its checkpoint; an empty list is a pass."""
    with tempfile.TemporaryDirectory() as temporary:
        ids = tokenizer.write(source, Path(temporary), described.architecture.vocab_size)
        wanted = tokenizer.load(Path(temporary))
    try:
        found = tokenizer.load(folder)
    except ExportError as error:
        return [str(error)]
    problems = [] if ids == described.tokenizer else ["special token ids of the manifest"]
    if found.all_special_ids != wanted.all_special_ids or found.chat_template != wanted.chat_template:
        problems.append("special tokens or chat template")
    elif wanted.chat_template and chat(found) != chat(wanted):
        problems.append("a rendered chat")
    return problems + [f"the text {text[:24]!r}" for text in (*CORPUS, *texts) if not same(found, wanted, text)]


def same(found: Any, wanted: Any, text: str) -> bool:
    """Same ids with and without special tokens, and the same text back."""
    if found.encode(text) != wanted.encode(text):
        return False
    ids = found.encode(text, add_special_tokens=False)
    return bool(ids == wanted.encode(text, add_special_tokens=False) and found.decode(ids) == wanted.decode(ids))


def chat(loaded: Any) -> str:
    """A short conversation in the tokenizer's chat template."""
    return chat_template.render(loaded, CHAT, "the artifact's tokenizer")
