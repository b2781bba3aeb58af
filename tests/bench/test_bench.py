"""The benchmark: fair order, honest ratios, a crash is a row, and stock tools get the very weights ours get."""

import sys
from pathlib import Path

import numpy as np
import pytest

from export import pipeline
from export.errors import ExportError
from export.plan import load_plan
from export.toolbox.tables import NONE, markdown, plain
from runtime_tests.bench import __main__ as cli
from runtime_tests.bench import contenders, exports, fidelity, measurement, publish, results, runners, tables
from runtime_tests.bench.results import Benchmark
from runtime_tests.evidence import record
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import Opening, isolation
from tests.support.benchmarks import SETTINGS, entry, stored_run, timing

# ratios and order


def test_a_spread_is_the_median_with_deciles():
    spread = results.spread([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert spread == (6, 2, 10, 11)
    assert spread.text(1) == "6.0 (2.0–10.0)"


def test_a_ratio_pairs_repetitions_so_that_a_slow_one_cancels():
    theirs = {0: 100.0, 1: 50.0, 2: 10.0}
    ratio = results.ratio({i: 2 * value for i, value in theirs.items()}, theirs)
    assert ratio == (2, 2, 2, 3)


def test_a_repetition_that_one_side_missed_is_no_pair():
    assert results.ratio({0: 1.0, 1: 9.0}, {0: 2.0}).repetitions == 1
    assert results.ratio({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.2, 1.1, 1.3), "faster"),
        ((0.9, 0.8, 0.7), "slower"),
        ((0.9, 1.0, 1.4), "no clear difference"),
        ((1.2, 1.1), "too few repetitions"),
    ],
)
def test_a_difference_is_only_claimed_when_the_quartiles_agree(values, verdict):
    assert results.ratio(dict(enumerate(values)), dict.fromkeys(range(9), 1.0)).verdict == verdict


def test_every_contender_stands_in_every_place_once():
    orders = [measurement.rotated("ABCD", repetition) for repetition in range(5)]
    assert "".join(orders[0]) == "ABCD"
    assert "".join(orders[1]) == "BCDA"
    assert orders[4] == orders[0]
    assert all(len({order[place] for order in orders[:4]}) == 4 for place in range(4))


# the run


WORKER = """
import json, os, sys
job = json.load(sys.stdin)
if "broken" in job["opening"]["path"]:
    os.abort()
print(json.dumps({"result": %s}))
"""


def test_a_contender_that_crashes_is_a_row_and_the_run_goes_on(monkeypatch):
    script = WORKER % timing(100.0).model_dump_json()
    monkeypatch.setattr(isolation, "WORKER", (sys.executable, "-c", script))
    pair = [contender("good"), contender("broken")]
    samples = [sample for i in range(3) for sample in measurement.measure(pair, SETTINGS, range(8), i)]
    assert [(s.contender, s.repetition, s.position) for s in samples[:4]] == [
        ("good", 0, 0),
        ("broken", 0, 1),
        ("broken", 1, 0),
        ("good", 1, 1),
    ]
    assert [s.outcome for s in samples if s.contender == "broken"] == [Outcome.CRASH] * 3
    assert all("SIGABRT" in s.detail for s in samples if s.contender == "broken")
    assert all(s.timing.decode_tps() == pytest.approx(100) for s in samples if s.contender == "good")


def contender(name):
    opening = Opening(runner="pte", path=f"/{name}.pte", tokenizer="", context=256, threads=1)
    return contenders.Contender(entry(name, ours=True), opening)


@pytest.fixture
def run(tmp_path):
    """A stored run: ours twice as fast as stock, a third contender that always dies. Read back from its file."""
    benchmark = stored_run()
    record.append(benchmark, tmp_path / "results.jsonl")
    return Benchmark.model_validate_json((tmp_path / "results.jsonl").read_text())


def test_the_tables_show_medians_spreads_ratios_and_the_dead(run):
    header, ours, _, dead = tables.measured(run)
    cells = dict(zip(header, ours, strict=True))
    assert cells["decode 16 tok/s"] == "100.0 (84.0–116.0)"
    assert (cells["MB"], cells["load s"], cells["TTFT 4 ms"]) == ("90.0", "0.10 (0.10–0.10)", "4 (4–4)")
    assert (cells["KL to fp32"], cells["top-1"]) == ("0.125", "75.0%")
    assert dead[3:] == (NONE,) * (len(header) - 3)
    header, pair, none = tables.compared(run)
    cells = dict(zip(header, pair, strict=True))
    assert (cells["decode"], cells["so decode is"], cells["size"]) == ("2.00 (2.00–2.00)", "faster", "0.90")
    assert cells["decode, fastest pass"] == "2.00"
    assert none[2:5] == (NONE, NONE, NONE)


def test_the_page_states_its_conditions(run):
    text = publish.page(run, {"a.svg": "a figure"})
    for words in (
        "python -m runtime_tests.bench tiny --write",
        "0123456789ab",
        "2026-01-02",
        run.environment.cpu,
        "1.50 after",
        "2.00 (2.00–2.00)",
        "did not run: dead, repetition 1: crash: died by SIGSEGV",
        "not in the run: llama.cpp: not installed",
        "python -m stock --option 1",
        "exporter 1.2.3",
        "| stock exporter | 721 | 2.9 | 1.0 |",
        "65 positions",
        "![a figure](a.svg)",
        "10.0–40.0 GB/s",
    ):
        assert words in text
    assert "{" not in text
    assert "\n\n\n" not in text


