"""The drawings of a mixed-precision choice say what the manifest says."""

import re

import pytest

from export import manifest
from export.manifest import CalibrationInfo
from runtime_tests.reports import html, plots
from tests.support.records import sample_record


@pytest.fixture(scope="module")
def mixed(tiny):
    return manifest.read(tiny("onnx-cpu", "int4-mixed"))


def test_every_linear_has_a_cell_and_the_promoted_ones_a_frame(mixed):
    drawn = plots.choice_map(mixed)
    chosen = [candidate for candidate in mixed.quantization.calibration.candidates if candidate.promoted]
    assert drawn.count("<rect") == len(mixed.architecture.linear_shapes())
    assert drawn.count("stroke-width") == len(chosen)
    assert all(f"{candidate.name}: int8" in drawn for candidate in chosen)


def test_the_front_ends_where_everything_is_promoted_and_holds_the_choice(mixed):
    candidates = mixed.quantization.calibration.candidates
    points = plots.pareto(candidates, plots.smallest_mb(mixed), 1.0)
    assert len(points) == len(candidates) + 1
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    drawn = plots.front(mixed)
    chosen = [candidate for candidate in candidates if candidate.promoted]
    assert f"{len(chosen)} of {len(candidates)} linears promoted" in drawn
    size = re.search(r"([\d.]+) MB, KL", drawn).group(1)
    stored = (
        mixed.quantization.bits_per_weight
        / 8
        * sum(a * (b[0] if b else 1) for a, *b in mixed.architecture.tensor_shapes().values())
    )
    assert float(size) == pytest.approx(stored / 1e6, abs=0.06)


def test_without_promotion_nothing_is_drawn(built, mixed):
    plain = manifest.read(built)
    assert plots.choice_map(plain) == plots.front(plain) == ""
    info = mixed.quantization.calibration.model_dump() | {"held_out_kl": None}
    unknown = mixed.quantization.model_copy(update={"calibration": CalibrationInfo(**info)})
    assert plots.front(mixed.model_copy(update={"quantization": unknown})) == ""


def test_the_report_shows_them(mixed, built):
    assert "Bits per linear: tiny int4-mixed" in html.render([sample_record()], [mixed])
    assert "Bits per linear" not in html.render([sample_record()], [manifest.read(built)])
