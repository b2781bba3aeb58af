"""The page holds the numbers, loads nothing, and says what failed."""

import ast
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from export import manifest
from export.formats import storage
from export.toolbox import charts
from runtime_tests.checks import loss
from runtime_tests.evidence.record import Outcome
from runtime_tests.evidence.regression import AGAINST
from runtime_tests.reports import html, meanings, plots, summary
from tests.support import shape
from tests.support.records import sample_record

VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


class Balance(HTMLParser):
    """Collects tags left open and anything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        (self.links if tag == "a" else self.fetched).extend(found)

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


def test_every_gate_has_a_meaning_on_the_page(page):
    """Their names are the first argument of the functions that make them."""
    names = [AGAINST]
    for path in (file for file in shape.product_code() if file.suffix == ".py"):
        for node in ast.walk(shape.tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("judge", "count"):
                words = [part.value for part in node.args[:1] if isinstance(part, ast.Constant)]
                names += [word for word in words if isinstance(word, str) and len(node.args) > 2]
    assert "lowering: SQNR" in names
    assert "files intact: problems" in names
    assert {name for name in names if not meanings.of(name)} == set()
    assert meanings.of("lowering: mean KL") in page(sample_record())


def test_counts_are_shown_as_counts(page):
    gate = sample_record().gates[0]
    text = page(sample_record(gates=(gate.model_copy(update={"value": 122907.0, "limit": 0.0}),)))
    assert ">122,907</td>" in text
    assert ">at most 0</td>" in text


def test_notes_stand_beside_the_verdict(page):
    note = "not judged by the limits that it brings: target.max_mean_kl 0.1"
    summary_of, _, gates = page(sample_record(notes=(note,))).partition("Where the loss is")
    assert f"Not{note[3:]}." in summary_of
    assert f"Not{note[3:]}." in gates


def test_the_page_shows_the_recipe_as_it_was_quantized(page, built):
    described = manifest.read(built)
    text = page(sample_record())
    assert f"<dd>{storage.line(described)}</dd>" in text
    for kind in ("q_proj", "down_proj", "embedding", "head"):
        assert f"<td>{kind}</td>" in text
    assert described.plan.quant.description not in text
    for fact in ("random weights, seed 20", "none: random weights", "no: the checkpoint was not quantized before"):
        assert f"<dd>{fact}</dd>" in text
    assert '<td data-label="context, tokens">256</td>' in text


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            False,
            "yes: the second time lost KL 4.7e-05; what the first one lost is unknown without the floats before it",
        ),
        (True, "no: every integer is the checkpoint&#39;s own"),
    ],
)
def test_a_detour_says_what_is_known_of_its_loss(built, kept, said):
    described = manifest.read(built)
    layers = tuple(layer.model_copy(update={"kept": kept}) for layer in described.quantization.layers)
    described = described.model_copy(
        update={
            "quantization": described.quantization.model_copy(update={"layers": layers}),
            "checkpoint": described.checkpoint.model_copy(update={"bits_per_weight": 4.5}),
        }
    )
    text = html.render([sample_record()], [described])
    assert "<dd>4.5 per weight: quantized before</dd>" in text
    assert said in text


def test_the_worst_layers_are_named_in_the_plot_and_every_layer_on_hover(built):
    described = manifest.read(built)
    inside = [layer for layer in described.quantization.layers if "proj" in layer.name]
    drawn = ElementTree.fromstring(plots.layer_plot([described]))
    words = [element.text for element in drawn if element.tag == "text"]
    for layer in sorted(inside, key=lambda layer: layer.sqnr_db)[:3]:
        _, _, number, _, kind, _ = layer.name.split(".")
        assert f"{number} {kind} {layer.sqnr_db:.1f}" in words
    titles = {title.text for title in drawn.iter("title")}
    assert {f"{layer.name}: {layer.sqnr_db:.1f} dB" for layer in inside} <= titles


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
    assert parser.links
    assert all(link.startswith(("#", "../../reports/")) for link in parser.links)
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


@pytest.mark.parametrize("rates", [(0.0, 0.0), (1e-12,), (5.0, 5.0, 1e9)])
def test_bars_and_their_repeats_stay_on_the_track(rates):
    record = sample_record()
    test = record.latency.tests[-1].model_copy(update={"avg_ts": rates[0], "samples_ts": rates})
    latency = record.latency.model_copy(update={"tests": (record.latency.tests[0], test)})
    (row,) = plots.decode([record.model_copy(update={"latency": latency})], ["a"])
    assert all(0 <= at <= 100 for at in (row.share, *(dot.at for dot in row.dots)))


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
