"""`build`: what the command builds, a mistake as an ExportError, and a light import."""

import os
import re
import subprocess
import sys

import pytest

import export
from export import __main__ as command
from export import build, manifest
from export.errors import ExportError
from tests.support.checkpoints import ADAPTER, write_folder, write_lora

PAGE = manifest.ROOT / "docs/python.md"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_door_writes_what_the_command_writes(here):
    pytest.importorskip("onnx", reason="onnx is not installed")
    base = write_lora(here / "base")
    built = build("llama", "int4-g32", "onnx-cpu", source=base, adapter=base / ADAPTER, out="door")
    options = {"source": str(base), "adapter": base / ADAPTER, "out": here / "command"}
    command.main("llama", "int4-g32", ["onnx-cpu"], **options)
    assert bytes_of(here / "door") == bytes_of(here / "command")
    assert manifest.read(here / "door") == built
    assert (built.id, built.checkpoint.origin) == ("adapter_int4-g32_onnx-cpu", "adapter:local:adapter//local:base")


def test_a_context_of_its_own_and_a_folder_that_is_up_to_date(here, capsys):
    pytest.importorskip("onnx", reason="onnx is not installed")
    built = build("tiny", "int4-g32", "onnx-cpu", context=128)
    folder = here / "build" / built.id
    assert (built.plan.model.context_length, built.contract.kv.context_length) == (128, 128)
    before = (folder / manifest.FILE).stat().st_mtime_ns
    assert build("tiny", "int4-g32", "onnx-cpu", context=128, out=folder) == built
    assert f"{folder}: up to date" in capsys.readouterr().err
    assert (folder / manifest.FILE).stat().st_mtime_ns == before
    assert build("tiny", "int4-g32", "onnx-cpu").contract.kv.context_length != 128


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("tiny2", "int4-g32", "coreml"), {}, "unknown name 'tiny2' in configs/models; did you mean tiny"),
        (("tiny", "int3", "coreml"), {}, "unknown name 'int3' in configs/quant; did you mean int4"),
        (("tiny", "int4-g32", "tflite"), {}, "unknown name 'tflite' in configs/targets; known: .*onnx-cpu"),
        (("llama", "int4-g32", "coreml"), {}, "give --source"),
        (("llama", "int4-g32", "coreml"), {"source": "nowhere"}, "nowhere: no such file or folder"),
        (
            ("tiny", "int4-g32", "coreml"),
            {"source": "seed:1", "adapter": "nowhere"},
            "merged into a checkpoint, not into seed:",
        ),
        (("tiny", "int4-g32", "coreml"), {"context": 4096}, "context_length 4096 is more than .* 2048"),
        (("tiny", "int4-g32", "coreml"), {"context": 8}, "model 'tiny': context_length: .*greater than or equal to 64"),
    ],
)
def test_a_mistake_is_one_line(here, names, options, words):
    with pytest.raises(ExportError, match=words) as caught:
        build(*names, **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in here.rglob("*") if path.name not in ("build", ".lock") and path.suffix != ".lock"]


def test_a_folder_that_is_no_artifact_stays(here):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ExportError, match="is not an artifact folder"):
        build("tiny", "int4-g32", "onnx-cpu", out="mine")
    assert [path.name for path in (here / "mine").iterdir()] == ["thesis.tex"]


def test_importing_is_light_and_the_room_of_that_name_does_not_hide_the_function():
    code = (
        "import sys; from export import build; print(sorted({'torch', 'pydantic'} & set(sys.modules)), callable(build))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=manifest.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"
    from export.build import folder, skip

    assert export.build is build
    assert {folder.__name__, skip.__name__} == {"export.build.folder", "export.build.skip"}


def test_the_example_of_the_page_runs_and_prints_what_the_page_shows(here):
    """Sizes aside, which follow the versions of the libraries."""
    for package in ("peft", "onnx", "executorch", "coremltools"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    threads = {name: value for name, value in os.environ.items() if name.startswith("OMP_")}  # those of the other tests
    script, shown = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:2]
    write_folder(here / "base")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": str(manifest.ROOT), "PATH": os.environ["PATH"], "HOME": str(here), **threads},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.sub(r"[\d.]+", "#", done.stdout) == re.sub(r"[\d.]+", "#", shown)
