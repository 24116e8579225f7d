"""Serving shapes on the twin: merged states, statistics of keys, chunks, packed sequences, pages."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest

import salekit
from salekit.errors import ArgumentError, DtypeError

FP16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8}
ESTIMATORS = ("int4", "int8", "int8-sp24")
SPARSE = dict(thresholds=0.2, dense_below=0)


def draw(rng, *shape, dtype=FP16):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == b.tobytes()


def heads_of(q, k, v):
    """(head, float64 q, k, v [seqlen, head_dim]) of [seqlen, heads, head_dim] arrays."""
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        yield head, *(x.astype(np.float64)[:, h] for x, h in ((q, head), (k, head // group), (v, head // group)))


def check_dense(out, lse, q, k, v, causal=True):
    """[seqlen, heads, head_dim] outputs of dense attention against float64."""
    for head, rows, keys, values in heads_of(q, k, v):
        bits = np.ones((-(-len(rows) // 64), -(-len(keys) // 32)), bool)
        want, want_lse = oracle.attend(rows, keys, values, bits, rows.shape[1] ** -0.5, causal, 64, 32)
        size = np.abs(values).max(initial=0)
        assert (np.abs(out[:, head].astype(np.float64) - want) <= 2 * UNIT[out.dtype] * size).all()
        empty = np.isneginf(want_lse)
        assert (np.isneginf(lse[head]) == empty).all() and (out[empty, head] == 0).all()
        assert (np.abs(lse[head][~empty] - want_lse[~empty]) <= 1e-5 * (1 + np.abs(want_lse[~empty]))).all()


# --- merged states -------------------------------------------------------------------------------------------------
def merged_in_float64(out_a, lse_a, out_b, lse_b):
    out, lse = np.zeros(out_a.shape), np.full(lse_a.shape, -np.inf)
    for b, h, i in np.ndindex(*lse_a.shape):
        sides = [(o[b, i, h].astype(np.float64), float(s[b, h, i])) for o, s in ((out_a, lse_a), (out_b, lse_b))]
        sides = [(o, s) for o, s in sides if s != -np.inf]
        if sides:
            top = max(s for _, s in sides)
            total = sum(np.exp(s - top) for _, s in sides)
            out[b, i, h] = sum(np.exp(s - top) / total * o for o, s in sides)
            lse[b, h, i] = top + np.log(total)
    return out, lse


def states(rng, batch=2, rows=5, heads=3, dim=16, dtype=FP16, spread=3.0):
    out = draw(rng, batch, rows, heads, dim, dtype=dtype)
    return out, (spread * rng.standard_normal((batch, heads, rows))).astype(np.float32)


@pytest.mark.parametrize("dtype", (FP16, BF16))
@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
def test_merge_is_float64(dtype, layout):
    rng = np.random.default_rng(0)
    (out_a, lse_a), (out_b, lse_b) = (states(rng, dtype=dtype, spread=20.0) for _ in range(2))
    lse_a[0, 1, 2] = lse_b[1, 0, 3] = -np.inf
    lse_a[1, 2, 4] = lse_b[1, 2, 4] = -np.inf
    want, want_lse = merged_in_float64(out_a, lse_a, out_b, lse_b)
    order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
    a, b = (np.ascontiguousarray(x.transpose(order)) for x in (out_a, out_b))
    out, lse = salekit.merge_attention_states(a, lse_a, b, lse_b, layout=layout)
    assert out.dtype == dtype and lse.dtype == np.float32 and out.shape == a.shape
    out = out.transpose(order).astype(np.float64)
    assert (np.abs(out - want) <= UNIT[dtype] * (np.abs(want) + 1e-4)).all()
    assert (np.isneginf(lse) == np.isneginf(want_lse)).all() and np.isneginf(lse[1, 2, 4])
    assert (out[1, 4, 2] == 0).all()
    finite = np.isfinite(want_lse)
    assert (np.abs(lse[finite] - want_lse[finite]) <= 1e-6 * (1 + np.abs(want_lse[finite]))).all()
    # A side without a key gives the other side's bits, whatever its output holds.
    assert same(out[0, 2, 1], out_b[0, 2, 1].astype(np.float64)) and lse[0, 1, 2] == lse_b[0, 1, 2]


def test_merge_of_nan_and_garbage():
    rng = np.random.default_rng(1)
    (out_a, lse_a), (out_b, lse_b) = states(rng), states(rng)
    lse_a[0, 0, 0], out_a[0, 0, 0] = -np.inf, np.nan  # an empty side's output is ignored
    out_a[0, 1, 0, 3] = np.nan
    lse_b[0, 0, 2] = np.nan
    out_a[0, 3, 0], lse_a[0, 0, 3] = np.nan, lse_b[0, 0, 3] - 1000  # it has seen keys, however light
    lse_a[0, 0, 4] = np.inf
    out, lse = salekit.merge_attention_states(out_a, lse_a, out_b, lse_b)
    assert same(out[0, 0, 0], out_b[0, 0, 0]) and lse[0, 0, 0] == lse_b[0, 0, 0]
    assert np.isnan(out[0, 1, 0]).tolist() == [i == 3 for i in range(16)] and np.isfinite(lse[0, 0, 1])
    assert np.isnan(out[0, 2, 0]).all() and np.isnan(lse[0, 0, 2])
    assert np.isnan(out[0, 3, 0]).all() and np.isfinite(lse[0, 0, 3])
    assert np.isnan(out[0, 4, 0]).all() and np.isnan(lse[0, 0, 4])
    assert np.isfinite(out[:, :, 1:]).all()


def test_merge_splits_attention():
    rng = np.random.default_rng(2)
    q, k, v = draw(rng, 2, 70, 4, 64), draw(rng, 2, 130, 2, 64), draw(rng, 2, 130, 2, 64)
    whole, whole_lse = salekit.dense_attention(q, k, v, causal=False, return_lse=True)
    parts = [salekit.dense_attention(q, k[:, s], v[:, s], causal=False, return_lse=True)
             for s in (slice(0, 33), slice(33, 33), slice(33, 100), slice(100, 130))]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = salekit.merge_attention_states(out, lse, *part)
    assert (np.abs(lse - whole_lse) <= 1e-5).all()
    size = np.abs(v.astype(np.float64)).max()
    assert (np.abs(out.astype(np.float64) - whole.astype(np.float64)) <= 4 * UNIT[FP16] * size).all()
    # Packed, as sparse_attention_varlen returns them, and in place.
    packed = [(o[0], s[0]) for o, s in (parts[0], parts[2])]
    want = salekit.merge_attention_states(parts[0][0][:1], parts[0][1][:1], parts[2][0][:1], parts[2][1][:1])
    target = packed[0][0].copy()
    got, got_lse = salekit.merge_attention_states(target, packed[0][1], *packed[1], out=target)
    assert got is target and same(got, want[0][0]) and same(got_lse, want[1][0])
    alone = salekit.merge_attention_states(packed[0][0], packed[0][1], *packed[1], return_lse=False)
    assert same(alone, got)


@pytest.mark.parametrize("change, error, match", (
    (dict(out_b=np.zeros((2, 5, 3, 8), FP16)), ArgumentError, "out_b: got .*wants"),
    (dict(out_b=np.zeros((2, 5, 3, 16), BF16)), DtypeError, "out_b: got dtype"),
    (dict(out_a=np.zeros((2, 5, 16), FP16)), ArgumentError, "out_b: got 4 axes"),
    (dict(lse_a=np.zeros((2, 5, 3), np.float32)), ArgumentError, "lse_a: got shape"),
    (dict(lse_b=np.zeros((2, 3, 5))), DtypeError, "lse_b: got dtype float64"),
    (dict(lse_b=np.zeros((2, 3, 10), np.float32)[..., ::2]), ArgumentError, "lse_b: the last axis"),
    (dict(out=np.zeros((2, 5, 3, 8), FP16)), ArgumentError, "out: got shape"),
    (dict(layout="sbhd"), ArgumentError, "layout"),
    (dict(stream=3), ArgumentError, "stream"),
    (dict(out_a=np.zeros((2, 5, 3, 12), FP16), out_b=np.zeros((2, 5, 3, 12), FP16)), ArgumentError,
     "out_a: got head_dim 12; wants a multiple of 8"),
    (dict(out_a=np.zeros((2, 5, 3, 0), FP16), out_b=np.zeros((2, 5, 3, 0), FP16)), ArgumentError,
     "out_a: got head_dim 0; wants a multiple of 8"),
    (dict(lse_a=np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (2, 3, 5), (30, 10, 4))), ArgumentError,
     r"lse_a: got strides \(30, 10, 4\) bytes; wants multiples of 4"),
))
def test_merge_refuses(change, error, match):
    (out_a, lse_a), (out_b, lse_b) = (states(np.random.default_rng(3)) for _ in range(2))
    given = dict(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    options = {name: change.pop(name) for name in tuple(change) if name not in given}
    given.update(change)
    with pytest.raises(error, match=match):
        salekit.merge_attention_states(*given.values(), **options)


@pytest.mark.parametrize("packed", (False, True))
def test_merge_in_place_or_apart(packed):
    """out is a side itself, or memory that no argument has: a thread reads what it writes, and a row's lse."""
    memory = np.zeros((2, 24, 3, 16), FP16)
    lse = memory.reshape(-1).view(np.float32)[:30].reshape(2, 3, 5)
    rows, other = [memory[:, i : i + 5] for i in range(20)], np.ones((2, 5, 3, 16), FP16)
    apart = np.zeros((2, 3, 5), np.float32)

    def merge(out, a, b, lse_a=apart, lse_b=apart):
        given = [x[0] if packed else x for x in (a, lse_a, b, lse_b)]
        target = out[0] if packed else out
        assert salekit.merge_attention_states(*given, out=target)[0] is target

    for out, a, b in ((rows[0], rows[0], other), (rows[0], other, rows[0]), (rows[0], rows[0], rows[0]),
                      (rows[0], rows[5], rows[10]), (memory[:, 0:10:2], memory[:, 1:10:2], other)):
        merge(out, a, b)
    for call, name in (
        ((rows[1], rows[0], other), "out_a"), ((rows[1], other, rows[0]), "out_b"),
        ((rows[0], rows[0], rows[1]), "out_b"),
        ((rows[0][:, ::-1], rows[0], other), "a zero or negative stride"),
        ((rows[0], rows[0][:, ::-1], other), "out_a"), ((rows[0], other, other, lse), "lse_a"),
        ((rows[0], rows[0], other, apart, lse), "lse_b"),
    ):
        with pytest.raises(ArgumentError, match=f"^out: (shares memory with|has) {name}; wants memory of its own"):
            merge(*call)


