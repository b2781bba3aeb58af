"""A recipe: how weights become integers, and the text that it calibrates with."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from export.architecture import Architecture, Positive, PositiveNumber, Strict
from export.errors import explain

from .configs import load_named
from .identifiers import FileName, Name

Levels = Literal["even", "nf4", "fp4"]
"""What codes stand for: evenly spaced integers, or the sixteen levels of bitsandbytes' types."""


class WeightScheme(Strict):
    """Symmetric integers with one scale per group (null: per output channel)."""

    bits: Literal[4, 8]
    """Of an integer."""
    group_size: Positive | None
    """Inputs that share a scale; a format may take some sizes only. null: one scale for each output channel."""
    levels: Levels = "even"
    """What a code stands for; levels other than integers only as a checkpoint holds them."""


class QuantLimits(Strict):
    """The most a recipe may lose: our fp32 model against our quantized model."""

    max_mean_kl: float
    """Mean KL divergence, nats."""
    min_top1: float
    """Share of positions with the same likeliest token."""


class CalibrationText(Strict):
    """A text and how many windows are cut from it."""

    file: FileName
    """In configs/calibration."""
    windows: Positive
    """How many windows are cut from it, spread evenly."""


class GeneratedText(Strict):
    """Text that the model itself writes, answering prompts through its chat template."""

    prompts: FileName
    """In configs/calibration, one per line."""
    windows: Positive
    """How many windows of answers the model writes."""


class Mixture(Strict):
    """The texts that a recipe calibrates with, one YAML of configs/mixtures."""

    name: Name
    description: str
    """For people; decides nothing."""
    length: Annotated[int, Field(ge=16)]
    """Tokens of a window."""
    held_out_every: Annotated[int, Field(ge=2)]
    """One window in this many is held out: the loss is estimated on it."""
    texts: tuple[CalibrationText, ...]
    """Texts that are there already, each with its number of windows."""
    generated: GeneratedText | None
    """Text that the model itself writes; null: none."""

    @property
    def windows(self) -> int:
        """Windows of all texts."""
        return sum(text.windows for text in self.texts) + (self.generated.windows if self.generated else 0)


def _load_mixture(value: Any) -> Any:
    """A recipe's YAML names its mixture; the resolved plan (and so a manifest) holds it."""
    return load_named(Mixture, "mixtures", value) if isinstance(value, str) else value


class Gptq(Strict):
    """How calibrated integers are chosen (`export/quantization/gptq.py`)."""

    damping: Annotated[float, Field(gt=0)]
    """Draws what the linears aim at towards their weights, and takes rounding errors back with the same caution: few
    tokens tell little. As a share of the mean second moment of the inputs."""


class Promotion(Strict):
    """Which linears get a larger scheme: those that lose most KL per byte, until the budget is met."""

    scheme: WeightScheme
    """That promoted linears get, of more bits than `linear`."""
    windows: Positive
    """Calibration windows on which every linear's share of the loss is estimated."""
    linear_bits_per_weight: PositiveNumber
    """The budget: of the linears together, scales included, so that one recipe serves every size of model."""


class LayerRule(Strict):
    """A scheme for some linears."""

    pattern: Annotated[str, Field(min_length=1, max_length=200)]
    scheme: WeightScheme
    """Of the linears that match."""


def _rules(value: Any) -> Any:
    """A recipe's YAML maps patterns to schemes; a manifest lists them, for the last one that matches decides."""
    if not isinstance(value, dict):
        return () if value is None else value
    rules = []
    for pattern, scheme in value.items():
        try:
            rules.append(LayerRule.model_validate({"pattern": pattern, "scheme": scheme}))
        except ValidationError as error:
            raise ValueError(f"{pattern}: {explain(error, LayerRule)}") from None
    return rules


class Rotation(Strict):
    """Random rotations of the model before it is quantized (`export/quantization/rotation.py`)."""

    seed: Annotated[int, Field(ge=0)]
    """Of the random rotations."""
    scheme: WeightScheme
    """Of the two linears that rotate the residual stream."""


