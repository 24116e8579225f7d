"""Softcap, windows and sink logits of packed sequences and pages on the GPU: against float64, and against calls of one
sequence each, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import score_oracle

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

from test_host_serving import BF16, ESTIMATORS, FP16, Batch, draw, running  # noqa: E402, I001
from test_kernel_scores import FEATURES, check_attention, options_of  # noqa: E402
from test_kernel_serving import GpuBatch, bits, check_alone, each_alone, on_gpu, poison_workspaces  # noqa: E402

import salekit  # noqa: E402
from salekit import pipeline  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402
from salekit.errors import ArgumentError  # noqa: E402

SELECTION = dict(thresholds=0.1, dense_below=0, local=32)
# Every window of FEATURES hides keys of each of these, so that a call of one sequence takes a window's kernels, too.
BOUND_LENGTHS = (
    ((300, 1, 129), (320, 900, 1000)),
    ((5, 0, 64, 700, 3), (309, 440, 0, 1301, 0)),
    ((1, 1, 1, 1), (350, 834, 1025, 1000)),
    ((640, 128), (640, 384)),
)
# Some are shorter than the windows, have fewer keys than rows, or one of them.
ANY_LENGTHS = (
    ((77, 0, 1, 130, 200), (77, 9, 333, 130, 65)),
    ((5, 64, 3, 333), (300, 0, 1, 1025)),
    ((1, 1, 1, 1), (2, 34, 259, 1000)),
    ((65, 3, 129, 1, 64), (66, 205, 700, 9, 300)),
)


def sequences_of(batch, result):
    """(out, lse [1, ...] of each sequence on the host, q, k, v [1, ...] of it)."""
    out, lse = (x.get() for x in result)
    q, k, v = batch.host
    for i in range(len(batch.rows)):
        some, keys = (slice(sums[i], sums[i + 1]) for sums in batch.sums)
        yield out[None, some], lse[None, :, some], q[None, some], k[None, keys], v[None, keys]


def plan_of(q, k, causal, name, **options):
    no_data = {key: x for key, x in options_of(name).items() if key != "sink_logits"}
    return salekit.make_plan(q, k, k, causal=causal, **no_data, **options)


def check_sequence(out, lse, q, k, v, mask, plan, sinks):
    if 0 in (plan.seqlen_q, plan.seqlen_k):
        want = np.full(4, -np.inf, np.float32) if sinks is None else sinks
        assert (out.astype(np.float32) == 0).all() and (lse == want[None, :, None]).all()
    else:
        check_attention(out, lse, q, k, v, mask, plan, sinks)


# --- against float64 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype, dim", ((FP16, 64), (BF16, 128), (BF16, 96), (FP16, 256)))
@pytest.mark.parametrize("name", FEATURES)
def test_dense_is_float64(name, dtype, dim, causal):
    options = options_of(name)
    for rows, keys in ANY_LENGTHS:
        batch = GpuBatch(rows, keys, dtype=dtype, dim=dim, seed=1)
        first = batch.call(causal=causal, **options)
        for paged, batch.on_host in ((True, False), (False, True), (True, True)):
            poison_workspaces()
            again = batch.call(paged, causal=causal, **options)
            assert [bits(x) for x in first] == [bits(x) for x in again]
        for out, lse, q, k, v in sequences_of(batch, first):
            check_sequence(out, lse, q, k, v, None, plan_of(q, k, causal, name), options.get("sink_logits"))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("estimator", ("int8", "int4"))
@pytest.mark.parametrize("dim, block", ((64, (64, 32)), (128, (128, 32)), (192, (128, 64))))
@pytest.mark.parametrize("name", FEATURES)
def test_anchors_alone_are_float64(name, dim, block, estimator, causal):
    """tau = inf: no rounding decides on a block, so the mask is that of the definition, sequence by sequence."""
    options, (_, (left, right), _) = options_of(name), FEATURES[name]
    kind = dict(options, causal=causal, estimator=estimator, block=block, thresholds=np.inf, dense_below=0, local=32)
    for rows, keys in ANY_LENGTHS:
        batch = GpuBatch(rows, keys, dtype=BF16, dim=dim, seed=2)
        result = batch.call(paged=True, **kind)
        poison_workspaces()
        assert [bits(x) for x in batch.call(**kind)] == [bits(x) for x in result]
        for out, lse, q, k, v in sequences_of(batch, result):
            plan, mask = plan_of(q, k, causal, name, block=block), None
            if q.size and k.size:
                none = np.zeros((plan.seqlen_q, plan.seqlen_k))
                window = (left, 0 if causal else right)
                found, _ = score_oracle.select(none, none, np.inf, causal, window, block=block, local=32)
                mask = BlockMask.from_dense(
                    np.broadcast_to(found, (1, 4, *found.shape)), *block, plan.seqlen_q, plan.seqlen_k, causal
                )
            check_sequence(out, lse, q, k, v, mask, plan, options.get("sink_logits"))


# --- against calls of one sequence ---------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype, dim, block", (
    (FP16, 64, (64, 32)), (BF16, 128, (128, 32)), (BF16, 128, (64, 128)), (BF16, 192, (64, 64)), (FP16, 256, (128, 32)),
))
@pytest.mark.parametrize("name", ("softcap", "window", "window-sinks", "all"))
def test_packed_is_each_sequence_alone(name, dtype, dim, block, causal, estimator):
    options = dict(options_of(name), causal=causal, estimator=estimator, block=block, **SELECTION)
    on_device = dict(options)
    if "sink_logits" in options:
        on_device["sink_logits"] = cp.asarray(options["sink_logits"])
    for rows, keys in BOUND_LENGTHS:
        batch = GpuBatch(rows, keys, dtype=dtype, dim=dim, seed=3)
        alone = each_alone(batch, **options)
        for paged, batch.on_host, given in ((False, False, options), (True, False, on_device), (True, True, options)):
            poison_workspaces()
            check_alone(batch, batch.call(paged, **given), alone)


@pytest.mark.parametrize("dim", (96, 192, 256))
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
def test_other_head_dims_without_them(causal, estimator, dim):
    options = dict(causal=causal, estimator=estimator, **SELECTION)
    for rows, keys in ANY_LENGTHS:
        batch = GpuBatch(rows, keys, dtype=BF16, dim=dim, seed=4)
        alone = each_alone(batch, **options)
        for paged in (True, False):
            poison_workspaces()
            check_alone(batch, batch.call(paged, **options), alone)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dim, block", ((64, (64, 32)), (128, (128, 32)), (192, (128, 64))))
@pytest.mark.parametrize("name", ("softcap", "window", "window-sinks", "all"))
def test_kernels_of_other_gpus(name, dim, block, causal, estimator):
    """mma.sync's kernels with lengths and with these options, stage by stage on padded arrays; some rows see no key."""
    rows, keys = (300, 1, 129, 0, 400, 65), (320, 900, 1000, 440, 360, 0)
    host = Batch(rows, keys, dim=dim, dtype=BF16, seed=5)
    padded = [
        np.zeros((len(rows), longest, heads, dim), BF16) for longest, heads in
        ((host.max_q, 4), (host.max_k, 2), (host.max_k, 2))
    ]
    for i, (_, *qkv) in enumerate(host.each()):
        for target, x in zip(padded, qkv):
            target[i, : len(x)] = x
    q, k, v = on_gpu(*padded)
    options = options_of(name)
    sinks = options.pop("sink_logits", None)
    sinks = None if sinks is None else cp.asarray(sinks)
    more = dict(causal=causal, block=block, estimator=estimator, local=32, dense_below=0)
    plan = salekit.make_plan(q, k, v, **more, **options).replace(arch="sm_80")
    lengths = cp.asarray(np.array([rows, keys, *[[0] * len(rows)] * 3], np.int32))
    packed = plan.replace(has_lengths=True, lengths=lengths)
    out = cp.asarray(np.full(q.shape, 7, BF16))
    lse, _ = pipeline.run_stages(q, k, v, out, 0.1, packed, True, False, sinks)
    for i in range(len(rows)):
        got, got_lse = out.get()[i : i + 1, : rows[i]], np.ascontiguousarray(lse.get()[i : i + 1, :, : rows[i]])
        assert (out.get()[i, rows[i] :].astype(np.float32) == 7).all()
        if 0 in (rows[i], keys[i]):
            want = np.full(4, -np.inf, np.float32) if sinks is None else sinks.get()
            assert (got.astype(np.float32) == 0).all() and (got_lse == want[None, :, None]).all()
            continue
        one = plan.replace(batch=1, seqlen_q=rows[i], seqlen_k=keys[i])
        parts = [x[i : i + 1, :n] for x, n in ((q, rows[i]), (k, keys[i]), (v, keys[i]))]
        alone = cp.empty(parts[0].shape, BF16)
        alone_lse, _ = pipeline.run_stages(*parts, alone, 0.1, one, True, False, sinks)
        assert bits(alone) == np.ascontiguousarray(got).tobytes() and bits(alone_lse) == got_lse.tobytes()


