"""manifest.json: what an artifact is, and the contract of what goes into and out of it. Sessions read it; no torch."""

import json
import os
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from export.architecture import Architecture, Strict
from export.errors import CHECKOUT, ExportError, absence, explain, kind
from export.host import digests, transit
from export.plan import FileName, Levels, Plan

from .contract import IOContract, KVLayout, TensorSpec, TokenizerIds

__all__ = [
    "CARD",
    "FILE",
    "PROVENANCE",
    "ROOT",
    "SIGNATURE",
    "TEMPLATES",
    "UNKNOWN",
    "CacheScales",
    "CalibrationInfo",
    "Candidate",
    "CheckpointInfo",
    "Commit",
    "FileInfo",
    "IOContract",
    "KVLayout",
    "LayerInfo",
    "Manifest",
    "QuantizationInfo",
    "SourceInfo",
    "TensorSpec",
    "TokenizerIds",
    "companions",
    "differing_files",
    "digest",
    "file_info",
    "files",
    "flat",
    "from_checkpoint",
    "git_is_silent",
    "hash_files",
    "is_companion",
    "read",
    "read_checkpoint",
    "read_id",
    "source_info",
    "strays",
    "unlisted",
    "write",
]

FILE = "manifest.json"
UNKNOWN = "unknown"
CARD = "README.md"
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates besides the default one."""
SIGNATURE = "model.sig"
PROVENANCE = "provenance.intoto.jsonl"
_BESIDE = (FILE, CARD, SIGNATURE, PROVENANCE)
"""What is written last, or anew."""
_MOST_BYTES_BESIDE = 2**26
"""No digest tells their size beforehand."""
ROOT = CHECKOUT
_VISIBLE_COMPANIONS = (
    *("Thumbs.db", "ehthumbs.db", "desktop.ini", "__MACOSX", "Icon\r", "@eaDir", "#recycle", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
)
_AGAIN = "build the artifact again"
_COPY = "copy it with `cp -rL`, or download with `hf download --local-dir`"
_MOST_BYTES = 2**24
"""Of a manifest that is read; the largest model's has some hundred kilobytes."""
_SMALLEST_FLOAT_BITS = 15.5
"""Per weight: bf16 has 16, or less where two tensors share their numbers in the file."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=rf"^([0-9a-f]{{40}}|[0-9a-f]{{64}}|{UNKNOWN})$")]
"""Of git, in full: reports print commands with it. `unknown` where no git answers for this checkout."""


class FileInfo(Strict):
    """One file of the artifact."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class CheckpointInfo(Strict):
    """Where the weights came from."""

    origin: str
    """A hub id, a file of a package, a seed, or the last part of a path: digests identify what was there."""
    description: str
    bits_per_weight: float | None
    """Of its files, a GGUF's tokenizer included; null: random weights."""
    sha256: dict[FileName, Sha256]
    trained_on: str | None = None
    """The base that a merged adapter names, as `origin`; null: there is no adapter."""

    @property
    def quantized_before(self) -> bool:
        """Whether its numbers have fewer bits than any float type."""
        return self.bits_per_weight is not None and self.bits_per_weight < _SMALLEST_FLOAT_BITS


class LayerInfo(Strict):
    """One quantized weight and what rounding did to it."""

    name: str
    bits: Literal[4, 8]
    group_size: int
    levels: Levels = "even"
    sqnr_db: float
    max_abs_error: float
    kept: bool
    """The integers are the checkpoint's own; the error is then that of rounding their scales to bf16, if any."""
    not_kept: str | None
    """Why the checkpoint's own integers were not kept; null: they were, or it holds floats."""


class Candidate(Strict):
    """A linear that may get more bits: why it got them or did not."""

    name: str
    kl: float
    """Estimated KL divergence of the model when only this linear is rounded, nats per position."""
    promoted_kl: float
    """The same with more bits, nats per position."""
    extra_bytes: int
    promoted: bool


class CalibrationInfo(Strict):
    """The texts that the integers were chosen with, and the loss that remains."""

    texts: dict[FileName, Sha256]
    """File → sha256."""
    day: str | None
    """The date that chat templates were given; null: no text passed one."""
    tokens: int
    held_out_kl: float | None
    """Mean KL to the float model on held-out windows of the same texts, nats."""
    candidates: tuple[Candidate, ...]
    """Most KL saved per byte first; empty where the recipe promotes nothing."""
    processor: str = "unknown"
    """What computed: `cpu x86_64 AVX512`; the last bits of its sums decide a few integers. Artifacts of before it was
    recorded have none."""


class QuantizationInfo(Strict):
    """The one quantization that all targets share."""

    key: str
    bits_per_weight: float
    layers: tuple[LayerInfo, ...]
    calibration: CalibrationInfo | None
    """null: no text was read."""

    @property
    def from_checkpoint(self) -> str | None:
        """How many weights are the checkpoint's own integers, in one line; None: it holds none."""
        return from_checkpoint(self.layers)


