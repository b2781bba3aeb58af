"""What a user asks for: from a command's words to a plan, and from a plan or a manifest to the words of its command.

Every command of a build that is shown or run is written here.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from export import formats
from export.checkpoints import whereabouts
from export.checkpoints.origin import Adapter, Origin, chosen_origin, halves, last_part, name_for, parse_origin, telling
from export.errors import told
from export.host.text import visible
from export.manifest import Manifest
from export.plan import Cache, Device, ModelSpec, Plan, Policy, Target, load_named, load_plan, names

from . import skip

_SHOWN_DIGITS = 16


def asked(  # noqa: PLR0913 – the options of the command
    model: str,
    recipe: str,
    targets: Sequence[str],
    *,
    source: str | Path | None = None,
    adapter: str | Path | None = None,
    name: str | None = None,
    context: int | None = None,
    cache: Cache | None = None,
    policy: Policy | None = None,
    device: Device = "cpu",
) -> tuple[list[Plan], Origin | None]:
    """One plan for each target, and where the weights come from; None: from where the model's YAML says.

    Without a name the artifact has the checkpoint's or the adapter's own, or the model's. Raises ExportError.
    """
    plans = [load_plan(model, recipe, target, context, device, cache=cache, policy=policy) for target in targets]
    for plan in plans:
        formats.check_cache(plan)
        formats.check_policy(plan)
    origin = chosen_origin(source, adapter)
    return [named(plan, origin, name) for plan in plans], origin


def named(plan: Plan, origin: Origin | None, name: str | None = None) -> Plan:
    """The plan under the name that its artifact gets. Raises ExportError."""
    return plan.named(name_for(plan.model, origin) if name is None else name)


def place(plan: Plan, out: Path | None, several: bool) -> Path:
    """The artifact's folder: `out`, or one in it where there are several; below build/ where none is given."""
    return (out or Path("build")) / plan.id if several or out is None else out


def words(plan: Plan, source: str | None, adapter: str | None = None) -> list[str]:
    """Arguments of Python for the build of a plan from a source that is not the model's, and an adapter."""
    command = ["-m", "export", plan.model.name, plan.quant.name, plan.target.name]
    for option, text in (("--source", source), ("--adapter", adapter)):
        if text is not None:
            command += [option, f"./{text}" if text.startswith("-") else text]
    if source is not None or plan.name != plan.model.name:
        command += ["--name", plan.name]
    if plan.model.context_length != _usual_context(plan.model):
        command += ["--context", str(plan.model.context_length)]
    if (cache := formats.cache_of(plan)) != _usual_cache(plan.target):
        command += ["--cache", cache]
    if plan.policy:
        command += ["--policy", plan.policy]
    if plan.device != "cpu":
        command += ["--device", plan.device]
    return command


def _usual_context(model: ModelSpec) -> int | None:
    known = model.name in names("models")
    return load_named(ModelSpec, "models", model.name).context_length if known else None


def _usual_cache(target: Target) -> Cache:
    known = load_named(Target, "targets", target.name) if target.name in names("targets") else target
    return known.cache or formats.load(known.backend).CACHES[0]


def options(origin: Origin | None) -> tuple[str | None, str | None]:
    """--source and --adapter of an origin, as they were given."""
    match origin:
        case None:
            return None, None
        case Adapter():
            return str(origin.base), str(origin.adapter)
        case _:
            return str(origin), None


def command(manifest: Manifest) -> str:
    """The shell's line that builds an artifact again on this machine, with paths as they were given.

    A comment says where what lies there is not that of the artifact any more.
    """
    place = None if _is_the_models(manifest) else whereabouts.given(manifest.checkpoint)
    if place is None:
        return told(published_command(manifest))
    adapter, base = halves(place)
    return shell(words(manifest.plan, base, adapter)) + visible(_since(manifest, place))


def _since(manifest: Manifest, place: str) -> str:
    """A comment of what has happened to the checkpoint since; empty: nothing."""
    if gone := whereabouts.gone(place):
        return f"  # not there any more: {', '.join(gone)}"
    changes = skip.changed_files(manifest.checkpoint.sha256, parse_origin(place))
    changed = [change.text for change in changes if not change.is_gone]  # a hub's may come again
    return f"  # since then: {'; '.join(changed)}" if changed else ""


def published_command(manifest: Manifest) -> str:
    """The same for everybody: in place of a path stands what it led to, by a digest."""
    if _is_the_models(manifest):
        return _line(words(manifest.plan, None))
    adapter, base = halves(manifest.checkpoint.origin)
    files = manifest.checkpoint.sha256
    of_adapter = {name: files[name] for name in files if adapter and name.startswith("adapter_")}
    of_base = {name: files[name] for name in files if name not in of_adapter}
    return _line(words(manifest.plan, _stand_in(base, of_base), adapter and _stand_in(adapter, of_adapter)))


def shell(python: Sequence[str]) -> str:
    """A command's words after `python` as one line of this user's shell, on which every character is seen."""
    return told(_line(python))


def _line(python: Sequence[str]) -> str:
    return visible(shlex.join(["python", *python]))


def _is_the_models(manifest: Manifest) -> bool:
    return manifest.checkpoint.origin == manifest.plan.model.source


def _stand_in(text: str, sha256: Mapping[str, str]) -> str:
    """`<my-model, model.safetensors sha256 0123456789abcdef>` for a path that is not told."""
    if (name := last_part(text)) is None:
        return text
    file = telling(sha256)
    digest = f", {file} sha256 {sha256[file][:_SHOWN_DIGITS]}" if file else ""
    return f"<{name}{digest}>"