def test_merge_names_the_axes_of_packed_states():
    out, lse = np.zeros((5, 3, 16), FP16), np.zeros((3, 5), np.float32)
    for change, match in (
        (dict(out_b=out[:4]), r"out_b: got \[total_q, num_heads, head_dim\] \(4, 3, 16\); wants \(5, 3, 16\)"),
        (dict(lse_b=lse[:, :4]), r"lse_b: got shape \(3, 4\); wants \[num_heads, total_q\] = \(3, 5\)"),
        (dict(out=np.zeros((4, 3, 16), FP16)), r"out: got shape \(4, 3, 16\); wants \(5, 3, 16\), as out_a has"),
    ):
        with pytest.raises(ArgumentError, match=f"^{match}"):
            salekit.merge_attention_states(**{**dict(out_a=out, lse_a=lse, out_b=out, lse_b=lse), **change})


def test_merge_of_nothing():
    out, lse = np.zeros((1, 0, 2, 16), FP16), np.zeros((1, 2, 0), np.float32)
    merged, merged_lse = salekit.merge_attention_states(out, lse, out, lse)
    assert merged.shape == out.shape and merged_lse.shape == lse.shape


# --- statistics of keys --------------------------------------------------------------------------------------------
def float64_statistics(k):
    """mean, rms, amax of [batch, seqlen, heads, head_dim]."""
    k = k.astype(np.float64)
    mean = k.mean(axis=1)
    away = k - mean[:, None]
    return mean, np.sqrt((away**2).mean(axis=1)), np.abs(away).max(axis=(1, 3))


