"""Makes golden tokens: the exact greedy answer that every artifact of a model and recipe must give.

    python -m runtime_tests.checks.golden tiny int4-g32      writes golden_tokens/tiny_int4-g32.json

Random weights give near-ties. So of many prompts we take the one whose closest decision is the clearest, among those
that the model answers alike with and without activation quantization.
"""

import sys
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from export import checkpoints
from export.build.command import run
from export.errors import ExportError
from export.host.console import say
from export.model import Llama
from export.pipeline import CACHE
from export.plan import ModelSpec, QuantRecipe, load_named
from export.quantization import quantize
from export.quantization.eager import eager

from .tokens import GOLDEN, Golden

_PROMPT, _LENGTH, _PROMPTS, MIN_DISTINCT = 16, 32, 4096, 6
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def answers(llama: Llama, prompts: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Greedy steps of all prompts [B, S] at once: token [B], lead over the second best [B], mean square logit [B]."""
    logits, cache = llama(prompts)
    for step in range(_LENGTH):
        last = logits[:, -1]
        top = last.topk(2)
        token = top.indices[:, 0]
        yield token, top.values[:, 0] - top.values[:, 1], last.square().mean(-1)
        if step < _LENGTH - 1:
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
    quantized = quantize(checkpoints.load(model, None), recipe, CACHE)
    vocab = quantized.architecture.vocab_size
    prompts = torch.randint(0, vocab, (_PROMPTS, _PROMPT), generator=torch.Generator().manual_seed(0))
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
    path = GOLDEN / f"{model}_{quant}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(golden.model_dump_json(indent=1) + "\n", encoding="utf-8")
    say(f"{path}: smallest margin {golden.smallest_margin} at a logit rms of {golden.logit_rms}")


if __name__ == "__main__":
    sys.exit(run(app))
