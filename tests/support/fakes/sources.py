"""`python -m export` on one checkpoint after the other, in limited memory and time.

Takes JSON {bytes, seconds, cache, first, runs}: `first` builds before the limit is set, the others under it, with
`bytes` more than the process has then. Prints exit code and stderr of each, and whether twice that could be had.
"""

import io
import json
import resource
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from export import pipeline
from export.__main__ import app
from export.build.command import quiet_libraries, run


def build(arguments, seconds):
    sys.argv = ["export", *arguments]
    said = io.StringIO()
    signal.alarm(seconds)  # a hang ends this process
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            code = run(app)
        except BaseException:
            code = -1
            traceback.print_exc(file=said)
    signal.alarm(0)
    return code, said.getvalue()


def claims(count):
    try:
        torch.empty(count, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    quiet_libraries()
    with patch.object(pipeline, "CACHE", Path(given["cache"])):
        ends = [build(given["first"], given["seconds"])]  # imports what a build imports
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + given["bytes"],) * 2)
        ends += [build(arguments, given["seconds"]) for arguments in given["runs"]]
    print(json.dumps({"ends": ends, "claimed": claims(2 * given["bytes"])}))
