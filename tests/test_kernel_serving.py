"""Serving shapes on the GPU: merged states, statistics, chunks, packed sequences, pages, graphs, hostile values."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

from test_host_serving import BF16, ESTIMATORS, FP16, UNIT, Batch, check_dense, draw, float64_statistics, states  # noqa: E402, I001

import salekit  # noqa: E402
from salekit import reference, workspaces  # noqa: E402
from salekit.errors import ArgumentError  # noqa: E402

SPARSE = dict(thresholds=0.2, dense_below=0)
FIELDS = ("mean", "rms", "amax", "scale", "num_keys", "state")
# Lengths whose offset is no multiple of 32, so that a call of one sequence takes as many slots of anchors as the packed
# one does: m and l are then the same bits.
ODD_LENGTHS = (
    ((300, 1, 129), (301, 900, 1000)),
    ((5, 0, 64, 700), (309, 40, 0, 1301)),
    ((1, 1, 1, 1), (2, 34, 259, 1000)),
    ((65, 3, 129, 1, 64), (66, 205, 1200, 9, 700)),
)


def bits(array):
    return array.get().tobytes()


def on_gpu(*arrays):
    return [cp.asarray(x) for x in arrays]


def poison_workspaces():
    for workspace in workspaces._workspaces.values():
        if workspace._memory is not None:
            workspace._memory.data.memset_async(0x7F, workspace._memory.nbytes)


# --- merged states -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", (FP16, BF16))
@pytest.mark.parametrize("dim", (8, 64, 96, 128, 256))
@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
def test_merge_is_the_twin(dim, dtype, layout):
    rng = np.random.default_rng(dim)
    (out_a, lse_a), (out_b, lse_b) = (states(rng, 2, 133, 3, dim, dtype, 10.0) for _ in range(2))
    lse_a[0, 1, 2] = lse_b[1, 0, 3] = -np.inf
    out_a[0, 2, 1] = np.nan
    lse_a[1, 2, 4] = lse_b[1, 2, 4] = -np.inf
    out_b[1, 7, 1, 5] = np.nan
    lse_b[0, 2, 9] = np.nan
    want, want_lse = reference.merge_states(out_a, lse_a, out_b, lse_b)
    order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
    a, b = on_gpu(*(np.ascontiguousarray(x.transpose(order)) for x in (out_a, out_b)))
    sides = on_gpu(lse_a, lse_b)
    wide = cp.asarray(np.pad(lse_a, ((0, 0), (0, 0), (0, 17)), constant_values=7))  # rows of longer ones
    out, lse = salekit.merge_attention_states(a, wide[:, :, :133], b, sides[1], layout=layout)
    got = out.get().transpose(order).astype(np.float64)
    want = want.astype(np.float64)
    assert (np.isnan(got) == np.isnan(want)).all() and np.isnan(want).any() and (want[1, 4, 2] == 0).all()
    known = ~np.isnan(want)
    # Two roundings of the same float32 value, which differ by a few units of 2^-24 and of expf.
    assert (np.abs(got - want)[known] <= 2 * UNIT[dtype] * np.abs(want[known]) + 1e-6).all()
    assert (np.isneginf(lse.get()) == np.isneginf(want_lse)).all() and (np.isnan(lse.get()) == np.isnan(want_lse)).all()
    finite = np.isfinite(want_lse)
    assert (np.abs(lse.get() - want_lse)[finite] <= 1e-6 * (1 + np.abs(want_lse[finite]))).all()
    same, same_lse = salekit.merge_attention_states(a, sides[0], b, sides[1], layout=layout, out=a)
    assert same is a and bits(a) == bits(out) and np.array_equal(same_lse.get(), lse.get(), equal_nan=True)


def test_merge_in_a_graph():
    rng = np.random.default_rng(1)
    sides = [on_gpu(*states(rng, 1, 64, 2, 64)) for _ in range(2)]
    (a, lse_a), (b, lse_b) = sides
    out = cp.empty_like(a)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        want = bits(salekit.merge_attention_states(a, lse_a, b, lse_b)[0])
        stream.begin_capture()
        salekit.merge_attention_states(a, lse_a, b, lse_b, out=out, return_lse=False)
        graph = stream.end_capture()
        for _ in range(2):
            out.data.memset_async(0xFF, out.nbytes)
            graph.launch(stream)
            stream.synchronize()
            assert bits(out) == want


def test_merge_splits_attention():
    rng = np.random.default_rng(2)
    q, k, v = (draw(rng, 1, n, h, 128, dtype=BF16) for n, h in ((150, 4), (700, 2), (700, 2)))
    gpu = on_gpu(q, k, v)
    parts = [salekit.dense_attention(gpu[0], *(x[:, s] for x in gpu[1:]), causal=False, return_lse=True)
             for s in (slice(0, 333), slice(333, 333), slice(333, 700))]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = salekit.merge_attention_states(out, lse, *part)
    check_dense(out.get()[0], lse.get()[0], q[0], k[0], v[0], causal=False)


# --- statistics of keys --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype, dim", ((FP16, 64), (BF16, 128)))
@pytest.mark.parametrize("cuts", ((), (1, 2), (512, 1024), (64, 65, 1300)))
def test_statistics_in_parts(cuts, dtype, dim):
    rng = np.random.default_rng(3)
    k = (draw(rng, 2, 1601, 3, dim, dtype=np.float32) + 5 * rng.standard_normal((2, 1, 3, dim))).astype(dtype)
    edges = [0, *cuts, 1601]
    parts = [cp.asarray(k)[:, a:b] for a, b in zip(edges, edges[1:])]
    updated = merged = salekit.key_statistics(parts[0])
    for part in parts[1:]:
        updated, merged = updated.update(part), merged.merge(salekit.key_statistics(part))
    bound = 2.0**-22 * len(parts) * np.abs(k.astype(np.float64)).max()
    for got in (updated, merged):
        assert got.num_keys.get().tolist() == [1601, 1601]
        for x, want in zip((got.mean, got.rms, got.amax), float64_statistics(k)):
            assert (np.abs(x.get() - want) <= 2 * bound).all()
        assert (np.abs(got.scale.get() * 127 - got.amax.get()) <= 2.0**-22 * got.amax.get()).all()
    twin = salekit.key_statistics(k)
    sizes = np.abs(twin.state).max(axis=(0, 1, 3))[None, None, :, None]
    assert (np.abs(updated.state.get() - twin.state) <= 1e-4 * sizes).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_statistics_are_what_a_call_takes(estimator):
    rng = np.random.default_rng(4)
    q, k, v = on_gpu(draw(rng, 2, 700, 4, 128), draw(rng, 2, 1333, 2, 128), draw(rng, 2, 1333, 2, 128))
    statistics = salekit.key_statistics(k)
    plan = salekit.make_plan(q, k, v, estimator=estimator, dense_below=0)
    own, given = salekit.quantize(q, k, plan), salekit.quantize(q, k, plan, statistics)
    names = ("k_mean", "k_codes", "k_scale") + (("q_codes", "q_scale") if estimator != "int8-sp24" else ())
    for name in names:
        assert bits(getattr(own, name)) == bits(getattr(given, name))
    options = dict(estimator=estimator, return_lse=True, return_mask=True, **SPARSE)
    want = salekit.sparse_attention(q, k, v, **options)
    got = salekit.sparse_attention(q, k, v, k_statistics=statistics, **options)
    if estimator != "int8-sp24":  # its rms may be off by a rounding
        assert [bits(got[0]), bits(got[2].words)] == [bits(want[0]), bits(want[2].words)]
    else:
        assert (got[2].to_dense() == want[2].to_dense()).mean() >= 0.999


def test_statistics_of_fewer_keys_clamp():
    rng = np.random.default_rng(5)
    q, k = draw(rng, 1, 64, 1, 64), draw(rng, 1, 256, 1, 64)
    k[0, 100:105, 0, 3] = 1000, -1000, np.nan, np.inf, -np.inf
    statistics = salekit.key_statistics(cp.asarray(k[:, :64]))
    plan = salekit.make_plan(*on_gpu(q, k, k), estimator="int8", dense_below=0)
    codes = salekit.codes.tiles_to_rows(salekit.quantize(*on_gpu(q, k), plan, statistics).k_codes.get(), 8, 256)[0, 0]
    twin = salekit.quantize(q, k, salekit.make_plan(q, k, k, estimator="int8"), salekit.KeyStatistics(
        **{name: getattr(statistics, name).get() for name in FIELDS}
    )).k_codes[0, 0]
    assert codes[100:105, 3].tolist() == [127, -127, 0, 0, 0] and (codes == twin).all()


def test_statistics_of_no_keys_and_of_nan():
    none = salekit.key_statistics(cp.empty((2, 0, 3, 64), FP16))
    assert not none.mean.get().any() and (none.scale.get() == 1).all() and not none.num_keys.get().any()
    some = draw(np.random.default_rng(6), 2, 50, 3, 64)
    want = salekit.key_statistics(cp.asarray(some))
    for got in (none.update(cp.asarray(some)), want.merge(none)):
        for name in ("mean", "rms", "amax", "scale", "num_keys"):
            difference = np.abs(getattr(got, name).get() - getattr(want, name).get())
            assert (difference <= 2.0**-22 * np.abs(some.astype(np.float32)).max()).all()
    some[0, 3, 1, 7] = np.nan
    bad = salekit.key_statistics(cp.asarray(some)).update(cp.asarray(some[:, :5] * 0))
    assert np.isnan(bad.scale.get()).tolist() == [[False, True, False], [False] * 3]


# --- chunks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("block, stride", (((64, 32), 1), ((128, 32), 1), ((128, 64), 2)))
@pytest.mark.parametrize("cuts", ((256, 384, 1024), (128, 300, 557)))
def test_chunks_have_the_masks_of_one_call(cuts, block, stride, estimator):
    """At given statistics, where the query blocks line up: bit for bit, and outputs with them."""
    rng = np.random.default_rng(7)
    seqlen = 1301
    q, k, v = on_gpu(*(draw(rng, 1, seqlen, h, 128, dtype=BF16) for h in (4, 2, 2)))
    statistics = salekit.key_statistics(k[:, :100]).update(k[:, 100:])
    options = dict(
        estimator=estimator, block=block, query_stride=stride, k_statistics=statistics, return_mask=True, **SPARSE
    )
    whole, mask = salekit.sparse_attention(q, k, v, full_rows=64, **options)
    want, mask_bits, values = whole.get().astype(np.float64), mask.to_dense(), np.abs(v.get().astype(np.float64)).max()
    assert 0.1 < mask.density().max() < 0.95
    edges, lined_up = [0, *cuts, seqlen], 0
    for start, end in zip(edges, edges[1:]):
        full_rows = 64 if end == seqlen else 0
        out, of_chunk = salekit.sparse_attention(
            q[:, start:end], k[:, :end], v[:, :end], full_rows=full_rows, **options
        )
        if start % block[0]:
            continue
        chunk = of_chunk.to_dense()
        for i in range(of_chunk.num_q_blocks):
            first, last = start + i * block[0], min(start + (i + 1) * block[0], end)
            theirs = mask_bits[:, :, first // block[0]]
            ours = np.zeros_like(theirs)
            ours[..., : chunk.shape[-1]] = chunk[:, :, i]
            if last == start + (i + 1) * block[0] or end == seqlen:
                assert (ours == theirs).all()
                got = out[:, first - start : last - start].get().astype(np.float64)
                assert (np.abs(got - want[:, first:last]) <= 2 * UNIT[BF16] * values).all()
                lined_up += 1
            else:
                assert not (ours & ~theirs).any()
    assert lined_up >= 2


@pytest.mark.parametrize("heads, kv_heads", ((2, 2), (6, 2)))
@pytest.mark.parametrize("cuts", ((1, 2, 65), (100, 163, 164)))
def test_chunked_prefill_is_float64_attention(cuts, heads, kv_heads):
    rng = np.random.default_rng(8)
    seqlen = 333
    q, k, v = (draw(rng, seqlen, h, 128) for h in (heads, kv_heads, kv_heads))
    gpu = [x[None] for x in on_gpu(q, k, v)]
    edges = [0, *cuts, seqlen]
    parts = [salekit.dense_attention(gpu[0][:, a:b], gpu[1][:, :b], gpu[2][:, :b], return_lse=True)
             for a, b in zip(edges, edges[1:])]
    out = np.concatenate([o.get()[0] for o, _ in parts])
    check_dense(out, np.concatenate([s.get()[0] for _, s in parts], axis=1), q, k, v)


# --- packed sequences ----------------------------------------------------------------------------------------------
class GpuBatch(Batch):
    """A batch on the GPU; lengths there, too, unless on_host."""

    def __init__(self, *args, on_host=False, spoil=None, **options):
        super().__init__(*args, **options)
        if spoil is not None:
            spoil(self)
        self.host = (self.q, self.k, self.v)
        for name in ("q", "k", "v", "pages_k", "pages_v", "table"):
            setattr(self, name, cp.asarray(getattr(self, name)))
        self.sums = (self.cu_q, self.cu_k)
        self.on_host = on_host
        if not on_host:
            self.gpu_sums = on_gpu(self.cu_q, self.cu_k, np.array(self.keys, np.int32))

    def call(self, paged=False, out=None, function=salekit.sparse_attention_varlen, **options):
        sums_q, sums_k, lengths = (self.cu_q, self.cu_k, self.lengths) if self.on_host else self.gpu_sums
        k, v = (self.pages_k, self.pages_v) if paged else (self.k, self.v)
        if paged:
            options.update(block_table=self.table, seqlens_k=lengths)
        options = {"return_lse": True, "out": out, **options}
        return function(self.q, k, v, sums_q, None if paged else sums_k, self.max_q, self.max_k, **options)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype, dim", ((FP16, 64), (BF16, 128)))
@pytest.mark.parametrize("on_host", (True, False))
@pytest.mark.parametrize("paged", (True, False))
@pytest.mark.parametrize("rows, keys", (((77, 0, 1, 130), (77, 9, 333, 130)), ((5, 64, 3), (300, 0, 1))))
def test_packed_dense_is_float64(rows, keys, paged, on_host, dtype, dim, causal):
    batch = GpuBatch(rows, keys, dtype=dtype, dim=dim, on_host=on_host)
    out, lse = batch.call(paged, causal=causal)
    poison_workspaces()
    again = batch.call(paged, causal=causal)
    assert [bits(out), bits(lse)] == [bits(x) for x in again]
    out, lse = out.get(), lse.get()
    for i in range(len(rows)):
        some, some_k = (slice(sums[i], sums[i + 1]) for sums in batch.sums)
        q, k, v = batch.host
        check_dense(out[some], lse[:, some], q[some], k[some_k], v[some_k], causal)


def each_alone(batch, **options):
    """out and lse of calls of one sequence each, packed; as bytes of each sequence."""
    results = []
    for i in range(len(batch.rows)):
        some, some_k = (slice(int(sums[i]), int(sums[i + 1])) for sums in batch.sums)
        out, lse = salekit.sparse_attention(
            batch.q[None, some], batch.k[None, some_k], batch.v[None, some_k], return_lse=True, **options
        )
        results.append((out.get()[0], lse.get()[0]))
    return results


def check_alone(batch, result, alone):
    out, lse = (x.get() for x in result)
    for i, (want, want_lse) in enumerate(alone):
        some = slice(batch.sums[0][i], batch.sums[0][i + 1])
        assert out[some].tobytes() == want.tobytes()
        assert np.ascontiguousarray(lse[:, some]).tobytes() == want_lse.tobytes()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows, keys", ODD_LENGTHS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype, dim, block", ((FP16, 64, (64, 32)), (BF16, 128, (128, 32)), (BF16, 128, (64, 128))))
def test_packed_is_each_sequence_alone(rows, keys, causal, estimator, dtype, dim, block):
    """Bit for bit: packed and paged, lengths on the host and on the GPU, whatever the workspace holds."""
    options = dict(causal=causal, estimator=estimator, block=block, **SPARSE)
    batch = GpuBatch(rows, keys, dtype=dtype, dim=dim, seed=1)
    alone = each_alone(batch, **options)
    check_alone(batch, batch.call(**options), alone)
    poison_workspaces()
    check_alone(batch, batch.call(paged=True, **options), alone)
    poison_workspaces()
    batch.on_host = True
    check_alone(batch, batch.call(**options), alone)
    check_alone(batch, batch.call(paged=True, **options), alone)


@pytest.mark.parametrize("thresholds", (np.inf, 0.0, [0.0, np.inf, np.inf, 0.0]))
@pytest.mark.parametrize("rows, keys", (((64, 128, 640), (64, 256, 640)), ((1, 33), (1, 1057))))
def test_lengths_that_line_up(rows, keys, thresholds):
    """Masks that no rounding decides."""
    options = dict(thresholds=thresholds, dense_below=0, estimator="int8")
    batch = GpuBatch(rows, keys, dim=128, dtype=BF16, seed=2)
    check_alone(batch, batch.call(**options), each_alone(batch, **options))


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("stride", (2, 4))
def test_strides(stride, estimator):
    """Where lengths line up, m and l may differ in their last bits: nearly all blocks agree."""
    batch = GpuBatch((1024, 640, 3), (1024, 2048, 999), heads=8, kv_heads=2, dim=128, dtype=BF16, seed=3)
    options = dict(estimator=estimator, query_stride=stride, full_rows=128, **SPARSE)
    out, _ = batch.call(**options)
    want = np.concatenate([want for want, _ in each_alone(batch, **options)])
    assert (out.get().view(np.uint16) == want.view(np.uint16)).all(axis=-1).mean() >= 0.9


@pytest.mark.parametrize("dtype, dim", ((FP16, 64), (BF16, 128)))
@pytest.mark.parametrize("options", (SPARSE, {}))
def test_low_bit_is_each_sequence_alone(options, dtype, dim):
    from salekit import jit

    if jit.device_arch() != "sm_90a":
        pytest.skip("needs an sm_90 GPU")
    options = dict(attend="int8-fp8", **options)
    batch = GpuBatch((300, 1, 129, 0, 5000), (301, 900, 1000, 7, 5001), dtype=dtype, dim=dim, seed=14)
    alone = each_alone(batch, **options)
    for paged in (False, True):
        poison_workspaces()
        check_alone(batch, batch.call(paged, **options), alone)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows, keys", ODD_LENGTHS)
@pytest.mark.parametrize("causal, block", ((True, (128, 32)), (True, (64, 64)), (False, (64, 32))))
def test_kernels_of_other_gpus(rows, keys, causal, block, estimator):
    """mma.sync's kernels with lengths, stage by stage on padded arrays."""
    from salekit import pipeline

    some = [i for i, (m, n) in enumerate(zip(rows, keys)) if m and n]
    host = Batch(rows, keys, dim=128, dtype=BF16, seed=15)
    padded = [
        np.zeros((len(rows), longest, heads, 128), BF16) for longest, heads in
        ((host.max_q, 4), (host.max_k, 2), (host.max_k, 2))
    ]
    for i, (_, *qkv) in enumerate(host.each()):
        for target, x in zip(padded, qkv):
            target[i, : len(x)] = x
    q, k, v = on_gpu(*padded)
    options = dict(causal=causal, block=block, estimator=estimator, dense_below=0)
    plan = salekit.make_plan(q, k, v, **options).replace(arch="sm_80")
    lengths = cp.asarray(np.array([rows, keys, [0] * len(rows), [0] * len(rows), [0] * len(rows)], np.int32))
    packed = plan.replace(has_lengths=True, lengths=lengths)
    out = cp.asarray(np.full(q.shape, 7, BF16))
    lse, _ = pipeline.run_stages(q, k, v, out, 0.2, packed, True, False)
    for i in some:
        one = plan.replace(batch=1, seqlen_q=rows[i], seqlen_k=keys[i])
        parts = [x[i : i + 1, :n] for x, n in ((q, rows[i]), (k, keys[i]), (v, keys[i]))]
        alone = cp.empty(parts[0].shape, BF16)
        alone_lse, _ = pipeline.run_stages(*parts, alone, 0.2, one, True, False)
        assert bits(alone) == np.ascontiguousarray(out.get()[i : i + 1, : rows[i]]).tobytes()
        assert bits(alone_lse) == np.ascontiguousarray(lse.get()[i : i + 1, :, : rows[i]]).tobytes()
        assert (out.get()[i, rows[i] :].astype(np.float32) == 7).all()


