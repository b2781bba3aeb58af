"""Meta's own folder: params.json, tokenizer.model, and consolidated.00.pth, a file that `torch.save` wrote.

`torch.load(weights_only=True)` executes no foreign code, but lets a pickle allocate any amount of memory
(`bytearray(2**40)`). So the pickle's opcodes are listed first, and only what a dictionary of float tensors needs is let
through; the tensors are then memory-mapped.
"""

import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from export.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture, PositiveNumber, RopeScaling, Strict
from export.errors import ExportError, explain

from . import tokenizer
from .files import first_bytes, missing, require_contents, require_inside
from .integers import in_hugging_face_order
from .origin import tokenizer_files
from .safetensors import FLOATS, read_json

NAMES = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": FINAL_NORM,
    "output.weight": HEAD,
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
_LAYER_TENSOR = re.compile(r"layers\.(?P<index>0|[1-9]\d*)\.(?P<module>[\w.]+)\.weight")
_UNUSED = "rope.freqs"
_COMPARED_ROWS = 8192
"""Rows of head and embedding compared at a time."""
ORIGINAL_LENGTH, _SCALED_LENGTH = 8192, 131072
"""Context lengths of Llama 3, and of 3.1 and 3.2, which params.json does not hold."""
_FACTOR_3_1, _FACTOR_3_2 = 8.0, 32.0
"""Nor does it hold these: 3.1 slows the lowest frequencies 8 times, 3.2 32 times. Only 3.2 has tied heads."""
_Count = Annotated[int, Field(gt=0, le=2**24)]


