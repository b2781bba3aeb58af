"""`python -m export` or `python -m runtime_tests` with an accident: the disk is full or a signal comes at some moment.

Takes a JSON list of builds and validations, makes them one after the other and prints a JSON list of how each ended.
"""

import gc
import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[3]))

from export import __main__ as building
from export import manifest, pipeline
from export.build.command import quiet_libraries, run
from runtime_tests import __main__ as validating
from runtime_tests import reference, sessions, validate  # noqa: F401 – before any fork
from runtime_tests.checks import comparisons, conformance, files, speed, tokens, weights
from runtime_tests.jobs import isolation, worker

STAGES = {"build": (pipeline,), "validate": (files, weights, comparisons, conformance, tokens, speed, validating)}
"""Modules that begin stages."""

LIBRARIES = {
    "onnx-cpu": ["export.formats.onnx_kv.graph", "export.formats.onnx_kv.weights"],
    "executorch-xnnpack": ["export.formats.pte.program"],
    "coreml": ["export.formats.mlpackage.file", "export.formats.mlpackage.graph"],
}
"""Modules of a lowering, which import what it needs."""


def command(given):
    """One command; its exit code, what it said, and what is left in the folders to look at."""
    app = validation(given) if "folder" in given else build(given)
    said = io.StringIO()
    with redirect_stderr(said), prepared(given):
        try:
            with redirect_stdout(io.TextIOWrapper(io.BytesIO())):
                code = run(app)
        except BaseException:
            code = -1
            traceback.print_exc(file=said)
    gc.collect()
    if "disk" in given:
        gc.collect()  # files that a failed command had mapped take space until then, and would give it in the next one
        (Path(given["disk"]) / "ballast").unlink(missing_ok=True)
    left = {folder: sorted(path.name for path in Path(folder).iterdir()) for folder in given["look"]}
    return {"code": code, "stderr": said.getvalue(), "left": left}


def build(given):
    """The command that builds `target` in `out`."""
    sys.argv = ["export", "tiny", given.get("quant", "int4-g32"), given["target"], "--out", given["out"]]
    pipeline.CACHE = Path(given["cache"])
    return building.app


def validation(given):
    """The command that validates `folder`, its jobs in this process, its build folder in `place`."""
    sys.argv = ["runtime_tests", "--eval", "emulated", given["folder"]]
    os.chdir(given["place"])
    validating.CACHE = Path(given["place"]) / "build" / "cache"
    isolation.run = in_process
    return validating.app


def in_process(job, **_):
    given = worker.answer(job)
    return isolation.interpret(0 if "result" in given else 1, json.dumps(given), "")


def load_libraries(given):
    """All that the command would import on its way, once for all processes to come: most of its seconds."""
    names = ["transformers.tokenization_utils_tokenizers", "torchao.quantization"]
    if "target" in given:
        names += LIBRARIES[given["target"]]
    else:
        sessions.session_module(manifest.read(Path(given["folder"])))
        names.append("transformers.models.llama.modeling_llama")
    for name in names:
        importlib.import_module(name)


def alone(given):
    """The command in a process of its own, which the accident may end without a word."""
    load_libraries(given)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(command(given)).encode())
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
        changed, accidental = ExitStack(), stage_with_accident(given)
        for module in STAGES["validate" if "folder" in given else "build"]:
            changed.enter_context(patch.object(module, "stage", accidental))
        return changed
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
    print(json.dumps([(alone if given.get("alone") else command)(given) for given in json.loads(sys.argv[1])]))