@pytest.mark.parametrize("page_size", (16, 32, 64, 128, 256))
def test_page_sizes(page_size):
    batch = GpuBatch((40, 1, 0, 129), (300, 1, 5, 256), dim=128, dtype=BF16, seed=4, page_size=page_size)
    for options in (SPARSE, {}):
        assert [bits(x) for x in batch.call(**options)] == [bits(x) for x in batch.call(paged=True, **options)]


def test_thresholds_layouts_and_out():
    batch = GpuBatch((130, 65), (1000, 900), dim=128, dtype=BF16, seed=5)
    taus = [0.1, 0.2, 0.4, np.inf]
    want = batch.call(thresholds=taus, dense_below=0)
    wide = cp.asarray(np.full((195, 6, 128), 7, BF16))
    for given in (taus, np.array(taus), cp.asarray(np.array(taus, np.float32))):
        out = wide[:, 1:5]
        got, lse = batch.call(thresholds=given, dense_below=0, out=out)
        assert got is out and np.ascontiguousarray(out.get()).tobytes() == bits(want[0]) and bits(lse) == bits(want[1])
    assert (wide.get()[:, [0, 5]].astype(np.float32) == 7).all()
    batch.on_host = True
    for given in (taus, cp.asarray(np.array(taus, np.float32))):
        got, lse = batch.call(thresholds=given, dense_below=0)
        assert bits(got) == bits(want[0]) and bits(lse) == bits(want[1])


