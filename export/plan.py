"""What to build: a plan is model × recipe × target, three YAML files. No torch.

Every key is written in every file and unknown keys are refused, so no default here can differ from what a reader sees.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from .architecture import Architecture, Positive, PositiveNumber, Strict
from .errors import CHECKOUT, ExportError, Record, explain, found, load_record, stems, suggestion

Device = Literal["cpu", "cuda"]
"""Where calibration computes."""
Levels = Literal["even", "nf4", "fp4"]
"""What codes stand for: evenly spaced integers, or the sixteen levels of bitsandbytes' types."""
Attention = Literal["fused", "plain"]
"""One operation of the runtime, or its parts: matmul, softmax, matmul."""
Cache = Literal["float32", "float16", "bfloat16", "int8"]
"""Numbers of a KV cache."""
CONFIGS = CHECKOUT / "configs"
SHORTEST_CONTEXT = 64
"""Tokens; a KV cache of fewer is no model that anybody runs."""
_NAME = re.compile(r"\w(?:[\w-]|\.(?!\.)){0,79}")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_PART = 255
"""Bytes of a file's name that every file system takes."""
_LONGEST_ID = 200
"""Bytes of an artifact's id: the names of locks and of unfinished builds are longer."""
_LONGEST_CLEANED = 80


def _require_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:100]!r} is no name: at most 80 letters, digits, _, - and single dots")
    return text


def cleaned(text: str) -> str:
    """The name that a text has where only a name may stand: `my model (v2)` is `my-model-v2`.

    Raises ExportError: nothing of it can stand in a name.
    """
    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text))
    single = re.sub(r"\.{2,}", ".", plain).lstrip("-.")
    short = single.encode()[:_LONGEST_CLEANED].decode(errors="ignore").rstrip("-.")
    if not _NAME.fullmatch(short):
        raise ExportError(f"{text[:100]!r}: no name for an artifact can be made of it; give one with --name")
    return short


def leads_out(name: str) -> str | None:
    """Why the name of a file leads out of its folder, in words; None: it stays inside, as far as a name tells."""
    parts = name.replace("\\", "/").split("/")
    if (parts[0] == "" and len(parts) > 1) or re.match(r"[A-Za-z]:[\\/]", name):
        return "is absolute"
    return "climbs out with `..`" if ".." in parts else None


def not_a_file_name(text: str) -> str | None:
    """Why a text is no name of a file below a folder, in words; None: it is one, like `sub/file`."""
    parts = text.split("/")
    odd = (
        "\\" in text
        or not {"", "."}.isdisjoint(parts)
        or max(len(part.encode(errors="surrogatepass")) for part in parts) > _LONGEST_PART
    )
    return leads_out(text) or ("is no file name" if odd or _CONTROLS.search(text) else None)


def _require_file_name(text: str) -> str:
    if reason := not_a_file_name(text):
        raise ValueError(f"{text[:100]!r} {reason}")
    return text


Name = Annotated[str, AfterValidator(_require_name)]
"""Of a plan, model, recipe, target, format, session or device: safe in a path, a shell and an import by itself."""
FileName = Annotated[str, AfterValidator(_require_file_name)]
"""Of a file below a folder that is known otherwise, relative to it."""


class ModelSpec(Strict):
    """Where a model comes from and the context length its artifacts are built for."""

    name: Name
    source: str | None
    """`package:NAME/FILE`, `hub:OWNER/NAME[@REVISION]`, `seed:N`; null: --source must be given."""
    base_model: str | None
    """Hub id of the checkpoint, for the card."""
    license: str
    """Of the weights, as the hub names it."""
    context_length: Annotated[int, Field(ge=SHORTEST_CONTEXT)]
    """Slots of the KV cache: the longest prompt plus answer, tokens."""
    architecture: Architecture | None
    """null: taken from the checkpoint."""

    @model_validator(mode="after")
    def _not_rotated(self) -> "ModelSpec":
        if self.architecture and self.architecture.rotated:
            raise ValueError("architecture.rotated is not a model's: give `rotation` in a recipe")
        return self

    @model_validator(mode="after")
    def _not_longer_than_its_positions(self) -> "ModelSpec":
        longest = self.architecture.max_position_embeddings if self.architecture else self.context_length
        if self.context_length > longest:
            raise ValueError(f"context_length {self.context_length} is more than max_position_embeddings {longest}")
        return self


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


class TargetLimits(Strict):
    """The most a lowering may differ: our quantized model against the artifact.

    Where the runtime quantizes activations, these are differences beyond what float noise alone does to the same
    model (see docs/decisions.md, "Rounding is chaotic").
    """

    max_mean_kl: float
    """Mean KL divergence, nats."""
    min_top1: float
    """Share of positions with the same likeliest token."""
    min_sqnr_db: float
    """Signal to noise of the logits, dB."""
    min_probe_sqnr_db: float | None
    """SQNR the best of many single-token prompts must reach: there rounding noise has not grown yet. null: not run."""
    compared_tokens: Positive | None
    """Greedy tokens of an attached device that are compared with this machine's. null: not compared, because the
    runtime's kernels for another processor round differently by design."""


class CacheLimits(Strict):
    """What a kind of cache may cost beyond the lowering, near each of several places up to the end of the context.

    Compared are our quantized model, whose cache is float32, and the artifact.
    """

    max_mean_kl: float
    """Mean KL divergence that may come on top of the lowering's, nats."""
    min_top1: float
    """Share that must be left of the positions where the lowering keeps the likeliest token."""
    min_probe_sqnr_db: float | None
    """Instead of the target's; null: no single tokens are compared."""


