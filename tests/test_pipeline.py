"""The whole pipeline on the GPU against the twin, and the promises of the API that need a GPU."""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit import reference
from salekit.errors import ArgumentError, DtypeError

pytestmark = pytest.mark.gpu

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
TAU = 0.2  # random scores have no strong pairs: a larger tau than on real data leaves masks of medium density
MASK_AGREEMENT = 0.999  # codes, m and l differ in the last bits between the backends, and so a few votes at the limit
LSE_TOLERANCE = 2e-3  # the row sum may be of probabilities rounded to 8 bits
SPIN_CYCLES = 1_000_000_000  # about half a second of a GPU's clock


@lru_cache(maxsize=1)
def cp():
    import cupy

    return cupy


def make(seqlen_q=1100, seqlen_k=None, heads=4, kv_heads=2, head_dim=128, batch=1, dtype=BF16, seed=0):
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim), np.float32)
    k = rng.standard_normal((batch, seqlen_k, kv_heads, head_dim), np.float32) + 2 * rng.standard_normal(head_dim)
    v = rng.standard_normal((batch, seqlen_k, kv_heads, head_dim), np.float32)
    return tuple(x.astype(dtype) for x in (q, k, v))


def on_gpu(*arrays):
    return tuple(cp().asarray(x) for x in arrays)


def out_tolerance(out, v):
    """P is rounded to the input's type (half a unit of a weighted mean of v), the output twice more."""
    unit = 2.0**-8 if out.dtype == BF16 else 2.0**-10
    largest = np.nanmax(np.abs(np.where(np.isfinite(v.astype(np.float32)), v.astype(np.float32), 0)), initial=0)
    return unit * (largest + np.abs(out.astype(np.float32)))


def assert_close(got, want, v):
    """Within :func:`out_tolerance`; NaN and inf at the same places."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = got.astype(np.float32), want.astype(np.float32)
    finite = np.isfinite(b)
    assert (np.isnan(a) == np.isnan(b)).all() and (np.isinf(a) == np.isinf(b)).all()
    excess = np.abs(a[finite] - b[finite]) - out_tolerance(want, v)[finite]
    assert excess.size == 0 or excess.max() <= 0, f"exceeds its bound by {excess.max()}"


def assert_lse_close(got, want):
    assert got.shape == want.shape and got.dtype == np.float32
    finite = np.isfinite(want)
    assert (np.isneginf(got) == np.isneginf(want)).all() and (np.isnan(got) == np.isnan(want)).all()
    assert (np.abs(got[finite] - want[finite]) <= LSE_TOLERANCE).all()


def check(q, k, v, *, layout="bshd", thresholds=TAU, sparse=True, **options):
    """One call on the GPU against the twin: the mask, then out and lse over the GPU's own mask. Returns the mask."""
    order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
    options = {"dense_below": 0, **options}
    arguments = on_gpu(*(np.ascontiguousarray(x.transpose(order)) for x in (q, k, v)))
    out, lse, mask = salekit.sparse_attention(
        *arguments, layout=layout, thresholds=thresholds, return_lse=True, return_mask=True, **options)
    assert isinstance(out, cp().ndarray) and isinstance(mask.words, cp().ndarray)
    again, again_mask = salekit.sparse_attention(
        *arguments, layout=layout, thresholds=thresholds, return_mask=True, **options)
    assert again.get().tobytes() == out.get().tobytes(), "two runs differ"
    assert (again_mask.words.get() == mask.words.get()).all()

    arch = salekit.make_plan(*arguments, layout=layout, **options).arch
    plan = salekit.make_plan(q, k, v, **{**options, "estimator": resolved(options.get("estimator", "auto"), arch)})
    _, _, want_mask = reference.sparse_attention(q, k, v, np.float32(thresholds), plan)
    mask = mask.to_numpy()
    got_bits, want_bits = mask.to_dense(), want_mask.to_dense()
    visible = np.broadcast_to(mask.visible(), got_bits.shape)
    assert not got_bits[~visible].any()
    assert np.mean((got_bits == want_bits)[visible]) >= MASK_AGREEMENT
    if sparse:
        assert want_mask.density().mean() < 0.9, "this case does not test the sparse path"

    want, want_lse = reference.attend(q, k, v, mask, plan)
    assert_close(np.ascontiguousarray(out.get().transpose(order)), want, v)
    assert_lse_close(lse.get(), want_lse)
    return mask