def test_many_sequences():
    """More than the threads of the CTA that locates them."""
    rng = np.random.default_rng(6)
    rows, keys = rng.integers(0, 90, 300), rng.integers(0, 200, 300)
    for on_host in (True, False):
        batch = GpuBatch(rows.tolist(), keys.tolist(), dim=64, on_host=on_host)
        out, lse = batch.call()
        check_alone(batch, (out, lse), each_alone(batch, dense_below=8192))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_packed_statistics(estimator):
    batch = GpuBatch((70, 130), (701, 950), dim=128, dtype=BF16, seed=7)
    parts = [slice(int(a), int(b)) for a, b in zip(batch.cu_k, batch.cu_k[1:])]
    each = [salekit.key_statistics(batch.k[None, part]) for part in parts]
    options = dict(estimator=estimator, **SPARSE)
    alone = []
    for i, part in enumerate(parts):
        some = slice(int(batch.cu_q[i]), int(batch.cu_q[i + 1]))
        out, lse = salekit.sparse_attention(batch.q[None, some], batch.k[None, part], batch.v[None, part],
                                            k_statistics=each[i], return_lse=True, **options)
        alone.append((out.get()[0], lse.get()[0]))
    check_alone(batch, batch.call(k_statistics=salekit.KeyStatistics.stack(each), **options), alone)


