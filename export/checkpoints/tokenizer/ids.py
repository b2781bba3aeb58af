"""Special token ids of a checkpoint, joined from all places that state them; what disagrees is said."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoints import chat_template
from export.errors import ExportError

GENERATION = "generation_config.json"
_ANSWER, _NEXT = "Quokka", "Goodbye"
_CONVERSATION = (
    *chat_template.HELLO,
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
)
"""Two turns: what stands behind the first answer ends it."""


@dataclass(frozen=True)
class SpecialIds:
    """What every runtime is told, and what is remarkable about it."""

    bos: int | None
    eos: tuple[int, ...]
    """Sorted: every id that ends an answer."""
    pad: int | None
    notes: tuple[str, ...]


def join(loaded: Any, stated: Mapping[str, Mapping[str, Any]], vocab_size: int, config: str) -> SpecialIds:
    """Of a tokenizer (whose own are in the file `config`) and of place → fields `bos_token_id`, `eos_token_id` ….

    Raises ExportError: an id that is no token of the model, or no end token at all.
    """
    ends: dict[int, str] = {}
    if loaded.eos_token_id is not None:
        ends.setdefault(_token(loaded.eos_token_id, vocab_size, f"{config}: eos_token"), "eos_token")
    for place, fields in stated.items():
        value = fields.get("eos_token_id")
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            ends.setdefault(_token(number, vocab_size, f"{place}: eos_token_id"), Path(place).name)
    notes = [*_text_ends(loaded, ends), *_turn_end(loaded, ends)]
    if not ends:
        raise ExportError(f"{config}: the tokenizer has no end-of-sequence token; set eos_token there")
    bos, bos_notes = _one("bos", loaded, stated, vocab_size, config)
    pad, pad_notes = _one("pad", loaded, stated, vocab_size, config)
    return SpecialIds(bos, tuple(sorted(ends)), pad, (*notes, *bos_notes, *pad_notes))


def named(fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, int | None]:
    """`eos_token` and so on of a file beside tokenizer.json as `eos_token_id` …; None: not there, or no token."""
    texts = {kind: fields.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    texts = {kind: text.get("content") if isinstance(text, dict) else text for kind, text in texts.items()}
    return {f"{kind}_token_id": vocabulary.get(text) for kind, text in texts.items() if isinstance(text, str)}


def write(special: SpecialIds, loaded: Any, folder: Path) -> None:
    """The same ids in generation_config.json, and an eos_token for clients that read the tokenizer's alone."""
    path = folder / GENERATION
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = fields.get("eos_token_id", loaded.eos_token_id)
    if {*(eos if isinstance(eos, list) else [eos])} != {*special.eos}:
        fields |= {"eos_token_id": list(special.eos)} | ({} if special.bos is None else {"bos_token_id": special.bos})
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if loaded.eos_token_id is None:
        path = folder / "tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["eos_token"] = loaded.convert_ids_to_tokens(special.eos[0])
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token(number: Any, vocab_size: int, place: str) -> int:
    if type(number) is not int or not 0 <= number < vocab_size:
        raise ExportError(f"{place} {number!r:.40} is not one of {vocab_size} tokens; correct it")
    return number


def _text_ends(loaded: Any, ends: Mapping[int, str]) -> Iterator[str]:
    """Ends that any text may hold, as the defaults of a config.json that knows nothing of the tokenizer."""
    special = {*loaded.added_tokens_decoder, *loaded.all_special_ids}
    for number, place in ends.items():
        if number not in special:
            token = loaded.convert_ids_to_tokens(number)
            yield f"{place} ends answers at {number}, which is {token!r}, a token of ordinary text"


def _turn_end(loaded: Any, ends: dict[int, str]) -> Iterator[str]:
    """Add the token that the chat template ends an answer with; a note where it was no end, or is none."""
    if not loaded.chat_template:
        return
    try:
        text = chat_template.render(loaded, _CONVERSATION, "the checkpoint's tokenizer", add_generation_prompt=False)
    except ExportError as error:
        yield f"what ends an answer is unknown: {error}"
        return
    _, found, rest = text.partition(_ANSWER)
    rest = rest.partition(_NEXT)[0].strip()
    added = {str(token): number for number, token in loaded.added_tokens_decoder.items()}
    end = max((token for token in added if rest.startswith(token)), key=len, default=None)
    if not found:
        yield "what ends an answer is unknown: the chat template leaves out an earlier one"
    elif end is None:
        yield (
            f"the chat template ends an answer with {rest[:24]!r}, which is no single token: an answer may run on; "
            "stop at that text"
        )
    elif added[end] not in ends:
        ends[added[end]] = "chat template"
        yield f"the chat template ends an answer with {end!r}, which no other file calls an end; it is one here"


def _one(
    kind: str, loaded: Any, stated: Mapping[str, Mapping[str, Any]], vocab_size: int, config: str
) -> tuple[int | None, list[str]]:
    """BOS or pad: the tokenizer's, which transformers feeds, else the first that a file states; notes of others."""
    own = getattr(loaded, f"{kind}_token_id")
    found = [(config, own), *((place, fields.get(f"{kind}_token_id")) for place, fields in stated.items())]
    values = [(place, number) for place, number in found if number is not None]
    if kind == "pad":  # never fed: one that the model lacks (−1, or a token added for training) is none
        values = [(place, number) for place, number in values if type(number) is int and 0 <= number < vocab_size]
    for place, number in values:
        _token(number, vocab_size, f"{place}: {kind}_token_id")
    chosen = next((number for _, number in values), None)
    others = [f"{Path(place).name} says {number}" for place, number in values if number != chosen]
    return chosen, [f"{kind} is {chosen}, {kind}_token of the tokenizer; {', '.join(others)}"] if others else []
