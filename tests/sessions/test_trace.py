"""A trace names the layer that is wrong, in each format, and none of a healthy artifact."""

import json
import shutil

import pytest

from export.architecture import ROTATE_IN
from export.plan import QuantRecipe, load_plan
from runtime_tests.checks.accuracy import BEST_SQNR_DB
from runtime_tests.jobs import TraceJob, isolation
from runtime_tests.sessions.trace import page, run
from runtime_tests.sessions.trace.run import SINGLE, Trace
from tests.support.artifacts import export_with, spoil_weight

TARGETS = ("onnx-cpu", "executorch-xnnpack", "coreml")
DOWN, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
TOKENS = (1, 40, 300, 7, 7, 200, 3)


@pytest.fixture(scope="session")
def traced(store):
    def trace(folder, **changes):
        job = TraceJob(folder=str(folder), source=None, cache=str(store), threads=1, tokens=TOKENS)
        return Trace.model_validate(run.compute(job.model_copy(update=changes)))

    return trace


@pytest.fixture
def shipped(tiny, tmp_path):
    """An ONNX artifact that a test may change."""
    return shutil.copytree(tiny("onnx-cpu"), tmp_path / "shipped")


@pytest.mark.parametrize("target", TARGETS)
def test_no_part_of_a_healthy_artifact_breaks_and_the_one_that_is_wrong_is_named(tiny, traced, tmp_path, target):
    folder = tiny(target)
    healthy = traced(folder)
    assert page.verdict(healthy) == f"tiny_int4-g32_{target}: no part breaks"
    assert healthy.plain_sqnr_db == BEST_SQNR_DB  # reading changes nothing
    for name, layer, kinds in ((DOWN, 0, {"mlp", "o_proj+mlp"}), (QUERY, 1, {"attention"})):
        wrong = shutil.copytree(folder, tmp_path / name)
        spoil_weight(wrong, name)
        found = traced(wrong)
        broken = {(part.layer, part.name) for part in found.parts[SINGLE] if found.breaks(part)}
        assert len(broken) == 1  # what comes after is not accused
        assert broken <= {(layer, kind) for kind in kinds}
        assert found.first is not None
        assert {(found.first[1].layer, found.first[1].name)} == broken


@pytest.mark.parametrize(
    ("target", "beginning"),
    [
        ("onnx-cpu", ["embedding", "rotation"]),
        ("executorch-xnnpack", ["embedding+rotation"]),
        ("coreml", ["embedding", "rotation"]),
    ],
)
def test_rotated_linears_of_two_kinds_are_parts_as_others(traced, store, tmp_path, target, beginning):
    plan = load_plan("tiny", "int4-g32", target)
    four, eight = plan.quant.linear.model_dump(), {"bits": 8, "group_size": None}
    changes = {"rotation": {"seed": 1, "scheme": four}, "layers": {"*.down_proj": eight}}
    plan = plan.model_copy(update={"quant": QuantRecipe.model_validate(plan.quant.model_dump() | changes)})
    folder = export_with(store, plan, tmp_path / "rotated")
    found = traced(folder)
    assert page.verdict(found) == f"tiny_int4-g32_{target}: no part breaks"
    assert [part.name for part in found.parts[SINGLE] if part.layer is None][: len(beginning)] == beginning
    spoil_weight(folder, ROTATE_IN)
    assert traced(folder).first[1].name == beginning[-1]


def test_a_value_that_is_not_finite_breaks_however_it_arises(tiny, traced, monkeypatch):
    from runtime_tests.sessions.trace import onnx_kv, points

    whole = onnx_kv.open_probe

    def spoiled(*arguments):
        def probe(calls):
            read = whole(*arguments)(calls)
            read[points.o_proj(0)] = read[points.o_proj(0)] * float("nan")
            return read

        return probe

    monkeypatch.setattr(onnx_kv, "open_probe", spoiled)
    found = traced(tiny("onnx-cpu"))
    assert "first to break: layer 0, o_proj: not finite" in page.verdict(found)
    json.loads(found.model_dump_json(), parse_constant=pytest.fail)


def test_the_command_prints_and_writes_what_it_found(command, shipped, in_process, tmp_path, capsys):
    assert command("trace", shipped) == 0
    assert "tiny_int4-g32_onnx-cpu: no part breaks" in capsys.readouterr().out
    spoil_weight(shipped, DOWN)
    assert command("trace", shipped, "--out", tmp_path / "out") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("tiny_int4-g32_onnx-cpu: first to break: layer 0, mlp: -")
    assert out[-1] == f"page: {tmp_path / 'out' / 'index.html'}"
    assert [line for line in out if line.startswith("0 ") and " !" in line]
    written = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert len(written["tokens"]) == run.TOKENS
    assert out[-2] in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "build" / "trace" / "tiny_int4-g32_onnx-cpu" / "index.html").is_file()


def test_a_folder_that_is_not_as_its_manifest_says_is_not_opened(command, shipped, monkeypatch, capsys):
    with (shipped / "model.onnx.data").open("r+b") as file:
        file.write(b"other")
    monkeypatch.setattr(isolation, "run", lambda *_, **__: pytest.fail("opened"))
    assert command("trace", shipped) == 1
    assert "model.onnx.data: differs from manifest.json (sha256)" in capsys.readouterr().err


def test_other_formats_and_checkpoints_are_refused_in_a_line(command, built, shipped, in_process, capsys):
    assert command("trace", built) == 1
    assert command("trace", shipped, "--source", "seed:21") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "layers of fake are not traced; `python -m runtime_tests` compares its logits" in lines[0]
    assert "source differs: tiny_int4-g32_onnx-cpu: quantized from another checkpoint (seed:21 now)" in lines[1]


def test_an_attached_device_is_refused_with_what_compares_there(command, setting, monkeypatch, capsys):
    monkeypatch.setattr(type(setting.device), "attached", property(lambda _: True))
    assert command("trace", "a", "--device", "phone") == 1
    told = "error: phone: layers are traced on this machine only; `python -m runtime_tests --device phone a` compares"
    assert capsys.readouterr().err.startswith(told)
