"""manifest.json: the artifact describes itself. No torch; nothing is ever parsed from a file name.

Holds no time and no machine, so that the same inputs give the same bytes.
"""

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from .contract import IOContract, TokenizerIds
from .errors import ExportError
from .plan import Architecture, Levels, Plan, Strict, explain

FILE = "manifest.json"
CARD = "README.md"
SIGNATURE = "model.sig"
TOOLS = ("torch", "torchao", "executorch", "coremltools", "onnx", "onnxruntime", "onnxruntime-genai", "transformers")
ROOT = Path(__file__).parent.parent
SMALLEST_FLOAT_BITS = 15.5
"""Per weight; bf16 has 16, less where two tensors share their numbers in the file."""


class FileInfo(Strict):
    """One file of the artifact."""

    sha256: str
    bytes: int


class CheckpointInfo(Strict):
    """Where the weights came from."""

    origin: str
    description: str
    bits_per_weight: float | None
    """Of its files, tokenizers in GGUF included; null: random weights."""
    sha256: dict[str, str]

    @property
    def quantized_before(self) -> bool:
        """Whether its numbers are fewer bits than any float's."""
        return self.bits_per_weight is not None and self.bits_per_weight < SMALLEST_FLOAT_BITS


class LayerInfo(Strict):
    """One quantized weight and what rounding did to it."""

    name: str
    bits: Literal[4, 8]
    group_size: int
    levels: Levels = "even"
    sqnr_db: float
    max_abs_error: float
    kept: bool
    """The integers are the checkpoint's own; the error is that of rounding their scales to bf16, if they were."""
    not_kept: str | None
    """Why the integers that the checkpoint holds were not kept; None: they were, or it holds floats."""


class Candidate(Strict):
    """A linear that may get more bits: why it did, or did not."""

    name: str
    kl: float
    """Estimated KL divergence of the model when this linear alone is rounded, nats per position."""
    promoted_kl: float
    """The same with more bits."""
    extra_bytes: int
    promoted: bool


class CalibrationInfo(Strict):
    """What the integers were chosen with, and what they lose."""

    texts: dict[str, str]
    """File → sha256."""
    tokens: int
    held_out_kl: float | None
    """Mean KL to the float model on windows of the same texts that were not calibrated with, nats."""
    candidates: tuple[Candidate, ...]
    """Best first: most KL saved per byte; empty where the recipe promotes nothing."""


class QuantizationInfo(Strict):
    """The one quantization all targets share."""

    key: str
    bits_per_weight: float
    layers: tuple[LayerInfo, ...]
    calibration: CalibrationInfo | None
    """None: no text was read."""

    @property
    def from_checkpoint(self) -> str | None:
        """How many weights are the checkpoint's own integers, in a line; None: it holds none."""
        return from_checkpoint(self.layers)


class SourceInfo(Strict):
    """Our own code that made the artifact."""

    commit: str
    dirty: bool
    sha256: str


class Manifest(Strict):
    """Everything a reader or a runner needs to know about an artifact folder."""

    schema_version: Literal[1]
    id: str
    plan: Plan
    architecture: Architecture
    checkpoint: CheckpointInfo
    quantization: QuantizationInfo
    contract: IOContract
    tokenizer: TokenizerIds
    lowering: dict[str, int | float | str]
    tools: dict[str, str]
    source: SourceInfo
    files: dict[str, FileInfo]
    """Every file but the manifest, the card, which validation rewrites, and the signature, which comes last."""

    @property
    def artifact_bytes(self) -> int:
        """Size of the model itself, without tokenizer files."""
        stem = self.plan.target.artifact
        return sum(info.bytes for name, info in self.files.items() if name.startswith(stem))


def from_checkpoint(layers: Sequence[LayerInfo]) -> str | None:
    """`kept the checkpoint's integers of 0 of 210 weights; not of 210: groups of 32 do not …`; None: it holds none."""
    kept = sum(layer.kept for layer in layers)
    reasons = Counter(layer.not_kept for layer in layers if layer.not_kept is not None)
    if not kept and not reasons:
        return None
    parts = [f"kept the checkpoint's integers of {kept} of {kept + reasons.total()} weights"]
    return "; ".join(parts + [f"not of {count}: {reason}" for reason, count in reasons.most_common()])


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    (folder / FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read an artifact folder's manifest, strictly."""
    path = folder / FILE
    if not path.is_file():
        raise ExportError(f"{path}: missing; give an artifact folder made by `python -m export`")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = explain(error)[:300]
        raise ExportError(f"{path}: damaged or of another version: {reason}; build the artifact again") from None


def digest(folder: Path) -> str:
    """sha256 of an artifact folder's manifest: which build it is."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def read_id(folder: Path) -> str | None:
    """Whose artifact a folder holds, even when another version of this code wrote it; None: it does not say."""
    try:
        fields = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return str(fields.get("id")) if isinstance(fields, dict) else None


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Every file present with its recorded size and sha256, and none beside them."""
    found = hash_files(folder)
    for name, info in manifest.files.items():
        if name not in found:
            raise ExportError(f"{folder / name}: missing; build the artifact again")
        if found[name] != info:
            raise ExportError(f"{folder / name}: differs from manifest.json (sha256); build the artifact again")
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise ExportError(f"{folder / extra[0]}: not listed in manifest.json; remove it or build again")


def hash_files(folder: Path) -> dict[str, FileInfo]:
    """Digest and size of every file below a folder but manifest, card and signature."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (FILE, CARD, SIGNATURE):
            found[name] = file_info(path)
    return found


def file_info(path: Path) -> FileInfo:
    """Digest and size of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(sha256=digest, bytes=path.stat().st_size)


def tool_versions() -> dict[str, str]:
    """Versions of the installed packages that decide the bytes."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def source_info() -> SourceInfo:
    """Git revision of this checkout and the hash of export/ as it is on disk."""
    return SourceInfo(
        commit=git("rev-parse", "HEAD") or "unknown",
        dirty=bool(git("status", "--porcelain")),
        sha256=source_sha256(),
    )


def source_sha256() -> str:
    """Of the code and the card templates; what configs/ says is in the resolved plan."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("export/**/*.py"), *ROOT.glob("export/**/*.j2")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git(*arguments: str) -> str:
    """Output of a git command in this checkout; empty where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True, timeout=20
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
