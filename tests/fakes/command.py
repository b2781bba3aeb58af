"""`python -m export` with an accident: at a chosen moment the disk fills up or a signal comes.

Takes a JSON list of builds, makes them one after the other and prints a JSON list of how each ended.
"""

import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

from export import backends, pipeline
from export.__main__ import app
from export.cli import quiet_libraries, run
from export.plan import load_plan


def build(given):
    """One command; its exit code, what it said, and what is left in the folders to look at."""
    sys.argv = ["export", "tiny", given.get("quant", "int4-g32"), given["target"], "--out", given["out"]]
    said = io.StringIO()
    with redirect_stderr(said), patch.object(pipeline, "CACHE", Path(given["cache"])), prepared(given):
        try:
            with redirect_stdout(io.StringIO()):
                code = run(app)
        except BaseException:
            code = -1
            traceback.print_exc(file=said)
    if "disk" in given:
        (Path(given["disk"]) / "ballast").unlink(missing_ok=True)
    left = {folder: sorted(path.name for path in Path(folder).iterdir()) for folder in given["look"]}
    return {"code": code, "stderr": said.getvalue(), "left": left}


def alone(given):
    """The build in a process of its own, which the accident may end without a word."""
    backends.load(load_plan("tiny", "int4-g32", given["target"]).target.backend)  # its libraries, for all that follow
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(build(given)).encode())
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    left = {folder: sorted(path.name for path in Path(folder).iterdir()) for folder in given["look"]}
    return json.loads(said) if said else {"code": code, "stderr": "", "left": left}


def prepared(given):
    """The accident in its place: when a stage begins, or when a function `module:name` has done its work."""
    if "at" in given:
        return patch.object(pipeline, "stage", stage_with_accident(given))
    module, _, name = given["after"].partition(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def then(*arguments, **options):
        result = real(*arguments, **options)
        accident(given)
        return result

    return patch.object(owner, last, then)


def stage_with_accident(given):
    real = pipeline.stage

    @contextmanager
    def stage(label, detail=""):
        with real(label, detail):
            if label == given["at"]:
                accident(given)
            yield

    return stage


def accident(given):
    kind = given["accident"]
    if kind == "fill":
        fill(Path(given["disk"]), given["leave"])
    elif kind == "say and wait":
        print("there", file=sys.__stdout__, flush=True)
        time.sleep(300)
    elif kind == "swallowed":
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.Signals[kind])


def fill(folder, leave):
    """Something else takes the space, all but `leave` bytes."""
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps([(alone if given.get("alone") else build)(given) for given in json.loads(sys.argv[1])]))
