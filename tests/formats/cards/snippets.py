"""The code on a card, and a place to run it as a reader would: the artifact's folder and nothing of this project."""

import os
import re
import subprocess
import sys

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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
    variables = {name: os.environ[name] for name in ("PATH", "OPENBLAS_CORETYPE") if name in os.environ}
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
