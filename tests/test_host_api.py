"""The public functions on NumPy arrays: the twin behind the API, results, layouts, empty and non-finite input."""

from __future__ import annotations

import inspect
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit.errors import ArgumentError, DtypeError, SalekitError

SPARSE = dict(thresholds=0.2, dense_below=0)  # random scores have no strong pairs: a larger tau than on real data


def make(seqlen_q=700, seqlen_k=700, heads=2, kv_heads=1, head_dim=64, batch=1, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim)).astype(dtype)
    k, v = (rng.standard_normal((batch, seqlen_k, kv_heads, head_dim)).astype(dtype) for _ in range(2))
    return q, k, v


def float64_attention(q, k, v, causal=True):
    """Dense attention in float64: out [b, s, h, d], lse [b, h, s]."""
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    if causal:
        rows, cols = np.ogrid[: q.shape[2], : k.shape[2]]
        s = np.where(cols <= rows + k.shape[2] - q.shape[2], s, -np.inf)
    with np.errstate(all="ignore"):
        top = s.max(axis=-1, keepdims=True)
        p = np.exp(s - np.where(np.isfinite(top), top, 0))
        total = p.sum(axis=-1, keepdims=True)
        out = np.where(total > 0, p @ v / total, 0)
        lse = np.where(total > 0, top + np.log(total), -np.inf)[..., 0]
    return out.transpose(0, 2, 1, 3), lse


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_names_and_signatures():
    assert salekit.__version__ == "0.1.0"
    for name in salekit.__all__:
        assert hasattr(salekit, name), name
    for name in ("quantize", "anchor_statistics", "row_limits", "estimate", "attend", "make_plan", "load_thresholds"):
        assert inspect.isfunction(getattr(salekit, name)), name
    assert str(inspect.signature(salekit.sparse_attention)).replace("'", "").split(" -> ")[0] == (
        "(q: Any, k: Any, v: Any, *, thresholds: Any = 0.008, causal: bool = True, softmax_scale: float | None = None, "
        "layout: str = bshd, estimator: str = auto, attend: str = exact, block: tuple[int, int] = (128, 32), "
        "query_stride: int = 1, full_rows: int = 1024, sink: int = 32, local: int = 128, dense_below: int = 8192, "
        "skipped: str = drop, softcap: float = 0.0, window_size: int | tuple[int, int] | None = None, "
        "sink_logits: Any = None, k_statistics: Any = None, return_lse: bool = False, return_mask: bool = False, "
        "out: Any = None, stream: Any = None)"
    )


def test_what_is_printed():
    """No arrays."""
    q, k, v = make()
    assert repr(salekit.key_statistics(k)) == "KeyStatistics(batch=1, num_kv_heads=1, head_dim=64, host memory)"
    shapes = "q=(1, 700, 2, 64), k=(1, 700, 1, 64), float16, bshd"
    assert repr(salekit.plan(q, k, v)) == f"AttentionPlan({shapes}, dense, host memory)"
    sparse = salekit.plan(q, k, v, dense_below=0, estimator="int8")
    assert repr(sparse) == f"AttentionPlan({shapes}, int8, host memory)"


def test_errors_have_their_names_at_the_top():
    assert salekit.OutOfMemoryError is salekit.errors.OutOfMemoryError
    for function in (salekit.sparse_attention, salekit.sparse_attention_varlen, salekit.merge_attention_states,
                     salekit.key_statistics):
        raised = function.__doc__.split("Raises ")[-1]
        for name in ("ArgumentError", "DtypeError", "GpuError", "CompileError", "OutOfMemoryError"):
            assert name in raised and name in salekit.__all__


