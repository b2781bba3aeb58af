"""Checkpoints of fewer positions than a model's default context, and numbers that went through float32."""

import ctypes
import re

import pytest

from export import build, checkpoints, pipeline
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import console
from export.plan import ModelSpec, load_plan, shortened
from tests.support.checkpoints import LLAMA, SMALL, set_config, write_folder, write_gguf
from tests.support.reliability import SMALL_DIFFERENCE

pytestmark = SMALL_DIFFERENCE

SHORT = SMALL.model_copy(update={"max_position_embeddings": 256})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    return tmp_path


def test_a_short_context_is_built_as_it_is_said_once_and_is_up_to_date(here, capsys):
    folder = str(write_folder(here / "c", SHORT))
    built = build("llama", "int4-g32", "onnx-cpu", source=folder)
    assert (built.plan.model.context_length, built.contract.kv.context_length) == (256, 256)
    line = "note: context of 256 tokens instead of 2048: the checkpoint's max_position_embeddings\n"
    assert capsys.readouterr().err.count(line) == 1
    assert build("llama", "int4-g32", "onnx-cpu", source=folder) == built
    assert capsys.readouterr().err.endswith("up to date\n")
    with pytest.raises(ExportError, match=r"context_length 512 is more than .* 256; ask for at most 256"):
        build("llama", "int4-g32", "onnx-cpu", source=folder, context=512)


@pytest.mark.parametrize(
    ("asked", "positions", "context"),
    [(None, 4096, 2048), (None, 2048, 2048), (None, 1024, 1024), (None, 64, 64), (None, 32, 2048), (512, 256, 512)],
)
def test_a_default_gives_way_and_what_was_asked_for_stays(asked, positions, context):
    plan = shortened(load_plan("llama", "int4-g32", "onnx-cpu", asked), positions)
    assert plan.model.context_length == context
    assert shortened(plan, positions) == plan


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_checkpoints_own_number_decides_whatever_its_form(tmp_path, form):
    place = write_folder(tmp_path / "c", SHORT) if form == "folder" else write_gguf(tmp_path / "m.gguf", SHORT)
    architecture = checkpoints.architecture_of(LLAMA, parse_origin(str(place)))
    plan = pipeline.fitted(load_plan("llama", "int4-g32", "onnx-cpu"), architecture)
    assert checkpoints.load(plan.model, parse_origin(str(place))).architecture.max_position_embeddings == 256


# ── a model's own shapes ────────────────────────────────────────────────────────────────────────────────────────────

SCALED = SMALL.model_copy(
    update={
        "rope_theta": 123456.7,
        "rope_scaling": {"factor": 8.1, "low_freq_factor": 1.1, "high_freq_factor": 4.1,
                         "original_max_position_embeddings": 1024},
    }
)  # fmt: skip
SCALED = type(SMALL).model_validate(SCALED.model_dump(warnings=False))


def of_shapes(architecture):
    return ModelSpec(
        name="small", source=None, base_model=None, license="other", context_length=256, architecture=architecture
    )


def single(number):
    return ctypes.c_float(number).value


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"])
def test_a_number_that_went_through_float32_is_the_same_and_the_models_is_taken(tmp_path, key):
    folder = write_folder(tmp_path / "c", SCALED)
    scaling = SCALED.rope_scaling.model_dump()
    if key in scaling:
        assert single(scaling[key]) != scaling[key]
        set_config(folder, rope_scaling={"rope_type": "llama3", **scaling, key: single(scaling[key])})
    else:
        assert single(getattr(SCALED, key)) != getattr(SCALED, key)
        set_config(folder, **{key: single(getattr(SCALED, key))})
    opened = checkpoints.load(of_shapes(SCALED), parse_origin(str(folder)))
    assert (opened.architecture, opened.notes) == (SCALED, ())


def test_the_next_number_in_float32_is_another(tmp_path):
    folder = write_folder(tmp_path / "c")
    set_config(folder, rms_norm_eps=1.000001e-5)
    with pytest.raises(ExportError, match=re.escape("rms_norm_eps 1.000001e-05 (expected 1e-05)")):
        checkpoints.load(of_shapes(SMALL), parse_origin(str(folder)))


@pytest.mark.parametrize("longest", [512, 4096])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_where_positions_end_is_no_shape(tmp_path, form, longest):
    other = SMALL.model_copy(update={"max_position_embeddings": longest})
    place = write_folder(tmp_path / "c", other) if form == "folder" else write_gguf(tmp_path / "m.gguf", other)
    opened = checkpoints.load(of_shapes(SMALL), parse_origin(str(place)))
    assert opened.architecture == other
    assert opened.notes == (f"max_position_embeddings is {longest}, 2048 in the model small",)


def test_positions_that_end_before_the_context_have_a_remedy(tmp_path):
    folder = write_folder(tmp_path / "c", SMALL.model_copy(update={"max_position_embeddings": 128}))
    with pytest.raises(ExportError, match="128; ask for at most 128, or use the model `llama`"):
        checkpoints.load(of_shapes(SMALL), parse_origin(str(folder)))


def test_a_note_reaches_no_terminal_as_a_command(capsys):
    console.note("index promises a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "  note: index promises a\\x1b[2Jb\\nc\n"