@pytest.mark.parametrize("dtype", (FP16, BF16))
@pytest.mark.parametrize("cuts", ((), (1,), (64, 65, 300), (0, 7, 7, 401)))
def test_statistics_in_parts(cuts, dtype):
    rng = np.random.default_rng(4)
    k = (draw(rng, 2, 401, 3, 64, dtype=np.float32) + 5 * rng.standard_normal((2, 1, 3, 64))).astype(dtype)
    edges = [0, *cuts, 401]
    parts = [k[:, a:b] for a, b in zip(edges, edges[1:])]
    updated = merged = salekit.key_statistics(parts[0])
    for part in parts[1:]:
        updated, merged = updated.update(part), merged.merge(salekit.key_statistics(part))
    for got in (updated, merged):
        assert got.num_keys.tolist() == [401, 401] and got.num_keys.dtype == np.int32
        # Sums and means are rounded to float32 once a part.
        bound = 2.0**-23 * len(parts) * np.abs(k.astype(np.float64)).max()
        for x, want in zip((got.mean, got.rms, got.amax), float64_statistics(k)):
            assert x.dtype == np.float32 and (np.abs(x - want) <= 2 * bound).all()
        assert (np.abs(got.scale * 127 - got.amax) <= 2.0**-22 * got.amax).all()


def test_statistics_are_what_a_call_takes():
    rng = np.random.default_rng(5)
    q, k, v = draw(rng, 1, 300, 4, 64), draw(rng, 1, 333, 2, 64), draw(rng, 1, 333, 2, 64)
    for layout in ("bshd", "bhsd"):
        order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
        moved = [np.ascontiguousarray(x.transpose(order)) for x in (q, k, v)]
        statistics = salekit.key_statistics(moved[1], layout=layout)
        for estimator in ESTIMATORS:
            options = dict(estimator=estimator, return_lse=True, return_mask=True, layout=layout, **SPARSE)
            want = salekit.sparse_attention(*moved, **options)
            got = salekit.sparse_attention(*moved, k_statistics=statistics, **options)
            assert same(got[0], want[0]) and same(got[1], want[1]) and same(got[2].words, want[2].words)
            planned = salekit.plan(*moved, layout=layout, estimator=estimator, dense_below=0)
            assert same(planned.run(*moved, thresholds=0.2, k_statistics=statistics), want[0])


def test_statistics_of_fewer_keys_clamp():
    """Codes of keys beyond what the statistics reach are clamped, and those that are not finite are 0."""
    rng = np.random.default_rng(6)
    q, k = draw(rng, 1, 64, 1, 64), draw(rng, 1, 256, 1, 64)
    statistics = salekit.key_statistics(k[:, :64])
    k[0, 100, 0, 3], k[0, 101, 0, 3], k[0, 102, 0, 3] = 1000, -1000, np.nan
    plan = salekit.make_plan(q, k, k, estimator="int8")
    codes = salekit.quantize(q, k, plan, statistics).k_codes[0, 0]
    assert codes[100:103, 3].tolist() == [127, -127, 0]
    with np.errstate(all="ignore"):
        want = np.rint((k[0, :, 0].astype(np.float32) - statistics.mean[0, 0]) * (127 / statistics.amax[0, 0]))
    assert (codes[:64] == want[:64]).mean() > 0.999 and np.abs(codes).max() == 127