class QuantRecipe(Strict):
    """How weights become integers."""

    name: Name
    description: str
    """For people; decides nothing."""
    method: Literal["none", "rtn", "kept", "scales", "gptq"]
    """`rtn`: each weight to nearest. `scales`: the same with scales searched for what the linears compute on
    calibration text. `gptq`: linears by what they compute on it. All three round embedding and head to nearest.
    `kept`: the checkpoint's own integers and scales, which may be negative."""
    calibration: Annotated[Mixture | None, BeforeValidator(_load_mixture, json_schema_input_type=str | None)] = None
    """A name in configs/mixtures."""
    gptq: Gptq | None = None
    """Settings of method gptq."""
    promotion: Promotion | None = None
    """More bits for the linears that lose most; with method gptq only."""
    rotation: Rotation | None = None
    """null: the model is quantized as it is."""
    layers: Annotated[
        tuple[LayerRule, ...],
        BeforeValidator(_rules, json_schema_input_type=dict[str, WeightScheme] | None),
        Field(max_length=32, exclude_if=lambda rules: not rules),
    ] = ()
    """Schemes of some linears instead of that of `linear`: pattern → scheme. Patterns are a shell's, of names without
    `.weight`: `"*.down_proj"`, `"model.layers.{0,2..4}.*"`, `"model.layers.{-2..-1}.mlp.*"` for the last two layers.
    What braces list must all match. Of several that match, the last one decides."""
    linear: WeightScheme | None
    """Of every linear of the layers; null: they stay float."""
    embedding: WeightScheme | None
    """null: it stays float."""
    head: WeightScheme | None
    """As the embedding where the two are tied; null: it stays float."""
    limits: QuantLimits
    """What validation judges the quantized model by."""

    @model_validator(mode="after")
    def _method_matches(self) -> "QuantRecipe":
        quantizes = any((self.linear, self.embedding, self.head))
        if quantizes == (self.method == "none"):
            raise ValueError(f"method {self.method!r} contradicts the schemes of linear, embedding and head")
        calibrates = self.method in ("scales", "gptq")
        if calibrates != (self.calibration is not None):
            raise ValueError(f"method {self.method!r} contradicts calibration: only scales and gptq need one")
        if (self.method == "gptq") != (self.gptq is not None):
            raise ValueError(f"method {self.method!r} contradicts gptq: only that method needs its settings")
        if self.method in ("kept", "scales", "gptq") and self.linear is None:
            raise ValueError(f"method {self.method!r} needs a scheme for linear")
        if self.promotion and self.method != "gptq":
            raise ValueError("promotion needs method gptq")
        if self.promotion and self.linear and self.promotion.scheme.bits <= self.linear.bits:
            raise ValueError("promotion must give more bits than linear has")
        if self.layers and (self.method in ("none", "kept") or self.promotion or self.linear is None):
            raise ValueError("layers needs a scheme for linear, method rtn, scales or gptq, and no promotion")
        if self.rotation and self.method in ("none", "kept"):
            raise ValueError("rotation needs a method that quantizes")
        return self

    @model_validator(mode="after")
    def _levels_have_an_operator(self) -> "QuantRecipe":
        if any(table and table.levels != "even" for table in (self.embedding, self.head)):
            raise ValueError("embedding and head have no operator for levels other than even")
        if any(rule.scheme.levels != "even" for rule in self.layers):
            raise ValueError("layers has schemes of integers only: levels other than even are kept, never chosen")
        if self.linear is None or self.linear.levels == "even":
            return self
        if self.method != "kept":
            raise ValueError("levels other than even need method kept: no runtime but onnxruntime has them")
        if self.linear.bits != 4:
            raise ValueError("levels other than even are of 4 bits")
        return self

    @property
    def common_scales(self) -> bool:
        """Whether every scale is positive and exact in bf16 and fp16, as all runtimes take them."""
        return self.method != "kept"

    def reshaped(self, architecture: Architecture) -> Architecture:
        """Shapes of what the recipe quantizes, given those of the checkpoint."""
        return architecture.model_copy(update={"rotated": self.rotation is not None})
