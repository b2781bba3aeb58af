"""Checks of damaged copies of one artifact, each in a process of its own: a crash is told from a finding.

Takes two numbers and folders, and prints JSON: how often each ending came in each. Files are damaged in place, sealed
again and mended.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from export import manifest
from export.build.command import quiet_libraries
from export.toolbox import model_checks
from tests.support.harms import damaged_files, model_files

LIMIT_S = 20


def ending(folder):
    """`found`, `nothing found`, or the signal that ended the reading."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os._exit(0 if model_checks.check(folder) else 1)
        finally:
            os._exit(2)  # what `check` raises, which it must not
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "found", 1: "nothing found", 2: "raised"}.get(code) or signal.Signals(-code).name


def count(folder, cut, flipped):
    """How often each ending came; the artifact's files share the damage evenly."""
    described = manifest.read(folder)
    assert model_checks.check(folder) == []  # and the libraries are there before the first fork
    counts = {"cut": Counter(), "flipped": Counter()}
    for kind, path, data in damaged_files(model_files(folder, described), cut, flipped):
        whole = path.read_bytes()
        path.write_bytes(data)
        manifest.write(folder, described.model_copy(update={"files": manifest.hash_files(folder)}))
        counts[kind][ending(folder)] += 1
        path.write_bytes(whole)
    return counts


if __name__ == "__main__":
    quiet_libraries()
    cut, flipped, *folders = sys.argv[1:]
    print(json.dumps([count(Path(folder), int(cut), int(flipped)) for folder in folders]))
