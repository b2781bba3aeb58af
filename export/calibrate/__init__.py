"""Integers chosen by what a layer computes on real text, instead of by rounding each weight on its own."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import schemes, tokenizer
from ..checkpoint import Checkpoint
from ..errors import ExportError
from ..manifest import Candidate
from ..model import Llama, RMSNorm
from ..plan import ROTATE_IN, ROTATE_OUT, Architecture, Mixture, QuantRecipe, WeightScheme
from ..progress import track
from ..rounding import Rounded
from ..schemes import EMBEDDING, HEAD, Schemes
from . import generate, promote, scales, sensitivity, texts
from .activations import ROUND
from .gptq import Rounding
from .layerwise import Both, Task, round_layers
from .loss import mean_kl
from .observe import ReadWeight
from .pieces import pieces
from .unfinished import Unfinished

FACTOR_BYTES = 3 * 8
"""For each pair of a linear's inputs: the damped moments, their inverse and its factor, float64."""


@dataclass(frozen=True)
class Calibrated:
    """Linears as calibration text asks for."""

    linears: dict[str, Rounded]
    schemes: Schemes
    tokens: int
    """Calibrated with; held-out windows are not counted."""
    held_out_kl: float | None
    """Mean KL of the full model to the quantized one on held-out windows, nats; None: not measured."""
    candidates: tuple[Candidate, ...]
    """Linears by what promoting them saves, best first; empty where the recipe promotes none."""


def run(
    checkpoint: Checkpoint, recipe: QuantRecipe, rounded: Mapping[str, Rounded], unfinished: Unfinished
) -> Calibrated:
    """Choose the integers of every linear; `rounded` has what is quantized besides."""
    assert recipe.calibration is not None
    ids = tokens(checkpoint, recipe.calibration, unfinished).to(device())
    calibrator = Calibrator(checkpoint, recipe, rounded, unfinished, *split(ids, recipe.calibration.held_out_every))
    if recipe.method == "scales":
        return calibrator.search_scales()
    if recipe.promotion is None:
        return calibrator.round(calibrator.base, unfinished)
    return calibrator.promote()


