"""Tasks that need no network, against lm-evaluation-harness's own; names and data sets that cannot be had."""

import json
import os

import huggingface_hub
import jinja2
import pytest
import yaml

from export import manifest
from export.errors import ExportError
from export.plan import CONFIGS, QuantRecipe, load_named
from runtime_tests.checks import files
from runtime_tests.tasks import catalog, results

pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

LANGUAGES = ("en", "de", "es", "fr", "th")
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The paths in the tasks start at the root; settings of one test do not reach the next."""
    monkeypatch.chdir(manifest.ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, when it was imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    catalog.hub_trouble.cache_clear()
    yield
    catalog.hub_trouble.cache_clear()


@pytest.fixture(scope="module")
def index():
    """Every task that lm-eval knows."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


@pytest.fixture(scope="module")
def loaded():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(manifest.ROOT)
        patch.setenv("HF_HUB_OFFLINE", "1")
        return catalog.load(["offline"])


def ask(config, document):
    """The prompt of a configuration for a document; lm-eval renders both with jinja."""
    return jinja2.Environment(keep_trailing_newline=True).from_string(config["doc_to_text"]).render(**document)


def test_data_is_cached_where_results_may_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", "the user's, for tasks of the hub")
    monkeypatch.setattr("export.host.disk.cache_folder", lambda preferred: tmp_path)
    catalog.manager(["local_gsm8k"])
    assert os.environ["HF_DATASETS_CACHE"] == str(tmp_path / "datasets")
    assert not [path for path in catalog.TASKS.rglob("*.yaml") if "cache_dir" in path.read_text()]


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_is_a_task_or_group_of_its_name(loaded):
    for path in catalog.TASKS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace("!function ", "")
        config = yaml.safe_load(text)
        assert path.stem in (config.get("task"), config.get("group"))
    groups = {name for name in catalog.local() if f"{name}_en" in catalog.local()} | {"offline"}
    assert set(loaded) == set(catalog.local()) - groups


def test_no_name_is_one_of_the_harness(index):
    assert not set(catalog.local()) & set(index)


def test_questions_are_as_many_as_the_readme_says(loaded):
    counts = {name: len(task.eval_docs) for name, task in loaded.items()}
    assert counts.pop("local_wikitext") == 7
    assert counts.pop("local_gsm8k") == 300
    assert {counts.pop(f"local_mgsm_{language}") for language in LANGUAGES} == {125}
    assert set(counts.values()) == {1}
    assert len(counts) == 8


