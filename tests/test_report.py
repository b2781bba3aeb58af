"""The page holds the numbers, loads nothing, and says what failed."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from export import manifest
from runtime_tests import plots, report, summary
from runtime_tests.record import Outcome

from .sample import sample_record

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
    return lambda *records: report.render(records, [manifest.read(built)] * len(records))


def test_the_page_holds_the_numbers(page):
    record = sample_record()
    text = page(record)
    for number in summary.row(record):
        assert number in text
    assert f"{record.accuracy.lowering.mean_kl:.4g}" in text
    assert record.commit in text
    assert "python -m export tiny int4-g32 fake" in text


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
    drawn = plots.lines([plots.Series("a<b", values, 0)], label="x", x_label="step", log=log)
    assert "nan" not in drawn
    ElementTree.fromstring(drawn)
    ElementTree.fromstring(plots.dots(["row"] * len(values), [plots.Series("a", values, 7)], "x"))
    ElementTree.fromstring(plots.bars([plots.Bar("a&b", abs(v), "1", [abs(v)], 1) for v in values], "x"))


def test_the_terminal_names_failed_gates(tmp_path, capsys):
    record = sample_record(outcome=Outcome.CRASH, detail="died by SIGSEGV", latency=None)
    summary.show([sample_record(), record], tmp_path / "index.html")
    out = capsys.readouterr().out
    assert "tiny_int4-g32_fake: crash: died by SIGSEGV" in out
    assert "\x1b" not in out
    assert f"report: {tmp_path / 'index.html'}" in out
