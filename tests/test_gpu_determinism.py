"""The same call gives the same bits: again, on any stream, beside other work, replayed, at any place in a batch."""

import threading

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

import salekit
from salekit.block_mask import BlockMask
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
TAU = 20.0  # of these arrays half of the blocks are skipped; at 0.05 none is
SERVING = ("packed", "paged", "chunk", "chunk of a given prompt")
LENGTHS = ((700, 900), (1, 2000), (0, 5), (333, 333))  # rows and keys of sequences
PAGE_SIZE = 64


def make(batch=1, seqlen_q=1555, seqlen_k=2077, heads=4, kv_heads=2, head_dim=128, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    normal = (2 * rng.standard_normal((batch, *shape, head_dim)).astype(np.float32) for shape in shapes)
    return [cp.asarray(x.astype(BF16)) for x in normal]


def run(arrays, name, **more):
    if name == "low-bit" and device_arch() != "sm_90a":
        pytest.skip("int8-fp8 runs on Hopper")
    options = {"thresholds": TAU, "dense_below": 0, "return_lse": True, "return_mask": True, **CALLS[name], **more}
    out, lse, mask = salekit.sparse_attention(*arrays, **options)
    return out, lse, mask.words


def call_of(name, seed=0):
    """A call without arguments, of CALLS or SERVING, which returns its results."""
    if name in CALLS:
        arrays = make(seed=seed)
        return lambda: run(arrays, name)
    options = {"thresholds": TAU, "dense_below": 0, "estimator": "int8", "return_lse": True}
    if name.startswith("chunk"):
        return chunk_of(name, seed, options)
    rows, keys = (np.array(lengths, np.int32) for lengths in zip(*LENGTHS))
    pages = -(-keys // PAGE_SIZE)
    num_keys = int(pages.sum()) * PAGE_SIZE if name == "paged" else int(keys.sum())
    q, k, v = (x[0] for x in make(seqlen_q=int(rows.sum()), seqlen_k=num_keys, seed=seed))
    sums_q, sums_k = (cp.asarray(np.concatenate(([0], np.cumsum(x))).astype(np.int32)) for x in (rows, keys))
    if name == "paged":
        k, v = (x.reshape(-1, PAGE_SIZE, *x.shape[1:]) for x in (k, v))
        order = np.random.default_rng(seed).permutation(len(k)).astype(np.int32)
        table = np.full((len(keys), pages.max()), -1, np.int32)
        for of_sequence, end, count in zip(table, np.cumsum(pages), pages):
            of_sequence[:count] = order[end - count : end]
        options.update(block_table=cp.asarray(table), seqlens_k=cp.asarray(keys))
        sums_k = None
    longest = int(rows.max()), int(keys.max())
    return lambda: salekit.sparse_attention_varlen(q, k, v, sums_q, sums_k, *longest, **options)


def chunk_of(name, seed, options):
    """A few rows of a prompt and all keys until then; with statistics of the whole prompt, if that is given."""
    q, k, v = make(seqlen_q=200, seqlen_k=4096, seed=seed)
    if name != "chunk":
        options["k_statistics"] = salekit.key_statistics(k)
    k, v = k[:, :3000], v[:, :3000]

    def call():
        out, lse, mask = salekit.sparse_attention(q, k, v, full_rows=0, return_mask=True, **options)
        return out, lse, mask.words

    return call


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


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"dense"}) + ["chunk", "chunk of a given prompt"])
def test_the_calls_skip_blocks(name):
    """Or there would be little to be unsteady about."""
    words = call_of(name)()[2].get()
    lengths = (200, 3000) if name.startswith("chunk") else (1555, 2077)
    options = CALLS.get(name, {})
    causal, (left, right) = options.get("causal", True), options.get("window_size", (-1, -1))
    mask = BlockMask(words, *options.get("block", (128, 32)), *lengths, causal, left, right)
    assert 0.2 < mask.density().min() and mask.density().max() < 0.8


@pytest.mark.parametrize("name", (*CALLS, *SERVING))
def test_a_hundred_runs(name):
    call = call_of(name)
    want = bits(call())
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(3)]
    cp.cuda.Device().synchronize()
    with Busy() as busy:
        for index in range(100):
            with streams[index % 3] as stream:
                got = call()
                stream.synchronize()
            assert bits(got) == want, index
    assert busy.calls > 0


@pytest.mark.parametrize("name", (*CALLS, *SERVING))
def test_replays_beside_other_work(name):
    call = call_of(name, seed=1)
    want = bits(call())
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture()
        results = call()
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
