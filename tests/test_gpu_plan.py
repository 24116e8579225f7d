"""Plans, workspaces and CUDA graphs on the GPU: replayed launches give what the stages give, whatever moves."""

from __future__ import annotations

import threading
import time

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit import arrays as arrays_module
from salekit import attention_plan, programs, workspaces
from salekit.errors import ArgumentError, OutOfMemoryError

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
TAU = 0.2
SPARSE = {"thresholds": TAU, "dense_below": 0}
HOST_MICROSECONDS = 60
ESTIMATORS = ("int4", "int8", "int8-sp24")


def make(seqlen_q=1100, seqlen_k=None, heads=4, kv_heads=2, head_dim=128, batch=1, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((seqlen_q, heads), (seqlen_k or seqlen_q, kv_heads), (seqlen_k or seqlen_q, kv_heads))
    return [cp.asarray(rng.standard_normal((batch, s, h, head_dim), np.float32).astype(dtype)) for s, h in sizes]


def by_stages(q, k, v, thresholds=TAU, **options):
    """out, lse, mask words of a sparse call, from the stage functions alone."""
    plan = salekit.make_plan(q, k, v, dense_below=0, **options)
    if not isinstance(thresholds, float):
        thresholds = cp.asarray(np.asarray(thresholds, np.float32))
    quantized = salekit.quantize(q, k, plan)
    statistics = salekit.anchor_statistics(q, k, quantized.k_mean, plan)
    mask = salekit.estimate(quantized, salekit.row_limits(*statistics, quantized, thresholds, plan), plan)
    out, lse = salekit.attend(q, k, v, mask, plan, return_lse=True)
    return bits(out), bits(lse), bits(mask.words)


def bits(array):
    return array.get().tobytes()


def all_bits(result):
    out, lse, mask = result
    return bits(out), bits(lse), bits(mask.words)


class Allocations(cp.cuda.memory_hook.MemoryHook):
    """Counts what is taken from the pool and what the pool takes from the GPU."""

    name = "salekit-allocations"

    def __init__(self):
        self.pool = self.gpu = 0

    def malloc_preprocess(self, **_):
        self.pool += 1

    def alloc_preprocess(self, **_):
        self.gpu += 1


def poison_workspaces():
    """Fill the workspace of every stream with a pattern: no call may read what it did not write."""
    for workspace in workspaces._workspaces.values():
        if workspace._memory is not None:
            workspace._memory.data.memset_async(0x7F, workspace._memory.nbytes)


# --- the same bits as the stages ---------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("block", [(64, 32), (128, 32), (128, 128)])
def test_replay_is_what_the_stages_give(estimator, block):
    options = {"estimator": estimator, "block": block}
    for seed in range(3):  # other addresses, other values, one program
        arrays = make(seed=seed)
        want = by_stages(*arrays, **options)
        got = salekit.sparse_attention(*arrays, return_lse=True, return_mask=True, **options, **SPARSE)
        assert all_bits(got) == want
        poison_workspaces()
        assert bits(salekit.sparse_attention(*arrays, **options, **SPARSE)) == want[0]


@pytest.mark.parametrize("head_dim, dtype", [(64, FP16), (128, BF16)])
@pytest.mark.parametrize("kind", ["scalar", "numpy scalar", "list", "numpy", "gpu"])
def test_thresholds_change_between_calls(head_dim, dtype, kind):
    arrays = make(head_dim=head_dim, dtype=dtype)
    prepared = salekit.plan(*arrays, dense_below=0)
    for taus in ([0.2] * 4, [0.5] * 4, [0.05] * 4, [np.inf] * 4, [0.2] * 4):
        if kind not in ("scalar", "numpy scalar"):
            taus = [0.0, *taus[1:3], 1.0]
        value = {
            "scalar": taus[0],
            "numpy scalar": np.float32(taus[0]),
            "list": taus,
            "numpy": np.array(taus),
            "gpu": cp.asarray(np.array(taus, np.float32)),
        }[kind]
        want = by_stages(*arrays, thresholds=taus)
        got = prepared.run(*arrays, thresholds=value, return_lse=True, return_mask=True)
        assert all_bits(got) == want
        got = salekit.sparse_attention(*arrays, thresholds=value, dense_below=0, return_lse=True, return_mask=True)
        assert all_bits(got) == want


def test_thresholds_of_many_heads():
    arrays = make(200, heads=600, kv_heads=1, head_dim=64)
    taus = np.random.default_rng(1).uniform(0.05, 1, 600)
    got = salekit.sparse_attention(*arrays, thresholds=taus, dense_below=0, return_lse=True, return_mask=True)
    assert all_bits(got) == by_stages(*arrays, thresholds=taus)


def test_layouts_strides_and_out():
    arrays = make(heads=4, kv_heads=2)
    want = by_stages(*arrays)[0]
    swapped = [cp.asarray(np.ascontiguousarray(x.get().transpose(0, 2, 1, 3))) for x in arrays]
    buffer = cp.asarray(np.zeros((1, 4, 1100, 192), BF16))
    packed = cp.asarray(np.concatenate([x.get() for x in arrays], axis=2))
    slices = [packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]]
    for _ in range(2):
        out = buffer[..., 64:]
        assert salekit.sparse_attention(*swapped, layout="bhsd", out=out, **SPARSE) is out
        assert np.ascontiguousarray(out.get().transpose(0, 2, 1, 3)).tobytes() == want
        assert bits(salekit.sparse_attention(*slices, **SPARSE)) == want
        backwards = cp.asarray(np.ascontiguousarray(arrays[0].get()[:, ::-1]))[:, ::-1]  # takes another kernel
        got = salekit.sparse_attention(backwards, *arrays[1:], **SPARSE)
        assert bits(got) == by_stages(backwards, *arrays[1:])[0]