def test_gsm8k_asks_what_the_harness_asks(loaded, index):
    ours, theirs = loaded["local_gsm8k"].config, index["gsm8k_llama"].cfg
    for key in ("doc_to_text", "doc_to_target", "num_fewshot"):
        assert getattr(ours, key) == theirs[key], key
    assert ours.fewshot_config.samples == theirs["fewshot_config"]["samples"]
    assert filters(ours.filter_list) == filters(theirs["filter_list"])
    assert ours.metric_list == theirs["metric_list"]
    assert ours.generation_kwargs | {"max_gen_toks": 1024} == theirs["generation_kwargs"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_mgsm_asks_what_the_harness_asks(loaded, index, language):
    task = loaded[f"local_mgsm_{language}"]
    ours, theirs = task.config, index[f"mgsm_native_cot_{language}"].cfg
    document = dict(task.eval_docs[0])
    assert ask({"doc_to_text": ours.doc_to_text}, document) == ask(theirs, document | {"answer": None})
    assert task.doc_to_target(document) == str(document["answer_number"])
    assert filters(ours.filter_list) == filters(theirs["filter_list"])
    assert ours.metric_list == theirs["metric_list"]
    assert ours.generation_kwargs["until"] == theirs["generation_kwargs"]["until"]
    assert ours.target_delimiter == theirs["target_delimiter"]


def filters(listed):
    return [(chain["name"], [dict(step) for step in chain["filter"]]) for chain in listed]


def test_wikitext_is_scored_as_the_harness_scores_it(loaded):
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    task = loaded["local_wikitext"]
    for document in task.eval_docs:
        assert document["page"].startswith(" = ")
        assert task.doc_to_target(document) == wikitext_detokenizer(document)
        assert task.process_results(document, (-10.0,)) == process_results(document, (-10.0,))


def test_udhr_is_the_whole_text_of_the_evaluation(loaded):
    for language in ("en", "de", "fr", "it", "pt", "hi", "es", "th"):
        (document,) = loaded[f"local_udhr_{language}"].eval_docs
        text = (CONFIGS / "evals" / "text" / "udhr" / f"{language}.txt").read_text(encoding="utf-8")
        assert document["text"] == text
        assert loaded[f"local_udhr_{language}"].doc_to_target(document) == text.rstrip("\n") + "\n" * text.endswith(
            "\n"
        )


# ── text that was calibrated on ─────────────────────────────────────────────────────────────────────────────────────


def test_no_recipe_calibrates_on_a_question(loaded):
    recipes = [load_named(QuantRecipe, "quant", path.stem) for path in (CONFIGS / "quant").glob("*.yaml")]
    assert any(recipe.calibration for recipe in recipes)
    catalog.refuse_calibrated({name: task.eval_docs for name, task in loaded.items()}, recipes)


def test_a_question_that_was_calibrated_on_is_refused():
    recipe = load_named(QuantRecipe, "quant", "int4-g32-gptq")
    text = (CONFIGS / "calibration" / "maths.txt").read_text(encoding="utf-8")
    questions = {"mine": [{"question": "Something else", "answer": 3}, {"question": text[1000:1400]}]}
    with pytest.raises(
        ExportError, match=r"task mine holds text that the recipe 'int4-g32-gptq' calibrated on, in maths"
    ):
        catalog.refuse_calibrated(questions, [load_named(QuantRecipe, "quant", "fp32"), recipe])
    questions["mine"][1]["question"] = text[1000 : 1000 + files.LENGTH]
    catalog.refuse_calibrated(questions, [recipe])


# ── names and networks ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_index(monkeypatch, tmp_path):
    """A few tasks of the harness instead of its fourteen thousand."""
    from lm_eval.tasks import manager

    harness = tmp_path / "harness"
    harness.mkdir()
    hub = {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "q"}
    write = lambda name, **config: (harness / f"{name}.yaml").write_text(yaml.safe_dump(config))  # noqa: E731
    write("swag", task="swag", dataset_path="nobody/swag", **hub)
    write("swag_two", task="swag_two", dataset_path="nobody/swag2", tag="swags", **hub)
    write("pair", group="pair", task=["swag", "swag_two"])
    write("broken", task="broken", dataset_path="json", dataset_kwargs={"data_files": "missing.json"}, **hub)
    real = manager.TaskIndex.build

    def build(index, paths, **options):
        return real([harness if str(path).endswith("lm_eval/tasks") else path for path in paths], **options)

    monkeypatch.setattr(manager.TaskIndex, "build", build)
    return harness


@pytest.mark.parametrize(("name", "data_set"), [("swag", "swag"), ("pair", "swag"), ("swags", "swag2")])
def test_a_hub_task_without_a_network_names_its_data_set_and_what_else_to_run(small_index, monkeypatch, name, data_set):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    with pytest.raises(ExportError) as caught:
        catalog.load([name])
    text = str(caught.value)
    assert text.startswith(
        f"task {name} needs the hub data set nobody/{data_set}, which cannot be reached: {UNREACHABLE}"
    )
    assert text.endswith("tasks that need no network: local_gsm8k, local_mgsm, local_udhr, local_wikitext, offline")
    assert "\n" not in text


def test_a_hub_that_must_not_be_asked_is_not(small_index):
    with pytest.raises(ExportError, match="cannot be reached: HF_HUB_OFFLINE is set"):
        catalog.load(["swag"])


def test_a_hub_that_answers_is_left_to_the_harness(monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*arguments, **options):
        raise urllib.error.HTTPError("https://hub", 405, "no HEAD here", {}, None)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert catalog.hub_trouble() == ""


def test_an_unknown_name_lists_near_ones(small_index):
    with pytest.raises(
        ExportError, match=r"no task is named 'swagg'; near names: .*swag.*; tasks that need no network"
    ):
        catalog.load(["swagg"])
    with pytest.raises(ExportError, match=r"no task is named 'local_gsm8'; near names: local_gsm8k"):
        catalog.load(["local_gsm8"])


def test_a_task_that_does_not_load_says_why(small_index):
    with pytest.raises(ExportError, match=r"task broken cannot be loaded \(data set json\): FileNotFoundError"):
        catalog.load(["broken"])


def test_a_task_given_twice_is_refused():
    with pytest.raises(ExportError, match="task local_udhr_de is given twice"):
        catalog.load(["local_udhr", "local_udhr_de"])


# ── published scores ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_way_to_a_published_score_is_a_task_with_that_metric(index, loaded):
    from fnmatch import fnmatchcase

    known = results.published("llama32-1b-instruct")
    assert known == results.published("llama32-3b-instruct")
    single = {name: entry.cfg for name, entry in index.items() if entry.cfg and isinstance(entry.cfg.get("task"), str)}
    single |= {name: task.config.to_dict() for name, task in loaded.items()}
    for way in (way for row in known.rows for way in row.ways):
        assert all(name in index or name in catalog.local() for name in way.run.split(",")), way.run
        tasks = [name for name in single if any(fnmatchcase(name, pattern) for pattern in way.tasks)]
        assert len(tasks) == way.count, (way.run, tasks)
        for text in way.metrics:
            metric, _, filter_name = text.partition(",")
            for config in (single[name] for name in tasks):
                assert metric in {entry["metric"] for entry in config["metric_list"]}, (way.run, text)
                names = {entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]}
                assert filter_name in names, (way.run, text)


def test_gsm8k_rows_are_not_those_that_were_calibrated_on():
    """Rows 301 to 400 are calibration text."""
    lines = (CONFIGS / "tasks" / "data" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    questions = {json.loads(line)["question"] for line in lines}
    calibrated = (CONFIGS / "calibration" / "maths.txt").read_text(encoding="utf-8")
    assert len(questions) == 300
    assert not [question for question in questions if question in calibrated]