class CacheScales(Strict):
    """The texts that the constant scales of an int8 KV cache were measured on."""

    texts: dict[FileName, Sha256]
    """File → sha256."""
    tokens: int


class SourceInfo(Strict):
    """Our own code that made the artifact."""

    commit: Commit
    dirty: bool | None
    """Whether the checkout had local changes; null: unknown."""
    sha256: Sha256

    @property
    def revision(self) -> str:
        """For people: `0123456789ab with local changes`."""
        return self.commit[:12] + (" with local changes" if self.dirty else "")


class Manifest(Strict):
    """All that a reader or a runner needs to know about an artifact folder."""

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
    cache_scales: Annotated[CacheScales | None, Field(exclude_if=lambda scales: scales is None)] = None
    """null: the KV cache has no constant scales."""
    files: dict[FileName, FileInfo]
    """Every file except the manifest, the card, which validation rewrites, and what `sign` writes last."""

    @model_validator(mode="after")
    def _id_is_the_plans(self) -> "Manifest":
        if self.id != self.plan.id:
            raise ValueError(f"id is {self.id[:300]!r}, its plan is {self.plan.id!r}")
        return self

    @property
    def texts(self) -> dict[FileName, Sha256]:
        """All texts that decided a number of the artifact: file → sha256."""
        read = (self.quantization.calibration, self.cache_scales)
        return {name: digest for part in read if part for name, digest in part.texts.items()}

    @property
    def artifact_bytes(self) -> int:
        """Size of the model without tokenizer files."""
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


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every plain value of nested records under its dotted name: `target.limits.max_mean_kl`."""
    if not isinstance(value, dict | list | tuple) or not value:
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    leaves: dict[str, Any] = {}
    for key, inner in pairs:
        leaves |= flat(inner, f"{name}.{key}" if name else str(key))
    return leaves


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    (folder / FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read an artifact folder's manifest, strictly."""
    path = folder / FILE
    if not path.is_file():
        raise ExportError(_no_manifest(folder))
    if path.stat().st_size > _MOST_BYTES:
        raise ExportError(f"{path}: more than {_MOST_BYTES >> 20} MiB, which no manifest is; build the artifact again")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        transit.require_no_pointer(path)
        reason = explain(error)[:300]
        raise ExportError(f"{path}: damaged or of another version: {reason}; {_AGAIN}") from None


def _no_manifest(folder: Path) -> str:
    """Which folder to give in place of one that is no artifact's."""
    if (folder.parent / FILE).is_file() and folder.exists():
        return f"{folder}: a part of an artifact; give the artifact's folder, {folder.parent}"
    if folder.is_dir() and (inside := sorted(path.parent.name for path in folder.glob(f"*/{FILE}") if path.is_file())):
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"{folder}: holds artifacts, {', '.join(inside[:3])}{more}; give the folder of one"
    is_other = folder.exists() and not folder.is_dir()
    what = f"{folder}: {kind(folder)}" if is_other else f"{folder / FILE}: {absence(folder / FILE)}"
    return f"{what}; give an artifact folder made by `python -m export`"


def digest(folder: Path) -> str:
    """sha256 of an artifact folder's manifest, which identifies the build."""
    return digests.sha256(folder / FILE)


def read_id(folder: Path) -> str | None:
    """Id of the artifact in a folder, even when another version of this code wrote it; None: it has none."""
    fields = _fields(folder)
    return str(fields.get("id")) if fields else None


def read_checkpoint(folder: Path) -> CheckpointInfo | None:
    """What the artifact in a folder was made of, as `read_id`; None: another version wrote that differently."""
    try:
        return CheckpointInfo.model_validate(_fields(folder).get("checkpoint"))
    except ValidationError:
        return None


def unlisted(folder: Path) -> Iterator[Path]:
    """Files and links in an artifact folder that its manifest, of whatever version, does not list; no companions."""
    listed = _fields(folder).get("files")
    names = {*_BESIDE, *(listed if isinstance(listed, dict) else ())}
    return (path for path in files(folder) if path.relative_to(folder).as_posix() not in names)


