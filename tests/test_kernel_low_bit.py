"""attend="int8-fp8" on Hopper: codes against the twin's, outputs against float64 attention under the same mask."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
from test_kernel_attend import make_inputs, make_plan, on_gpu, oracle, pack, poison, random_mask

import salekit
from salekit import reference
from salekit.codes import tiles_to_rows
from salekit.plans import BLOCKS, LOW_BIT_ARCHS

attend_module = importlib.import_module("salekit.attend")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_hopper():
    from salekit.jit import device_arch

    if device_arch() not in LOW_BIT_ARCHS:
        pytest.skip("built for Hopper alone")


def low_plan(*lengths, **options):
    return make_plan(*lengths, attend="int8-fp8", arch="sm_90a", **options)


def twin_codes(q, k, v, plan) -> reference._LowBit:
    with np.errstate(all="ignore"):
        return reference._LowBit(*(reference._heads_first(x) for x in (q, k, v)), plan)


def v_rows(codes: np.ndarray, seqlen: int) -> np.ndarray:
    """float32 [batch, heads, seqlen, head_dim] from v's tiles; a key's place: cuda_src/kernels/quantize_e4m3.cu."""
    assert (codes[:, :, :, -1] == 0x38).all()  # ones
    codes = codes[:, :, :, :-1]
    batch, heads, blocks, chunks = codes.shape[:4]
    byte = np.arange(16)
    key_of_byte = 8 * (byte % 4 // 2) + 2 * (byte // 4) + byte % 2
    rows = np.empty((batch, heads, blocks, 2, 16, chunks, 8), np.uint8)
    rows[:, :, :, :, key_of_byte] = codes.transpose(0, 1, 2, 4, 6, 3, 5)
    rows = rows.reshape(batch, heads, blocks * 32, chunks * 8)
    assert not rows[:, :, seqlen:].any()
    return rows[:, :, :seqlen].view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def same_codes(got: np.ndarray, want: np.ndarray) -> None:
    """Equal but for a few on the edge between two codes: means of k may differ in their last bit."""
    off = got.astype(np.int64) - want
    assert np.abs(off).max(initial=0) <= 1 and np.count_nonzero(off) <= 1e-3 * off.size + 1


def run(q, k, v, mask, plan, layout="bshd"):
    """out and lse on the host; q, k, v are views into arrays of NaN, out is full of NaN before."""
    import cupy

    from salekit import arrays

    gq, gk, gv = (on_gpu(x, layout) for x in (q, k, v))
    out = cupy.empty(q.shape, q.dtype)
    poison(out)
    words = None if mask is None else on_device(mask)
    out, lse = attend_module.attend(gq, gk, gv, words, plan, out=out, return_lse=True)
    assert arrays.is_cuda(out)
    return out.get(), lse.get()


def on_device(mask):
    import cupy

    return salekit.BlockMask(
        cupy.asarray(mask.words), mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal
    )


def relative_errors(got, want) -> np.ndarray:
    """[batch, heads] of outputs [batch, seqlen, heads, head_dim]."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    size = np.square(want).sum(axis=(1, 3))
    return np.sqrt(np.square(got - want).sum(axis=(1, 3)) / np.where(size == 0, 1, size))


def check(q, k, v, mask, plan, layout="bshd"):
    """Little worse than the twin, which rounds p at another multiple of its value and sums in float32.

    The tensor cores' sums of p.v over 8 tiles may fall short by 0.4%.
    """
    out, lse = run(q, k, v, mask, plan, layout)
    want, want_lse, _, _ = oracle(q, k, v, mask, plan)
    twin, twin_lse = reference.attend(q, k, v, mask, plan)
    assert (relative_errors(out, want) <= 1.15 * relative_errors(twin, want) + 4e-3).all()
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    # Sums of rounded p: e4m3 rounds by up to 2 ** -4, the more evenly the more keys a row has.
    assert np.abs(lse[seen] - twin_lse[seen]).max(initial=0) <= 2 * 2.0**-4
    assert np.abs(lse[seen] - twin_lse[seen]).sum() <= 0.02 * seen.sum()
    assert not np.moveaxis(out.astype(np.float32), 1, 2)[~seen].any()
    return out, lse


@pytest.mark.parametrize("head_dim, dtype", [(64, "float16"), (128, "bfloat16"), (128, "float16")])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 65), (129, 127), (700, 1029)])
def test_codes_are_the_twins(lengths, head_dim, dtype):
    plan = low_plan(*lengths, batch=2, heads=6, kv_heads=2, head_dim=head_dim, dtype=dtype)
    q, k, v = make_inputs(plan)
    q[..., 3] *= 30
    k[..., 5] *= 7
    k[..., 7] += 8  # a mean that keys past the end, which are zeros, are far from
    v[:, 0], v[..., 9] = 0, 0
    from salekit import low_bit

    got = low_bit.quantize_low_bit(*(on_gpu(x) for x in (q, k, v)), plan, with_shift=True)
    want = twin_codes(q, k, v, plan)
    seqlen_q, seqlen_k = lengths
    tile_bytes = 128 * head_dim
    q_codes, k_codes = (x.get().reshape(*x.shape[:2], -1, tile_bytes) for x in (got.q_codes, got.k_codes))
    same_codes(tiles_to_rows(q_codes, 8, seqlen_q), want.q)
    same_codes(tiles_to_rows(k_codes, 8, seqlen_k), want.k)
    np.testing.assert_array_equal(v_rows(got.v_codes.get(), seqlen_k), want.v)
    np.testing.assert_array_equal(got.v_scale.get(), want.v_scale)
    np.testing.assert_allclose(got.q_scale.get()[:, :, :seqlen_q], want.q_scale[..., 0], rtol=1e-6)
    k_scale = np.repeat(got.k_scale.get()[..., 0], 32, axis=-1)[:, :, :seqlen_k]
    np.testing.assert_allclose(k_scale, want.k_scale, rtol=1e-6)
    assert (got.k_scale.get() == got.k_scale.get()[..., :1]).all()
    size = np.abs(q.astype(np.float32)).max() * head_dim
    assert np.abs(got.row_shift.get()[:, :, :seqlen_q] - want.row_shift).max() <= 1e-5 * size


