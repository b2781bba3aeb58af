"""The runner's own kernels against torch, on every instruction set this processor has."""

import ctypes
import platform

import numpy as np
import pytest
import torch

from runtime_tests.device_runner import attention, build
from runtime_tests.device_runner.attention import KINDS, Attention, Int8Attention, Int8Heads
from runtime_tests.device_runner.sdk import UnavailableError

ISAS = {"x86_64": ("baseline", "avx2", "avx512", "avx512_vnni"), "aarch64": ("baseline", "dotprod")}
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
    (4, 8, 2, 24, 600),  # one for vectors of eight
    (9, 200, 2, 16, 40),  # more heads in a group than rows in a tile
]


@pytest.fixture(scope="session")
def kernels(compiler, tmp_path_factory):
    try:
        return attention.library(build.kernels_library(tmp_path_factory.mktemp("kernels"), compiler))
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


def attend(kernels, query, key, value, start, *, mask=None, isa=0, threads=1):
    """Over a cache of float32, or of bfloat16 in 16 bits."""
    out = np.full_like(query, np.nan)
    arrays = [array.ctypes.data for array in (query, key, value, out)]
    new, heads, dim = query.shape
    call = Attention(
        new, heads, key.shape[1], dim, start, len(key), None if mask is None else mask.ctypes.data, dim**-0.5, *arrays
    )
    kind = kernels.attend if key.dtype == np.float32 else kernels.attend_bfloat16
    kind(ctypes.byref(call), isa, threads, 1)
    return out


def quantized(x):
    """int8 [N, H, D], zeros int8 and scales float32 [N, H]; of positions that must not be read, the scale is NaN."""
    low, high = (edge(x, -1).clip(*limits) for edge, limits in ((np.min, (None, 0)), (np.max, (0, None))))
    scale = ((high - low) / 255).astype(np.float32)
    known = np.where(np.isnan(scale), 1, scale)[..., None]
    zero = np.rint(-128 - np.nan_to_num(low)[..., None] / known)
    values = (np.rint(np.nan_to_num(x) / known) + zero).clip(-128, 127)
    return values.astype(np.int8), zero[..., 0].astype(np.int8), scale


def dequantized(values, zero, scale):
    return (values.astype(np.float64) - zero[..., None]) * scale[..., None]


def attend_int8(kernels, query, key, value, start, *, mask=None, isa=0, threads=1):
    """Of operands as `quantized` gives them."""
    new, heads, dim = query[0].shape
    positions, key_groups, _ = key[0].shape
    out = np.full(query[0].shape, np.nan, np.float32)
    operands = [Int8Heads(*(part.ctypes.data for part in operand)) for operand in (query, key, value)]
    shape = (new, heads, key_groups, dim, start, positions, None if mask is None else mask.ctypes.data)
    call = Int8Attention(*shape, dim**-0.5, *operands, out.ctypes.data)
    kernels.attend_int8(ctypes.byref(call), isa, threads, 1)
    return out


def expected(query, key, value, start, mask=None):
    """torch, in float64."""
    new, end = len(query), len(key) if mask is not None else start + len(query)
    q, k, v = (torch.from_numpy(a).double().transpose(0, 1) for a in (query, key[:end], value[:end]))
    mask = torch.ones(new, end, dtype=torch.bool).tril(start) if mask is None else torch.from_numpy(mask).double()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(0, 1).numpy()


def isa_name(number) -> str:
    return ISAS[platform.machine()][number]


def difference(a, b) -> float:
    return float(np.abs(a - b).max())


