"""Random weights from a seed, for tests and for full-size trials without a checkpoint."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export.architecture import EMBEDDING, Architecture
from export.errors import ExportError

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class SeededSource:
    """Weights drawn by tensor name: each is the same whatever is read before it."""

    def __init__(self, seed: str, architecture: Architecture) -> None:
        self.seed = seed
        self.architecture = architecture
        self.description = f"random weights, seed {seed}"
        self.files = ()
        self.notes = ()
        self.stated_ids: Mapping[str, Mapping[str, Any]] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.architecture.tensor_shapes()

    def read(self, name: str) -> torch.Tensor:
        """N(0, 1/in_features), the usual initialization; norms 1 ± 0.1.

        The layers' outputs are larger than the embedding, or a tied head would predict every token again.
        """
        shape = self.shapes[name]
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        values: torch.Tensor = torch.randn(
            shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        )
        if "norm" in name:
            return 1 + 0.1 * values
        if name == EMBEDDING:
            return 0.2 * values
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return values * (4 / math.sqrt(shape[-1]))
        return values / math.sqrt(shape[-1])

    def integers(self, name: str) -> None:
        """None: they are floats."""

    def write_tokenizer(self, folder: Path) -> None:
        """A byte-level tokenizer with Llama-like special tokens; needs a vocabulary of at least 261."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
        tokenizer.add_special_tokens(special)
        if tokenizer.get_vocab_size() > self.architecture.vocab_size:
            raise ExportError(
                f"vocab_size {self.architecture.vocab_size}: the byte tokenizer needs {tokenizer.get_vocab_size()}"
            )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|begin|>",  # noqa: S106  (a token of text, not a secret)
            eos_token="<|end|>",  # noqa: S106
            chat_template=_CHAT_TEMPLATE,
        )
        fast.save_pretrained(folder)
