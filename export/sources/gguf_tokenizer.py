"""The byte-level BPE tokenizer inside a GGUF file as Hugging Face tokenizer files. Knows nothing about weights.

Pre-tokenizers as in llama.cpp's `llama-vocab.cpp`.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .gguf_metadata import Metadata
from .llama3_tokenizer import END_OF_ANSWER

PRE_TOKENIZERS = ("smollm", "llama-bpe", "llama3", "gpt-2")
LLAMA3 = ("llama-bpe", "llama3")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4
"""Token types of `gguf.TokenType`."""


def write(metadata: Metadata, folder: Path) -> None:
    """Write tokenizer.json, its config with the chat template, and generation defaults."""
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.texts("tokenizer.ggml.tokens")
    ids = {kind: special_id(metadata, kind, len(tokens)) for kind in ("bos", "eos")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(metadata, tokens, ids["bos"]),
        bos_token=special(tokens[ids["bos"]]),
        eos_token=special(tokens[ids["eos"]]),
        chat_template=metadata.get("tokenizer.chat_template", str, ""),
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends(metadata, tokens, ids["eos"])}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def special_id(metadata: Metadata, kind: str, count: int) -> int:
    """Id of the token that begins or ends a sequence."""
    key = f"tokenizer.ggml.{kind}_token_id"
    if not 0 <= (token := metadata.get(key, int)) < count:
        raise ExportError(f"{metadata.path}: metadata key {key} is {token}, the file has {count} tokens")
    return token


def ends(metadata: Metadata, tokens: list[str], eos: int) -> int | list[int]:
    """Every token that ends an answer: the file names one, Llama 3's chat has three, as in llama.cpp's loader."""
    if pre_tokenizer_name(metadata) not in LLAMA3:
        return eos
    return sorted({eos, *(tokens.index(end) for end in END_OF_ANSWER if end in tokens)})


def special(token: str) -> Any:
    """A token that is matched in text as it stands."""
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def tokenizer(metadata: Metadata, tokens: list[str], bos: int) -> Any:
    """Vocabulary, merges, pre-tokenizer and added tokens."""
    from tokenizers import AddedToken, decoders, processors

    pre = pre_tokenizer_name(metadata)
    made = bpe(metadata, tokens, ignore_merges=pre in LLAMA3)
    made.pre_tokenizer = pre_tokenizer(pre)
    made.decoder = decoders.ByteLevel()
    kinds = metadata.numbers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ExportError(f"{metadata.path}: {len(tokens)} tokens, but tokenizer.ggml.token_type has {len(kinds)}")
    typed = list(zip(tokens, kinds, strict=True))
    made.add_special_tokens([special(token) for token, kind in typed if kind == CONTROL])
    made.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED])
    if metadata.get("tokenizer.ggml.add_bos_token", bool, pre in LLAMA3):
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return made


def pre_tokenizer_name(metadata: Metadata) -> str:
    """The splitting rule the file names, refused when it is not one of ours."""
    kind, pre = metadata.get("tokenizer.ggml.model", str), metadata.get("tokenizer.ggml.pre", str, "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ExportError(
            f"{metadata.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            "give a Hugging Face folder with tokenizer.json"
        )
    return pre


def bpe(metadata: Metadata, tokens: list[str], *, ignore_merges: bool) -> Any:
    """The model; Llama 3 takes a word that is a token as it is, whatever the merges give."""
    from tokenizers import Tokenizer, models

    merges = [
        (left, right) for merge in metadata.texts("tokenizer.ggml.merges") for left, _, right in [merge.partition(" ")]
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ExportError(f"{metadata.path}: {len(tokens) - len(vocab)} of its tokens are there twice")
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"{metadata.path}: its tokens and merges do not fit together ({error})") from None


def pre_tokenizer(pre: str) -> Any:
    """How text is cut before BPE."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in LLAMA3)
    if pre == "smollm":  # LLAMA_VOCAB_PRE_TYPE_SMOLLM: every digit on its own
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if pre in LLAMA3:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"), byte_level])
    return byte_level
