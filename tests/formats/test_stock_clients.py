"""Other projects' runners load our files and generate the same text as our own session.

On the real default model, because a random model generates no text.
"""

import numpy as np
import pytest
import torch

from export import manifest
from export.checkpoints.tokenizer import load
from runtime_tests.sessions import greedy, open_session
from tests.formats.cards import snippets

QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]
LENGTH = 40
pytestmark = pytest.mark.slow


def chat_prompt(folder) -> str:
    return load(folder).apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def our_answer(folder) -> str:
    described, tokenizer = manifest.read(folder), load(folder)
    session = open_session(folder, described, threads=2)
    ids = tokenizer(chat_prompt(folder), add_special_tokens=False).input_ids
    answer = greedy(session, ids, LENGTH)
    ends = [i for i, token in enumerate(answer) if token in described.tokenizer.eos_ids]
    return tokenizer.decode(answer[: ends[0]] if ends else answer, skip_special_tokens=True)


def behind_our_likeliest(folder, text) -> list[float]:
    """How far each token of a text is, in our session after those before it, behind the likeliest one's logit."""
    tokenizer, session = load(folder), open_session(folder, manifest.read(folder), threads=2)
    logits, gaps = session.feed(tokenizer(chat_prompt(folder), add_special_tokens=False).input_ids), []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        gaps.append(float(logits.max() - logits[token]))
        logits = session.feed([token])
    return gaps


def one_size_of_thread_pools():
    """The runner takes torch's pool as earlier tests left it, and another number of threads sums in another order."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    torch.set_num_threads(2)
    _unsafe_reset_threadpool(2)


def test_executorchs_own_runner_gives_our_text(real):
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder = real("executorch-xnnpack")
    one_size_of_thread_pools()
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    pieces: list[str] = []
    config = GenerationConfig(max_new_tokens=LENGTH, temperature=0.0, echo=False)
    runner.generate(chat_prompt(folder), config, pieces.append)
    text = "".join(pieces).removesuffix("<|im_end|>").rstrip("\n")
    assert len(text.split()) > 5
    # where two tokens are as likely, the last bit of a sum decides, and the matrix library's depend on addresses
    assert max(behind_our_likeliest(folder, text)) < 0.7
    assert max(behind_our_likeliest(folder, " ".join(reversed(text.split())))) > 0.7


def test_the_runner_reads_the_metadata_it_needs(real):
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    folder = real("executorch-xnnpack")
    described = manifest.read(folder)
    program = Runtime.get().load_program(folder / "model.pte")

    def value(name):
        return program.load_method(name).execute([])

    assert value("get_vocab_size") == [49152]
    assert value("get_max_context_len") == [described.contract.kv.context_length]
    assert value("get_max_seq_len") == [described.contract.max_prefill]
    assert value("get_eos_ids") == list(described.tokenizer.eos_ids)
    assert value("get_bos_id") == [described.tokenizer.bos_id]
    assert value("use_kv_cache") == value("use_sdpa_with_kv_cache") == value("enable_dynamic_shape") == [True]


def test_prompts_longer_than_one_prefill_go_through_the_runner(real):
    """The runner cuts a prompt into pieces of get_max_seq_len; the answer must not depend on that."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder = real("executorch-xnnpack")
    described, tokenizer = manifest.read(folder), load(folder)
    prompt = "The quick brown fox jumps over the lazy dog. " * 70
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert len(ids) > described.contract.max_prefill
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    pieces: list[str] = []
    runner.generate(prompt, GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False), pieces.append)
    session = open_session(folder, described, threads=2)
    assert "".join(pieces) == tokenizer.decode(greedy(session, ids, 8))


def test_onnxruntime_genai_gives_our_text(real):
    import onnxruntime_genai as genai

    folder = real("onnx-cpu")
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    ids = tokenizer.encode(chat_prompt(folder))
    np.testing.assert_array_equal(ids, load(folder)(chat_prompt(folder), add_special_tokens=False).input_ids)
    parameters.set_search_options(max_length=len(ids) + LENGTH, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    answer = []
    while not generator.is_done() and len(answer) < LENGTH:
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    text = load(folder).decode(answer, skip_special_tokens=True)
    assert len(text.split()) > 5
    assert text == our_answer(folder)


@pytest.mark.parametrize("target", ["executorch-xnnpack", "onnx-cpu", "coreml"])
def test_the_cards_python_answers_as_it_stands(real, target, tmp_path):
    folder = real(target)
    for _, code in snippets.python((folder / "README.md").read_text()):
        done = snippets.run(folder, snippets.EVALUATED * (target == "coreml") + code, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "The capital of France is Paris" in done.stdout
