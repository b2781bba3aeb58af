"""The model card: README.md of an artifact folder, front matter as the Hugging Face hub reads it.

Templates are `card.md.j2` and each format's `usage.md.j2` (its first line names the library). The card holds no time of
the build, so builds stay byte-identical; the rows of what was measured come from validation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound

from . import formats
from .build import request
from .checkpoints.origin import halves, hub_id, last_part
from .errors import ExportError
from .formats import storage, usage
from .host import disk
from .host.text import Markdown, code, markdown, visible
from .manifest import CARD, Manifest
from .plan import CONFIGS

_LICENCES = {
    "llama3.2": Markdown("Llama 3.2 Community License (https://www.llama.com/llama3_2/license/). Built with Llama."),
    "apache-2.0": "Apache 2.0, as the base model.",
    "other": "As the checkpoint this was made from: its licence applies to this artifact too.",
}


class Measured(NamedTuple):
    """One row of the card's table; what is not Markdown is shown as the text it is."""

    what: str
    value: str
    note: str


def write(folder: Path, manifest: Manifest, measured: Sequence[Measured]) -> None:
    """Write `README.md`; without measured rows it says how to get them."""
    disk.write_text(folder / CARD, render(manifest, measured))


def render(manifest: Manifest, measured: Sequence[Measured]) -> str:
    """The card: YAML front matter, then Markdown."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *formats.__path__]),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 – of HTML; `finalize` escapes every value
        finalize=markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    library, how_to_run = _usage_of(environment, manifest)
    body = environment.get_template("card.md.j2").render(
        manifest=manifest,
        a=manifest.architecture,
        lineage=_lineage(manifest),
        merged_into=halves(manifest.checkpoint.origin)[1],
        own_yamls=_own_yamls(manifest),
        command=Markdown(request.published_command(manifest)),
        llama=manifest.plan.model.license.startswith("llama"),
        parameters=manifest.architecture.parameters,
        worst=min(manifest.quantization.layers, key=lambda layer: layer.sqnr_db, default=None),
        calibration=manifest.quantization.calibration,
        weights=storage.line(manifest),
        cache=storage.cache(manifest.contract.kv),
        process=storage.process(manifest),
        measured=measured,
        usage=Markdown(how_to_run.strip()),
        licence=_LICENCES.get(manifest.plan.model.license) or manifest.plan.model.license,
    )
    return str(ModelCard(f"---\n{_front_matter(manifest, library).to_yaml()}\n---\n\n{body}"))


def _usage_of(environment: Environment, manifest: Manifest) -> tuple[str, str]:
    """Library name and how to run the artifact, from the format's template."""
    name = f"{manifest.plan.target.backend}/usage.md.j2"
    try:
        template = environment.get_template(name)
    except TemplateNotFound:
        raise ExportError(f"{name}: missing; a format needs a text that shows how it is run") from None
    first, _, text = template.render(usage.context(manifest)).partition("\n")
    return first.removeprefix("library:").strip(), text


class _Lineage(NamedTuple):
    """What a card says of whose weights these are, and the hub's metadata of the same."""

    subject: str
    """Of the first sentence."""
    fine_tune_of: str | None
    """None: no adapter was merged."""
    base: str | None
    """A hub id."""
    relation: str | None
    """None: unknown, or the base itself."""


def _lineage(manifest: Manifest) -> _Lineage:
    """Of a path only its last part is known: it may hold the model's own weights or those of a fine-tune."""
    model, checkpoint = manifest.plan.model, manifest.checkpoint
    quantized = "quantized" if manifest.plan.quant.method != "none" else None
    adapter, origin = halves(checkpoint.origin)
    if adapter is not None:
        named = hub_id(origin) or (model.base_model if origin == model.source else hub_id(checkpoint.trained_on or ""))
        base = named or model.base_model
        of = base or last_part(origin) or origin
        return _Lineage(f"{manifest.plan.name}, a fine-tune of {of} (a LoRA adapter, merged),", of, base, "finetune")
    if origin == model.source:
        return _Lineage(model.base_model or model.name, None, model.base_model, quantized)
    if repository := hub_id(origin):
        return _Lineage(repository, None, repository, quantized)
    if not checkpoint.sha256:
        return _Lineage(f"{manifest.plan.name}, random weights,", None, None, None)
    like = f" with the shapes of {model.base_model}" if model.base_model else ""
    return _Lineage(f"{manifest.plan.name}, a checkpoint{like},", None, model.base_model, None)


def _front_matter(manifest: Manifest, library: str) -> ModelCardData:
    model, recipe = manifest.plan.model, manifest.plan.quant
    lineage = _lineage(manifest)
    base = lineage.base and visible(lineage.base)
    quantized = recipe.method != "none"
    names = manifest.plan.target.name, recipe.name
    return ModelCardData(
        base_model=base,
        base_model_relation=lineage.relation if base else None,
        license=visible(model.license),
        library_name=library,
        pipeline_tag="text-generation",
        tags=["on-device", *map(visible, names), *(["torchao"] if quantized else [])],
    )


def _own_yamls(manifest: Manifest) -> list[str]:
    """Files that the command needs and the project has not: of a recipe or model that somebody wrote for this build."""
    named = (
        f"{kind}/{name}.yaml"
        for kind, name in (("models", manifest.plan.model.name), ("quant", manifest.plan.quant.name))
    )
    return [f"configs/{file}" for file in named if not (CONFIGS / file).is_file()]