# --- graphs, streams, hostile values -------------------------------------------------------------------------------
@pytest.mark.parametrize("paged", (True, False))
def test_a_graph_reads_lengths_and_pages(paged):
    """Captured once, replayed with other lengths and other pages."""
    batch = GpuBatch((300, 1, 129), (301, 900, 1001), dim=128, dtype=BF16, seed=8)
    first = batch.call(paged, **SPARSE)
    want = [bits(x) for x in first]
    out = cp.empty_like(first[0])
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        batch.call(paged, out=out, **SPARSE)
        stream.synchronize()
        stream.begin_capture()
        _, lse = batch.call(paged, out=out, **SPARSE)
        graph = stream.end_capture()
        out.data.memset_async(0xFF, out.nbytes)
        graph.launch(stream)
        stream.synchronize()
        assert [bits(out), bits(lse)] == want
        # The last sequence gets 41 keys fewer, and a query row fewer.
        sums_q, sums_k, lengths = batch.gpu_sums
        sums_q.set(np.array([0, 300, 301, 429], np.int32))
        sums_k.set(np.array([0, 301, 1201, 2161], np.int32))
        lengths.set(np.array([301, 900, 960], np.int32))
        if paged:
            order = np.random.default_rng(9).permutation(len(batch.pages_k))
            inverse = np.argsort(order).astype(np.int32)
            table = batch.table.get()
            batch.pages_k.set(batch.pages_k.get()[order])
            batch.pages_v.set(batch.pages_v.get()[order])
            batch.table.set(np.where(table >= 0, inverse[table], table).astype(np.int32))
        graph.launch(stream)
        stream.synchronize()
        again, again_lse = batch.call(paged, **SPARSE)
        stream.synchronize()
        assert bits(out[:429]) == bits(again[:429])
        assert lse.get()[:, :429].tobytes() == again_lse.get()[:, :429].tobytes()
        assert bits(out[301:429]) != want[0][301 * 4 * 256 : 429 * 4 * 256]


