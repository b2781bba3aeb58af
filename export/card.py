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
from .errors import ExportError
from .formats import storage, usage
from .host import disk
from .host.text import Markdown, code, markdown, visible
from .manifest import CARD, Manifest

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
        base_name=manifest.plan.model.base_model or manifest.plan.model.name,
        llama=manifest.plan.model.license.startswith("llama"),
        parameters=manifest.architecture.parameters,
        worst=min(manifest.quantization.layers, key=lambda layer: layer.sqnr_db, default=None),
        calibration=manifest.quantization.calibration,
        weights=storage.line(manifest),
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


def _front_matter(manifest: Manifest, library: str) -> ModelCardData:
    model, recipe = manifest.plan.model, manifest.plan.quant
    base = model.base_model and visible(model.base_model)
    quantized = recipe.method != "none"
    names = manifest.plan.target.name, recipe.name
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if quantized and base else None,
        license=visible(model.license),
        library_name=library,
        pipeline_tag="text-generation",
        tags=["on-device", *map(visible, names), *(["torchao"] if quantized else [])],
    )
