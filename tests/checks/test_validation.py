"""Every check, and for every check the broken artifact that must turn exactly its gate red."""

import json
import pickle
import platform
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import devices
from devices import DeviceLostError
from export import manifest
from export.checkpoints import tokenizer, whereabouts
from export.checkpoints.origin import parse_origin
from export.errors import ExportError
from export.host import disk
from export.plan import ModelSpec, Plan, QuantLimits, QuantRecipe, WeightScheme, load_named
from runtime_tests import evaluation, jobs, places, validate
from runtime_tests.checks import gates, golden, limits, tokens
from runtime_tests.checks.subject import Finding, StoppedError
from runtime_tests.evidence.record import Outcome
from tests.support.artifacts import OWN_LIMITS, TARGET, edit_manifest, export_with, renamed, reseal, set_fault
from tests.support.checkpoints import ADAPTER, write_lora
from tests.support.harms import Execute
from tests.support.records import failed
from tests.support.reliability import NUMBERS

KL, TOP1, SQNR = "lowering: mean KL", "lowering: top-1", "lowering: SQNR"
WEIGHTS, CACHE, GOLDEN = "weights: differing numbers", "cache: broken promises", "golden tokens"
ALL_LOWERING = {KL, TOP1, SQNR}
GOLDEN_TINY = tokens.Golden.model_validate_json((tokens.GOLDEN / "tiny_int4-g32.json").read_bytes())
UP = "model.layers.0.mlp.up_proj.weight"


class Untimed(places.ThisMachine):
    """Where nothing is opened to be timed."""

    def run(self, job, **options):
        assert not isinstance(job, jobs.SpeedJob)
        return super().run(job, **options)


def check(folder, setting):
    return validate.validate(folder, manifest.read(folder), setting)


def test_a_good_artifact_passes_every_gate(artifact, setting, in_process):
    record = check(artifact, setting)
    assert (record.outcome, record.detail, failed(record)) == (Outcome.PASS, "", set())
    assert {gate.name for gate in record.gates} >= {*ALL_LOWERING, WEIGHTS, CACHE, GOLDEN, "decode tokens/s"}
    assert record.accuracy.lowering.positions == 3 * 65
    assert record.accuracy.rewriting.max_relative_error < 1e-5
    assert len(record.latency.tests[0].samples_ns) == 5
    assert record.latency.peak_rss_bytes >= record.latency.rss_before_load_bytes > 0


def test_every_comparison_says_where_the_loss_is(artifact, setting, in_process):
    accuracy = check(artifact, setting).accuracy
    for comparison in (accuracy.total, accuracy.rewriting, accuracy.quantization, accuracy.lowering):
        domains = {name: part.positions for name, part in comparison.by_domain.items()}
        ranges = {name: part.positions for name, part in comparison.by_position.items()}
        assert domains == {"wikitext": 2 * 65, "german": 65}
        assert ranges == {"15 (prefill)": 3, "16–31": 3 * 16, "32–63": 3 * 32, "64–79": 3 * 16}


def test_the_total_is_what_all_steps_lose_and_no_gate_judges_it(artifact, setting, in_process):
    good = check(artifact, setting)
    assert good.accuracy.total.mean_kl == pytest.approx(good.accuracy.quantization.mean_kl, rel=1e-3)
    assert not any("total" in gate.name or "shipped" in gate.name for gate in good.gates)
    set_fault(artifact, "swapped heads")
    bad = check(artifact, setting)
    assert bad.accuracy.quantization == good.accuracy.quantization
    assert bad.accuracy.total.mean_kl > 1.5 * good.accuracy.total.mean_kl


@pytest.mark.parametrize(
    ("fault", "gates"),
    [
        ("flipped scale", {*ALL_LOWERING, GOLDEN}),
        ("swapped heads", {*ALL_LOWERING, GOLDEN}),
        ("stale cache slot", {*ALL_LOWERING, GOLDEN}),
        ("constant token", {*ALL_LOWERING, GOLDEN}),
        ("remembers", {CACHE}),
        ("accepts too much", {CACHE}),
        ("rewinds nothing", {CACHE}),
    ],
)
def test_a_session_that_computes_something_else(artifact, setting, in_process, fault, gates):
    set_fault(artifact, fault)
    record = check(artifact, with_evaluation(setting, prefill=20))
    assert (record.outcome, failed(record)) == (Outcome.MISMATCH, gates)


