"""`python -m runtime_tests --tasks`: the results file, the reference beside it, how it ends when something fails."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from export import manifest
from runtime_tests.tasks import catalog, results
from tests.support.artifacts import reseal, set_fault

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CHOICES = [
    {"question": "The cat sat on the", "choices": ["mat", "moon"], "answer": 0},
    {"question": "Two and two are", "choices": ["four", "five", "six"], "answer": 0},
    {"question": "Grüße aus", "choices": ["Köln", "the"], "answer": 1},
]
TASKS = {
    "my_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "my_answer": {
        "output_type": "generate_until", "doc_to_text": "{{question}}?", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "my_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}  # fmt: skip


@pytest.fixture
def tasks(monkeypatch, tmp_path):
    """Three small tasks, one of each kind, instead of the project's own."""
    folder = tmp_path / "my tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in CHOICES))
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name, config in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **common, **config, "dataset_kwargs": kwargs})
        )
    monkeypatch.setattr(catalog, "TASKS", folder)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")  # takes seconds
    for name in ("HF_HUB_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    return ",".join(TASKS)


@pytest.fixture
def evaluate(command, in_process, tasks, capsys):
    """Runs the tasks in this process; gives exit code, output, and results by model."""

    def run(*arguments):
        code = command("--tasks", tasks, *arguments)
        return code, capsys.readouterr(), {result.model: result for result in results.read_all(Path("build"))}

    return run


@pytest.fixture
def no_harness_tasks(tasks, monkeypatch):
    """The harness' own tasks take seconds to list."""
    only_direct = staticmethod(lambda root: sorted(root.glob("*.yaml")))
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex._iter_yaml_files", only_direct)


@pytest.fixture
def described(artifact):
    return manifest.read(artifact)


def test_it_writes_what_the_harness_writes_and_shows_it(evaluate, artifact, described):
    code, printed, evaluated = evaluate(artifact)
    assert code == 0
    assert set(evaluated) == {described.id, "tiny_fp32_eager"}
    content = json.loads(evaluated[described.id].path.read_text())
    keys = {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "task_hashes"}
    assert set(content) >= keys | {"chat_template_sha", "lm_eval_version", "total_evaluation_time_seconds"}
    assert content["n-samples"]["my_choice"] == {"original": 3, "effective": 3}
    assert content["config"]["model_args"]["manifest_sha256"] == manifest.digest(artifact)
    samples = sorted(path.name.split("_2")[0] for path in evaluated[described.id].path.parent.glob("samples_*"))
    assert samples == [f"samples_{name}" for name in sorted(TASKS)]
    for words in ("questions for each model: 9, of 3 tasks", "fp32", "artifact"):
        assert words in printed.err
    assert "my_choice  acc  " in printed.out
    assert "my_text" in Path("build/report/tasks.html").read_text()
    assert "| my_text byte_perplexity |" in (artifact / "README.md").read_text()
    assert not list(Path("build/tasks").rglob(".part-*"))


def test_an_artifact_scores_near_its_reference_and_a_wrong_one_does_not(evaluate, artifact, described):
    name = ("my_text", "byte_perplexity", "none")
    _, _, evaluated = evaluate(artifact)
    good, whole = evaluated[described.id].scores[name], evaluated["tiny_fp32_eager"].scores[name]
    set_fault(artifact, "swapped heads")
    _, _, evaluated = evaluate(artifact, "--no-reference")
    bad = evaluated[described.id].scores[name]
    assert abs(results.retention(good, whole) - 1) < 0.2
    assert bad.value != pytest.approx(good.value, rel=0.01)


def test_the_reference_is_evaluated_once_for_the_same_questions(evaluate, artifact, capsys):
    _, first, _ = evaluate(artifact, "--limit", "1")
    assert "earlier run" not in first.err
    _, second, _ = evaluate(artifact, "--limit", "1")
    assert "fp32: results of an earlier run" in second.err
    _, third, _ = evaluate(artifact, "--limit", "2")
    assert "earlier run" not in third.err
    _, fourth, evaluated = evaluate(artifact, "--limit", "2", "--no-chat")
    assert "earlier run" not in fourth.err
    assert evaluated["tiny_fp32_eager"].scores["my_choice", "acc", "none"].questions == 2


def test_the_chat_template_is_the_artifacts_own(evaluate, artifact, described):
    template = "{{ '<|begin|>' }}{% for m in messages %}[{{ m.role }}:{{ date_string }}] {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[answer]{% endif %}"
    (artifact / "chat_template.jinja").write_text(template)
    ids = described.tokenizer.model_copy(update={"chat_example": "a question"})
    reseal(artifact, tokenizer=ids)

    def prompt(*arguments):
        _, _, evaluated = evaluate(artifact, "--no-reference", "--limit", "1", *arguments)
        newest = max(evaluated[described.id].path.parent.glob("samples_my_answer_*"))
        return json.loads(newest.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"], evaluated[
            described.id
        ].chat

    assert prompt() == ("<|begin|>[user:26 Jul 2024] The cat sat on the?[answer]", True)
    assert prompt("--no-chat") == ("The cat sat on the?", False)


def test_a_model_that_fails_is_named_and_the_others_go_on(evaluate, artifact, tmp_path, described):
    broken = shutil.copytree(artifact, tmp_path / "broken")
    plan = described.plan.model_copy(update={"model": described.plan.model.model_copy(update={"name": "broken"})})
    reseal(broken, id=plan.id, plan=plan)
    set_fault(broken, "does not load")
    code, printed, evaluated = evaluate(broken, artifact, "--no-reference")
    assert code == 1
    assert f"{plan.id}: load fail: RuntimeError: the file is of a newer version" in printed.err
    assert set(evaluated) == {described.id}


def test_a_crash_is_an_outcome(command, artifact, capsys):
    """In a real child process, with a task of the project."""
    set_fault(artifact, "segfault")
    assert command("--tasks", "local_udhr_en", "--no-reference", artifact) == 1
    printed = capsys.readouterr()
    assert "crash: died by SIGSEGV" in printed.err
    assert "Traceback" not in printed.err
    assert not list(Path("build/tasks").rglob("results_*"))


# ── refused before any work ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_artifact_is_not_asked(evaluate, artifact):
    path = artifact / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    code, printed, evaluated = evaluate(artifact)
    assert (code, evaluated) == (1, {})
    assert "bytes, manifest.json says" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--limit", "3"), 2, "go with --tasks"),
        (("--no-chat",), 2, "go with --tasks"),
        (("--tasks", "my_text", "--eval", "default"), 2, "--eval chooses what validation feeds"),
        (("--tasks", "my_text", "--limit", "0"), 2, "greater than or equal to 1"),
        (("--tasks", " , "), 1, "no task is named"),
        (("--tasks", "my_test"), 1, "no task is named 'my_test'; near names: my_text"),
    ],
)
@pytest.mark.usefixtures("in_process", "no_harness_tasks")
def test_what_cannot_be_meant_ends_in_one_line(command, artifact, capsys, arguments, code, words):
    assert command(*arguments, artifact) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not Path("build/tasks").exists()


def test_without_the_harness_it_says_what_to_install(evaluate, artifact, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, printed, _ = evaluate(artifact)
    assert code == 1
    assert "--tasks needs lm-evaluation-harness; install it with `pip install -e '.[tasks]'`" in printed.err


def test_another_device_is_refused(evaluate, artifact, setting, monkeypatch):
    phone = setting.device.model_copy(
        update={"name": "phone", "transport": setting.device.transport.model_copy(update={"kind": "adb"})}
    )
    monkeypatch.setattr("devices.load", lambda name: phone)
    code, printed, _ = evaluate(artifact)
    assert code == 1
    assert "runs artifacts on this machine, not on phone" in printed.err


def test_a_task_that_is_refused_costs_no_evaluation(evaluate, artifact, tasks):
    path = catalog.TASKS / "my_answer.yaml"
    config = yaml.safe_load(path.read_text())
    config["generation_kwargs"]["max_gen_toks"] = 256
    path.write_text(yaml.safe_dump(config))
    code, printed, evaluated = evaluate(artifact)
    assert (code, evaluated) == (1, {})
    assert "error: task my_answer: 256 new tokens leave no room for a prompt in a context of 256" in printed.err
