"""Pages of several models: writing one leaves the others as they are, and pages are rendered from stored records."""

import json
import xml.etree.ElementTree as ET

import pytest

from export.errors import ExportError
from export.toolbox import charts
from runtime_tests.bench import publish, tables
from runtime_tests.bench.studies import detours, study
from tests.support.benchmarks import stored_run

SVG = "{http://www.w3.org/2000/svg}"


def test_a_second_models_page_leaves_the_first_as_it_is(tmp_path):
    publish.publish(stored_run("tiny"), tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.rglob("tiny*")}
    assert len(first) == 6  # record, page, four figures
    publish.publish(stored_run("small"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("tiny*")} == first
    index = (tmp_path / "benchmarks.md").read_text()
    assert index.index("## small, int4-g32") < index.index("## tiny, int4-g32")
    assert index.count("2.00 (2.00–2.00)") >= 2
    for name in ("small", "tiny"):
        assert f"(benchmarks/{name}_int4-g32.md)" in index
        assert f"(benchmarks/{name}_int4-g32-decode.svg)" in index


def test_every_link_of_a_page_is_a_file(tmp_path):
    written = publish.publish(stored_run(), tmp_path)
    assert all(path.is_file() for path in written)
    page = (tmp_path / "benchmarks" / "tiny_int4-g32.md").read_text()
    for path in written[:-1]:
        assert path.suffix == ".md" or f"({path.name})" in page
    assert "(../benchmarks.md)" in page
    assert not list(tmp_path.rglob("*.part"))


def test_pages_are_rendered_again_from_the_records(tmp_path, monkeypatch, capsys):
    publish.publish(stored_run(), tmp_path)
    page = tmp_path / "benchmarks" / "tiny_int4-g32.md"
    before = page.read_text()
    page.write_text("old words")
    monkeypatch.setattr(publish, "DOCS", tmp_path)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    publish.main()
    assert page.read_text() == before
    assert "benchmarks.md" in capsys.readouterr().out


def test_a_record_of_another_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "old.json").write_text('{"schema_version": 1}')
    with pytest.raises(ExportError, match=r"old\.json: of another version: .*; measure again with --write") as caught:
        publish.read(tmp_path / "old.json")
    assert "\n" not in str(caught.value)


def test_figures_show_who_ran_and_mark_ours():
    drawn = publish.draw(stored_run())
    assert sorted(drawn) == ["accuracy", "decode", "decode-far", "prefill"]
    for figure in drawn.values():
        root = ET.fromstring(figure.svg)
        assert root.tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in figure.svg
    shown = [node.text for node in ET.fromstring(drawn["decode"].svg).iter(f"{SVG}text")]
    assert "ours file" in shown
    assert "100 (84–116)" in shown
    assert "dead file" not in shown
    bars = {
        node.get("class"): float(node.get("width")) for node in ET.fromstring(drawn["decode"].svg).iter(f"{SVG}rect")
    }
    assert bars["ours"] == pytest.approx(2 * bars["stock"], rel=1e-3)


def test_without_logits_there_is_no_figure_of_accuracy():
    assert "accuracy" not in publish.draw(stored_run().model_copy(update={"fidelity": ()}))


def test_names_beside_points_do_not_overlap():
    heights = charts.apart([10, 11, 12, 200])
    assert heights == [10, 27, 44, 200]


@pytest.mark.parametrize(
    ("values", "ends"),
    [((0.37, 0.6), (0.2, 1.0)), ((0.005, 0.4), (0.005, 0.5)), ((0.1,), (0.1, 0.2)), ((2e-6, 0.3), (1e-6, 1.0))],
)
def test_the_logarithmic_axis_holds_every_value(values, ends):
    scale = charts.logarithmic(values, 0, 1)
    assert (scale.low, scale.high) == pytest.approx(ends)
    assert all(0 <= scale(value) <= 1 for value in values)
    assert len(scale.ticks) <= charts.MOST_TICKS


def test_one_point_alone_can_be_drawn():
    ET.fromstring(charts.scatter([charts.Point(90.0, 0.1, "only <one>", True)], "KL", "MB", "nats"))


def with_kl(fidelity, contender="ours", **kl):
    """A result whose kinds of text have these mean KLs."""
    part = fidelity.by_domain["prose"]
    parts = {kind: part.model_copy(update={"mean_kl": value}) for kind, value in kl.items()}
    return fidelity.model_copy(update={"contender": contender, "by_domain": parts})


def test_kinds_of_text_count_alike_and_the_best_comes_first():
    run = stored_run()
    better = with_kl(run.fidelity[0], "stock", prose=0.02, code=0.04)
    rows = tables.domains(run.model_copy(update={"fidelity": (*run.fidelity, better)}))
    assert rows[0][3:] == ("KL, mean of all kinds", "prose", "code", "top-1")
    assert [row[3] for row in rows[1:]] == ["0.0300", "0.1250"]
    assert rows[2][4:6] == ("0.1000", "0.1500")
    single = with_kl(run.fidelity[0], prose=0.1)
    assert tables.domains(run.model_copy(update={"fidelity": (single,)})) == []


def test_a_record_of_version_2_makes_the_same_table(tmp_path):
    """Records in docs/benchmarks were written when each kind of text had its mean KL only."""
    run, path = stored_run(), tmp_path / "run.json"
    fields = run.model_dump(mode="json") | {"schema_version": 2}
    (fidelity,) = fields["fidelity"]
    fidelity["kl_by_domain"] = {kind: part["mean_kl"] for kind, part in fidelity.pop("by_domain").items()}
    path.write_text(json.dumps(fields))
    assert tables.domains(publish.read(path)) == tables.domains(run)
    fidelity["by_domain"] = {}
    path.write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=r"run\.json: of another version: .*kl_by_domain: unknown key"):
        publish.read(path)


@pytest.mark.parametrize("path", sorted((publish.DOCS / publish.FOLDER).glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_pages_are_those_of_their_records(path, tmp_path):
    publish.render(publish.read(path), tmp_path)
    page = f"{path.stem}.md"
    assert (tmp_path / page).read_text() == (path.parent / page).read_text()


@pytest.mark.parametrize("name", ["accuracy", "detours"])
def test_the_committed_studies_are_those_of_their_records(name):
    record, page = ((publish.DOCS / f"{name}.{suffix}").read_text() for suffix in ("json", "md"))
    command = next(line.strip() for line in page.splitlines() if line.startswith("    python -m"))
    if name == "detours":
        assert detours.render(detours.Detours.model_validate_json(record), command) == page
    else:
        run = study.Study.model_validate_json(record)
        assert study.page(run, name, command) == page
        assert study.figure(run) == (publish.DOCS / f"{name}.svg").read_text()
