"""Where the time of this process went, stage by stage."""

import os
import time
from collections import defaultdict

_BRIEF_S = 1.0
"""Stages shorter than this, all lanes together, share a line."""
_started = time.perf_counter()
_spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
"""Stage → lane → seconds."""


def add(label: str, lane: str, seconds: float) -> None:
    """Note a stage that has ended and in which no other was."""
    _spent[label][lane] += seconds


def lines() -> list[str]:
    """The whole time, that of processors (children included), and each stage with what each lane had of it.

    Lanes work at once and wait for each other, so that stages add up to more than the whole.
    """
    used = os.times()
    worked = used.user + used.system + used.children_user + used.children_system
    sums = sorted(((sum(lanes.values()), label) for label, lanes in _spent.items()), reverse=True)
    brief = sum(seconds for seconds, _ in sums if seconds < _BRIEF_S)
    told = [f"where the time went: {time.perf_counter() - _started:.1f} s, {worked:.1f} s of processors"]
    told += [
        f"  {label:<10} {seconds:6.1f} s  {_by_lane(_spent[label])}".rstrip()
        for seconds, label in sums
        if seconds >= _BRIEF_S
    ]
    return told + ([f"  {'others':<10} {brief:6.1f} s"] if brief else [])


def _by_lane(lanes: dict[str, float]) -> str:
    longest_first = sorted(lanes.items(), key=lambda item: -item[1])
    return ", ".join(f"{lane.strip()} {seconds:.1f}" for lane, seconds in longest_first if lane)