def test_nan_is_named_by_window_and_step(artifact, setting, in_process):
    set_fault(artifact, "nan")
    setting = with_evaluation(setting, prefill=50)
    record = check(artifact, setting)
    assert record.outcome is Outcome.MISMATCH
    assert failed(record) == {"logits finite: problems"}
    assert "window 0, step 50" in record.detail


@NUMBERS
def test_nan_at_a_token_that_only_the_chat_template_writes_is_red(artifact, setting, in_process):
    set_fault(artifact, "end token overflows")
    record = check(artifact, setting)
    assert (record.outcome, failed(record)) == (Outcome.MISMATCH, {"template tokens finite: problems"})
    end = manifest.read(artifact).tokenizer.eos_ids[0]
    assert f"NaN or infinity after token {end}, place " in record.detail


@NUMBERS
def test_what_the_template_writes_is_fed_where_there_is_one(built, artifact):
    loaded, described = tokenizer.load(built), manifest.read(built)
    ids = described.tokenizer
    written = loaded.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)[
        "input_ids"
    ]
    start = [ids.bos_id] if ids.bos_id is not None and written[0] != ids.bos_id else []
    window = evaluation.template_window(loaded, described)
    assert window.tokens[0, :-1].tolist() == [*start, *written, *ids.eos_ids]
    bare = described.model_copy(update={"tokenizer": ids.model_copy(update={"chat_example": None, "bos_id": 1})})
    assert evaluation.template_window(loaded, bare).tokens[0, :-1].tolist() == [1, *ids.eos_ids]


def with_evaluation(setting, **changes):
    return replace(setting, evaluation=setting.evaluation.model_copy(update=changes))


@pytest.mark.parametrize(
    ("fault", "outcome", "words"),
    [
        ("does not load", Outcome.LOAD_FAIL, "newer version"),
        ("raises", Outcome.RUN_FAIL, "kernel not implemented"),
    ],
)
def test_a_session_that_fails(artifact, setting, in_process, fault, outcome, words):
    set_fault(artifact, fault)
    record = check(artifact, with_evaluation(setting, prefill=60))
    assert record.outcome is outcome
    assert words in record.detail


def edit_tensors(artifact, change):
    path = artifact / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    reseal(artifact)


def test_one_integer_off_by_one_is_found(artifact, setting, in_process):
    def change(tensors):
        tensors[f"{UP}.qdata"][3, 5] ^= 1

    edit_tensors(artifact, change)
    record = check(artifact, setting)
    assert (record.outcome, failed(record) - ALL_LOWERING) == (Outcome.WEIGHTS_DIFFER, {WEIGHTS})
    gate = next(gate for gate in record.gates if gate.name == WEIGHTS)
    assert gate.value == 1
    assert UP in gate.detail


def test_a_weight_that_was_never_quantized_is_missing(artifact, setting, in_process):
    edit_tensors(artifact, lambda tensors: tensors.update({f"{UP}.renamed": tensors.pop(f"{UP}.qdata")}))
    assert WEIGHTS in failed(check(artifact, setting))


@pytest.mark.reliability("artifacts damaged before validation", "not given to the runtime")
@pytest.mark.parametrize("damage", ["truncate", "extra", "remove"])
def test_a_damaged_file_never_reaches_the_runtime(artifact, setting, in_process, damage):
    path = artifact / "model.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "extra":
        (artifact / "more.bin").write_bytes(b"x")
    else:
        path.unlink()
    record = check(artifact, setting)
    assert (record.outcome, failed(record)) == (Outcome.DAMAGED, {"files intact: problems"})
    assert record.accuracy.lowering is None