def resolved(estimator, arch):
    from salekit.plans import resolve_estimator

    return resolve_estimator(estimator, arch)


# --- shapes and options ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_types_and_layouts(dtype, head_dim, layout):
    check(*make(dtype=dtype, head_dim=head_dim), layout=layout)


@pytest.mark.parametrize("estimator", ["auto", "int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("query_stride", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_estimators_and_strides(estimator, query_stride, head_dim):
    check(*make(head_dim=head_dim), estimator=estimator, query_stride=query_stride, full_rows=200)


@pytest.mark.parametrize("block", [(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("estimator", ["int4", "int8"])
def test_blocks(block, estimator):
    check(*make(seqlen_q=1500), block=block, estimator=estimator, thresholds=0.4)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_and_batch(heads, kv_heads, batch):
    check(*make(heads=heads, kv_heads=kv_heads, batch=batch, head_dim=64))


@pytest.mark.parametrize("lengths", [(1, 1), (33, 33), (64, 64), (129, 129), (1023, 1023), (1025, 1025), (1301, 1301)])
@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
def test_odd_lengths(lengths, estimator):
    check(*make(*lengths), estimator=estimator, sparse=lengths[0] > 1000)


@pytest.mark.parametrize("lengths", [(300, 1301), (1, 1500), (64, 1025), (1301, 1000), (700, 65)])
@pytest.mark.parametrize("causal", [True, False])
def test_unequal_lengths(lengths, causal):
    check(*make(*lengths), causal=causal, thresholds=0.4, sparse=lengths[1] >= 1000)


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
def test_not_causal(estimator):
    check(*make(), causal=False, estimator=estimator)


@pytest.mark.parametrize("sink, local", [(0, 0), (0, 64), (1, 33), (100, 64), (32, 100_000)])
def test_anchors(sink, local):
    # With local 0 the first row of a tile has one anchor key, and so selects nearly everything.
    check(*make(), sink=sink, local=local, thresholds=0.4, sparse=0 < local < 1000)


def test_softmax_scale():
    check(*make(), softmax_scale=0.05)


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
def test_real_sample(estimator):
    sample = salekit.load_sample()
    mask = check(*(x[:, :3001] for x in sample.values()), thresholds=0.02, estimator=estimator)
    assert mask.density().max() < 0.9


# --- thresholds --------------------------------------------------------------------------------------------------
def test_thresholds_per_head():
    q, k, v = make()
    mask = check(q, k, v, thresholds=[0.0, 0.2, 1.0, np.inf], block=(64, 32))
    dense, some, few, anchors = mask.density()[0]
    assert dense == 1 > some > few >= anchors > 0


def test_thresholds_zero_and_infinite():
    q, k, v = make()
    assert check(q, k, v, thresholds=0.0, sparse=False).density().min() == 1
    anchors = check(q, k, v, thresholds=np.inf)
    plan = salekit.make_plan(q, k, v, block=(64, 32))
    want = reference.anchor_blocks(plan)
    assert (check(q, k, v, thresholds=np.inf, block=(64, 32)).to_dense() == want).all()
    assert (anchors.to_dense().any(axis=2)).any()


def test_thresholds_on_the_device_are_not_checked():
    q, k, v = make()
    values = cp().asarray(np.array([np.nan, -1.0, TAU, np.inf], np.float32))
    _, mask = salekit.sparse_attention(
        *on_gpu(q, k, v), thresholds=values, dense_below=0, return_mask=True, block=(64, 32))
    _, want = salekit.sparse_attention(
        *on_gpu(q, k, v), thresholds=[0, 0, TAU, np.inf], dense_below=0, return_mask=True, block=(64, 32))
    assert (mask.words.get() == want.words.get()).all()
    assert mask.density()[0, :2].tolist() == [1, 1] and mask.density()[0, 2:].max() < 0.9


# --- non-finite input --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_nonfinite(estimator, value, where):
    q, k, v = make()
    if where == "q":
        q[0, 900, 1, 3] = value
    else:
        k[0, 150, 1, 3] = value
    for thresholds in (TAU, np.inf):
        mask = check(q, k, v, estimator=estimator, thresholds=thresholds, block=(64, 32), sparse=False)
        if where == "k":
            assert (mask.density()[0, 2:] == 1).all() and mask.density()[0, :2].max() < 0.9
        else:
            visible = mask.visible()[900 // 64]
            assert (mask.to_dense()[0, 1, 900 // 64] == visible).all() and mask.density()[0, [0, 2, 3]].max() < 0.9


def test_nonfinite_v_shows_where_its_block_is_selected():
    q, k, v = make()
    v[0, 200, 0, 5] = np.nan
    check(q, k, v)


# --- lengths of zero, dense calls --------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (300, 0), (0, 0)])
@pytest.mark.parametrize("dense_below", [0, 1024])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_zero_lengths(lengths, dense_below, layout):
    order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
    q, k, v = (np.ascontiguousarray(x.transpose(order)) for x in make(*lengths, batch=2))
    options = dict(layout=layout, return_lse=True)
    out, lse, mask = salekit.sparse_attention(*on_gpu(q, k, v), dense_below=dense_below, return_mask=True, **options)
    assert out.shape == q.shape and (out.get() == 0).all()
    assert lse.shape == (2, 4, lengths[0]) and np.isneginf(lse.get()).all()
    assert mask.to_dense().shape == (2, 4, -(-lengths[0] // 128), -(-lengths[1] // 32))
    poisoned = cp().asarray(np.full_like(q, 9))
    got, lse = salekit.dense_attention(*on_gpu(q, k, v), out=poisoned, **options)
    assert got is poisoned and (got.get() == 0).all() and np.isneginf(lse.get()).all()
    assert salekit.sparse_attention(*on_gpu(q, k, v)[:3], layout=layout).shape == q.shape


def test_zero_batch():
    q, k, v = make(batch=0)
    assert salekit.sparse_attention(*on_gpu(q, k, v), dense_below=0).shape == q.shape


@pytest.mark.parametrize("lengths", [(1, 1), (77, 77), (1023, 1023), (100, 777), (777, 100)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, head_dim", [(FP16, 64), (BF16, 128)])
def test_dense(lengths, causal, dtype, head_dim):
    q, k, v = make(*lengths, dtype=dtype, head_dim=head_dim, batch=2)
    out, lse = salekit.dense_attention(*on_gpu(q, k, v), causal=causal, return_lse=True)
    want, want_lse = salekit.dense_attention(q, k, v, causal=causal, return_lse=True)
    assert_close(out.get(), want, v)
    assert_lse_close(lse.get(), want_lse)
    short, mask = salekit.sparse_attention(*on_gpu(q, k, v), causal=causal, return_mask=True)  # dense by length
    assert short.get().tobytes() == out.get().tobytes() and (mask.to_dense() == mask.visible()).all()


def test_all_selected_equals_dense():
    q, k, v = make()
    out, lse = salekit.sparse_attention(*on_gpu(q, k, v), thresholds=[0] * 4, dense_below=0, return_lse=True)
    want, want_lse = salekit.dense_attention(*on_gpu(q, k, v), return_lse=True)
    assert_close(out.get(), want.get(), v)
    assert_lse_close(lse.get(), want_lse.get())


# --- memory, streams, other producers ----------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_out_in_place(layout):
    order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
    q, k, v = on_gpu(*(np.ascontiguousarray(x.transpose(order)) for x in make()))
    want = salekit.sparse_attention(q, k, v, layout=layout, thresholds=TAU, dense_below=0).get()
    buffer = cp().asarray(np.full((*q.shape[:3], 192), 7, BF16))
    out = buffer[..., 32:160]
    got = salekit.sparse_attention(q, k, v, layout=layout, thresholds=TAU, dense_below=0, out=out)
    assert got is out
    host = buffer.get().astype(np.float32)
    assert (host[..., 32:160] == want.astype(np.float32)).all()
    assert (host[..., :32] == 7).all() and (host[..., 160:] == 7).all()


def test_views_with_any_strides():
    q, k, v = make(heads=4, kv_heads=2)
    want = salekit.sparse_attention(*on_gpu(q, k, v), thresholds=TAU, dense_below=0).get()
    packed = cp().asarray(np.concatenate([q, k, v], axis=2))  # [batch, seqlen, q heads + k heads + v heads, head_dim]
    got = salekit.sparse_attention(
        packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:], thresholds=TAU, dense_below=0)
    assert got.get().tobytes() == want.tobytes()

    one = make(heads=2, kv_heads=1)
    shared = cp().broadcast_to(cp().asarray(one[1]), (1, 1100, 2, 128))  # stride 0 along the heads
    out = salekit.sparse_attention(cp().asarray(one[0]), shared, shared, thresholds=TAU, dense_below=0)
    want = salekit.sparse_attention(*on_gpu(one[0], one[1], one[1]), thresholds=TAU, dense_below=0)
    assert_close(out.get(), want.get(), one[1])

    backwards = cp().asarray(np.ascontiguousarray(q[:, ::-1]))[:, ::-1]
    out = salekit.sparse_attention(backwards, *on_gpu(k, v), thresholds=TAU, dense_below=0)
    want = salekit.sparse_attention(*on_gpu(q, k, v), thresholds=TAU, dense_below=0)
    assert_close(out.get(), want.get(), v)


class Dlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class CudaArrayInterface:
    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": stream}


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_dlpack(dtype):
    arrays = on_gpu(*make(dtype=dtype))
    want = salekit.sparse_attention(*arrays, thresholds=TAU, dense_below=0).get()
    got = salekit.sparse_attention(*map(Dlpack, arrays), thresholds=TAU, dense_below=0).get()
    assert got.tobytes() == want.tobytes()
    out = cp().asarray(np.zeros(want.shape, dtype))
    wrapped = Dlpack(out)
    assert salekit.sparse_attention(*arrays, thresholds=TAU, dense_below=0, out=wrapped) is wrapped
    assert out.get().tobytes() == want.tobytes()


@pytest.mark.parametrize("with_stream", [False, True])
def test_cuda_array_interface(with_stream):
    arrays = on_gpu(*make(dtype=FP16))
    want = salekit.sparse_attention(*arrays, thresholds=TAU, dense_below=0).get()
    other = cp().cuda.Stream(non_blocking=True)
    wrapped = [CudaArrayInterface(x, other.ptr if with_stream else None) for x in arrays]
    assert salekit.sparse_attention(*wrapped, thresholds=TAU, dense_below=0).get().tobytes() == want.tobytes()


@lru_cache(maxsize=1)
def spin_kernel():
    code = 'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }'
    return cp().RawKernel(code, "spin")


def spin():
    """Keep the current stream busy; returns an event that is done when it is over."""
    spin_kernel()((1,), (1,), (np.int64(SPIN_CYCLES),))
    event = cp().cuda.Event(disable_timing=True)
    event.record()
    return event


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("thresholds", ["scalar", "list", "device"])
def test_no_hidden_synchronisation(estimator, thresholds):
    arrays = on_gpu(*make())
    value = {"scalar": TAU, "list": [TAU] * 4, "device": cp().asarray(np.full(4, TAU, np.float32))}[thresholds]
    options = dict(thresholds=value, dense_below=0, estimator=estimator, return_lse=True, return_mask=True)
    stream = cp().cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(2):  # compiles, and fills the memory pool
            result = salekit.sparse_attention(*arrays, **options)
        stream.synchronize()
        spin()
        stream.synchronize()
        busy = spin()
        result = salekit.sparse_attention(*arrays, **options)
        assert not busy.done, "the call waited for the GPU"
        stream.synchronize()
    assert np.isfinite(result[1].get()).all()


@pytest.mark.parametrize("kind", ["cupy", "pointer", "current", "protocol"])
def test_stream(kind):
    host = make()
    want = salekit.sparse_attention(*on_gpu(*host), thresholds=TAU, dense_below=0).get()
    stream = cp().cuda.Stream(non_blocking=True)
    arrays = [cp().zeros(x.shape, x.dtype) for x in host]
    sources = on_gpu(*host)
    cp().cuda.Device().synchronize()
    with stream:  # the inputs arrive late, on this stream: work on any other one would see zeros
        spin()
        for target, source in zip(arrays, sources):
            target.data.copy_from_device_async(source.data, source.nbytes, stream)

    class Protocol:
        def __cuda_stream__(self):
            return (0, stream.ptr)

    if kind == "current":
        with stream:
            out = salekit.sparse_attention(*arrays, thresholds=TAU, dense_below=0)
    else:
        argument = {"cupy": stream, "pointer": stream.ptr, "protocol": Protocol()}[kind]
        out = salekit.sparse_attention(*arrays, thresholds=TAU, dense_below=0, stream=argument)
    stream.synchronize()
    assert out.get().tobytes() == want.tobytes()


def test_bad_input_on_the_gpu():
    q, k, v = make(seqlen_q=64)
    gq, gk, gv = on_gpu(q, k, v)
    flat = cp().asarray(np.zeros(gq.size + 8, BF16))

    def bad(error, match, *arrays, **options):
        with pytest.raises(error, match=match):
            salekit.sparse_attention(*arrays, **options)

    bad(ArgumentError, "k: is on host memory; wants cuda:0", gq, k, gv)
    bad(ArgumentError, "v: is on cuda:0; wants host memory", q, k, gv)
    bad(ArgumentError, "out: is on host memory", gq, gk, gv, out=np.empty_like(q))
    bad(ArgumentError, "thresholds: is on cuda:0; wants host memory", q, k, v,
        thresholds=cp().asarray(np.ones(4, np.float32)))
    bad(DtypeError, "thresholds: got dtype float64 on the GPU", gq, gk, gv, thresholds=cp().asarray(np.ones(4)))
    bad(ArgumentError, r"thresholds: got shape \(3,\)", gq, gk, gv, thresholds=cp().asarray(np.ones(3, np.float32)))
    bad(ArgumentError, "thresholds: got nan", gq, gk, gv, thresholds=float("nan"))
    bad(ArgumentError, "thresholds: is not contiguous", gq, gk, gv,
        thresholds=cp().asarray(np.ones(8, np.float32))[::2])
    bad(ArgumentError, "q: .*16-byte aligned", flat[1:1 + gq.size].reshape(gq.shape), gk, gv)
    bad(ArgumentError, "q: .*multiples of 8 elements", cp().asarray(np.zeros((1, 64, 4, 132), BF16))[..., :128], gk, gv)
    bad(ArgumentError, "out: has a zero or negative stride", gq, gk, gv, out=cp().broadcast_to(gq[:, :1], gq.shape))
    bad(ArgumentError, "stream: got 'x'", gq, gk, gv, stream="x")
    bad(DtypeError, "q: got dtype float32", cp().asarray(q.astype(np.float32)), gk, gv)
