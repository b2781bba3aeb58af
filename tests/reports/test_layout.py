"""Nothing on a page is cut, overlaps or stays unprinted: measured in Chromium at three widths and on paper."""

import re

import pytest

from export import manifest
from export.manifest import CalibrationInfo, Candidate
from runtime_tests.evidence.record import Gate, Outcome
from runtime_tests.reports import html, overview, publication
from runtime_tests.tasks import results, tables
from tests.reports import layout
from tests.support.records import sample_comparison, sample_latency, sample_record
from tests.tasks import test_results

LONG = "a-fine-tune-of-somebody_with-a-very-long-name_of-its-own-and-then-some-more"
WORDS = "the process died by SIGSEGV after 12,345 calls, first: model.layers.29.mlp.down_proj.weight of " + "x" * 90
GATES = (
    ("lowering: mean KL", 0.123456, 1e-3, "at most", "fail", WORDS),
    ("weights: differing numbers", 122907.0, 0.0, "at most", "fail", "134,515,008 integers and scales compared"),
    ("KL as shipped against baseline, nats", 0.1234567, 0.1, "at most", "inconclusive", WORDS),
    ("decode tokens/s", 12345.678, 1.0, "at least", "inconclusive", "timings vary by 65%, more than 15%"),
)


def gates():
    fields = ("name", "value", "limit", "rule", "verdict", "detail")
    return tuple(Gate(**dict(zip(fields, row, strict=True)), fails_as=Outcome.MISMATCH) for row in GATES)


def noisy():
    """Timings with large numbers, whose repeats reach the end of the track."""
    latency = sample_latency()
    prompt = latency.tests[0].model_copy(
        update={"avg_ts": 38266.0, "stddev_ts": 17355.0, "samples_ts": (100.0, 60000.0, 59000.0), "n_prompt": 512}
    )
    return latency.model_copy(update={"tests": (prompt, prompt, latency.tests[-1])})


def losing():
    """Slices with long names and numbers."""
    total = sample_comparison(noise=0.5)
    part = next(iter(total.by_domain.values())).model_copy(update={"perplexity": 1.23e217})
    named = dict.fromkeys(("portuguese-of-brazil_and-portugal-with-a-long-name", *"abcdef"), part)
    return total.model_copy(update={"by_domain": named})


def deep(described):
    """The same of 30 layers under a long name, half of them promoted, from a 4-bit checkpoint with an adapter."""
    architecture = described.architecture.model_copy(update={"num_hidden_layers": 30})
    layer, names = described.quantization.layers[1], list(architecture.linear_shapes())
    layers = [
        layer.model_copy(update={"name": name, "sqnr_db": 18 + i % 7 + i % 11, "bits": 4 + 4 * (i % 2 == 0)})
        for i, name in enumerate(names)
    ]
    candidates = tuple(
        Candidate(name=name, kl=1e-3 / (i + 1), promoted_kl=1e-6, extra_bytes=70_000, promoted=i % 2 == 0)
        for i, name in enumerate(names)
    )
    info = CalibrationInfo(texts={}, day=None, tokens=30_208, held_out_kl=0.0104, candidates=candidates)
    plan, origin = described.plan, f"adapter:/{LONG}//hub:{LONG}"
    return described.model_copy(
        update={
            "architecture": architecture,
            "plan": plan.model_copy(update={"quant": plan.quant.model_copy(update={"name": LONG})}),
            "quantization": described.quantization.model_copy(
                update={"layers": tuple(layers), "calibration": info, "key": "f" * 64}
            ),
            "checkpoint": described.checkpoint.model_copy(update={"bits_per_weight": 4.5, "origin": origin}),
        }
    )


