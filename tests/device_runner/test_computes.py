"""The C++ runner gives the answers of the Python session, in another process without torch."""

from itertools import pairwise

import numpy as np
import pytest

from export import manifest
from runtime_tests.device_runner import Feed, Generate, Logits, Reset, Restore, Rewind, Save, Top, write_script
from runtime_tests.sessions import greedy, saved
from tests.device_runner.conftest import started
from tests.support.artifacts import opened
from tests.support.scripts import PROMPT, random_tokens, steps


def stepped(folder, prompt, tokens) -> np.ndarray:
    session = opened(folder)
    rows = [session.feed(prompt), *(session.feed([token]) for token in tokens)]
    session.close()
    return np.stack(rows)


@pytest.mark.parametrize("model", ["int4-g32", "fp32"])
def test_greedy_tokens_are_the_python_sessions(run, artifacts, model):
    expected = greedy(opened(artifacts[model]), PROMPT, 60)
    answer, _ = run([Feed(PROMPT), Generate(60)], model)
    assert list(answer.generated[0].tokens) == expected
    assert len(set(expected)) > 1
    other, _ = run([Feed(PROMPT[::-1]), Generate(60)], model)
    assert list(other.generated[0].tokens) != expected


@pytest.mark.parametrize(("model", "bound"), [("fp32", 1e-4), ("int8 cache", 1e-4), ("bfloat16 cache", 0.05)])
def test_logits_are_the_python_sessions(run, artifacts, model, bound):
    """Both call the same XNNPACK; attention differs in the order of its sums: measured 1.6e-5, of logits up to 13. Over
    a cache of bfloat16 the Python session's rounds its weights to it too, ours does not.
    """
    ids = random_tokens(120)
    _, rows = run([Feed(ids[:70]), Logits(), *steps(ids[70:])], model)
    reference = stepped(artifacts[model], ids[:70], ids[70:])
    assert np.abs(rows - reference).max() < bound
    assert np.abs(rows[1:] - reference[:-1]).max() > 0.1  # another position


def test_a_lone_token_gives_the_python_sessions_logits(run, artifacts):
    """It attends to itself alone, so there is no order of sums in which the kernels could differ, and no difference for
    int8 rounding to enlarge (docs/decisions.md): the quantized model is equal to the last bits, too."""
    tokens = random_tokens(64)
    _, rows = run([part for token in tokens for part in (Reset(), Feed((token,)), Logits())], "int4-g32")
    session = opened(artifacts["int4-g32"])
    expected = []
    for token in tokens:
        session.reset()
        expected.append(session.feed([token]))
    assert np.abs(rows - np.stack(expected)).max() < 1e-5
    assert min(np.abs(a - b).max() for a, b in pairwise(rows)) > 0.1


@pytest.mark.parametrize("model", ["int4-g32", "fp32"])
def test_reset_forgets_everything(run, model):
    ids = random_tokens(100)
    again = [Reset(), Feed(ids[:50]), Logits(), *steps(ids[50:60])]
    _, rows = run([*again, Feed(ids[60:]), *again, Feed(ids[:50]), Logits()], model)
    np.testing.assert_array_equal(rows[:11], rows[11:22])
    assert np.abs(rows[22] - rows[0]).max() > 0.1  # without a reset the past shows


def test_a_feed_in_pieces_is_the_feed_at_once(run):
    ids = random_tokens(130)
    _, rows = run([Feed(ids), Logits(), Reset(), *(Feed((token,)) for token in ids), Logits()])
    assert np.abs(rows[0] - rows[1]).max() < 1e-4
    _, other = run([Feed(ids[1:]), Logits()])
    assert np.abs(other[0] - rows[0]).max() > 0.1


@pytest.mark.parametrize("model", ["int4-g32", "fp32", "bfloat16 cache", "int8 cache"])
def test_threads_change_nothing_but_time(run, model):
    commands = [Feed(random_tokens(90)), Logits(), Generate(20), Logits()]
    answers = [run(commands, model, threads=threads) for threads in (1, 2, 3)]
    assert [answer.threads for answer, _ in answers] == [1, 2, 3]
    assert len({answer.generated[0].tokens for answer, _ in answers}) == 1
    assert len({answer.logits_crc32 for answer, _ in answers}) == 1
    assert run([Feed(random_tokens(91)), Logits()], model)[0].logits_crc32 != answers[0][0].logits_crc32