@pytest.mark.parametrize("name", ("window", "window-sinks", "all"))
def test_strides_and_thresholds(name):
    options = dict(options_of(name), dense_below=0, full_rows=100)
    batch = GpuBatch((300, 700, 3), (900, 1301, 999), heads=4, kv_heads=1, dim=128, dtype=BF16, seed=6)
    taus = [0.1, 0.0, np.inf, 0.3]
    for stride, thresholds in ((2, 0.1), (4, taus), (1, cp.asarray(np.array(taus, np.float32)))):
        more = dict(options, query_stride=stride, thresholds=thresholds)
        check_alone(batch, batch.call(paged=True, **more), each_alone(batch, **more))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_packed_statistics(estimator):
    batch = GpuBatch((70, 130), (701, 950), dim=128, dtype=BF16, seed=7)
    options = dict(options_of("all"), estimator=estimator, **SELECTION)
    parts = [slice(int(a), int(b)) for a, b in zip(batch.cu_k, batch.cu_k[1:])]
    each = [salekit.key_statistics(batch.k[None, part]) for part in parts]
    alone = []
    for i, part in enumerate(parts):
        some = slice(int(batch.cu_q[i]), int(batch.cu_q[i + 1]))
        out, lse = salekit.sparse_attention(batch.q[None, some], batch.k[None, part], batch.v[None, part],
                                            k_statistics=each[i], return_lse=True, **options)
        alone.append((out.get()[0], lse.get()[0]))
    check_alone(batch, batch.call(k_statistics=salekit.KeyStatistics.stack(each), **options), alone)


