"""Meta's `tokenizer.model` of Llama 3 (tiktoken ranks) as Hugging Face tokenizer files. Knows nothing about weights.

Special tokens and split pattern as in llama-models `llama3/tokenizer.py`, turns as in its `chat_format.py`.
"""

import base64
import binascii
import json
from pathlib import Path

from ..errors import ExportError

MAX_BYTES, MAX_TOKEN_BYTES = 2**24, 512
"""Of the file and of a token; Llama 3's are 2.2 MB and 128 bytes."""
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
END_OF_ANSWER = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
CHAT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def write(tokenizer_model: Path, folder: Path) -> None:
    """Write tokenizer.json, its config with the chat template, and generation defaults.

    Raises ExportError: no such file, or not one of Llama 3's kind.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """tiktoken's own reader goes by the path alone: it would find another file that once lay there."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_ranks(Path(tiktoken_url))

    tokenizer = Converter(str(tokenizer_model), extra_special_tokens=list(SPECIAL)).converted()
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",  # noqa: S106  (a token of text, not a secret)
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    ids = {
        "bos_token_id": tokenizer.token_to_id(bos),
        "eos_token_id": [tokenizer.token_to_id(token) for token in END_OF_ANSWER],
    }
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token → rank, out of lines of base64 and number; ranks count up from 0."""
    if not path.is_file():
        raise ExportError(f"{path}: missing; it belongs to the weights, copy it beside them")
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f"{path}: larger than {MAX_BYTES} bytes, which no tokenizer of Llama 3 is")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            fits = int(rank) == number and token not in ranks and 0 < len(token) <= MAX_TOKEN_BYTES
        except (ValueError, binascii.Error):
            fits = False
        if not fits:
            raise ExportError(f"{path}: line {number + 1} is no token and rank; it is not a tokenizer of Llama 3")
        ranks[token] = number
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ExportError(f"{path}: not every byte is a token; it is not a tokenizer of Llama 3")
    return ranks
