"""Commands to which something happens on the way: `fakes/command.py` started, and what it said."""

import json
import subprocess
import sys
from pathlib import Path

from export import manifest

COMMAND = (sys.executable, str(Path(__file__).parent / "fakes" / "command.py"))


def arguments(*orders):
    return [*COMMAND, json.dumps(orders)]


def results(*orders, **options):
    done = subprocess.run(
        arguments(*orders), cwd=manifest.ROOT, capture_output=True, text=True, timeout=300, check=True, **options
    )
    return json.loads(done.stdout.splitlines()[-1])


def one_error(stderr):
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert stderr.rstrip().endswith(errors[0])
    return errors[0]
