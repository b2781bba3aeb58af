"""Results of the harness read back: who is compared with whom, what retention means, what is shown."""

import json

import pytest

from export import card, manifest
from export.errors import ExportError, explain
from runtime_tests.reports import publication
from runtime_tests.tasks import results, tables
from tests.reports.test_html import Balance

MMLU = {f"mmlu_llama_subject{i}": 0.2 + 0.01 * i for i in range(57)}


def write(build, model, scores, *, questions=300, of=300, date=1.0, chat="template", stderr=0.02, groups=None, **facts):
    """A results file as the harness writes it; `scores`: task → value of exact_match,strict_match."""
    groups = groups or {}
    facts = {
        "base": "tiny",
        "checkpoint": "c",
        "context_length": 256,
        "target": "onnx-cpu",
        "manifest_sha256": "m",
    } | facts
    numbers = {
        task: {"alias": task, "sample_len": questions, "exact_match,strict_match": value,
               "exact_match_stderr,strict_match": stderr}
        for task, value in scores.items()
    }  # fmt: skip
    single = [task for task in scores if task not in groups]
    content = {
        "results": numbers,
        "group_subtasks": groups | {task: [] for task in single},
        "n-samples": {task: {"original": of, "effective": questions} for task in single},
        "higher_is_better": {task: {"exact_match": True} for task in single},
        "config": {"model_args": {"pretrained": model, "commit": "abc", **facts},
                   "truncated_requests": {"generate_until": 3}},
        "date": date, "chat_template": chat, "lm_eval_version": "0.4.13",
    }  # fmt: skip
    path = build / "tasks" / model / f"results_{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def reference(build, scores, **options):
    return write(build, "tiny_fp32_eager", scores, target="eager", manifest_sha256=None, **options)


def only(build):
    (artifact,) = results.compare(results.read_all(build))
    return artifact


def strict(task):
    return task, "exact_match", "strict_match"


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_read_with_their_errors_and_counts(tmp_path):
    path = write(tmp_path, "a", {"one": 0.5, "two": 0.25, "both": 0.375}, groups={"both": ["one", "two"]}, questions=20)
    content = results.read(path)
    assert content.scores[strict("one")] == results.Score(0.5, 0.02, True, 20, 300)
    assert content.scores[strict("both")].questions == 40
    assert (content.model, content.chat, content.harness, content.truncated) == ("a", True, "0.4.13", 3)
    assert content.members == {"both": ("one", "two")}


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:100], lambda text: "[]", lambda text: text.replace("pretrained", "x"), lambda text: ""],
)
def test_what_is_no_results_file_is_named(tmp_path, damage):
    path = write(tmp_path, "a", {"one": 0.5})
    path.write_text(damage(path.read_text()))
    with pytest.raises(ExportError, match=rf"{path.name}: not a results file of `--tasks`.*remove it"):
        results.read_all(tmp_path)


def test_a_file_without_error_or_direction_is_taken_as_it_is(tmp_path):
    path = write(tmp_path, "a", {"one": 24.5}, stderr="N/A", questions=1, of=1)
    content = json.loads(path.read_text())
    content["higher_is_better"]["one"]["exact_match"] = False
    path.write_text(json.dumps(content))
    score = results.read(path).scores[strict("one")]
    assert (score.stderr, score.higher_is_better) == (None, False)


# ── comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "of", "better", "left"), [(0.4, 0.5, True, 0.8), (25.0, 20.0, False, 0.8), (0.1, 0.0, True, None)]
)
def test_retention_is_the_share_that_is_left(value, of, better, left):
    score, whole = (results.Score(number, None, better, 1, 1) for number in (value, of))
    assert results.retention(score, whole) == (pytest.approx(left) if left else None)


def test_an_artifact_is_compared_on_the_same_questions_asked_the_same_way(tmp_path):
    write(tmp_path, "a", {"one": 0.4})
    for change in ({"questions": 20}, {"chat": None}, {"checkpoint": "another"}, {"context_length": 512}):
        reference(tmp_path, {"one": 0.9}, date=2.0, **change)
        assert only(tmp_path).references == {}
    reference(tmp_path, {"one": 0.5}, date=0.5)
    assert only(tmp_path).references[strict("one")].value == 0.5
    assert tables.cells(only(tmp_path), strict("one")) == ("300", "0.5000 ± 0.0200", "0.4000 ± 0.0200", "80.0%")


def test_a_short_run_does_not_replace_a_long_one_and_a_new_build_does(tmp_path):
    write(tmp_path, "a", {"one": 0.4})
    write(tmp_path, "a", {"one": 0.9, "two": 0.3}, questions=5, date=2.0)
    assert {name[0]: score.value for name, score in only(tmp_path).scores.items()} == {"one": 0.4, "two": 0.3}
    assert tables.cells(only(tmp_path), strict("two"))[0] == "5 of 300"
    write(tmp_path, "a", {"one": 0.1}, questions=5, date=3.0, manifest_sha256="another build")
    assert [score.value for score in only(tmp_path).scores.values()] == [0.1]


def test_a_reference_alone_is_no_artifact(tmp_path):
    reference(tmp_path, {"one": 0.5})
    assert results.compare(results.read_all(tmp_path)) == []


# ── published scores ────────────────────────────────────────────────────────────────────────────────────────────────


def llama_rows(build):
    known = results.published("llama32-1b-instruct")
    artifacts = results.compare(results.read_all(build))
    return {
        row[0]: row[1:]
        for row in tables.published_rows(known, "llama32-1b-instruct", artifacts[0] if artifacts else None)
    }


