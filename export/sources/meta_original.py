"""Meta's own files (`original/` of a Llama 3 repository): params.json, consolidated.00.pth, tokenizer.model.

Names and shapes as in llama-models `llama3/model.py` and `args.py`. Meta rotates interleaved pairs, Hugging Face
halves: rows of q and k are put in Hugging Face's order.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from ..errors import ExportError
from ..plan import Architecture, PositiveNumber, RopeScaling, Strict, explain
from . import llama3_tokenizer, torch_zip
from .row_order import in_hugging_face_order
from .safetensors_files import FLOATS, read_json

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LAYER_TENSOR = re.compile(r"layers\.(?P<index>0|[1-9]\d*)\.(?P<module>[\w.]+)\.weight")
UNUSED = "rope.freqs"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 8192
"""Rows of head and embedding compared at a time."""
ORIGINAL_LENGTH, SCALED_LENGTH = 8192, 131072
"""Context lengths of Llama 3, and of 3.1 and 3.2; params.json does not say them."""
FACTOR_3_1, FACTOR_3_2 = 8.0, 32.0
"""Nor this: 3.1 slows the lowest frequencies 8 times, 3.2 32 times. Of the two, only 3.2 has tied heads."""


Count = Annotated[int, Field(gt=0, le=2**24)]


class Params(Strict):
    """params.json of Llama 3, 3.1 and 3.2 text models."""

    dim: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = None
    vocab_size: Count
    multiple_of: Count = 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=64)] | None = None
    norm_eps: PositiveNumber
    rope_theta: PositiveNumber
    use_scaled_rope: bool = False
    # four that ExecuTorch's llama example adds
    head_dim: Count | None = None
    hidden_dim: Count | None = None
    rope_scale_factor: PositiveNumber | None = None
    high_freq_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0

    @property
    def ffn_dim(self) -> int:
        """Meta's rule: two thirds of 4·dim, times a factor, rounded up (`FeedForward` in llama3/model.py)."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        size = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            size = int(self.ffn_dim_multiplier * size)
        return -(-size // self.multiple_of) * self.multiple_of


class MetaSource:
    """One folder of Meta's, its weights mapped anew for each tensor read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = read_params(folder / "params.json")
        self._path = the_only_part(folder)
        torch_zip.check(self._path)
        self._stored = self._names()
        self.files = (folder / "params.json", self._path)

    @property
    def description(self) -> str:
        head = "tied head" if self.architecture.tie_word_embeddings else "head of its own"
        return f"Meta's consolidated.00.pth, {len(self._stored)} tensors, {head}"

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self._params, self.folder / "params.json", tied=self._tied())

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        tensors = self._load()
        left_out = HEAD if self.architecture.tie_word_embeddings else ""
        return {name: tuple(tensors[stored].shape) for name, stored in self._stored.items() if name != left_out}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        if tensor.dtype not in FLOATS:
            raise ExportError(f"{self._path}: tensor {self._stored[name]} is {tensor.dtype}; only floats are read")
        values: torch.Tensor = tensor.to(torch.float32, copy=True)
        return in_hugging_face_order(name, values, self.architecture)

    def integers(self, name: str) -> None:
        """As in `Source`: floats."""

    def write_tokenizer(self, folder: Path) -> None:
        llama3_tokenizer.write(self.folder / "tokenizer.model", folder)

    def _names(self) -> dict[str, str]:
        """Hugging Face's name → Meta's. Another name may mean another order of rows."""
        found = {name: hugging_face_name(name) for name in self._load() if name != UNUSED}
        for name, ours in found.items():
            if ours is None:
                raise ExportError(f"{self._path}: tensor {name:.80} is not one of Meta's text models of Llama 3")
        return {ours: name for name, ours in found.items() if ours is not None}

    def _load(self) -> dict[str, torch.Tensor]:
        return torch_zip.load(self._path)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._load()[self._stored[name]]

    def _tied(self) -> bool:
        """Meta writes a tied head again; compared piece by piece, so that neither is in memory as a whole.

        Raises ExportError: equal but for a few rows, which no model is.
        """
        if HEAD not in self._stored or EMBEDDING not in self._stored:
            return True
        head, embedding = self._tensor(HEAD), self._tensor(EMBEDDING)
        if head.shape != embedding.shape or head.dtype != embedding.dtype or head.ndim != 2:
            return False
        rows = len(head)
        del head, embedding
        equal = sum(self._equal_rows(start) for start in range(0, rows, COMPARED_ROWS))
        if rows // 2 < equal < rows:
            raise ExportError(
                f"{self._path}: output.weight equals tok_embeddings.weight but for {rows - equal} of {rows} rows; the "
                "file is damaged, download it again"
            )
        return equal == rows

    def _equal_rows(self, start: int) -> int:
        head, embedding = (self._tensor(name)[start : start + COMPARED_ROWS] for name in (HEAD, EMBEDDING))
        return int((head == embedding).all(dim=1).sum())


def the_only_part(folder: Path) -> Path:
    """consolidated.00.pth, if there is no other."""
    parts = sorted(path for path in folder.glob("consolidated.*.pth") if path.is_file())
    if not parts:
        raise ExportError(f"{folder / 'consolidated.00.pth'}: missing, but params.json is there; download it too")
    if len(parts) > 1:
        raise ExportError(
            f"{folder}: {len(parts)} consolidated.*.pth, the parts of a model split for several GPUs, are not joined; "
            "give the Hugging Face folder of this model"
        )
    return parts[0]


def read_params(path: Path) -> Params:
    """params.json, strictly: a key we do not know may change what the model computes."""
    try:
        return Params.model_validate(read_json(path))
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}; read are Meta's bfloat16 text models of Llama 3") from None


def architecture_of(params: Params, path: Path, *, tied: bool) -> Architecture:
    """Shapes and RoPE scaling. Raises ExportError: numbers that no model has."""
    if params.head_dim is None and params.dim % params.n_heads:
        raise ExportError(f"{path}: n_heads {params.n_heads} does not divide dim {params.dim}")
    fields: dict[str, Any] = {
        "vocab_size": params.vocab_size,
        "hidden_size": params.dim,
        "intermediate_size": params.ffn_dim,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "head_dim": params.head_dim or params.dim // params.n_heads,
        "rope_theta": params.rope_theta,
        "rope_scaling": rope_scaling(params, tied=tied),
        "rms_norm_eps": params.norm_eps,
        "tie_word_embeddings": tied,
        "max_position_embeddings": SCALED_LENGTH if params.use_scaled_rope else ORIGINAL_LENGTH,
    }
    try:
        return Architecture(**fields)
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}") from None


def rope_scaling(params: Params, *, tied: bool) -> RopeScaling | None:
    """Llama 3.1's or 3.2's numbers."""
    if not params.use_scaled_rope:
        return None
    return RopeScaling(
        factor=params.rope_scale_factor or (FACTOR_3_2 if tied else FACTOR_3_1),
        low_freq_factor=1.0,
        high_freq_factor=params.high_freq_factor,
        original_max_position_embeddings=ORIGINAL_LENGTH,
    )


def hugging_face_name(name: str) -> str | None:
    """`layers.3.attention.wq.weight` → `model.layers.3.self_attn.q_proj.weight`; None for a name that is not Meta's."""
    match = LAYER_TENSOR.fullmatch(name)
    if match and match["module"] in LAYER_NAMES:
        return f"model.layers.{match['index']}.{LAYER_NAMES[match['module']]}.weight"
    return NAMES.get(name)
