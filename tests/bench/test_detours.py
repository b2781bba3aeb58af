"""Checkpoints written in the forms that people have, read back; the table that says what each form costs."""

import gguf
import pytest
import torch

from export import checkpoints
from export.checkpoints.origin import parse_origin
from export.toolbox import writers
from runtime_tests.bench import forms
from runtime_tests.bench.studies import detours
from runtime_tests.places import environment
from tests.support.checkpoints import LLAMA, write_folder, write_gguf
from tests.support.metrics import eager_logits

LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path):
    return checkpoints.load(LLAMA, parse_origin(str(write_folder(tmp_path / "floats", dtype=torch.float32))))


def written(form, source, tmp_path):
    folder = tmp_path / form
    folder.mkdir()
    vocabulary = write_gguf(tmp_path / "vocabulary.gguf")
    place = forms.DETOUR_FORMS[form][1](source, folder, vocabulary)
    assert forms.weight_bytes(place) > 0
    return checkpoints.load(LLAMA, parse_origin(str(place)))


def test_bf16_is_the_weights_in_bf16(source, tmp_path):
    form = written("bf16", source, tmp_path)
    assert torch.equal(form.read(LINEAR), source.read(LINEAR).bfloat16().float())


def test_nf4_is_what_bitsandbytes_dequantizes(source, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    form = written("nf4", source, tmp_path)
    packed = quantize_4bit(source.read(LINEAR).bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(form.read(LINEAR).bfloat16(), dequantize_4bit(*packed))
    assert "bitsandbytes NF4, nested" in form.source.description


def test_jlamas_blocks_are_jlamas(source, tmp_path):
    form = written("jlama", source, tmp_path)
    _, scales = writers.jlama_blocks(source.read(LINEAR))
    assert (form.read(LINEAR) - source.read(LINEAR)).abs().max() < scales.abs().max() * 1.001
    assert torch.equal(writers.jlama_blocks(torch.zeros(2, 32))[1], torch.zeros(2, 1))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_ggufs_of_llama_cpp_hold_our_weights_and_a_tokenizer(source, tmp_path, kind):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peers`)")
    form = written(kind, source, tmp_path)
    noise = (form.read(LINEAR) - source.read(LINEAR)).square().mean() / source.read(LINEAR).square().mean()
    assert noise < {"q8_0": 1e-4, "q4_0": 2e-2}[kind]
    assert gguf.GGUFReader(form.source.path).fields["tokenizer.ggml.tokens"].contents()


def test_a_float_gguf_computes_what_the_checkpoint_does(source, tmp_path):
    path = tmp_path / "exact.gguf"
    forms.write_float_gguf(source, path, write_gguf(tmp_path / "vocabulary.gguf"))
    form = checkpoints.load(LLAMA, parse_origin(str(path)))
    assert torch.equal(*(eager_logits(model, range(3, 40)) for model in (source, form)))


def test_a_form_that_is_there_is_not_written_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(detours, "home", lambda model: tmp_path)
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "done").write_text("/here")
    assert str(detours.cached_form("bf16", "smollm2-135m", "unused")) == "/here"


def test_the_table_names_a_form_once():
    def row(form, recipe, kl):
        return detours.Detour(
            form=form, source_bytes=10**6, recipe=recipe, artifact_bytes=2 * 10**6,
            first_kl=0.1, second_kl=0.2, kl=kl, top1=0.5,
        )  # fmt: skip

    study = detours.Detours(
        model="m",
        evaluation="default",
        positions=520,
        rows=(row("A", "int4-g32", 0.3), row("A", "nf4-exact", 0.15), row("B", "int4-g32", 0.4)),
        environment=environment.current(),
        commit="c" * 40,
        tools={"torch": "2"},
    )
    assert [(cells[0], cells[2], cells[6]) for cells in detours.table(study)] == [
        ("checkpoint", "recipe", "in all"),
        ("A", "int4-g32", "0.3000"),
        ("–", "nf4-exact", "0.1500"),
        ("B", "int4-g32", "0.4000"),
    ]
    page = detours.render(study, "the command")
    assert "520 positions" in page
    assert "| – | 1.0 | nf4-exact | 2.0 | 0.1000 | 0.2000 | 0.1500 | 50.0% |" in page
