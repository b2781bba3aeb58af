"""The stock exporters are given the very weights ours gets: in each form the same logits, or a refusal."""

from types import SimpleNamespace

import gguf
import pytest
import torch

from export import checkpoints as checkpoint
from export.checkpoints.gguf import GgufSource
from export.checkpoints.integers import halves_apart, pairs_together
from export.errors import ExportError
from export.plan import ModelSpec, load_named
from export.toolbox import writers
from runtime_tests.bench import forms
from tests.support.metrics import eager_logits


@pytest.fixture(scope="module")
def tiny():
    return checkpoint.load(load_named(ModelSpec, "models", "tiny"), None)


@pytest.fixture(scope="module")
def plain():
    """The tiny model without RoPE scaling, whose constants export_llm has built in for full-size models."""
    spec = load_named(ModelSpec, "models", "tiny")
    architecture = spec.architecture.model_copy(update={"rope_scaling": None})
    return checkpoint.load(spec.model_copy(update={"architecture": architecture}), None)


TOKENS = list(range(3, 43))


def test_the_hugging_face_folder_gives_the_same_logits(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    forms.write_hugging_face(tiny, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(torch.tensor([TOKENS])).logits[0], eager_logits(tiny, TOKENS), atol=1e-4, rtol=1e-4
        )


def test_metas_form_gives_the_same_logits_in_executorchs_own_model(plain, tmp_path):
    pytest.importorskip("executorch")
    from executorch.examples.models.llama.model import Llama2Model
    from executorch.extension.llm.export.config.llm_config import LlmConfig

    forms.write_meta(plain, tmp_path)
    config = LlmConfig()
    config.base.checkpoint, config.base.params = str(tmp_path / "consolidated.00.pth"), str(tmp_path / "params.json")
    config.debug.generate_full_logits = True
    model = Llama2Model(llm_config=config).get_eager_model().eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.tensor([TOKENS]))[0], eager_logits(plain, TOKENS), atol=1e-4, rtol=1e-4)


def test_the_gguf_comes_back_equal_through_our_own_reader(plain, tmp_path):
    untied = plain.source.__class__("20", plain.architecture.model_copy(update={"tie_word_embeddings": False}))
    for kind, source in (("tied", plain), ("untied", checkpoint.Checkpoint(untied, "seed:20", untied.architecture))):
        folder = tmp_path / kind
        folder.mkdir()
        forms.write_gguf(source, folder)
        back = GgufSource(folder / forms.GGUF)
        assert back.architecture == source.architecture
        assert back.shapes == source.architecture.tensor_shapes()
        assert all(torch.equal(back.read(name), source.read(name)) for name in back.shapes)


def test_bf16_matrices_in_the_gguf_come_back_equal(plain, tmp_path):
    path = tmp_path / "model.gguf"
    kind = gguf.GGMLQuantizationType.BF16
    writers.write_gguf(path, writers.gguf_metadata(plain.architecture), writers.gguf_tensors(plain, kind))
    back = GgufSource(path)
    assert back.description == "GGUF, BF16 (15), 20 tensors"
    for name, shape in back.shapes.items():
        want = plain.read(name) if len(shape) == 1 else plain.read(name).bfloat16().float()
        assert torch.equal(back.read(name), want)


def test_rope_factors_are_those_of_llama_3_2():
    """Computed by hand: high frequencies are kept, the lowest are slowed 32 times, those between are blended."""
    factors = writers.rope_factors(load_named(ModelSpec, "models", "llama32-1b-instruct").architecture)
    assert factors.shape == (32,)
    assert torch.equal(factors[:12], torch.ones(12))
    assert torch.equal(factors[-8:], torch.full((8,), 32.0))
    assert bool((factors.diff() >= 0).all())


def test_metas_row_order_is_the_inverse_of_the_gguf_readers():
    weight = torch.randn(4 * 8, 16)
    assert torch.equal(halves_apart(pairs_together(weight, 4), 4), weight)


def test_a_scaling_that_export_llm_cannot_compute_is_refused(tiny):
    with pytest.raises(ExportError, match="original_max_position_embeddings 8192"):
        writers.meta_params(tiny.architecture)
    big = load_named(ModelSpec, "models", "llama32-1b-instruct").architecture
    params = writers.meta_params(big)
    assert (params["use_scaled_rope"], params["rope_scale_factor"], params["high_freq_factor"]) == (True, 32, 4)


def test_weights_are_stored_in_bf16_only_when_it_holds_them(tiny):
    assert forms.exact_dtype(tiny) is torch.float32
    read = tiny.source.read
    rounded = SimpleNamespace(architecture=tiny.architecture, read=lambda name: read(name).bfloat16().float())
    assert forms.exact_dtype(rounded) is torch.bfloat16
