"""The one quantized model: integers in a file of the cache, written once, and everything else in the checkpoint."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from export.architecture import EMBEDDING, HEAD, Architecture
from export.checkpoints import Checkpoint
from export.checkpoints.integers import Integers
from export.errors import ExportError
from export.host import disk
from export.manifest import CalibrationInfo, LayerInfo
from export.plan import QuantRecipe

from . import schemes
from .nearest import Rounded
from .schemes import Schemes
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class QuantizedModel:
    """Weights as every backend and the eager model read them."""

    checkpoint: Checkpoint
    """As it was opened."""
    weights: Checkpoint
    """What was quantized: the checkpoint itself, or rotated."""
    recipe: QuantRecipe
    key: str
    """Content address: checkpoint bytes, recipe, quantizer."""
    store: Path | None
    """safetensors with `NAME.qdata` int8 [N, K] and `NAME.scale` float32 [N, K/group]; None: nothing quantized."""
    layers: tuple[LayerInfo, ...]
    calibration: CalibrationInfo | None

    @property
    def architecture(self) -> Architecture:
        return self.weights.architecture

    def read(self, name: str) -> torch.Tensor | Integers:
        """One weight: integers where it is quantized, else float32; a tied head is the embedding."""
        with self.reader() as read:
            return read(name)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor | Integers]]:
        """`read` for many weights that stay in memory: they share one mapping of the store, each `read` has its own."""
        with self._opened() as file:
            yield lambda name: self._read(name, file)

    def codes(self, name: str) -> Integers | None:
        """The integers of a weight; None: it is float."""
        with self._opened() as file:
            return self._codes(name, file)

    def _opened(self) -> AbstractContextManager[Any]:
        return safe_open(self.store, framework="pt") if self.store else nullcontext()

    def _read(self, name: str, file: Any) -> torch.Tensor | Integers:
        if name == HEAD and self.architecture.tie_word_embeddings:
            name = EMBEDDING
        return self._codes(name, file) or self.weights.read(name)

    def _codes(self, name: str, file: Any) -> Integers | None:
        scheme = self.schemes.of(name)
        if scheme is None or file is None:
            return None
        qdata, scale = file.get_tensor(f"{name}.qdata"), file.get_tensor(f"{name}.scale")
        return Integers(qdata, scale, scheme.bits, scheme.levels)

    @property
    def schemes(self) -> Schemes:
        """The scheme of every tensor, promotions included."""
        base = schemes.of_recipe(self.recipe, self.architecture)
        if self.recipe.method == "kept":  # what the checkpoint holds in floats stays so
            quantized = {layer.name for layer in self.layers}
            return Schemes(self.architecture, {n: scheme for n, scheme in base.by_name.items() if n in quantized})
        if self.recipe.promotion is None or self.calibration is None:
            return base
        names = [linear.name for linear in self.calibration.candidates if linear.promoted]
        return base.promoted(names, self.recipe.promotion.scheme)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (integers and 16-bit scales; float tensors at 32) per parameter of the checkpoint."""
        return self.schemes.stored_bits(float_bits=32) / self.architecture.parameters


@dataclass(frozen=True)
class Result:
    """Integers that were chosen, before they are stored."""

    tensors: dict[str, Rounded]
    """In execution order."""
    schemes: Schemes
    calibration: CalibrationInfo | None
    kept: Collection[str]
    """Names of the weights whose integers are the checkpoint's own."""
    not_kept: Mapping[str, str]
    """Name → why the integers that the checkpoint holds were not kept."""


