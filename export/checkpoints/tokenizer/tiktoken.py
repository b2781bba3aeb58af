"""Llama 3's tokenizer.model, and other tokenizers that come without Hugging Face files, as these files."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from export.errors import ExportError

_MAX_BYTES, _MAX_TOKEN_BYTES = 2**24, 512
"""Of tokenizer.model and of a token; Llama 3's are 2.2 MB and 128 bytes."""
_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)  # fmt: skip
END_OF_ANSWER = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
CHAT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def write_tiktoken(tokenizer_model: Path, folder: Path) -> None:
    """Write tokenizer.json, its config with the chat template, and generation defaults.

    Raises ExportError: no such file, or not one of Llama 3's kind.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """tiktoken's own reader caches by path, and would return the contents of a file that has been replaced."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return _read_ranks(Path(tiktoken_url))

    tokenizer = Converter(str(tokenizer_model), extra_special_tokens=list(_SPECIAL)).converted()
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = begin_with(bos, tokenizer.token_to_id(bos))
    save(tokenizer, folder, (bos, "<|eot_id|>"), CHAT_TEMPLATE)
    ends = [tokenizer.token_to_id(token) for token in END_OF_ANSWER]
    write_generation_ids(folder, tokenizer.token_to_id(bos), ends)


def begin_with(token: str, token_id: int) -> Any:
    """A post-processor that puts `token` before every text."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def save(tokenizer: Any, folder: Path, bos_and_eos: tuple[Any, Any], template: str) -> None:
    """tokenizer.json and its config, of a `tokenizers.Tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    bos, eos = bos_and_eos
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def write_generation_ids(folder: Path, bos: int, eos: int | list[int]) -> None:
    """generation_config.json."""
    text = json.dumps({"bos_token_id": bos, "eos_token_id": eos}, indent=2)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token → rank, from lines of base64 and number; ranks count up from 0."""
    if not path.is_file():
        raise ExportError(f"{path}: missing; it belongs to the weights, copy it beside them")
    if path.stat().st_size > _MAX_BYTES:
        raise ExportError(f"{path}: larger than {_MAX_BYTES} bytes, which no tokenizer of Llama 3 is")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            fits = int(rank) == number and token not in ranks and 0 < len(token) <= _MAX_TOKEN_BYTES
        except (ValueError, binascii.Error):
            fits = False
        if not fits:
            raise ExportError(f"{path}: line {number + 1} is no token and rank; it is not a tokenizer of Llama 3")
        ranks[token] = number
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ExportError(f"{path}: not every byte is a token; it is not a tokenizer of Llama 3")
    return ranks