@pytest.mark.parametrize("on_host", (True, False))
@pytest.mark.parametrize("paged", (True, False))
def test_a_workspace_of_the_callers(paged, on_host):
    """Nothing is allocated, and a captured call has launches alone."""
    batch = GpuBatch((300, 1, 129), (301, 900, 1001), dim=128, dtype=BF16, seed=8)
    batch.on_host = on_host
    for thresholds in (0.0, 0.1, [0.05, 0.1, 0.2, 0.4]):
        options = {**SPARSE, "thresholds": thresholds, "return_lse": False}
        want = bits(batch.call(paged, **options))
        num_bytes = batch.call(paged, function=salekit.varlen_workspace_bytes, **options)
        whole = cp.empty(num_bytes + 512, np.uint8)
        whole.data.memset(0xFF, whole.nbytes)
        out, own = cp.empty_like(batch.q), whole[256:-256]
        batch.call(paged, out=out, workspace=own, **options)
        assert bits(out) == want
        out.data.memset(0xFF, out.nbytes)
        cp.cuda.Device().synchronize()
        pool = cp.get_default_memory_pool()
        with cp.cuda.Stream(non_blocking=True) as stream:
            used = pool.used_bytes()
            stream.begin_capture()
            batch.call(paged, out=out, workspace=own, **options)
            graph = stream.end_capture()
            assert pool.used_bytes() == used
            graph.launch(stream)
            graph.launch(stream)
            stream.synchronize()
        assert bits(out) == want
        assert (whole[:256] == 0xFF).all() and (whole[-256:] == 0xFF).all()
        with pytest.raises(ArgumentError, match=f"workspace: got {num_bytes - 256} bytes; wants at least {num_bytes}"):
            batch.call(paged, out=out, workspace=own[:-256], **options)