def test_rows_that_were_not_measured_say_so(tmp_path):
    rows = llama_rows(tmp_path)
    assert len(rows) == 17
    for setting, published, *measured, note in rows.values():
        assert setting
        assert float(published) > 0
        assert measured == ["–", "–", "–"]
        assert note.startswith("not measured: ")
    assert rows["GSM8K (CoT)"][1] == "44.4"
    assert "--tasks gsm8k_llama" in rows["GSM8K (CoT)"][-1]
    assert "not a task of lm-evaluation-harness" in rows["BFCL V2"][-1]


def test_rows_fill_in_from_results(tmp_path):
    llama = {"base": "llama32-1b-instruct"}
    write(tmp_path, "l", {"local_gsm8k": 0.4, **MMLU}, **llama)
    reference(tmp_path, {"local_gsm8k": 0.44, **MMLU}, **llama)
    rows = llama_rows(tmp_path)
    assert rows["GSM8K (CoT)"][1:5] == ("44.4", "44.0 ± 2.0", "40.0 ± 2.0", "90.9%")
    assert rows["GSM8K (CoT)"][5].startswith("local_gsm8k, questions: 300. Meta's prompt on the first 300 of 1,319")
    assert rows["MMLU"][2:5] == ("48.0 ± 0.3", "48.0 ± 0.3", "100.0%")
    assert rows["ARC-C"][2] == "–"
    write(tmp_path, "l", {"gsm8k_llama": 0.43}, date=2.0, **llama)
    rows = llama_rows(tmp_path)
    assert rows["GSM8K (CoT)"][2:5] == ("–", "43.0 ± 2.0", "–")  # another way than the reference was measured by
    assert rows["GSM8K (CoT)"][5].startswith("gsm8k_llama")


def test_a_mean_needs_every_task(tmp_path):
    write(tmp_path, "l", dict(list(MMLU.items())[1:]), base="llama32-1b-instruct")
    assert llama_rows(tmp_path)["MMLU"][-1].startswith("not measured")


def test_a_group_is_no_task_of_a_mean(tmp_path):
    grouped = {"mmlu_llama_stem": list(MMLU)[:20]}
    write(tmp_path, "l", MMLU | {"mmlu_llama_stem": 0.99}, groups=grouped, base="llama32-1b-instruct")
    assert llama_rows(tmp_path)["MMLU"][3] == "48.0 ± 0.3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"published": [1.0]}, "1 scores for 2 models"),
        ({"ways": []}, "give either ways or a note"),
        ({"mood": "good"}, "mood: unknown key"),
    ],
)
def test_published_scores_are_read_strictly(change, words):
    row = {"benchmark": "b", "setting": "s", "published": [1.0, 2.0], "ways": [
        {"run": "r", "tasks": ["t"], "count": 1, "metrics": ["acc,none"], "note": ""}]}  # fmt: skip
    fields = {"name": "n", "source": "s", "models": ["a", "b"], "rows": [row | change]}
    with pytest.raises(ValueError, match=r".*") as caught:
        results.Published.model_validate(fields)
    assert words in explain(caught.value)


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_holds_scores_and_loads_nothing(tmp_path):
    write(tmp_path, "smol", {"one": 0.4, "<b>": 0.1})
    write(tmp_path, "l", {"local_gsm8k": 0.4}, base="llama32-1b-instruct", checkpoint="d")
    reference(tmp_path, {"one": 0.5, "<b>": 0.1})
    text = tables.write(results.compare(results.read_all(tmp_path)), tmp_path).read_text()
    parser = Balance()
    parser.feed(text)
    assert (parser.open, parser.fetched) == ([], [])
    for words in (
        "0.4000 ± 0.0200",
        "80.0%",
        "&lt;b&gt;",
        "59.4",
        "not measured: --tasks",
        "3 prompts cut on the left",
    ):
        assert words in text
    assert "<b>" not in text
    assert text.count("Beside the published scores") == 1


def test_the_terminal_shows_scores_and_cut_prompts(tmp_path, capsys):
    write(tmp_path, "smol", {"one": 0.4})
    tables.show(only(tmp_path))
    out = capsys.readouterr().out
    assert "smol" in out
    assert "one   exact_match (strict_match)" in out
    assert "3 prompts were longer than the context" in out


def test_the_card_holds_tasks_and_groups_of_this_build_only(tmp_path, artifact, capsys):
    described, sha256 = manifest.read(artifact), manifest.digest(artifact)
    numbers = {"one": 0.4, "two": 0.2, "both": 0.3, "three": 0.7}
    write(
        tmp_path,
        described.id,
        numbers,
        groups={"both": ["one", "two"], "all": ["both", "three"]},
        manifest_sha256=sha256,
    )
    publication.keep_tasks(tmp_path, [(artifact, described)])
    text = (artifact / "README.md").read_text()
    assert "| both exact_match (strict_match) | 0.3000 ± 0.0200 | fp32 –, retention –, questions: 600 |" in text
    assert "| three exact_match" in text
    assert "| one exact_match" not in text
    assert "| verdict | not validated | tasks only |" in text
    assert publication.task_rows(tmp_path, "another build") == []
    (tmp_path / "tasks" / "x").mkdir()
    (tmp_path / "tasks" / "x" / "results_1.json").write_text("{}")
    assert publication.task_rows(tmp_path, sha256) == []
    assert "no task scores in the card" in capsys.readouterr().err
    assert "Not validated yet" in card.render(described, [])