@dataclass(frozen=True)
class Calibrator:
    """A checkpoint, what is done with it, and what both models read."""

    checkpoint: Checkpoint
    recipe: QuantRecipe
    rounded: Mapping[str, Rounded]
    unfinished: Unfinished
    used: Tensor
    """Token ids int64 [W, L]."""
    held_out: Tensor

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @property
    def base(self) -> Schemes:
        return schemes.of_recipe(self.recipe, self.architecture)

    def search_scales(self) -> Calibrated:
        """Nearest integers at searched scales. No loss is estimated, so no window is held out."""
        ids = torch.cat([self.used, self.held_out])
        with torch.inference_mode():
            found = scales.round_layers(self.read, self.architecture, known(self.base), self.embedded(ids))
            linears = dict(track(on_cpu(found), "quantize", len(self.architecture.linear_shapes())))
        return Calibrated(linears, self.base, ids.numel(), None, ())

    def round(self, chosen: Schemes, unfinished: Unfinished) -> Calibrated:
        """GPTQ of every linear, and what it loses."""
        with torch.inference_mode():
            stream = self.streams()
            found = self.walk(chosen, unfinished, stream)
            linears = dict(track(found, "quantize", len(self.architecture.linear_shapes())))
            last = Both(stream.full[len(self.used) :].clone(), stream.quantized[len(self.used) :].clone())
            del stream, found
            kl = self.loss(last)
        return Calibrated(linears, chosen, self.used.numel(), kl, ())

    def streams(self) -> Both:
        """What enters both models' first layers, windows that are calibrated with first."""
        ids = torch.cat([self.used, self.held_out])
        return Both(self.embedded(ids), self.looked_up(ids))

    def walk(self, chosen: Schemes, unfinished: Unfinished, stream: Both) -> Iterator[tuple[str, Rounded]]:
        """Name and integers of every linear, kept as they come; `stream` goes along."""
        settings = self.recipe.gptq
        assert settings is not None
        task = Task(
            scheme_of=known(chosen),
            rounding=Rounding(settings.damping, settings.pull),
            activations=ROUND[settings.activations],
            used=len(self.used),
            done=unfinished.read,
        )
        for name, one in on_cpu(round_layers(self.read, self.architecture, task, stream)):
            unfinished.keep(name, one)
            yield name, one

    def promote(self) -> Calibrated:
        """GPTQ, with more bits for the linears that need them most."""
        promotion = self.recipe.promotion
        assert promotion is not None
        if promotion.max_kl is None:
            budget = promote.budget_bytes(self.recipe, self.base)
            candidates = promote.ranked(self.sensitivities(), self.base, promotion)
            names = promote.affordable(candidates, budget)
            found = self.promoted(names)
        else:
            candidates = promote.ranked(self.sensitivities(), self.base, promotion)
            names, found = promote.until_kl(self.recipe, candidates, self.attempt)
        marked = promote.mark(candidates, names)
        return Calibrated(found.linears, found.schemes, found.tokens, found.held_out_kl, marked)

    def attempt(self, names: list[str]) -> tuple[Calibrated, float]:
        """A whole rounding with these promoted, and what it loses."""
        found = self.promoted(names)
        assert found.held_out_kl is not None
        return found, found.held_out_kl

    def promoted(self, names: list[str]) -> Calibrated:
        """GPTQ with these promoted."""
        assert self.recipe.promotion is not None
        return self.round(self.base.promoted(names, self.recipe.promotion.scheme), self.unfinished.of(names))

    def sensitivities(self) -> dict[str, sensitivity.Sensitivity]:
        """Of every linear, on some of the windows."""
        if found := self.unfinished.read_sensitivities():
            return found
        promotion, base = self.recipe.promotion, self.recipe.linear
        assert promotion is not None
        assert base is not None
        count = min(promotion.windows, len(self.used))
        ids = self.used[torch.linspace(0, len(self.used) - 1, count).long()]
        streams = list(torch.split(self.embedded(ids), 1))
        head = sensitivity.Head(self.last_norm(self.read), self.read(self.head_name))
        measured = sensitivity.measure(self.read, self.architecture, head, streams, (base, promotion.scheme))
        found = dict(track(measured, "sensitivity", len(self.architecture.linear_shapes())))
        self.unfinished.keep_sensitivities(found)
        return found

    def read(self, name: str) -> Tensor:
        """A weight of the full model, where it is computed with."""
        return self.checkpoint.read(name).to(device())

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.architecture.tie_word_embeddings else HEAD

    def last_norm(self, weight_of: ReadWeight) -> nn.Module:
        """The norm before the head, and the rotation after it where there is one."""
        a = self.architecture
        found = RMSNorm(a.hidden_size, a.rms_norm_eps)
        found.weight = nn.Parameter(weight_of("model.norm.weight"), requires_grad=False)
        return nn.Sequential(found, linear(weight_of(ROTATE_OUT))) if a.rotated else found

    def dequantized(self, name: str) -> Tensor:
        """A weight outside the layers as the quantized model has it."""
        return self.rounded[name].dequantized().to(device()) if name in self.rounded else self.read(name)

    def embedded(self, ids: Tensor) -> Tensor:
        """[W, L, D] that enters the full model's first layer."""
        return self.entering(ids, self.read)

    def looked_up(self, ids: Tensor) -> Tensor:
        """The same of the quantized model."""
        return self.entering(ids, self.dequantized)

    def entering(self, ids: Tensor, weight_of: ReadWeight) -> Tensor:
        """Embedding of the ids, rotated where the model is."""
        out = nn.functional.embedding(ids, weight_of(EMBEDDING))
        if self.architecture.rotated:
            rotate = linear(weight_of(ROTATE_IN))
            for x in pieces(out):
                x[:] = rotate(x)
        return out

    def loss(self, last: Both) -> float:
        """Mean KL of what the two models make of their last streams, nats."""
        full, quantized = self.read(self.head_name), self.dequantized(self.head_name)
        norm, quantized_norm = self.last_norm(self.read), self.last_norm(self.dequantized)
        pairs = zip(last.full, last.quantized, strict=True)
        return mean_kl((norm(x) @ full.T, quantized_norm(y) @ quantized.T) for x, y in pairs)