def test_calls_do_not_wait():
    batch = GpuBatch((300, 1, 129), (301, 900, 1000), dim=128, dtype=BF16, seed=10)
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        statistics = salekit.KeyStatistics.stack([salekit.key_statistics(batch.k[None, :100])] * 3)
        for paged in (True, False):
            batch.call(paged, **SPARSE)
            out, lse = batch.call(paged, k_statistics=statistics, **SPARSE)
            salekit.merge_attention_states(out, lse, out, lse)
        batch.on_host = True
        batch.call(**SPARSE)
        batch.on_host = False
        spin((1,), (1,), (np.int64(1000),))
        stream.synchronize()
        spin((1,), (1,), (np.int64(1_000_000_000),))
        busy = cp.cuda.Event(disable_timing=True)
        busy.record()
        for paged in (True, False):
            out, lse = batch.call(paged, **SPARSE)
            salekit.merge_attention_states(out, lse, out, lse)
            batch.call(paged, k_statistics=statistics, **SPARSE)
        batch.on_host = True
        batch.call(**SPARSE)
        assert not busy.done, "a call waited for the GPU"
        stream.synchronize()


def test_neighbours_stay_out():
    """NaN in other sequences, in rows of no sequence, and in the unused rows of pages reaches nobody."""
    batch = GpuBatch((33, 70, 65), (45, 900, 300), dim=128, dtype=BF16, seed=11)
    for paged in (True, False):
        want, want_lse = (x.get() for x in batch.call(paged, **SPARSE))

        def spoil(host):
            host.q[33:103] = np.nan
            for x, pages in ((host.k, host.pages_k), (host.v, host.pages_v)):
                x[45:945] = np.nan
                pages[host.table[1][host.table[1] >= 0]] = np.nan

        spoilt = GpuBatch((33, 70, 65), (45, 900, 300), dim=128, dtype=BF16, seed=11, spoil=spoil)
        got, got_lse = (x.get() for x in spoilt.call(paged, **SPARSE))
        for some in (slice(0, 33), slice(103, 168)):
            assert got[some].tobytes() == want[some].tobytes()
            assert np.ascontiguousarray(got_lse[:, some]).tobytes() == np.ascontiguousarray(want_lse[:, some]).tobytes()
        assert np.isnan(got[33:103].astype(np.float32)).all()


