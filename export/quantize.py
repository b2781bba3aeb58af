"""Recipe → one quantized model for all targets, kept on disk under its content. Backends only re-encode it."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchao.quantization import IntxUnpackedToInt8Tensor

from . import cache as cache_folder
from . import calibrate, disk, memory, rotate, schemes
from .calibrate import texts
from .calibrate.unfinished import Unfinished
from .checkpoint import Checkpoint
from .errors import ExportError
from .kept import compared_with, exactly, fitted
from .manifest import CalibrationInfo, LayerInfo, from_checkpoint
from .model import Llama
from .places import locate
from .plan import Architecture, QuantRecipe
from .progress import console, track
from .rounding import BLOCK_ELEMENTS, Rounded, as_torchao, bits_of, one_torch_thread, round_to_nearest
from .schemes import EMBEDDING, HEAD, Schemes
from .sources.integers import Integers, Unfit

HERE = Path(__file__).parent
CODE = [
    HERE / f"{name}.py"
    for name in ("quantize", "kept", "schemes", "rounding", "rotate", "orthogonal", "model", "windows")
]
CODE += [*sorted(HERE.glob("calibrate/*.py")), *sorted(HERE.glob("sources/*.py"))]
ROUNDING_BYTES = 50
"""What rounding holds for each element of a block, measured: the block in float32 a dozen times over."""


@dataclass(frozen=True)
class QuantizedModel:
    """The one quantized model: integers in a memory-mapped file, the rest read from the checkpoint."""

    checkpoint: Checkpoint
    """As it was opened."""
    weights: Checkpoint
    """What was quantized: the checkpoint, or it rotated."""
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

    def read(self, name: str) -> torch.Tensor:
        """One weight: torchao IntxUnpackedToInt8Tensor where quantized, else float32; a tied head is the embedding."""
        with self.reader() as read:
            return read(name)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """`read` for who keeps many weights: they share one mapping of the store, where each `read` makes its own."""
        with safe_open(self.store, framework="pt") if self.store else nullcontext() as file:
            yield lambda name: self._read(name, file)

    def _read(self, name: str, file: Any) -> torch.Tensor:
        if name == HEAD and self.architecture.tie_word_embeddings:
            name = EMBEDDING
        scheme = self.schemes.of(name)
        if scheme is None or file is None:
            return self.weights.read(name)
        if scheme.levels != "even":
            return self.weights.read(name)  # nothing of it was changed, and torchao has no such tensor
        weight: torch.Tensor = as_torchao(*stored_codes(file, name), scheme.bits)
        return weight

    def codes(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A quantized weight as it is stored: int8 [N, K] and float32 [N, K/group]; None: float."""
        if self.schemes.of(name) is None or self.store is None:
            return None
        with safe_open(self.store, framework="pt") as file:
            return stored_codes(file, name)

    @property
    def schemes(self) -> Schemes:
        """The scheme of every tensor, promotions included."""
        found = schemes.of_recipe(self.recipe, self.architecture)
        if self.recipe.method == "kept":  # what the checkpoint holds in floats stays so
            quantized = {layer.name for layer in self.layers}
            return Schemes(self.architecture, {n: scheme for n, scheme in found.by_name.items() if n in quantized})
        if self.recipe.promotion is None or self.calibration is None:
            return found
        names = [one.name for one in self.calibration.candidates if one.promoted]
        return found.promoted(names, self.recipe.promotion.scheme)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (integers and 16-bit scales; float tensors at 32) per parameter of the checkpoint."""
        return self.schemes.stored_bits(float_bits=32) / self.architecture.parameters


def stored_codes(file: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of one weight in an opened store."""
    return file.get_tensor(f"{name}.qdata"), file.get_tensor(f"{name}.scale")


