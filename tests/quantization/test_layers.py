"""Schemes of some linears by patterns of their names: what matches, what is refused, and artifacts that hold them."""

import shutil

import pytest
import yaml

from export import checkpoints, formats, manifest, plan, quantization
from export.errors import ExportError
from export.formats import storage
from export.plan import CalibrationText, Gptq, Mixture, QuantRecipe, WeightScheme, load_plan
from export.quantization import content_key, patterns, schemes
from runtime_tests.checks import weights
from runtime_tests.jobs import WeightsJob
from tests.support.artifacts import export_with, reseal

EIGHT, WIDE = {"bits": 8, "group_size": None}, {"bits": 4, "group_size": 64}
RULES = {"*.down_proj": WIDE, "model.layers.-1.*": EIGHT, "model.layers.0.*.{k,v}_proj": EIGHT}
"""Of the last layer all is int8, down_proj too: the later pattern decides."""
LINEARS = [f"model.layers.{i}.{kind}.weight" for i in range(12) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def recipe(layers, **changes):
    base = load_plan("tiny", "int4-g32", "onnx-cpu").quant
    return QuantRecipe.model_validate(base.model_dump() | changes | {"layers": layers})


def planned(target, layers, **changes):
    return load_plan("tiny", "int4-g32", target).model_copy(update={"quant": recipe(layers, **changes)})


@pytest.fixture(scope="module")
def opened():
    return checkpoints.load(load_plan("tiny", "int4-g32", "onnx-cpu").model, None)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("*.down_proj", range(12)),
        ("model.layers.1.*", [1]),  # not 10 and 11
        ("model.layers.1?.*", [10, 11]),
        ("model.layers.[23].*", [2, 3]),
        ("model.layers.{3,5..7}.*", [3, 5, 6, 7]),
        ("model.layers.-1.*", [11]),
        ("model.layers.{-2..-1}.mlp.*", [10, 11]),
        ("model.layers.-13.*", []),
        ("model.layers.??.*", [10, 11]),  # -1 has two characters, too
        ("MODEL.*", []),
        ("*.weight", []),
        ("down_proj", []),
        ("model.layers.{.*", []),
    ],
)
def test_patterns_are_a_shells_and_count_layers_from_both_ends(pattern, layers):
    found = patterns.matching(pattern, LINEARS, 12)
    assert sorted({int(name.split(".")[2]) for name in found}) == list(layers)


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.{3,5..7}.*", "*.{mlp,self_attn}.{q_proj,down_proj}", "model.layers.{-12..-1}.{m*,self_attn}.*"],
)
def test_what_is_listed_in_braces_matches_in_some_combination(pattern):
    assert patterns.idle(pattern, LINEARS, 12) == []


def test_braces_that_stand_for_too_much_are_refused_at_once():
    with pytest.raises(ExportError, match="stands for more than 256 patterns; write \\* for a part of it"):
        patterns.matching("{0..9999}" * 20, LINEARS, 12)


