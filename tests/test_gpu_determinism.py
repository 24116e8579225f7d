"""The same call gives the same bits: again, on any stream, beside other work, replayed, at any place in a batch."""

import threading

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

import salekit
from salekit.jit import device_arch

BF16 = np.dtype(ml_dtypes.bfloat16)
CALLS = {
    "int8": {"estimator": "int8"},
    "int8, stride 2": {"estimator": "int8", "query_stride": 2},
    "int8-sp24": {"estimator": "int8-sp24"},
    "int4": {"estimator": "int4"},
    "64-row blocks": {"estimator": "int8", "block": (64, 32)},
    "pools": {"estimator": "int8", "skipped": "pool"},
    "low-bit": {"estimator": "int8", "attend": "int8-fp8"},
    "scores": {"softcap": 20.0, "window_size": (700, 0), "sink_logits": np.array([0, 1, -1, 2], np.float32)},
    "not causal": {"estimator": "int8", "causal": False},
    "dense": {"dense_below": 1 << 30},
}


def make(batch=1, seqlen_q=1555, seqlen_k=2077, heads=4, kv_heads=2, head_dim=128, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    normal = (2 * rng.standard_normal((batch, *shape, head_dim)).astype(np.float32) for shape in shapes)
    return [cp.asarray(x.astype(BF16)) for x in normal]


def run(arrays, name, **more):
    if name == "low-bit" and device_arch() != "sm_90a":
        pytest.skip("int8-fp8 runs on Hopper")
    options = {"thresholds": 0.05, "dense_below": 0, "return_lse": True, "return_mask": True, **CALLS[name], **more}
    out, lse, mask = salekit.sparse_attention(*arrays, **options)
    return out, lse, mask.words


def bits(results):
    return [x.get().tobytes() for x in results]


class Busy:
    """Other work on the GPU while the block runs: salekit's calls of other shapes, on a stream of their own."""

    def __enter__(self):
        self.arrays, self.done = make(seqlen_q=4000, seqlen_k=4000, seed=9), threading.Event()
        salekit.sparse_attention(*self.arrays, dense_below=0)
        cp.cuda.Device().synchronize()
        self.calls = 0

        def work():
            stream = cp.cuda.Stream(non_blocking=True)
            with stream:
                while not self.done.is_set():
                    for _ in range(4):
                        salekit.sparse_attention(*self.arrays, dense_below=0)
                    stream.synchronize()
                    self.calls += 4

        self.thread = threading.Thread(target=work)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_runs(name):
    arrays = make()
    want = bits(run(arrays, name))
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(3)]
    cp.cuda.Device().synchronize()
    with Busy() as busy:
        for index in range(100):
            with streams[index % 3] as stream:
                got = run(arrays, name)
                stream.synchronize()
            assert bits(got) == want, index
    assert busy.calls > 0


@pytest.mark.parametrize("name", CALLS)
def test_replays_beside_other_work(name):
    arrays = make(seed=1)
    want = bits(run(arrays, name))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        run(arrays, name)
        stream.synchronize()
        stream.begin_capture()
        results = run(arrays, name)
        graph = stream.end_capture()
    with Busy():
        for _ in range(25):
            for x in results:
                x.data.memset_async(0, x.nbytes, stream)
            graph.launch(stream)
            stream.synchronize()
            assert bits(results) == want


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lengths", ((1555, 2077), (128, 4096), (1, 700)))
def test_a_result_does_not_depend_on_its_batch(name, lengths):
    """Batch invariance: an element alone, and first, last or in the middle among others."""
    q, k, v = make(5, *lengths, seed=2)
    alone = [bits(run([x[i : i + 1] for x in (q, k, v)], name)) for i in range(5)]
    for order in ([0, 1, 2, 3, 4], [3, 0], [4, 4, 1]):
        together = run([cp.asarray(x.get()[order]) for x in (q, k, v)], name)
        for place, i in enumerate(order):
            assert bits([x[place : place + 1] for x in together]) == alone[i], (order, place)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"scores"}))
def test_a_result_does_not_depend_on_other_heads(name):
    """A KV head and its query heads alone, and beside others."""
    q, k, v = make(heads=6, kv_heads=3, seed=3)
    out, lse, words = (x.get() for x in run([q, k, v], name))
    for head in range(3):
        rows = slice(2 * head, 2 * head + 2)
        part = run([q[:, :, rows], k[:, :, head : head + 1], v[:, :, head : head + 1]], name)
        assert bits(part) == [x.tobytes() for x in (out[:, :, rows], lse[:, rows], words[:, rows])]
