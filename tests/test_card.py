"""The card: valid front matter, honest about what was measured, the same bytes for the same build."""

import pytest
from huggingface_hub import ModelCard

from export import card, manifest
from export.errors import ExportError
from export.manifest import CalibrationInfo, Candidate
from runtime_tests.evidence.record import Outcome
from runtime_tests.reports import publication
from tests.support.records import sample_record


@pytest.fixture
def described(built):
    return manifest.read(built)


def with_model(described, **changes):
    model = described.plan.model.model_copy(update=changes)
    return described.model_copy(update={"plan": described.plan.model_copy(update={"model": model})})


def with_backend(described, backend):
    target = described.plan.target.model_copy(update={"backend": backend})
    return described.model_copy(update={"plan": described.plan.model_copy(update={"target": target})})


def test_a_build_writes_a_card_that_says_it_is_not_validated(built, described):
    text = (built / "README.md").read_text()
    assert "Not validated yet" in text
    assert text == card.render(described, [])
    assert "text means nothing" in text


def test_front_matter_is_what_the_hub_reads(described):
    llama = with_model(described, base_model="meta-llama/Llama-3.2-1B-Instruct", license="llama3.2")
    read = ModelCard(card.render(llama, [])).data
    assert read.base_model == "meta-llama/Llama-3.2-1B-Instruct"
    assert read.base_model_relation == "quantized"
    assert (read.license, read.library_name) == ("llama3.2", "torch")
    assert "Built with Llama" in card.render(llama, [])
    assert "Built with Llama" not in card.render(described, [])


def test_measured_rows_appear(described):
    record = sample_record()
    text = card.render(described, publication.measured_rows(record))
    assert "Not validated" not in text
    assert f"{record.accuracy.lowering.mean_kl:.2e}" in text
    assert "| decode, 64 tokens | 98." in text
    assert record.commit[:12] in text


def test_a_verdicts_detail_stays_in_the_record(described):
    gate = sample_record().gates[0]
    failed = gate.model_copy(update={"verdict": "fail", "value": 1.0, "detail": "/home/me/model: changed"})
    for gates, words in (
        ((), "source differs"),
        ((failed,), "source differs: lowering: mean KL is 1, must be at most"),
    ):
        record = sample_record(gates=gates, outcome=Outcome.SOURCE_DIFFERS, detail="/home/me/model: gone")
        text = card.render(described, publication.measured_rows(record))
        assert f"| verdict | {words}" in text
        assert "/home/me" not in text


def test_a_note_on_the_verdict_stands_beside_it(described):
    record = sample_record(notes=("not judged by the limits that it brings: x 1 (its own: 2)",))
    lines = card.render(described, publication.measured_rows(record)).splitlines()
    verdict = next(i for i, line in enumerate(lines) if line.startswith("| verdict"))
    assert lines[verdict + 1] == "| note | not judged by the limits that it brings: x 1 (its own: 2) | of the verdict |"


def test_the_loss_as_shipped_comes_first_with_a_line_for_every_slice(described):
    record = sample_record()
    total = record.accuracy.total
    lines = card.render(described, publication.measured_rows(record)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| verdict")) + 1
    assert lines[first].startswith(f"| KL as shipped, mean (p99) | {total.mean_kl:.3f} ({total.p99_kl:.3f}) nats |")
    for label, part in total.by_domain.items():
        (line,) = [line for line in lines if line.startswith(f"| {label} |")]
        assert f"KL {part.mean_kl:.3f} ({part.p99_kl:.3f}), top-1 {part.top1:.1%}" in line
    assert len([line for line in lines if line.startswith("| positions ")]) == len(total.by_position) == 2


@pytest.mark.parametrize(
    ("backend", "words"),
    [("pte", "TextLLMRunner"), ("pte", "llama_main"), ("onnx_kv", "og.Generator"), ("onnx_kv", "logits: all"),
     ("mlpackage", "make_state"), ("mlpackage", "causalMask")],
)  # fmt: skip
def test_every_format_shows_its_stock_clients(described, backend, words):
    assert words in card.render(with_backend(described, backend), [])


def test_an_artifact_that_scores_prompts_shows_lm_eval(described):
    onnx = with_backend(described, "onnx_kv")
    assert "lm_eval --model" not in card.render(onnx, [])
    contract = onnx.contract.model_copy(update={"logits": "all"})
    assert "lm_eval --model" in card.render(onnx.model_copy(update={"contract": contract}), [])


def test_a_backend_without_instructions_is_refused(described):
    with pytest.raises(ExportError, match=r"other/usage\.md\.j2: missing"):
        card.render(with_backend(described, "other"), [])


def test_a_calibrated_artifact_says_with_what_and_what_was_promoted(described):
    candidate = Candidate(name="a", kl=0.1, promoted_kl=0.0, extra_bytes=9, promoted=True)
    other = candidate.model_copy(update={"name": "b", "promoted": False})
    info = CalibrationInfo(
        texts={"a.txt": "0" * 64}, day=None, tokens=12_345, held_out_kl=0.0321, candidates=(candidate, other)
    )
    calibrated = described.model_copy(
        update={"quantization": described.quantization.model_copy(update={"calibration": info})}
    )
    text = card.render(calibrated, [])
    assert "| calibrated with | 12,345 tokens of 1 texts; KL 0.0321 on held-out windows |" in text
    assert "| promoted linears | 1 of 2, by KL saved per byte |" in text
    assert "calibrated with" not in card.render(described, [])


def test_a_checkpoint_that_was_quantized_before_is_named(artifact):
    described = manifest.read(artifact)
    for bits, said in ((5.5, True), (16.0, False), (None, False)):
        info = described.checkpoint.model_copy(update={"bits_per_weight": bits})
        text = card.render(described.model_copy(update={"checkpoint": info}), [])
        assert ("was quantized before (5.5 bits per weight)" in text) == said


@pytest.mark.parametrize("backend", ["pte", "onnx_kv", "mlpackage"])
@pytest.mark.parametrize("talks", [True, False])
def test_who_can_talk_is_asked_and_who_cannot_continues(described, backend, talks):
    example = described.tokenizer.chat_example if talks else None
    tokenizer = described.tokenizer.model_copy(update={"chat_example": example})
    text = card.render(with_backend(described.model_copy(update={"tokenizer": tokenizer}), backend), [])
    assert ("apply_chat_template" in text) == ("What is the capital of France?" in text) == talks
    assert ('"The capital of France is"' in text) != talks
    assert ("python -m runtime_tests chat FOLDER" in text) == talks


def test_code_of_our_own_is_not_escaped(described):
    ids = {"adds_bos": True, "chat_example": None, "ends": ("<|end|>",)}
    text = card.render(
        with_backend(described.model_copy(update={"tokenizer": described.tokenizer.model_copy(update=ids)}), "pte"), []
    )
    for snippet in (
        "--num_bos=1 --prompt=$'The capital of France is'\n",
        ".numBos(1)",
        '["<|end|>"]',
        'setOf<String>("<|end|>")',
    ):
        assert snippet in text


def test_a_recipe_that_the_project_has_not_is_the_builders_own(described):
    own = described.plan.quant.model_copy(update={"name": "mine"})
    text = card.render(described.model_copy(update={"plan": described.plan.model_copy(update={"quant": own})}), [])
    assert "the builder's own `configs/quant/mine.yaml` (its values are in `manifest.json`" in text
    assert "builder's own" not in card.render(described, [])
