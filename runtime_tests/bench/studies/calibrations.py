"""python -m runtime_tests.bench.studies.calibrations MODEL QUANT… --on cuda,cpu --text FILE: how devices differ.

For each recipe and device: seconds, memory of the GPU, the loss on a text that no recipe reads, and how many integers
are not those of the first device.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, cast, get_args

import torch
import typer
from torch import Tensor

from export import checkpoints
from export.build.command import run
from export.checkpoints import Checkpoint, tokenizer
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host.console import say
from export.plan import Device, ModelSpec, QuantRecipe, load_named
from export.quantization import processors, schemes, texts
from export.quantization.calibration import Calibrator, round_outside, split, tokens
from export.quantization.rotation import rotated
from export.quantization.store import Result, Unfinished

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WINDOWS, _LENGTH = 16, 512


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[list[str], typer.Argument(help="recipes with method gptq")],
    on: Annotated[str, typer.Option(help="devices, like `cuda,cpu`; the others are compared with the first")],
    text: Annotated[Path, typer.Option(help="a text file for the loss, which no recipe calibrates with")],
    source: Annotated[str | None, typer.Option(help="where the weights are, when not where the YAML says")] = None,
) -> None:
    """Print a table in Markdown."""
    devices = [cast(Device, device) for device in on.split(",")]
    for device in devices:
        if device not in get_args(Device):
            raise typer.BadParameter(f"{device!r} is none of {', '.join(get_args(Device))}", param_hint="--on")
        processors.require(device)
    origin = None if source is None else parse_origin(source)
    checkpoint = checkpoints.load(load_named(ModelSpec, "models", model), origin)
    say("| recipe | computed on | s | GPU memory, GB | KL | other integers |")
    say("|---|---|---:|---:|---:|---:|")
    for name in quant:
        recipe = load_named(QuantRecipe, "quant", name)
        if recipe.gptq is None:
            raise ExportError(f"recipe {name!r}: method {recipe.method!r} measures no loss; give one with gptq")
        first: Result | None = None
        for device in devices:
            begun = time.perf_counter()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            result = _calibrated(rotated(checkpoint, recipe), recipe, device, text)
            assert result.calibration is not None
            seconds, first = time.perf_counter() - begun, first or result
            gpu = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else ""
            differing = "" if first is result else f"{_differing(first, result):.1%}"
            told = f"{result.calibration.processor}, {torch.get_num_threads()} threads"
            say(f"| `{name}` | {told} | {seconds:.0f} | {gpu} | {result.calibration.held_out_kl:.4f} | {differing} |")


def _calibrated(checkpoint: Checkpoint, recipe: QuantRecipe, device: Device, text: Path) -> Result:
    assert recipe.calibration is not None
    outside = round_outside(checkpoint, schemes.of_recipe(recipe, checkpoint.architecture))
    with tempfile.TemporaryDirectory() as folder, processors.computing_on(device):
        unfinished = Unfinished(Path(folder) / "unfinished")
        ids = tokens(checkpoint, recipe.calibration, unfinished, device)
        used, _ = split(ids, recipe.calibration.held_out_every)
        calibrator = Calibrator(checkpoint, recipe, outside, unfinished, used, _windows(checkpoint, text).to(device))
        if recipe.promotion is None:
            return calibrator.gptq(calibrator.base, unfinished)
        return calibrator.gptq_with_promotion()


def _windows(checkpoint: Checkpoint, text: Path) -> Tensor:
    """Token ids int64 [W, L] of the text that the loss is measured on."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.write(checkpoint.source, Path(folder), checkpoint.architecture.vocab_size)
        loaded = tokenizer.load(Path(folder))
    return torch.tensor(texts.cut(text.read_text(encoding="utf-8"), str(text), _WINDOWS, _LENGTH, loaded))


def _differing(one: Result, other: Result) -> float:
    """The share of integers that are not the same."""
    pairs = [(one.tensors[name].qdata, other.tensors[name].qdata) for name in one.tensors]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


if __name__ == "__main__":
    sys.exit(run(app))
