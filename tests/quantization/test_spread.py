"""Work on all cores: its order, its pieces that are spread themselves, its failures, its forks."""

import os
import threading
import time

import pytest
import torch

from export.quantization.spread import spread


def test_answers_stand_in_the_order_of_pieces():
    def slower_first(piece: int) -> int:
        time.sleep(0.002 * (8 - piece))
        return piece * piece

    assert spread(slower_first, iter(range(8)), workers=3) == [piece * piece for piece in range(8)]


def test_a_piece_may_be_spread_itself_even_by_every_thread():
    together = threading.Barrier(2)

    def outer(piece: int) -> list[int]:
        together.wait(10)  # both threads are taken
        return spread(lambda inner: piece + inner, range(50), workers=2)

    assert spread(outer, [100, 200], workers=2) == [[100 + i for i in range(50)], [200 + i for i in range(50)]]


def test_modes_of_the_caller_hold_in_every_thread():
    def seen(_piece: int) -> tuple[bool, bool, int]:
        time.sleep(0.002)
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()

    with torch.inference_mode():
        assert set(spread(seen, range(9), workers=3)) == {(True, False, 1)}
    assert set(spread(seen, range(9), workers=3)) == {(False, True, 1)}


def test_the_first_exception_ends_it_and_leaves_what_is_not_begun():
    begun = []

    def fail_at_three(piece: int) -> None:
        begun.append(piece)
        if piece == 3:
            raise ArithmeticError("piece 3")

    for workers in (1, 2):
        begun.clear()
        before = torch.get_num_threads()
        with pytest.raises(ArithmeticError, match="piece 3"):
            spread(fail_at_three, range(10_000), workers=workers)
        assert 3 in begun
        assert len(begun) < 10_000
        assert torch.get_num_threads() == before


def test_threads_do_not_pile_up():
    for _ in range(300):
        spread(lambda piece: piece, range(4), workers=9)
    assert len([each for each in threading.enumerate() if each.name.startswith("spread")]) <= os.cpu_count()


def test_a_fork_has_threads_of_its_own():
    def thread(_piece: int) -> int:
        time.sleep(0.01)
        return threading.get_ident()

    spread(thread, range(4), workers=2)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if len(set(spread(thread, range(20), workers=2))) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