@pytest.fixture(scope="module")
def pages(built, tmp_path_factory):
    """A run of one artifact, one of six with all that can go wrong, the page over all of them, scores of tasks."""
    build = tmp_path_factory.mktemp("build") / "build"
    plain = manifest.read(built)
    long = deep(plain)
    bad = sample_record(
        artifact=f"{LONG}_{LONG}_executorch-xnnpack", gates=gates(), outcome=Outcome.MISMATCH, detail=WORDS,
        notes=(f"not judged by the limits that it brings: {WORDS}",), folder=f"/home/somebody/{LONG}/{LONG}",
        latency=noisy(), run_id="20260102-000000", device="raspberry-pi-5",
    )  # fmt: skip
    accuracy = bad.accuracy.model_copy(update={"total": losing()})
    crash = {"outcome": Outcome.CRASH, "latency": None, "gates": (), "folder": "build/crashed"}
    crash["accuracy"] = bad.accuracy.model_copy(update={"total": None, "lowering": None})
    doubtful = {"outcome": Outcome.INCONCLUSIVE, "folder": "", "detail": "timings vary by 65%, more than 15%"}
    six = [bad, bad.model_copy(update={"accuracy": accuracy}), bad.model_copy(update=crash)]
    six += [bad.model_copy(update=doubtful | {"artifact": f"tiny_{i}"}) for i in range(3)]
    one = [sample_record()]
    for records, manifests in ((one, [plain]), (six, [long, long, plain, plain, plain, long])):
        for record in records:
            publication.records_file.append(record, build / overview.RECORDS)
        (build / "reports" / records[0].run_id).mkdir(parents=True)
        publication.report(records, manifests, build)
    read = lambda *parts: (build / "reports").joinpath(*parts, "index.html").read_text()  # noqa: E731
    test_results.write(build, LONG, {f"local_{LONG}": 0.4, "gsm8k": 0.3}, base="llama32-1b-instruct", path=LONG)
    scores = tables.write(results.compare(results.read_all(build)), build).read_text()
    return {"one": read(one[0].run_id), "six": read(bad.run_id), "all": read(), "tasks": scores}


SPOILED = {
    "a table that is too wide": (
        "<div class=card style='overflow-x:auto'><table><tr><td style='white-space:nowrap'>" + "wide " * 400,
        "is .* px too wide",
    ),
    "labels on each other": (
        "<svg viewBox='0 0 440 40'><text x=5 y=20>layer 7</text><text x=20 y=22>layer 8</text></svg>",
        'overlap: "layer 7" and "layer 8"',
    ),
    "a label behind the edge": ("<svg viewBox='0 0 440 40'><text x=420 y=20>prefill</text></svg>", 'cut: "prefill"'),
    "a number on the repeats": (
        "<div class=track style='position:relative'>1,234"
        "<u style='position:absolute;left:4px;top:9px;width:6px;height:6px'></u></div>",
        'overlap: "1,234" and "a dot"|overlap: "a dot" and "1,234"',
    ),
}


@pytest.fixture(scope="module")
def found(pages, tmp_path_factory):
    """Findings of all pages and of spoiled ones, from one start of the browser."""
    spoiled = {name: pages["all"].replace("</header>", f"</header>{part}") for name, (part, _) in SPOILED.items()}
    closed = {"closed": pages["one"].replace('"card" open', '"card"').replace("details::details-content", "nothing")}
    return layout.measure(pages | spoiled | closed, tmp_path_factory.mktemp("layout"))


@pytest.mark.parametrize("page", ["one", "six", "all", "tasks"])
def test_nothing_is_cut_or_overlaps(found, page):
    assert {where: found[where] for where in layout.wheres(page)} == {where: [] for where in layout.wheres(page)}


@pytest.mark.parametrize("name", SPOILED)
def test_the_measurement_sees(found, name):
    for where in layout.wheres(name):
        assert any(re.search(SPOILED[name][1], line) for line in found[where]), where


def test_the_measurement_sees_what_is_not_printed(found):
    assert any(line.startswith("not printed: ") for line in found["closed in print"])


def test_folders_of_one_id_are_told_apart(built):
    records = [sample_record(folder="build/a"), sample_record(folder="other/a")]
    assert html.names_of(records) == ["tiny_int4-g32_fake in build/a", "tiny_int4-g32_fake in other/a"]
    assert html.names_of(records[:1]) == ["tiny_int4-g32_fake"]
