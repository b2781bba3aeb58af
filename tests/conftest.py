"""Fixtures for all tests: artifacts of the tiny model, the commands, devices of the lab."""

import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

import devices
import export.formats
import runtime_tests.sessions
from export import manifest, pipeline
from export.__main__ import app as export_app
from export.build.command import run as run_app
from export.checkpoints import tokenizer, whereabouts
from export.formats import clients
from export.host import disk
from export.host.processes import LimitedWorker
from export.plan import ModelSpec, Plan, QuantRecipe, load_named, load_plan, names
from runtime_tests import __main__ as cli
from runtime_tests import evaluation, places
from runtime_tests.checks import limits
from runtime_tests.checks.subject import Setting
from runtime_tests.jobs import isolation, worker
from tests.support.artifacts import TARGET, export_with
from tests.support.processes import FAKES, arguments, emulated

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for tests that import onnxruntime or genai themselves, and their children
for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):  # a make that a test runs is nobody's sub-make
    os.environ.pop(name, None)
for number in (signal.SIGINT, signal.SIGTERM):  # a runner that starts the tests in the background may have them ignored
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@cache
def kept(script):
    """A worker for all tests of this process that use its script: a build, which uses it once, closes it at once."""
    worker = LimitedWorker(script)
    return SimpleNamespace(ask=worker.ask, close=lambda: None)


@pytest.fixture(scope="session", autouse=True)
def plugged_in(tmp_path_factory):
    """The fake format is found by name, as a real one is, and so are the limits of its target."""
    for package, name in ((export.formats, "backends"), (runtime_tests.sessions, "sessions")):
        package.__path__.append(str(FAKES / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whereabouts, "FOLDER", tmp_path_factory.mktemp("origins"))
        for module in (tokenizer, clients):
            patch.setattr(module, "LimitedWorker", kept)
        patch.setattr(limits, "names", lambda kind: [*names(kind), "fake"])
        known = {"fake": TARGET}
        patch.setattr(limits, "load_named", lambda cls, kind, name: known.get(name) or load_named(cls, kind, name))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder that all processes of this run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def store(shared):
    """Quantized weights and reference logits, made once: GPTQ's integers depend on a process's number of threads."""
    folder = shared / "store"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory, plugged_in, store):
    """An artifact of the tiny model in the fake format; tests must not change it."""
    out = tmp_path_factory.mktemp("build") / "tiny"
    plan = Plan(
        model=load_named(ModelSpec, "models", "tiny"), quant=load_named(QuantRecipe, "quant", "int4-g32"), target=TARGET
    )
    return export_with(store, plan, out)


def once(shared, store, plan):
    """The artifact of a plan, built by the first of all processes of this run that needs it."""
    made = shared / f"{plan.model.name}-{hashlib.sha256(plan.model_dump_json().encode()).hexdigest()[:16]}"
    with disk.turn(made.with_suffix(".turn")):
        if not made.is_dir():
            export_with(store, plan, made)
    return made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, shared, store):
    """Builds the tiny model for a target, once for all processes of this run; tests must not change it."""

    @cache
    def build(target, quant="int4-g32", kind=None, policy=None, **model):
        plan = load_plan("tiny", quant, target, cache=kind, policy=policy)
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=model)})
        return shutil.copytree(once(shared, store, plan), tmp_path_factory.mktemp("tiny") / plan.id)

    return build


@pytest.fixture(scope="session")
def real(shared):
    """Builds the default model, rounded to nearest, for a target, likewise, in one folder for all."""
    return lambda target: once(shared, pipeline.CACHE, load_plan("smollm2-135m", "int4-g32", target))


LONGEST = (
    "devices/test_emulated.py", "build/test_folder.py", "formats/test_stock_clients.py",
    "jobs/test_killed_validation.py", "build/test_parallel.py", "formats/cards/test_python.py",
)  # fmt: skip
"""Files of a minute and more, which begin first: no process is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    """The longest files first; tests of what only Linux has are skipped elsewhere."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    if not sys.platform.startswith("linux"):
        for item in items:
            if item.get_closest_marker("linux"):
                item.add_marker(pytest.mark.skip(f"not on {sys.platform}"))


