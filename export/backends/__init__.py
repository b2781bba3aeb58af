"""What a format must provide: one module here with these four functions, named in a target YAML."""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ..contract import IOContract, TokenizerIds
from ..errors import ExportError
from ..plan import Architecture, Plan
from ..quantize import QuantizedModel


@dataclass(frozen=True)
class Build:
    """Where and for what a backend writes."""

    plan: Plan
    tokenizer: TokenizerIds
    folder: Path


@dataclass(frozen=True)
class Lowered:
    """What a backend says about the files it wrote."""

    contract: IOContract
    facts: dict[str, int | float | str]
    """Counts that show what the runtime will run natively: delegates, nodes, bytes of shared weights."""


@dataclass(frozen=True)
class Needs:
    """The most that lowering takes at a time."""

    memory_bytes: int
    """Held beyond the libraries that every build imports: the format's own libraries, tensors, mapped files."""
    disk_bytes: int
    """Written beside the artifact folder's final place, temporary files included."""


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight as found in a finished file."""

    name: str
    qdata: NDArray[np.int8]
    """[N, K]"""
    scale: NDArray[np.float32]
    """[N, K / group]; one column where the scheme is per channel."""


def refuse_any_scales(plan: Plan, why: str) -> None:
    """For a runtime that cannot take scales as a checkpoint may hold them."""
    if not plan.quant.common_scales:
        raise ExportError(
            f"recipe {plan.quant.name!r} on {plan.target.name!r}: {why}, and a checkpoint's own may be others; "
            "use the target onnx-cpu, or int4-g32, which rounds again"
        )


class Backend(Protocol):
    """A module of this package."""

    def check(self, plan: Plan, architecture: Architecture) -> None:
        """Raise ExportError, naming layer, rule and remedy, if the runtime would refuse the plan or get it wrong."""

    def needs(self, plan: Plan, architecture: Architecture) -> Needs:
        """What `lower` will take, from the shapes alone: tens of per cent too much at most, and hardly ever too little.

        Asked for plans that `check` would refuse too.
        """

    def lower(self, model: QuantizedModel, build: Build) -> Lowered:
        """Write the artifact's files into `build.folder`."""

    def read_weights(self, artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
        """Every quantized weight of a finished artifact, under our names, fused projections taken apart."""


def load(name: str) -> Backend:
    """The backend module of that name; nothing else is imported."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if "_" not in module.name[:1])
    if name not in known:
        raise ExportError(f"unknown backend {name!r} in the target YAML; known: {', '.join(known)}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
