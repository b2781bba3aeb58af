"""The byte-level BPE tokenizer inside a GGUF file as Hugging Face tokenizer files.

Pre-tokenizers as in llama.cpp's `llama-vocab.cpp`.
"""

from pathlib import Path
from typing import Any

from export.checkpoints.tokenizer import END_OF_ANSWER, begin_with, save, write_generation_ids
from export.errors import ExportError

from .header import Metadata

_PRE_TOKENIZERS = ("smollm", "llama-bpe", "llama3", "gpt-2")
_LLAMA3 = ("llama-bpe", "llama3")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of `gguf.TokenType`."""


def write(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, its config with the chat template, and generation defaults."""
    tokens = metadata.array("tokenizer.ggml.tokens", str)
    bos, eos = (_special_id(metadata, kind, len(tokens)) for kind in ("bos", "eos"))
    tokenizer = _tokenizer(metadata, tokens, bos)
    template = metadata.get("tokenizer.chat_template", str, "")
    save(tokenizer, folder, (_special(tokens[bos]), _special(tokens[eos])), template)
    write_generation_ids(folder, bos, _ends(metadata, tokens, eos))


def _special_id(metadata: Metadata, kind: str, count: int, default: int | None = None) -> int:
    key = f"tokenizer.ggml.{kind}_token_id"
    if not 0 <= (token := metadata.get(key, int, default)) < count:
        raise ExportError(f"{metadata.path}: metadata key {key} is {token}, the file has {count} tokens")
    return token


def _ends(metadata: Metadata, tokens: list[str], eos: int) -> int | list[int]:
    """Every token that ends an answer: up to three keys name one, Llama 3's chat has three (llama.cpp's loader)."""
    ends = {eos, *(_special_id(metadata, kind, len(tokens), eos) for kind in ("eot", "eom"))}
    if _pre_tokenizer_name(metadata) in _LLAMA3:
        ends |= {tokens.index(end) for end in END_OF_ANSWER if end in tokens}
    return sorted(ends) if len(ends) > 1 else eos


def _special(token: str) -> Any:
    """A token that is matched in text before normalization."""
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def _tokenizer(metadata: Metadata, tokens: list[str], bos: int) -> Any:
    """Vocabulary, merges, pre-tokenizer and added tokens."""
    from tokenizers import AddedToken, decoders

    pre = _pre_tokenizer_name(metadata)
    tokenizer = _bpe(metadata, tokens, ignore_merges=pre in _LLAMA3)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.array("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise ExportError(f"{metadata.path}: {len(tokens)} tokens, but tokenizer.ggml.token_type has {len(kinds)}")
    typed = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([_special(token) for token, kind in typed if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == _USER_DEFINED])
    if metadata.get("tokenizer.ggml.add_bos_token", bool, pre in _LLAMA3):
        tokenizer.post_processor = begin_with(tokens[bos], bos)
    return tokenizer


def _pre_tokenizer_name(metadata: Metadata) -> str:
    """Raises ExportError: a splitting rule that is not read."""
    kind, pre = metadata.get("tokenizer.ggml.model", str), metadata.get("tokenizer.ggml.pre", str, "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ExportError(
            f"{metadata.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            "give a Hugging Face folder with tokenizer.json"
        )
    return pre


def _bpe(metadata: Metadata, tokens: list[str], *, ignore_merges: bool) -> Any:
    """`ignore_merges`: a word that is a token stays whole, whatever the merges would give, as in Llama 3."""
    from tokenizers import Tokenizer, models

    merges = [
        (left, right)
        for merge in metadata.array("tokenizer.ggml.merges", str)
        for left, _, right in [merge.partition(" ")]
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ExportError(f"{metadata.path}: {len(tokens) - len(vocab)} of its tokens are there twice")
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"{metadata.path}: its tokens and merges do not fit together ({error})") from None


def _pre_tokenizer(pre: str) -> Any:
    """How text is split before BPE."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _LLAMA3)
    if pre == "smollm":  # LLAMA_VOCAB_PRE_TYPE_SMOLLM: every digit on its own
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if pre in _LLAMA3:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"), byte_level])
    return byte_level
