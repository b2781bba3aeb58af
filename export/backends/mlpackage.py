"""Core ML: a stateful fp16 `.mlpackage` for iOS 18 / macOS 15, made on any system. Never runs one.

The program is authored in `_mil_llama.py`; here it becomes a package that is the same, byte for byte, each time.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..contract import IOContract, KVLayout, TensorSpec
from ..errors import ExportError
from ..plan import Architecture, Plan
from ..quantize import QuantizedModel
from ..schemes import largest, of_recipe, possible
from . import Build, Lowered, Needs, StoredWeight, refuse_any_scales

LIBRARIES_BYTES = 230_000_000
LAYER_BYTES = 1_500_000
"""Measured: coremltools; a layer's operations."""


def check(plan: Plan, architecture: Architecture) -> None:
    """Refuse what coremltools would refuse late or Core ML would compute otherwise than the eager reference."""
    if find_spec("coremltools") is None:
        raise ExportError(f"target {plan.target.name!r}: coremltools is missing; pip install -e '.[coreml]'")
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
    check_bits(plan, architecture)


def check_bits(plan: Plan, architecture: Architecture) -> None:
    """Only int4 and int8 have a Core ML storage type that keeps integer and scale apart."""
    for name, scheme in possible(plan.quant, architecture):
        if scheme.bits not in (4, 8):
            raise ExportError(
                f"recipe {plan.quant.name!r}: {name}: int{scheme.bits}, but Core ML stores int4 and int8 only; "
                "use bits 4 or 8"
            )


def needs(plan: Plan, architecture: Architecture) -> Needs:
    """Every weight at once as the program's constants, integers a byte each; the largest once more while it is read.

    coremltools writes the weights into a temporary folder and copies them from there, so they are on the disk twice.
    """
    found = of_recipe(plan.quant, architecture).counts()
    constants = found.integers + 2 * found.scales + 2 * found.floats
    being_read = found.largest * (1 if found.integers else 6)  # float32, and on its way to fp16
    memory = LIBRARIES_BYTES + LAYER_BYTES * architecture.num_hidden_layers + constants + being_read
    return Needs(memory, 2 * int(largest(plan.quant, architecture).stored_bits(float_bits=16) / 8))


def lower(model: QuantizedModel, build: Build) -> Lowered:
    """Write the package into `build.folder`."""
    from . import _mlpackage_file

    context_length = build.plan.model.context_length
    package = build.folder / build.plan.target.artifact
    convert(model, context_length, package)
    facts = _mlpackage_file.seal(package, metadata(model, build), build.plan.model.license)
    facts["float_values"] = (
        "fp16, RMSNorm in fp32" if model.recipe.linear else "fp16, rounded from float32; RMSNorm in fp32"
    )
    return Lowered(contract(model.architecture, context_length), facts)


def convert(model: QuantizedModel, context_length: int, package: Path) -> None:
    """Author the program and let coremltools write it, with none of the passes that change a program.

    Only its fixed backend passes remain: valid names and the deduplication of constants.
    """
    import coremltools as ct
    import numpy as np

    from ._mil_llama import author

    def flexible() -> Any:
        return ct.RangeDim(1, context_length, default=1)

    inputs = [
        ct.TensorType("inputIds", (1, flexible()), dtype=np.int32),
        ct.TensorType("causalMask", (1, 1, flexible(), flexible()), dtype=np.float16),
    ]
    program = author(model, context_length)
    # coremltools' progress bars and a temporary folder it leaves to the garbage collector; its errors are raised
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


def metadata(model: QuantizedModel, build: Build) -> dict[str, str]:
    """What the package says of itself; the last key is where swift-transformers looks for the tokenizer."""
    spec = build.plan.model
    return {
        "plan": build.plan.id,
        "quantization": model.key,
        "co.huggingface.exporters.name": spec.base_model or spec.name,
    }


def contract(a: Architecture, context_length: int) -> IOContract:
    """Apple's stateful convention."""
    cache = (a.num_hidden_layers, 1, a.num_key_value_heads, context_length, a.head_dim)
    return IOContract(
        inputs=(
            TensorSpec(name="inputIds", dtype="int32", shape=(1, "sequence")),
            TensorSpec(name="causalMask", dtype="float16", shape=(1, 1, "sequence", "total")),
        ),
        outputs=(TensorSpec(name="logits", dtype="float16", shape=(1, "sequence", a.vocab_size)),),
        states=tuple(TensorSpec(name=name, dtype="float16", shape=cache) for name in ("keyCache", "valueCache")),
        kv=KVLayout(
            kind="state",
            dtype="float16",
            layers=a.num_hidden_layers,
            kv_heads=a.num_key_value_heads,
            head_dim=a.head_dim,
            context_length=context_length,
        ),
        max_prefill=context_length,
        logits="all",
    )


def read_weights(artifact: Path, architecture: Architecture) -> Iterator[StoredWeight]:
    """Every quantized weight of a finished package, through coremltools' own reader of weight.bin."""
    from . import _mlpackage_file

    return _mlpackage_file.stored_weights(artifact, architecture)
