"""How weights are stored, in words: read off what was quantized, whatever the recipe says of itself."""

import pytest

from export import card, formats, manifest
from export.architecture import EMBEDDING, HEAD, ROTATE_IN, ROTATE_OUT
from export.formats import storage
from export.toolbox import inspection
from runtime_tests.sessions import session_module
from tests.support.artifacts import export_with

FALSE = "int4 groups of 64, embedding int8, last two layers int8"


@pytest.fixture
def described(built):
    """The tiny model's manifest, whose recipe says something else of itself."""
    return recipe(manifest.read(built), description=FALSE)


def recipe(described, **changes):
    quant = described.plan.quant.model_copy(update=changes)
    return described.model_copy(update={"plan": described.plan.model_copy(update={"quant": quant})})


def stored(described, change, architecture=None):
    """The same with layers changed, or left out where `change` gives None."""
    layers = tuple(layer for layer in map(change, described.quantization.layers) if layer)
    quantization = described.quantization.model_copy(update={"layers": layers})
    update = {"quantization": quantization, "architecture": architecture or described.architecture}
    return described.model_copy(update=update)


def in_place(names, **changes):
    return lambda layer: layer.model_copy(update=changes) if any(name in layer.name for name in names) else layer


INT8 = {"bits": 8, "group_size": 256}
"""Per channel: every linear of the tiny model but down_proj has 256 inputs."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_place(()), "int4 in groups of 32 (14 linears), int8 per channel (embedding and head), rounded to nearest"),
        (
            in_place(["q_proj"], **INT8),
            "int4 in groups of 32 (12 of 14 linears), int8 per channel (2 of 14 linears, embedding and head), "
            "rounded to nearest",
        ),
        (
            in_place(["proj"], levels="nf4", group_size=64, kept=True),
            "nf4 in groups of 64 (14 linears), int8 per channel (embedding and head), "
            "14 of 15 with the checkpoint's own integers, the rest rounded to nearest",
        ),
        (
            in_place([""], kept=True),
            "int4 in groups of 32 (14 linears), int8 per channel (embedding and head), the checkpoint's own integers",
        ),
        (
            lambda layer: None if "embed" in layer.name else layer,
            "int4 in groups of 32 (14 linears), float (embedding and head), rounded to nearest",
        ),
        (lambda layer: None, "unknown"),
    ],
)
def test_the_line_is_of_what_was_quantized(described, change, words):
    assert storage.line(stored(described, change)) == words


def test_floats_are_called_floats(described):
    assert (
        storage.line(recipe(stored(described, lambda layer: None), method="none"))
        == "float (14 linears, embedding and head)"
    )


def test_an_untied_head_and_rotations_have_kinds_of_their_own(described):
    wide = described.architecture.model_copy(update={"tie_word_embeddings": False, "rotated": True})
    layer = described.quantization.layers[0]
    found = [layer.model_copy(update={"name": name}) for name in (ROTATE_IN, ROTATE_OUT)]
    changed = stored(described, in_place(()), wide)
    layers = (*changed.quantization.layers, *found)
    changed = changed.model_copy(update={"quantization": changed.quantization.model_copy(update={"layers": layers})})
    parts = {part.kind: part for part in storage.parts(changed)}
    assert (parts["head"].words, parts["head"].names) == ("float", (HEAD,))
    assert (parts["embedding"].words, parts["embedding"].names) == ("int8 per channel", (EMBEDDING,))
    assert (parts["rotations"].words, parts["rotations"].names) == ("int8 per channel", (ROTATE_IN, ROTATE_OUT))


def test_a_part_knows_its_layers_and_its_lowest_sqnr(described):
    changed = stored(described, in_place(["layers.1.self_attn.q_proj"], **INT8, sqnr_db=3.5))
    parts = [part for part in storage.parts(changed) if part.kind == "q_proj"]
    assert [(part.words, len(part.names), part.of) for part in parts] == [
        ("int4 in groups of 32", 1, 2),
        ("int8 per channel", 1, 2),
    ]
    assert parts[1].names == ("model.layers.1.self_attn.q_proj.weight",)
    assert parts[1].sqnr_db == 3.5


def test_a_build_says_it_and_not_what_the_recipe_says_of_itself(described, store, tmp_path, capsys):
    export_with(store, described.plan, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    words = "int4 in groups of 32 (14 linears), int8 per channel (embedding and head), rounded to nearest"
    assert f"  weights: {words}" in lines
    assert not any(FALSE in line for line in lines)
    assert f"Weights: {words}; " in (tmp_path / "out" / "README.md").read_text()


def test_card_and_inspect_say_it_instead_of_the_recipes_own_words(described, built, capsys):
    words = storage.line(described)
    page = card.render(described, [])
    assert f"Weights: {words}; {described.quantization.bits_per_weight:.2f} bits per weight,\n" in page
    assert FALSE not in page
    inspection.show(inspection.inspect(built))
    out = capsys.readouterr().out
    assert words in out
    assert described.plan.quant.description not in out


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu"])
def test_memory_grows_with_the_cache_and_the_bits(tiny, target):
    described = manifest.read(tiny(target))
    kv, measure = described.contract.kv, formats.load(described.plan.target.backend).process_bytes

    def of_kv(**changes):
        contract = described.contract.model_copy(update={"kv": kv.model_copy(update=changes)})
        return measure(described.model_copy(update={"contract": contract}))

    assert of_kv(slots=10 * kv.context_length) - of_kv() == 9 * formats.cache_bytes(kv)
    assert storage.process(described) == f"{measure(described) / 1e6:,.0f} MB"
    if target == "onnx-cpu":
        for changes, more in (({"bits": 8}, True), ({"group_size": 64}, False)):
            assert (measure(stored(described, in_place(["mlp"], **changes))) > measure(described)) is more


def test_memory_that_is_not_known_is_unknown(tiny):
    assert storage.process(manifest.read(tiny("coreml"))) == "unknown"
    described = manifest.read(tiny("onnx-cpu"))
    for name in ("mlp", EMBEDDING):
        left_out = stored(described, lambda layer, name=name: None if name in layer.name else layer)
        assert storage.process(left_out) == "unknown"
    assert storage.process(stored(described, in_place(["mlp"], levels="nf4"))) == "unknown"
    assert "| memory of a process with a full context | unknown |" in card.render(manifest.read(tiny("coreml")), [])


def test_memory_counts_the_calls_that_our_session_makes(tiny):
    assert formats.load("onnx_kv")._CALL == session_module(manifest.read(tiny("onnx-cpu"))).PIECE
