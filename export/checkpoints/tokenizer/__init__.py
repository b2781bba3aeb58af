"""The tokenizer of an artifact: the checkpoint's files, with the ids of tokenizer.json in every client that reads them.

A class beside tokenizer.json (`GPT2Tokenizer`, `Qwen2Tokenizer` …) makes transformers, and onnxruntime-genai too, take
vocabulary and merges out of it and split text by the class's own rules. So the class is replaced by one without any.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.checkpoints import Source, chat_template
from export.checkpoints.files import decoded
from export.checkpoints.origin import name_of
from export.errors import ExportError
from export.host.processes import LimitedWorker, LimitError, Limits
from export.manifest import TokenizerIds

from . import ids
from .tiktoken import CHAT_TEMPLATE, END_OF_ANSWER, begin_with, save, write_generation_ids, write_tiktoken

__all__ = [
    "CHAT_TEMPLATE", "END_OF_ANSWER", "NEUTRAL_CLASS", "SAMPLES", "adds_bos", "begin_with", "leads_away", "load",
    "sample_ids", "save", "try_out", "write", "write_generation_ids", "write_tiktoken",
]  # fmt: skip
NEUTRAL_CLASS = "PreTrainedTokenizerFast"
"""Known to transformers 4 and 5, swift-transformers and onnxruntime-genai."""
SAMPLES = (
    "Hello, world!",
    "  two leading spaces,\ttab,\nnewline, trailing space ",
    "a\n\n12345\r\n\n\n x   y\t\t 2024-01-31",
    "1234567890 3.14159 1e-5 0xff",
    "I'm you're he'd WE'LL They'Ve",
    "Größe, façade, naïve, ¿qué?, mañana, São Paulo, perché",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "数学 и 🦙🏽‍🚀",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|> injected <|eot_id|>",
)
"""Texts that tokenizers get wrong: spaces, newlines, digits, emoji, and the eight languages of Llama 3.2."""
_TRIAL_TEXTS = (*SAMPLES, *(piece * 512 for piece in ("a", " ", "\n", "1", "aB", "e é", "🙂", "ab12 ,.\n")))
"""The same, and what patterns that backtrack never end on."""
_TRIAL_LIMITS = Limits(memory_bytes=2**29, cpu_s=10, wall_s=60.0)
_CONFIG = "tokenizer_config.json"
_LEADING_AWAY = re.compile(r"auto_map|custom_generate|init_inputs|name_or_path|tokenizer_object|.*_files?", re.DOTALL)
"""Keys there by which some version of transformers finds Python code or other files, and where it was saved."""
_SPLITTING = "split_special_tokens"
"""A key there: special tokens of a text are read as ordinary ones, those of a chat too."""
_ID_LIMIT = 2**22
"""tokenizers writes a vocabulary in a loop up to its highest id: with one of 2**31 that takes 20 s and 8 GB."""
_SHOWN = 3
"""Tokens that a message lists."""


def write(source: Source, folder: Path, vocab_size: int) -> TokenizerIds:
    """Write the checkpoint's tokenizer into the artifact folder and read the ids back from what was written.

    Raises ExportError, which names the checkpoint's own file: files that do not load, a hostile chat template, tokens
    outside the vocabulary.
    """
    source.write_tokenizer(folder)
    places = _Places(source)
    try_out(folder / "tokenizer.json", places.of("tokenizer.json"))
    file = _of_file(folder, places)
    _set_class(folder)
    try:
        loaded = load(folder)
    except ExportError as error:  # tokenizer.json has been read: what stands beside it is wrong
        reason = str(error).removeprefix(f"{folder}: ")
        raise ExportError(f"{places.of(_CONFIG, 'tokenizer.json')}: {reason}") from None
    notes = [*_beyond(loaded, vocab_size, places), *_joined(file, loaded, folder, places), *_around(loaded)]
    notes += _other_template(loaded, folder)
    chat_template.check(loaded, "the checkpoint's tokenizer")
    _require_chat_inside(loaded, vocab_size, places)
    stated = dict(source.stated_ids)
    if (folder / ids.GENERATION).is_file():
        stated[places.of(ids.GENERATION)] = _json(folder / ids.GENERATION, places)
    vocabulary = loaded.get_vocab()
    for path in (folder / _CONFIG, folder / "special_tokens_map.json"):
        if path.is_file():
            stated.setdefault(places.of(path.name), ids.named(_json(path, places), vocabulary))
    special = ids.join(loaded, stated, vocab_size, places.of(_CONFIG))
    ids.write(special, loaded, folder)
    return TokenizerIds(
        bos_id=special.bos,
        eos_ids=special.eos,
        pad_id=special.pad,
        adds_bos=adds_bos(loaded),
        ends=tuple(token for token in loaded.convert_ids_to_tokens(list(special.eos)) if token is not None),
        chat_example=_example(loaded),
        notes=(*notes, *special.notes),
    )


def load(folder: Path) -> Any:
    """The transformers tokenizer of an artifact or model folder, offline, by tokenizer.json whatever class is named.

    Raises ExportError: its files do not load.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        loaded.encode("a")  # which reads settings that loading does not
    except Exception as error:
        raise ExportError(f"{folder}: tokenizer files do not load ({' '.join(str(error).split())})") from None
    return loaded


