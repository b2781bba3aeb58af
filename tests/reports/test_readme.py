"""`make readme` shows the main job of the page at this commit, or says in a line why it cannot."""

import re

import pytest

from export.errors import ExportError
from export.manifest import ROOT
from runtime_tests.evidence import record
from runtime_tests.reports import readme
from tests.support.records import sample_record

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED = readme._NAMED.findall(TEXT)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes the page from records of these artifacts; its table's first column."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readme.manifest, "source_info", lambda: SourceInfo)
    (tmp_path / "README.md").write_text(TEXT)
    readme._RECORDS.parent.mkdir(parents=True)

    def write(artifacts, **changes):
        for artifact in artifacts:
            record.append(sample_record(artifact=artifact, **changes), readme._RECORDS)
        readme.main()
        return re.findall(r"^\| `([\w.-]+)` \| 1\.0 MB", (tmp_path / "README.md").read_text(), re.MULTILINE)

    return write


class SourceInfo:
    commit = "c" * 40


def test_the_page_names_the_three_artifacts_of_make():
    makefile = (ROOT / "Makefile").read_text()
    (model,), (recipe,) = (re.findall(rf"^{name} +\?= (\S+)$", makefile, re.MULTILINE) for name in ("MODEL", "QUANT"))
    targets = (path.stem for path in (ROOT / "configs/targets").glob("*.yaml"))
    assert sorted(NAMED) == sorted(f"{model}_{recipe}_{target}" for target in targets)


def test_the_main_job_at_this_commit_is_shown(page):
    assert page(NAMED) == NAMED


@pytest.mark.parametrize(
    ("artifacts", "changes", "line"),
    [
        ([], {}, "no records"),
        (["tiny_int4-g32_onnx-cpu"], {}, "the last run is of tiny_int4-g32_onnx-cpu"),
        (NAMED[:2], {}, f"the last run is of {', '.join(NAMED[:2])}"),
        (NAMED, {"commit": "d" * 40}, "the last run is of commit dddddddddddd"),
        (NAMED, {"dirty": True}, "the last run is of commit cccccccccccc with local changes"),
        (NAMED, {"accuracy": sample_record().accuracy.model_copy(update={"evaluation": "languages"})},
         "the last run is of --eval languages"),
    ],
)  # fmt: skip
def test_another_run_is_never_shown(page, tmp_path, artifacts, changes, line):
    with pytest.raises(ExportError) as refusal:
        page(artifacts, **changes)
    assert str(refusal.value) == (
        f"build/records/records.jsonl: {line}; README.md shows {', '.join(NAMED)} at commit cccccccccccc: run `make`, "
        "of a clean checkout and without variables, first"
    )
    assert (tmp_path / "README.md").read_text() == TEXT
