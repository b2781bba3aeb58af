"""Jobs of child processes, as JSON: `isolation` starts a child for one, `worker` is the child."""

import json
from typing import Annotated, Literal

from pydantic import Field, RootModel

from export.architecture import Strict
from runtime_tests.evidence.record import Outcome


class SourceError(Exception):
    """The checkpoint is missing or not the one that the artifact was built from."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class Task(Strict):
    """Windows of tokens and the file of their logits."""

    tokens: str
    """.npy, int64 [W, prefill + decode + 1]; the last token is not fed."""
    prefill: int
    out: str
    """.npy to write, float32 [W, decode + 1, V]."""


class LogitsJob(Strict):
    """Run windows of tokens through the artifact's session: prefill, then one token at a time."""

    action: Literal["logits"] = "logits"
    folder: str
    threads: int
    tasks: tuple[Task, ...]


class ConformanceJob(Strict):
    """Feed up to the context limit and past it; reset and repeat."""

    action: Literal["conformance"] = "conformance"
    folder: str
    threads: int
    fill: bool
    """Whether to fill the cache to its last position."""


class GenerateJob(Strict):
    """Greedy tokens after a prompt."""

    action: Literal["generate"] = "generate"
    folder: str
    threads: int
    prompt: tuple[int, ...]
    count: int


class SpeedJob(Strict):
    """Time loading, prompts and generation."""

    action: Literal["speed"] = "speed"
    folder: str
    threads: int
    tokens: tuple[int, ...]
    """At least as many as the longest prompt."""
    prompts: tuple[int, ...]
    generate: int
    repeats: int
    warmups: int


class BandwidthJob(Strict):
    """Measure how fast this machine reads memory."""

    action: Literal["bandwidth"] = "bandwidth"
    threads: int


class WeightsJob(Strict):
    """Read the artifact's weights back and compare them with the quantized model's."""

    action: Literal["weights"] = "weights"
    folder: str
    source: str | None
    cache: str


class ReferenceTask(Task):
    """Logits of one reference model in eager PyTorch."""

    kind: Literal["huggingface", "fp32", "quantized", "noise"]


class ReferenceJob(Strict):
    """Every reference that is not cached, from one reading of the checkpoint."""

    action: Literal["reference"] = "reference"
    folder: str
    source: str | None
    cache: str
    threads: int
    tasks: tuple[ReferenceTask, ...]


class TraceJob(Strict):
    """Compare the parts of an artifact's layers with the eager quantized model's."""

    action: Literal["trace"] = "trace"
    folder: str
    source: str | None
    cache: str
    threads: int
    tokens: tuple[int, ...]


class Opening(Strict):
    """A model of the benchmark and how it is opened."""

    runner: str
    """Module in bench/runners."""
    path: str
    tokenizer: str
    """tokenizer.json, for a runner that takes text."""
    context: int
    """Slots of the KV cache, tokens."""
    threads: int
    kv: str | None = None
    """llama.cpp's type of keys, and of values where it can; null: its own choice."""
    flash_attention: bool | None = None
    """llama.cpp's; null: its own choice."""


class BenchJob(Strict):
    """Time one contender of the benchmark once, in a process of its own."""

    action: Literal["bench"] = "bench"
    opening: Opening
    tokens: tuple[int, ...]
    """At least as many as the longest prompt."""
    prompts: tuple[int, ...]
    """Lengths; generation follows the first."""
    generate: int
    passes: int
    """Timed passes of each kind, after one that is dropped."""
    far_prompt: int
    """Tokens before the one generation that shows the cost of a long context. 0: none."""
    far_generate: int


class DepthsJob(Strict):
    """Time one contender far into a context once, in a process of its own."""

    action: Literal["bench-depths"] = "bench-depths"
    opening: Opening
    prompt: int
    """Tokens of the prompt that is timed on an empty cache."""
    positions: tuple[int, ...]
    """Tokens in the cache when each series of single tokens begins."""
    generate: int
    """Tokens of a series."""


class OverheadJob(Strict):
    """Time the steps of one of our sessions, and the runtime's own calls inside them."""

    action: Literal["bench-overhead"] = "bench-overhead"
    folder: str
    threads: int
    prompt: tuple[int, ...]
    generate: int


class CoreMLJob(Strict):
    """Call a Core ML package in the shapes and states that clients use."""

    action: Literal["core-ml"] = "core-ml"
    folder: str
    compute_units: str | None
    """As a device's YAML has them; null: in the evaluator, and what it answers becomes the reference."""
    threads: int
    """Of the evaluator."""
    steps: int
    """Single tokens in one state."""
    reference: str
    """.npz of its logits."""


class CoreMLPlanJob(Strict):
    """Ask Core ML on which processor it runs each operation."""

    action: Literal["core-ml-plan"] = "core-ml-plan"
    package: str
    compute_units: str


class BenchLogitsJob(Task):
    """Logits of windows of tokens through a contender's runner."""

    action: Literal["bench-logits"] = "bench-logits"
    opening: Opening
    vocab_size: int


class TaskDataJob(Strict):
    """Load the data of lm-evaluation-harness tasks, to list single tasks and count their questions."""

    action: Literal["task-data"] = "task-data"
    tasks: tuple[str, ...]
    folders: tuple[str, ...]
    """Artifacts that will be evaluated; their recipes must not have calibrated on the questions."""


class TasksJob(Strict):
    """Evaluate lm-evaluation-harness tasks and write its results file."""

    action: Literal["tasks"] = "tasks"
    folder: str
    """The artifact; with `eager`, the one whose checkpoint is evaluated."""
    eager: bool
    """The fp32 model of the checkpoint instead of the artifact."""
    source: str | None
    threads: int
    tasks: tuple[str, ...]
    limit: int | None
    """Questions of each task; null: all."""
    chat: bool
    """Whether prompts are written as conversations, by the tokenizer's template."""
    name: str
    """Of the model, in the results."""
    facts: dict[str, str | int | None]
    """More facts about the model for the results."""
    out: str
    """Folder that gets results_DATE.json and samples_TASK_DATE.jsonl."""


Job = (
    LogitsJob
    | ConformanceJob
    | GenerateJob
    | SpeedJob
    | BandwidthJob
    | WeightsJob
    | ReferenceJob
    | TraceJob
    | BenchJob
    | DepthsJob
    | OverheadJob
    | BenchLogitsJob
    | CoreMLJob
    | CoreMLPlanJob
    | TaskDataJob
    | TasksJob
)


Timed = SpeedJob | BandwidthJob | BenchJob | DepthsJob | OverheadJob | CoreMLJob
"""They have a process of their own and nothing beside it, and their threads wait as they do for users."""


class AnyJob(RootModel[Annotated[Job, Field(discriminator="action")]]):
    """Parses a job of any kind."""


def report_progress(done: int, total: int) -> None:
    """Print a line of JSON that the parent process shows as a progress bar."""
    print(json.dumps({"done": done, "total": total}), flush=True)
