"""Two artifacts timed in turns on one device: what slows the machine slows both, so their ratio is theirs alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from export import manifest
from export.errors import ExportError
from export.host.console import counted, stage
from runtime_tests.evaluation import SpeedSpec
from runtime_tests.evidence.record import Outcome
from runtime_tests.evidence.regression import Change
from runtime_tests.evidence.release import Turn
from runtime_tests.jobs import SpeedJob
from runtime_tests.places import Place

ROUNDS = 9
"""Pairs of turns before their noise is looked at: the fewest whose interval a single outlier does not decide."""
MOST_ROUNDS = 27
_REPEATS, _TOKENS = 3, 32
"""Of a turn: many short ones tell more than few long ones, for what slows a machine lasts longer than both."""


class NotTimedError(ExportError):
    """The artifact's session is an evaluator, whose speed is nobody's."""


def run(turns: Sequence[Callable[[], Turn]], judge: Callable[[list[tuple[Turn, Turn]]], list[Change]]) -> list[Change]:
    """Time old and new alternately until noise is below the limits, or as often as is worth it.

    Each round begins with the other one, so that a machine that gets slower slows both alike.
    """
    old, new = turns
    rounds: list[tuple[Turn, Turn]] = []
    with counted("turns") as progress, stage("speed", "old and new in turns"):
        while True:
            if len(rounds) % 2:
                second = new()
                rounds.append((old(), second))
            else:
                rounds.append((old(), new()))
            progress(len(rounds), MOST_ROUNDS)
            if len(rounds) < ROUNDS:
                continue
            changes = judge(rounds)
            if len(rounds) >= MOST_ROUNDS or all(change.noise <= change.limit for change in changes):
                return changes


def turn(folder: Path, place: Place, timed: SpeedSpec, limit_s: float) -> Turn:
    """One timing of an artifact in a process of its own. Raises NotTimedError; ExportError: it does not run."""
    described = manifest.read(folder)
    prompt = timed.prompts[0]
    job = SpeedJob(
        folder=str(folder.resolve()),
        threads=place.threads,
        tokens=tuple(i % described.architecture.vocab_size for i in range(prompt)),  # all cost the same
        prompts=(prompt,),
        generate=_TOKENS,
        repeats=_REPEATS,
        warmups=timed.warmups,
    )
    ended = place.run(job, limit_s=limit_s)
    if ended.outcome is not Outcome.PASS:
        raise ExportError(f"{folder}: {ended.outcome.value} while it was timed: {ended.detail}")
    if not ended.result["measured"]:
        raise NotTimedError(f"{folder}: its session here is a reference evaluator")
    (prompts,), answers = ended.result["prompts"].values(), ended.result["decode"]
    return Turn(  # medians, of tokens too: one that the machine interrupted says nothing of the artifact
        decode_ts=1e9 / median(token for answer in answers for token in answer),
        ttft_s=median(prompts) / 1e9,
    )
