"""Installed with `pip install -e`: console scripts and Python's door from any folder, nothing else in site-packages."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from export.manifest import ROOT

PAGE = ROOT / "docs/python.md"
FOUND = "import importlib.util as u; print([n for n in {names!r} if u.find_spec(n)])"
NAMES = ["llama_on_device", "export", "runtime_tests", "devices", "tests", "configs", "docs"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment of a user's own, whose dependencies are those of this one."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is too old to build the project")
    place = tmp_path_factory.mktemp("env") / "my env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin/python"
    words = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    there = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (purelib / "dependencies.pth").write_text("\n".join(there) + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-e", ROOT], check=True, stdout=subprocess.DEVNULL)
    return place


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A user's folder with a recipe, an evaluation and a device of their own, and data of the names of our rooms."""
    place = tmp_path_factory.mktemp("home") / "my app"
    for folder in ("configs/quant", "configs/evals", "devices", "export"):
        (place / folder).mkdir(parents=True)
    recipe = (ROOT / "configs/quant/int4-g32.yaml").read_text()
    assert "group_size: 32" in recipe
    (place / "configs/quant/int4-g32.yaml").write_text(recipe.replace("group_size: 32", "group_size: 64"))
    shutil.copy(ROOT / "configs/evals/emulated.yaml", place / "configs/evals/default.yaml")
    shutil.copy(ROOT / "devices/pixel-8.yaml", place / "devices/my-phone.yaml")
    return place


@pytest.fixture(scope="module")
def run(environment, app):
    """A program of the environment in the user's folder: exit code, stdout, stderr."""

    def run(program, *words):
        variables = {"PATH": f"{environment}/bin:{os.environ['PATH']}", "HOME": str(app.parent)}
        ended = subprocess.run(
            [environment / "bin" / program, *words], cwd=app, env={**os.environ, **variables}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended.returncode, ended.stdout, ended.stderr

    return run


def test_site_packages_gets_one_module_and_importing_it_loads_nothing(run):
    code, out, _ = run("python", "-P", "-c", FOUND.format(names=NAMES))
    assert (code, out) == (0, "['llama_on_device']\n")
    shown = (
        "import sys, llama_on_device as l; print({'torch', 'export', 'pydantic'} & {*sys.modules}); print(l.__all__)"
    )
    assert run("python", "-c", shown)[1] == "set()\n['ExportError', 'build', 'open_artifact', 'prove']\n"


def test_scripts_and_door_work_in_the_users_folder(run, app):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    code, out, err = run("llama-export", "tiny", "int4-g32", "onnx-cpu")
    assert (code, out.partition(":")[0]) == (0, "build/tiny_int4-g32_onnx-cpu"), err
    (line,) = [line for line in err.splitlines() if "is taken" in line]
    assert line == f"configs/quant/int4-g32.yaml of this folder is taken, not {ROOT}/configs/quant/int4-g32.yaml"
    built = app / "build/tiny_int4-g32_onnx-cpu"
    plan = json.loads((built / "manifest.json").read_text())["plan"]
    assert plan["quant"]["linear"]["group_size"] == 64

    script = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    script = script.replace("build/rooms_int4-g32_onnx-cpu_512", "build/tiny_int4-g32_onnx-cpu")
    code, out, err = run("python", "-c", script)
    assert code == 0, err
    assert re.match(r"next: \d+\n", out)
    assert re.fullmatch(r"tiny_int4-g32_onnx-cpu: (pass|inconclusive), KL \d\.\d+", out.splitlines()[-1])
    (record,) = map(json.loads, (app / "build/records/records.jsonl").read_text().splitlines())
    files = "configs/evals/default.yaml, configs/quant/int4-g32.yaml"
    assert f"judged with {files} of the folder where it was validated, not of the checkout" in record["notes"]
    page = (app / "build/report/index.html").read_text()
    assert ("llama-export tiny int4-g32 onnx-cpu" in page, "python -m" in page) == (True, False)

    code, _, err = run("llama-validate", "--skip-proven", built.relative_to(app))
    assert (code, "nothing changed since" in err) == (0, True), err
    assert not (app / "build/cache").exists()


def test_devices_of_both_folders_are_listed(run):
    code, out, err = run("llama-devices")
    assert code == 0, err
    assert {"host", "pixel-8", "my-phone"} <= {line.split()[0] for line in out.splitlines()}
    assert "llama-devices targets DEVICE" in run("llama-devices", "nonsense")[2]


def test_help_and_errors_name_the_script(run):
    assert run("llama-validate", "chat", "nowhere") == (
        1, "", "error: nowhere/manifest.json: missing; give an artifact folder made by `llama-export`\n",
    )  # fmt: skip
    script = "from llama_on_device import ExportError, open_artifact\ntry: open_artifact('nowhere')"
    told = run("python", "-c", f"{script}\nexcept ExportError as error: print(error)")[1]
    assert told == "nowhere/manifest.json: missing; give an artifact folder made by `llama-export`\n"
    code, out, _ = run("llama-export", "build", "--help")
    assert (code, "python -m" in out) == (0, False)
    assert "Example: llama-export smollm2-135m" in out


def imported(place, code, path=()):
    """What a Python of this environment prints in a folder, the checkout last on its path."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "PATH": os.environ["PATH"]}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=variables, capture_output=True, text=True, check=False
    )
    return ended.stdout.strip() or ended.stderr.strip().splitlines()[-1]


DOOR = "from llama_on_device import build; print(build.__module__)"


@pytest.mark.parametrize(
    ("file", "code", "told"),
    [
        ("notes.txt", DOOR, "export"),
        ("devices/my-phone.yaml", DOOR, "export"),
        ("export.py", DOOR, "export.py: llama-on-device has a module export of its own"),
        ("devices/__init__.py", DOOR, "devices/__init__.py: llama-on-device has a module devices of its own"),
        (
            "runtime_tests.py",
            f"import runtime_tests; import sys; sys.path.pop(0); {DOOR}",
            "runtime_tests.py: llama-on",
        ),
        (
            "devices/data.py",
            f"import sys; r = sys.path.pop(1); import devices.data; sys.path.append(r); {DOOR}",
            "devices: llama-on-device has a module devices of its own",
        ),
        (
            "export.py",
            "import llama_on_device as l; l.export_script()",
            "error: {place}/export.py: llama-on-device has",
        ),
    ],
)
def test_a_module_of_the_users_is_never_mistaken_for_ours(tmp_path, file, code, told):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert told.format(place=tmp_path) in imported(tmp_path, code)


def test_without_its_checkout_it_says_how_to_install_it(tmp_path):
    shutil.copy(ROOT / "llama_on_device.py", tmp_path)
    told = f"{tmp_path}: no checkout of llama-on-device; install it with `pip install -e CHECKOUT`"
    assert imported(tmp_path, DOOR) == f"ImportError: {told}"
    assert imported(tmp_path, "import llama_on_device as l; l.devices_script()") == f"error: {told}"
