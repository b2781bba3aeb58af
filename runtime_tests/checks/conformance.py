"""What every KV cache must do: where a prompt is cut, at the last position, past it, after a reset, rewind or refusal.

The promises are scripts of the runner protocol, which a session in a child process and a runner on a device execute
alike. Only a session goes on after a refusal, which ends a script.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.host.console import stage
from runtime_tests.device_runner import Command, Feed, Logits, Reset, Rewind
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
_FIRST, _MORE = tuple(range(1, _PROBE + 1)), tuple(range(_PROBE + 1, 2 * _PROBE))
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


@dataclass(frozen=True)
class _Promise:
    """A script, and what its rows of logits say is broken."""

    script: Sequence[Command]
    broken: Callable[[NDArray[np.float32]], Iterator[str]]


def check(session: Session, context_length: int, *, fill: bool) -> list[str]:
    """Descriptions of the promises that a session breaks; the session is closed."""
    endless = session.sink is not None
    told = partial(execute, session), partial(_refuses, session)
    failures = broken_promises(*told, context_length, fill=fill, endless=endless)
    failures += _rewind_failures(session) + _refusal_failures(session, endless=endless)
    session.close()
    return failures


def broken_promises(
    execute: _Execute, refuses: _Refuses, context_length: int, *, fill: bool, endless: bool = False
) -> list[str]:
    """Promises broken after a reset or rewind, in pieces, at the end (only with `fill`: it feeds all), past it.

    `endless`: by its policy a cache takes more tokens than the context has, and older ones leave.
    """
    full = tuple(1 + i % _PROBE for i in range(context_length - 1))
    promises = [_forgets("reset", [Reset(), Feed(_FIRST)], [Feed(_MORE), Reset(), Feed(_FIRST)])]
    promises += [
        _forgets("rewind", [Reset(), Feed(_FIRST), Feed(_MORE)], [Rewind(_PROBE), Feed(_MORE)]),
        _in_pieces(context_length),
    ]
    if fill:
        promises.append(_at_the_end(full))
    if fill and endless:
        promises.append(_past_the_end(full))
    rows = execute([command for promise in promises for command in promise.script])
    ends = np.cumsum([sum(isinstance(command, Logits) for command in promise.script) for promise in promises])
    own = np.split(rows, ends[:-1])
    failures = [line for promise, its in zip(promises, own, strict=True) for line in promise.broken(its)]
    too_long: dict[str, list[Command]] = {
        "a token": [Reset(), Feed(_FIRST), Feed(full[: context_length - _PROBE + 1])],
        "a prompt that goes": [Reset(), Feed((*full, 1, 1))],
    }
    failures += [
        f"{what} past the context of {context_length} was accepted"
        for what, commands in too_long.items()
        if not endless and not refuses(commands)
    ]
    return failures


def _forgets(what: str, before: Sequence[Command], after: Sequence[Command]) -> _Promise:
    def broken(rows: NDArray[np.float32]) -> Iterator[str]:
        difference = float(np.abs(rows[0] - rows[1]).max() / np.abs(rows[0]).max())
        if not difference <= 1e-4:
            yield f"after a {what} the logits differ by {difference:.1e} of the largest"

    return _Promise([*before, Logits(), *after, Logits()], broken)


def _in_pieces(context_length: int) -> _Promise:
    ids = np.random.default_rng(0).integers(1, 64, (_PROMPTS, min(_LENGTH, context_length)))
    prompts: list[tuple[int, ...]] = [tuple(row) for row in ids.tolist()]
    script: list[Command] = []
    for prompt in prompts:
        ways = [prompt], [prompt[:1], prompt[1:_PROBE], prompt[_PROBE:]], [prompt[_PROBE:]]
        for pieces in ways:
            script += [Reset(), *map(Feed, pieces), Logits()]

    def broken(rows: NDArray[np.float32]) -> Iterator[str]:
        whole, pieces, end = (accuracy.log_softmax(rows[way::3]) for way in range(3))
        lost, most = (float(accuracy.kl_divergence(whole, other).mean()) for other in (pieces, end))
        if not lost <= most * _CUT_LIMIT:
            yield f"a prompt in pieces means something else: KL {lost:.2g}, without all but its last piece {most:.2g}"

    return _Promise(script, broken)


def _at_the_end(full: tuple[int, ...]) -> _Promise:
    def broken(rows: NDArray[np.float32]) -> Iterator[str]:
        if not np.isfinite(rows).all():
            yield f"logits at the last position, {len(full)}, are not finite"

    return _Promise([Reset(), Feed(full), Feed((1,)), Logits()], broken)


def _past_the_end(full: tuple[int, ...]) -> _Promise:
    def broken(rows: NDArray[np.float32]) -> Iterator[str]:
        if not float(np.abs(rows[0] - rows[1]).max() / np.abs(rows[0]).max()) <= _REWIND_LIMIT:
            yield "past the context the logits depend on how tokens are fed together"

    one_by_one, together = [Feed((1,)), Feed((2,))], [Feed((1, 2))]
    return _Promise([Reset(), Feed(full), *one_by_one, Logits(), Reset(), Feed(full), *together, Logits()], broken)


def _refusal_failures(session: Session, *, endless: bool) -> list[str]:
    """What is refused leaves the cache as it was: no token, one that the vocabulary lacks, more than there is room."""
    context = list(range(1, _PROBE + 1))
    refused = {"an empty prompt": [], "a token beyond the vocabulary": [1, session.vocab_size]}
    if not endless:
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
    """Whatever was fed before a rewind, `feed_each` then gives the logits of feeding one by one."""
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
    return [f"after a rewind the logits of several tokens differ by {difference:.1e} of their norm"]


def execute(session: Session, script: Sequence[Command]) -> NDArray[np.float32]:
    """A script in a session, as a runner would: the rows of logits that it asks for, [R, V]."""
    rows: list[NDArray[np.float32]] = []
    for command in script:
        match command:
            case Reset():
                session.reset()
            case Rewind(length):
                session.rewind(length)
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