class Params(Strict):
    """params.json of Llama 3, 3.1 and 3.2 text models."""

    dim: _Count
    n_layers: _Count
    n_heads: _Count
    n_kv_heads: _Count | None = None
    vocab_size: Annotated[int, Field(ge=-1, le=2**24)]
    """−1: as many as the embedding has rows, as Meta's own code fills it in."""
    multiple_of: _Count = 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=64)] | None = None
    norm_eps: PositiveNumber
    rope_theta: PositiveNumber
    use_scaled_rope: bool = False
    # four that ExecuTorch's llama example adds
    head_dim: _Count | None = None
    hidden_dim: _Count | None = None
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
    """One of Meta's folders. Its weights are mapped anew for each tensor, so that no read page stays resident."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = _read_params(folder / "params.json")
        self._path = _the_only_part(folder)
        check(self._path)
        self._stored = self._names()
        self.stated_ids: Mapping[str, Mapping[str, Any]] = {}
        self.files = (folder / "params.json", self._path, *tokenizer_files(folder))
        require_inside(self.files, folder)
        self.notes = ()

    @property
    def description(self) -> str:
        head = "tied head" if self.architecture.tie_word_embeddings else "head of its own"
        return f"Meta's consolidated.00.pth, {len(self._stored)} tensors, {head}"

    @cached_property
    def architecture(self) -> Architecture:
        params, embedding = self._params, self._tensor(EMBEDDING).shape if EMBEDDING in self._stored else ()
        if params.vocab_size < 0 and embedding:
            params = params.model_copy(update={"vocab_size": embedding[0]})
        return architecture_of(params, self.folder / "params.json", tied=self._tied())

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        tensors = load(self._path)
        left_out = HEAD if self.architecture.tie_word_embeddings else ""
        return {name: tuple(tensors[stored].shape) for name, stored in self._stored.items() if name != left_out}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        if tensor.dtype not in FLOATS:
            raise ExportError(f"{self._path}: tensor {self._stored[name]} is {tensor.dtype}; only floats are read")
        values: torch.Tensor = tensor.to(torch.float32, copy=True)
        return in_hugging_face_order(name, values, self.architecture)

    def integers(self, name: str) -> None:
        """None: they are floats."""

    def write_tokenizer(self, folder: Path) -> None:
        tokenizer.write_tiktoken(self.folder / "tokenizer.model", folder)

    def _names(self) -> dict[str, str]:
        """Hugging Face's name → Meta's. Unknown names are refused: they may go with a different order of rows."""
        names: dict[str, str] = {}
        for name in load(self._path):
            if name != _UNUSED:
                if (ours := _hugging_face_name(name)) is None:
                    raise ExportError(f"{self._path}: tensor {name:.80} is not one of Meta's text models of Llama 3")
                names[ours] = name
        return names

    def _tensor(self, name: str) -> torch.Tensor:
        return load(self._path)[self._stored[name]]

    def _tied(self) -> bool:
        """Meta's files repeat a tied head; compared in blocks of rows, so that neither is in memory as a whole.

        Raises ExportError: equal except for a few rows, which is damage.
        """
        if HEAD not in self._stored or EMBEDDING not in self._stored:
            return True
        head, embedding = self._tensor(HEAD), self._tensor(EMBEDDING)
        if head.shape != embedding.shape or head.dtype != embedding.dtype or head.ndim != 2:
            return False
        rows = len(head)
        del head, embedding
        equal = sum(self._equal_rows(start) for start in range(0, rows, _COMPARED_ROWS))
        if rows // 2 < equal < rows:
            raise ExportError(
                f"{self._path}: output.weight equals tok_embeddings.weight but for {rows - equal} of {rows} rows; the "
                "file is damaged, download it again"
            )
        return equal == rows

    def _equal_rows(self, start: int) -> int:
        head, embedding = (self._tensor(name)[start : start + _COMPARED_ROWS] for name in (HEAD, EMBEDDING))
        return int((head == embedding).all(dim=1).sum())


def _the_only_part(folder: Path) -> Path:
    """consolidated.00.pth. Raises ExportError: it is missing, or one of several."""
    parts = sorted(path for path in folder.glob("consolidated.*.pth") if path.is_file())
    if not parts:
        others = [path.name for path in sorted(folder.glob("*.pth"))]
        hint = f"rename {others[0]} if it is the model's only file" if others else "download it too"
        raise missing(folder / "consolidated.00.pth", f", but params.json is there; {hint}")
    if len(parts) > 1:
        raise ExportError(
            f"{folder}: {len(parts)} consolidated.*.pth, the parts of a model split for several GPUs, are not joined; "
            "give the Hugging Face folder of this model"
        )
    return parts[0]


def _read_params(path: Path) -> Params:
    """Raises ExportError: also for an unknown key, which may change what the model computes."""
    try:
        return Params.model_validate(read_json(path))
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}; read are Meta's bfloat16 text models of Llama 3") from None


def architecture_of(params: Params, path: Path, *, tied: bool) -> Architecture:
    """Shapes and RoPE scaling. Raises ExportError: numbers that no model has."""
    if params.head_dim is None and params.dim % params.n_heads:
        raise ExportError(f"{path}: n_heads {params.n_heads} does not divide dim {params.dim}")
    try:
        return Architecture(
            vocab_size=params.vocab_size,
            hidden_size=params.dim,
            intermediate_size=params.ffn_dim,
            num_hidden_layers=params.n_layers,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads or params.n_heads,
            head_dim=params.head_dim or params.dim // params.n_heads,
            rope_theta=params.rope_theta,
            rope_scaling=_rope_scaling(params, tied=tied),
            rms_norm_eps=params.norm_eps,
            tie_word_embeddings=tied,
            max_position_embeddings=_SCALED_LENGTH if params.use_scaled_rope else ORIGINAL_LENGTH,
        )
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}") from None


def _rope_scaling(params: Params, *, tied: bool) -> RopeScaling | None:
    """Llama 3.1's or 3.2's numbers."""
    if not params.use_scaled_rope:
        return None
    return RopeScaling(
        factor=params.rope_scale_factor or (_FACTOR_3_2 if tied else _FACTOR_3_1),
        low_freq_factor=1.0,
        high_freq_factor=params.high_freq_factor,
        original_max_position_embeddings=ORIGINAL_LENGTH,
    )


def _hugging_face_name(name: str) -> str | None:
    """`layers.3.attention.wq.weight` → `model.layers.3.self_attn.q_proj.weight`; None for a name that is not Meta's."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match and match["module"] in LAYER_NAMES:
        return f"model.layers.{match['index']}.{LAYER_NAMES[match['module']]}.weight"
    return NAMES.get(name)


# ── the file that torch.save wrote ────────────────────────────────────────────────────────────────────────────────────