def test_statistics_of_no_keys_and_of_nan():
    k = np.zeros((2, 0, 3, 64), FP16)
    none = salekit.key_statistics(k)
    assert not none.mean.any() and (none.scale == 1).all() and not none.num_keys.any()
    rng = np.random.default_rng(7)
    some = draw(rng, 2, 50, 3, 64)
    for got in (none.update(some), salekit.key_statistics(some).merge(none)):
        for name in ("mean", "rms", "amax", "scale", "num_keys"):
            want = getattr(salekit.key_statistics(some), name)
            assert (np.abs(getattr(got, name) - want) <= 2.0**-22 * np.abs(some.astype(np.float32)).max()).all()
    some[0, 3, 1, 7] = np.nan
    bad = salekit.key_statistics(some).update(draw(rng, 2, 5, 3, 64))
    assert np.isnan(bad.scale).tolist() == [[False, True, False], [False] * 3]


def test_statistics_refused():
    rng = np.random.default_rng(8)
    q, k = draw(rng, 1, 64, 2, 64), draw(rng, 1, 64, 1, 64)
    statistics = salekit.key_statistics(k)
    out = np.full(q.shape, 7, FP16)
    for given, error, match in (
        (salekit.key_statistics(np.concatenate([k, k])), ArgumentError, r"k_statistics: got .*\(2, 1, 64\); wants"),
        (statistics.mean, DtypeError, "k_statistics: got ndarray"),
    ):
        for run in (salekit.sparse_attention, salekit.plan(q, k, k).run):
            with pytest.raises(error, match=match):
                run(q, k, k, k_statistics=given, out=out)
    assert (out == 7).all()
    for call, error, match in (
        (lambda: salekit.key_statistics(k[0]), ArgumentError, "k: got 3 axes"),
        (lambda: salekit.key_statistics(k.astype(np.float32)), DtypeError, "k: got dtype"),
        (lambda: salekit.key_statistics(k[..., :32]), ArgumentError, "head_dim 32"),
        (lambda: salekit.key_statistics(k[:, :, :0]), ArgumentError, "k: got 0 heads; wants at least 1"),
        (lambda: salekit.key_statistics(np.broadcast_to(k[:, :1], (1, 2**30 + 1, 1, 64))), ArgumentError,
         "k: got seqlen 1073741825; wants at most 1073741824"),
        (lambda: statistics.update(np.concatenate([k, k], axis=2)), ArgumentError, "wants"),
        (lambda: statistics.merge(salekit.key_statistics(np.concatenate([k, k]))), ArgumentError, "other: got"),
    ):
        with pytest.raises(error, match=match):
            call()
    for index in (-1, 1, True, 0.0):
        with pytest.raises(ArgumentError, match="index: got .*wants 0 to 0"):
            salekit.key_statistics(np.zeros((1, 4, 2, 64), FP16)).of_sequence(index)


