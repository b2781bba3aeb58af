"""The record of one validation of one artifact, as strict JSON."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from export.architecture import Strict
from export.errors import ExportError, explain
from export.host import disk
from export.host.text import visible
from export.manifest import Commit
from export.plan import FileName, Name
from export.toolbox import evidence


class Outcome(StrEnum):
    """How validation of an artifact ended: the first thing that went wrong, or `pass`."""

    PASS = "pass"  # noqa: S105 – a verdict, not a password
    INCONCLUSIVE = "inconclusive"
    """Everything holds but the timings were too noisy to judge; does not fail a run."""
    DAMAGED = "damaged"
    """Files differ from the manifest."""
    CONTAMINATED = "contaminated"
    """The recipe calibrated on text of the evaluation, or that cannot be ruled out."""
    TOKENIZER_DIFFERS = "tokenizer differs"
    SOURCE_MISSING = "source missing"
    """The checkpoint, or a file of it, is not found."""
    SOURCE_DIFFERS = "source differs"
    """The checkpoint is not the one that the artifact was built from."""
    WEIGHTS_DIFFER = "weights differ"
    MISMATCH = "mismatch"
    """Differs from its reference by more than a limit allows."""
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
    """For people; may be empty."""


class Slice(Strict, evidence.Loss):
    """Compared logits of some scored positions: those of a domain, of a range, or all. KL in nats."""

    positions: int
    p99_kl: float
    perplexity: float
    """Of the candidate."""
    reference_perplexity: float


class Comparison(Slice):
    """Logits of a candidate against a reference over all scored positions."""

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
    top1_by_window: tuple[float, ...] = ()
    """Empty in records of older versions."""
    by_domain: dict[str, Slice]
    """Every language or kind of text."""
    by_position: dict[str, Slice]
    """The end of the prefill, then the decoded tokens by their place in the context (`evaluation.position_ranges`)."""


class Accuracy(Strict, evidence.Losses):
    """The comparisons; null where the run ended before. Gates judge all but `total`."""

    evaluation: Name
    prefill: int
    decode: int
    domains: tuple[str, ...]
    """Of each window."""
    windows: str = ""
    """sha256 of the tokens that were fed: losses are compared where it is equal. Empty in records of older versions."""
    total: Comparison | None
    quantization: Comparison | None
    lowering: Comparison | None
    rewriting: Comparison | None
    """Hugging Face fp32 → our fp32."""
    noise: Comparison | None
    """Our quantized model → itself with float noise of one ulp, where it quantizes activations: no lowering can lose
    less."""
    cache: Comparison | None = None
    """Our quantized model, whose cache is float32 → the artifact, near places of its context (`by_position`), where its
    kind of cache has limits of its own."""
    probe_sqnr_db: tuple[float, ...]
    """Of the lowering, for each single-token prompt; empty where the target has no limit for them."""


class SpeedTest(Strict, evidence.Rate):
    """The same repeats in time as well."""

    avg_ns: float
    stddev_ns: float
    samples_ns: tuple[int, ...]
    """One whole prompt, or all of n_gen tokens."""


class Latency(Strict, evidence.Timings):
    """Timings through the session in a process of its own, without sampling and tokenization."""

    measured: bool
    note: str
    """Why not, when not measured."""
    n_threads: int
    model_size: int
    """Bytes of the artifact."""
    model_n_params: int
    load_s: float
    first_inference_s: float
    """Of the first prompt after loading, when runtimes pack weights."""
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
    rss_before_load_bytes: int
    bytes_per_token: int
    """Weights one decoded token must read: linears and head; of the embedding one row, not counted."""
    read_bandwidth_bytes_per_s: float | None
    """As measured; null on devices where it cannot be."""
    bandwidth_share: float | None
    """bytes_per_token × decode rate over the measured read bandwidth."""

    @model_validator(mode="after")
    def _prompts_then_generation(self) -> Self:
        *prompts, generation = self.tests or (None,)
        if not prompts or not all(test.n_prompt for test in prompts) or not (generation and generation.n_gen):
            raise ValueError("tests are not prompts, then generation")
        return self


class Environment(Strict, evidence.Machine):
    """The machine and the software of a measurement."""

    os: str
    memory_bytes: int
    load_average_1min: float | None
    python: str
    """Empty where the runner needs none."""
    tools: dict[str, str]


class DeviceState(Strict):
    """The state of a device at one moment; null where the device does not report it."""

    temperatures_c: dict[str, float]
    """By thermal zone."""
    battery_percent: float | None
    charging: bool | None
    """Whether it is on mains: charging, or charged, or kept where it is."""
    low_power: bool | None = None
    """Whether its user has it save energy."""
    governor: str | None
    """Of the first core's clock."""
    online_cores: str | None
    """As the kernel writes it: 0-7."""
    affinity: str | None
    """Cores that a new process may use, written likewise."""
    load_average_1min: float | None
    uptime_s: float | None