_OLD_FORM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of `torch.save` begins that is no zip archive: a pickle of its magic number."""
_SAVE_AGAIN = "load it with torch and save it again, or give the model's Hugging Face folder"
_MAX_DIRECTORY_BYTES = 2**24
"""Of the archive's list of records; a model of 1024 layers needs a tenth."""
_MAX_PICKLE_BYTES = 2**21
_STORAGES = {f"torch {kind}Storage" for kind in ("BFloat16", "Half", "Float", "Double")}
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", *_STORAGES}
_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"}
"""Opcodes that construct objects in other ways; `torch.save` of tensors writes none."""
_END, _END64_LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56


_DAMAGE = (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError)
"""What `zipfile` raises where bytes are wrong. It says NotImplementedError where they name a version of the format or a
compression that it cannot read, which `torch.save` never writes: one flipped bit does."""


class _BrokenError(Exception):
    """What is wrong with the file."""


def check(path: Path) -> None:
    """Before torch opens it. Raises ExportError: not a plain dictionary of float tensors."""
    require_contents(path)
    if first_bytes(path).startswith(_OLD_FORM):
        raise ExportError(f"{path}: written by `torch.save` in its form before 1.6, which is not read; {_SAVE_AGAIN}")
    try:
        if _directory_bytes(path) > _MAX_DIRECTORY_BYTES:
            raise _BrokenError(f"its list of records is longer than {_MAX_DIRECTORY_BYTES} bytes")
        with zipfile.ZipFile(path) as archive:
            _check_pickle(_pickle_of(archive))
    except (_BrokenError, *_DAMAGE) as error:
        raise _damaged(path, error) from None


def load(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor in memory that stays mapped as long as one of them lives. Call `check` first."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the damaged bytes lead to
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict) or not tensors:
        raise _damaged(path, "it holds no dictionary of tensors")
    for name, tensor in tensors.items():
        if isinstance(tensor, dict):
            raise ExportError(f"{path}: holds the tensors inside its entry {name!r:.60}; save that entry alone")
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _damaged(path, f"its entry {name!r:.60} is no tensor")
    return tensors


def _directory_bytes(path: Path) -> int:
    """Size of the zip archive's central directory, as the end of the file states it (APPNOTE.TXT 4.3.14 to 4.3.16)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
        tail = file.read()
        end, locator = tail[-_END_BYTES:], tail[: -_END_BYTES or None]
        if not end.startswith(_END) or len(end) < _END_BYTES:
            raise _BrokenError("it does not end as a zip archive of torch.save does")
        if not locator.startswith(_END64_LOCATOR):
            return int(struct.unpack_from("<I", end, 12)[0])
        at = struct.unpack_from("<Q", locator, 8)[0]
        file.seek(min(at, size))
        end64 = file.read(_END64_BYTES)
        if not end64.startswith(_END64):
            raise _BrokenError("the end of its zip archive is damaged")
        return int(struct.unpack_from("<Q", end64, 40)[0])


def _pickle_of(archive: zipfile.ZipFile) -> bytes:
    """The one pickle inside. Raises _BrokenError: not one, or records that cannot be mapped as they are."""
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise _BrokenError(f"record {record.filename!r:.60} is compressed")
    # torch's reader does not tell capitals from others: it would open the first of two, perhaps not the one checked
    names = [record.filename.lower() for record in archive.infolist()]
    if len(set(names)) < len(names):
        raise _BrokenError("it holds records under one name, or under names that differ in capitals only")
    pickles = [record for record in archive.infolist() if record.filename.lower().endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise _BrokenError(
            f"it holds {len(pickles)} pickles data.pkl of at most {_MAX_PICKLE_BYTES} bytes, expected one"
        )
    for record in archive.infolist():
        if record.filename.lower().endswith("/byteorder") and (
            record.file_size > 16 or archive.read(record) != b"little"
        ):
            raise _BrokenError("its numbers are not little-endian")
    return archive.read(pickles[0])


def _check_pickle(data: bytes) -> None:
    """Only what names and tensors need; the opcodes are listed, not run."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _FORBIDDEN or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
            target = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else opcode.name
            raise _BrokenError(f"its pickle asks for {target:.60}, which no dictionary of float tensors needs")


def _damaged(path: Path, reason: object) -> ExportError:
    text = " ".join(str(reason).split())[:200] or type(reason).__name__
    return ExportError(f"{path}: not a checkpoint that is loaded ({text}); download it again or give safetensors")