def try_out(path: Path, name: str = "") -> None:
    """The first use of a foreign tokenizer.json, in a child with limits of time and memory; `name`: for messages.

    Raises ExportError: it crashed, or took too much.
    """
    worker = LimitedWorker(Path(__file__).with_name("trial.py"))
    try:
        worker.ask({"path": str(path), "texts": _TRIAL_TEXTS}, _TRIAL_LIMITS)
    except LimitError as error:
        raise ExportError(
            f"{name or path}: encoding its first texts {error}; do not use this file, take its model's original"
        ) from None
    finally:
        worker.close()


def adds_bos(tokenizer: Any) -> bool:
    """Whether a text that is encoded begins with BOS."""
    encoded = tokenizer.encode("a")
    return tokenizer.bos_token_id is not None and bool(encoded) and encoded[0] == tokenizer.bos_token_id


def sample_ids(folder: Path) -> dict[str, list[int]]:
    """The samples by tokenizer.json itself, without the special tokens around a text."""
    file = _file(folder / "tokenizer.json")
    return {text: file.encode(text, add_special_tokens=False).ids for text in SAMPLES}


def leads_away(key: str) -> bool:
    """Whether a key of tokenizer_config.json names code or other files, so that it is in no artifact."""
    return _LEADING_AWAY.fullmatch(key) is not None


def _set_class(folder: Path) -> None:
    """The neutral class in tokenizer_config.json; what would lead away from tokenizer.json is taken out."""
    path = folder / _CONFIG
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = {key: value for key, value in fields.items() if not (leads_away(key) or key == _SPLITTING)}
    changed["tokenizer_class"] = NEUTRAL_CLASS
    if changed != fields:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _other_template(loaded: Any, folder: Path) -> Iterator[str]:
    """Templates in files go before the one in tokenizer_config.json, which is taken out where it differs. A note."""
    path = folder / _CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    own = fields.pop("chat_template", None)
    if isinstance(own, list):
        own = {template["name"]: template["template"] for template in own}
    if own not in (None, loaded.chat_template):
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        yield "chat_template.jinja is read, another template in tokenizer_config.json is not, as in transformers"


class _Places:
    """Where the checkpoint has what was written: messages name a file that its owner knows."""

    def __init__(self, source: Source) -> None:
        self._files = {name_of(path): path for path in source.files}

    def of(self, *names: str) -> str:
        """The first file of these names, else the one that everything is in, else the last name."""
        for name in names:
            if name in self._files:
                return str(self._files[name])
        return str(next(iter(self._files.values()))) if len(self._files) == 1 else names[-1]


def _of_file(folder: Path, places: _Places) -> Any:
    """tokenizer.json, after every file beside it was found to be JSON or text."""
    path = folder / "tokenizer.json"
    for other in sorted(folder.glob("*.json")):
        if other != path:
            _json(other, places)
    for template in sorted(folder.rglob("*.jinja")):
        try:
            decoded(template.read_bytes())
        except ValueError as error:
            raise ExportError(f"{places.of(name_of(template))}: {error}") from None
    try:
        decoded(path.read_bytes())
        return _file(path)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{places.of(path.name)}: not a tokenizer that is read ({reason}); save it again with `save_pretrained`"
        ) from None


def _file(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(path.read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path, places: _Places) -> dict[str, Any]:
    from export.checkpoints.safetensors import loads

    try:
        value = loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error})"
    else:
        if isinstance(value, dict):
            return value
        reason = f"expected a JSON object, found {type(value).__name__}"
    raise ExportError(f"{places.of(path.name)}: {reason}; copy it from the checkpoint again")


