"""Integers chosen by what a layer computes on real text (methods `scales` and `gptq`)."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from export.architecture import EMBEDDING, FINAL_NORM, HEAD, ROTATE_IN, ROTATE_OUT, Architecture
from export.checkpoints import Checkpoint, tokenizer
from export.checkpoints.integers import Unfit
from export.errors import ExportError
from export.host import memory
from export.host.console import track
from export.manifest import CalibrationInfo, Candidate
from export.model import Llama, RMSNorm
from export.plan import Device, Mixture, QuantRecipe

from . import processors, schemes, sensitivity, texts
from .layerwise import ReadWeight, Streams, Task, chunks, round_layers, round_layers_at_best_scales
from .nearest import Rounded, round_to_nearest
from .schemes import Schemes
from .sensitivity import Head, Sensitivity
from .spread import exact_products, spread
from .store import Result, Unfinished

_POSITIONS = 64
"""Whose logits are compared at once: all of a window's take a gigabyte with 128k tokens."""


def calibrate(checkpoint: Checkpoint, recipe: QuantRecipe, unfinished: Unfinished, device: Device) -> Result:
    """Linears by what they compute on calibration text, embedding and head to nearest; no integers are kept.

    Raises ExportError: the GPU has too little memory.
    """
    assert recipe.calibration is not None
    outside = round_outside(checkpoint, schemes.of_recipe(recipe, checkpoint.architecture))
    with processors.computing_on(device), exact_products(processors.computing_in(device)):
        ids = tokens(checkpoint, recipe.calibration, unfinished, device)
        calibrator = Calibrator(checkpoint, recipe, outside, unfinished, *split(ids, recipe.calibration.held_out_every))
        if recipe.method == "scales":
            return calibrator.search_scales()
        if recipe.promotion is None:
            return calibrator.gptq(calibrator.base, unfinished)
        return calibrator.gptq_with_promotion()


def round_outside(checkpoint: Checkpoint, base: Schemes) -> dict[str, Rounded]:
    """What is quantized besides the linears of layers: embedding, head, rotations, each to nearest."""
    linears = checkpoint.architecture.linear_shapes()
    outside = {name: scheme for name, scheme in base.by_name.items() if name not in linears}
    rounded = {name: round_to_nearest(checkpoint.read(name), scheme) for name, scheme in outside.items()}
    memory.give_back()  # what comes next takes more than this
    return rounded


