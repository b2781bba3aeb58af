"""A study of size and loss as strict JSON, and its page and figure. Measures nothing."""

from collections.abc import Iterable
from pathlib import Path

from export.manifest import Manifest, source_info, tool_versions
from export.plan import Strict, load_named
from export.progress import console

from .. import environment
from ..evaluation import Evaluation
from ..record import Environment, Outcome
from . import domain_table, publish, scatter
from .conditions import conditions
from .results import Fidelity
from .table_text import markdown

WORDS = """\
# Size and loss

Mean KL divergence in nats from the float32 checkpoint to each file as it ships, through the runtime that runs it: \
prefill of {prefill} tokens, then {decode} tokens one by one, {positions:,} positions in all. The evaluation \
`{evaluation}` ({description}); the kinds count alike. None of its text is calibration text. The checkpoint: \
{checkpoint}.

"""


class Judged(Strict):
    """One file, and how far it is from the checkpoint."""

    label: str
    runtime: str
    size_bytes: int
    ours: bool
    fidelity: Fidelity


class Study(Strict):
    """One run."""

    model: str
    evaluation: str
    checkpoint: str
    rows: tuple[Judged, ...]
    environment: Environment
    commit: str
    tools: dict[str, str]


def study(model: str, evaluation: str, described: Manifest, rows: Iterable[Judged]) -> Study:
    """A finished run with what surrounds it."""
    return Study(
        model=model,
        evaluation=evaluation,
        checkpoint=described.checkpoint.description,
        rows=tuple(rows),
        environment=environment.current(),
        commit=source_info().commit,
        tools=tool_versions(),
    )


def write(found: Study, name: str, command: str) -> list[Path]:
    """docs/NAME.md, NAME.json and NAME.svg."""
    docs = publish.DOCS
    paths = [
        publish.write(docs / f"{name}.json", found.model_dump_json() + "\n"),
        publish.write(docs / f"{name}.svg", figure(found)),
        publish.write(docs / f"{name}.md", render(found, name, command)),
    ]
    console.print(f"  {len(found.rows)} rows")
    return paths


def render(found: Study, name: str, command: str) -> str:
    """The page."""
    evaluation = load_named(Evaluation, "evals", found.evaluation)
    head = WORDS.format(
        prefill=evaluation.prefill,
        decode=evaluation.decode,
        positions=max(row.fidelity.positions for row in found.rows),
        evaluation=found.evaluation,
        description=evaluation.description,
        checkpoint=found.checkpoint,
    )
    foot = conditions(command, found.environment, found.commit, found.tools)
    return f"{head}{markdown(domain_table.rows(found.rows))}\n\n![mean KL over size]({name}.svg){foot}"


def figure(found: Study) -> str:
    """Every file's mean KL over its size."""
    points = [
        scatter.Point(row.size_bytes / 1e6, domain_table.overall(row.fidelity), f"{row.label}", row.ours)
        for row in found.rows
        if row.fidelity.outcome is Outcome.PASS
    ]
    return scatter.draw(points, "mean KL over size", "MB", "mean KL of all kinds, nats")
