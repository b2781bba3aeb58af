"""Timings of an artifact against its device's budgets; a hot device gets time to cool down first.

Speeds of another run are no gate: what slowed the machine between the two is not known. `race` times in turns.

`latency` measures in the child process; what is imported here is not counted as memory of the artifact.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices import CoolDown
from export.architecture import EMBEDDING, HEAD
from export.host.console import note, stage
from export.manifest import Manifest
from export.plan import WeightScheme
from export.quantization.schemes import bits_each
from runtime_tests import jobs
from runtime_tests.evaluation import Windows
from runtime_tests.evidence.record import DeviceState, Gate, Latency, SpeedTest

from . import gates
from .subject import Finding, Subject, Timing

_EVERY_S = 5.0


def check(subject: Subject, windows: Windows) -> Finding:
    """Time the artifact on the tokens of these windows; emulated devices are not judged, evaluators not timed."""
    setting, timed = subject.setting, subject.setting.evaluation.speed
    job = jobs.SpeedJob(
        folder=subject.folder_text,
        threads=setting.place.threads,
        tokens=tuple(np.resize(windows.tokens.ravel(), max(timed.prompts)).tolist()),
        prompts=timed.prompts,
        generate=timed.generate,
        repeats=timed.repeats,
        warmups=timed.warmups,
    )
    with stage("speed", f"{timed.repeats} repeats"):
        heat = wait_until_cool(setting.place.state, setting.device.cool_down) if setting.device.cool_down else ""
        state_before = setting.place.state()
        if state_before.charging is False:
            note(f"{setting.device.name} runs on its battery, which some slow down to spare")
        raw = subject.run_on_device(job, "speed")
    if not raw["measured"]:
        return Finding()
    state_after, environment = setting.place.state(), setting.place.environment()
    measured = summarize(raw, subject.manifest, setting.place.threads, setting.read_bandwidth_bytes_per_s)
    return Finding(
        gates=() if setting.device.emulated else tuple(judge(subject, measured, heat or saving(state_before))),
        timing=Timing(environment, state_before, state_after, measured),
    )


def saving(state: DeviceState) -> str:
    """Why timings are in doubt: the device's user has it save energy; empty: that is not so, or not told."""
    return "timed while it saves energy (low-power mode)" if state.low_power else ""


def judge(subject: Subject, measured: Latency, heat: str) -> list[Gate]:
    """Gates of the device's budgets; noise and heat make close calls inconclusive."""
    device = subject.setting.device
    timed = gates.budgets(measured, min_decode_tps=device.budgets.min_decode_tps, max_ttft_s=device.budgets.max_ttft_s)
    return gates.in_doubt(timed, measured, max_cv=device.max_cv, reason=heat)


def wait_until_cool(
    state: Callable[[], DeviceState], rule: CoolDown, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Wait until the hottest zone has cooled to the rule's limit; empty, or that it is still hot at the time limit."""
    waited = 0.0
    while True:
        zones = state().temperatures_c
        if not zones:
            return ""  # the device shows no sensor
        hottest = max(zones, key=lambda zone: zones[zone])
        if zones[hottest] <= rule.max_c:
            return ""
        if waited >= rule.limit_s:
            return f"{hottest} still at {zones[hottest]:.0f} °C after {waited:.0f} s, timed above {rule.max_c:.0f} °C"
        sleep(_EVERY_S)
        waited += _EVERY_S


def speed_test(n_prompt: int, n_gen: int, samples_ns: Sequence[int]) -> SpeedTest:
    """Mean and deviation of samples, in nanoseconds and in tokens per second."""
    times: NDArray[np.float64] = np.array(samples_ns, dtype=np.float64)
    rates = (n_gen or n_prompt) * 1e9 / times
    return SpeedTest(
        n_prompt=0 if n_gen else n_prompt,
        n_gen=n_gen,
        avg_ns=float(times.mean()),
        stddev_ns=float(times.std(ddof=1)),
        avg_ts=float(rates.mean()),
        stddev_ts=float(rates.std(ddof=1)),
        samples_ns=tuple(samples_ns),
        samples_ts=tuple(rates.tolist()),
    )


def summarize(raw: dict[str, Any], described: Manifest, threads: int, bandwidth: float | None) -> Latency:
    """The measurements of the child process as the numbers of a record; `bandwidth` in bytes per second."""
    tests = [speed_test(int(n), 0, samples) for n, samples in raw["prompts"].items()]
    generation = speed_test(0, len(raw["decode"][0]), [sum(repeat) for repeat in raw["decode"]])
    tokens = np.concatenate(raw["decode"]) / 1e9
    third = max(1, len(tokens) // 3)
    per_token = bytes_per_token(described)
    return Latency(
        measured=True,
        note="",
        n_threads=threads,
        model_size=described.artifact_bytes,
        model_n_params=described.architecture.parameters,
        load_s=raw["load_ns"] / 1e9,
        first_inference_s=raw["first_ns"] / 1e9,
        ttft_p50_s=float(np.median(tests[0].samples_ns)) / 1e9,
        tests=(*tests, generation),
        token_p50_s=float(np.quantile(tokens, 0.5)),
        token_p95_s=float(np.quantile(tokens, 0.95)),
        token_samples_ns=tuple(tuple(repeat) for repeat in raw["decode"]),
        cv=max(test.stddev_ns / test.avg_ns for test in (*tests, generation)),
        first_third_ts=float(1 / tokens[:third].mean()),
        last_third_ts=float(1 / tokens[-third:].mean()),
        peak_rss_bytes=raw["peak_rss_bytes"],
        rss_before_load_bytes=raw["rss_before_load_bytes"],
        bytes_per_token=per_token,
        read_bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=per_token * generation.avg_ts / bandwidth if bandwidth else None,
    )


def bytes_per_token(described: Manifest) -> int:
    """Bytes of weights that every decoded token must read: all linears, rotations and the head, with 16-bit scales.

    The one row that is read of the embedding table is not counted. The artifact's size is the upper limit, since float
    weights may be stored in 16 bits.
    """
    architecture = described.architecture
    schemes = {
        layer.name: WeightScheme(bits=layer.bits, group_size=layer.group_size)
        for layer in described.quantization.layers
    }
    if architecture.tie_word_embeddings and EMBEDDING in schemes:
        schemes[HEAD] = schemes[EMBEDDING]
    total = sum(stored_bytes(shape, schemes.get(name)) for name, shape in architecture.all_linear_shapes().items())
    return min(int(total), described.artifact_bytes)


def stored_bytes(shape: tuple[int, int], scheme: WeightScheme | None) -> float:
    """Bytes of the integers and scales of one weight [N, K]; of float32 where it is not quantized."""
    bits = 32.0 if scheme is None else bits_each(scheme, shape[1])
    return shape[0] * shape[1] * bits / 8
