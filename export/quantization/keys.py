"""What decides the integers, hashed: a store is found by its key."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from export.architecture import Architecture
from export.checkpoints import Checkpoint
from export.checkpoints.origin import Origin, Seed
from export.host import digests
from export.plan import QuantRecipe

from . import schemes, texts


def content_key(checkpoint: Checkpoint, recipe: QuantRecipe, processor: str | None) -> str:
    """sha256 over everything that decides the integers; `processor` is None where no calibration depends on it."""
    seed = str(checkpoint.origin) if isinstance(checkpoint.origin, Seed) else None
    return _key({"weights": checkpoint.sha256, "seed": seed, "processor": processor}, recipe, checkpoint.architecture)


def origin_key(origin: Origin, recipe: QuantRecipe, architecture: Architecture) -> str:
    """As `content_key`, with the origin of the weights instead of their digest, for which they need not be opened."""
    return _key({"origin": repr(origin)}, recipe, architecture)


def is_stored(origin: Origin, recipe: QuantRecipe, architecture: Architecture, cache: Path) -> bool:
    """Whether these weights seem to be quantized already, told without reading them. For estimates only."""
    key = origin_key(origin, recipe, architecture)
    return any(_origin_key_of(store) == key for store in cache.glob("quantized-*.safetensors"))


def _origin_key_of(store: Path) -> str | None:
    try:
        with safe_open(store, framework="pt") as file:
            key: str | None = file.metadata().get("origin_key")
    except (SafetensorError, OSError):
        return None  # damaged: quantizing refuses it, an estimate need not
    return key


def _key(weights: dict[str, Any], recipe: QuantRecipe, architecture: Architecture) -> str:
    fields = recipe.model_dump(exclude={"name", "description", "limits", "layers"})
    if chosen := schemes.by_pattern(recipe, architecture):  # their order decides, which a sorted key would not show
        fields["layers"] = {name: rule.scheme.model_dump() for name, rule in chosen.items()}
    inputs = {
        **weights,
        "architecture": architecture.model_dump(),
        "recipe": fields,
        "texts": texts.sha256(recipe.calibration),
        "torchao": version("torchao"),
        "code": digests.room_digest("checkpoints", "quantization", "model.py"),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
