"""Every way a child process can end is told, and none is left behind. What a job makes of it: test_isolation."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from queue import SimpleQueue

import psutil
import pytest

from export import manifest
from export.host import processes
from export.host.processes import BackgroundProcess, LimitedWorker, LimitError, Limits
from tests.support.processes import left_running


def run(text, **options):
    return processes.run([sys.executable, "-c", text], cwd=manifest.ROOT, **options)


def test_a_signal_has_its_name_or_its_number():
    assert processes.signal_name(11) == "SIGSEGV"
    assert processes.signal_name(99) == "signal 99"


def test_the_last_line_is_not_blank():
    assert processes.last_line("first\n second \r\n\n  \n") == "second"
    assert processes.last_line(" \n") == ""


def test_an_ended_process_tells_all():
    ended = run("import sys; x = b'1' * 10**8; print(sys.stdin.read()); sys.exit('why')", given=b"given")
    assert (ended.returncode, ended.out, ended.last_words) == (1, "given\n", "why")
    assert ended.seconds < 60
    assert 10**8 < ended.peak_rss_bytes < 10**10


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1), ("freebsd14", 1024)])
def test_the_kernels_peak_is_in_bytes(platform, unit):
    usage = resource.struct_rusage((0.0, 0.0, 5, *range(13)))
    assert processes.peak_bytes(usage, platform) == 5 * unit


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_a_group_that_has_ended_is_ended(monkeypatch, error):
    """macOS answers EPERM where nothing but zombies is left."""
    monkeypatch.setattr(os, "killpg", lambda *_: (_ for _ in ()).throw(error))
    assert run("print(1)").out == "1\n"


def test_a_large_input_that_nobody_reads_holds_up_nothing():
    assert run("pass", given=bytes(2**22), limit_s=60).returncode == 0


def test_only_the_end_of_long_outputs_is_kept():
    ended = run("print('a' * 2**23); print('end')")
    assert len(ended.out) == processes.OUTPUT_BYTES
    assert processes.last_line(ended.out) == "end"


def test_a_log_takes_both_outputs(tmp_path):
    with (tmp_path / "log").open("w+b") as log:
        ended = run("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')", log=log)
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert (ended.out, ended.err) == ("", "out\nerr\n")


def test_what_raises_while_a_child_runs_ends_it():
    marker = f"marker{os.getpid()}"

    def interrupted(line):
        if line == marker:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(f"import time; print('{marker}', flush=True); time.sleep(600)", watch=interrupted)
    assert left_running(marker) == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_child_ends_with_its_parent(tied):
    """The parent is killed; the twin's child does not look."""
    marker = f"marker{tied}{os.getpid()}"
    child = (
        f"{'from export.host import processes; processes.end_with_parent()' if tied else ''}\nimport time # {marker}\n"
    )
    parent = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child + 'print(1); time.sleep(9)'!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", f"{parent}; c.wait()"], cwd=manifest.ROOT) as started:
        time.sleep(2)
        started.kill()
    assert bool(left_running(marker, 3)) is not tied
    assert left_running(marker, 30) == []


def test_a_child_whose_parent_ended_before_it_looked_ends_too(tmp_path):
    marker, begun = f"marker{os.getpid()}", tmp_path / "begun"
    child = (
        f"import os, time # {marker}\nparent = os.getppid(); open({str(begun)!r}, 'w').close()\n"
        "while os.getppid() == parent: time.sleep(0.05)\n"
        "from export.host import processes; processes.end_with_parent(); time.sleep(600)"
    )
    parent = (
        f"import sys; from export.host import processes as p; p.run([sys.executable, '-c', {child!r}], cwd=p.Path())"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=manifest.ROOT) as started:
        while not begun.exists():
            assert started.poll() is None
            time.sleep(0.05)
        started.kill()
    assert left_running(marker, 30) == []


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('error: no')", "no"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, perhaps out of memory"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("1 / 0", "exit code 1, see above"),
        ("", None),
    ],
)
def test_why_a_child_failed(program, words):
    ended = SimpleQueue()
    child = BackgroundProcess("a", [sys.executable, "-c", program], print, ended.put)
    assert ended.get(timeout=60) is child
    assert child.failure == words


@pytest.fixture
def worker(tmp_path):
    """A worker whose function `answer` has this body."""
    started = []

    def make(body):
        script = tmp_path / f"script{len(started)}.py"
        script.write_text(f"import os, signal, time\ndef answer(given):\n    {body}\n")
        started.append(LimitedWorker(script))
        return started[-1]

    yield make
    for one in started:
        one.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended without an answer \(SIGKILL\)"),
        ("os._exit(3)", r"ended without an answer \(exit 3\)"),
        ("time.sleep(60)", "did not end within 1 s of work"),
        ("while True: pass", "did not end within 1 s of work"),
        ("return bytearray(2**30) and ''", "took more than 256 MB"),
        # as on macOS, which sets no limit
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); kept = b'1' * 2**30; time.sleep(60)",
            "took more than 256 MB",
        ),
        ("return 'a' * 2**23", "gave more than 4 MB"),
        ("return {}['a']", "KeyError: 'a'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ],
)
def test_every_way_an_answer_can_fail(worker, tmp_path, body, words):
    asked = worker(body)
    with pytest.raises(LimitError, match=f"^{words}$"):
        asked.ask({}, Limits(cpu_s=1, wall_s=3.0))
    left = [child.cmdline() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [words for words in left if str(tmp_path / "script0.py") in words]


def test_a_worker_answers_one_request_after_the_other_each_within_its_limits(worker):
    asked = worker("print('noise'); end = time.process_time() + 0.7\n    while time.process_time() < end: pass\n"
                   "    return given['text']")  # fmt: skip
    for text in ("\ud800", "as it is\n", "3", "4"):  # 2.8 s in all
        assert asked.ask({"text": text}, Limits(cpu_s=2)) == text


def test_a_worker_that_failed_answers_the_next_request(worker):
    asked = worker("return given['text'] if 'text' in given else os._exit(1)")
    with pytest.raises(LimitError):
        asked.ask({}, Limits())
    assert asked.ask({"text": "a"}, Limits()) == "a"


def test_a_worker_ends_with_its_owner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def answer(given): return ''")
    code = (
        "import os; from export.host.processes import *; from pathlib import Path\n"
        f"LimitedWorker(Path({str(script)!r})).ask({{}}, Limits()); os.kill(os.getpid(), 9)"
    )
    assert run(code).returncode == -signal.SIGKILL
    assert left_running(str(script)) == []


def test_a_worker_starts_without_torch_and_this_process_keeps_no_limit(worker):
    body = "import sys; return ' '.join(sys.modules)"
    assert not {"torch", "export", "transformers"} & set(worker(body).ask({}, Limits()).split())
    assert len(bytearray(2**29)) == 2**29


def test_nothing_forks_in_a_process_that_may_hold_torch():
    """macOS aborts such children; the lab is Linux, and knows no torch."""
    for path in (path for room in ("export", "runtime_tests") for path in (manifest.ROOT / room).rglob("*.py")):
        assert not re.search(r"\bos\.fork|preexec_fn|[\"']fork[\"']", path.read_text()), path


@pytest.mark.parametrize(("given", "then"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_of_a_build_wait_asleep_unless_the_user_says_otherwise(given, then):
    code = (
        "import os, runpy, sys\nsys.argv = ['export', '--help']\n"
        "try: runpy.run_module('export', run_name='__main__')\nexcept SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    around = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{then} False"
