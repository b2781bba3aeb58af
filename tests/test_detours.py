"""Checkpoints written in the forms that people have, read back; the table that says what each form costs."""

import gguf
import pytest
import torch

from export import checkpoint
from export.quantize import eager
from runtime_tests import environment
from runtime_tests.bench import detour_forms, detours

from .checkpoints import LLAMA, jlama_block, weights, write_folder, write_gguf

LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path):
    return checkpoint.load(LLAMA, str(write_folder(tmp_path / "floats", dtype=torch.float32)))


def written(form, source, tmp_path):
    folder = tmp_path / form
    folder.mkdir()
    vocabulary = write_gguf(tmp_path / "vocabulary.gguf")
    place = detour_forms.FORMS[form][1](source, folder, vocabulary)
    assert detour_forms.weight_bytes(place) > 0
    return checkpoint.load(LLAMA, str(place))


def test_bf16_is_the_weights_in_bf16(source, tmp_path):
    found = written("bf16", source, tmp_path)
    assert torch.equal(found.read(LINEAR), source.read(LINEAR).bfloat16().float())


def test_nf4_is_what_bitsandbytes_dequantizes(source, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    found = written("nf4", source, tmp_path)
    packed = quantize_4bit(source.read(LINEAR).bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(found.read(LINEAR).bfloat16(), dequantize_4bit(*packed))
    assert "bitsandbytes NF4, nested" in found.source.description


def test_jlamas_blocks_are_jlamas(source, tmp_path):
    found = written("jlama", source, tmp_path)
    data, scales = jlama_block(weights()[LINEAR], "Q4")
    codes, factors = detour_forms.jlama_blocks(weights()[LINEAR])
    assert codes == data
    assert torch.equal(factors, scales)
    assert (found.read(LINEAR) - source.read(LINEAR)).abs().max() < scales.abs().max() * 1.001
    assert torch.equal(detour_forms.jlama_blocks(torch.zeros(2, 32))[1], torch.zeros(2, 1))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_ggufs_of_llama_cpp_hold_our_weights_and_a_tokenizer(source, tmp_path, kind):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `peers`)")
    found = written(kind, source, tmp_path)
    noise = (found.read(LINEAR) - source.read(LINEAR)).square().mean() / source.read(LINEAR).square().mean()
    assert noise < {"q8_0": 1e-4, "q4_0": 2e-2}[kind]
    assert gguf.GGUFReader(found.source.path).fields["tokenizer.ggml.tokens"].contents()


def test_a_float_gguf_computes_what_the_checkpoint_does(source, tmp_path):
    path = tmp_path / "exact.gguf"
    detour_forms.write_float_gguf(source, path, write_gguf(tmp_path / "vocabulary.gguf"))
    found = checkpoint.load(LLAMA, str(path))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        want, got = (eager(one.read, one.architecture, "none")(tokens)[0] for one in (source, found))
    assert torch.equal(want, got)


def test_a_form_that_is_there_is_not_written_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(detours, "home", lambda model: tmp_path)
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "done").write_text("/here")
    assert str(detours.made("bf16", "smollm2-135m", "unused")) == "/here"


def test_the_table_names_a_form_once():
    def row(form, recipe, kl):
        return detours.Detour(
            form=form, source_bytes=10**6, recipe=recipe, artifact_bytes=2 * 10**6,
            first_kl=0.1, second_kl=0.2, kl=kl, top1=0.5,
        )  # fmt: skip

    found = detours.Detours(
        model="m",
        evaluation="default",
        positions=520,
        rows=(row("A", "int4-g32", 0.3), row("A", "nf4-exact", 0.15), row("B", "int4-g32", 0.4)),
        environment=environment.current(),
        commit="c" * 40,
        tools={"torch": "2"},
    )
    assert [(one[0], one[2], one[6]) for one in detours.table(found)] == [
        ("checkpoint", "recipe", "in all"),
        ("A", "int4-g32", "0.3000"),
        ("–", "nf4-exact", "0.1500"),
        ("B", "int4-g32", "0.4000"),
    ]
    page = detours.render(found, "the command")
    assert "520 positions" in page
    assert "| – | 1.0 | nf4-exact | 2.0 | 0.1000 | 0.2000 | 0.1500 | 50.0% |" in page