def test_the_last_rule_that_matches_decides(opened):
    by_name = schemes.of_recipe(recipe(RULES), opened.architecture).by_name
    eight, wide, base = (WeightScheme.model_validate(s) for s in (EIGHT, WIDE, {"bits": 4, "group_size": 32}))
    first = {name.split(".", 3)[3]: scheme for name, scheme in by_name.items() if name.startswith("model.layers.0.")}
    assert first == dict.fromkeys(
        (f"{kind}.weight" for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")), base
    ) | {"mlp.down_proj.weight": wide, "self_attn.k_proj.weight": eight, "self_attn.v_proj.weight": eight}
    assert {scheme for name, scheme in by_name.items() if name.startswith("model.layers.1.")} == {eight}
    assert by_name["model.embed_tokens.weight"] == eight


def test_the_key_is_of_what_the_rules_choose(opened):
    def key(layers):
        return content_key(opened, recipe(layers), None)

    turned = dict(reversed(RULES.items()))
    assert key(RULES) != key(turned) != key({})
    assert key({"*.down_proj": WIDE}) == key({"model.layers.{0,1}.mlp.down_proj": WIDE})
    assert "layers" not in recipe({}).model_dump()  # of a recipe without rules, nothing changes
    assert recipe(RULES) == QuantRecipe.model_validate_json(recipe(RULES).model_dump_json()) != recipe(turned)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"*.down_prj": EIGHT}, r"'\*.down_prj' matches no linear of the layers; did you mean \*\.down_proj"),
        ({"q_proj": EIGHT}, r"'q_proj' matches no linear of the layers; did you mean \*\.q_proj"),
        ({"model.layers.2.mlp.up_proj": EIGHT}, r"matches no linear .* did you mean model\.layers\.[01]\.mlp\.up_proj"),
        ({"lm_head": EIGHT}, "'lm_head' matches no linear of the layers; known: "),
        (
            {"model.layers.{0..9}.*": EIGHT},
            r"\*' matches nothing by its 2, 3, 4, 5, 6 and 3 more; the model's layers are 0 to 1, or -2 to -1$",
        ),
        ({"model.layers.{-3..-1}.mlp.*": EIGHT}, "matches nothing by its -3; the model's"),
        ({"*.{up_proj,down_prj}": EIGHT}, "matches nothing by its down_prj; the model's"),
        ({"model.layers.{0,1}.{mlp,attn}.{q_proj,up_proj}": EIGHT}, "matches nothing by its q_proj, attn; the model's"),
        ({"model.layers.1.*": EIGHT, "*_proj": WIDE}, r"'model\.layers\.1\.\*' decides nothing: later patterns match"),
        (
            {"*.down_proj": {"bits": 4, "group_size": 48}},
            r"down_proj.weight has 512 input .*groups of 48",
        ),
    ],
)
def test_a_rule_without_effect_or_with_a_group_that_does_not_divide_is_refused(opened, layers, words):
    with pytest.raises(ExportError, match=f"^recipe 'int4-g32': .*{words}") as refused:
        schemes.check(recipe(layers), opened.architecture)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"layers": {"*.down_proj": {"bit": 8}}},
            r"layers: .*\*\.down_proj: scheme\.bit: unknown key .*mean bits",
        ),
        (
            {"layers": {"*.down_proj": {"bits": 5, "group_size": 32}}},
            r"\*\.down_proj: scheme\.bits: Input should be 4",
        ),
        ({"layers": {"*.down_proj": None}}, r"\*\.down_proj: scheme: Input should be a valid dictionary"),
        ({"layers": {"*.down_proj": EIGHT | {"levels": "nf4"}}}, "layers has schemes of integers only"),
        ({"layers": RULES, "method": "kept"}, "layers needs a scheme for linear, method rtn, scales or gptq"),
        ({"layers": RULES, "linear": None}, "layers needs a scheme for linear"),
        ({"layers": ["*"]}, "layers.0: Input should be a valid dictionary"),
        ({"layer": RULES}, r"layer: unknown key \(did you mean layers"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_one_line(tmp_path, monkeypatch, changes, words):
    configs = shutil.copytree(plan.CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("evals"))
    monkeypatch.setattr(plan.configs, "CONFIGS", configs)
    path = configs / "quant/int4-g32.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))
    with pytest.raises(ExportError, match=words) as refused:
        load_plan("tiny", "int4-g32", "onnx-cpu")
    assert "\n" not in str(refused.value)


def test_promotion_and_rules_are_refused_together():
    mixed = load_plan("tiny", "int4-mixed", "onnx-cpu").quant.model_dump()
    with pytest.raises(ValueError, match=r"layers needs .* and no promotion"):
        QuantRecipe.model_validate(mixed | {"layers": RULES})


@pytest.mark.parametrize(
    ("target", "scheme", "words"),
    [
        ("executorch-xnnpack", {"bits": 8, "group_size": 32}, "has no int8 groups"),
        ("executorch-xnnpack", {"bits": 4, "group_size": 16}, "needs groups of a multiple of 32"),
        ("onnx-cpu", {"bits": 4, "group_size": 8}, "of 8, MatMulNBits takes 16"),
        ("coreml", {"bits": 8, "group_size": 32}, None),
        ("onnx-cpu", {"bits": 8, "group_size": 32}, None),
    ],
)
def test_every_format_is_asked_about_each_scheme(opened, target, scheme, words):
    asked = planned(target, {"model.layers.1.mlp.up_proj": scheme})
    schemes.check(asked.quant, opened.architecture)
    check = formats.load(asked.target.backend).check
    if words is None:
        check(asked, opened.architecture)
        return
    with pytest.raises(ExportError, match=rf"on '?{target}'?: model.layers.1.mlp.up_proj.weight:? .*{words}"):
        check(asked, opened.architecture)


@pytest.mark.parametrize("target", ["onnx-cpu", "executorch-xnnpack", "coreml"])
def test_artifacts_hold_the_schemes_of_the_rules(store, tmp_path, target):
    folder = export_with(store, planned(target, RULES), tmp_path / "artifact")
    comparison = weights.compare(WeightsJob(folder=str(folder), source=None, cache=str(store)))
    assert (comparison["differing"], comparison["missing"]) == (0, [])
    described = manifest.read(folder)
    assert described.plan.quant == recipe(RULES)
    assert storage.line(described) == (
        "int8 per channel (9 of 14 linears, embedding and head), int4 in groups of 32 (4 of 14 linears), "
        "int4 in groups of 64 (1 of 14 linears), rounded to nearest"
    )


def test_a_file_of_other_rules_is_found_by_its_first_weight(store, tmp_path):
    folder = export_with(store, planned("onnx-cpu", RULES), tmp_path / "artifact")
    other = export_with(store, planned("onnx-cpu", {"model.layers.1.*": EIGHT}), tmp_path / "other")
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(other / name, folder / name)
    reseal(folder)
    comparison = weights.compare(WeightsJob(folder=str(folder), source=None, cache=str(store)))
    assert comparison["first"] == "model.layers.0.self_attn.k_proj.weight"
    assert comparison["differing"] > 0


@pytest.mark.parametrize("method", ["scales", "gptq"])
def test_calibrated_methods_follow_the_rules(opened, tmp_path, method):
    text = Mixture(
        name="test",
        description="",
        length=16,
        held_out_every=3,
        texts=(CalibrationText(file="prose.txt", windows=9),),
        generated=None,
    )
    fields = {
        "method": method,
        "calibration": text,
        "gptq": Gptq(damping=0.01) if method == "gptq" else None,
    }
    made = quantization.quantize(opened, recipe(RULES, **fields), tmp_path)
    expected = schemes.of_recipe(recipe(RULES), opened.architecture).by_name
    assert {layer.name: (layer.bits, layer.group_size) for layer in made.layers} == {
        name: (scheme.bits, scheme.group_size or opened.architecture.tensor_shapes()[name][-1])
        for name, scheme in expected.items()
    }
    assert all(layer.sqnr_db > 10 for layer in made.layers)