def from_bfloat16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_rounds_as_torch_does():
    x = np.concatenate([inputs((1, 8, 8, 64, 9), room=0)[1].ravel(), np.float32([1.00390625, 1.01171875, -0.0])])
    np.testing.assert_array_equal(from_bfloat16(attention.bfloat16(x)), torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_torchs(kernels, shape, kind):
    """NaN past the last position shows that it is not used."""
    query, key, value = inputs(shape)
    if kind == "bfloat16":
        key, value = map(attention.bfloat16, (key, value))
        reference = expected(query, *map(from_bfloat16, (key, value)), shape[-1])
    else:
        reference = expected(query, key, value, shape[-1])
    for isa in range(kernels.best_isa() + 1):
        for threads in (1, 2, 3):
            got = attend(kernels, query, key, value, shape[-1], isa=isa, threads=threads)
            assert difference(got, reference) < 1e-5, (isa_name(isa), threads)


MASKED = [(1, 9, 3, 64, 0), (1, 32, 8, 64, 1300), (5, 9, 3, 64, 254), (65, 24, 8, 128, 3), (17, 6, 3, 20, 130)]


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_with_a_mask_attention_is_torchs(kernels, shape, kind):
    """A window's, which sees neither what is old nor what was never written, and one of any numbers."""
    query, key, value = inputs(shape, room=0)
    rng, size = np.random.default_rng(1), (len(query), len(key))
    sees = np.tril(np.triu(np.ones(size, bool), shape[-1] - 40), shape[-1])
    masks = [np.where(sees, 0, -np.inf), np.where(rng.random(size) < 0.9, -np.inf, rng.standard_normal(size))]
    masks[1][:, rng.integers(len(key))] = -3
    operands = [query, key, value]
    known, call = operands, attend
    if kind == "bfloat16":
        operands = [query, *map(attention.bfloat16, (key, value))]
        known = [query, *map(from_bfloat16, operands[1:])]
    elif kind == "int8":
        operands, call = [quantized(x) for x in operands], attend_int8
        known = [dequantized(*operand) for operand in operands]
    for mask in (mask.astype(np.float32) for mask in masks):
        reference = expected(*known, shape[-1], mask)
        for isa in range(kernels.best_isa() + 1):
            for threads in (1, 3):
                got = call(kernels, *operands, 0, mask=mask, isa=isa, threads=threads)
                assert difference(got, reference) < 1e-5, (isa_name(isa), threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_attention_is_torchs_of_what_the_integers_stand_for(kernels, shape):
    """The scales of what follows the last position are NaN."""
    operands = [quantized(x) for x in inputs(shape)]
    reference = expected(*(dequantized(*operand) for operand in operands), shape[-1])
    for isa in range(kernels.best_isa() + 1):
        for threads in (1, 2, 3):
            got = attend_int8(kernels, *operands, shape[-1], isa=isa, threads=threads)
            assert difference(got, reference) < 1e-5, (isa_name(isa), threads)


@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_int8_operands_at_the_ends_of_their_range(kernels, offset):
    """One sign only: zeros lie at an end, and sums of products are as large as they become."""
    query, key, value = (np.abs(x) * 0.1 + abs(offset) for x in inputs((5, 8, 2, 128, 600), room=0))
    operands = [quantized(np.float32(np.sign(offset) * x)) for x in (query, key, value)]
    assert {int(zero) for _, zeros, _ in operands for zero in zeros.flat} == {-128 if offset > 0 else 127}
    reference = expected(*(dequantized(*operand) for operand in operands), 600)
    for isa in range(kernels.best_isa() + 1):
        assert difference(attend_int8(kernels, *operands, 600, isa=isa), reference) < 1e-5


@pytest.mark.parametrize("shape", [(1, 9, 3, 64, 700), (37, 9, 3, 64, 5)], ids=str)
@pytest.mark.parametrize("part", ["value", "zero", "scale"])
def test_the_comparison_sees_a_wrong_part_of_an_int8_operand(kernels, shape, part):
    """Of one position that counts; another start is a wrong position."""
    query, key, value = (quantized(x) for x in inputs(shape))
    before = attend_int8(kernels, query, key, value, shape[-1])
    assert difference(attend_int8(kernels, query, key, value, shape[-1] - 1), before) > 1e-3
    for operand in (query, key, value):
        changed = operand[("value", "zero", "scale").index(part)][0 if operand is query else shape[-1]]
        kept = changed.copy()
        changed[...] = kept * 2 if part == "scale" else np.int8(5) - kept.clip(-100, 100)
        assert difference(attend_int8(kernels, query, key, value, shape[-1]), before) > 1e-5
        changed[...] = kept


@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 64), (32, 8, 64), (8, 1, 128), (6, 3, 20)])
def test_an_int8_row_depends_on_its_own_position_only(kernels, heads, groups, dim):
    """Any number of rows, from any position on and in any number of threads, gives the same bits."""
    end = 1060  # past two ranges of keys
    query, key, value = (quantized(x) for x in inputs((end, heads, groups, dim, 0), room=0))
    for isa in range(kernels.best_isa() + 1):
        every = attend_int8(kernels, query, key, value, 0, isa=isa, threads=2)
        for start, rows in ((0, 1), (63, 2), (500, 30), (511, 2), (1023, 1), (1020, 8), (1055, 5)):
            some = tuple(np.ascontiguousarray(part[start : start + rows]) for part in query)
            for threads in (1, 3):
                got = attend_int8(kernels, some, key, value, start, isa=isa, threads=threads)
                np.testing.assert_array_equal(got, every[start : start + rows])


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