@pytest.fixture(scope="session")
def small_disk():
    """Wraps a command so that it sees a small disk of its own at a folder, and lists that folder at the end."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-r", "-m"]
    try:
        probe = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no `unshare`: a small disk cannot be mounted")
    if probe.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {probe.stderr.decode().strip()}")

    def run(folder, orders, options="size=32m"):
        folder.mkdir(exist_ok=True)
        script = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))} && {shlex.join(arguments(*orders))}"
        done = subprocess.run(
            [*unshare, "sh", "-c", script], cwd=manifest.ROOT, capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def artifact(built, tmp_path):
    """A copy of the artifact that a test may break."""
    return shutil.copytree(built, tmp_path / "artifact")


@pytest.fixture
def setting(tmp_path, store):
    """A short evaluation on a device that is never too slow or too noisy."""
    texts = [
        {"domain": "wikitext", "file": "wikitext2.txt", "windows": 2},
        {"domain": "german", "file": "udhr/de.txt", "windows": 1},
    ]
    fields = {
        "name": "short",
        "description": "",
        "prefill": 16,
        "decode": 64,
        "texts": texts,
        "max_rewriting_error": 1e-4,
        "max_filled_context": 1024,
        "speed": {"prompts": [8, 24], "generate": 4, "repeats": 5, "warmups": 1},
    }
    device = devices.load("host").model_copy(update={"targets": ("fake",), "max_cv": 1e9, "time_limit_s": 120.0})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Setting(
        run_id="run",
        device=device,
        place=places.ThisMachine(1),
        threads=1,
        evaluation=evaluation.Evaluation.model_validate(fields),
        source=None,
        limits=None,
        cache=store,
        scratch=scratch,
        read_bandwidth_bytes_per_s=1e10,
    )


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run in this process instead of a child: seconds instead of minutes, where no process has to die.

    Folders that a test puts into the list it is given have theirs in children all the same.
    """
    dangerous, in_a_child = [], isolation.run

    def run(job, **options):
        if str(getattr(job, "folder", None)) in map(str, dangerous):
            return in_a_child(job, **options)
        reply = worker.answer(job)
        return isolation.interpret(0 if "result" in reply else 1, json.dumps(reply), "")

    monkeypatch.setattr(isolation, "run", run)
    return dangerous


@pytest.fixture
def command(monkeypatch, tmp_path, setting):
    """`python -m runtime_tests` with real child processes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(isolation, "WORKER", (sys.executable, str(FAKES / "worker.py")))
    monkeypatch.setattr(cli.devices, "load", lambda name: setting.device)
    monkeypatch.setattr("runtime_tests.evaluation.load", lambda name: setting.evaluation)
    monkeypatch.setattr(cli, "BUILD", tmp_path / "build")
    monkeypatch.setattr(cli, "CACHE", setting.cache)
    (tmp_path / "build").mkdir()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["runtime_tests", *map(str, arguments)])
        return run_app(cli.app)

    return run


@pytest.fixture
def export_command(monkeypatch, capsys):
    """`python -m export inspect|diff|verify|sign …`: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        code = run_app(export_app)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture(scope="session")
def emulated_android():
    """A running arm64 adbd, shared by tests that do not damage it."""
    with emulated("emulated-android") as machine:
        yield machine


@pytest.fixture(scope="session")
def emulated_pi5():
    """A running arm64 sshd, shared likewise."""
    with emulated("emulated-pi5") as machine:
        yield machine


@pytest.fixture
def one_process():
    """Meta's layers are model-parallel: a group of one."""
    import fairscale.nn.model_parallel.initialize as parallel
    import torch

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def notes():
    """Warnings of `devices`, however logging is set up in this process."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("devices").addHandler(handler)
    yield lines
    logging.getLogger("devices").removeHandler(handler)


@pytest.fixture(scope="module")
def attach(request, tmp_path_factory):
    """Opens a known device by name; a device of the lab is started for that, unless `machine` is given.

    Returns its transport and the path of its working folder on this machine.
    """
    with ExitStack() as stack:

        def attach(name, machine=None):
            device = devices.load(name)
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if device.emulated:
                machine = machine or request.getfixturevalue(name.replace("-", "_"))
                for key, value in machine.environment.items():
                    patch.setenv(key, value)
                folder = machine.data / Path(device.workdir).name
            else:
                folder = tmp_path_factory.mktemp("device")
                device = device.model_copy(update={"workdir": str(folder)})
            return stack.enter_context(closing(devices.open_transport(device))), folder

        yield attach