def test_dense_and_its_mask():
    for lengths in ((1100, 1100), (300, 1301), (1301, 300), (64, 1025)):
        q, k, v = make(*lengths)
        for causal in (True, False):
            plan = salekit.make_plan(q, k, v, causal=causal)
            want_out, want_lse = salekit.attend(q, k, v, None, plan, return_lse=True)
            options = {"causal": causal, "return_lse": True}
            for _ in range(2):
                out, lse = salekit.dense_attention(q, k, v, **options)
                assert (bits(out), bits(lse)) == (bits(want_out), bits(want_lse))
                got, lse, mask = salekit.sparse_attention(
                    q, k, v, dense_below=4096, return_mask=True, block=(64, 64), **options
                )
                assert (bits(got), bits(lse)) == (bits(want_out), bits(want_lse))
                assert (mask.to_dense() == mask.visible()).all() and not mask.to_dense()[..., mask.num_k_blocks :].any()
                assert (
                    mask.words.get() == salekit.BlockMask.from_dense(mask.to_dense(), 64, 64, *lengths, causal).words
                ).all()


def test_calls_with_other_arguments_never_wait():
    """Updates of a graph in flight must not wait for it, nor change what is queued."""
    arrays = [make(700, seed=seed) for seed in range(3)]
    taus = (0.1, 0.2, 0.4)
    want = [by_stages(*x, thresholds=tau)[0] for x in arrays for tau in taus]
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }', "spin"
    )
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        outs = [cp.empty_like(arrays[0][0]) for _ in range(27)]
        for _ in range(2):
            salekit.sparse_attention(*arrays[0], out=outs[0], **SPARSE)
        spin((1,), (1,), (np.int64(1000),))
        stream.synchronize()
        spin((1,), (1,), (np.int64(1_000_000_000),))
        busy = cp.cuda.Event(disable_timing=True)
        busy.record()
        for index, out in enumerate(outs):
            which, tau = index % 9 // 3, taus[index % 3]
            salekit.sparse_attention(*arrays[which], thresholds=tau, dense_below=0, out=out)
        assert not busy.done, "a call waited for the GPU"
        stream.synchronize()
    assert [bits(out) for out in outs] == want * 3


def test_streams_with_a_priority():
    arrays = make(700)
    want = by_stages(*arrays)[0]
    stream = cp.cuda.Stream(non_blocking=True, priority=-1)
    cp.cuda.Device().synchronize()
    for _ in range(3):
        out = salekit.sparse_attention(*arrays, stream=stream, **SPARSE)
        stream.synchronize()
        assert bits(out) == want


