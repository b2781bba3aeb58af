"""What to build: a plan is model × recipe × target, three YAML files. No torch.

Every key is written in every file and unknown keys are refused, so no default here can differ from what a reader sees.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from export.architecture import Architecture, Positive, Strict
from export.errors import ExportError, explain

from .configs import CONFIGS, file_of, load_named, names
from .identifiers import FileName, Name, cleaned, leads_out, not_a_file_name, require_name
from .recipe import (
    CalibrationText,
    GeneratedText,
    Gptq,
    LayerRule,
    Levels,
    Mixture,
    Promotion,
    QuantLimits,
    QuantRecipe,
    Rotation,
    WeightScheme,
)
from .target import Attention, Cache, CacheLimits, Policy, Target, TargetLimits

__all__ = [
    "CONFIGS",
    "SHORTEST_CONTEXT",
    "Attention",
    "Cache",
    "CacheLimits",
    "CalibrationText",
    "Device",
    "FileName",
    "GeneratedText",
    "Gptq",
    "LayerRule",
    "Levels",
    "Mixture",
    "ModelSpec",
    "Name",
    "Plan",
    "Policy",
    "Promotion",
    "QuantLimits",
    "QuantRecipe",
    "Rotation",
    "Target",
    "TargetLimits",
    "WeightScheme",
    "cleaned",
    "file_of",
    "leads_out",
    "load_named",
    "load_plan",
    "names",
    "not_a_file_name",
    "shortened",
]

Device = Literal["cpu", "cuda"]
"""Where calibration computes."""
SHORTEST_CONTEXT = 64
"""Tokens; a KV cache of fewer is no model that anybody runs."""
_LONGEST_ID = 200
"""Bytes of an artifact's id: the names of locks and of unfinished builds are longer."""


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
    policy: Annotated[Policy | None, Field(exclude_if=lambda policy: policy is None)] = None
    """null: all tokens stay in the cache, until the context is full."""

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
        """`NAME_RECIPE_TARGET[_CONTEXT][_CACHE][_POLICY]`, the default output folder: the last three if asked for."""
        asked = (str(asked) for asked in (self.context, self.cache, self.policy) if asked is not None)
        return "_".join((self.name, self.quant.name, self.target.name, *asked))

    @property
    def window(self) -> int | None:
        """Tokens that each one attends to; None: all before it."""
        return self._tokens_of("window")

    @property
    def sink(self) -> int | None:
        """First tokens that never leave; None: no token does."""
        return self._tokens_of("sink")

    def _tokens_of(self, kind: str) -> int | None:
        name, _, count = (self.policy or "").partition("-")
        return int(count) if name == kind else None

    def named(self, name: str) -> "Plan":
        """The plan of an artifact of that name. Raises ExportError: it is no name, or too long."""
        try:
            return Plan.model_validate(dict(self) | {"name": require_name(name)})
        except ValidationError as error:
            raise ExportError(f"--name {name}: {explain(error)}") from None
        except ValueError as error:
            raise ExportError(f"--name {error}") from None


def load_plan(  # noqa: PLR0913 – what a command asks for
    model: str,
    quant: str,
    target: str,
    context_length: int | None = None,
    device: Device = "cpu",
    *,
    cache: Cache | None = None,
    policy: Policy | None = None,
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
    try:
        return Plan(
            name=spec.name,
            model=spec,
            quant=recipe,
            target=runtime,
            device=device,
            context=context,
            cache=None if cache == runtime.cache else cache,
            policy=policy,
        )
    except ValidationError as error:
        raise ExportError(f"{model} × {quant} × {target}: {explain(error)}") from None


def shortened(plan: Plan, positions: int) -> Plan:
    """The plan for a checkpoint of so many positions.

    The context_length of a model's YAML is a default, which gives way; another one was asked for, and stays.
    """
    spec, name = plan.model, plan.model.name
    default = name in names("models") and load_named(ModelSpec, "models", name).context_length == spec.context_length
    if not default or not SHORTEST_CONTEXT <= positions < spec.context_length:
        return plan
    return plan.model_copy(update={"model": spec.model_copy(update={"context_length": positions})})