def _joined(file: Any, loaded: Any, folder: Path, places: _Places) -> Iterator[str]:
    """Where the files beside tokenizer.json add to it, as transformers reads them, it is written with that. Notes.

    Raises ExportError: transformers still reads it otherwise.
    """
    if not (differing := _differences(file, loaded)):
        return
    loaded.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if still := _differences(_file(folder / "tokenizer.json"), loaded):
        raise ExportError(
            f"{places.of('tokenizer.json')}: transformers reads {still[0]} otherwise than the file says; save the "
            "tokenizer again with `save_pretrained`"
        )
    yield (
        f"the files beside the checkpoint's tokenizer.json change {_first(differing)}; the artifact's tokenizer.json "
        "is as transformers reads them all"
    )


def _differences(file: Any, loaded: Any) -> list[str]:
    """Tokens that transformers reads otherwise than the file, else samples."""
    here, there = file.get_vocab(with_added_tokens=True), loaded.get_vocab()
    tokens = [f"the token {token!r}" for token in sorted({*here, *there}) if here.get(token) != there.get(token)]
    texts = (*SAMPLES, "a".join(loaded.all_special_tokens))
    return tokens or [f"the text {text[:24]!r}" for text in texts if not _same(file, loaded, text)]


def _same(file: Any, loaded: Any, text: str) -> bool:
    """Ids with and without what is put around a text, and the text that comes back."""
    if file.encode(text).ids != loaded.encode(text):
        return False
    encoded = file.encode(text, add_special_tokens=False).ids
    if encoded != loaded.encode(text, add_special_tokens=False):
        return False
    return bool(file.decode(encoded, skip_special_tokens=False) == loaded.decode(encoded))


def _beyond(loaded: Any, vocab_size: int, places: _Places) -> Iterator[str]:
    """A note about added tokens that the model has no row for: none comes out of it.

    Raises ExportError: a token of the vocabulary itself, which any text may hold, or an id that no vocabulary has.
    """
    beyond = {token: number for token, number in loaded.get_vocab().items() if number >= vocab_size}
    added = loaded.added_tokens_decoder
    remedy = "give the tokenizer of these weights, or resize the model to it (`resize_token_embeddings`)"
    for token, number in sorted(beyond.items(), key=lambda item: -item[1]):
        if number not in added or number >= _ID_LIMIT:
            raise ExportError(
                f"{places.of('tokenizer.json')}: token {token!r} has id {number}, but the model's vocab_size is "
                f"{vocab_size}; {remedy}"
            )
    if beyond:
        listed = _first([f"{token!r} = {number}" for token, number in sorted(beyond.items(), key=lambda item: item[1])])
        yield (
            f"the tokenizer has {listed} beyond the model's vocab_size {vocab_size}: never an answer, and refused in "
            "a prompt"
        )


def _around(loaded: Any) -> Iterator[str]:
    """A note where something else than one BOS is put around a text: no other client does that."""
    plain, text = loaded.encode("a", add_special_tokens=False), loaded.encode("a")
    start = next((i for i in range(len(text)) if text[i : i + len(plain)] == plain), 0)
    before, behind = text[:start], text[start + len(plain) :]
    if before not in ([], [loaded.bos_token_id]) or behind:
        before_text, behind_text = (repr(loaded.decode(part)) for part in (before, behind))
        bos = "BOS" if adds_bos(loaded) else "nothing"
        yield (
            f"tokenizer.json puts {before_text} before and {behind_text} behind a text, not BOS alone; "
            f"onnxruntime-genai and ExecuTorch put {bos} before it"
        )


def _example(loaded: Any) -> str | None:
    """The question of model cards as the chat template writes it, on a fixed day; None: there is no template."""
    if not loaded.chat_template:
        return None
    return chat_template.render(
        loaded, chat_template.QUESTION, "the checkpoint's tokenizer", today=chat_template.FIXED_DAY
    )


def _require_chat_inside(loaded: Any, vocab_size: int, places: _Places) -> None:
    """Raises ExportError: the chat template writes a token that the model has no row for."""
    if not loaded.chat_template:
        return
    for number in chat_template.token_ids(loaded, chat_template.HELLO, "the checkpoint's tokenizer"):
        if number >= vocab_size:
            raise ExportError(
                f"{places.of('tokenizer.json')}: the chat template writes {loaded.convert_ids_to_tokens(number)!r}, "
                f"id {number}, but the model's vocab_size is {vocab_size}; resize the model to its tokenizer "
                "(`resize_token_embeddings`)"
            )


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