@pytest.mark.parametrize("head_dim, dtype", [(64, "float16"), (128, "bfloat16")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (33, 31), (128, 128), (130, 257), (257, 130), (1, 3000), (600, 2081)])
def test_dense(lengths, causal, head_dim, dtype):
    plan = low_plan(*lengths, heads=3, kv_heads=1, head_dim=head_dim, dtype=dtype, causal=causal)
    check(*make_inputs(plan), None, plan)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.02, 0.4])
def test_masks(block, density):
    plan = low_plan(900, 1900, batch=2, heads=4, kv_heads=2, block_q=block[0], block_k=block[1])
    check(*make_inputs(plan), random_mask(plan, density), plan)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (12, 1), (8, 2)])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_heads_and_layouts(heads, layout):
    plan = low_plan(300, 555, batch=2, heads=heads[0], kv_heads=heads[1], head_dim=64, dtype="float16")
    check(*make_inputs(plan), random_mask(plan, 0.3), plan, layout)


@pytest.mark.parametrize("block", [(128, 32), (64, 32)])
def test_hostile_masks(block):
    plan = low_plan(700, 4500, heads=4, kv_heads=1, block_q=block[0], block_k=block[1])
    bits = np.zeros((1, 4, plan.num_q_blocks, plan.num_k_blocks), bool)
    bits[:, 0, :, ::2] = True  # alternating
    bits[:, 1, :, 0] = True  # one far block
    bits[:, 2, ::2] = True  # every other row of blocks has nothing
    bits[:, 3, :, -1] = True  # visible to the last rows alone
    check(*make_inputs(plan), pack(bits, plan), plan)


def test_maxima_that_rise_late():
    """Scores that grow towards the first key, which is visited last, so that every tile raises the base."""
    plan = low_plan(256, 4096, heads=2, kv_heads=1)
    q, k, v = (x.astype(np.float32) for x in make_inputs(plan))
    direction = np.sign(q[0, 0, 0])
    q = np.broadcast_to(direction, q.shape) + 0.1 * q
    k += direction * np.linspace(3, 0, plan.seqlen_k)[None, :, None, None]
    arrays = [x.astype(ml_dtypes.bfloat16) for x in (q, k, v)]
    check(*arrays, None, plan)


def test_long_sums_do_not_drift():
    """Equal weights over 32,000 keys and v of one sign: sums in the tensor cores alone would fall far short."""
    import cupy

    plan = low_plan(128, 32000, heads=1, kv_heads=1, causal=False)
    q, k, v = make_inputs(plan)
    q[:] = 0
    v = np.abs(v)
    out, _ = attend_module.attend(*(cupy.asarray(x) for x in (q, k, v)), None, plan)
    mean = v.astype(np.float64).mean(axis=1)
    assert np.abs(out.get()[0, :, 0].astype(np.float64) - mean[0]).max() <= 0.01 * mean.max()


def test_real_heads():
    sample = salekit.load_sample()
    import cupy

    q, k, v = (cupy.asarray(sample[name]) for name in "qkv")
    for thresholds in (0.0, 0.008):
        want, want_lse, want_mask = salekit.sparse_attention(
            q, k, v, thresholds=thresholds, dense_below=0, return_lse=True, return_mask=True
        )
        got, lse, mask = salekit.sparse_attention(
            q, k, v, thresholds=thresholds, dense_below=0, return_lse=True, return_mask=True, attend="int8-fp8"
        )
        assert (mask.words == want_mask.words).all()
        assert (relative_errors(got.get(), want.get()) <= 0.03).all()
        assert abs(lse - want_lse).max() <= 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor, row", [("q", 50), ("k", 50), ("v", 50), ("v", 150)])  # the last: unseen by most rows
def test_what_is_not_finite_shows_as_in_the_twin(tensor, row, value):
    plan = low_plan(200, 200, heads=4, kv_heads=2, head_dim=64, dtype="float16")
    inputs = dict(zip("qkv", make_inputs(plan)))
    inputs[tensor][0, row, 1, 3] = value
    q, k, v = inputs.values()
    out, _ = run(q, k, v, None, plan)
    twin, _ = reference.attend(q, k, v, None, plan)
    assert np.array_equal(np.isnan(out), np.isnan(twin)) and np.isnan(out).any() and np.isfinite(out).any()


def test_repeats_and_recorded_calls_give_the_same_bits():
    import cupy

    plan = low_plan(1500, 1500, heads=8, kv_heads=2)
    q, k, v = (cupy.asarray(x) for x in make_inputs(plan))
    options = dict(attend="int8-fp8", thresholds=0.01, dense_below=0, return_lse=True)
    outputs = [salekit.sparse_attention(q, k, v, **options) for _ in range(20)]
    made = salekit.plan(q, k, v, attend="int8-fp8", dense_below=0)
    outputs.append(made.run(q, k, v, thresholds=0.01, return_lse=True))
    first = [x.get().view(np.uint8) for x in outputs[0]]
    for out in outputs[1:]:
        assert all(np.array_equal(x.get().view(np.uint8), y) for x, y in zip(out, first))
