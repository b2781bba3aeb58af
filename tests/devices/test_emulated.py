"""The whole command on a real arm64 adbd and a real arm64 sshd: a good artifact passes, a wrong one does not."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from export.formats.pte.file import open_pte, quantized_linears
from export.manifest import ROOT
from runtime_tests.device_runner import build, sdk
from runtime_tests.evidence.record import Outcome, newest_run
from tests.support.artifacts import reseal

PTE, ONNX = "executorch-xnnpack", "onnx-cpu"
TIMED = {
    "decode tokens/s",
    "time to first token, s",
    "decode against baseline, tokens/s",
    "time to first token against baseline, s",
}


@pytest.fixture(scope="module", autouse=True)
def cross_compiled():
    """The runner that goes there."""
    try:
        build.build("aarch64")
    except sdk.UnavailableError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def validate(tmp_path):
    """`python -m runtime_tests` on a running device; gives exit status, records and output."""

    def run(machine, *folders):
        words = [sys.executable, "-m", "runtime_tests", "--device", machine.name, *map(str, folders)]
        environment = {**os.environ, **machine.environment, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=570, check=False
        )
        output = ended.stdout + ended.stderr
        return ended.returncode, newest_run(tmp_path / "build/records/records.jsonl", machine.name), output

    return run


def check_passed(record, machine):
    """Everything is measured there except speed."""
    gates = {gate.name: gate for gate in record.gates}
    assert record.outcome is Outcome.PASS, record.detail
    assert gates["golden tokens"].value == 32
    assert gates["cache: broken promises"].value == 0
    assert record.emulated
    assert record.device == machine.name
    assert not gates.keys() & TIMED
    assert record.accuracy.lowering.positions == 3 * 65
    assert record.latency.first_third_ts > 0
    assert record.latency.last_third_ts > 0
    assert record.state_before.uptime_s <= record.state_after.uptime_s


def files(machine):
    return {path.name for path in machine.data.rglob("*")}


def test_android(validate, tiny, emulated_android, tmp_path):
    """Wrong scales show when the file is read here, and in the results of the device."""
    wrong = shutil.copytree(tiny(PTE), tmp_path / "wrong")
    quadruple_scales(wrong / "model.pte", 64)
    reseal(wrong)
    status, (record, refuted), output = validate(emulated_android, tiny(PTE), wrong)
    check_passed(record, emulated_android)
    assert record.environment.os.startswith("Android")
    assert record.environment.tools.keys() == {"pte"}
    assert status == 1, output
    assert refuted.outcome is Outcome.WEIGHTS_DIFFER
    failed = {gate.name for gate in refuted.gates if gate.verdict == "fail"}
    assert {"weights: differing numbers", "lowering: mean KL", "golden tokens"} <= failed
    assert not files(emulated_android) & {"run", ".lock"}


def test_raspberry_pi(validate, tiny, emulated_pi5):
    status, records, output = validate(emulated_pi5, tiny(PTE), tiny(ONNX))
    assert status == 0, output
    for record in records:
        check_passed(record, emulated_pi5)
        assert record.environment.cpu.startswith("ARMv8")
    assert [set(record.environment.tools) for record in records] == [{"pte"}, {"pte", "onnx"}]
    assert not files(emulated_pi5) & {"run", ".lock"}


def quadruple_scales(path, count):
    """Change the first weight's scales, by one bit of each bf16 exponent."""
    data = bytearray(path.read_bytes())
    _, scales = next(quantized_linears(open_pte(path)))
    stored = torch.from_numpy(scales.copy()).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    start = data.index(stored)
    for place in range(start + 1, start + 2 * count, 2):
        data[place] ^= 1
    path.write_bytes(data)
