"""The evidence about one artifact from one run, as strict JSON. Knows nothing about how it was measured."""

import fcntl
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from export.errors import ExportError
from export.plan import Strict, explain


class Outcome(StrEnum):
    """How validation of an artifact ended: the first thing that went wrong, or `pass`."""

    PASS = "pass"  # noqa: S105 – a verdict, not a password
    INCONCLUSIVE = "inconclusive"
    """Everything holds but the timings were too noisy to judge; does not fail a run."""
    DAMAGED = "damaged"
    """Files differ from the manifest."""
    CONTAMINATED = "contaminated"
    """The recipe calibrated on text of the evaluation, or nothing shows that it did not."""
    TOKENIZER_DIFFERS = "tokenizer differs"
    SOURCE_DIFFERS = "source differs"
    """The checkpoint found now is not the one the artifact was built from."""
    WEIGHTS_DIFFER = "weights differ"
    MISMATCH = "mismatch"
    """Computes something else than its reference, by more than a limit allows."""
    LOAD_FAIL = "load fail"
    RUN_FAIL = "run fail"
    CRASH = "crash"
    """The process died by a signal."""
    TIMEOUT = "timeout"
    TOO_SLOW = "too slow"
    TOO_LARGE = "too large"
    DEVICE_LOST = "device lost"
    """The connection ended, or the device stopped answering."""
    DEVICE_FULL = "device full"
    """Too little room on the device."""


Verdict = Literal["pass", "fail", "inconclusive"]


class Gate(Strict):
    """One measured value against its limit."""

    name: str
    value: float
    limit: float
    rule: Literal["at most", "at least"]
    verdict: Verdict
    fails_as: Outcome
    """The outcome of an artifact that fails here first."""
    detail: str
    """What was found, for people; may be empty."""


class Slice(Strict):
    """Some scored positions of logits that were compared: a text's, a range's, or all of them. KL in nats."""

    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    perplexity: float
    """Of the candidate."""
    reference_perplexity: float


class Comparison(Slice):
    """Logits of a candidate against a reference over all positions of the evaluation windows."""

    max_kl: float
    perplexity_error: float
    reference_perplexity_error: float
    sqnr_db: float
    max_abs_error: float
    max_relative_error: float
    """Largest difference over the largest reference logit."""
    kl_by_step: tuple[float, ...]
    """Mean over windows: after the prefill, then after each decode step."""
    kl_by_window: tuple[float, ...]
    by_domain: dict[str, Slice]
    """Every language or kind of text."""
    by_position: dict[str, Slice]
    """The end of the prefill, then the decoded tokens by their place in the context (`evaluation.position_ranges`)."""


class Accuracy(Strict):
    """The comparisons; null where a step before it ended the run. Gates judge all but `total`."""

    evaluation: str
    prefill: int
    decode: int
    domains: tuple[str, ...]
    """Of each window."""
    total: Comparison | None
    """Hugging Face fp32 → the artifact as shipped: everything that is lost."""
    rewriting: Comparison | None
    """Hugging Face fp32 → our fp32."""
    quantization: Comparison | None
    """Our fp32 → our quantized model."""
    noise: Comparison | None
    """Our quantized model → itself with float noise of one ulp, where it quantizes activations: what no lowering can
    do better than."""
    lowering: Comparison | None
    """Our quantized model → the artifact in its runtime."""
    probe_sqnr_db: tuple[float, ...]
    """The same for single-token prompts, one number each; empty when the target asks for none."""


class SpeedTest(Strict):
    """Repeats of one timing, in the field names of llama-bench. `n_gen` 0: prompt; else generation."""

    n_prompt: int
    n_gen: int
    avg_ns: float
    stddev_ns: float
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    """One whole prompt, or all of n_gen tokens."""
    samples_ts: tuple[float, ...]
    """Tokens per second of each sample."""


