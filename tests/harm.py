"""Files cut short and bits flipped, the same ones in every run; and a limit that turns a hang into a failure."""

import random
import signal
from contextlib import contextmanager

import pytest


def model_files(folder, described):
    """Graph and weight files of an artifact."""
    artifact = described.plan.target.artifact
    return [folder / name for name in sorted(described.files) if name.startswith(artifact)]


def cuts(data, count):
    """Beginnings of a file: none of it, a byte less, and evenly spread lengths between."""
    yield from (data[: len(data) * i // (count - 1)] for i in range(count - 1))
    yield data[:-1]


def bit_flips(data, count, choose):
    """Copies with one bit flipped; half of those in the first kilobytes, where most of the structure is."""
    for i in range(count):
        at = choose.randrange(min(len(data), 3000) if i % 2 else len(data))
        yield data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]


def damaged_files(paths, cut, flipped):
    """Yields what was done (`cut` or `flipped`), the file and its damaged bytes; the files share the numbers evenly."""
    choose = random.Random(7)
    for path in paths:
        whole = path.read_bytes()
        yield from (("cut", path, data) for data in cuts(whole, -(-cut // len(paths))))
        yield from (("flipped", path, data) for data in bit_flips(whole, -(-flipped // len(paths)), choose))


@contextmanager
def within(seconds):
    """A hang becomes a failure."""

    def stop(_signum, _frame):
        pytest.fail(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