@pytest.mark.parametrize("sums_q, sums_k", (
    ([0, 300, 200, 500], [0, 700, 400, 700]),
    ([-5, 10, 2**31 - 1, -(2**31)], [-7, 2**31 - 1, 3, 9]),
    ([0, 100, 200, 10**6], [0, 10**6, 10**6, 2 * 10**6]),
    ([7, 7, 7, 7], [9, 9, 9, 9]),
))
def test_hostile_lengths_on_the_gpu(sums_q, sums_k):
    """Undefined output, but no access beyond the arrays (compute-sanitizer sees that); an error with debug, and nothing
    is written."""
    rng = np.random.default_rng(12)
    q, k, v = on_gpu(*(draw(rng, n, h, 128, dtype=BF16) for n, h in ((500, 4), (700, 2), (700, 2))))
    sums = on_gpu(np.array(sums_q, np.int32), np.array(sums_k, np.int32))
    guarded = cp.asarray(np.full((520, 4, 128), 7, BF16))
    out = guarded[10:510]
    salekit.sparse_attention_varlen(q, k, v, *sums, 300, 700, out=out, **SPARSE)
    cp.cuda.Device().synchronize()
    host = guarded.get().astype(np.float32)
    assert (host[:10] == 7).all() and (host[510:] == 7).all()
    before = bits(guarded)
    for options in (dict(debug=True), dict(debug=None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SALEKIT_DEBUG", "1")
            with pytest.raises(ArgumentError, match="cu_seqlens_|max_seqlen"):
                salekit.sparse_attention_varlen(q, k, v, *sums, 300, 700, out=out, **options, **SPARSE)
    assert bits(guarded) == before


def test_hostile_pages_on_the_gpu():
    """A page that there is not has zeros; other sequences are as they were."""
    batch = GpuBatch((40, 65), (300, 900), dim=128, dtype=BF16, seed=13, page_size=64)
    want, _ = batch.call(paged=True, **SPARSE)
    table = batch.table.get()
    for page in (-1, 10**9, -(2**31), len(batch.pages_k)):
        table[1, 3] = page
        batch.table.set(table)
        got, _ = batch.call(paged=True, **SPARSE)
        assert bits(got[:40]) == bits(want[:40]) and np.isfinite(got.get().astype(np.float32)).all()
        with pytest.raises(ArgumentError, match=rf"block_table: got page {page} at \[1, 3\]"):
            batch.call(paged=True, debug=True, **SPARSE)
    zeros = batch.k.get(), batch.v.get()
    for x in zeros:
        x[300 + 3 * 64 : 300 + 4 * 64] = 0
    q = batch.q[None, 40:]
    one = salekit.sparse_attention(q, *(cp.asarray(x)[None, 300:] for x in zeros), **SPARSE)
    assert bits(got[40:]) == one.get()[0].tobytes()


def test_nothing_to_do():
    batch = GpuBatch((3, 4), (0, 0))
    out, lse = batch.call()
    assert (out.get() == 0).all() and np.isneginf(lse.get()).all()
    out, lse = salekit.sparse_attention_varlen(
        batch.q[:0], batch.k, batch.v, cp.asarray(np.zeros(3, np.int32)), batch.gpu_sums[1], 5, 5, return_lse=True
    )
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    batch = GpuBatch((), ())
    assert batch.call()[0].shape == (0, 4, 64)