def test_fills_and_short_programs():
    """zeros() is filled again at each run, launched as a graph or by itself, and follows the workspace."""
    add = cp.RawKernel('extern "C" __global__ void add(int* x, int* y) { y[threadIdx.x] += x[threadIdx.x]; }', "add")
    x, y = (cp.asarray(np.arange(256, dtype=np.int32) * factor) for factor in (1, 3))
    out = cp.empty_like(x)
    spaces = [cp.asarray(np.full(4096, 0x7F, np.uint8)) for _ in range(2)]
    stream, gpu = cp.cuda.Stream(non_blocking=True), programs.Gpu()
    cp.cuda.Device().synchronize()
    for repeats in (1, 5):
        with programs.Recorder(0) as recorder:
            source, target = (recorder.array((256,), np.int32) for _ in range(2))
            counters = arrays_module.zeros((256,), np.int32)
            for _ in range(repeats):
                recorder.launch(add.kernel, (1,), (256,), 0, (source, counters))
            recorder.launch(add.kernel, (1,), (256,), 0, (counters, target))
        program = programs.Program(recorder, [source, target])
        for turn in range(12):
            given = (x, y)[turn % 2]
            out.data.memset_async(0, out.nbytes, stream)
            program.link(spaces[turn // 2 % 2].data.ptr, given.data.ptr, out.data.ptr)
            program.submit(gpu, stream.ptr)
            stream.synchronize()
            assert (out.get() == repeats * given.get()).all()
        assert program._graphs[stream.ptr] is not None


# --- results are the caller's ------------------------------------------------------------------------------------
def test_results_are_not_workspace():
    first, second = make(seed=1), make(seed=2)
    options = {"return_lse": True, "return_mask": True, **SPARSE}
    one = salekit.sparse_attention(*first, **options)
    want = all_bits(one)
    two = salekit.sparse_attention(*second, **options)
    poison_workspaces()
    assert all_bits(one) == want and all_bits(two) == by_stages(*second)
    addresses = {x.data.ptr for out, lse, mask in (one, two) for x in (out, lse, mask.words)}
    assert len(addresses) == 6


# --- host time and allocations -----------------------------------------------------------------------------------
def calls(q, k, v, out):
    prepared = salekit.plan(q, k, v, dense_below=0)
    taus = cp.asarray(np.full(q.shape[2], TAU, np.float32))
    return {
        "sparse": lambda: salekit.sparse_attention(q, k, v, out=out, **SPARSE),
        "int4": lambda: salekit.sparse_attention(q, k, v, out=out, estimator="int4", **SPARSE),
        "host": lambda: salekit.sparse_attention(q, k, v, out=out, thresholds=[TAU] * 4, dense_below=0),
        "gpu": lambda: salekit.sparse_attention(q, k, v, out=out, thresholds=taus, dense_below=0),
        "dense": lambda: salekit.dense_attention(q, k, v, out=out),
        "bhsd": lambda: salekit.sparse_attention(
            *(x.transpose(0, 2, 1, 3) for x in (q, k, v)), layout="bhsd", out=out.transpose(0, 2, 1, 3), **SPARSE
        ),
        "plan": lambda: prepared.run(q, k, v, thresholds=TAU, out=out),
    }


@pytest.mark.parametrize("name", ["sparse", "int4", "host", "gpu", "dense", "bhsd", "plan"])
def test_steady_state_allocates_nothing_and_is_quick(name):
    q, k, v = make(2048)
    call = calls(q, k, v, cp.empty_like(q))[name]
    call()
    with Allocations() as counted:
        for _ in range(5):
            call()
    assert (counted.pool, counted.gpu) == (0, 0)
    samples = []
    for _ in range(20):
        cp.cuda.Device().synchronize()
        for _ in range(10):
            started = time.perf_counter()
            call()
            samples.append(time.perf_counter() - started)
    assert np.median(samples) * 1e6 <= HOST_MICROSECONDS


def test_results_alone_are_allocated():
    arrays = make(2048)
    options = {"return_lse": True, "return_mask": True, **SPARSE}
    salekit.sparse_attention(*arrays, **options)
    with Allocations() as counted:
        salekit.sparse_attention(*arrays, **options)
    assert (counted.pool, counted.gpu) == (3, 0)


# --- workspaces --------------------------------------------------------------------------------------------------
def test_workspace_grows_and_is_freed():
    salekit.clear_workspaces()
    pool = cp.get_default_memory_pool()
    small, large = make(600), make(4000)
    outs = [cp.empty_like(x[0]) for x in (small, large)]
    want = [by_stages(*x)[0] for x in (small, large)]
    plans = [salekit.plan(*x, dense_below=0) for x in (small, large)]
    assert 0 < plans[0].workspace_bytes < plans[1].workspace_bytes
    before = pool.used_bytes()
    for _ in range(2):
        for index, arrays in enumerate((small, large)):
            assert bits(plans[index].run(*arrays, thresholds=TAU, out=outs[index])) == want[index]
    kept = pool.used_bytes() - before
    assert plans[1].workspace_bytes - 1536 <= kept <= plans[1].workspace_bytes  # one piece for both
    salekit.clear_workspaces()
    assert pool.used_bytes() == before
    assert bits(plans[0].run(*small, thresholds=TAU, out=outs[0])) == want[0]


def test_workspace_of_the_caller():
    arrays = make()
    prepared = salekit.plan(*arrays, dense_below=0)
    want = by_stages(*arrays)[0]
    salekit.clear_workspaces()
    memory = cp.empty(prepared.workspace_bytes + 512, np.uint8)
    for start in (0, 512):
        assert bits(prepared.run(*arrays, thresholds=TAU, workspace=memory[start:])) == want
    assert len(workspaces._workspaces) == 0
    for bad, match in (
        (memory[:1000], "workspace: got 1000 bytes"),
        (memory[1:], "workspace: got an address 1 past"),
        (memory[::2], "workspace: is not contiguous"),
        (np.empty(memory.size, np.uint8), "workspace: is on host memory"),
    ):
        with pytest.raises(ArgumentError, match=match):
            prepared.run(*arrays, workspace=bad)


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_clears_the_workspaces_and_tries_again(failures, monkeypatch):
    arrays = make(2000)
    want = by_stages(*arrays)[0]
    prepared = salekit.plan(*arrays, dense_below=0)
    stream = cp.cuda.Stream(non_blocking=True)
    salekit.clear_workspaces()
    cp.cuda.Device().synchronize()
    prepared.run(*arrays, thresholds=TAU, stream=stream)
    assert len(workspaces._workspaces) == 1
    allocate, asked = workspaces.allocate, []

    def fail_first(num_bytes):
        asked.append(len(workspaces._workspaces))
        if len(asked) <= failures:
            raise cp.cuda.memory.OutOfMemoryError(num_bytes, 0)
        return allocate(num_bytes)

    monkeypatch.setattr(workspaces, "allocate", fail_first)
    if failures == 1:
        assert bits(prepared.run(*arrays, thresholds=TAU)) == want
    else:
        device = cp.cuda.Device().id  # not always 0: JAX leaves its last one current
        with pytest.raises(OutOfMemoryError, match=f"out of memory on cuda:{device}: wants [0-9,]+ bytes"):
            prepared.run(*arrays, thresholds=TAU)
        assert bits(prepared.run(*arrays, thresholds=TAU)) == want
    assert asked[:2] == [2, 1]  # the other stream's was given up before the second attempt


def test_streams_have_workspaces_of_their_own():
    salekit.clear_workspaces()
    arrays = [make(3000, seed=seed) for seed in range(4)]
    want = [by_stages(*x) for x in arrays]
    streams = [cp.cuda.Stream(non_blocking=True) for _ in arrays]
    cp.cuda.Device().synchronize()
    for _ in range(5):
        results = [
            salekit.sparse_attention(*x, stream=stream, return_lse=True, return_mask=True, **SPARSE)
            for x, stream in zip(arrays, streams)
        ]
        cp.cuda.Device().synchronize()
        assert [all_bits(x) for x in results] == want
    assert len(workspaces._workspaces) == 4


@pytest.mark.parametrize("same_stream", [True, False])
def test_threads(same_stream):
    arrays = [make(700 + 100 * seed, seed=seed) for seed in range(4)]
    want = [by_stages(*x) for x in arrays]
    shared = cp.cuda.Stream(non_blocking=True)
    streams = [shared if same_stream else cp.cuda.Stream(non_blocking=True) for _ in arrays]
    cp.cuda.Device().synchronize()
    problems = []

    def work(index):
        try:
            for turn in range(30):
                which = (index + turn) % 4
                result = salekit.sparse_attention(
                    *arrays[which], stream=streams[index], return_lse=True, return_mask=True, **SPARSE
                )
                if turn % 5 == 0:
                    streams[index].synchronize()
                    assert all_bits(result) == want[which]
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_new_thread_can_call():
    q, k, v = make()
    out = cp.empty_like(q)
    want = bits(salekit.sparse_attention(q, k, v, out=out, **SPARSE))
    out.data.memset_async(0, out.nbytes)
    cp.cuda.Device().synchronize()
    problems = []

    def work():
        try:
            salekit.sparse_attention(q, k, v, out=out, **SPARSE)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    cp.cuda.Device().synchronize()
    assert not problems and bits(out) == want


def test_plans_are_remembered_and_forgotten():
    attention_plan._plans.clear()
    q, k, v = make(64)
    for _ in range(3):
        salekit.sparse_attention(q, k, v, **SPARSE)
    assert len(attention_plan._plans) == 1
    salekit.sparse_attention(q, k, v, block=[128, 32], **SPARSE)
    salekit.sparse_attention(q, k, v, block=[128, 32], **SPARSE)
    assert len(attention_plan._plans) == 2
    for scale in range(1, attention_plan.MAX_PLANS + 10):
        salekit.sparse_attention(q, k, v, softmax_scale=scale, **SPARSE)
    assert len(attention_plan._plans) == attention_plan.MAX_PLANS


# --- CUDA graphs -------------------------------------------------------------------------------------------------
def capture(stream, function):
    with stream:
        stream.begin_capture()
        result = function()
        return stream.end_capture(), result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("thresholds", ["scalar", "host", "gpu"])
@pytest.mark.parametrize("is_out_given", [True, False])
def test_graph_replays_bitwise(estimator, thresholds, is_out_given):
    arrays, fresh = make(), [make(seed=seed) for seed in (1, 2)]
    value = {"scalar": TAU, "host": [TAU, 0.5, 0.1, np.inf], "gpu": cp.asarray(np.full(4, TAU, np.float32))}[thresholds]
    options = {"thresholds": value, "dense_below": 0, "estimator": estimator}
    want = [bits(salekit.sparse_attention(*x, **options)) for x in (arrays, *fresh)]
    out = cp.empty_like(arrays[0]) if is_out_given else None
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        salekit.sparse_attention(*arrays, out=out, **options)  # warm
        stream.synchronize()
    graph, result = capture(stream, lambda: salekit.sparse_attention(*arrays, out=out, **options))
    for replay in range(20):
        result.data.memset_async(0, result.nbytes, stream)
        graph.launch(stream)
        with stream:  # eager calls in between must not disturb it
            salekit.sparse_attention(*fresh[replay % 2], **options)
        stream.synchronize()
        assert bits(result) == want[0]
    for source, expected in zip(fresh, want[1:]):  # new data at the old addresses
        for target, x in zip(arrays, source):
            target.data.copy_from_device_async(x.data, x.nbytes, stream)
        graph.launch(stream)
        stream.synchronize()
        assert bits(result) == expected


def test_graph_of_many_calls_keeps_its_memory():
    layers = [make(900, seed=seed) for seed in range(3)]
    want = [by_stages(*x) for x in layers]
    dense = [bits(salekit.dense_attention(*x)) for x in layers]
    options = {"return_lse": True, "return_mask": True, **SPARSE}
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        for x in layers:
            salekit.sparse_attention(*x, **options)
            salekit.dense_attention(*x)
        stream.synchronize()
    graph, results = capture(
        stream, lambda: [(salekit.sparse_attention(*x, **options), salekit.dense_attention(*x)) for x in layers]
    )
    salekit.clear_workspaces()
    cp.get_default_memory_pool().free_all_blocks()
    grabbed = [cp.asarray(np.full(2**24, 0x7F, np.uint8)) for _ in range(8)]  # whatever was freed is someone else's now
    for _ in range(20):
        graph.launch(stream)
        stream.synchronize()
        assert [all_bits(sparse) for sparse, _ in results] == want
        assert [bits(x) for _, x in results] == dense
    assert all((x.get() == 0x7F).all() for x in grabbed)


def test_graph_with_a_workspace_of_the_caller():
    arrays = make()
    prepared = salekit.plan(*arrays, dense_below=0)
    want = by_stages(*arrays)[0]
    memory, out = cp.empty(prepared.workspace_bytes, np.uint8), cp.empty_like(arrays[0])
    prepared.run(*arrays, thresholds=TAU, out=out)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    graph, _ = capture(stream, lambda: prepared.run(*arrays, thresholds=TAU, out=out, workspace=memory))
    for _ in range(20):
        out.data.memset_async(0, out.nbytes, stream)
        memory.data.memset_async(0x7F, memory.nbytes, stream)
        graph.launch(stream)
        stream.synchronize()
        assert bits(out) == want


def test_capture_mode_global():
    """The strictest mode: an allocation or a synchronisation anywhere in the process would end the capture."""
    arrays = make()
    want = by_stages(*arrays)[0]
    out = cp.empty_like(arrays[0])
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        salekit.sparse_attention(*arrays, out=out, **SPARSE)
        stream.synchronize()
        stream.begin_capture(cp.cuda.runtime.streamCaptureModeGlobal)
        salekit.sparse_attention(*arrays, out=out, **SPARSE)
        graph = stream.end_capture()
        out.data.memset_async(0, out.nbytes, stream)
        graph.launch(stream)
        stream.synchronize()
    assert bits(out) == want


# --- errors ------------------------------------------------------------------------------------------------------
def test_errors_after_a_good_call():
    q, k, v = make(300)
    out = cp.empty_like(q)
    good = {"out": out, **SPARSE}
    salekit.sparse_attention(q, k, v, **good)
    flat = cp.asarray(np.zeros(q.size + 8, BF16))
    shifted = flat[1 : 1 + q.size].reshape(q.shape)
    for match, arrays, changes in (
        ("q: .*16-byte aligned", (shifted, k, v), {}),
        ("v: .*16-byte aligned", (q, k, flat[1 : 1 + v.size].reshape(v.shape)), {}),
        ("out: .*16-byte aligned", (q, k, v), {"out": shifted}),
        ("out: got shape", (q, k, v), {"out": out[:, :200]}),
        ("out: is on host memory", (q, k, v), {"out": out.get()}),
        ("out: shares memory with q", (q, k, v), {"out": q}),
        ("out: shares memory with q", (out[:, ::-1], k, v), {}),
        ("causal: got 1", (q, k, v), {"causal": 1}),
        ("query_stride: got 1.0", (q, k, v), {"query_stride": 1.0}),
        ("block: got", (q, k, v), {"block": (128.0, 32)}),
        ("softmax_scale: got True", (q, k, v), {"softmax_scale": True}),
        ("thresholds: got -1", (q, k, v), {"thresholds": -1.0}),
        ("thresholds: got nan", (q, k, v), {"thresholds": float("nan")}),
        ("thresholds: got shape", (q, k, v), {"thresholds": [0.1] * 3}),
        ("v: got seqlen 200", (q, k, v[:, :200]), {}),
        ("k: is on host memory", (q, k.get(), v), {}),
        ("layout: got", (q, k, v), {"layout": ["bshd"]}),
        ("attend: got", (q, k, v), {"attend": "int8"}),
    ):
        with pytest.raises(ArgumentError, match=match):
            salekit.sparse_attention(*arrays, **{**good, **changes})
    assert bits(salekit.sparse_attention(q, k, v, **good)) == by_stages(q, k, v)[0]


def test_a_plan_takes_what_it_was_made_for():
    q, k, v = make(300)
    prepared = salekit.plan(q, k, v, dense_below=0)
    for match, arrays in (
        ("q: got .*this plan is for", (q[:, :200], k, v)),
        ("k: got .*this plan is for", (q, cp.asarray(np.zeros((1, 300, 4, 128), BF16))[:, :, ::2], v)),
        ("v: got seqlen", (q, k, v[:, :200])),
        ("q: is on host memory; wants cuda:0", (q.get(), k.get(), v.get())),
    ):
        with pytest.raises(ArgumentError, match=match):
            prepared.run(*arrays)
    assert salekit.plan(q, k, v).workspace_bytes <= 1024  # dense by its length: at most a counter and sink logits