def test_a_difference_in_columns_is_none(run):
    lines = markdown(tables.measured(run)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(plain(tables.measured(run))) == 4


def test_wrong_options_are_refused_in_one_line():
    with pytest.raises(ExportError, match="unknown nobody; known: pte,"):
        cli.chosen("pte,nobody")
    with pytest.raises(ExportError, match="lengths like 42,512"):
        cli.lengths("42,many")
    with pytest.raises(ExportError, match="do not fit a context of 256"):
        measurement.prompt_tokens([1], SETTINGS.model_copy(update={"prompts": (250,)}))
    assert cli.lengths("512,42") == (42, 512)
    assert len(measurement.prompt_tokens([1, 2, 3], SETTINGS)) == 128


# stock artifacts


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The tiny model as ONNX."""
    return exported("onnx-cpu", tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def pte(tmp_path_factory):
    """The tiny model as .pte."""
    pytest.importorskip("executorch")
    return exported("executorch-xnnpack", tmp_path_factory.mktemp("pte"))


def exported(target, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CACHE", folder / "cache")
        described = pipeline.export(load_plan("tiny", "int4-g32", target), None, folder / "tiny")
    return folder / "tiny", described


def test_a_stock_artifact_is_made_once_and_a_failure_says_why(artifact, tmp_path, monkeypatch):
    folder, _ = artifact
    monkeypatch.setattr(exports, "ROOT", tmp_path)
    (tmp_path / "input").write_text("content")
    known = {
        "zip": exports.Recipe("zip", "zipfile", ("-c", "{out}/model.zip", "input"), (), ("torch",)),
        "bad": exports.Recipe("bad", "zipfile", ("-t", "{out}/none.zip"), (), ("torch",)),
        "absent": exports.Recipe("absent", "no_such_package.export", (), (), ("no-such-package",)),
    }
    monkeypatch.setattr(exports, "RECIPES", known)
    made = exports.make("zip", folder, None)
    assert (tmp_path / made.folder / "model.zip").is_file()
    assert made.seconds > 0
    assert made.peak_rss_bytes > 2**20
    assert made.command == f"python -m zipfile -c {made.folder}/model.zip input"
    assert exports.make("zip", folder, None) == made
    with pytest.raises(exports.NotMadeError, match=r"exit 1: .*none\.zip"):
        exports.make("bad", folder, None)
    with pytest.raises(exports.NotMadeError, match="not installed: pip install no-such-package"):
        exports.make("absent", folder, None)
    assert [path.name for path in (tmp_path / "build/bench/stock").glob("tiny-*") if path.is_dir()] == [
        Path(made.folder).name
    ]


def test_every_option_of_a_stock_command_is_filled_in(artifact):
    _, described = artifact
    values = exports.values_of(described) | {
        "meta": "M",
        "huggingface": "H",
        "gguf": "G",
        "ours": "o",
        "source": "",
    }
    for recipe in exports.RECIPES.values():
        command = exports.command(recipe, values, Path("out"))
        assert not any("{o" in argument or argument == "" for argument in command)
    assert "export.max_context_length=256" in exports.command(exports.RECIPES["export_llm"], values, Path("out"))
    fp32 = described.plan.model_copy(update={"quant": load_plan("tiny", "fp32", "onnx-cpu").quant})
    with pytest.raises(ExportError, match="int4 groupwise"):
        exports.values_of(described.model_copy(update={"plan": fp32}))


# runtimes


def test_both_onnx_runtimes_step_the_same_model(artifact):
    pytest.importorskip("onnxruntime_genai")
    step_alike(*(opening(name, artifact[0]) for name in ("genai", "session")))


def test_a_pte_is_stepped_by_what_the_file_says_of_itself(pte):
    step_alike(opening("pte", pte[0] / "model.pte"), opening("session", pte[0]))


def test_accuracy_is_that_of_the_file_and_a_wrong_one_is_a_row(artifact, in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(fidelity, "ROOT", tmp_path)
    (tmp_path / fidelity.BENCH).mkdir(parents=True)
    folder = artifact[0]
    pair = {"session": opening("session", folder), "gone": opening("session", folder / "nowhere")}
    good, gone = fidelity.judge(pair, folder, None, fidelity.windows(folder, "default"))
    assert good.outcome is Outcome.PASS
    assert good.positions == 8 * 65
    assert 0 < good.mean_kl < 0.5
    assert gone.outcome is Outcome.RUN_FAIL
    assert "manifest.json: missing" in gone.detail


def test_executorchs_own_runner_reports_its_passes(pte):
    runner = runners.module("llm_runner").open_runner(opening("llm_runner", pte[0] / "model.pte", pte[0]))
    assert runner.prompt(range(60, 80)).tokens == 20
    assert 0 < runner.generate(range(60, 80), 5).tokens <= 5
    with pytest.raises(ValueError, match="text only"):
        runner.logits([1], 1)


def opening(runner, path, folder=None):
    tokenizer = str(folder / "tokenizer.json") if folder else ""
    return Opening(runner=runner, path=str(path), tokenizer=tokenizer, context=256, threads=1)


def step_alike(*openings):
    """The same logits after the prefill and after each further token, and passes of the lengths asked for."""
    tokens, logits = list(range(3, 30)), []
    for opened in openings:
        runner = runners.module(opened.runner).open_runner(opened)
        assert runner.prompt(tokens).tokens == len(tokens)
        assert runner.generate(tokens, 5).tokens == 5
        logits.append(runner.logits(tokens, 20))
    assert logits[0].shape == (8, 512)
    np.testing.assert_allclose(*logits, atol=1e-4)
