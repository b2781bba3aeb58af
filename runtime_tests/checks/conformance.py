"""What every KV cache must do: where a prompt is cut, at the last position, past it, after a reset, rewind or refusal.

The promises are scripts of the runner protocol, which a session in a child process and a runner on a device execute
alike. Only a session rewinds and goes on after a refusal: the protocol knows no rewind, and a refusal ends a script.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.host.console import stage
from runtime_tests.device_runner import Command, Feed, Logits, Reset
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import ConformanceJob
from runtime_tests.sessions.base import ContextError, Session

from . import accuracy, gates
from .subject import Finding, Subject

_PROBE = 16
_PROMPTS, _LENGTH = 4, 3 * _PROBE
"""Of the prompts that are cut, whose ids below 64 every vocabulary has."""
_CUT_LIMIT = 1 / 3
"""Of what a prompt means without its first third. A bfloat16 cache with int8 activations, whose last bits depend on how
many rows a call has, reaches 0.11 on SmolLM2-135M; a cache whose parts do not know of each other reaches 1."""
_REWIND_LIMIT = 1e-2
_Execute = Callable[[Sequence[Command]], NDArray[np.float32]]
"""Executes a script and returns the rows of logits it asks for, [R, V]."""
_Refuses = Callable[[Sequence[Command]], bool]
"""Executes a script and tells whether one of its commands was refused."""


def check_cache(subject: Subject) -> Finding:
    """The KV cache of an artifact at its limits, where it runs."""
    limit = subject.setting.evaluation.max_filled_context
    fill = subject.manifest.contract.kv.context_length <= limit
    job = ConformanceJob(folder=subject.folder_text, threads=subject.setting.place.threads, fill=fill)
    what = "pieces, last position, past it, reset" if fill else f"pieces, past its end, reset (more than {limit} slots)"
    with stage("cache", what):
        failures = subject.run_on_device(job, "cache")["failures"]
    return Finding((gates.count("cache: broken promises", failures, Outcome.MISMATCH),))


def check(session: Session, context_length: int, *, fill: bool) -> list[str]:
    """Descriptions of the promises that a session breaks; the session is closed."""
    failures = broken_promises(partial(execute, session), partial(_refuses, session), context_length, fill=fill)
    failures += _rewind_failures(session) + _refusal_failures(session)
    session.close()
    return failures


def broken_promises(execute: _Execute, refuses: _Refuses, context_length: int, *, fill: bool) -> list[str]:
    """Promises broken after a reset, in pieces, at the last position (only with `fill`: it feeds all) and past it."""
    first, more = tuple(range(1, _PROBE + 1)), tuple(range(_PROBE + 1, 2 * _PROBE))
    full = tuple(1 + i % _PROBE for i in range(context_length - 1))
    script: list[Command] = [Reset(), Feed(first), Logits(), Feed(more), Reset(), Feed(first), Logits()]
    for prompt in _prompts(context_length):
        ways = [prompt], [prompt[:1], prompt[1:_PROBE], prompt[_PROBE:]], [prompt[_PROBE:]]
        for way in ways:
            script += [Reset(), *map(Feed, way), Logits()]
    if fill:
        script += [Reset(), Feed(full), Feed((1,)), Logits()]
    rows = execute(script)
    before, after, cut, last = *rows[:2], rows[2 : 2 + 3 * _PROMPTS], rows[2 + 3 * _PROMPTS :]
    failures = []
    difference = float(np.abs(before - after).max() / np.abs(before).max())
    if not difference <= 1e-4:
        failures.append(f"after a reset the logits differ by {difference:.1e} of the largest")
    whole, pieces, end = (accuracy.log_softmax(cut[start::3]) for start in range(3))
    lost, most = (float(accuracy.kl_divergence(whole, other).mean()) for other in (pieces, end))
    if not lost <= most * _CUT_LIMIT:
        failures.append(
            f"a prompt in pieces means something else: KL {lost:.2g}, without all but its last piece {most:.2g}"
        )
    if not np.isfinite(last).all():
        failures.append(f"logits at the last position, {context_length - 1}, are not finite")
    too_long: dict[str, list[Command]] = {
        "a token": [Reset(), Feed(first), Feed(full[: context_length - _PROBE + 1])],
        "a prompt that goes": [Reset(), Feed((*full, 1, 1))],
    }
    failures += [
        f"{what} past the context of {context_length} was accepted"
        for what, commands in too_long.items()
        if not refuses(commands)
    ]
    return failures


def _prompts(context_length: int) -> list[tuple[int, ...]]:
    ids = np.random.default_rng(0).integers(1, 64, (_PROMPTS, min(_LENGTH, context_length)))
    return [tuple(row) for row in ids.tolist()]


def _refusal_failures(session: Session) -> list[str]:
    """What is refused leaves the cache as it was: no token, one that the vocabulary lacks, more than there is room."""
    context = list(range(1, _PROBE + 1))
    refused = {"an empty prompt": [], "a token beyond the vocabulary": [1, session.vocab_size]}
    refused["a prompt that is too long"] = [1] * session.context_length
    session.reset()
    session.feed(context)
    expected, failures = session.feed([1]), []
    for what, tokens in refused.items():
        session.reset()
        session.feed(context)
        try:
            session.feed(tokens)
            failures.append(f"{what} was accepted")
        except ValueError:
            if not np.allclose(session.feed([1]), expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max())):
                failures.append(f"{what} was refused and changed the cache")
    return failures


def _rewind_failures(session: Session) -> list[str]:
    """After a rewind a token must give the logits it gave before, and `feed_each` those of feeding one by one."""
    context, more = list(range(1, _PROBE + 1)), list(range(_PROBE + 1, _PROBE + 9))
    session.reset()
    session.feed(context)
    first = np.stack([session.feed([token]) for token in more])
    session.rewind(_PROBE)
    session.feed(more[::-1])
    session.rewind(_PROBE)
    again = session.feed_each(more)
    # kernels for many rows at once differ from those for one row; with quantized activations they round differently
    difference = float(np.linalg.norm(first - again) / np.linalg.norm(first))
    if difference <= _REWIND_LIMIT:
        return []
    return [f"after a rewind the logits differ by {difference:.1e} of their norm"]


def execute(session: Session, script: Sequence[Command]) -> NDArray[np.float32]:
    """A script in a session, as a runner would: the rows of logits that it asks for, [R, V]."""
    rows: list[NDArray[np.float32]] = []
    for command in script:
        match command:
            case Reset():
                session.reset()
            case Feed(tokens):
                logits = session.feed(tokens)
            case Logits():
                rows.append(logits)
    return np.array(rows)


def _refuses(session: Session, script: Sequence[Command]) -> bool:
    try:
        execute(session, script)
    except ContextError:
        return True
    return False
