"""salekit.jax on a GPU: the bits of the direct call, on XLA's stream, whatever XLA does with its buffers."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit import workspaces
from salekit.attention_plan import AttentionPlan

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or other tests find no memory
jax = pytest.importorskip("jax")
pytest.importorskip("jax.ffi", reason="needs JAX 0.5 or newer")
import jax.numpy as jnp  # noqa: E402

import salekit.jax as salekit_jax  # noqa: E402
from salekit import xla_attention, xla_ffi  # noqa: E402

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
EVERYTHING = {"dense_below": 0, "return_lse": True, "return_mask": True}
TAUS = np.array([0.05, 0.2, 0.5, 1.0], np.float32)
HANDLER_MICROSECONDS = 50


@pytest.fixture(autouse=True, scope="module")
def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {error}")


def make(seqlen_q=1100, seqlen_k=None, heads=4, kv_heads=2, head_dim=128, batch=1, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((seqlen_q, heads), (seqlen_k or seqlen_q, kv_heads), (seqlen_k or seqlen_q, kv_heads))
    return [rng.standard_normal((batch, s, h, head_dim), np.float32).astype(dtype) for s, h in sizes]


def bits(result):
    """The bytes of each array, wherever it is."""
    leaves = [getattr(x, "words", x) for x in (result if isinstance(result, tuple) else (result,))]
    return [(x.get() if isinstance(x, cp.ndarray) else np.asarray(x)).tobytes() for x in leaves]


def direct(arrays, **options):
    return bits(salekit.sparse_attention(*map(cp.asarray, arrays), **options))


def poison_workspaces():
    for workspace in workspaces._workspaces.values():
        if workspace._memory is not None:
            workspace._memory.data.memset_async(0x7F, workspace._memory.nbytes)
    cp.cuda.Device().synchronize()


# --- the same bits as the direct call ------------------------------------------------------------------------------
@pytest.mark.parametrize("options, shape", [
    ({}, {}),
    ({"estimator": "int4", "block": (64, 32)}, {"head_dim": 64, "dtype": FP16}),
    ({"estimator": "int8-sp24", "query_stride": 2, "full_rows": 256}, {"batch": 2}),
    ({"layout": "bhsd", "causal": False, "softmax_scale": 0.1}, {"seqlen_q": 300, "seqlen_k": 1301}),
    ({"dense_below": 4096}, {"seqlen_q": 77, "seqlen_k": 1025}),
])
@pytest.mark.parametrize("thresholds", [0.2, TAUS, 0.0])
def test_under_jit(options, shape, thresholds):
    options = {**EVERYTHING, **options}
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, thresholds=thresholds, **options))
    for seed in range(3):  # other values, at other addresses
        arrays = make(seed=seed, **shape)
        if options.get("layout") == "bhsd":
            arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
        want = direct(arrays, thresholds=thresholds, **options)
        poison_workspaces()
        assert bits(call(*arrays)) == want


def test_low_bit_attention():
    from salekit.jit import device_arch

    arrays = make()
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, dense_below=0, attend="int8-fp8"))
    if device_arch() != "sm_90a":
        with pytest.raises(Exception, match="INVALID_ARGUMENT.*attend: 'int8-fp8' is built for sm_90a alone"):
            jax.block_until_ready(call(*arrays))
    else:
        assert bits(call(*arrays)) == direct(arrays, dense_below=0, attend="int8-fp8")


def test_thresholds_that_are_traced():
    arrays = make()
    call = jax.jit(lambda taus: salekit_jax.sparse_attention(*arrays, thresholds=taus, **EVERYTHING))
    for taus in (TAUS, 2 * TAUS, np.array([0.1, np.nan, -1, np.inf], np.float32)):
        assert bits(call(taus)) == direct(arrays, thresholds=cp.asarray(taus), **EVERYTHING)


# --- softcap, windows and sink logits ------------------------------------------------------------------------------
SINK_LOGITS = np.array([1.5, -np.inf, 4, -0.5], np.float32)
FEATURES = {
    "softcap": {"softcap": 4.0},
    "window": {"window_size": (300, 20)},
    "sinks": {"sink_logits": SINK_LOGITS},
    "all": {"softcap": 4.0, "window_size": 400, "sink_logits": SINK_LOGITS},
}


@pytest.mark.parametrize("thresholds", [0.2, TAUS, 0.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("name", FEATURES)
def test_score_features(name, head_dim, causal, thresholds):
    options = {**FEATURES[name], **EVERYTHING, "causal": causal, "thresholds": thresholds}
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, **options))
    for seed in range(2):
        arrays = make(700, 1100, head_dim=head_dim, batch=2, seed=seed)
        want = direct(arrays, **options)
        poison_workspaces()
        got = call(*arrays)
        assert bits(got) == want
    mask = salekit.sparse_attention(*map(cp.asarray, arrays), **options)[2]
    assert (got[2].density() == mask.density()).all()
    dense = {key: x for key, x in options.items() if key in ("causal", "softcap", "window_size", "sink_logits")}
    assert bits(salekit_jax.dense_attention(*arrays, **dense)) == bits(
        salekit.dense_attention(*map(cp.asarray, arrays), **dense)
    )


def test_sinks_that_are_traced():
    arrays = make()
    options = {"softcap": 4.0, "window_size": (300, 0), "thresholds": TAUS, **EVERYTHING}
    call = jax.jit(lambda sinks: salekit_jax.sparse_attention(*arrays, sink_logits=sinks, **options))
    for sinks in (SINK_LOGITS, SINK_LOGITS + 1):
        assert bits(call(sinks)) == direct(arrays, sink_logits=cp.asarray(sinks), **options)
    out, lse, _ = call(np.array([np.nan, 1.5, np.inf, -0.5], np.float32))
    want = salekit.sparse_attention(*map(cp.asarray, arrays), sink_logits=[0, 1.5, 0, -0.5], **options)
    assert np.isnan(np.asarray(out, np.float32)[:, :, ::2]).all() and np.isnan(np.asarray(lse)[:, ::2]).all()
    assert (np.asarray(out)[:, :, 1::2] == want[0].get()[:, :, 1::2]).all()


def test_vmap_over_sinks():
    many = [np.stack(xs) for xs in zip(*(make(300, seed=seed) for seed in range(2)))]
    sinks = np.stack([SINK_LOGITS, SINK_LOGITS - 1])
    options = {"softcap": 4.0, "window_size": (100, 0), "thresholds": TAUS, **EVERYTHING}

    def call(q, k, v, sinks):
        return salekit_jax.sparse_attention(q, k, v, sink_logits=sinks, **options)

    for in_axes, given in (((0, 0, 0, 0), sinks), ((0, 0, 0, None), SINK_LOGITS)):
        got = jax.jit(jax.vmap(call, in_axes=in_axes))(*many, given)
        for i in range(2):
            of_one = given[i] if in_axes[3] == 0 else given
            want = direct([x[i] for x in many], sink_logits=of_one, **options)
            assert bits(jax.tree.map(lambda x, i=i: x[i], got)) == want


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_sinks_of_rows_without_keys(lengths):
    q, k, v = (x[:, :n] for x, n in zip(make(5), (lengths[0], lengths[1], lengths[1])))
    got = jax.jit(lambda q, k, v, s: salekit_jax.sparse_attention(q, k, v, sink_logits=s, return_lse=True))(
        q, k, v, SINK_LOGITS
    )
    assert bits(got) == bits(salekit.sparse_attention(q, k, v, sink_logits=SINK_LOGITS, return_lse=True))


def test_against_dot_product_attention():
    q, k, v = make(700, batch=2)
    want = jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), is_causal=True)
    # p and out are rounded to bfloat16; JAX's float32 products may be of tf32, 2**-11 of a score of some units.
    magnitude = np.abs(v.astype(np.float32)).max()
    got = salekit_jax.dense_attention(q, k, v)
    assert (np.abs(np.asarray(got, np.float32) - np.asarray(want)) <= 2.0**-6 * magnitude).all()


def test_vmap_and_loops():
    many = [np.stack(xs) for xs in zip(*(make(300, batch=2, seed=seed) for seed in range(3)))]
    got = jax.jit(jax.vmap(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, thresholds=TAUS, **EVERYTHING)))(*many)
    for i in range(3):
        want = direct([x[i] for x in many], thresholds=TAUS, **EVERYTHING)
        assert bits(jax.tree.map(lambda x: x[i], got)) == want
    q, k, v = make(600)
    steps = jax.jit(lambda q: jax.lax.scan(
        lambda q, _: (salekit_jax.sparse_attention(q, k, v, thresholds=TAUS, dense_below=0), None), q, length=4)[0])
    on_gpu = [cp.asarray(x) for x in (q, k, v)]
    want = on_gpu[0]
    for _ in range(4):
        want = salekit.sparse_attention(want, *on_gpu[1:], thresholds=TAUS, dense_below=0)
    for _ in range(3):
        assert bits(steps(q)) == bits(want)


# --- XLA's stream --------------------------------------------------------------------------------------------------
def test_between_other_operations():
    """What comes before is done when salekit reads, and what comes after waits for it; XLA may use command buffers for
    its own operations, and runs them again and again with other buffers."""
    q, k, v = make(2048, heads=8, kv_heads=2)

    @jax.jit
    def layers(x, k, v, weights):
        seen = []
        for _ in range(4):
            for _ in range(3):  # keeps the stream busy before each call
                weights = jnp.tanh(weights @ weights * 0.01)
            x = x * 2 + 1 + (weights[0, 0] * 0).astype(x.dtype)
            out = salekit_jax.sparse_attention(x, k, v, thresholds=0.2, dense_below=0)
            seen.append((x, out))
            x = out + x
        return seen, x

    rng = np.random.default_rng(0)
    for seed in range(4):
        weights = jnp.asarray(rng.standard_normal((4096, 4096), np.float32))
        seen, last = layers(jnp.asarray(make(2048, heads=8, seed=seed)[0]), k, v, weights)
        for x, out in seen:
            assert bits(out) == direct([np.asarray(x), k, v], thresholds=0.2, dense_below=0)
        want = np.asarray(seen[-1][1], np.float32) + np.asarray(seen[-1][0], np.float32)
        assert np.allclose(np.asarray(last, np.float32), want, rtol=2**-7, atol=1e-6)


def test_donated_buffers():
    arrays = make(900)
    options = {"dense_below": 0, "thresholds": TAUS}
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, **options), donate_argnums=0)
    want = direct(arrays, **options)
    for _ in range(3):
        assert bits(call(jnp.asarray(arrays[0]), *arrays[1:])) == want


def test_nothing_is_allocated_after_the_first_call():
    arrays = [jnp.asarray(x) for x in make(4096)]
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, **EVERYTHING))
    jax.block_until_ready(call(*arrays))
    gc.collect()
    pool = cp.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    held = [call(*arrays) for _ in range(10)]
    jax.block_until_ready(held)
    assert (pool.used_bytes(), pool.total_bytes()) == before


def test_threads():
    arrays = [make(1000, seed=seed) for seed in range(4)]
    want = [direct(each, dense_below=0, thresholds=TAUS) for each in arrays]
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, dense_below=0, thresholds=TAUS))
    wrong = []

    def work(index):
        for _ in range(20):
            if bits(call(*arrays[index])) != want[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_on_the_gpu():
    q = jnp.zeros((70000, 1, 1, 64), jnp.float16)  # more than a grid takes, which only GPUs mind
    with pytest.raises(Exception, match="INVALID_ARGUMENT.*ArgumentError: q: got batch 70000"):
        jax.block_until_ready(jax.jit(salekit_jax.dense_attention)(q, q, q))
    arrays = make(70)  # and the next call is as if nothing had been
    want = bits(salekit.dense_attention(*map(cp.asarray, arrays)))
    assert bits(jax.jit(salekit_jax.dense_attention)(*arrays)) == want


# --- many GPUs -----------------------------------------------------------------------------------------------------
def test_heads_sharded_over_gpus(gpus):
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    try:
        from jax import shard_map
    except ImportError:
        pytest.skip("needs jax.shard_map, of JAX 0.6 or newer")
    mesh, heads = Mesh(np.array(gpus[:2]), ("heads",)), PartitionSpec(None, None, "heads")
    arrays = make(1500, heads=8, kv_heads=2, batch=2)
    taus = np.linspace(0.05, 1, 8).astype(np.float32)
    by_head = PartitionSpec("heads")
    rows = PartitionSpec(None, "heads")
    call = jax.jit(shard_map(
        lambda q, k, v, taus: salekit_jax.sparse_attention(q, k, v, thresholds=taus, **EVERYTHING),
        mesh=mesh, in_specs=(heads, heads, heads, by_head), out_specs=(heads, rows, rows),
    ))
    placed = [jax.device_put(x, NamedSharding(mesh, heads)) for x in arrays]
    taus_placed = jax.device_put(taus, NamedSharding(mesh, by_head))
    want = direct(arrays, thresholds=taus, **EVERYTHING)
    for _ in range(5):
        assert bits(call(*placed, taus_placed)) == want

    # Sink logits go with their heads.
    sinks, more = np.linspace(-2, 5, 8).astype(np.float32), {"softcap": 4.0, "window_size": (400, 0), **EVERYTHING}
    call = jax.jit(shard_map(
        lambda q, k, v, taus, sinks: salekit_jax.sparse_attention(q, k, v, thresholds=taus, sink_logits=sinks, **more),
        mesh=mesh, in_specs=(heads, heads, heads, by_head, by_head), out_specs=(heads, rows, rows),
    ))
    sinks_placed = jax.device_put(sinks, NamedSharding(mesh, by_head))
    want = direct(arrays, thresholds=taus, sink_logits=sinks, **more)
    for _ in range(5):
        assert bits(call(*placed, taus_placed, sinks_placed)) == want


# --- cost ----------------------------------------------------------------------------------------------------------
@pytest.mark.alone
def test_the_handler_is_quick(monkeypatch):
    """What it takes on the host, from the frame to the last launch, less the planned call inside it."""
    arrays = [jnp.asarray(x) for x in make(2048, heads=4, kv_heads=2)]
    call = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, dense_below=0))
    for _ in range(20):
        jax.block_until_ready(call(*arrays))
    started, samples = threading.local(), []
    read, run, execute = xla_ffi.read_call, xla_attention.run_on_gpu, AttentionPlan._execute

    def read_call(frame):
        started.time = time.perf_counter()
        return read(frame)

    def timed_call(*args):
        before = time.perf_counter()
        result = execute(*args)
        started.time += time.perf_counter() - before
        return result

    def timed(each):
        run(each)
        samples.append((time.perf_counter() - started.time) * 1e6)

    monkeypatch.setattr(AttentionPlan, "_execute", timed_call)
    monkeypatch.setattr(xla_ffi, "read_call", read_call)
    monkeypatch.setattr(xla_attention, "run_on_gpu", timed)
    for _ in range(100):
        jax.block_until_ready(call(*arrays))
    assert len(samples) == 100 and statistics.median(samples) <= HANDLER_MICROSECONDS, statistics.median(samples)


@pytest.mark.alone
def test_the_host_does_not_wait():
    arrays = [jnp.asarray(x) for x in make(16384, heads=8, kv_heads=2)]
    call = jax.jit(lambda q, k, v: salekit_jax.dense_attention(q, k, v))
    for _ in range(3):  # ten results at a time: XLA asks the GPU for their memory, and waits for it, once
        jax.block_until_ready([call(*arrays) for _ in range(10)])
    started = time.perf_counter()
    results = [call(*arrays) for _ in range(10)]
    queued = time.perf_counter() - started
    jax.block_until_ready(results)
    assert queued <= 0.5 * (time.perf_counter() - started)
