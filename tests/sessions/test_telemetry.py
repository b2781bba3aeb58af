"""onnxruntime's import writes an id of the device into the home folder, and later calls its maker: not from us."""

import os
import shutil
import subprocess
import sys

import pytest

from export.manifest import ROOT
from runtime_tests.device_runner import onnx_kv
from tests.support.reliability import TELEMETRY

pytestmark = TELEMETRY

IMPORTS = {
    "a session": "import runtime_tests.sessions.onnx_kv",
    "a command and its children": (
        "import os, sys; from export.build.command import quiet_libraries; quiet_libraries();"
        "os.execv(sys.executable, [sys.executable, '-c', 'import onnxruntime'])"
    ),
    "a board": "import runpy; runpy.run_module('sessions.onnx_kv')",
}


@pytest.mark.parametrize("process", IMPORTS)
def test_no_process_of_ours_leaves_a_file_at_home(tmp_path, process):
    home, board = tmp_path / "home", tmp_path / "board"
    for folder in (home, board / "sessions"):
        folder.mkdir(parents=True)
    for name in ("base.py", "onnx_kv.py"):
        shutil.copy(onnx_kv.SESSIONS / name, board / "sessions")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": f"{board}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", IMPORTS[process]], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert not [path for path in home.rglob("*") if path.is_file()]
