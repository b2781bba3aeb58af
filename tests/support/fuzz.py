"""Values, texts and files made by chance from good ones; whatever they hold, reading them ends soon, as it should.

`make fuzz` loads this module as a plugin of pytest: the same properties, for longer, with other examples each time.
"""

import json
import math

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.support.processes import within

EXAMPLES, LONG = 30, 2000
LIMIT_S = 20
"""Of one example: a hang is a failure, a busy machine is not."""
NUMBERS = st.integers() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")])
TEXTS = st.text(max_size=20) | st.sampled_from(["../x", "/etc/passwd", "a\0b", "\x1b[2J", "\u2028", "9" * 400])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
HOWS = st.sampled_from(["set", "remove", "add", "like", "like", "like"])
CHANGES = st.lists(st.tuples(st.integers(0, 2**20), HOWS, VALUES, NUMBERS, TEXTS), max_size=4)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=4)
"""Position as a share of the file, the bytes written there, and how many bytes they replace."""
DEEP = [b"[" * 9000, b'{"a":' * 9000, b"9" * 5000, b"", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"a":1,"a":2}']
"""JSON that is no object, too deep, too long a number, or none."""

_QUICK = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
_LONG = settings(_QUICK, max_examples=LONG, derandomize=False, phases=[Phase.generate, Phase.shrink], print_blob=True)
_chosen = [_QUICK]


def pytest_configure(config):
    """Only where this module is a plugin."""
    _chosen[0] = _LONG


def fuzzed(test):
    """The same examples in every run of the tests."""
    return _chosen[0](test)


def changed(value, changes):
    """A copy with some of its values, wherever they stand, set, removed, or given a neighbour."""
    value = json.loads(json.dumps(value))
    for at, how, new, number, text in changes:
        slots = list(slots_in(value))
        if not slots:
            break
        place, key = slots[at % len(slots)]
        if how == "remove":
            del place[key]
        elif how == "add" and isinstance(place, dict):
            place[f"{key}x"] = new
        else:
            place[key] = like(place[key], number, text) if how == "like" else new
    return value


def like(old, number, text):
    """Another value of the same kind, which a reader's types let pass."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return int(number) if math.isfinite(number) else 0
    if isinstance(old, float):
        return number
    if isinstance(old, str):
        return text
    if isinstance(old, list | dict):
        return old * 2 if isinstance(old, list) and len(text) % 2 else type(old)()
    return number


def slots_in(value):
    """Every container with every key or index in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from slots_in(inner)


def json_like(good):
    """Bytes of JSON that differ from a good value in a few places, or of something else."""
    return CHANGES.map(lambda changes: json.dumps(changed(good, changes)).encode()) | st.sampled_from(DEEP)


def spliced(data, edits):
    """The data with other bytes inserted or written over it."""
    for place, new, over in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + over :]
    return data


def only(kinds, work, *arguments):
    """Whether it was refused; an exception of another kind, a second line or a hang fails the test."""
    try:
        with within(LIMIT_S):
            work(*arguments)
    except kinds as error:
        lines = str(error).split("\n")
    else:
        return False
    assert len(lines) == 1, lines
    return True


def count(refused, record_property):
    """Record how many were refused; chance must have made bad ones, or nothing was tested."""
    assert len(refused) >= EXAMPLES / 2
    assert any(refused)
    record_property("cases", len(refused))
    record_property("note", f"{sum(refused)} refused")
