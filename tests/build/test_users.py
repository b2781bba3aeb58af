"""Other people than root: without a home, at a checkout that they may only read, in a plain locale, with odd paths."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from export import manifest

PLAN = ["export", "tiny", "int4-g32", "onnx-cpu"]


@pytest.fixture
def user():
    """Runs a module of ours; gives its end. Root becomes nobody, who may read everything and write his folder alone."""
    home = Path(tempfile.mkdtemp())  # pytest's folders are closed to others
    home.chmod(0o755)
    own = home / "Übung & Prüfung"
    scratch = own / ("l" * 100) / ("m" * 100)
    scratch.mkdir(parents=True)
    become = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("setpriv: not found, so root cannot become another user")
        may = "-all,+dac_read_search"
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        become += [f"--{kind}={may}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
        for folder in (own, scratch.parent, scratch):
            os.chown(folder, 65534, 65534)

    def run(*words, cwd=own, **variables):
        around = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TMPDIR": str(scratch), "PYTHONPATH": str(manifest.ROOT)}
        closed = ["sh", "-c", 'exec "$@" <&-', "sh", *become, sys.executable, "-m", *map(str, words)]
        done = subprocess.run(
            closed,
            cwd=cwd,
            env={**around, **variables},
            capture_output=True,
            encoding="utf-8",
            timeout=600,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    run.own = own
    yield run
    shutil.rmtree(home)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="who owns the checkout may write it")


@pytest.mark.kind(
    "a user with no home, a plain locale and odd paths builds from a checkout of root's", "the same files"
)
def test_a_build_is_everybodys(user, tiny):
    out = user.own / "out put"
    done = user(*PLAN, "--out", out, XDG_CACHE_HOME=str(user.own / "cache"))
    assert done.returncode == 0, done.stderr
    assert manifest.read(out).files == manifest.read(tiny("onnx-cpu")).files


@needs_root
def test_without_a_place_for_the_cache_a_line_names_one(user):
    done = user(*PLAN, "--out", user.own / "out")
    line = (
        f"error: {manifest.ROOT / 'build/cache'}: cannot be written, nor can /nonexistent/.cache/llama-on-device; name"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(line)
    assert not (user.own / "out").exists()


@needs_root
def test_a_validation_says_where_it_can_be_run(user, tiny):
    artifact = shutil.copytree(tiny("onnx-cpu"), user.own / "artifact")
    done = user("runtime_tests", artifact, cwd=manifest.ROOT)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {manifest.ROOT / 'build'}: cannot be written (Permission denied); records go there: "
        "run this in a folder of yours\n"
    )
