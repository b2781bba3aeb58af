"""What to build: a plan is model × recipe × target, three YAML files. Knows nothing about torch.

Every key is written in every file and unknown keys are refused, so there are no defaults here that could
differ from the ones a reader sees.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ExportError

Levels = Literal["even", "nf4", "fp4"]
"""What codes stand for: evenly spaced integers, or the sixteen levels of bitsandbytes' types."""
CONFIGS = Path(__file__).parent.parent / "configs"
Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ROTATE_IN, ROTATE_OUT = "model.rotate_in.weight", "model.rotate_out.weight"


class Strict(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RopeScaling(Strict):
    """Llama 3 frequency scaling (transformers `rope_type: llama3`; `apply_scaling` in llama-models)."""

    factor: PositiveNumber
    low_freq_factor: PositiveNumber
    high_freq_factor: PositiveNumber
    original_max_position_embeddings: Positive

    @model_validator(mode="after")
    def _factors_differ(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not more than low_freq_factor {self.low_freq_factor}"
            )
        return self


class Architecture(Strict):
    """Shapes of a Llama decoder, under the names of Hugging Face's config.json."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024)]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    rope_theta: PositiveNumber
    rope_scaling: RopeScaling | None
    rms_norm_eps: PositiveNumber
    tie_word_embeddings: bool
    max_position_embeddings: Positive
    rotated: bool = False
    """Two linears turn the residual stream, after the embedding and before the head. No checkpoint has them: a recipe
    adds them (`export/rotate.py`)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        return self

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (out_features N, in_features K) of every linear inside the layers, in execution order."""
        d, ff = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        one_layer = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        return {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(self.num_hidden_layers)
            for name, shape in one_layer.items()
        }

    def rotation_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → [hidden, hidden] of the rotations: the first runs before all layers, the second after them."""
        return dict.fromkeys((ROTATE_IN, ROTATE_OUT) if self.rotated else (), (self.hidden_size, self.hidden_size))

    def all_linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (N, K) of every linear in execution order: rotations too, the head last even where it is tied."""
        rotations = list(self.rotation_shapes().items())
        head = ("lm_head.weight", (self.vocab_size, self.hidden_size))
        return dict([*rotations[:1], *self.linear_shapes().items(), *rotations[1:], head])

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of the model; the head only when it is not tied."""
        d, vocab = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
        shapes |= self.all_linear_shapes()
        head = shapes.pop("lm_head.weight")
        for i in range(self.num_hidden_layers):
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (d,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (d,)
        shapes["model.norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = head
        return shapes

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint, tied weights once; rotations are none of its."""
        own = self.tensor_shapes().items() - self.rotation_shapes().items()
        return sum(prod(shape) for _, shape in own)


class ModelSpec(Strict):
    """Where a model comes from and the context length its artifacts are built for."""

    name: str
    source: str | None
    """`package:NAME/FILE`, `hub:OWNER/NAME[@REVISION]`, `seed:N`; null: --source must be given."""
    base_model: str | None
    license: str
    context_length: Annotated[int, Field(ge=64)]
    """Slots of the KV cache: the longest prompt plus answer, tokens."""
    architecture: Architecture | None
    """null: taken from the checkpoint."""

    @model_validator(mode="after")
    def _as_checkpoints_are(self) -> "ModelSpec":
        if self.architecture and self.architecture.rotated:
            raise ValueError("architecture.rotated is not a model's: give `rotation` in a recipe")
        return self


class WeightScheme(Strict):
    """Symmetric integers with one scale per group (null: per output channel)."""

    bits: Literal[4, 8]
    group_size: Positive | None
    levels: Levels = "even"
    """What a code stands for; others than integers only as a checkpoint holds them."""


class QuantLimits(Strict):
    """The most a recipe may lose: our fp32 model against our quantized model."""

    max_mean_kl: float
    min_top1: float


class CalibrationText(Strict):
    """A text and how many windows are cut from it."""

    file: str
    """In configs/calibration, or of a data set: `hub:OWNER/NAME@REVISION/PATH`, .txt or .jsonl with a field `text`."""
    windows: Positive


class GeneratedText(Strict):
    """What the model writes itself, answering prompts through its chat template."""

    prompts: str
    """In configs/calibration, one to a line."""
    windows: Positive


class Mixture(Strict):
    """What a recipe lets the model read before it chooses integers, one YAML of configs/mixtures."""

    name: str
    description: str
    length: Annotated[int, Field(ge=16)]
    """Tokens of a window."""
    held_out_every: Annotated[int, Field(ge=2)]
    """One window of so many is not calibrated with; the loss is estimated on it."""
    texts: tuple[CalibrationText, ...]
    generated: GeneratedText | None

    @property
    def windows(self) -> int:
        """Of all texts."""
        return sum(text.windows for text in self.texts) + (self.generated.windows if self.generated else 0)


def load_mixture(value: Any) -> Any:
    """A recipe's YAML names its mixture; the resolved plan holds it."""
    return load_named(Mixture, "mixtures", value) if isinstance(value, str) else value


class Gptq(Strict):
    """How calibrated integers are chosen (`export/calibrate/gptq.py`)."""

    damping: Annotated[float, Field(gt=0)]
    """Added to the diagonal of the inputs' moments before they are inverted, in parts of its mean."""
    pull: Annotated[float, Field(ge=0)]
    """Draws the target towards the weight itself, in parts of the mean second moment: few tokens know little."""
    activations: Literal["none", "int8-per-token"]
    """What linears read while they are rounded: their inputs, or those as XNNPACK rounds them."""


class Promotion(Strict):
    """Which linears get a larger scheme: those that lose most KL per byte, until the one budget is met."""

    scheme: WeightScheme
    windows: Positive
    """Calibration windows on which every linear's share of the loss is estimated."""
    linear_bits_per_weight: PositiveNumber | None
    """Of the linears together, scales included, so that one recipe serves every size of model."""
    size_budget_mb: PositiveNumber | None
    """MB (10⁶ bytes) of all weights as stored: integers, 16-bit scales, float norms."""
    max_kl: PositiveNumber | None
    """Mean KL on held-out calibration windows."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Promotion":
        if sum(one is not None for one in (self.linear_bits_per_weight, self.size_budget_mb, self.max_kl)) != 1:
            raise ValueError("give one of linear_bits_per_weight, size_budget_mb and max_kl, and null for the others")
        return self


class Rotation(Strict):
    """The model is turned by random rotations before it is quantized (`export/rotate.py`)."""

    seed: Annotated[int, Field(ge=0)]
    scheme: WeightScheme
    """Of the two linears that turn the residual stream."""


class QuantRecipe(Strict):
    """How weights become integers."""

    name: str
    description: str
    method: Literal["none", "rtn", "kept", "scales", "gptq"]
    """`rtn`: each weight to nearest. `scales`: the same with scales searched for what the linears compute on
    calibration text. `gptq`: linears by what they compute on it. All three round embedding and head to nearest.
    `kept`: the checkpoint's own integers and scales, which may be negative."""
    calibration: Annotated[Mixture | None, BeforeValidator(load_mixture)] = None
    """A name in configs/mixtures."""
    gptq: Gptq | None = None
    promotion: Promotion | None = None
    rotation: Rotation | None = None
    linear: WeightScheme | None
    embedding: WeightScheme | None
    head: WeightScheme | None
    limits: QuantLimits

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
        if self.rotation and self.method in ("none", "kept"):
            raise ValueError("rotation needs a method that quantizes")
        return self

    @model_validator(mode="after")
    def _levels_have_an_operator(self) -> "QuantRecipe":
        if any(table and table.levels != "even" for table in (self.embedding, self.head)):
            raise ValueError("embedding and head have no operator for levels other than even")
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
    min_top1: float
    min_sqnr_db: float
    min_probe_sqnr_db: float | None
    """SQNR the best of many single-token prompts must reach: there rounding noise has not grown yet. null: not run."""
    compared_tokens: Positive | None
    """Greedy tokens that an attached device's answer is compared with this machine's. null: not compared, the
    runtime's kernels of another processor round otherwise by design."""


class Target(Strict):
    """A format and the runtime that runs it."""

    name: str
    description: str
    backend: str
    """Module in export/backends/ that writes the artifact."""
    session: str
    """Module in runtime_tests/sessions/ that runs it."""
    artifact: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """File or folder the artifact is, inside the artifact folder."""
    activations: Literal["none", "int8-per-token"]
    """Activation quantization the runtime adds; the eager reference does the same."""
    logits: Literal["last", "all"]
    """Positions of a prompt that the artifact gives logits of."""
    limits: TargetLimits
    limits_on: dict[str, TargetLimits]
    """Other limits on processors whose kernels round otherwise, by the ABI a device reports."""


class Plan(Strict):
    """One artifact to build."""

    model: ModelSpec
    quant: QuantRecipe
    target: Target

    @property
    def id(self) -> str:
        """`MODEL_QUANT_TARGET`, the name of the default output folder."""
        return f"{self.model.name}_{self.quant.name}_{self.target.name}"


Record = TypeVar("Record", bound=Strict)
TOLD = 5
"""Problems of one record that are told: all of a YAML's mistakes, not all fields of another version's manifest."""


def names(kind: str) -> list[str]:
    """Every known model, recipe or target (`kind`: models, quant, targets)."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def load_record(cls: type[Record], path: Path) -> Record:
    """Read one YAML file strictly; the file's stem is the record's name."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a date or number that is none; nesting
        raise ExportError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ExportError(f"{path}: expected `key: value` lines, found {type(fields).__name__}")
    if "name" in fields:
        raise ExportError(f"{path}: remove the key `name`; the file's name is the name")
    try:
        return cls.model_validate({"name": path.stem, **fields})
    except ValidationError as error:
        raise ExportError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Problems of a record in one line: `group_size: unknown key; bits: missing`, the first few of many."""
    words = {"extra_forbidden": "unknown key", "missing": "missing"}
    parts = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        what = words.get(problem["type"], problem["msg"])
        parts.append(f"{where}: {what}" if where else what)
    more = [f"{len(parts) - TOLD} more"] if len(parts) > TOLD else []
    return "; ".join([*parts[:TOLD], *more])


def load_named(cls: type[Record], kind: str, name: str) -> Record:
    """Load `configs/KIND/NAME.yaml`; an unknown name lists the known ones."""
    if name not in names(kind):
        raise ExportError(f"unknown name {name!r} in configs/{kind}; known: {', '.join(names(kind))}")
    return load_record(cls, CONFIGS / kind / f"{name}.yaml")


def load_plan(model: str, quant: str, target: str) -> Plan:
    """The plan of three names."""
    return Plan(
        model=load_named(ModelSpec, "models", model),
        quant=load_named(QuantRecipe, "quant", quant),
        target=load_named(Target, "targets", target),
    )