class Latency(Strict):
    """Timings through the session in a process of its own. Sampling and tokenization are not in them."""

    measured: bool
    note: str
    """Why not, when not measured."""
    n_threads: int
    model_size: int
    """Bytes of the artifact."""
    model_n_params: int
    load_s: float
    first_inference_s: float
    """The first prompt after loading, when runtimes pack weights."""
    ttft_p50_s: float
    """Median seconds from giving the shortest prompt to its logits."""
    tests: tuple[SpeedTest, ...]
    token_p50_s: float
    token_p95_s: float
    token_samples_ns: tuple[tuple[int, ...], ...]
    """Every decoded token of every repeat."""
    cv: float
    """Largest standard deviation over mean among the tests."""
    first_third_ts: float
    """Decode rate over the first third of all generated tokens."""
    last_third_ts: float
    """Over the last third: lower where the device throttles."""
    peak_rss_bytes: int
    rss_before_load_bytes: int
    bytes_per_token: int
    """Weights one decoded token must read: linears and head; of the embedding one row, not counted."""
    read_bandwidth_bytes_per_s: float | None
    """Measured; null where nothing there can measure it."""
    bandwidth_share: float | None
    """bytes_per_token × decode rate over the measured read bandwidth."""


class Environment(Strict):
    """The machine and the software the numbers belong to."""

    os: str
    cpu: str
    cores: int
    memory_bytes: int
    load_average_1min: float | None
    python: str
    """Empty where the runner needs none."""
    tools: dict[str, str]


class DeviceState(Strict):
    """What a device says of itself at one moment; null where it does not tell."""

    temperatures_c: dict[str, float]
    """By thermal zone."""
    battery_percent: float | None
    charging: bool | None
    governor: str | None
    """Of the first core's clock."""
    online_cores: str | None
    """As the kernel writes it: 0-7."""
    affinity: str | None
    """Cores a new process may use, likewise."""
    load_average_1min: float | None
    uptime_s: float | None


class PlanKey(Strict):
    """What was built and how it was judged, as short hashes: numbers of runs that share all of them can be compared."""

    model: str
    """The plan's model and the checkpoint's files."""
    recipe: str
    target: str
    context: str
    """Slots of the KV cache."""
    evaluation: str
    """With its texts."""

    def differs_in(self, other: "PlanKey") -> list[str]:
        """Names of the fields that are not the same."""
        return [name for name, value in self if getattr(other, name) != value]


class Record(Strict):
    """One artifact, one run."""

    schema_version: Literal[4]
    run_id: str
    proof: str
    """What was proven and with what, as one sha256 (`proven.key`); empty where the machine is another one."""
    artifact: str
    manifest_sha256: str
    plan_key: PlanKey
    size_bytes: int
    bits_per_weight: float
    device: str
    emulated: bool
    """What it computes counts, how long it takes does not."""
    environment: Environment
    state_before: DeviceState
    state_after: DeviceState
    """Around the timings."""
    commit: str
    dirty: bool
    started_at: str
    """UTC, ISO 8601."""
    seconds: float
    gates: tuple[Gate, ...]
    accuracy: Accuracy
    latency: Latency | None
    outcome: Outcome
    detail: str

    @property
    def timings(self) -> Latency | None:
        """What may be shown as its speed: nothing of an emulated device."""
        return None if self.emulated else self.latency

    @property
    def holds(self) -> bool:
        """No gate failed and nothing died."""
        return self.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE)


def append(record: Record, path: Path) -> None:
    """Add one line of JSON to a records file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # unbuffered: nothing is written once more when the file is closed
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.seek(0, os.SEEK_END)
        line = record.model_dump_json().encode() + b"\n"
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def newest_run(path: Path, device: str) -> list[Record]:
    """The records of the last run on a device; older runs may be of other versions and are not read."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    of_device = [(number, line) for number, line in enumerate(lines, start=1) if field(line, "device") == device]
    newest = field(of_device[-1][1], "run_id") if of_device else None
    records = []
    for number, line in of_device:
        if field(line, "run_id") == newest:
            try:
                records.append(Record.model_validate_json(line))
            except ValidationError as error:
                what = explain(error)[:300]
                raise ExportError(f"{path}, line {number}: not a record of this version: {what}; run again") from None
    return records


def newest_of(path: Path, manifest_sha256: str) -> Record | None:
    """The last record of one build of an artifact; null: never validated, or by another version of this code."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        if field(line, "manifest_sha256") == manifest_sha256:
            try:
                return Record.model_validate_json(line)
            except ValidationError:
                return None
    return None


def newest_on(path: Path, manifest_sha256: str, device: str) -> Record | None:
    """The last record of one build of an artifact on one device, likewise."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        if field(line, "manifest_sha256") == manifest_sha256 and field(line, "device") == device:
            try:
                return Record.model_validate_json(line)
            except ValidationError:
                return None
    return None


def field(line: str, name: str) -> str | None:
    """One text of a line of JSON, of whatever version; None where it has none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None