# --- chunks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("block, stride", (((64, 32), 1), ((128, 64), 2)))
@pytest.mark.parametrize("cuts", ((256, 384), (128, 300, 557)))
def test_chunks_have_the_masks_of_one_call(cuts, block, stride, estimator):
    """At given statistics, where the query blocks line up; outputs are those of the one call where masks agree."""
    rng = np.random.default_rng(9)
    seqlen = 601
    q, k, v = draw(rng, 1, seqlen, 4, 64), draw(rng, 1, seqlen, 2, 64), draw(rng, 1, seqlen, 2, 64)
    statistics = salekit.key_statistics(k[:, :100])
    for part in (k[:, 100:433], k[:, 433:]):
        statistics = statistics.update(part)
    options = dict(
        estimator=estimator, block=block, query_stride=stride, k_statistics=statistics, return_mask=True, **SPARSE
    )
    whole, mask = salekit.sparse_attention(q, k, v, full_rows=64, **options)
    bits = mask.to_dense()
    assert 0.1 < mask.density().max() < 0.9
    edges, lined_up = [0, *cuts, seqlen], 0
    for start, end in zip(edges, edges[1:]):
        rows, full_rows = slice(start, end), 64 if end == seqlen else 0
        out, chunk_mask = salekit.sparse_attention(q[:, rows], k[:, :end], v[:, :end], full_rows=full_rows, **options)
        if start % block[0]:
            continue
        chunk = chunk_mask.to_dense()
        for i in range(chunk_mask.num_q_blocks):
            first, last = start + i * block[0], min(start + (i + 1) * block[0], end)
            theirs = bits[:, :, first // block[0]]
            ours = np.zeros_like(theirs)
            ours[..., : chunk.shape[-1]] = chunk[:, :, i]
            if last == start + (i + 1) * block[0] or end == seqlen:
                assert (ours == theirs).all()
                difference = out[:, first - start : last - start].astype(np.float64) - whole[:, first:last]
                size = np.abs(v.astype(np.float64)).max()
                assert (np.abs(difference) <= 2 * UNIT[FP16] * size).all()
                lined_up += 1
            else:
                assert not (ours & ~theirs).any()  # of fewer rows
    assert lined_up >= 2


def test_own_statistics_are_what_makes_chunks_differ():
    rng = np.random.default_rng(10)
    q, k = draw(rng, 1, 512, 2, 64), draw(rng, 1, 512, 1, 64)
    k[:, 256:] += 200 * draw(rng, 1, 1, 1, 64)  # int8 codes become coarse
    options = dict(
        estimator="int8", block=(64, 32), full_rows=0, sink=0, local=0, return_mask=True, thresholds=10.0, dense_below=0
    )
    whole = salekit.sparse_attention(q, k, k, **options)[1].to_dense()[:, :, :4, :8]
    chunk = salekit.sparse_attention(q[:, :256], k[:, :256], k[:, :256], **options)[1].to_dense()
    assert (whole != chunk).any()
    given = salekit.key_statistics(k)
    chunk = salekit.sparse_attention(q[:, :256], k[:, :256], k[:, :256], k_statistics=given, **options)[1].to_dense()
    whole = salekit.sparse_attention(q, k, k, k_statistics=given, **options)[1].to_dense()[:, :, :4, :8]
    assert (whole == chunk).all()


@pytest.mark.parametrize("heads, kv_heads", ((2, 2), (6, 2)))
@pytest.mark.parametrize("cuts", ((1, 2, 65), (64,), (100, 163, 164)))
def test_chunked_prefill_is_float64_attention(cuts, heads, kv_heads):
    """Chunks of any size, one-token ones too: dense against the unchunked float64, sparse against its own mask."""
    rng = np.random.default_rng(11)
    seqlen, dim = 170, 64
    q, k, v = draw(rng, seqlen, heads, dim), draw(rng, seqlen, kv_heads, dim), draw(rng, seqlen, kv_heads, dim)
    edges = [0, *cuts, seqlen]
    dense = [salekit.dense_attention(q[None, a:b], k[None, :b], v[None, :b], return_lse=True)
             for a, b in zip(edges, edges[1:])]
    check_dense(np.concatenate([o[0] for o, _ in dense]), np.concatenate([s[0] for _, s in dense], axis=1), q, k, v)
    for a, b in zip(edges, edges[1:]):
        out, lse, mask = salekit.sparse_attention(
            q[None, a:b], k[None, :b], v[None, :b], return_lse=True, return_mask=True, block=(64, 32), **SPARSE
        )
        for head, rows, keys, values in heads_of(q[a:b], k[:b], v[:b]):
            bits = mask.to_dense()[0, head]
            want, want_lse = oracle.attend(rows, keys, values, bits, dim**-0.5, True, 64, 32)
            assert (np.abs(out[0, :, head] - want) <= 2 * UNIT[FP16] * np.abs(values).max()).all()
            assert (np.abs(lse[0, head] - want_lse) <= 1e-5 * (1 + np.abs(want_lse))).all()


# --- packed sequences ----------------------------------------------------------------------------------------------
def running(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


class Batch:
    """Sequences packed one after the other, and the same keys in pages, shuffled, among NaN."""

    def __init__(self, rows, keys, heads=4, kv_heads=2, dim=64, dtype=FP16, seed=0, page_size=16):
        rng = np.random.default_rng(seed)
        self.rows, self.keys = rows, keys
        self.cu_q, self.cu_k = running(rows), running(keys)
        self.max_q, self.max_k = max(rows, default=0), max(keys, default=0)
        self.q = draw(rng, self.cu_q[-1], heads, dim, dtype=dtype)
        self.k, self.v = (draw(rng, self.cu_k[-1], kv_heads, dim, dtype=dtype) for _ in range(2))
        counts = [-(-n // page_size) for n in keys]
        order = rng.permutation(sum(counts) + 3)
        self.pages_k, self.pages_v = (
            np.full((len(order), page_size, kv_heads, dim), np.nan, np.float32).astype(dtype) for _ in range(2)
        )
        self.table = np.full((len(keys), max(counts, default=0) + 2), -1, np.int32)  # past the end nothing is read
        at = 0
        for i, n in enumerate(keys):
            for page in range(counts[i]):
                self.table[i, page] = order[at]
                first = self.cu_k[i] + page * page_size
                some = slice(first, min(first + page_size, self.cu_k[i + 1]))
                for pages, x in ((self.pages_k, self.k), (self.pages_v, self.v)):
                    pages[order[at], : some.stop - some.start] = x[some]
                at += 1

    @property
    def lengths(self):
        return np.array(self.keys, np.int32)

    def packed(self, **options):
        return salekit.sparse_attention_varlen(
            self.q, self.k, self.v, self.cu_q, self.cu_k, self.max_q, self.max_k, return_lse=True, **options
        )

    def paged(self, **options):
        return salekit.sparse_attention_varlen(
            self.q, self.pages_k, self.pages_v, self.cu_q, None, self.max_q, self.max_k, block_table=self.table,
            seqlens_k=self.lengths, return_lse=True, **options,
        )

    def each(self):
        """(rows slice, q, k, v) of each sequence."""
        for i in range(len(self.rows)):
            rows, keys = (slice(sums[i], sums[i + 1]) for sums in (self.cu_q, self.cu_k))
            yield rows, self.q[rows], self.k[keys], self.v[keys]


LENGTHS = (
    ((77,), (77,)),
    ((1, 130), (333, 130)),
    ((5, 0, 64), (300, 40, 0)),
    ((1, 1, 1, 1), (1, 33, 257, 100)),
    ((65, 3, 129, 1, 64), (65, 200, 131, 1, 70)),
)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("rows, keys", LENGTHS)
def test_packed_dense_is_float64(rows, keys, causal):
    batch = Batch(rows, keys)
    for out, lse in (batch.packed(causal=causal), batch.paged(causal=causal)):
        assert out.shape == batch.q.shape and lse.shape == (4, batch.q.shape[0]) and lse.dtype == np.float32
        for some, q, k, v in batch.each():
            check_dense(out[some], lse[:, some], q, k, v, causal)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows, keys", LENGTHS)
@pytest.mark.parametrize("causal", (True, False))
def test_packed_is_each_sequence_alone(rows, keys, causal, estimator):
    batch = Batch(rows, keys, seed=1)
    options = dict(causal=causal, estimator=estimator, block=(64, 32), query_stride=2, full_rows=16, **SPARSE)
    results = [batch.packed(**options), batch.paged(**options)]
    for out, lse in results:
        for some, *qkv in batch.each():
            want, want_lse = salekit.sparse_attention(*(x[None] for x in qkv), return_lse=True, **options)
            assert same(out[some], want[0]) and same(lse[:, some], want_lse[0])


def test_packed_sparse_is_the_oracle():
    """Selection and attention in float64, pair by pair, by exact scores: int8's masks of small random inputs are a few
    blocks away from it, so that each sequence is attended through the mask that the twin gives it."""
    batch = Batch((70, 1, 33), (200, 97, 64), heads=2, kv_heads=1, seed=2)
    out, lse = batch.packed(estimator="int8", block=(64, 32), **SPARSE)
    for some, q, k, v in batch.each():
        mask = salekit.sparse_attention(
            q[None], k[None], v[None], estimator="int8", block=(64, 32), return_mask=True, **SPARSE
        )[1].to_dense()[0]
        assert mask.any()
        for head, rows, keys, values in heads_of(q, k, v):
            want, want_lse = oracle.attend(rows, keys, values, mask[head], 64**-0.5, True, 64, 32)
            assert (np.abs(out[some, head] - want) <= 2 * UNIT[FP16] * np.abs(values).max()).all()
            assert (np.abs(lse[head, some] - want_lse) <= 1e-5 * (1 + np.abs(want_lse))).all()
            scores = 64**-0.5 * rows @ (keys - keys.mean(axis=0)).T
            exact = oracle.select(scores, scores, 0.2, True, 64, 32)
            assert (exact != mask[head]).mean() <= 0.1


def test_low_bit_is_each_sequence_alone():
    batch = Batch((70, 1, 0), (200, 97, 5), seed=10)
    for options in (dict(dense_below=0, thresholds=0.2), {}):
        out, lse = batch.paged(attend="int8-fp8", **options)
        for some, *qkv in batch.each():
            want, want_lse = salekit.sparse_attention(
                *(x[None] for x in qkv), attend="int8-fp8", return_lse=True, **options
            )
            assert same(out[some], want[0]) and same(lse[:, some], want_lse[0])
        assert not same(out, batch.paged(**options)[0])


@pytest.mark.parametrize("page_size", (16, 32, 64, 128, 256))
@pytest.mark.parametrize("dtype, dim", ((FP16, 64), (BF16, 128)))
def test_page_sizes(page_size, dtype, dim):
    batch = Batch((40, 1, 0, 129), (300, 1, 5, 256), dim=dim, dtype=dtype, seed=3, page_size=page_size)
    for options in (SPARSE, {}):
        for a, b in zip(batch.packed(**options), batch.paged(**options)):
            assert same(a, b)


def test_dense_by_the_longest():
    batch = Batch((100, 100), (100, 300), seed=4)
    sparse, dense = (batch.packed(thresholds=0.2, dense_below=n)[0] for n in (299, 300))
    alone = [salekit.sparse_attention(*(x[None] for x in qkv), thresholds=0.2, dense_below=0)[0]
             for _, *qkv in batch.each()]
    assert same(sparse, np.concatenate(alone))
    alone = [salekit.dense_attention(*(x[None] for x in qkv))[0] for _, *qkv in batch.each()]
    assert same(dense, np.concatenate(alone))
    assert not same(sparse, dense)


def test_packed_out_lists_and_slices():
    batch = Batch((30, 40), (50, 60), seed=5)
    want, want_lse = batch.packed(**SPARSE)
    packed = np.concatenate([batch.q, np.zeros_like(batch.q)], axis=1)[:, :4]
    wide = np.full((70, 6, 64), 7, FP16)
    out = wide[:, 1:5]
    got = salekit.sparse_attention_varlen(
        packed, batch.k, batch.v, [0, 30, 70], (0, 50, 110), 64, 100, out=out, **SPARSE
    )
    assert got is out and same(out, want) and (wide[:, [0, 5]] == 7).all()
    # Rows that no sequence has are left alone in an array of the caller's.
    out = np.full((70, 4, 64), 7, FP16)
    salekit.sparse_attention_varlen(batch.q, batch.k, batch.v, [0, 30], [0, 50], 30, 50, out=out, **SPARSE)
    assert same(out[:30], want[:30]) and (out[30:] == 7).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_packed_statistics(estimator):
    batch = Batch((70, 1), (500, 350), seed=6)
    options = dict(estimator=estimator, local=0, **SPARSE)
    batch.k[500:] += 40 * draw(np.random.default_rng(6), 1, 2, 64)
    batch.k[500:] *= 4
    each = [salekit.key_statistics(k[None]) for _, _, k, _ in batch.each()]
    want, _ = batch.packed(**options)
    got, _ = batch.packed(k_statistics=salekit.KeyStatistics.stack(each), **options)
    assert same(got, want)
    other, _ = batch.packed(k_statistics=salekit.KeyStatistics.stack(each[::-1]), **options)
    assert not same(other, want)
    with pytest.raises(ArgumentError, match="k_statistics"):
        batch.packed(k_statistics=each[0], **SPARSE)
    with pytest.raises(ArgumentError, match="parts: got none"):
        salekit.KeyStatistics.stack([])
    for part, error in ((batch.k, DtypeError), (salekit.key_statistics(batch.k[None, :, :1]), ArgumentError)):
        with pytest.raises(error, match="parts: got"):
            salekit.KeyStatistics.stack([each[0], part])


def test_nothing_to_do():
    batch = Batch((), ())
    out, lse = batch.packed()
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    empty = np.zeros((0, 6), np.int32)
    pages = np.zeros((3, 16, 2, 64), FP16)
    out = salekit.sparse_attention_varlen(
        batch.q, pages, pages, [0], None, 0, 0, block_table=empty, seqlens_k=[]
    )
    assert out.shape == (0, 4, 64)
    batch = Batch((3, 4), (0, 0))
    for out, lse in (batch.packed(), batch.paged()):
        assert (out == 0).all() and np.isneginf(lse).all()


@pytest.mark.parametrize("change, error, match", (
    (dict(cu_seqlens_q=[1, 30, 70]), ArgumentError, "cu_seqlens_q: starts at 1; wants 0"),
    (dict(cu_seqlens_q=[0, 40, 30]), ArgumentError, "cu_seqlens_q: decreases from 40 to 30"),
    (dict(cu_seqlens_q=[0, 30, 71]), ArgumentError, "cu_seqlens_q: ends at 71; wants at most 70"),
    (dict(cu_seqlens_k=[0, 50, 111]), ArgumentError, "cu_seqlens_k: ends at 111"),
    (dict(cu_seqlens_k=[0, -1, 110]), ArgumentError, "cu_seqlens_k: decreases"),
    (dict(cu_seqlens_k=[0, 110]), ArgumentError, "cu_seqlens_k: got 2 elements; wants 3"),
    (dict(cu_seqlens_q=[]), ArgumentError, "cu_seqlens_q: got no element"),
    (dict(cu_seqlens_q=np.zeros((3, 1), np.int32)), ArgumentError, "cu_seqlens_q: got 2 axes"),
    (dict(cu_seqlens_q=np.array([0, 30, 70])), DtypeError, "cu_seqlens_q: got dtype int64"),
    (dict(cu_seqlens_q=np.array([0, 9, 30, 9, 70], np.int32)[::2]), ArgumentError, "cu_seqlens_q: is not contiguous"),
    (dict(cu_seqlens_k=np.array([110, 50, 0], np.int32)[::-1]), ArgumentError, "cu_seqlens_k: is not contiguous"),
    (dict(cu_seqlens_q=["0", "30", "70"]), DtypeError, "cu_seqlens_q: got .*wants integers"),
    (dict(cu_seqlens_q=[0, 30.7, 70]), DtypeError, "cu_seqlens_q: got .*wants integers"),
    (dict(cu_seqlens_k=[False, 50, 110]), DtypeError, "cu_seqlens_k: got .*wants integers"),
    (dict(cu_seqlens_q=[0, 10**30, 70]), ArgumentError, "cu_seqlens_q: got a value beyond int32"),
    (dict(cu_seqlens_q=[0, 2**40, 70]), ArgumentError, "cu_seqlens_q"),
    (dict(cu_seqlens_k=None), ArgumentError, "cu_seqlens_k: a call without a block_table wants"),
    (dict(seqlens_k=[50, 60]), ArgumentError, "seqlens_k: a call without a block_table"),
    (dict(max_seqlen_q=39), ArgumentError, "max_seqlen_q: got 39; wants at least 40"),
    (dict(max_seqlen_k=59), ArgumentError, "max_seqlen_k: got 59; wants at least 60"),
    (dict(max_seqlen_k=-1), ArgumentError, "max_seqlen_k"),
    (dict(max_seqlen_q=1.5), ArgumentError, "max_seqlen_q"),
    (dict(q=np.zeros((1, 70, 4, 64), FP16)), ArgumentError, r"q: got 4 axes.*\[total_q"),
    (dict(k=np.zeros((110, 3, 64), FP16), v=np.zeros((110, 3, 64), FP16)), ArgumentError, "k: got 3 heads"),
    (dict(v=np.zeros((109, 2, 64), FP16)), ArgumentError, r"v: got shape \(109, 2, 64\); wants \(110, 2, 64\), as k"),
    (dict(k=np.zeros((110, 2, 64), BF16)), DtypeError, "k: got dtype"),
    (dict(attend="fp8"), ArgumentError, "attend"),
    (dict(block=(32, 32)), ArgumentError, "block"),
    (dict(thresholds=-1.0), ArgumentError, "thresholds"),
    (dict(debug=1), ArgumentError, "debug"),
    (dict(out=np.zeros((69, 4, 64), FP16)), ArgumentError, r"out: got shape \(69, 4, 64\); wants \(70, 4, 64\), as q"),
    (dict(out=np.zeros((1, 70, 4, 64), FP16)), ArgumentError, "out: got 4 axes"),
))
def test_packed_refuses(change, error, match):
    batch = Batch((30, 40), (50, 60), seed=7)
    given = dict(
        q=batch.q, k=batch.k, v=batch.v, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, max_seqlen_q=40,
        max_seqlen_k=60, out=np.full(batch.q.shape, 7, FP16),
    )
    out = given["out"]
    with pytest.raises(error, match=match):
        salekit.sparse_attention_varlen(**{**given, **change})
    assert (out == 7).all()


@pytest.mark.parametrize("change, error, match", (
    (dict(table=(0, 0, 99)), ArgumentError, r"block_table: got page 99 at \[0, 0\]; wants 0 to 10"),
    (dict(table=(1, 3, -1)), ArgumentError, r"block_table: got page -1 at \[1, 3\]"),
    (dict(block_table=np.zeros((2, 3), np.int32)), ArgumentError, "block_table: got 3 pages of 16.*at least 4"),
    (dict(block_table=np.zeros((3, 6), np.int32)), ArgumentError, "block_table: got shape"),
    (dict(block_table=np.zeros((2, 6))), DtypeError, "block_table: got dtype"),
    (dict(block_table=np.zeros((2, 12), np.int32)[:, ::2]), ArgumentError, "block_table: the last axis is not contig"),
    (dict(block_table=np.zeros((6, 2), np.int32).T), ArgumentError, "block_table: the last axis is not contiguous"),
    (dict(seqlens_k=[50, 61]), ArgumentError, "seqlens_k: got 61 for sequence 1; wants 0 to max_seqlen_k = 60"),
    (dict(seqlens_k=[-1, 60]), ArgumentError, "seqlens_k: got -1"),
    (dict(seqlens_k=[50]), ArgumentError, "seqlens_k: got 1 elements; wants 2"),
    (dict(seqlens_k=[50, 60.0]), DtypeError, r"seqlens_k: got \[50, 60.0\]; wants integers"),
    (dict(seqlens_k=None), ArgumentError, "seqlens_k: a call with a block_table wants"),
    (dict(cu_seqlens_k=[0, 50, 110]), ArgumentError, "cu_seqlens_k: a call with a block_table"),
    (dict(k=np.zeros((11, 24, 2, 64), FP16), v=np.zeros((11, 24, 2, 64), FP16)), ArgumentError, "pages of 24 rows"),
    (dict(k=np.zeros((11, 2, 64), FP16)), ArgumentError, r"k: got 3 axes.*\[num_pages"),
    (dict(v=np.zeros((10, 16, 2, 64), FP16)), ArgumentError,
     r"v: got shape \(10, 16, 2, 64\); wants \(11, 16, 2, 64\)"),
    (dict(k=np.zeros((0, 16, 2, 64), FP16), v=np.zeros((0, 16, 2, 64), FP16)), ArgumentError,
     r"block_table: got page \d+ at \[0, 0\]; there are none, as k has no pages"),
))
def test_paged_refuses(change, error, match):
    batch = Batch((30, 40), (50, 60), seed=8)
    given = dict(
        q=batch.q, k=batch.pages_k, v=batch.pages_v, cu_seqlens_q=batch.cu_q, cu_seqlens_k=None, max_seqlen_q=40,
        max_seqlen_k=60, block_table=batch.table.copy(), seqlens_k=batch.lengths, out=np.full(batch.q.shape, 7, FP16),
    )
    change = dict(change)
    if "table" in change:
        i, j, page = change.pop("table")
        given["block_table"][i, j] = page
    out = given["out"]
    with pytest.raises(error, match=match):
        salekit.sparse_attention_varlen(**{**given, **change})
    assert (out == 7).all()


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("paged", (False, True))
def test_packed_out_that_shares_memory(paged, name):
    batch = Batch((30, 40), (50, 60), heads=2, seed=7)
    keys = (batch.pages_k, batch.pages_v) if paged else (batch.k, batch.v)
    given = dict(zip("qkv", (batch.q, *keys)))
    lengths = dict(cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, max_seqlen_q=40, max_seqlen_k=60)
    if paged:
        lengths |= dict(cu_seqlens_k=None, block_table=batch.table, seqlens_k=batch.lengths)
    out = given[name].reshape(-1, 2, 64)[:70]
    with pytest.raises(ArgumentError, match=f"^out: shares memory with {name}; wants"):
        salekit.sparse_attention_varlen(**given, **lengths, out=out)
    both = np.zeros((*given[name].shape[:-2], 4, 64), FP16)
    both[..., :2, :] = given[name]
    given[name], out = both[..., :2, :], both.reshape(-1, 4, 64)[:70, 2:]
    want = salekit.sparse_attention_varlen(**given, **lengths)
    assert same(salekit.sparse_attention_varlen(**given, **lengths, out=out), want)


def test_values_beyond_a_sequence_stay_out():
    """What neighbours and unused rows of pages hold reaches no other sequence."""
    batch = Batch((33, 70), (45, 90), seed=9)
    want, want_lse = batch.packed(**SPARSE)
    batch.k[45:], batch.v[45:], batch.q[33:] = np.nan, np.nan, np.nan
    got, got_lse = batch.packed(**SPARSE)
    assert same(got[:33], want[:33]) and same(got_lse[:, :33], want_lse[:, :33]) and np.isnan(got[33:]).all()
