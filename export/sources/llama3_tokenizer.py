"""Meta's `tokenizer.model` of Llama 3 (tiktoken ranks) as Hugging Face tokenizer files. Knows nothing about weights.

Special tokens and split pattern as in llama-models `llama3/tokenizer.py`, turns as in its `chat_format.py`.
"""

import json
from pathlib import Path

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
    """Write tokenizer.json, its config with the chat template, and generation defaults."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(str(tokenizer_model), extra_special_tokens=list(SPECIAL)).converted()
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
