"""A kind of KV cache that loses more than its format's usual one is judged near the start and at the end."""

import dataclasses
import shutil

import pytest

from export import formats, manifest
from export.errors import ExportError
from export.plan import CacheLimits
from export.toolbox.model_checks import cache_differences
from runtime_tests.checks import comparisons, gates, limits
from runtime_tests.checks.subject import Subject
from tests.support.artifacts import export_with, reseal
from tests.support.onnx import copy_with
from tests.support.onnx import tiny as plan_of
from tests.support.records import sample_comparison

LIMIT = CacheLimits(max_mean_kl=4e-3, min_top1=0.9, min_probe_sqnr_db=None)


@pytest.fixture(scope="module")
def int8(store, tmp_path_factory):
    plan = plan_of(tied=False).model_copy(update={"cache": "int8"})
    return export_with(store, plan, tmp_path_factory.mktemp("caches") / "int8")


def judged(folder, setting):
    described = manifest.read(folder)
    subject = Subject(folder, described, setting, limits.of(described, None))
    with setting.turns.mine():
        cut = comparisons.cut_tokens(subject)
        return comparisons.compare_cache(subject, cut, comparisons.compute_references(subject, cut))


def test_it_is_compared_with_a_float32_cache_at_every_place(int8, setting, in_process, tmp_path):
    found = judged(int8, setting)
    assert list(found.comparisons["cache"].by_position) == ["128 tokens", "256 tokens"]
    assert [(gate.name, gate.verdict) for gate in found.gates] == [("cache: mean KL", "pass"), ("cache: top-1", "pass")]

    def clip(scale):
        scale *= 0.2

    name = "model.layers.1.self_attn.value_scale"
    bad = copy_with(int8, tmp_path / "bad", name, clip)
    reseal(bad)
    kl, _ = judged(bad, dataclasses.replace(setting, scratch=tmp_path)).gates
    assert (kl.verdict, kl.limit) == ("fail", pytest.approx(9e-3))


@pytest.mark.parametrize(
    ("policies", "places"),
    [(("window-24", "window-60"), [128, 512]), (("sink-4", "sink-100"), [128, 512, 798])],
)
def test_a_policy_is_compared_where_it_matters(tiny, setting, in_process, tmp_path, policies, places):
    policy, other = policies
    folder = shutil.copytree(tiny("onnx-cpu", "int4-g32", None, policy, context_length=512), tmp_path / "artifact")
    found = judged(folder, setting)
    assert list(found.comparisons["cache"].by_position) == [f"{place} tokens" for place in places]
    assert [gate.verdict for gate in found.gates] == ["pass", "pass"]
    reseal(folder, plan=manifest.read(folder).plan.model_copy(update={"policy": other}))
    kl, _ = judged(folder, dataclasses.replace(setting, scratch=tmp_path)).gates
    assert kl.verdict == "fail"


@pytest.mark.parametrize(
    ("target", "kind", "policy"),
    [
        ("onnx-cpu", "int8", None),
        ("onnx-cpu", None, "window-24"),
        ("executorch-xnnpack", "bfloat16", None),
        ("executorch-xnnpack", "int8", None),
        ("executorch-xnnpack", "int8", "window-24"),
        ("coreml", None, None),
    ],
)
def test_the_manifest_describes_the_buffers_in_the_file(tiny, target, kind, policy):
    folder = tiny(target, "int4-g32", kind, policy, context_length=512)
    described = manifest.read(folder)
    reader, kv = formats.reader(described.plan.target.backend), described.contract.kv
    found = reader.contents(folder / described.plan.target.artifact, described.architecture).cache
    assert not [*cache_differences(kv, found)]
    numbers = 2 * kv.layers * kv.kv_heads * kv.room * kv.head_dim
    first, *_ = cache_differences(kv.model_copy(update={"kv_heads": 2 * kv.kv_heads}), found)
    assert first == f"{numbers} numbers in the file, the contract has {2 * numbers}"
    (line,) = cache_differences(kv.model_copy(update={"dtype": "float64"}), found)
    assert line == f"{kv.dtype} in the file, the contract has float64"


def test_the_usual_cache_costs_nothing_more(tiny, setting, in_process):
    assert judged(tiny("onnx-cpu"), setting).gates == ()


def test_a_cache_that_breaks_at_the_end_only_fails_and_its_place_is_named(int8):
    target = manifest.read(int8).plan.target
    allowed = limits.Limits(quant=manifest.read(int8).plan.quant.limits, target=target.limits, cache={"int8": LIMIT})
    measured = _losses({"128 tokens": (0.005, 0.97), "2,048 tokens": (0.178, 0.79)})
    kl, top1 = gates.cache(measured, None, allowed.on("x86_64", LIMIT))
    assert (kl.verdict, kl.value, kl.detail) == ("fail", 0.178, "KL 0.0050 at 128 tokens, 0.1780 at 2,048 tokens")
    assert (top1.verdict, top1.detail) == ("fail", "at 2,048 tokens")
    floor = _losses({"128 tokens": (0.001, 1.0), "2,048 tokens": (0.17, 0.8)})
    kl, top1 = gates.cache(measured, floor, allowed.on("x86_64", LIMIT))
    assert (kl.value, kl.verdict, top1.verdict) == (pytest.approx(0.008), "pass", "pass")


def _losses(places):
    compared = sample_comparison()
    part = next(iter(compared.by_position.values()))
    by_position = {place: part.model_copy(update={"mean_kl": kl, "top1": top1}) for place, (kl, top1) in places.items()}
    return compared.model_copy(update={"by_position": by_position})


def test_limits_that_are_given_must_hold_some_for_the_cache(int8):
    described = manifest.read(int8)
    given = limits.of(described, None).model_copy(update={"cache": {}})
    with pytest.raises(ExportError, match=r"--limits has none for its cache of int8; add `cache: \{int8: …\}`"):
        limits.of(described, given)
