"""Core ML: a stateful fp16 `.mlpackage` for iOS 18 / macOS 15, written on any system and never run here.

`graph.py` authors the program, coremltools writes it, and `file.py` makes the package reproducible.
"""

import io
import json
import platform
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.architecture import Architecture
from export.errors import ExportError
from export.formats import Build, Lowered, Needs, kv_layout, refuse_any_scales
from export.host.console import note
from export.manifest import IOContract, KVLayout, Manifest, TensorSpec
from export.plan import Attention, Cache, Plan

if TYPE_CHECKING:
    from export.quantization.store import QuantizedModel

FILES = tuple(f"model.mlpackage/{name}" for name in (
    "Data/com.apple.CoreML/model.mlmodel", "Manifest.json", "Data/com.apple.CoreML/weights/weight.bin",
))  # fmt: skip
AUTHOR = "com.apple.CoreML"
MODEL, WEIGHTS = f"{AUTHOR}/model.mlmodel", f"{AUTHOR}/weights"
"""Items of a package."""
TOOLS = ("coremltools",)
CACHES: tuple[Cache, ...] = ("float16",)
NO_CACHES: dict[Cache, str] = dict.fromkeys(("float32", "bfloat16", "int8"), "Core ML's states are of float16 only")
NO_POLICIES: dict[str, str] = {
    "sink": "its states are of float16, and keys that move would be rounded again each time",
}
LOGGERS = ("coremltools",)
_NATIVE = "libmilstoragepython*"
"""What writes weights; builds from source have none."""
_BUILT_ON_LINUX = ("x86_64",)
_ELSEWHERE = "build it on x86-64 Linux or a Mac, or leave this target out"
_LIBRARIES_BYTES = 230_000_000
_LAYER_BYTES = 1_500_000
"""Measured memory of coremltools, and of a layer's operations."""


def lacks() -> str | None:
    """Why this platform writes no package, in words; None: it does. coremltools is found without being imported."""
    found = find_spec("coremltools")
    if found is None and platform.system() == "Linux" and platform.machine() not in _BUILT_ON_LINUX:
        return f"coremltools is not built for Linux on {platform.machine()}; {_ELSEWHERE}"
    if found is None:
        return "coremltools is missing; pip install -e '.[coreml]'"
    if not any(folder for folder in found.submodule_search_locations or () if list(Path(folder).glob(_NATIVE))):
        system = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
        return f"coremltools has no native part for {system}; {_ELSEWHERE}"
    return None


def check(plan: Plan, architecture: Architecture) -> None:
    """Refuse what coremltools would refuse late or Core ML would compute differently from the eager reference."""
    if reason := lacks():
        raise ExportError(f"target {plan.target.name!r}: {reason}")
    first = next(iter(architecture.linear_shapes()))
    if plan.target.activations != "none":
        raise ExportError(
            f"target {plan.target.name!r}: {first}: activations {plan.target.activations!r}, but Core ML quantizes no "
            "activations at run time; set `activations: none`"
        )
    refuse_any_scales(plan, "Core ML keeps scales in fp16")
    if plan.target.logits != "all":
        raise ExportError(
            f"target {plan.target.name!r}: logits {plan.target.logits!r}, but Apple's convention has those of every "
            "position; set `logits: all`"
        )
    if not plan.target.artifact.endswith(".mlpackage"):
        raise ExportError(f"target {plan.target.name!r}: artifact {plan.target.artifact!r} must end in .mlpackage")
    if architecture.head_dim % 2:
        raise ExportError(f"{first}: head_dim {architecture.head_dim} is odd; rotary embedding needs pairs")
    _check_bits(plan, architecture)


def _check_bits(plan: Plan, architecture: Architecture) -> None:
    """Only int4 and int8 have a Core ML type that stores integers and scales separately."""
    from export.quantization import schemes  # its room loads torch

    for name, scheme in schemes.possible(plan.quant, architecture):
        if scheme.bits not in (4, 8):
            raise ExportError(
                f"recipe {plan.quant.name!r} on {plan.target.name!r}: {name}: int{scheme.bits}, but Core ML stores "
                "int4 and int8 only; use bits 4 or 8"
            )


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """Memory: all weights as the program's constants, a byte for each integer; the largest once more while it is read.

    Disk: twice the weights, since coremltools writes them into a temporary folder and copies them from there.
    """
    from export.quantization import schemes  # its room loads torch

    counts = schemes.of_recipe(plan.quant, architecture).counts()
    constants = counts.integers + 2 * counts.scales + 2 * counts.floats
    being_read = counts.largest * (1 if counts.integers else 6)  # float32, and its conversion to fp16
    memory = _LIBRARIES_BYTES + _LAYER_BYTES * architecture.num_hidden_layers + constants + being_read
    return Needs(memory, 2 * int(schemes.largest(plan.quant, architecture).stored_bits(float_bits=16) / 8))