# --- a server's steps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", (
    dict(window_size=(127, 0), sink_logits=np.linspace(-2, 4, 4).astype(np.float32)), dict(softcap=4.0, window_size=200)
))
def test_chunked_prefill_over_a_paged_cache(options):
    """Two prompts grow chunk by chunk, then token by token; each row is that of float64 over its prompt."""
    rng = np.random.default_rng(8)
    lengths, page_size, dim = (701, 470), 64, 128
    q, k, v = ([draw(rng, n, heads, dim, dtype=BF16) for n in lengths] for heads in (4, 2, 2))
    pages = [np.full((24, page_size, 2, dim), np.nan, np.float32).astype(BF16) for _ in range(2)]
    table = rng.permutation(24).astype(np.int32).reshape(2, 12)
    out, lse = ([np.zeros_like(x) for x in q], [np.zeros((4, n), np.float32) for n in lengths])
    done = [0, 0]
    for step in ((256, 1), (300, 64), (143, 404), (1, 1), (1, 0)):
        new = [slice(a, a + n) for a, n in zip(done, step)]
        for i, rows in enumerate(new):
            for j in range(rows.start, rows.stop):
                for target, x in zip(pages, (k, v)):
                    target[table[i, j // page_size], j % page_size] = x[i][j]
        done = [rows.stop for rows in new]
        given = on_gpu(np.concatenate([x[rows] for x, rows in zip(q, new)]), *pages)
        sums, counts = on_gpu(running(step), np.array(done, np.int32))
        got, got_lse = salekit.sparse_attention_varlen(
            *given, sums, None, 404, 701, block_table=cp.asarray(table), seqlens_k=counts, return_lse=True, **options
        )
        for i, (rows, first) in enumerate(zip(new, (0, step[0]))):
            out[i][rows] = got.get()[first : first + step[i]]
            lse[i][:, rows] = got_lse.get()[:, first : first + step[i]]
    for i, n in enumerate(lengths):
        no_data = {name: x for name, x in options.items() if name != "sink_logits"}
        one = [x[i][None] for x in (q, k, v)]
        plan = salekit.make_plan(*one, **no_data)
        assert done[i] == n
        check_attention(out[i][None], lse[i][None], *one, None, plan, options.get("sink_logits"))


@pytest.mark.parametrize("paged", (True, False))
def test_a_graph_reads_lengths_and_sinks(paged):
    batch = GpuBatch((300, 1, 129), (320, 900, 1001), dim=128, dtype=BF16, seed=9)
    options = dict(options_of("all"), **SELECTION)
    sinks = cp.asarray(options.pop("sink_logits"))
    first = batch.call(paged, sink_logits=sinks, **options)
    out = cp.empty_like(first[0])
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        batch.call(paged, out=out, sink_logits=sinks, **options)
        stream.synchronize()
        stream.begin_capture()
        _, lse = batch.call(paged, out=out, sink_logits=sinks, **options)
        graph = stream.end_capture()
        for change in (False, True):
            if change:  # other sink logits, and the last sequence gets 41 keys and a query row fewer
                sinks.set(sinks.get()[::-1] + 1)
                sums_q, sums_k, lengths = batch.gpu_sums
                sums_q.set(np.array([0, 300, 301, 429], np.int32))
                sums_k.set(np.array([0, 320, 1220, 2180], np.int32))
                lengths.set(np.array([320, 900, 960], np.int32))
            out.data.memset_async(0xFF, out.nbytes)
            graph.launch(stream)
            stream.synchronize()
            again, again_lse = batch.call(paged, sink_logits=sinks, **options)
            stream.synchronize()
            assert bits(out[:429]) == bits(again[:429])
            assert lse.get()[:, :429].tobytes() == again_lse.get()[:, :429].tobytes()
            assert (bits(out[:300]) == bits(first[0][:300])) != change


def test_calls_do_not_wait():
    batch = GpuBatch((300, 1, 129), (320, 900, 1000), dim=128, dtype=BF16, seed=10)
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    options = dict(options_of("all"), **SELECTION)
    on_device = dict(options, sink_logits=cp.asarray(options["sink_logits"]))
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for given in (options, on_device):
            batch.call(True, **given)
        spin((1,), (1,), (np.int64(1000),))
        stream.synchronize()
        spin((1,), (1,), (np.int64(1_000_000_000),))
        busy = cp.cuda.Event(disable_timing=True)
        busy.record()
        for given in (options, on_device):
            batch.call(True, **given)
        assert not busy.done, "a call waited for the GPU"
        stream.synchronize()


# --- what is wrong or missing --------------------------------------------------------------------------------------
def test_without_a_key_the_sink_is_all():
    sinks = np.array([1, -np.inf, 3, 4], np.float32)
    batch = GpuBatch((3, 0, 80, 1), (0, 7, 5, 40), dim=128, dtype=BF16, seed=11)
    nothing = GpuBatch((3, 4), (0, 0))
    for given in (sinks, cp.asarray(sinks)):
        for options in ({}, dict(SELECTION, window_size=9)):
            for paged in (True, False):
                poison_workspaces()
                out, lse = (x.get() for x in batch.call(paged, sink_logits=given, **options))
                assert (out[:78].astype(np.float32) == 0).all() and (lse[:, :78] == sinks[:, None]).all()
                assert (lse[:, 78:] > sinks[:, None]).all()
                out, lse = (x.get() for x in nothing.call(paged, sink_logits=given, **options))
                assert (out == 0).all() and (lse == np.broadcast_to(sinks[:, None], lse.shape)).all()


def test_sinks_that_are_nan_on_the_gpu():
    batch = GpuBatch((65, 3), (300, 40), dim=128, dtype=BF16, seed=12)
    sinks = cp.asarray(np.array([0, np.nan, np.inf, 1], np.float32))
    out, lse = (x.get() for x in batch.call(sink_logits=sinks))
    want, want_lse = (x.get() for x in batch.call(sink_logits=[0.0, 0.0, 0.0, 1.0]))
    assert np.isnan(out[:, 1:3].astype(np.float32)).all() and np.isnan(lse[1:3]).all()
    assert (out[:, ::3] == want[:, ::3]).all() and (lse[::3] == want_lse[::3]).all()
    target = cp.asarray(np.full(out.shape, 7, BF16))
    for given, match, debug in ((sinks, "has a NaN or", True), ([0, 1, 2], "got shape", False),
                                ([0, np.nan, 0, 0], "has a NaN or", False), (sinks[::2], "got shape", False)):
        with pytest.raises(ArgumentError, match=f"sink_logits: {match}"):
            batch.call(sink_logits=given, debug=debug, out=target)
    assert (target.get().astype(np.float32) == 7).all()


@pytest.mark.parametrize("sums_q, sums_k", (
    ([0, 300, 200, 500], [0, 700, 400, 700]),
    ([-5, 10, 2**31 - 1, -(2**31)], [-7, 2**31 - 1, 3, 9]),
    ([0, 100, 200, 10**6], [0, 10**6, 10**6, 2 * 10**6]),
))
@pytest.mark.parametrize("name", ("window", "all"))
def test_hostile_lengths_on_the_gpu(name, sums_q, sums_k):
    """Undefined output, but no access beyond the arrays (compute-sanitizer sees that)."""
    rng = np.random.default_rng(13)
    q, k, v = on_gpu(*(draw(rng, n, h, 128, dtype=BF16) for n, h in ((500, 4), (700, 2), (700, 2))))
    sums = on_gpu(np.array(sums_q, np.int32), np.array(sums_k, np.int32))
    guarded = cp.asarray(np.full((520, 4, 128), 7, BF16))
    for causal in (True, False):
        options = dict(options_of(name), causal=causal, out=guarded[10:510], **SELECTION)
        salekit.sparse_attention_varlen(q, k, v, *sums, 300, 700, **options)
        cp.cuda.Device().synchronize()
        host = guarded.get().astype(np.float32)
        assert (host[:10] == 7).all() and (host[510:] == 7).all()


@pytest.mark.parametrize("options", (dict(softcap=30.0), dict(window_size=8), dict(sink_logits=[0.0] * 4)))
def test_low_bit_attention_has_none_of_them(options):
    batch = GpuBatch((65, 3), (300, 40), dim=128, dtype=BF16)
    with pytest.raises(ArgumentError, match="int8-fp8"):
        batch.call(attend="int8-fp8", **options)
