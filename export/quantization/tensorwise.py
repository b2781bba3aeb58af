"""Each tensor on its own (methods `rtn` and `kept`): rounded to nearest, or the integers that the checkpoint holds."""

from dataclasses import replace

import torch

from export.architecture import EMBEDDING, HEAD
from export.checkpoints import Checkpoint
from export.checkpoints.integers import Integers, Unfit
from export.errors import ExportError
from export.host.console import track
from export.plan import WeightScheme

from .nearest import SMALLEST_SCALE, Rounded, compared, joined, round_to_nearest, rows_at_once
from .schemes import Schemes
from .spread import one_torch_thread
from .store import Result

_LEVELS = {"even": "integers", "nf4": "NF4 levels", "fp4": "FP4 levels"}
_LARGEST_SCALE = torch.finfo(torch.float16).max


def round_all(checkpoint: Checkpoint, schemes: Schemes) -> Result:
    """Every tensor to nearest; integers that the checkpoint holds already are kept where every runtime takes them."""
    tensors: dict[str, Rounded] = {}
    not_kept: dict[str, str] = {}
    kept: list[str] = []
    with one_torch_thread():
        for name, scheme in track(schemes.by_name.items(), "quantize", len(schemes.names)):
            weight, integers = checkpoint.read(name), _portable(checkpoint.integers(name), scheme)
            if isinstance(integers, Integers):
                kept.append(name)
                tensors[name] = _compared_in_blocks(weight, integers)
                continue
            if isinstance(integers, Unfit):
                not_kept[name] = integers.reason
            tensors[name] = round_to_nearest(weight, scheme)
    return Result(tensors, schemes, None, kept, not_kept)


def keep_all(checkpoint: Checkpoint, schemes: Schemes, recipe: str) -> Result:
    """Every linear exactly as the checkpoint holds it, in floats too; embedding and head where that is possible.

    Raises ExportError: a linear's codes that the recipe's scheme cannot hold, or no codes at all.
    """
    tensors: dict[str, Rounded] = {}
    kept: list[str] = []
    not_kept: dict[str, str] = {}
    with one_torch_thread():
        for name, scheme in track(schemes.by_name.items(), "keep", len(schemes.names)):
            integers = _exact(checkpoint.integers(name), scheme)
            if isinstance(integers, Integers):
                kept.append(name)
                tensors[name] = _compared_in_blocks(checkpoint.read(name), integers)
            elif name in (EMBEDDING, HEAD):
                tensors[name] = round_to_nearest(checkpoint.read(name), scheme)
                not_kept |= {name: integers.reason} if integers else {}
            elif integers:
                raise ExportError(
                    f"{checkpoint.origin}: {name}: {integers.reason}, so recipe {recipe!r} cannot keep it; "
                    "use int4-g32, which rounds again"
                )
    if not kept:
        raise ExportError(f"{checkpoint.origin}: holds floats, so recipe {recipe!r} has nothing to keep; use int4-g32")
    quantized = {name: scheme for name, scheme in schemes.by_name.items() if name in tensors}
    return Result(tensors, Schemes(schemes.architecture, quantized), None, kept, not_kept)


def _portable(integers: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit | None:
    """The same codes, with scales of the recipe's groups that are exact in bf16 and fp16; or why not. None: floats."""
    if not isinstance(integers, Integers):
        return integers
    if integers.bits != scheme.bits:
        return Unfit(f"{integers.bits} bits do not fit a recipe of {scheme.bits}")
    if misfit := _misfit(integers, scheme):
        return misfit
    scale = integers.scale.bfloat16().float()
    if bool((scale < 0).any()):
        return Unfit("negative scales, which only onnxruntime multiplies by (int4-g32-exact on onnx-cpu keeps them)")
    if not SMALLEST_SCALE <= float(scale.min()) <= float(scale.max()) <= _LARGEST_SCALE:
        return Unfit("scales outside 2^-17 … 65504")
    return _regrouped(replace(integers, scale=scale), scheme)


def _exact(integers: Integers | Unfit | None, scheme: WeightScheme) -> Integers | Unfit | None:
    """The same codes and the same scales, repeated where the recipe's groups are smaller; or why not. None: floats."""
    if not isinstance(integers, Integers):
        return integers
    if integers.bits > scheme.bits:
        return Unfit(f"{integers.bits} bits do not fit a recipe of {scheme.bits}")
    return _misfit(integers, scheme) or _regrouped(integers, scheme)


def _misfit(integers: Integers, scheme: WeightScheme) -> Unfit | None:
    if integers.levels != scheme.levels:
        return Unfit(f"{_LEVELS[integers.levels]} do not fit a recipe of {_LEVELS[scheme.levels]}")
    group = scheme.group_size or integers.qdata.shape[1]
    if integers.group_size % group:
        return Unfit(f"groups of {integers.group_size} do not fit recipe groups of {group}")
    return None


def _regrouped(integers: Integers, scheme: WeightScheme) -> Integers:
    group = scheme.group_size or integers.qdata.shape[1]
    return replace(integers, scale=integers.scale.repeat_interleave(integers.group_size // group, dim=1))


def _compared_in_blocks(weight: torch.Tensor, integers: Integers) -> Rounded:
    """The checkpoint's own codes with their error against its weight float32 [N, K]."""
    rows = rows_at_once(weight)
    tensors = (weight, integers.qdata, integers.scale)
    blocks = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
    compared_blocks = [compared(w, qdata, scale, integers.levels) for w, qdata, scale in blocks]
    return joined(integers.qdata, integers.scale, compared_blocks)
