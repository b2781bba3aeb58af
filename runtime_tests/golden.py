"""Golden tokens: the exact greedy answer that every artifact of a model and recipe must give.

    python -m runtime_tests.golden tiny int4-g32      writes runtime_tests/golden_tokens/tiny_int4-g32.json

Random weights give near-ties, so many prompts are tried and the one is kept whose closest decision on the way is
the clearest, and on which the model answers alike with and without activation quantization.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from export import checkpoint
from export.cli import run
from export.errors import ExportError
from export.manifest import Manifest
from export.model import Llama
from export.pipeline import CACHE
from export.plan import ModelSpec, QuantRecipe, Strict, load_named
from export.quantize import eager, quantize

FOLDER = Path(__file__).parent / "golden_tokens"
PROMPT, LENGTH, PROMPTS, MIN_DISTINCT = 16, 32, 4096, 6
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Golden(Strict):
    """One checked-in answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    smallest_margin: float
    """Smallest lead of the best token over the second on the path, in logits."""
    logit_rms: float
    """Root mean square of the logits on the path, the scale the margin is to be seen on."""


def find(described: Manifest) -> Golden | None:
    """The golden answer for an artifact built from its model's own weights; None where there is none."""
    path = FOLDER / f"{described.plan.model.name}_{described.plan.quant.name}.json"
    own_weights = described.checkpoint.origin == described.plan.model.source
    return Golden.model_validate_json(path.read_bytes()) if own_weights and path.is_file() else None


def answers(llama: Llama, prompts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Greedy steps of all prompts [B, S] at once: token [B], its lead over the second [B], mean square logit [B]."""
    logits, cache = llama(prompts)
    for step in range(LENGTH):
        last = logits[:, -1]
        top = last.topk(2)
        token = top.indices[:, 0]
        yield token, top.values[:, 0] - top.values[:, 1], last.square().mean(-1)
        if step < LENGTH - 1:
            logits, cache = llama(token[:, None], cache)


def choose(models: list[Llama], prompts: torch.Tensor) -> Golden:
    """The prompt with the widest smallest margin, over models that must agree on every token."""
    paths = [[torch.stack(column, dim=1) for column in zip(*answers(m, prompts), strict=True)] for m in models]
    tokens = paths[0][0]
    margin = torch.stack([path[1] for path in paths]).amin(dim=(0, 2))
    usable = torch.stack([(path[0] == tokens).all(dim=1) for path in paths]).all(dim=0)
    usable &= torch.tensor([len(set(row)) >= MIN_DISTINCT for row in tokens.tolist()])
    if not usable.any():
        raise ExportError("no prompt gives a varied answer that both models agree on; try more prompts")
    best = int(torch.where(usable, margin, -1.0).argmax())
    return Golden(
        prompt=tuple(prompts[best].tolist()),
        tokens=tuple(tokens[best].tolist()),
        smallest_margin=round(float(margin[best]), 4),
        logit_rms=round(float(paths[0][2][best].mean().sqrt()), 4),
    )


def make(model: ModelSpec, recipe: QuantRecipe) -> Golden:
    """The golden answer of the quantized eager model."""
    quantized = quantize(checkpoint.load(model, None), recipe, CACHE)
    vocab = quantized.architecture.vocab_size
    prompts = torch.randint(0, vocab, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        models = [eager(quantized.read, quantized.architecture, kind) for kind in ("none", "int8-per-token")]
        return choose(models, prompts)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant")],
) -> None:
    """Write the golden tokens of a model and recipe."""
    golden = make(load_named(ModelSpec, "models", model), load_named(QuantRecipe, "quant", quant))
    path = FOLDER / f"{model}_{quant}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(golden.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"{path}: smallest margin {golden.smallest_margin} at a logit rms of {golden.logit_rms}")


if __name__ == "__main__":
    sys.exit(run(app))