@pytest.mark.parametrize("damage", ["ids", "template", "unreadable"])
def test_another_tokenizer_is_found(artifact, setting, in_process, damage):
    path = artifact / "tokenizer.json"
    if damage == "ids":
        fields = json.loads(path.read_text())
        vocab = fields["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        path.write_text(json.dumps(fields))
    elif damage == "template":
        next(artifact.glob("chat_template.jinja")).write_text("{{ messages }}")
    else:
        path.write_text("{")
    reseal(artifact)
    record = check(artifact, setting)
    assert (record.outcome, failed(record)) == (Outcome.TOKENIZER_DIFFERS, {"tokenizer: differences"})


def test_another_checkpoint_is_refused(artifact, setting, in_process):
    record = check(artifact, replace(setting, source="seed:21"))
    assert record.outcome is Outcome.SOURCE_DIFFERS
    assert "another checkpoint (seed:21 now)" in record.detail


@pytest.fixture
def fine_tuned(tmp_path, store, setting, monkeypatch):
    """An artifact of a base and an adapter, in folders of their own, and what a validation says of it."""
    monkeypatch.setattr(whereabouts, "FOLDER", tmp_path / "origins")  # other tests build from the same bytes
    write_lora(tmp_path / "base")
    shutil.move(tmp_path / "base" / ADAPTER, tmp_path / "lora")
    plan = Plan(
        model=load_named(ModelSpec, "models", "llama"),
        quant=load_named(QuantRecipe, "quant", "int4-g32"),
        target=TARGET,
    )
    origin = parse_origin(f"adapter:{tmp_path}/lora//{tmp_path}/base")
    export_with(store, plan, tmp_path / "tuned", origin)

    def run(source=None):
        record = check(tmp_path / "tuned", replace(setting, source=source))
        detail = record.detail
        for name in ("base", "lora"):
            detail = detail.replace(shlex.quote(f"{tmp_path}/{name}"), name)  # as a shell takes it
        return record.outcome, detail.replace(f"{tmp_path}/", "")

    return run


def turned(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("happens", "outcome", "line"),
    [
        (lambda at: (at / "lora").rename(at / "new"), Outcome.SOURCE_MISSING,
         "lora: not found on this machine; give where it is now with --source base --adapter ADAPTER"),
        (lambda at: (at / "base").rename(at / "new"), Outcome.SOURCE_MISSING,
         "base: not found on this machine; give where it is now with --source SOURCE --adapter lora"),
        (lambda at: (at / "lora/adapter_config.json").unlink(), Outcome.SOURCE_MISSING,
         "lora/adapter_config.json: missing; --adapter must be a folder that peft's save_pretrained wrote"),
        (lambda at: (at / "base/config.json").unlink(), Outcome.SOURCE_MISSING,
         "base/config.json: missing; --source must be a Hugging Face model folder"),
        (lambda at: turned(at / "lora/adapter_model.safetensors"), Outcome.SOURCE_DIFFERS,
         "weights: lora/adapter_model.safetensors: changed: not the checkpoint that llama_int4-g32_fake was built "
         "from; build it again, or give that one with --source and --adapter"),
        (lambda at: turned(at / "base/model.safetensors"), Outcome.SOURCE_DIFFERS,
         "weights: base/model.safetensors: changed: not the checkpoint that llama_int4-g32_fake was built from; build "
         "it again, or give that one with --source and --adapter"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_gone_is_told_from_one_that_changed(
    fine_tuned, tmp_path, in_process, happens, outcome, line
):
    happens(tmp_path)
    assert fine_tuned() == (outcome, line)


def test_a_checkpoint_that_is_given_where_it_moved_is_found_there_again(fine_tuned, tmp_path, in_process):
    now = (tmp_path / "lora").rename(tmp_path / "new")
    given = f"adapter:{now}//{tmp_path}/base"
    assert fine_tuned(given)[0] not in {Outcome.SOURCE_MISSING, Outcome.SOURCE_DIFFERS}
    assert whereabouts.given(manifest.read(tmp_path / "tuned").checkpoint) == given


def test_quantization_beyond_the_recipe_fails_only_its_gates(artifact, setting, in_process):
    given = limits.of(manifest.read(artifact), None)
    strict = given.model_copy(update={"quant": QuantLimits(max_mean_kl=1e-3, min_top1=0.999)})
    record = check(artifact, replace(setting, limits=strict))
    assert failed(record) == {"quantization: mean KL", "quantization: top-1"}
    assert record.notes == (
        "not judged by the limits that it brings: quant.max_mean_kl 0.001 (its own: 1.0), "
        "quant.min_top1 0.999 (its own: 0.4)",
    )


def bring_own(fields, **changes):
    fields["plan"]["quant"]["limits"] = {"max_mean_kl": 1e9, "min_top1": 0.0}
    fields["plan"]["target"].update(limits=OWN_LIMITS, limits_on={platform.machine(): OWN_LIMITS}, **changes)


@pytest.mark.hostile(
    "artifact", "pass marks, golden answers and recipes of its own", "judged by this checkout, and noted"
)
def test_an_artifact_brings_no_pass_mark_of_its_own(artifact, setting, in_process, capsys):
    """Wrong weights, files recorded anew, limits that nothing exceeds: judged by those of configs/."""
    set_fault(artifact, "flipped scale")
    edit_manifest(artifact, bring_own)
    record = check(artifact, with_evaluation(setting, prefill=20))
    assert (record.outcome, failed(record)) == (Outcome.MISMATCH, {*ALL_LOWERING, GOLDEN})
    (note,) = record.notes
    assert note.startswith("not judged by the limits that it brings: quant.max_mean_kl 1.0 (its own: 1000000000.0), ")
    assert note in capsys.readouterr().err


@pytest.mark.hostile(
    "artifact", "pass marks, golden answers and recipes of its own", "judged by this checkout, and noted"
)
def test_golden_tokens_are_those_of_the_model_in_configs(artifact, setting, in_process):
    """A manifest that says its weights are others still builds from the seed whose answer is known."""
    edit_manifest(artifact, lambda fields: fields["plan"]["model"].update(source="seed:7"))
    set_fault(artifact, "constant token")
    assert GOLDEN in failed(check(artifact, with_evaluation(setting, prefill=20)))
    assert tokens.golden_of(manifest.read(artifact)) == GOLDEN_TINY
    renamed(artifact, "vendor")
    assert tokens.golden_of(manifest.read(artifact)) is None


def test_a_record_of_an_honest_artifact_has_no_notes(artifact, setting, in_process):
    described = manifest.read(artifact)
    assert limits.notes(described, limits.of(described, None), "aarch64") == ()
    other = described.plan.quant.model_copy(update={"linear": WeightScheme(bits=4, group_size=64)})
    reseal(artifact, plan=described.plan.model_copy(update={"quant": other}))
    changed = manifest.read(artifact)
    assert limits.notes(changed, limits.of(changed, None), "x86_64") == (
        "its recipe is not configs/quant/int4-g32.yaml of this checkout: linear differs",
    )


def test_a_rewriting_error_fails_only_its_gate(artifact, setting, in_process, monkeypatch, tmp_path):
    """Our model without RoPE scaling: references and artifact agree with each other, and not with Hugging Face."""
    monkeypatch.setattr("export.model.scale_frequencies", lambda frequencies, scaling: frequencies)
    record = check(artifact, replace(setting, cache=tmp_path))
    assert failed(record) == {"rewriting: max error", GOLDEN}
    assert record.accuracy.total.mean_kl > record.accuracy.quantization.mean_kl + 10 * record.accuracy.lowering.mean_kl


@pytest.mark.hostile("record", "damaged and pickled results in the cache", "made again, never unpickled")
def test_a_damaged_reference_in_the_cache_is_made_again(artifact, setting, in_process, tmp_path):
    setting = replace(setting, cache=tmp_path / "cache")  # that no other test has put references into
    good = check(artifact, setting)
    damaged = sorted(setting.cache.glob("reference-*.npy"))
    before = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(pickle.dumps(Execute()))
    damaged[-1].write_bytes(before[-1][:-1])
    again = check(artifact, setting)
    assert (again.outcome, again.accuracy) == (Outcome.PASS, good.accuracy)
    assert [path.read_bytes() for path in damaged] == before


def test_a_slow_artifact_fails_only_the_speed_gates(artifact, setting, in_process):
    budgets = devices.Budgets(min_decode_tps=1e9, max_ttft_s=1e-9)
    slow = replace(setting, device=setting.device.model_copy(update={"budgets": budgets}))
    record = check(artifact, slow)
    assert (record.outcome, failed(record)) == (Outcome.TOO_SLOW, {"decode tokens/s", "time to first token, s"})


def test_a_reference_evaluator_is_never_timed(artifact, setting, in_process):
    set_fault(artifact, "reference evaluator")
    record = check(artifact, replace(setting, place=Untimed(1)))
    assert (record.outcome, record.latency) == (Outcome.PASS, None)


def test_what_was_found_before_a_check_stopped_is_in_the_record(tmp_path):
    def gate(name, value=0):
        return gates.judge(name, value, "at most", 0, Outcome.MISMATCH)

    def checks(error):
        yield Finding((gate("first"),), probe_sqnr_db=(1.0,))
        if error:
            raise error
        yield Finding((gate("second", 1),))

    def ended(error=None):
        finding, stop = validate.collect(checks(error), tmp_path)
        outcome, detail = stop or gates.outcome_of(finding.gates)
        assert finding.probe_sqnr_db == (1.0,)
        return [gate.name for gate in finding.gates], outcome, detail

    stop = StoppedError(Outcome.DAMAGED, "why", Finding((gate("last", 1),)))
    assert ended() == (["first", "second"], Outcome.MISMATCH, "second is 1, must be at most 0")
    assert ended(stop) == (["first", "last"], Outcome.DAMAGED, "why")
    assert ended(DeviceLostError("gone")) == (["first"], Outcome.DEVICE_LOST, "gone")
    assert ended(ExportError("no text")) == (["first"], Outcome.RUN_FAIL, "no text")
    with pytest.raises(disk.FullError):
        ended(disk.FullError("full"))


def test_golden_tokens_are_varied_and_clear():
    answer = GOLDEN_TINY
    assert len(answer.tokens) >= 32
    assert len(set(answer.tokens)) >= golden.MIN_DISTINCT
    # a lowering at the loosest SQNR limit of configs/targets would move a logit by less than half of this
    assert answer.smallest_margin > 0.08 * answer.logit_rms


def test_a_crash_is_one_row_and_the_run_goes_on(command, built, artifact, tmp_path, capsys, in_process):
    set_fault(artifact, "segfault")
    in_process.append(artifact)
    good = shutil.copytree(built, tmp_path / "good")
    assert command(artifact, good) == 1
    out = capsys.readouterr().out
    assert "died by SIGSEGV" in out
    lines = (tmp_path / "build" / "records" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["crash", "pass"]
    assert [json.loads(line)["folder"] for line in lines] == ["artifact", "good"]
    page = (tmp_path / "build" / "report" / "index.html").read_text()
    assert "1 of 2 artifacts failed" in page
    assert "1 of 2 failed" in (tmp_path / "build" / "reports" / "index.html").read_text()


def test_mistakes_end_in_one_line(command, built, tmp_path, capsys):
    assert command(tmp_path / "nowhere") == 1
    assert command("--nonsense") == 2
    assert command() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 3


def test_a_seeded_checkpoint_is_identified_by_its_seed(built):
    described = manifest.read(built)
    assert (described.checkpoint.origin, described.checkpoint.sha256) == ("seed:20", {})
    assert torch.tensor([layer.sqnr_db for layer in described.quantization.layers]).min() > 15


def test_an_evaluation_longer_than_the_context_ends_one_artifact_not_the_run(artifact, setting, in_process):
    record = check(artifact, with_evaluation(setting, prefill=250))
    assert record.outcome is Outcome.RUN_FAIL
    assert "context of 256" in record.detail
