"""The C++ runner for another processor, under qemu: the same answers and the same errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from devices.lab import roots
from runtime_tests.device_runner import Answer, Feed, Generate, Logits
from tests.device_runner.conftest import built
from tests.support.scripts import PROMPT, random_tokens, steps

QEMU = shutil.which("qemu-aarch64-static") or next(map(str, roots.CACHE.glob("qemu-*/qemu-aarch64")), "")
"""The system's, else the lab's."""


@pytest.fixture(scope="session")
def arm(compiler):
    if not QEMU:
        pytest.skip("qemu-aarch64-static: not found; install qemu-user-static, or make lab")
    return built("aarch64", compiler)


@pytest.mark.parametrize(("model", "bound"), [("fp32", 1e-4), ("int8 cache", 5e-3), ("bfloat16 cache", 0.05)])
@pytest.mark.parametrize("processor", ["cortex-a72", "cortex-a76"])
def test_aarch64_gives_the_same_answers(run, arm, processor, model, bound):
    """Started with its own C library, as on a device without GNU's. a72 has no dot-product instructions, a76 has.

    Measured in float32: 1.9e-5, of logits up to 13. Where keys and values are rounded to int8 and attention's result to
    bfloat16, the last bit of a sum can decide: 1.2e-3 and 9e-3.
    """
    ids = random_tokens(60)
    commands = [Feed(ids[:40]), Logits(), *steps(ids[40:]), Generate(10)]
    emulated = {"prefix": (QEMU, "-cpu", processor), "start": arm.start_alone, "folder": arm.path}
    here, rows = run(commands, model)
    there, emulated_rows = run(commands, model, **emulated)
    assert there.generated[0].tokens == here.generated[0].tokens
    assert np.abs(emulated_rows - rows).max() < bound
    assert run([Feed(PROMPT), Generate(10)], "int4-g32", **emulated)[0].generated[0].tokens == (
        run([Feed(PROMPT), Generate(10)], "int4-g32")[0].generated[0].tokens
    )


def test_aarch64_uses_a_devices_own_c_library_where_there_is_one(run, arm):
    root = Path("/usr/aarch64-linux-gnu")
    if not (root / "lib" / "libstdc++.so.6").exists():
        pytest.skip(f"{root}: no libstdc++.so.6; install libstdc++6-arm64-cross")
    answer, _ = run([Feed(PROMPT)], prefix=(QEMU, "-L", root), folder=arm.path)
    assert isinstance(answer, Answer)


def test_aarch64_errors_are_the_same(run, arm, tmp_path):
    emulated = {"prefix": (QEMU,), "start": arm.start_alone, "folder": arm.path}
    assert run("quit\n", **emulated)[0].stage == "usage"
    assert run([Feed(PROMPT)], tmp_path / "missing.pte", **emulated)[0].stage == "load"
    assert run([Feed((512,))], **emulated)[0].stage == "run"