def test_with_an_int8_cache_a_feed_in_pieces_gives_the_same_bits(run):
    """XNNPACK's parts do for any number of rows, and so does this attention."""
    ids = random_tokens(130)
    _, rows = run([Feed(ids), Logits(), Reset(), *(Feed((token,)) for token in ids), Logits()], "int8 cache")
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("model", ["int4-g32", "int8 cache"])
def test_a_rewind_and_a_saved_session_bring_back_the_same_bits(run, artifacts, tmp_path, model):
    """And the file is the Python session's, whichever of the two wrote it."""
    ids, kept, asked = random_tokens(60), tmp_path / "kept", [Feed((7,)), Logits()]
    again = [Feed(ids[::-1]), Rewind(60), *asked, Restore(kept.name), *asked]
    answer, rows = run([Feed(ids), Save(kept.name), *asked, *again], model)
    np.testing.assert_array_equal(rows[1:], rows[:1].repeat(2, axis=0))
    assert answer.saved == (kept.stat().st_size,)
    np.testing.assert_array_equal(run([Restore(kept.name), *asked], model)[1], rows[:1])  # in another process
    session, artifact = opened(artifacts[model]), bytes.fromhex(manifest.digest(artifacts[model]))
    saved.restore(session, kept, artifact)
    session.rewind(59)
    session.feed(ids[59:])
    assert np.abs(session.feed([7]) - rows[0]).max() < 1e-4 * np.abs(rows[0]).max()
    session.rewind(60)
    saved.save(session, kept, artifact, b"a note")
    _, others = run([Restore(kept.name), *asked], model)
    assert np.abs(others - rows[:1]).max() < 1e-4 * np.abs(rows[0]).max()
    assert np.abs(run([Feed(ids[1:]), *asked], model)[1] - rows[0]).max() > 0.1


def test_top_is_the_order_of_the_logits(run):
    answer, rows = run([Feed(PROMPT), Top(512), Logits()], "int4-g32")
    order = np.argsort(-rows[0], kind="stable")
    assert [token for token, _ in answer.top[0]] == order.tolist()
    np.testing.assert_array_equal(np.float32([logit for _, logit in answer.top[0]]), rows[0][order])


def test_the_answer_describes_the_run(run, artifacts):
    described = manifest.read(artifacts["int4-g32"])
    answer, rows = run([Feed(PROMPT), Generate(3), Logits(), Feed((1,)), Generate(1)], "int4-g32")
    assert answer.runner == "pte"
    assert answer.runtime == f"executorch {described.tools['executorch'].partition('+')[0]}"
    assert (answer.vocab_size, answer.context_length) == (512, described.contract.kv.context_length)
    assert [feed.tokens for feed in answer.feeds] == [len(PROMPT), 1]
    assert [len(part.tokens) for part in answer.generated] == [3, 1]
    assert rows.shape == (1, 512)
    times = [answer.load_ns, *(feed.ns for feed in answer.feeds), *(ns for part in answer.generated for ns in part.ns)]
    assert min(times) > 0
    assert 0 < answer.rss_before_load_bytes < answer.peak_rss_bytes < 10**9


def test_the_runner_chooses_its_threads(bundle, artifacts, tmp_path):
    write_script([Feed(PROMPT)], tmp_path / "script")
    answer = started(bundle, artifacts["fp32"] / "model.pte", tmp_path / "script")
    assert answer.threads >= 1
    assert (answer.logits_rows, answer.logits_crc32) == (0, "00000000")


@pytest.mark.parametrize(("kind", "most"), [(None, 1e-4), ("bfloat16", 0.05), ("int8", 0.02)])
def test_a_window_goes_round_as_in_the_python_session(run, tiny, kind, most):
    """Over so many tokens some integers of a cache of int8 fall on the other side: 0.002 without a window, too."""
    folder = tiny("executorch-xnnpack", "fp32", kind, "window-24", context_length=1024)
    ids, program = random_tokens(700), folder / "model.pte"
    commands = [Feed(ids[:600]), Logits(), *steps(ids[600:660]), Rewind(500), Feed(ids[500:]), Logits()]
    _, rows = run(commands, program)
    session = opened(folder)
    expected = [session.feed(ids[:600]), *(session.feed([token]) for token in ids[600:660])]
    session.rewind(500)
    expected.append(session.feed(ids[500:]))
    assert np.abs(rows - np.stack(expected)).max() < most
    for command, line in (
        (Save("saved"), "420 older tokens have left"),
        (Rewind(442), "no rewinding to 442"),
    ):
        refused, _ = run([Feed(ids), command], program)
        assert line in refused.error
    _, rows = run([Feed(ids[:280]), Save("saved"), Feed(ids[280:300]), Logits()], program)
    _, again = run([Feed(ids), Restore("saved"), Feed(ids[280:300]), Logits()], program)
    assert np.abs(rows - again).max() < 1e-5


def test_with_a_sink_older_tokens_leave_as_in_the_python_session(run, tiny):
    folder, ids = tiny("executorch-xnnpack", "fp32", None, "sink-4", context_length=64), random_tokens(200)
    commands = [Feed(ids[:150]), Logits(), *steps(ids[150:]), Rewind(40), Feed(ids[:50]), Logits()]
    _, rows = run(commands, folder / "model.pte")
    session = opened(folder)
    expected = [session.feed(ids[:150]), *(session.feed([token]) for token in ids[150:])]
    session.rewind(40)
    expected.append(session.feed(ids[:50]))
    assert np.abs(rows - np.stack(expected)).max() < 1e-4
    refused, _ = run([Feed(ids), Save("saved")], folder / "model.pte")
    assert "150 older tokens have left this cache" in refused.error
    refused, _ = run([Feed(ids), Rewind(3)], folder / "model.pte")
    assert "no rewinding to 3 tokens" in refused.error