def memory_bytes(recipe: QuantRecipe, architecture: Architecture) -> int:
    """The most that quantizing holds beyond the imported libraries, bytes; 0 for a recipe that quantizes nothing.

    At first the largest tensor: in float32, rounded block by block, its integers joined. In the end all integers, and
    what the blocks left behind: half as much again as they need at a time.
    """
    found = schemes.of_recipe(recipe, architecture).counts()
    if not found.integers:
        return 0
    calibrating = calibrate.memory_bytes(recipe, architecture) if recipe.calibration else 0
    blocks = min(os.cpu_count() or 1, -(-found.largest // BLOCK_ELEMENTS))
    block_bytes = ROUNDING_BYTES * min(blocks * BLOCK_ELEMENTS, found.largest)
    rotating = rotate.memory_bytes(architecture) if recipe.rotation else 0
    return rotating + max(6 * found.largest + block_bytes, found.store_bytes + max(calibrating, block_bytes * 3 // 2))


def quantize(checkpoint: Checkpoint, recipe: QuantRecipe, cache: Path) -> QuantizedModel:
    """Quantize every tensor of the recipe; a stored result of the same inputs is reused."""
    weights = rotate.rotated(checkpoint, recipe)
    schemes.check(recipe, weights.architecture)
    key = content_key(checkpoint, recipe)
    if recipe.method == "none":
        return QuantizedModel(checkpoint, weights, recipe, key, None, (), None)
    store = cache / f"quantized-{key[:16]}.safetensors"
    with disk.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with disk.locked(store, wait=True):  # builds of one recipe at the same time quantize once
            if not store.is_file():
                write_store(store, key, weights, recipe)
                memory.give_back()  # or the integers' memory is still ours while they are read back
    cache_folder.used(store)
    layers, calibration = stored_notes(store, key)
    if line := from_checkpoint(layers):
        console.print(f"  {line}", soft_wrap=True)
    return QuantizedModel(checkpoint, weights, recipe, key, store, layers, calibration)


@dataclass(frozen=True)
class Result:
    """What quantizing found."""

    tensors: dict[str, Rounded]
    """In execution order."""
    schemes: Schemes
    calibration: CalibrationInfo | None
    kept: Collection[str]
    """Whose integers are the checkpoint's own."""
    not_kept: Mapping[str, str]
    """Name → why the integers that the checkpoint holds were not kept."""


def write_store(store: Path, key: str, checkpoint: Checkpoint, recipe: QuantRecipe) -> None:
    """Quantize into `store`, complete or not at all. The caller holds its lock."""
    base = schemes.of_recipe(recipe, checkpoint.architecture)
    disk.require_room(store.parent, base.counts().store_bytes)
    unfinished = Unfinished(store.with_suffix(".unfinished"))
    if recipe.method == "kept":
        found = as_held(checkpoint, base, recipe.name)
    elif recipe.calibration is None:
        found = to_nearest(checkpoint, base)
    else:
        found = calibrated(checkpoint, recipe, unfinished)
    tensors = {f"{name}.qdata": one.qdata for name, one in found.tensors.items()}
    tensors |= {f"{name}.scale": one.scale for name, one in found.tensors.items()}
    errors = [layer_info(name, found) for name in found.tensors]
    partial = store.with_name(f"{store.name}.part")
    try:
        with disk.writing(store.parent):
            notes = {"key": key, "sha256": digest(tensors[name] for name in sorted(tensors))}
            notes["asked"] = asked_key(checkpoint.origin, recipe, checkpoint.architecture)
            notes["errors"] = json.dumps([error.model_dump() for error in errors])
            notes["calibration"] = found.calibration.model_dump_json() if found.calibration else ""
            save_file(tensors, partial, notes)
        partial.replace(store)
        unfinished.remove()
    except SafetensorError as error:
        raise ExportError(f"{partial}: cannot be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def to_nearest(checkpoint: Checkpoint, wanted: Schemes) -> Result:
    """Every tensor on its own; integers that the checkpoint holds already are kept where they are legal."""
    tensors: dict[str, Rounded] = {}
    not_kept: dict[str, str] = {}
    kept: list[str] = []
    with one_torch_thread():
        for name, scheme in track(wanted.by_name.items(), "quantize", len(wanted.names)):
            weight, held = checkpoint.read(name), fitted(checkpoint.integers(name), scheme)
            if isinstance(held, Integers):
                kept.append(name)
                tensors[name] = compared_with(weight, held)
                continue
            if isinstance(held, Unfit):
                not_kept[name] = held.reason
            tensors[name] = round_to_nearest(weight, scheme)
    return Result(tensors, wanted, None, kept, not_kept)


def as_held(checkpoint: Checkpoint, wanted: Schemes, recipe: str) -> Result:
    """Every linear exactly as the checkpoint holds it, in floats too; embedding and head where that is possible.

    Raises ExportError: a linear's codes that the recipe's scheme cannot hold, or no codes at all.
    """
    tensors: dict[str, Rounded] = {}
    kept: list[str] = []
    not_kept: dict[str, str] = {}
    with one_torch_thread():
        for name, scheme in track(wanted.by_name.items(), "keep", len(wanted.names)):
            held = exactly(checkpoint.integers(name), scheme)
            if isinstance(held, Integers):
                kept.append(name)
                tensors[name] = compared_with(checkpoint.read(name), held)
            elif name in (EMBEDDING, HEAD):
                tensors[name] = round_to_nearest(checkpoint.read(name), scheme)
                not_kept |= {name: held.reason} if held else {}
            elif held:
                raise ExportError(
                    f"{checkpoint.origin}: {name}: {held.reason}, so recipe {recipe!r} cannot keep it; "
                    "use int4-g32, which rounds again"
                )
    if not kept:
        raise ExportError(f"{checkpoint.origin}: holds floats, so recipe {recipe!r} has nothing to keep; use int4-g32")
    left = {name: scheme for name, scheme in wanted.by_name.items() if name in tensors}
    return Result(tensors, Schemes(wanted.architecture, left), None, kept, not_kept)


def calibrated(checkpoint: Checkpoint, recipe: QuantRecipe, unfinished: Unfinished) -> Result:
    """Linears by what they compute on calibration text, embedding and head to nearest; no integers are kept."""
    assert recipe.calibration is not None
    base, linears = schemes.of_recipe(recipe, checkpoint.architecture), checkpoint.architecture.linear_shapes()
    others = {name: scheme for name, scheme in base.by_name.items() if name not in linears}
    rounded = {name: round_to_nearest(checkpoint.read(name), scheme) for name, scheme in others.items()}
    found = calibrate.run(checkpoint, recipe, rounded, unfinished)
    info = CalibrationInfo(
        texts=texts.sha256(recipe.calibration),
        tokens=found.tokens,
        held_out_kl=found.held_out_kl,
        candidates=found.candidates,
    )
    every = rounded | found.linears
    reason = f"method {recipe.method} chooses its own"
    held = {name: checkpoint.integers(name) for name in base.names}
    not_kept = {name: one.reason if isinstance(one, Unfit) else reason for name, one in held.items() if one}
    return Result({name: every[name] for name in base.names}, found.schemes, info, (), not_kept)


def layer_info(name: str, found: Result) -> LayerInfo:
    """What became of one weight, for the manifest."""
    rounded = found.tensors[name]
    return LayerInfo(
        name=name,
        bits=found.schemes.by_name[name].bits,
        group_size=rounded.qdata.shape[1] // rounded.scale.shape[1],
        sqnr_db=round(rounded.sqnr_db, 3),
        max_abs_error=rounded.max_abs_error,
        levels=found.schemes.by_name[name].levels,
        kept=name in found.kept,
        not_kept=found.not_kept.get(name),
    )


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, one after another."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def stored_notes(store: Path, key: str) -> tuple[tuple[LayerInfo, ...], CalibrationInfo | None]:
    """What is kept beside the integers; a store of other inputs or with a flipped bit is refused."""
    try:
        with safe_open(store, framework="pt") as file:
            metadata = file.metadata()
            found = digest(file.get_tensor(name) for name in sorted(file.keys()))
    except Exception as error:
        raise ExportError(f"{store}: damaged ({error}); delete it and build again") from None
    if metadata.get("key") != key:
        raise ExportError(f"{store}: made from other inputs; delete it and build again")
    if metadata.get("sha256") != found:
        raise ExportError(f"{store}: its integers changed since they were written; delete it and build again")
    layers = tuple(LayerInfo(**fields) for fields in json.loads(metadata["errors"]))
    calibration = metadata["calibration"]
    return layers, CalibrationInfo.model_validate_json(calibration) if calibration else None


def is_stored(origin: str, recipe: QuantRecipe, architecture: Architecture, cache: Path) -> bool:
    """Whether these weights seem to be quantized already, told without reading them. For estimates only."""
    asked = asked_key(origin, recipe, architecture)
    return any(asked == asked_of(store) for store in cache.glob("quantized-*.safetensors"))


def asked_of(store: Path) -> str | None:
    """The question a stored result answered; None for a damaged file, which is nobody's answer."""
    try:
        with safe_open(store, framework="pt") as file:
            found: str | None = file.metadata().get("asked")
    except (SafetensorError, OSError):
        return None
    return found


def content_key(checkpoint: Checkpoint, recipe: QuantRecipe) -> str:
    """sha256 over everything that decides the integers."""
    seed = checkpoint.origin if checkpoint.origin.startswith("seed:") else None
    return key_of({"weights": checkpoint.sha256, "seed": seed}, recipe, checkpoint.architecture)


def asked_key(origin: str, recipe: QuantRecipe, architecture: Architecture) -> str:
    """As `content_key`, but with the place of the weights instead of their bytes."""
    return key_of({"origin": str(locate(origin))}, recipe, architecture)


def key_of(weights: dict[str, Any], recipe: QuantRecipe, architecture: Architecture) -> str:
    """sha256 over some weights and what is done with them."""
    inputs = {
        **weights,
        "architecture": architecture.model_dump(),
        "recipe": recipe.model_dump(exclude={"name", "description", "limits"}),
        "texts": texts.sha256(recipe.calibration),
        "torchao": version("torchao"),
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in CODE],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def eager(weight_of: Callable[[str], torch.Tensor], architecture: Architecture, activations: str) -> Llama:
    """The PyTorch model of these weights; `activations` as in the target YAML (int8 per token: linears only)."""
    return Llama(architecture).load(dict(eager_weights(weight_of, architecture, activations)))


def eager_weights(
    weight_of: Callable[[str], torch.Tensor], architecture: Architecture, activations: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Named weights for `Llama.load`, linears wrapped with the activation quantization the runtime adds."""
    names = list(architecture.tensor_shapes())
    for name in names if HEAD in names else [*names, HEAD]:
        weight: Any = weight_of(EMBEDDING if name == HEAD and architecture.tie_word_embeddings else name)
        if activations == "int8-per-token" and name != EMBEDDING and isinstance(weight, IntxUnpackedToInt8Tensor):
            weight = as_torchao(weight.qdata, weight.scale, bits_of(weight), "int8_asym_per_token")
        yield name, weight
