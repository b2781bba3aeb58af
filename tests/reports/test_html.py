"""The page holds the numbers, loads nothing, and says what failed."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from export import manifest
from export.toolbox import charts
from runtime_tests.checks import loss
from runtime_tests.evidence.record import Outcome
from runtime_tests.reports import html, summary
from tests.support.records import sample_record

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Balance(HTMLParser):
    """Collects tags left open and anything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(built):
    return lambda *records: html.render(records, [manifest.read(built)] * len(records))


def test_the_page_holds_the_numbers(page):
    record = sample_record()
    text = page(record)
    for number in summary.row(record):
        assert number in text
    assert f"{record.accuracy.lowering.mean_kl:.4g}" in text
    assert record.commit in text
    commands = text.partition("<h2>Reproduce</h2>")[2].partition("<pre>")[2].partition("</pre>")[0].splitlines()
    assert "python -m export tiny int4-g32 fake" in commands
    validated = f"python -m runtime_tests --device {record.device} --eval {record.accuracy.evaluation}"
    assert commands[-1] == f"{validated} build/tiny_int4-g32_fake"


def test_the_page_shows_every_slice_of_every_comparison(page):
    record = sample_record()
    text = page(record)
    for title in loss.measured(record.accuracy):
        assert f"<h3>{title}</h3>" in text
    for comparison in loss.measured(record.accuracy).values():
        for label, part in (comparison.by_domain | comparison.by_position).items():
            assert f"<td>{label}</td>" in text
            assert f">{loss.nats(part.mean_kl)}</td>" in text
            assert f">{part.top1:.1%}</td>" in text
    assert "Where the loss is" in text


def test_a_run_that_ended_early_shows_the_comparisons_it_reached(page):
    record = sample_record(outcome=Outcome.CRASH, detail="died by SIGSEGV")
    reached = record.accuracy.model_copy(update={"total": None, "lowering": None})
    text = page(record.model_copy(update={"accuracy": reached}))
    assert loss.COMPARISONS["quantization"] in text
    assert loss.COMPARISONS["total"] not in text


def test_heat_is_the_share_of_the_largest_loss_on_the_page():
    record = sample_record()
    (tables,) = loss.tables([record])
    heat = {
        (table.title, row.label): row.cells[loss.COLUMNS.index("KL")].heat for table in tables for row in table.rows
    }
    label, most = loss.worst(record.accuracy.total.by_domain | record.accuracy.total.by_position)
    assert heat[loss.COMPARISONS["total"], label] == 1
    of_lowering = heat[loss.COMPARISONS["lowering"], "all"]
    assert of_lowering == pytest.approx(record.accuracy.lowering.mean_kl / most.mean_kl)
    assert 0 < of_lowering < 0.01


def test_without_any_loss_nothing_is_hot():
    perfect = sample_record().accuracy.lowering.model_copy(update={"mean_kl": 0.0, "p99_kl": 0.0, "top1": 1.0})
    part = perfect.by_domain["english"].model_copy(update={"mean_kl": 0.0, "p99_kl": 0.0, "top1": 1.0})
    perfect = perfect.model_copy(update={"by_domain": {"english": part}, "by_position": {}})
    accuracy = sample_record().accuracy.model_copy(
        update={"total": perfect, "rewriting": None, "quantization": None, "lowering": None}
    )
    ((table,),) = loss.tables([sample_record().model_copy(update={"accuracy": accuracy})])
    assert {cell.heat for row in table.rows for cell in row.cells} == {0}


def test_the_page_loads_nothing_and_is_well_formed(page):
    text = page(sample_record(), sample_record(outcome=Outcome.CRASH, latency=None, detail="died by SIGSEGV"))
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.fetched == []
    assert not re.search(r"https?://|@import|url\(|<script", text)


def test_the_banner_follows_the_records(page):
    assert "every gate holds" in page(sample_record())
    assert "speed inconclusive" in page(sample_record(outcome=Outcome.INCONCLUSIVE, detail="noise"))
    failed = page(sample_record(), sample_record(outcome=Outcome.MISMATCH, detail="lowering: mean KL is 3"))
    assert "1 of 2 artifacts failed" in failed
    assert "lowering: mean KL is 3" in failed


def test_what_an_artifact_says_is_escaped(page):
    text = page(sample_record(outcome=Outcome.RUN_FAIL, detail="<script>alert(1)</script>"))
    assert "<script>" not in text


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5.0, 5.0], [1e-9, 1e3], [-3.0, 2.5]])
@pytest.mark.parametrize("log", [True, False])
def test_plots_are_valid_svg_for_any_numbers(values, log):
    drawn = charts.lines([charts.Series("a<b", values, 0)], label="x", x_label="step", log=log)
    assert "nan" not in drawn
    ElementTree.fromstring(drawn)
    ElementTree.fromstring(charts.dots(["row"] * len(values), [charts.Series("a", values, 7)], "x"))
    ElementTree.fromstring(charts.bars([charts.Bar("a&b", abs(v), "1", [abs(v)], 1) for v in values], "x"))


def test_the_terminal_names_the_worst_text_and_positions(tmp_path, capsys):
    record = sample_record(outcome=Outcome.CRASH, detail="died by SIGSEGV", latency=None)
    early = record.model_copy(update={"accuracy": record.accuracy.model_copy(update={"total": None})})
    summary.show([sample_record(), early], tmp_path / "index.html")
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("mean KL, nats"))
    total = sample_record().accuracy.total
    (text, of_text), (place, of_place) = loss.worst(total.by_domain), loss.worst(total.by_position)
    steps = (total, sample_record().accuracy.quantization, sample_record().accuracy.lowering)
    cells = ["tiny_int4-g32_fake", *(loss.nats(one.mean_kl) for one in steps), text, loss.nats(of_text.mean_kl)]
    cells += [*place.split(), loss.nats(of_place.mean_kl)]
    assert lines[header + 1].split() == cells
    assert "crash" in lines[header + 2]  # nothing is said of where the other one loses


def test_the_terminal_names_failed_gates(tmp_path, capsys):
    record = sample_record(outcome=Outcome.CRASH, detail="died by SIGSEGV", latency=None)
    summary.show([sample_record(), record], tmp_path / "index.html")
    out = capsys.readouterr().out
    assert "tiny_int4-g32_fake: crash: died by SIGSEGV" in out
    assert "\x1b" not in out
    assert f"report: {tmp_path / 'index.html'}" in out