def tokenizer_notes(folder: Path) -> tuple[str, ...]:  # noqa: ARG001
    """None: its clients are transformers, which every tokenizer is compared with, and others that need a Mac."""
    return ()


def lower(model: "QuantizedModel", build: Build) -> Lowered:
    """Write the package and count its contents."""
    from . import file

    package, contract = build.folder / build.plan.target.artifact, io_contract(model.architecture, build.plan)
    convert(model, contract, package, build.plan.target.attention)
    facts = file.seal(package, metadata(build.plan, model.key), build.plan.model.license)
    if subnormal := facts["subnormal_scales"]:
        note(f"{subnormal} scales are subnormal in fp16, and a GPU may take them for zero; the card says so")
    facts["float_values"] = (
        "fp16, RMSNorm in fp32" if model.recipe.linear else "fp16, rounded from float32; RMSNorm in fp32"
    )
    return Lowered(contract, facts)


def process_bytes(described: Manifest) -> int | None:
    """What Core ML holds depends on the unit that computes."""
    del described
    return None


def convert(model: "QuantizedModel", contract: IOContract, package: Path, attention: Attention) -> None:
    """Author the program and let coremltools write it without the passes that change a program.

    Only its fixed backend passes remain: valid names and the deduplication of constants.
    """
    import coremltools as ct
    import numpy as np

    from .graph import author

    def flexible(most: int) -> Any:
        return ct.RangeDim(1, most, default=1)

    new, positions = contract.max_prefill, contract.kv.context_length
    inputs = [
        ct.TensorType("inputIds", (1, flexible(new)), dtype=np.int32),
        ct.TensorType("causalMask", (1, 1, flexible(new), flexible(positions)), dtype=np.float16),
    ]
    program = author(model, contract.kv, attention)
    # hides coremltools' progress bars and the warning about its temporary folder; its errors are raised
    with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore", category=ResourceWarning):
        ct.convert(
            program,
            inputs=inputs,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(package),
        )


def metadata(plan: Plan, key: str) -> dict[str, str]:
    """User-defined metadata of the package; swift-transformers finds the tokenizer by the last key."""
    name = plan.model.base_model or plan.model.name
    return {"plan": plan.id, "quantization": key, "co.huggingface.exporters.name": name}


def listing(model: str, weights: str) -> str:
    """The package's Manifest.json, by the identifiers of its two items."""
    items = ((model, MODEL, "Specification"), (weights, WEIGHTS, "Weights"))
    entries = {
        identifier: {
            "author": AUTHOR,
            "description": f"CoreML Model {description}",
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for identifier, path, description in items
    }
    listed = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": model}
    return json.dumps(listed, indent=4) + "\n"


def io_contract(a: Architecture, plan: Plan) -> IOContract:
    """Apple's stateful convention. In slots that go round, a call takes what overwrites nothing that it has to see."""
    kv = kv_layout(plan, a, "state")
    return IOContract(
        inputs=(
            TensorSpec(name="inputIds", dtype="int32", shape=(1, "sequence")),
            TensorSpec(name="causalMask", dtype="float16", shape=(1, 1, "sequence", "total")),
        ),
        outputs=(TensorSpec(name="logits", dtype="float16", shape=(1, "sequence", a.vocab_size)),),
        states=tuple(
            TensorSpec(name=name, dtype=kv.dtype, shape=cache_shape(kv)) for name in ("keyCache", "valueCache")
        ),
        kv=kv,
        max_prefill=kv.longest_call,
        logits="all",
    )


def cache_shape(kv: KVLayout) -> tuple[int, ...]:
    """Of the states: [layers, 1, G, C, D]."""
    return (kv.layers, 1, kv.kv_heads, kv.room, kv.head_dim)


def mil_name(names: Sequence[str]) -> str:
    """A MIL identifier of one weight, or of several stacked: without dots, later names by their last part only."""
    first, *others = (name.removesuffix(".weight") for name in names)
    return "_".join([first.replace(".", "_"), *(name.rpartition(".")[2] for name in others)])
