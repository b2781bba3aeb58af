"""What every KV cache must do: at the last position, past it, after a reset and after a rewind.

The promises are scripts of the runner protocol, which a session in a child process and a runner on a device execute
alike.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.host.console import stage
from runtime_tests.device_runner import Command, Feed, Logits, Reset, Rewind
from runtime_tests.evidence.record import Outcome
from runtime_tests.jobs import ConformanceJob
from runtime_tests.sessions.base import ContextError, Session

from . import gates
from .subject import Finding, Subject

_PROBE = 16
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
    with stage("cache", "last position, past it, reset" if fill else f"past its end, reset (more than {limit} slots)"):
        failures = subject.run_on_device(job, "cache")["failures"]
    return Finding((gates.count("cache: broken promises", failures, Outcome.MISMATCH),))


def check(session: Session, context_length: int, *, fill: bool) -> list[str]:
    """Descriptions of the promises that a session breaks; the session is closed."""
    failures = broken_promises(partial(_execute, session), partial(_refuses, session), context_length, fill=fill)
    failures += _rewind_failures(session)
    session.close()
    return failures


def broken_promises(execute: _Execute, refuses: _Refuses, context_length: int, *, fill: bool) -> list[str]:
    """Promises broken after a reset or rewind, at the last position (only with `fill`: it feeds a context), past it."""
    first, more = tuple(range(1, _PROBE + 1)), tuple(range(_PROBE + 1, 2 * _PROBE))
    full = tuple(1 + i % _PROBE for i in range(context_length - 1))
    script: list[Command] = [Reset(), Feed(first), Logits(), Feed(more), Logits()]
    script += [Rewind(_PROBE), Feed(more), Logits(), Reset(), Feed(first), Logits()]
    if fill:
        script += [Reset(), Feed(full), Feed((1,)), Logits()]
    before, further, rewound, after, *last = execute(script)
    failures = []
    for what, one, other in (("reset", before, after), ("rewind", further, rewound)):
        difference = float(np.abs(one - other).max() / np.abs(one).max())
        if not difference <= 1e-4:
            failures.append(f"after a {what} the logits differ by {difference:.1e} of the largest")
    if not np.isfinite(np.array(last)).all():
        failures.append(f"logits at the last position, {context_length - 1}, are not finite")
    if not refuses([Reset(), Feed(first), Feed(full[: context_length - _PROBE + 1])]):
        failures.append(f"a token past the context of {context_length} was accepted")
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


def _execute(session: Session, script: Sequence[Command]) -> NDArray[np.float32]:
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
        _execute(session, script)
    except ContextError:
        return True
    return False