@dataclass(frozen=True)
class Calibrator:
    """The full model (the checkpoint) beside the quantized one, and the windows that both read."""

    checkpoint: Checkpoint
    recipe: QuantRecipe
    outside: Mapping[str, Rounded]
    """What is quantized besides the linears of layers."""
    unfinished: Unfinished
    used: Tensor
    """Windows that are calibrated with, token ids int64 [W, L]. All is computed on their device."""
    held_out: Tensor
    """Windows on which the loss is measured."""

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @property
    def base(self) -> Schemes:
        """The recipe's schemes, nothing promoted."""
        return schemes.of_recipe(self.recipe, self.architecture)

    def search_scales(self) -> Result:
        """Nearest integers at searched scales. No loss is estimated, so no window is held out."""
        ids = torch.cat([self.used, self.held_out])
        with torch.inference_mode():
            stream = self.embedded(ids, self.read)
            rounded = round_layers_at_best_scales(self.read, self.architecture, self.base.by_name, stream)
            linears = self.collected((name, weight.cpu()) for name, weight in rounded)
        return self.result(linears, self.base, ids.numel(), None, ())

    def gptq(self, chosen: Schemes, unfinished: Unfinished, candidates: tuple[Candidate, ...] = ()) -> Result:
        """GPTQ of every linear in its chosen scheme, and what it loses."""
        with torch.inference_mode():
            streams = self.streams()
            linears = self.collected(self.walk(chosen, unfinished, streams))
            held_out = Streams(*(stream[len(self.used) :].clone() for stream in (streams.full, streams.quantized)))
            del streams  # most of the memory; the loss needs the held-out windows only
            memory.give_back()
            kl = self.kl(held_out)
        return self.result(linears, chosen, self.used.numel(), kl, candidates)

    def gptq_with_promotion(self) -> Result:
        """GPTQ, with more bits for the linears that save most KL per byte."""
        promotion = self.recipe.promotion
        assert promotion is not None
        budget = sensitivity.budget_bytes(self.recipe, self.base)
        candidates = sensitivity.ranked(self.sensitivities(), self.base, promotion)
        names = sensitivity.affordable(candidates, budget)
        chosen = self.base.promoted(names, promotion.scheme)
        return self.gptq(chosen, self.unfinished.of(names), sensitivity.marked(candidates, names))

    def collected(self, rounded: Iterable[tuple[str, Rounded]]) -> dict[str, Rounded]:
        return dict(track(rounded, "quantize", len(self.architecture.linear_shapes())))

    def result(
        self,
        linears: Mapping[str, Rounded],
        chosen: Schemes,
        token_count: int,
        kl: float | None,
        candidates: tuple[Candidate, ...],
    ) -> Result:
        tensors, reason = {**self.outside, **linears}, f"method {self.recipe.method} chooses its own"
        codes = {name: self.checkpoint.integers(name) for name in self.base.names}
        return Result(
            {name: tensors[name] for name in self.base.names},
            chosen,
            CalibrationInfo(
                texts=texts.sha256(self.recipe.calibration),
                day=texts.day(self.recipe.calibration),
                tokens=token_count,
                held_out_kl=kl,
                candidates=candidates,
                processor=processors.name(self.used.device.type),
            ),
            kept=(),
            not_kept={n: held.reason if isinstance(held, Unfit) else reason for n, held in codes.items() if held},
        )

    def streams(self) -> Streams:
        """What enters both models' first layers, windows that are calibrated with first."""
        ids = torch.cat([self.used, self.held_out])
        return Streams(self.embedded(ids, self.read), self.embedded(ids, self.read_quantized))

    def walk(self, chosen: Schemes, unfinished: Unfinished, streams: Streams) -> Iterator[tuple[str, Rounded]]:
        """Name and integers of every linear, written to `unfinished` as they come. `streams` pass the layers."""
        assert self.recipe.gptq is not None
        dtype = processors.computing_in(self.used.device.type)
        task = Task(chosen.by_name, self.recipe.gptq, len(self.used), unfinished.read, dtype)
        for name, weight in round_layers(self.read, self.architecture, task, streams):
            rounded = weight.cpu()
            unfinished.write(name, rounded)
            yield name, rounded

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Of every linear, on some of the windows."""
        if measured := self.unfinished.read_sensitivities():
            return measured
        promotion, base = self.recipe.promotion, self.recipe.linear
        assert promotion is not None
        assert base is not None
        count = min(promotion.windows, len(self.used))
        ids = self.used[torch.linspace(0, len(self.used) - 1, count).long()]
        streams = list(torch.split(self.embedded(ids, self.read), 1))
        pairs = sensitivity.measure(
            self.read, self.architecture, self.head(self.read), streams, (base, promotion.scheme)
        )
        measured = dict(track(pairs, "sensitivity", len(self.architecture.linear_shapes())))
        self.unfinished.write_sensitivities(measured)
        return measured

    def read(self, name: str) -> Tensor:
        """A weight of the full model, on the device."""
        return self.checkpoint.read(name).to(self.used.device)

    def read_quantized(self, name: str) -> Tensor:
        """A weight outside the layers as the quantized model has it, on the device."""
        return self.outside[name].dequantized().to(self.used.device) if name in self.outside else self.read(name)

    def embedded(self, ids: Tensor, read: ReadWeight) -> Tensor:
        """What enters the first layer, float32 [W, L, D]: the embedding of the ids, rotated where the model is."""
        stream = nn.functional.embedding(ids, read(EMBEDDING))
        if self.architecture.rotated:
            rotation = read(ROTATE_IN)
            for x in chunks(stream):
                x[:] = nn.functional.linear(x, rotation)
        return stream

    def head(self, read: ReadWeight) -> Head:
        """What follows the last layer."""
        a = self.architecture
        norm, table = RMSNorm(a.hidden_size, a.rms_norm_eps), EMBEDDING if a.tie_word_embeddings else HEAD
        norm.weight = nn.Parameter(read(FINAL_NORM), requires_grad=False)
        if not a.rotated:
            return Head(norm, read(table))
        rotation = read(ROTATE_OUT)
        return Head(lambda x: nn.functional.linear(norm(x), rotation), read(table))

    def kl(self, streams: Streams) -> float:
        """Mean over positions of KL(full‖quantized), nats, from what leaves the last layers."""
        full, quantized = self.head(self.read), self.head(self.read_quantized)

        def of_some(pair: tuple[Tensor, Tensor]) -> float:
            p = (full.norm(pair[0]) @ full.weight.T).log_softmax(-1)
            q = (quantized.norm(pair[1]) @ quantized.weight.T).log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).double().sum())

        positions = [torch.split(stream.flatten(0, 1), _POSITIONS) for stream in (streams.full, streams.quantized)]
        total = sum(spread(of_some, zip(*positions, strict=True), streams.full.device.type))
        return total / (len(streams.full) * streams.full.shape[1])


def split(ids: Tensor, held_out_every: int) -> tuple[Tensor, Tensor]:
    """Windows that are calibrated with, and those that are held out."""
    held = torch.arange(len(ids), device=ids.device) % held_out_every == held_out_every - 1
    if not bool(held.any()):
        raise ExportError(
            f"a mixture of {len(ids)} windows has none to hold out (each {held_out_every}th); add windows"
        )
    return ids[~held], ids[held]


def tokens(checkpoint: Checkpoint, mixture: Mixture, unfinished: Unfinished, device: Device) -> Tensor:
    """The calibration text in the checkpoint's own tokens, int64 [W, L] on the device; generated windows come last."""
    vocab = checkpoint.architecture.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        info = tokenizer.write(checkpoint.source, Path(folder), vocab)
        loaded = tokenizer.load(Path(folder))
    ids = texts.windows(mixture, loaded)
    if mixture.generated is not None:
        prompts = texts.prompt_ids(texts.lines(mixture.generated.prompts), loaded, str(checkpoint.origin))
        ids = torch.cat([ids, _generated(checkpoint, mixture, prompts, frozenset(info.eos_ids), unfinished, device)])
    if int(ids.max()) >= vocab:
        raise ExportError(f"the tokenizer gives id {int(ids.max())}, beyond the vocabulary")
    return ids.to(device)


def _generated(
    checkpoint: Checkpoint,
    mixture: Mixture,
    prompts: list[list[int]],
    ends: frozenset[int],
    unfinished: Unfinished,
    device: Device,
) -> Tensor:
    """Windows that the full model writes; a run that is resumed does not write them again."""
    assert mixture.generated is not None
    if (ids := unfinished.read_windows()) is not None:
        return ids
    a = checkpoint.architecture
    weights = {name: checkpoint.read(name).to(device) for name in a.tensor_shapes()}
    weights.setdefault(HEAD, weights[EMBEDDING])
    ids = texts.conversations(Llama(a).load(weights), prompts, ends, mixture.generated.windows, mixture.length)
    unfinished.write_windows(ids)
    return ids
