"""Whose limits judge an artifact: those of this checkout for its recipe and target, never those that it brings."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from devices.transports.transfer import family
from export import formats
from export.architecture import Strict
from export.errors import ExportError, is_own, load_fields, validated
from export.manifest import Manifest, flat
from export.plan import Cache, CacheLimits, QuantLimits, QuantRecipe, Target, TargetLimits, file_of, load_named, names

_WORDS = {"description", "limits", "limits_on", "cache_limits"}
"""Fields of a recipe or target that change nothing about an artifact."""
_AS_MUCH_NOISE_DB = 3.0
"""Less of SQNR: the cache may add as much noise as the lowering may have."""
FEW_POSITIONS = CacheLimits(max_mean_kl=4e-3, min_top1=0.9, min_probe_sqnr_db=None)
"""On top of a lowering's limits, which are of thousands of positions: what 65 may differ from those by. A wrong policy
costs more than 0.02 as soon as it matters."""
_Record = TypeVar("_Record", QuantRecipe, Target)


class Limits(Strict):
    """The most that an artifact may lose: the `limits` of a recipe and a target, or a file given with --limits."""

    quant: QuantLimits
    target: TargetLimits
    target_on: Mapping[str, TargetLimits] = {}
    """For processors whose kernels round differently, by family (`devices.transports.transfer.family`)."""
    cache: Mapping[Cache, CacheLimits] = {}
    """What each kind of cache may lose on top."""

    def on(self, abi: str, cache: CacheLimits | None = None) -> TargetLimits:
        """What the lowering may lose on a processor, with what a kind of cache may lose on top."""
        lowering = self.target_on.get(family(abi), self.target)
        if cache is None:
            return lowering
        return lowering.model_copy(
            update={
                "max_mean_kl": lowering.max_mean_kl + cache.max_mean_kl,
                "min_top1": lowering.min_top1 * cache.min_top1,
                "min_sqnr_db": lowering.min_sqnr_db - _AS_MUCH_NOISE_DB,
                "min_probe_sqnr_db": lowering.min_probe_sqnr_db and cache.min_probe_sqnr_db,
            }
        )


def load(file: Path) -> Limits:
    """The limits in a YAML or JSON file. Raises ExportError in one line."""
    return validated(Limits, load_fields(file), file)


def of(described: Manifest, given: Limits | None) -> Limits:
    """Limits for an artifact: the given ones, or this checkout's for its recipe and target.

    Raises ExportError: this checkout has no such recipe or target, or another target of that name.
    """
    kind = _unusual_cache(described)
    if given is not None:
        if kind not in (None, *given.cache):
            raise ExportError(f"{described.id}: --limits has none for its cache of {kind}; add `cache: {{{kind}: …}}`")
        return given
    recipe = _known(QuantRecipe, "quant", described.plan.quant.name, described.id)
    target = _known(Target, "targets", described.plan.target.name, described.id)
    if other := _differing(described.plan.target, target):
        raise ExportError(
            f"{described.id}: its target is not {_file('targets', target.name)} ({other} differs): "
            "build it again, or give the limits that judge it with --limits FILE"
        )
    if kind not in (None, *target.cache_limits):
        raise ExportError(
            f"{described.id}: {_file('targets', target.name)} has no cache_limits.{kind}: add them, or give the "
            "limits that judge it with --limits FILE"
        )
    return Limits(quant=recipe.limits, target=target.limits, target_on=target.limits_on, cache=target.cache_limits)


def _unusual_cache(described: Manifest) -> Cache | None:
    """The kind of cache, where limits of its own judge it; None too for a format that admission will refuse."""
    if described.plan.target.backend not in formats.names():
        return None
    kind = formats.cache_of(described.plan)
    return None if kind == formats.load(described.plan.target.backend).CACHES[0] else kind


def notes(described: Manifest, limits: Limits, abi: str) -> tuple[str, ...]:
    """Where an artifact claims something else than what judges it, one line each; empty: nowhere."""
    plan, found = described.plan, []
    own = _of_kind(plan.target.cache_limits, described)
    claimed = Limits(
        quant=plan.quant.limits, target=plan.target.limits_on.get(family(abi), plan.target.limits), cache=own
    )
    judging = Limits(quant=limits.quant, target=limits.on(abi), cache=_of_kind(limits.cache, described))
    was, now = (flat(part.model_dump()) for part in (claimed, judging))
    if pairs := [f"{name} {now[name]} (its own: {was[name]})" for name in now if now[name] != was[name]]:
        found.append(f"not judged by the limits that it brings: {', '.join(pairs)}")
    if plan.quant.name in names("quant"):
        other = _differing(plan.quant, load_named(QuantRecipe, "quant", plan.quant.name))
        found += [f"its recipe is not {_file('quant', plan.quant.name)}: {other} differs"] * bool(other)
    return tuple(found)


def _of_kind(limits: Mapping[Cache, CacheLimits], described: Manifest) -> Mapping[Cache, CacheLimits]:
    return {kind: limit for kind, limit in limits.items() if kind == formats.cache_of(described.plan)}


def _file(kind: str, name: str) -> str:
    where = "this folder" if is_own(file_of(kind, name)) else "this checkout"
    return f"configs/{kind}/{name}.yaml of {where}"


def _known(cls: type[_Record], kind: str, name: str, artifact: str) -> _Record:
    if name not in names(kind):
        raise ExportError(
            f"{artifact}: this checkout has no configs/{kind}/{name}.yaml, whose limits would judge it, and an "
            "artifact's own never do: give limits with --limits FILE"
        )
    return load_named(cls, kind, name)


def _differing(of_artifact: QuantRecipe | Target, ours: QuantRecipe | Target) -> str:
    """Names of the top fields that differ and decide something."""
    was, now = (record.model_dump(exclude=_WORDS) for record in (of_artifact, ours))
    return ", ".join(name for name in now if name in was and was[name] != now[name])