def _fields(folder: Path) -> dict[str, Any]:
    """A manifest without a look at its version; empty where there is none to read."""
    try:
        fields = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def differing_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Links, and files that are missing, changed, or not listed in the manifest, with what to do, one line each."""
    if links := list(strays(folder)):
        yield from links
        return
    present = _named(folder)
    for name, info in manifest.files.items():
        if name not in present:
            yield f"{folder / name}: missing; {_AGAIN}"
        elif (size := present[name].stat().st_size) != info.bytes or digests.sha256(present[name]) != info.sha256:
            yield f"{folder / name}: {_change(folder / name, size, info)}"
    for name in sorted(present.keys() - manifest.files.keys()):
        yield f"{folder / name}: not listed in {FILE}; remove it or build again"


def _change(path: Path, size: int, listed: FileInfo) -> str:
    """What happened to a file that is not as listed, and what to do."""
    if pointer := transit.pointer(path):
        return pointer
    if transit.has_other_line_ends(path, listed.sha256):
        return f"its line ends were changed, as git's core.autocrlf does; clone or copy it without, or {_AGAIN}"
    if size != listed.bytes:
        return f"{size} bytes, {FILE} says {listed.bytes}; {_AGAIN}"
    return f"differs from {FILE} (sha256); {_AGAIN}"


def hash_files(folder: Path) -> dict[str, FileInfo]:
    """Name → digest and size of every file in a folder except manifest, card, signature, provenance and companions.

    Raises ExportError: something in it is a link, or neither a file nor a folder.
    """
    if stray := next(strays(folder), None):
        raise ExportError(stray)
    return {name: file_info(path) for name, path in _named(folder).items()}


def _named(folder: Path) -> dict[str, Path]:
    """Name → path of every file that a manifest lists."""
    named = {path.relative_to(folder).as_posix(): path for path in files(folder)}
    return {name: path for name, path in named.items() if name not in _BESIDE}


def files(folder: Path) -> list[Path]:
    """Every file and link in an artifact folder, sorted; companions left out."""
    return sorted(path for path in _walk(folder) if path.is_symlink() or not path.is_dir())


def strays(folder: Path) -> Iterator[str]:
    """Links, pipes, devices and texts too large to be ours in an artifact folder, a line each."""
    for path in _walk(folder):
        found = path.lstat()
        mode = found.st_mode
        if stat.S_ISLNK(mode):
            yield f"{path}: a link; an artifact holds files only; {_COPY}"
        elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            yield f"{path}: neither a file nor a folder; remove it"
        elif found.st_size > _MOST_BYTES_BESIDE and path.parent == folder and path.name in _BESIDE:
            yield f"{path}: larger than {_MOST_BYTES_BESIDE} bytes, which no such file is; remove it"


def is_companion(name: str) -> bool:
    """Whether hubs, git, file managers or editors put files and folders of that name beside others.

    No runtime reads them: hidden ones (`.git`, `.gitattributes`, `.cache/huggingface`, `.DS_Store`), backups (`x~`),
    DVC's (`x.dvc`), the terms that a hub shows, and what Windows, macOS and storage boxes leave in shared folders.
    """
    return name.startswith(".") or name.endswith(("~", ".dvc")) or name in _VISIBLE_COMPANIONS


def companions(folder: Path) -> list[Path]:
    """What lies in a folder and its sub-folders without being part of an artifact; not what is inside of these."""
    return [path for path, beside in _levels(folder) if beside]


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder, companions left out."""
    return (path for path, beside in _levels(folder) if not beside)


def _levels(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Everything in a folder, and whether it is a companion; links are not followed, companions not entered.

    transformers reads hidden chat templates too.
    """
    for parent, folders, files in os.walk(folder):
        templates = Path(parent).name == TEMPLATES
        for name in sorted(folders + files):
            yield Path(parent, name), is_companion(name) and not (templates and name.endswith(".jinja"))
        folders[:] = [name for name in folders if not is_companion(name)]


def file_info(path: Path) -> FileInfo:
    """Digest and size of one file."""
    return FileInfo(sha256=digests.sha256(path), bytes=path.stat().st_size)


def source_info() -> SourceInfo:
    """Git revision of this checkout, and the digest of the code on disk that decides an artifact."""
    inside = _git("rev-parse", "--show-toplevel")
    of_this_checkout = inside is not None and Path(inside).resolve() == ROOT.resolve()
    # files of the user beside the code are no change of it; new files among the code are in its digest
    changes = _git("status", "--porcelain", "--untracked-files=no") if of_this_checkout else None
    return SourceInfo(
        commit=(_git("rev-parse", "--verify", "HEAD") if of_this_checkout else None) or UNKNOWN,
        dirty=None if changes is None else bool(changes),
        sha256=digests.artifact_digest(),
    )


def git_is_silent(source: SourceInfo) -> str:
    """That a repository tells no commit, in a line: no git, or one before 2.38 in another user's checkout; or ""."""
    if source.commit != UNKNOWN or not (ROOT / ".git").exists():
        return ""
    return f"git tells no commit of {ROOT}, so the manifest says `unknown`; `git -C {ROOT} log` says why"


def _git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None where it fails. These only read, so the owner may be another."""
    command = ["git", "-c", f"safe.directory={ROOT.resolve()}", "-C", str(ROOT), *arguments]  # git knows no link
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
