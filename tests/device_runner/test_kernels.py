"""The runner's own kernels against torch, on every instruction set this processor has."""

import ctypes

import numpy as np
import pytest
import torch

from runtime_tests.device_runner import build
from runtime_tests.device_runner.sdk import UnavailableError

ISAS = ("baseline", "avx2", "avx512")
# S, H, G, D, start; caches have some positions more
SHAPES = [
    (1, 9, 3, 64, 0),
    (1, 9, 3, 64, 127),
    (1, 9, 3, 64, 128),
    (1, 32, 8, 64, 1),
    (1, 24, 8, 128, 1000),
    (1, 9, 3, 64, 2047),
    (1, 4, 4, 64, 3001),
    (2, 8, 1, 128, 511),
    (3, 8, 2, 32, 5),
    (5, 9, 3, 64, 254),
    (37, 9, 3, 64, 0),
    (64, 32, 8, 64, 0),
    (65, 24, 8, 128, 3),
    (128, 9, 3, 64, 128),
    (300, 9, 3, 64, 77),
    (17, 6, 3, 20, 130),  # a head_dim that only the narrowest vectors divide
    (9, 200, 2, 16, 40),  # more heads in a group than rows in a tile
]


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("new_tokens", "heads", "groups", "head_dim", "start")),
        ("scale", ctypes.c_float),
    )


@pytest.fixture(scope="session")
def kernels(compiler, tmp_path_factory):
    try:
        return ctypes.CDLL(str(build.kernels_library(tmp_path_factory.mktemp("kernels"), compiler)))
    except UnavailableError as missing:
        pytest.skip(str(missing))


def inputs(shape, room=70, seed=0):
    """Query [S, H, D] and caches [T, G, D]; positions past the last one must not be read."""
    new, heads, groups, dim, start = shape
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((new, heads, dim), np.float32)
    key, value = (rng.standard_normal((start + new + room, groups, dim), np.float32) for _ in "kv")
    key[start + new :] = value[start + new :] = np.nan
    return query, key, value


def attend(kernels, query, key, value, start, *, isa=0, threads=1):
    out = np.full_like(query, np.nan)
    arrays = [array.ctypes.data for array in (query, key, value, out)]
    new, heads, dim = query.shape
    call = Attention(*arrays, new, heads, key.shape[1], dim, start, dim**-0.5)
    kernels.attend(ctypes.byref(call), isa, threads)
    return out


def expected(query, key, value, start):
    """torch, in float64."""
    new, end = len(query), start + len(query)
    q, k, v = (torch.from_numpy(a).double().transpose(0, 1) for a in (query, key[:end], value[:end]))
    mask = torch.ones(new, end, dtype=torch.bool).tril(start)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(0, 1).numpy()


def difference(a, b) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_torchs(kernels, shape):
    """NaN past the last position shows that it is not used."""
    query, key, value = inputs(shape)
    reference = expected(query, key, value, shape[-1])
    for isa in range(kernels.best_isa() + 1):
        for threads in (1, 2, 3):
            got = attend(kernels, query, key, value, shape[-1], isa=isa, threads=threads)
            assert difference(got, reference) < 1e-5, (ISAS[isa], threads)


@pytest.mark.parametrize("shape", [(1, 9, 3, 64, 700), (37, 9, 3, 64, 5)], ids=str)
def test_the_comparison_sees_a_wrong_position_head_or_value(kernels, shape):
    query, key, value = inputs(shape)
    reference = expected(query, key, value, shape[-1])
    assert difference(attend(kernels, query, key, value, shape[-1] - 1), reference) > 1e-3
    assert difference(attend(kernels, query[:, ::-1].copy(), key, value, shape[-1]), reference) > 1e-3
    value[shape[-1]] += 0.1  # one position
    assert difference(attend(kernels, query, key, value, shape[-1]), reference) > 1e-5
    value[shape[-1] + shape[0] - 1] = np.nan  # the last position that counts
    assert np.isnan(attend(kernels, query, key, value, shape[-1])).any()


@pytest.mark.parametrize("factor", [30.0, 1e-3])
def test_sharp_and_flat_softmax_keep_their_precision(kernels, factor):
    """Scores in the thousands: only differences to the largest may reach the exponential."""
    query, key, value = inputs((5, 8, 2, 64, 600))
    query *= factor
    reference = expected(query, key, value, 600)
    for isa in range(kernels.best_isa() + 1):
        assert difference(attend(kernels, query, key, value, 600, isa=isa, threads=2), reference) < 1e-4


@pytest.mark.parametrize("shape", [(1, 9, 3, 64, 1900), (70, 9, 3, 64, 100)], ids=str)
def test_threads_do_not_change_the_result(kernels, shape):
    query, key, value = inputs(shape)
    alone = attend(kernels, query, key, value, shape[-1], isa=kernels.best_isa())
    for threads in (2, 3, 2, 3):
        again = attend(kernels, query, key, value, shape[-1], isa=kernels.best_isa(), threads=threads)
        np.testing.assert_array_equal(alone, again)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (3, 4), (9, 1), (0, 10), (10, 0)])
def test_cache_takes_what_fits(kernels, start, count):
    cache, new = np.zeros((10, 6), np.float32), np.ones((count, 6), np.float32)
    assert copied(kernels, cache, new, start, count)
    expected_cache = np.zeros_like(cache)
    expected_cache[start : start + count] = 1
    np.testing.assert_array_equal(cache, expected_cache)


@pytest.mark.parametrize(
    ("start", "count"), [(-1, 1), (10, 1), (9, 2), (0, 11), (0, -1), (2**63 - 1, 2), (1, 2**63 - 1)]
)
def test_cache_refuses_what_does_not_fit(kernels, start, count):
    cache = np.zeros((10, 6), np.float32)
    assert not copied(kernels, cache, np.ones((12, 6), np.float32), start, count)
    assert not cache.any()


def copied(kernels, cache, new, start, count) -> int:
    places = [ctypes.c_void_p(array.ctypes.data) for array in (cache, new)]
    return kernels.copy_into_cache(*places, *map(ctypes.c_int64, (start, count, len(cache), 6 * 4)))