class Target(Strict):
    """A format and the runtime that runs it."""

    name: Name
    description: str
    """For people; decides nothing."""
    backend: Name
    """Package in export/formats/ that writes the artifact."""
    session: Name
    """Module in runtime_tests/sessions/ that runs it."""
    artifact: Name
    """File or folder the artifact is, inside the artifact folder."""
    activations: Literal["none", "int8-per-token"]
    """Activation quantization the runtime adds; the eager reference does the same."""
    logits: Literal["last", "all"]
    """Positions of a prompt for which the artifact returns logits."""
    attention: Annotated[Attention, Field(exclude_if=lambda attention: attention == "fused")] = "fused"
    """Of Core ML: `plain` is matmul, softmax and matmul, for systems where the fused operation is wrong or slow."""
    cache: Annotated[Cache | None, Field(exclude_if=lambda cache: cache is None)] = None
    """Numbers of the KV cache where `--cache` asks for no others; null: the first kind of the format."""
    cache_limits: Annotated[Mapping[Cache, CacheLimits], Field(exclude_if=lambda limits: not limits)] = {}
    """For kinds of cache that lose more than the format's first one."""
    limits: TargetLimits
    """What validation judges the lowering by."""
    limits_on: dict[str, TargetLimits]
    """Limits for processors whose kernels round differently, by family: aarch64, x86_64."""


class Plan(Strict):
    """One artifact to build."""

    name: Name
    """Whose weights they are: the model's name, or the own one of another checkpoint or of an adapter."""
    model: ModelSpec
    quant: QuantRecipe
    target: Target
    device: Device = "cpu"
    """cpu: the same everywhere that processors are alike, and where nothing is calibrated."""
    context: Annotated[Positive | None, Field(exclude_if=lambda context: context is None)] = None
    """Tokens that were asked for instead of the model's; `model.context_length` holds them too."""
    cache: Annotated[Cache | None, Field(exclude_if=lambda cache: cache is None)] = None
    """The kind that was asked for instead of the target's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        """Artifacts of before there were names are the model's."""
        if not isinstance(fields, dict) or "name" in fields:
            return fields
        model = fields.get("model")
        name = model.get("name") if isinstance(model, dict) else getattr(model, "name", None)
        return {"name": name, **fields}

    @model_validator(mode="after")
    def _id_is_a_file_name(self) -> "Plan":
        if (length := len(self.id.encode())) > _LONGEST_ID:
            raise ValueError(
                f"an id of {length} bytes, at most {_LONGEST_ID} make a folder's name; take a shorter name"
            )
        return self

    @property
    def id(self) -> str:
        """`NAME_RECIPE_TARGET[_CONTEXT][_CACHE]`, the default output folder: the last two where a YAML has others."""
        asked = (str(asked) for asked in (self.context, self.cache) if asked is not None)
        return "_".join((self.name, self.quant.name, self.target.name, *asked))

    def named(self, name: str) -> "Plan":
        """The plan of an artifact of that name. Raises ExportError: it is no name, or too long."""
        try:
            return Plan.model_validate(dict(self) | {"name": _require_name(name)})
        except ValidationError as error:
            raise ExportError(f"--name {name}: {explain(error)}") from None
        except ValueError as error:
            raise ExportError(f"--name {error}") from None


def names(kind: str) -> list[str]:
    """Every known model, recipe or target (`kind`: models, quant, targets), the user's own among them."""
    return stems(CONFIGS / kind)


def file_of(kind: str, name: str) -> Path:
    """The YAML of a name, the user's own before ours."""
    return found(CONFIGS / kind, f"{name}.yaml")


def load_named(cls: type[Record], kind: str, name: str) -> Record:
    """Load `configs/KIND/NAME.yaml`; an unknown name is answered by the nearest ones."""
    if name not in names(kind):
        raise ExportError(f"unknown name {name!r} in configs/{kind}; {suggestion(name, names(kind))}")
    return load_record(cls, file_of(kind, name))


def load_plan(
    model: str,
    quant: str,
    target: str,
    context_length: int | None = None,
    device: Device = "cpu",
    cache: Cache | None = None,
) -> Plan:
    """The plan of three names, for the model's own checkpoint.

    `context_length` and `cache` replace the model's and the target's own.
    """
    spec, runtime = load_named(ModelSpec, "models", model), load_named(Target, "targets", target)
    context = None if context_length == spec.context_length else context_length
    if context is not None:
        try:
            spec = ModelSpec.model_validate(spec.model_dump() | {"context_length": context})
        except ValidationError as error:
            raise ExportError(f"model {model!r}: {explain(error)}") from None
    recipe = load_named(QuantRecipe, "quant", quant)
    if device != "cpu" and recipe.calibration is None:
        raise ExportError(f"--device {device}: recipe {quant!r} calibrates nothing; leave the option out")
    return Plan(
        name=spec.name,
        model=spec,
        quant=recipe,
        target=runtime,
        device=device,
        context=context,
        cache=None if cache == runtime.cache else cache,
    )


def shortened(plan: Plan, positions: int) -> Plan:
    """The plan for a checkpoint of so many positions.

    The context_length of a model's YAML is a default, which gives way; another one was asked for, and stays.
    """
    spec, name = plan.model, plan.model.name
    default = name in names("models") and load_named(ModelSpec, "models", name).context_length == spec.context_length
    if not default or not SHORTEST_CONTEXT <= positions < spec.context_length:
        return plan
    return plan.model_copy(update={"model": spec.model_copy(update={"context_length": positions})})
