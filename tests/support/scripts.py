"""Scripts for any runner: parts of good ones, and those that every runner, and every reader, must refuse alike."""

from runtime_tests.device_runner import Feed, Logits
from tests.support import metrics

PROMPT = (5, 17, 301, 44, 8, 2, 399, 120)

BAD_LINES = [
    "feed",
    "feed ",
    "feed 1  2",
    "feed 1 2 ",
    " feed 1",
    "feed 1\t2",
    "feed -1",
    "feed +1",
    "feed 1.0",
    "feed 0x10",
    "feed 1_0",
    "feed 1000000001",
    "feed 99999999999999999999999",
    f"feed {'9' * 5000}",
    "feed 1\r",
    "feed ١",
    "feed ²",
    "Feed 1",
    "reset 1",
    "reset ",
    "logits 1",
    "generate",
    "generate 0",
    "generate 1 2",
    "top 0",
    "top -5",
    "top",
    "rewind",
    "rewind 0",
    "rewind 1 2",
    "save",
    "save ",
    "save a b",
    "save a\tb",
    "restore schön",
    "restore",
    "quit",
    "",
    "feed 1\0",
]
EARLY = [
    "logits\n",
    "top 1\n",
    "generate 1\n",
    *(f"feed 1\n{line}\ntop 1\n" for line in ("reset", "rewind 1", "restore x")),
]
"""Ask for logits that are not there yet."""


def steps(tokens):
    return [part for token in tokens for part in (Feed((token,)), Logits())]


def random_tokens(count, seed=3):
    return tuple(metrics.random_tokens(count, seed))