def device() -> torch.device:
    """Where calibration computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear(weight: Tensor) -> nn.Linear:
    """A linear with that weight [N, K]."""
    with torch.device("meta"):
        found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def known(chosen: Schemes) -> Callable[[str], WeightScheme]:
    """The scheme of a linear, which has one."""
    return lambda name: chosen.by_name[name]


def on_cpu(found: Iterator[tuple[str, Rounded]]) -> Iterator[tuple[str, Rounded]]:
    """Integers and scales as they are kept."""
    return ((name, one.cpu()) for name, one in found)


def split(ids: Tensor, held_out_every: int) -> tuple[Tensor, Tensor]:
    """Windows that are calibrated with, and those that are not."""
    held = torch.arange(len(ids), device=ids.device) % held_out_every == held_out_every - 1
    if not bool(held.any()):
        raise ExportError(
            f"a mixture of {len(ids)} windows has none to hold out (each {held_out_every}th); add windows"
        )
    return ids[~held], ids[held]


def tokens(checkpoint: Checkpoint, mixture: Mixture, unfinished: Unfinished) -> Tensor:
    """The calibration text in the checkpoint's own tokens, int64 [W, L]: windows of texts, then of generated ones."""
    vocab = checkpoint.architecture.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        its_ids = tokenizer.write(checkpoint.source, Path(folder), vocab)
        loaded = tokenizer.load(Path(folder))
    ids = texts.windows(mixture, loaded)
    if mixture.generated is not None:
        prompts = generate.prompt_ids(texts.lines(mixture.generated.prompts), loaded, checkpoint.origin)
        ids = torch.cat([ids, generated(checkpoint, mixture, prompts, frozenset(its_ids.eos_ids), unfinished)])
    if int(ids.max()) >= vocab:
        raise ExportError(f"the tokenizer gives id {int(ids.max())}, beyond the vocabulary")
    return ids


def generated(
    checkpoint: Checkpoint, mixture: Mixture, prompts: list[list[int]], ends: frozenset[int], unfinished: Unfinished
) -> Tensor:
    """Windows that the full model writes; an interrupted run keeps them."""
    assert mixture.generated is not None
    if (found := unfinished.read_windows()) is not None:
        return found
    a = checkpoint.architecture
    weights = {name: checkpoint.read(name).to(device()) for name in a.tensor_shapes()}
    weights.setdefault(HEAD, weights[EMBEDDING])
    found = generate.conversations(Llama(a).load(weights), prompts, ends, mixture.generated.windows, mixture.length)
    unfinished.keep_windows(found)
    return found


def memory_bytes(recipe: QuantRecipe, a: Architecture) -> int:
    """The most that calibrating holds beside the integers, bytes; a model that writes text itself is there as a whole.

    Half as much again as what is counted stands beside it, measured: pieces being computed, memory freed in between.
    """
    assert recipe.calibration is not None
    count = recipe.calibration.windows * recipe.calibration.length
    table, layer = 4 * a.vocab_size * a.hidden_size, 4 * (3 * a.intermediate_size + 4 * a.hidden_size) * a.hidden_size
    if recipe.method == "scales":
        walking, looking_up = 4 * count * a.hidden_size + 2 * layer, table + 4 * count * a.hidden_size
    else:
        walking = 2 * 4 * count * (a.hidden_size + a.intermediate_size) + gptq_bytes(a) + 2 * layer
        looking_up = 2 * (table + 4 * count * a.hidden_size)
    return max(walking * 3 // 2, looking_up, writing_bytes(recipe.calibration, a))


def gptq_bytes(a: Architecture) -> int:
    """Moments of what down_proj reads, their factors, and its weight on the way."""
    return a.intermediate_size**2 * (2 * 4 + FACTOR_BYTES) + 4 * a.intermediate_size * a.hidden_size * 8


def writing_bytes(mixture: Mixture, a: Architecture) -> int:
    """Weights, and the cache of all rows, twice while it grows."""
    if mixture.generated is None:
        return 0
    cache = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * mixture.length
    weights = sum(torch.Size(shape).numel() for shape in a.tensor_shapes().values())
    return 4 * (weights + 2 * mixture.generated.windows * cache)
