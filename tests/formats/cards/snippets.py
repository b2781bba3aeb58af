"""The code on a card, and a place to run it as a reader would: the artifact's folder and nothing of this project."""

import os
import re
import subprocess
import sys

from export import manifest

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

EVALUATED = f"""
import sys
sys.path.insert(0, {str(manifest.ROOT)!r})
import coremltools as ct
from runtime_tests.sessions.mlpackage import Evaluated, Path
ct.models.MLModel = lambda path, compute_units: Evaluated(Path(path), 1)
"""
"""Off a Mac, the evaluator of the saved package stands in for Core ML: it has the same calls."""


def blocks(card, language):
    """Every block of code in a language, in order."""
    return [code for kind, code in BLOCK.findall(card) if kind == language]


def python(card):
    """Each block of Python with the command above it that installs what it needs."""
    command, pairs = None, []
    for kind, code in BLOCK.findall(card):
        if kind == "sh" and code.startswith("pip install "):
            command = code.strip()
        elif kind == "python":
            pairs.append((command, code))
    return pairs


def run(folder, code, home, python=sys.executable):
    """Run Python in an artifact folder, apart from variables, user packages and modules around it."""
    variables = {
        name: os.environ[name] for name in ("PATH", "OPENBLAS_CORETYPE", "OMP_WAIT_POLICY") if name in os.environ
    }
    return subprocess.run(
        [python, "-I", "-X", "utf8", "-c", code],
        check=False,
        cwd=folder,
        env={**variables, "HOME": str(home)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )
