"""Where calibration computes. Its sums in float come out differently on unlike processors, and so do a few integers.

Rounding to nearest has no such sums: its integers are the same everywhere.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from export.errors import ExportError
from export.plan import Device, QuantRecipe


def name(device: str) -> str:
    """What decides the last bits of sums on a device of this machine: `cpu x86_64 AVX512 BF16`, `cuda NVIDIA H200`."""
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    more = {"BF16": torch.cpu._is_avx512_bf16_supported, "AMX": torch.cpu._is_amx_tile_supported}
    parts = [
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *(n for n, is_there in more.items() if is_there()),
    ]
    return f"cpu {' '.join(parts)}"


def computing_in(device: str) -> torch.dtype:
    """What GPTQ's two models compute in: bfloat16 where this processor multiplies it faster than float32.

    Their streams and all sums over tokens are float32 in any case; what bfloat16 changes in a file's KL is not to be
    told from other calibration text (docs/decisions.md).
    """
    fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def deciding(recipe: QuantRecipe, device: Device) -> str | None:
    """The processor, where the recipe's integers depend on it; None: they are the same everywhere."""
    return name(device) if recipe.calibration else None


def device_of(processor: str | None, store: str) -> Device:
    """The device of this machine that computes as `processor` does.

    Raises ExportError: it has none; then the file `store` from the cache of the other machine is needed.
    """
    devices: tuple[Device, ...] = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        if processor in (None, name(device)):
            return "cpu" if processor is None else device
    raise ExportError(
        f"calibrated on {processor}, which computes other integers than this machine ({name('cpu')}); copy "
        f"build/cache/{store} from the machine that calibrated it"
    )


def are_alike(one: str, other: str) -> bool:
    """Whether two processors compute so much alike that comparing their integers says something."""
    return one.split()[:2] == other.split()[:2] and one.startswith("cpu ")


def require(device: Device) -> None:
    """Raises ExportError: there is no such device, or this PyTorch has no kernels for it."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ExportError(
            f"--device cuda: PyTorch {torch.__version__} finds no GPU here; install a build with CUDA, or leave the "
            "option out"
        )
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise ExportError(f"--device cuda: {_line(error)}; leave the option out, the CPU calibrates too") from None


@contextmanager
def computing_on(device: Device) -> Iterator[None]:
    """Raises ExportError: the GPU's memory does not hold what is computed inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExportError(
            f"--device {device}: {_line(error)}; end what else uses it, calibrate with fewer windows, or leave the "
            "option out"
        ) from None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
