"""Records and baselines made by chance: what can be read can be shown, the rest is left out or one line."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import card, manifest
from export.errors import ExportError
from export.toolbox import difference, evidence
from runtime_tests.evidence import baseline, record, regression
from runtime_tests.reports import ci, html, publication, readme, summary
from tests.support.fuzz import count, fuzzed, json_like, only
from tests.support.records import sample_record

pytestmark = pytest.mark.fuzz


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baseline, "FOLDER", tmp_path / "baselines")
    return shutil.copytree(built, tmp_path / "artifact")


@pytest.mark.hostile("record", "records and baselines made by chance", "shown, left out, or one line")
def test_records(folder, tmp_path, record_property):
    path, described, refused = tmp_path / "records.jsonl", manifest.read(folder), []
    good = json.loads(sample_record(manifest_sha256=manifest.digest(folder)).model_dump_json())

    def show(lines):
        path.write_bytes(lines)
        judged = baseline.judge(folder, path, "host")
        ci.write([judged], tmp_path / "junit.xml")
        assert ci.render([judged])
        difference.compare(folder, folder, [path])
        for run in record.newest_run(path, "host"):
            assert summary.row(run)
            summary.problems(run)
            card.render(described, publication.measured_rows(run))
            html.render([run], [described])
            readme.block([run])
            baseline.keep([run], "host")

    show(json.dumps(good).encode())
    shutil.rmtree(baseline.FOLDER)

    @fuzzed
    @given(st.lists(json_like(good), max_size=3).map(b"\n".join))
    def check(lines):
        refused.append(only(ExportError, show, lines))

    check()
    count(refused, record_property)


@pytest.mark.hostile("record", "records and baselines made by chance", "shown, left out, or one line")
def test_a_baseline(folder, tmp_path, record_property):
    refused, run = [], sample_record(manifest_sha256=manifest.digest(folder))
    record.append(run, tmp_path / "records.jsonl")
    ((path, _),) = baseline.keep([run], "host")
    good = json.loads(path.read_bytes())

    def show(data):
        path.write_bytes(data)
        assert ci.render([baseline.judge(folder, tmp_path / "records.jsonl", "host")])

    show(path.read_bytes())

    @fuzzed
    @given(json_like(good))
    def check(data):
        refused.append(only(ExportError, show, data))

    check()
    count(refused, record_property)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c", "\r"])
def test_a_line_separator_in_a_text_does_not_end_a_record(tmp_path, separator):
    run = sample_record(detail=f"a{separator}b")
    record.append(run, tmp_path / "records.jsonl")
    assert record.newest_of(tmp_path / "records.jsonl", device="host") == run
    assert len(list(evidence.lines(tmp_path / "records.jsonl"))) == 1


def test_timings_are_prompts_then_generation(tmp_path):
    fields = json.loads(sample_record().model_dump_json())
    for tests in ([], fields["latency"]["tests"][:1], fields["latency"]["tests"][::-1]):
        fields["latency"]["tests"] = tests
        (tmp_path / "records.jsonl").write_text(json.dumps(fields))
        with pytest.raises(ExportError, match=r"line 1: not a record of this version: .*prompts, then generation"):
            record.newest_run(tmp_path / "records.jsonl", "host")


def test_a_baseline_of_other_windows_is_one_line():
    run = sample_record()
    before = baseline.reached(run).model_copy(update={"kl_by_window": (0.1,)})
    with pytest.raises(ExportError, match=r"has 1 windows, this one 2: remove the baseline, then `make baseline`"):
        regression.shipped(run.size_bytes, run.accuracy.total, before)