def write(store: Path, result: Result, notes: Mapping[str, str]) -> None:
    """Write the integers, with these notes and others, complete or not at all. The caller holds the store's lock."""
    tensors = {f"{name}.qdata": rounded.qdata for name, rounded in result.tensors.items()}
    tensors |= {f"{name}.scale": rounded.scale for name, rounded in result.tensors.items()}
    layers = [_layer_info(name, result) for name in result.tensors]
    partial = store.with_name(f"{store.name}.part")
    try:
        with disk.writing(store.parent):
            metadata = {
                **notes,
                "sha256": digest(tensors[name] for name in sorted(tensors)),
                "errors": json.dumps([layer.model_dump() for layer in layers]),
                "calibration": result.calibration.model_dump_json() if result.calibration else "",
            }
            save_file(tensors, partial, metadata)
        partial.replace(store)
    except SafetensorError as error:
        raise ExportError(f"{partial}: cannot be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def _layer_info(name: str, result: Result) -> LayerInfo:
    rounded = result.tensors[name]
    return LayerInfo(
        name=name,
        bits=result.schemes.by_name[name].bits,
        group_size=rounded.qdata.shape[1] // rounded.scale.shape[1],
        sqnr_db=round(rounded.sqnr_db, 3),
        max_abs_error=rounded.max_abs_error,
        levels=result.schemes.by_name[name].levels,
        kept=name in result.kept,
        not_kept=result.not_kept.get(name),
    )


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, one after another."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()


def read_notes(store: Path, key: str) -> tuple[tuple[LayerInfo, ...], CalibrationInfo | None]:
    """What is stored beside the integers. Raises ExportError: a store of different inputs, or with a flipped bit."""
    try:
        with safe_open(store, framework="pt") as file:
            metadata = file.metadata()
            actual = digest(file.get_tensor(name) for name in sorted(file.keys()))
    except Exception as error:
        raise ExportError(f"{store}: damaged ({error}); delete it and build again") from None
    if metadata.get("key") != key:
        raise ExportError(f"{store}: made from other inputs; delete it and build again")
    if metadata.get("sha256") != actual:
        raise ExportError(f"{store}: its integers changed since they were written; delete it and build again")
    layers = tuple(LayerInfo(**fields) for fields in json.loads(metadata["errors"]))
    calibration = metadata["calibration"]
    return layers, CalibrationInfo.model_validate_json(calibration) if calibration else None


_SENSITIVITIES, _WINDOWS = "sensitivities.json", "windows.safetensors"


class Unfinished:
    """A folder with one file for each tensor, each written whole or not at all; it exists while the run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, promoted: Iterable[str]) -> "Unfinished":
        """The folder inside it for one choice of promoted linears: another choice gives other integers."""
        return Unfinished(self.folder / hashlib.sha256("\n".join(promoted).encode()).hexdigest()[:16])

    def read(self, name: str) -> Rounded | None:
        """The integers of a tensor that an earlier run has rounded."""
        tensors = _tensors(self._path(name))
        if tensors is None:
            return None
        return Rounded(tensors["qdata"], tensors["scale"], *tensors["errors"].tolist())

    def write(self, name: str, rounded: Rounded) -> None:
        errors = torch.tensor([rounded.signal, rounded.noise, rounded.max_abs_error], dtype=torch.float64)
        self._write(self._path(name), {"qdata": rounded.qdata, "scale": rounded.scale, "errors": errors})

    def read_windows(self) -> torch.Tensor | None:
        """Text that the model wrote in an earlier run, token ids int64 [W, L]."""
        tensors = _tensors(self.folder / _WINDOWS)
        return tensors["ids"] if tensors else None

    def write_windows(self, ids: torch.Tensor) -> None:
        self._write(self.folder / _WINDOWS, {"ids": ids})

    def read_sensitivities(self) -> dict[str, Sensitivity] | None:
        """All of them, when an earlier run has finished measuring."""
        path = self.folder / _SENSITIVITIES
        try:
            fields = json.loads(path.read_bytes())
            return {name: Sensitivity(*pair) for name, pair in fields.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None  # not there, or damaged: measured again

    def write_sensitivities(self, sensitivities: dict[str, Sensitivity]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{_SENSITIVITIES}.part"
        fields = {name: [linear.kl, linear.promoted_kl] for name, linear in sensitivities.items()}
        part.write_text(json.dumps(fields), encoding="utf-8")
        part.replace(self.folder / _SENSITIVITIES)

    def remove(self) -> None:
        """The run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(tensors, part)
        part.replace(path)


def _tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """None: the file is not there, or damaged, and is computed again."""
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None