def test_import_needs_no_cupy():
    code = ("import sys; sys.modules['cupy'] = None\n"
            "import salekit, salekit.cuda_src, salekit.quantize\n"
            "import numpy as np\n"
            "x = np.ones((1, 40, 1, 64), np.float16)\n"
            "salekit.sparse_attention(x, x, x, dense_below=0)\n"
            "assert callable(salekit.quantize) and callable(salekit.estimate) and callable(salekit.attend)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sys, salekit; assert 'cupy' not in sys.modules and 'rich' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("estimator", ["auto", "int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sparse_is_sparse_and_close(estimator, dtype):
    q, k, v = make(dtype=dtype)
    out, lse, mask = salekit.sparse_attention(q, k, v, estimator=estimator, return_lse=True, return_mask=True, **SPARSE)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (1, 2, 700) and lse.dtype == np.float32
    assert (mask.density() < 0.9).all() and (mask.density() > 0.1).all()
    want, want_lse = float64_attention(q, k, v)
    assert (lse <= want_lse + 1e-3).all()  # a subset of the keys
    assert np.abs(out.astype(np.float64) - want).mean() <= 0.2 * np.abs(want).mean() + 0.02
    first = slice(0, 128)  # all its keys are anchors
    assert np.abs(out[:, first].astype(np.float64) - want[:, first]).max() <= 2**-7 * np.abs(v.astype(np.float64)).max()


def test_returns():
    q, k, v = make(seqlen_q=200, seqlen_k=200)
    out = salekit.sparse_attention(q, k, v)
    assert isinstance(out, np.ndarray)
    assert len(salekit.sparse_attention(q, k, v, return_lse=True)) == 2
    _, mask = salekit.sparse_attention(q, k, v, return_mask=True)
    assert isinstance(mask, salekit.BlockMask)
    out, lse = salekit.dense_attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 2, 200)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(130, 130), (7, 100), (100, 7), (1, 1)])
def test_dense(causal, lengths):
    q, k, v = make(*lengths, heads=4, kv_heads=2, batch=2)
    want, want_lse = float64_attention(q, k, v, causal)
    for out, lse in (
        salekit.dense_attention(q, k, v, causal=causal, return_lse=True),
        salekit.sparse_attention(q, k, v, causal=causal, return_lse=True),
        salekit.sparse_attention(q, k, v, causal=causal, return_lse=True, dense_below=0, thresholds=[0, 0, 0, 0]),
    ):
        assert np.abs(out.astype(np.float64) - want).max() <= 2**-9 * max(1, np.abs(want).max())
        some = np.isfinite(want_lse)
        assert (np.isneginf(lse) == ~some).all() and (np.abs(lse[some] - want_lse[some]) <= 1e-4).all()
        assert (out.transpose(0, 2, 1, 3)[~some] == 0).all()


@pytest.mark.parametrize("block", [(64, 32), (128, 128)])
@pytest.mark.parametrize("lengths", [(200, 333), (333, 200)])
@pytest.mark.parametrize("causal", [True, False])
def test_mask_of_a_dense_call_is_what_zero_thresholds_estimate(block, lengths, causal):
    q, k, v = make(*lengths)
    options = dict(block=block, causal=causal, return_mask=True)
    by_length = salekit.sparse_attention(q, k, v, **options)[1]
    by_zero = salekit.sparse_attention(q, k, v, thresholds=0, dense_below=0, **options)[1]
    estimated = salekit.sparse_attention(q, k, v, thresholds=[0, 0], dense_below=0, **options)[1]
    for mask in (by_length, by_zero):
        assert same(mask.words, estimated.words)
        assert (mask.to_dense() == mask.visible()).all()


def test_layouts_and_strides_give_the_same_bits():
    q, k, v = make(heads=4, kv_heads=2, batch=2, seqlen_q=450, seqlen_k=600)
    want, want_lse = salekit.sparse_attention(q, k, v, return_lse=True, **SPARSE)
    swapped = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    out, lse = salekit.sparse_attention(*swapped, layout="bhsd", return_lse=True, **SPARSE)
    assert out.shape == swapped[0].shape
    assert same(np.ascontiguousarray(out.transpose(0, 2, 1, 3)), want) and same(lse, want_lse)
    padded = np.zeros((2, 450, 4, 96), np.float16)[..., 8:72]
    padded[...] = q
    assert same(salekit.sparse_attention(padded, k, v, **SPARSE), want)