class PlanKey(Strict):
    """Short hashes of what was built and how it was judged; runs with equal keys can be compared."""

    model: str
    """The plan's model and the checkpoint's files."""
    recipe: str
    target: str
    context: str
    """Slots of the KV cache."""
    evaluation: str
    """With its texts."""

    def differs_in(self, other: "PlanKey") -> list[str]:
        """Names of the fields that differ."""
        return [name for name, value in self if getattr(other, name) != value]


class Made(Strict):
    """What an artifact is made of, in words: between two releases of it, these are what may have changed."""

    name: str
    family: str
    """The model and its shapes, whatever its weights."""
    target: Name
    context: int
    """Slots of the KV cache."""
    recipe: dict[str, str]
    """Each of its settings by its dotted name."""
    checkpoint: str
    """Its origin, and the first digits of what was there."""
    tools: dict[str, str]
    code: str
    """The commit of ours that built it."""


class Record(Strict, evidence.Validation):
    """All results of one run about one artifact."""

    schema_version: Literal[4]
    run_id: Name
    proof: str
    """`proof.key`: the sha256 of what was proven, and with what; empty for an attached device."""
    artifact: FileName
    plan_key: PlanKey
    size_bytes: int
    bits_per_weight: float
    environment: Environment
    state_before: DeviceState
    state_after: DeviceState
    """Around the timings."""
    commit: Commit
    dirty: bool | None
    seconds: float
    gates: tuple[Gate, ...]
    accuracy: Accuracy
    latency: Latency | None
    outcome: Outcome
    detail: str
    folder: str = ""
    """Of the artifact, as `folder_text` writes it; empty in records of older versions."""
    notes: tuple[str, ...] = ()
    """What the artifact claims beside what it was judged by."""
    made: Made | None = None
    """None in records of older versions."""

    @property
    def timings(self) -> Latency | None:
        """The timings that may be shown as its speed; None for an emulated device."""
        return self.latency if self.timed else None


def folder_text(folder: Path) -> str:
    """An artifact's folder as a record holds it: relative where it lies below the working folder."""
    absolute, here = folder.resolve(), Path.cwd()
    return visible(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute))


def append(record: Strict, path: Path) -> None:
    """Add one line of JSON to a records file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # unbuffered: closing must not write the rest again
        disk.wait_for_lock(file)
        before = file.seek(0, os.SEEK_END)
        line = record.model_dump_json().encode() + b"\n"
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def newest_run(path: Path, device: str) -> list[Record]:
    """The records of the last run on a device; older runs may be of other versions. Raises ExportError."""
    lines = enumerate(evidence.lines(path), start=1)
    of_device = [(number, line) for number, line in lines if field(line, "device") == device]
    newest = field(of_device[-1][1], "run_id") if of_device else None
    records = []
    for number, line in of_device:
        if field(line, "run_id") == newest:
            records.append(_parsed(line, path, number))
    return records


def _parsed(line: str, path: Path, number: int) -> Record:
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        reason = explain(error)[:300]
        raise ExportError(f"{path}, line {number}: not a record of this version: {reason}; run again") from None


def newest_of_each(path: Path, device: str) -> list[Record]:
    """The last record of every build in a file, on a device. Raises ExportError: one is of another version."""
    newest: dict[str, Record] = {}
    for number, line in enumerate(evidence.lines(path), start=1):
        if field(line, "device") == device:
            run = _parsed(line, path, number)
            newest[run.manifest_sha256] = run
    return list(newest.values())


def newest_of(path: Path, **texts: str) -> Record | None:
    """The last record whose fields have these values; None: there is none, or it is of another version."""
    for line in reversed(list(evidence.lines(path))):
        if all(field(line, name) == text for name, text in texts.items()):
            try:
                return Record.model_validate_json(line)
            except ValidationError:
                return None
    return None


def field(line: str, name: str) -> str | None:
    """A text field of a line of JSON, of whatever version; None where it has none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, str) else None
