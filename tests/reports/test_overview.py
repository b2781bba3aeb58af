"""The page over all artifacts, and links between reports."""

import json
import re
import shutil

import pytest

from export import manifest
from runtime_tests.evidence import record as records_file
from runtime_tests.evidence.record import Outcome
from runtime_tests.reports import overview, publication
from tests.support.records import sample_record


@pytest.fixture
def build(tmp_path, monkeypatch, built):
    """build/ in the working folder, with one artifact in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / "build" / "tiny_int4-g32_fake")
    return tmp_path / "build"


def run(build, *records):
    """Records of a run and its page."""
    described = manifest.read(build / "tiny_int4-g32_fake")
    (build / "reports" / records[0].run_id).mkdir(parents=True)
    for record in records:
        records_file.append(record, build / overview.RECORDS)
    publication.report(records, [described] * len(records), build)


def validated(build, folder="build/tiny_int4-g32_fake", **changes):
    """A record of the files that are in a folder now."""
    described = build.parent / folder
    digest = manifest.digest(described) if described.is_dir() else "ab" * 32
    return sample_record(manifest_sha256=digest, folder=folder, **changes)


def rows(build):
    """Cells of each row of artifacts, without tags."""
    page = (build / "reports/index.html").read_text()
    table = page.partition("<h2>Artifacts</h2>")[2].partition("<h2>Runs</h2>")[0]
    lines = [
        re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    return [
        [" ".join(re.sub("<(?!wbr)[^>]*>", " ", cell).replace("<wbr>", "").split()) for cell in line] for line in lines
    ]


def test_the_last_record_of_each_folder_and_device_is_a_row(build):
    run(build, validated(build, run_id="20260101-000000", outcome=Outcome.MISMATCH))
    run(build, validated(build, run_id="20260102-000000", started_at="2026-01-02T03:04:05+00:00"))
    run(build, validated(build, run_id="20260103-000000", device="pixel-8", outcome=Outcome.CRASH, latency=None))
    total = sample_record().accuracy.total
    numbers = [f"{total.mean_kl:.3f}", f"{total.top1:.1%}"]
    name = "tiny_int4-g32_fake build/tiny_int4-g32_fake"
    assert rows(build) == [
        [name, "pass", "host", "1.0", *numbers, "98.5", "2026-01-02 03:04", "20260102-000000"],
        [name, "crash", "pixel-8", "1.0", *numbers, "–", "2026-01-01 00:00", "20260103-000000"],
    ]


def test_two_folders_of_one_id_are_told_apart_by_path(build):
    shutil.copytree(build / "tiny_int4-g32_fake", build / "other")
    run(build, validated(build), validated(build, "build/other", outcome=Outcome.MISMATCH))
    assert [row[:2] for row in rows(build)] == [
        ["tiny_int4-g32_fake build/other", "mismatch"],
        ["tiny_int4-g32_fake build/tiny_int4-g32_fake", "pass"],
    ]
    page = (build / "report/index.html").read_text()
    assert "tiny_<wbr>int4-g32_<wbr>fake in build/<wbr>other" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: None, "pass"),
        (lambda folder: (folder / "manifest.json").write_bytes(b" " + (folder / "manifest.json").read_bytes()),
         "pass built again since: not validated"),
        (shutil.rmtree, "pass the folder is gone"),
    ],
)  # fmt: skip
def test_a_record_is_not_taken_for_files_that_changed(build, change, said):
    folder = build / "tiny_int4-g32_fake"
    record = validated(build)
    run(build, record)
    change(folder)
    known = overview.entries(build)
    (build / "reports/index.html").write_text(overview.render(build, known, overview.runs(build, known)))
    assert [row[1] for row in rows(build)] == [said]


def test_what_was_never_validated_is_a_row_too(build):
    shutil.copytree(build / "tiny_int4-g32_fake", build / "another")
    run(build, validated(build))
    assert rows(build)[0][:2] == ["tiny_int4-g32_fake build/another", "not validated"]


def test_records_of_older_versions_are_shown_with_what_they_tell(build):
    """Without a folder: found by its manifest, or unknown; what cannot be read at all is left out."""
    old = validated(build).model_dump(mode="json")
    del old["folder"], old["notes"]
    gone = old | {"manifest_sha256": "cd" * 32, "artifact": "elsewhere"}
    (build / "records").mkdir()
    (build / overview.RECORDS).write_text("\n".join([json.dumps(old), json.dumps(gone), "{}", "nonsense", ""]))
    run(build, validated(build, run_id="20260102-000000"))
    assert [row[:2] for row in rows(build)] == [
        ["elsewhere", "pass folder unknown"],
        ["tiny_int4-g32_fake build/tiny_int4-g32_fake", "pass"],
    ]


def test_every_page_links_the_reports_before_it(build):
    for day in (1, 2, 3):
        run(build, validated(build, run_id=f"2026010{day}-000000"))
    shutil.rmtree(build / "reports/20260101-000000")
    run(build, validated(build, run_id="20260104-000000"))
    for page, up in ((build / "report", ".."), (build / "reports/20260104-000000", "../..")):
        links = set(re.findall(r'href="([^#"]+)"', (page / "index.html").read_text()))
        earlier = {f"{up}/reports/2026010{day}-000000/index.html" for day in (2, 3)}
        assert links == {f"{up}/reports/index.html", f"{up}/reports/20260104-000000/records.jsonl"} | earlier
        assert all((page / link).is_file() for link in links if link.endswith(".html"))
    first = (build / "reports/20260102-000000/index.html").read_text()
    assert "20260103" not in first
    links = re.findall(r'href="([^"]+)"', (build / "reports/index.html").read_text())
    assert all((build / "reports" / link).is_file() for link in links)
    assert "its page is gone" in (build / "reports/index.html").read_text()