def test_out():
    q, k, v = make(seqlen_q=300, seqlen_k=300)
    want = salekit.sparse_attention(q, k, v, **SPARSE)
    buffer = np.full((1, 2, 300, 96), 7, np.float16)
    out = buffer[..., 8:72]
    swapped = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    got = salekit.sparse_attention(*swapped, layout="bhsd", out=out, **SPARSE)
    assert got is out and same(np.ascontiguousarray(out.transpose(0, 2, 1, 3)), want)
    assert (buffer[..., :8] == 7).all() and (buffer[..., 72:] == 7).all()
    assert salekit.dense_attention(*swapped, layout="bhsd", out=out) is out
    with pytest.raises(ArgumentError, match="out: got shape"):
        salekit.sparse_attention(q, k, v, out=out)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("dense_below", [0, 1024])
def test_zero_lengths(lengths, batch, dense_below):
    q, k, v = make(*lengths, batch=batch)
    out, lse, mask = salekit.sparse_attention(q, k, v, return_lse=True, return_mask=True, dense_below=dense_below)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (batch, 2, lengths[0]) and np.isneginf(lse).all()
    assert mask.words.shape == (batch, 2, -(-lengths[0] // 128), -(-lengths[1] // 1024)) and not mask.words.any()
    assert mask.to_dense().shape == (batch, 2, -(-lengths[0] // 128), -(-lengths[1] // 32))
    filled = np.full_like(q, 9)
    assert salekit.dense_attention(q, k, v, out=filled) is filled and (filled == 0).all()


@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_nonfinite_reaches_the_output_as_in_dense(estimator, value, where):
    q, k, v = make(heads=4, kv_heads=2)
    if where == "q":
        q[0, 600, 1, 3] = value
    else:
        k[0, 150, 1, 3] = value
    for thresholds in (0.2, np.inf):
        out, mask = salekit.sparse_attention(
            q, k, v, estimator=estimator, thresholds=thresholds, dense_below=0, return_mask=True, block=(64, 32))
        dense = salekit.dense_attention(q, k, v)
        heads = [1] if where == "q" else [2, 3]
        rows = [600] if where == "q" else np.arange(700)
        for head in heads:
            got, want = out[0, rows, head].astype(np.float32), dense[0, rows, head].astype(np.float32)
            assert (np.isnan(got) == np.isnan(want)).all()
            assert (np.abs(got - want)[~np.isnan(want)] <= 2**-9 * 4).all()
        others = [head for head in range(4) if head not in heads]
        assert np.isfinite(out[0, :, others].astype(np.float32)).all()
        assert (mask.density()[0, others] < 0.9).all()


def test_thresholds_per_head():
    q, k, v = make(heads=4, kv_heads=2)
    _, mask = salekit.sparse_attention(
        q, k, v, thresholds=[0, 0.2, 1.0, np.inf], dense_below=0, return_mask=True, block=(64, 32))
    dense, some, few, anchors = mask.density()[0]
    assert dense == 1 > some > few >= anchors > 0


def test_softmax_scale_and_determinism():
    q, k, v = make(seqlen_q=300, seqlen_k=300)
    a = salekit.sparse_attention(q, k, v, softmax_scale=0.25, **SPARSE)
    scaled = (q.astype(np.float32) * 2).astype(np.float16)  # exact
    assert same(a, salekit.sparse_attention(scaled, k, v, **SPARSE))
    assert not same(a, salekit.sparse_attention(q, k, v, **SPARSE))


def test_stages_by_hand_are_the_pipeline():
    q, k, v = make(heads=4, kv_heads=2)
    for estimator in ("int4", "int8", "int8-sp24"):
        plan = salekit.make_plan(q, k, v, dense_below=0, estimator=estimator)
        quantized = salekit.quantize(q, k, plan)
        statistics = salekit.anchor_statistics(q, k, quantized.k_mean, plan)
        limits = salekit.row_limits(*statistics, quantized, 0.2, plan)
        mask = salekit.estimate(quantized, limits, plan)
        out, lse = salekit.attend(q, k, v, mask, plan, return_lse=True)
        want = salekit.sparse_attention(q, k, v, estimator=estimator, return_lse=True, return_mask=True, **SPARSE)
        assert same(out, want[0]) and same(lse, want[1]) and same(mask.words, want[2].words)


@pytest.mark.parametrize("skipped", ("drop", "pool"))
def test_a_mask_has_block_sizes_of_its_own(skipped):
    """Not those of the plan: the same blocks, in finer ones, are the same attention."""
    q, k, v = make(seqlen_q=300, seqlen_k=430, heads=4, kv_heads=2)
    rng = np.random.default_rng(3)
    coarse = rng.random((1, 4, 3, 4)) < 0.5
    coarse[..., 0] = True
    fine = coarse.repeat(2, axis=2)[:, :, :5].repeat(4, axis=3)[..., :14]
    sizes = (300, 430, True)
    visible = [salekit.BlockMask.from_dense(np.zeros_like(bits), *block, *sizes).visible()
               for bits, block in ((coarse, (128, 128)), (fine, (64, 32)))]
    coarse, fine = coarse & visible[0], fine & visible[1]
    masks = {block: salekit.BlockMask.from_dense(bits, *block, *sizes)
             for bits, block in ((coarse, (128, 128)), (fine, (64, 32)))}
    options = dict(dense_below=0, skipped=skipped)
    plans = [salekit.make_plan(q, k, v, block=block, **options) for block in ((128, 128), (64, 32))]
    for mask in masks.values() if skipped == "drop" else [masks[64, 32]]:
        outs = [salekit.attend(q, k, v, mask, plan, return_lse=True) for plan in plans]
        assert same(outs[0][0], outs[1][0]) and same(outs[0][1], outs[1][1])
    if skipped == "drop":
        a, b = (salekit.attend(q, k, v, mask, plans[0])[0].astype(np.float32) for mask in masks.values())
        assert np.abs(a - b).max() < 2e-3
    everything = salekit.BlockMask.from_dense(np.broadcast_to(visible[1], fine.shape), 64, 32, *sizes)
    out = salekit.attend(q, k, v, everything, plans[0])[0].astype(np.float32)
    assert np.abs(out - salekit.dense_attention(q, k, v).astype(np.float32)).max() < 2e-3


@pytest.mark.parametrize("call, error, match", [
    (lambda q, k, v: salekit.sparse_attention(q, k, v, thresholds=-1), ArgumentError, "thresholds: got -1"),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, thresholds=[1, 2, 3]), ArgumentError, "thresholds: got shape"),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, thresholds=None), DtypeError, "thresholds: got NoneType"),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, sink_logits=0.5), DtypeError,
     "sink_logits: got float; wants one number a head in a list"),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, attend="fp8"), ArgumentError, "attend: got 'fp8'"),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, stream=0), ArgumentError, "stream: "),
    (lambda q, k, v: salekit.sparse_attention(q, k, v, layout="bhsd"), ArgumentError, "k: got 700 heads|q: got"),
    (lambda q, k, v: salekit.dense_attention(q, k, v, causal=None), ArgumentError, "causal: got None"),
    (lambda q, k, v: salekit.dense_attention(q, k.tolist(), v), DtypeError, "k: got list"),
    (lambda q, k, v: salekit.make_plan(q, k, v[0]), ArgumentError, "v: got 3 axes"),
])
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(*make(seqlen_q=690))
    assert isinstance(caught.value, SalekitError)


def test_sample_at_the_default_threshold():
    sample = salekit.load_sample()
    q, k, v = (x[:, :2048] for x in sample.values())
    out, mask = salekit.sparse_attention(q, k, v, dense_below=0, return_mask=True)
    dense = salekit.dense_attention(q, k, v).astype(np.float64)
    assert (mask.density() < 0.9).any()
    assert np.abs(out.astype(np.float64) - dense).sum() <= 0.2 * np.abs(dense).sum()
    same, everything = salekit.sparse_attention(q, k, v, return_mask=True)  # dense by its length
    assert same.tobytes() == salekit.dense_attention(q, k, v).tobytes()
    assert (everything.density() == 1).all()
