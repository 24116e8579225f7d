"""Low-bit attention on the twin: its error on real heads, and its edges."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import salekit

LOW_BIT = dict(attend="int8-fp8", dense_below=0)


def relative_error(got, want) -> np.ndarray:
    """[heads] of a [1, seqlen, heads, head_dim] output."""
    got, want = (x.astype(np.float64) for x in (got, want))
    size = np.square(want).sum(axis=(0, 1, 3))
    return np.sqrt(np.square(got - want).sum(axis=(0, 1, 3)) / np.where(size == 0, 1, size))


def draw(seqlen_q, seqlen_k, heads=4, kv_heads=2, head_dim=64, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((1, seqlen_q, heads, head_dim), *((1, seqlen_k, kv_heads, head_dim),) * 2)
    return [rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in shapes]


def test_error_on_real_heads():
    sample = salekit.load_sample()
    q, k, v = (sample[name][:, :2048] for name in "qkv")
    for thresholds in (0.0, 0.008):
        options = dict(thresholds=thresholds, return_lse=True, return_mask=True)
        want, want_lse, want_mask = salekit.sparse_attention(q, k, v, dense_below=0, **options)
        got, lse, mask = salekit.sparse_attention(q, k, v, **LOW_BIT, **options)
        assert np.array_equal(mask.words, want_mask.words)
        assert (relative_error(got, want) <= 0.03).all()
        assert np.abs(lse - want_lse).max() <= 0.1 and np.abs(lse - want_lse).mean() <= 0.02


def test_balancing_rescues_large_channels():
    """A channel that is large in q and small in k takes q's codes for itself unless the two are balanced."""
    q, k, v = (x.astype(np.float32) for x in draw(600, 600, heads=2, kv_heads=1))
    q[..., 3] *= 100
    k[..., 3] /= 100
    arrays = [x.astype(np.float16) for x in (q, k, v)]
    want = salekit.sparse_attention(*arrays, thresholds=0.0)
    assert (relative_error(salekit.sparse_attention(*arrays, thresholds=0.0, **LOW_BIT), want) <= 0.05).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (33, 31), (130, 257), (257, 130), (1, 300)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (12, 1)])
def test_shapes(heads, lengths, causal):
    q, k, v = draw(*lengths, *heads, dtype=ml_dtypes.bfloat16)
    options = dict(thresholds=0.02, causal=causal, return_lse=True)
    want, want_lse = salekit.sparse_attention(q, k, v, dense_below=0, **options)
    got, lse = salekit.sparse_attention(q, k, v, **LOW_BIT, **options)
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    assert np.abs(lse[seen] - want_lse[seen]).max(initial=0) <= 0.15
    assert (relative_error(got, want) <= 0.08).all()
    rows = np.moveaxis(got.astype(np.float32), 1, 2)
    assert not rows[~seen].any()


def test_zeros_stay_exact():
    q, k, v = draw(100, 100)
    q[:, 7], v[..., 5] = 0, 0
    want, got = (salekit.sparse_attention(q, k, v, thresholds=0.0, **extra) for extra in ({}, LOW_BIT))
    assert not got[..., 5].any()
    # A row of zeros weighs all keys alike: only v is rounded.
    assert relative_error(got[:, 7:8], want[:, 7:8]).max() <= 0.04
    same = salekit.sparse_attention(q, np.zeros_like(k), v, thresholds=0.0, **LOW_BIT)
    assert relative_error(same, salekit.sparse_attention(q, np.zeros_like(k), v, thresholds=0.0)).max() <= 0.04


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(value):
    q, k, v = draw(200, 200)
    bad = q.copy()
    bad[0, 50, 1, 3] = value
    out = salekit.sparse_attention(bad, k, v, **LOW_BIT)
    assert np.isnan(out[0, 50, 1]).all() and np.isfinite(np.delete(out[0, :, 1], 50, axis=0)).all()
    bad = k.copy()
    bad[0, 10, 0, 3] = value
    out = salekit.sparse_attention(q, bad, v, **LOW_BIT)
    assert np.isnan(out[0, 10:, :2]).all() and np.isfinite(out[0, :, 2:]).all()
    bad = v.copy()
    bad[0, 10, 0, 3] = value
    out = salekit.sparse_attention(q, k, bad, thresholds=0.0, **LOW_BIT)
    assert np.isnan(out[0, 10:, :2, 3]).all() and np.isfinite(np.delete(out, 3, axis=3)).all()
