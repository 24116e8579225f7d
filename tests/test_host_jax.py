"""salekit.jax on a CPU, where the twin runs on XLA's buffers: the same bits as ``salekit.sparse_attention``."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit.errors import ArgumentError, DtypeError
from salekit.options import DENSE_OPTIONS, OPTIONS

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or other tests find no memory on a GPU
jax = pytest.importorskip("jax")
pytest.importorskip("jax.ffi", reason="needs JAX 0.5 or newer")
import jax.numpy as jnp  # noqa: E402

import salekit.jax as salekit_jax  # noqa: E402

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
EVERYTHING = {"dense_below": 0, "return_lse": True, "return_mask": True}
TAUS = np.array([0.1, 0.5, 2, np.inf], np.float32)
SINK_LOGITS = np.array([1.5, -np.inf, 4, -0.5], np.float32)
FEATURES = {
    "softcap": dict(softcap=4.0),
    "window": dict(window_size=(70, 20)),
    "sinks": dict(sink_logits=SINK_LOGITS),
    "all": dict(softcap=4.0, window_size=np.int64(90), sink_logits=SINK_LOGITS),
}


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def make(seqlen_q=301, seqlen_k=None, heads=4, kv_heads=2, head_dim=64, batch=1, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    sizes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    return [(2 * rng.standard_normal((batch, s, h, head_dim), np.float32)).astype(dtype) for s, h in sizes]


def bits(result):
    leaves = result if isinstance(result, tuple) else (result,)
    return [np.asarray(getattr(x, "words", x)).tobytes() for x in leaves]


# --- the same bits as the twin -------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, lengths, dtype", [
    ({}, (301, 301), BF16),
    ({"layout": "bhsd"}, (130, 257), FP16),
    ({"causal": False, "block": (64, 64), "estimator": "int4"}, (257, 130), BF16),
    ({"estimator": "int8-sp24", "query_stride": 2, "full_rows": np.int64(64), "attend": "int8-fp8"}, (301, 301), BF16),
    ({"softmax_scale": np.float32(0.2), "sink": 0, "local": 0}, (1, 300), FP16),
])
@pytest.mark.parametrize("thresholds", [1.5, TAUS])
def test_under_jit(options, lengths, dtype, thresholds):
    arrays = make(*lengths, batch=2, dtype=dtype)
    if options.get("layout") == "bhsd":
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    want = salekit.sparse_attention(*arrays, thresholds=thresholds, **options, **EVERYTHING)
    got = jax.jit(
        lambda q, k, v: salekit_jax.sparse_attention(q, k, v, thresholds=thresholds, **options, **EVERYTHING)
    )(*arrays)
    assert bits(got) == bits(want)
    assert got[0].dtype == dtype and isinstance(got[2], salekit.BlockMask)
    assert (got[2].density() == want[2].density()).all() and (got[2].to_dense() == want[2].to_dense()).all()
    assert want[2].density().min() < 1 or lengths[0] == 1


@pytest.mark.parametrize("options", [
    {"softmax_scale": Fraction(1, 8), "softcap": Fraction(7, 2)},
    {"query_stride": jnp.array(2), "window_size": (jnp.array(200), jnp.array(3, jnp.int8)), "local": jnp.array(0)},
    {"window_size": jnp.array([90, 3]), "full_rows": np.array(5), "block": jnp.array([64, 32])},
    {"causal": np.False_, "window_size": [10**30, 10], "dense_below": np.array(0)},
])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_options_that_json_does_not_know(options, layout):
    """Whatever salekit takes as a number, and arrays of JAX that say which."""
    arrays = make(200, 330, batch=2)
    if layout == "bhsd":
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    options = dict(thresholds=TAUS, layout=layout, **EVERYTHING) | options
    want = salekit.sparse_attention(*arrays, **options)
    assert bits(salekit_jax.sparse_attention(*arrays, **options)) == bits(want)
    got = jax.vmap(lambda *x: salekit_jax.sparse_attention(*(y[None] for y in x), **options))(*map(jnp.asarray, arrays))
    assert bits(got) == bits(want)


def test_thresholds_beyond_float32():
    arrays = make(90)
    options = dict(EVERYTHING, local=0)
    for tau, same in ((1e300, np.inf), ([0.1, 1e300, 2, 1e39], [0.1, np.inf, 2, np.inf])):
        want = salekit.sparse_attention(*arrays, thresholds=same, **options)
        assert bits(salekit_jax.sparse_attention(*arrays, thresholds=tau, **options)) == bits(want)


def test_what_is_returned():
    arrays = make()
    out, lse, mask = salekit_jax.sparse_attention(*arrays, thresholds=0.05, **EVERYTHING)
    assert bits(salekit_jax.sparse_attention(*arrays, thresholds=0.05, dense_below=0)) == bits(out)
    for name, want in (("return_lse", lse), ("return_mask", mask)):
        pair = salekit_jax.sparse_attention(*arrays, thresholds=0.05, dense_below=0, **{name: True})
        assert len(pair) == 2 and bits(pair) == bits((out, want))


def test_dense():
    arrays = make(70, 90)
    for options in ({}, {"causal": False, "softmax_scale": 0.3, "return_lse": True}):
        want = salekit.dense_attention(*arrays, **options)
        assert bits(salekit_jax.dense_attention(*arrays, **options)) == bits(want)


# --- softcap, windows and sink logits ------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("thresholds", [0.3, TAUS, 0.0])
@pytest.mark.parametrize("name", FEATURES)
def test_score_features(name, thresholds, causal):
    options = dict(FEATURES[name], thresholds=thresholds, causal=causal, block=(64, 32), local=32, **EVERYTHING)
    arrays = make(200, 330, batch=2)
    want = salekit.sparse_attention(*arrays, **options)
    got = jax.jit(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, **options))(*arrays)
    assert bits(got) == bits(want)
    # A mask knows its window: what is visible, and with it the density.
    assert (got[2].density() == want[2].density()).all() and (got[2].visible() == want[2].visible()).all()
    assert bits(jax.tree.map(lambda x: x, got[2])) == bits(want[2])
    dense = {name: x for name, x in options.items() if name in ("causal", "softcap", "window_size", "sink_logits")}
    assert bits(salekit_jax.dense_attention(*arrays, **dense)) == bits(salekit.dense_attention(*arrays, **dense))


def test_sinks_that_are_traced():
    arrays = make(90)
    options = dict(softcap=4.0, window_size=(50, 0), thresholds=TAUS, **EVERYTHING)
    traces = []

    @jax.jit
    def call(sinks):
        traces.append(sinks.shape)
        return salekit_jax.sparse_attention(*arrays, sink_logits=sinks, **options)

    for sinks in (SINK_LOGITS, SINK_LOGITS + 1):
        assert bits(call(sinks)) == bits(salekit.sparse_attention(*arrays, sink_logits=sinks, **options))
    assert len(traces) == 1
    for dtype in (jnp.bfloat16, jnp.int32):
        sinks = jnp.array([1, 2, 3, 4], dtype)
        want = salekit.sparse_attention(*arrays, sink_logits=[1, 2, 3, 4], **options)
        assert bits(salekit_jax.sparse_attention(*arrays, sink_logits=sinks, **options)) == bits(want)
    out, lse, _ = call(jnp.array([jnp.nan, 1.5, jnp.inf, -0.5]))
    want = salekit.sparse_attention(*arrays, sink_logits=[0, 1.5, 0, -0.5], **options)
    for head in (0, 2):  # nobody looks at what is in an array of JAX
        assert np.isnan(np.asarray(out, np.float32)[:, :, head]).all() and np.isnan(np.asarray(lse)[:, head]).all()
    assert (np.asarray(out)[:, :, 1::2] == want[0][:, :, 1::2]).all() and (lse[:, 1::2] == want[1][:, 1::2]).all()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (70, 9)])
def test_sinks_of_rows_without_keys(lengths):
    for arrays in (make(*lengths), make(5, 5, batch=0)):
        for options in ({}, {"window_size": 3}):
            got = salekit_jax.sparse_attention(*arrays, sink_logits=SINK_LOGITS, **options, **EVERYTHING)
            want = salekit.sparse_attention(*arrays, sink_logits=SINK_LOGITS, **options, **EVERYTHING)
            assert bits(got) == bits(want)
            assert [x.dtype for x in jax.tree.leaves(got)] == [BF16, np.float32, np.uint32]


def test_vmap_over_sinks():
    many = [np.stack(xs) for xs in zip(*(make(90, seed=seed) for seed in range(2)))]
    sinks = np.stack([SINK_LOGITS, SINK_LOGITS - 1])
    options = dict(softcap=4.0, window_size=(50, 0), thresholds=TAUS, **EVERYTHING)

    def call(q, k, v, sinks):
        return salekit_jax.sparse_attention(q, k, v, sink_logits=sinks, **options)

    shared = jax.jit(jax.vmap(call, in_axes=(0, 0, 0, None)))
    assert shared.lower(*many, SINK_LOGITS).as_text().count("@salekit_attention(") == 1  # it joined the batch
    for got, mapped in ((shared(*many, SINK_LOGITS), False), (jax.vmap(call)(*many, sinks), True)):
        for i in range(2):
            of_one = dict(options, sink_logits=sinks[i] if mapped else SINK_LOGITS)
            want = salekit.sparse_attention(*(x[i] for x in many), **of_one)
            assert bits(jax.tree.map(lambda x, i=i: x[i], got)) == bits(want)
    got = jax.vmap(lambda s: call(*(x[0] for x in many), s))(sinks)  # sink logits alone
    for i in range(2):
        want = salekit.sparse_attention(*(x[0] for x in many), sink_logits=sinks[i], **options)
        assert bits(jax.tree.map(lambda x, i=i: x[i], got)) == bits(want)


def test_thresholds_that_are_traced():
    arrays = make()
    call = jax.jit(lambda taus: salekit_jax.sparse_attention(*arrays, thresholds=taus, **EVERYTHING))
    assert bits(call(TAUS)) == bits(salekit.sparse_attention(*arrays, thresholds=TAUS, **EVERYTHING))
    assert bits(call(jnp.float32(0.05))) == bits(salekit.sparse_attention(*arrays, thresholds=0.05, **EVERYTHING))
    odd = jnp.array([0.1, jnp.nan, -1, 0.3])
    want = salekit.sparse_attention(*arrays, thresholds=[0.1, 0, 0, 0.3], **EVERYTHING)
    assert bits(call(odd)) == bits(want)


@pytest.mark.parametrize("given", [[1, 2, 3, 4], 2])
def test_integer_thresholds(given):
    """As NumPy's and lists: converted."""
    want = bits(salekit.sparse_attention(Q, K, V, thresholds=np.array(given), dense_below=0, return_mask=True))
    for thresholds in (jnp.array(given), jnp.array(given, jnp.uint8), np.array(given), given):
        got = salekit_jax.sparse_attention(Q, K, V, thresholds=thresholds, dense_below=0, return_mask=True)
        assert bits(got) == want
    assert bits(salekit.sparse_attention(Q, K, V, thresholds=jnp.array(given), dense_below=0, return_mask=True)) == want


def test_one_program_for_calls_that_are_alike():
    traces = []

    @jax.jit
    def call(q, k, v):
        traces.append(q.shape)
        return salekit_jax.sparse_attention(q, k, v, dense_below=0)

    for seed in range(3):
        arrays = make(90, seed=seed)
        assert bits(call(*arrays)) == bits(salekit.sparse_attention(*arrays, dense_below=0))
    assert len(traces) == 1


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_without_rows_or_keys(lengths):
    for arrays in (make(*lengths), make(5, 5, batch=0)):
        got = salekit_jax.sparse_attention(*arrays, **EVERYTHING)
        assert bits(got) == bits(salekit.sparse_attention(*arrays, **EVERYTHING))
        assert [x.shape for x in jax.tree.leaves(got)][0] == arrays[0].shape


def test_nan_comes_out_as_in_dense_attention():
    q, k, v = make(100)
    q[0, 40, 1, 3] = np.nan
    got = salekit_jax.sparse_attention(q, k, v, thresholds=1.0, dense_below=0)
    assert bits(got) == bits(salekit.sparse_attention(q, k, v, thresholds=1.0, dense_below=0))
    assert np.isnan(np.asarray(got, np.float32)[0, 40, 1]).all()


# --- against JAX's own attention -----------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, epsilon", [(FP16, 2.0**-11), (BF16, 2.0**-8)])
def test_against_dot_product_attention(causal, dtype, epsilon):
    q, k, v = make(200, batch=2, dtype=dtype)
    want = jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), is_causal=causal)
    # Rounding of p and of out to their 16 bits, a half unit in the last place each: relative to sum p |v| and to out.
    magnitude = jax.nn.dot_product_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k)), jnp.abs(jnp.asarray(v, jnp.float32)), is_causal=causal
    )
    bound = epsilon * np.asarray(magnitude) + 1e-5
    for got in (
        salekit_jax.dense_attention(q, k, v, causal=causal),
        salekit_jax.sparse_attention(q, k, v, thresholds=0.0, dense_below=0, causal=causal),
        salekit_jax.sparse_attention(q, k, v, thresholds=jnp.zeros(4), dense_below=0, causal=causal),
    ):
        assert (np.abs(np.asarray(got, np.float32) - np.asarray(want)) <= bound).all()


def test_sparse_is_close_to_dot_product_attention():
    """On real heads, where there is something to skip: what is skipped is what the mask says, and it is little."""
    sample = salekit.load_sample()
    q, k, v = (np.ascontiguousarray(sample[name][:, :1024]) for name in "qkv")
    want = np.asarray(jax.nn.dot_product_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), is_causal=True))
    errors, densities = [], []
    for tau in (0.0005, 0.008, 0.1):
        out, mask = salekit_jax.sparse_attention(q, k, v, thresholds=tau, dense_below=0, return_mask=True)
        errors.append(np.linalg.norm(np.asarray(out, np.float32) - want) / np.linalg.norm(want))
        densities.append(mask.density().mean())
    assert errors[0] <= 0.01 and errors[0] < errors[1] < errors[2] <= 0.3, errors
    assert 1 >= densities[0] > densities[1] > densities[2], densities


# --- vmap ----------------------------------------------------------------------------------------------------------
def test_vmap():
    many = [np.stack(xs) for xs in zip(*(make(90, batch=2, seed=seed) for seed in range(3)))]
    want = [salekit.sparse_attention(*(x[i] for x in many), thresholds=TAUS, **EVERYTHING) for i in range(3)]

    def call(q, k, v, taus=TAUS):
        return salekit_jax.sparse_attention(q, k, v, thresholds=taus, **EVERYTHING)

    mapped = jax.jit(jax.vmap(call))
    got = mapped(*many)
    assert [bits(jax.tree.map(lambda x: x[i], got)) for i in range(3)] == [bits(x) for x in want]
    program = mapped.lower(*many).as_text()
    assert program.count("@salekit_attention(") == 1  # the mapped axis joined the batch
    got = jax.vmap(call, in_axes=(3, None, None), out_axes=1)(np.moveaxis(many[0], 0, 3), many[1][0], many[2][0])
    for i in range(3):
        one = salekit.sparse_attention(many[0][i], many[1][0], many[2][0], thresholds=TAUS, **EVERYTHING)
        assert bits(jax.tree.map(lambda x: x[:, i], got)) == bits(one)


def test_vmap_in_vmap():
    q, k, v = (np.stack([np.stack([x, 2 * x]), np.stack([3 * x, x / 2])]) for x in make(70))
    got = jax.vmap(jax.vmap(lambda q, k, v: salekit_jax.sparse_attention(q, k, v, dense_below=0)))(q, k, v)
    for i, j in np.ndindex(2, 2):
        assert bits(got[i, j]) == bits(salekit.sparse_attention(q[i, j], k[i, j], v[i, j], dense_below=0))


def test_vmap_over_thresholds():
    arrays = make(90)
    many = np.stack([TAUS, TAUS / 2])
    got = jax.vmap(lambda taus: salekit_jax.sparse_attention(*arrays, thresholds=taus, **EVERYTHING))(many)
    for i in range(2):
        want = salekit.sparse_attention(*arrays, thresholds=many[i], **EVERYTHING)
        assert bits(jax.tree.map(lambda x: x[i], got)) == bits(want)


def test_inside_control_flow():
    q, k, v = make(70)
    got = jax.jit(lambda q: jax.lax.fori_loop(0, 2, lambda _, q: salekit_jax.sparse_attention(q, k, v), q))(q)
    assert bits(got) == bits(salekit.sparse_attention(salekit.sparse_attention(q, k, v), k, v))


# --- many devices --------------------------------------------------------------------------------------------------
LEAVING = """
import os, time, jax, jax.numpy as jnp, numpy as np, salekit.jax
from jax.sharding import PartitionSpec as P
from salekit import xla_attention

run = xla_attention.run_on_host

def slowly(call):
    time.sleep(0.3)
    run(call)
    os.write(1, b"done\\n")  # one write: these threads print together

xla_attention.run_on_host = slowly
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("b",))

def total(q):
    return jax.lax.psum(salekit.jax.dense_attention(q, q, q).astype(jnp.float32).sum(), "b")

jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P("b"), out_specs=P()))(jnp.ones((3, 64, 2, 64), jnp.bfloat16))
"""

VARYING = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import salekit.jax

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("b",))
rng = np.random.default_rng(0)
q = jnp.asarray(rng.standard_normal((8, 64, 2, 64)), jnp.bfloat16)
w = jnp.float32(1.5)

def attention(x):
    return salekit.jax.sparse_attention(x, x, x, thresholds=0.1, dense_below=0)

def loss(w, q):
    return jax.lax.psum((attention(q).astype(jnp.float32) * w).sum(), "b")

def sharded(f, inputs, outputs):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs))

# The gradient of what every device has is the sum over devices.
want = float(attention(q).astype(jnp.float32).sum())
got = float(jax.jit(jax.grad(lambda w: sharded(loss, (P(), P("b")), P())(w, q)))(w))
assert abs(got - want) < 1e-3 * abs(want), (got, want)
# A result that differs between devices is not taken for one that does not.
try:
    sharded(attention, P("b"), P())(q)
    raise SystemExit("out_specs=P() was accepted")
except ValueError as error:
    assert "varying" in str(error) or "replicated" in str(error) or "replication" in str(error), error

bodies = {
    "scan": lambda q: jax.lax.scan(lambda c, _: (attention(c), None), q, None, length=2)[0],
    "fori_loop": lambda q: jax.lax.fori_loop(0, 2, lambda i, c: attention(c), q),
    "while_loop": lambda q: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, attention(s[1])), (0, q))[1],
    "vmap of scan": lambda q: jax.vmap(
        lambda x: jax.lax.scan(lambda c, _: (attention(c[None])[0], None), x, None, length=2)[0]
    )(q),
    "cond in scan": lambda q: jax.lax.scan(
        lambda c, _: (jax.lax.cond(c.sum() > 1e9, lambda c: c, attention, c), None), q, None, length=2
    )[0],
}
twice = np.asarray(attention(attention(q)))
for name, body in bodies.items():
    assert np.array_equal(np.asarray(sharded(body, P("b"), P("b"))(q)), twice), name
print("all vary")
"""

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import salekit.jax

shard_map = getattr(jax, "shard_map", None)
options = {}
if shard_map is None:  # before JAX 0.6, which has no rule for what salekit uses
    from jax.experimental.shard_map import shard_map
    options = {"check_rep": False}
assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(2 * rng.standard_normal((2, 330, n, 64)), jnp.bfloat16) for n in (8, 4, 4))
taus = jnp.linspace(1, 4, 8)
want_all = {"dense_below": 0, "block": (64, 32), "return_lse": True, "return_mask": True}

def call(q, k, v, taus):
    return salekit.jax.sparse_attention(q, k, v, thresholds=taus, **want_all)

whole = call(q, k, v, taus)
assert whole[2].density().min() < 0.95, whole[2].density()
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("heads", "data"))
places = P("data", None, "heads"), P("data", "heads")
for data in ("data", None):
    tensor, rows = P(data, None, "heads"), P(data, "heads")
    specs = (tensor, tensor, tensor, P("heads"))
    sharded = jax.jit(shard_map(call, mesh=mesh, in_specs=specs, out_specs=(tensor, rows, rows), **options))
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v, taus), specs)]
    got = sharded(*arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(whole)):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, tensor), 4)
    text = sharded.lower(*arrays).compile().as_text()
    assert "salekit_attention" in text
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, collective

# Sink logits are sharded with the heads.
sinks = jnp.linspace(-2, 5, 8)
options_all = dict(want_all, softcap=4.0, window_size=(150, 0))

def with_sinks(q, k, v, taus, sinks):
    return salekit.jax.sparse_attention(q, k, v, thresholds=taus, sink_logits=sinks, **options_all)

whole = with_sinks(q, k, v, taus, sinks)
assert whole[2].density().min() < 0.95
specs = (*(P("data", None, "heads"),) * 3, P("heads"), P("heads"))
outs = (P("data", None, "heads"), P("data", "heads"), P("data", "heads"))
sharded = jax.jit(shard_map(with_sinks, mesh=mesh, in_specs=specs, out_specs=outs, **options))
arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v, taus, sinks), specs)]
for one, other in zip(jax.tree.leaves(sharded(*arrays)), jax.tree.leaves(whole)):
    assert np.array_equal(np.asarray(one), np.asarray(other))
text = sharded.lower(*arrays).compile().as_text()
for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text, collective
direct = salekit.sparse_attention(*map(np.asarray, (q, k, v)), thresholds=np.asarray(taus),
                                  sink_logits=np.asarray(sinks), **options_all)
assert np.array_equal(np.asarray(whole[0]), direct[0]) and np.array_equal(np.asarray(whole[1]), direct[1])

# A number for all heads, and k and v that every device of an axis has.
def call(q, k, v):
    return salekit.jax.sparse_attention(q, k, v, thresholds=0.2, dense_below=0)

specs = (P("data"), P(), P())
got = jax.jit(shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("data"), **options))(q, k[:1], v[:1])
want = [call(q[i:i + 1], k[:1], v[:1]) for i in range(2)]
assert np.array_equal(np.asarray(got), np.concatenate([np.asarray(x) for x in want]))
mapped = jax.vmap(call)
got = jax.jit(shard_map(mapped, mesh=mesh, in_specs=P(None, None, None, "heads"),
                        out_specs=P(None, None, None, "heads"), **options))(q[:, None], k[:, None], v[:, None])
assert np.array_equal(np.asarray(got)[:, 0], np.asarray(call(q, k, v)))

# Without shard_map: XLA gathers, and the result is the same.
arrays = [jax.device_put(x, NamedSharding(mesh, P(None, None, "heads"))) for x in (q, k, v)]
assert np.array_equal(np.asarray(jax.jit(call)(*arrays)), np.asarray(call(q, k, v)))
print("sharded is whole")
"""


def run_on_devices(count, code):
    """What a program prints that has so many CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # a twin a device at a time
    root = Path(salekit.__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_heads_sharded_over_devices():
    assert "sharded is whole" in run_on_devices(8, SHARDED)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX 0.5 has another")
def test_python_does_not_end_under_a_call():
    """XLA's threads end with it: another device, that waits in a collective operation, would wait for ever."""
    assert run_on_devices(3, LEAVING).split() == ["done"] * 3


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX 0.5 says of no value that it varies")
def test_results_vary_over_a_mesh():
    """shard_map's types are right: in gradients, outputs, loops and branches."""
    assert "all vary" in run_on_devices(4, VARYING)


# --- other processes -----------------------------------------------------------------------------------------------
def test_export():
    pytest.importorskip("flatbuffers")
    export = pytest.importorskip("jax.export")
    arrays = make(90)

    def call(q, k, v):
        out, mask = salekit_jax.sparse_attention(q, k, v, thresholds=TAUS, dense_below=0, return_mask=True)
        return out, mask.words

    check = export.DisabledSafetyCheck.custom_call("salekit_attention")
    exported = export.export(jax.jit(call), platforms=["cpu"], disabled_checks=[check])(*map(jnp.asarray, arrays))
    got = export.deserialize(exported.serialize()).call(*arrays)
    assert bits(tuple(got)) == bits(jax.jit(call)(*arrays))


def test_it_ends_while_a_call_runs():
    """A process that leaves without waiting for its last call: neither a crash nor a hang."""
    code = (
        "import jax, jax.numpy as jnp, salekit.jax\n"
        "x = jnp.ones((1, 700, 1, 64), jnp.bfloat16)\n"
        "jax.jit(salekit.jax.dense_attention)(x, x, x)\n"
    )
    root = Path(salekit.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


# --- errors --------------------------------------------------------------------------------------------------------
Q, K, V = make(70)


@pytest.mark.parametrize("arguments, options, error, match", [
    ((Q.astype(np.float32), K, V), {}, DtypeError, "q: got dtype float32; wants float16 or bfloat16"),
    ((Q, K, V.astype(FP16)), {}, DtypeError, "v: got dtype float16; wants bfloat16"),
    ((Q, K[..., :32], V), {}, ArgumentError, "k: got head_dim 32"),
    ((Q[0], K, V), {}, ArgumentError, "q: got 3 axes"),
    ((Q, K, V[:, :3]), {}, ArgumentError, "v: got seqlen 3; wants 70"),
    ((Q, "k", V), {}, DtypeError, "k: got str; wants a JAX or NumPy array"),
    ((Q, K, None), {}, DtypeError, "v: got NoneType; wants a JAX or NumPy array"),
    ((Q, K, V), {"layout": "sbhd"}, ArgumentError, "layout: got 'sbhd'"),
    ((Q, K, V), {"estimator": "int5"}, ArgumentError, "estimator: got 'int5'"),
    ((Q, K, V), {"block": (3, 4)}, ArgumentError, r"block: got \(3, 4\)"),
    ((Q, K, V), {"thresholds": -0.5}, ArgumentError, "thresholds: got -0.5"),
    ((Q, K, V), {"thresholds": [0.1, np.nan, 0.2, 0.3]}, ArgumentError, "thresholds: got nan for head 1"),
    ((Q, K, V), {"thresholds": [0.1, 0.2]}, ArgumentError, r"thresholds: got shape \(2,\)"),
    ((Q, K, V), {"thresholds": jnp.ones(3)}, ArgumentError, r"thresholds: got shape \(3,\)"),
    ((Q, K, V), {"thresholds": jnp.ones(4, bool)}, DtypeError, "thresholds: got dtype bool"),
    ((Q, K, V), {"thresholds": jax.random.key(0)}, DtypeError, "thresholds: got dtype key"),
    ((Q, K, V), {"thresholds": "high"}, DtypeError, "thresholds: got str"),
    ((Q, K, V), {"sink_logits": [0.0, np.nan, 0, 0]}, ArgumentError, "sink_logits: has a NaN"),
    ((Q, K, V), {"sink_logits": [0.0, 1.0]}, ArgumentError, r"sink_logits: got shape \(2,\); wants \(4,\), one a head"),
    ((Q, K, V), {"sink_logits": jnp.ones(3)}, ArgumentError, r"sink_logits: got shape \(3,\); wants \(4,\)"),
    ((Q, K, V), {"sink_logits": jnp.ones(4, bool)}, DtypeError, "sink_logits: got dtype bool; wants real numbers"),
    ((Q, K, V), {"sink_logits": jax.random.split(jax.random.key(0), 4)}, DtypeError, "sink_logits: got dtype key"),
    ((Q, K, V), {"sink_logits": "high"}, DtypeError, "sink_logits: got str"),
    ((Q, K, V), {"sink_logits": TAUS, "attend": "int8-fp8"}, ArgumentError, "sink_logits: attend='int8-fp8' takes"),
    ((Q, K, V), {"sink_logits": jnp.ones(4), "skipped": "pool"}, ArgumentError, "sink_logits: skipped='pool' takes"),
    ((Q, K, V), {"softcap": 3.0, "attend": "int8-fp8"}, ArgumentError, "attend: 'int8-fp8' has no softcap"),
    ((Q, K, V), {"window_size": 8, "skipped": "pool"}, ArgumentError, "skipped: 'pool' has no softcap and no window"),
    ((Q, K, V), {"window_size": (1, 2, 3)}, ArgumentError, "window_size: got"),
    ((Q, K, V), {"softcap": -1.0}, ArgumentError, "softcap: got -1.0"),
    ((Q, K, V), {"thresholds": 10**400}, ArgumentError, "thresholds: got 1000"),
    ((Q, K, V), {"softmax_scale": 10**400}, ArgumentError, "softmax_scale: got 1000"),
    ((Q, K, V), {"softcap": 10**400}, ArgumentError, "softcap: got 1000"),
    ((Q, K, V), {"softcap": jnp.array(3.0)}, ArgumentError, "softcap: got Array"),
    ((Q, K, V), {"window_size": jnp.array(3)}, ArgumentError, "window_size: got Array"),
    ((Q, K, V), {"return_lse": np.array([1, 0])}, ArgumentError, "return_lse: got array.*; wants True or False"),
    ((Q, K, V), {"return_mask": "no"}, ArgumentError, "return_mask: got 'no'; wants True or False"),
    ((Q, K, V), {"longest": (10, 10)}, TypeError, "unexpected keyword argument 'longest'"),
    ((Q, K, V), {"blocks": (64, 32)}, TypeError, "unexpected keyword argument 'blocks'"),
    ((Q, K, V), {"out": Q}, TypeError, "unexpected keyword argument 'out'"),
])
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        salekit_jax.sparse_attention(*arguments, **options)


def test_every_option_is_there():
    """An option of salekit's functions that a plan does not take shows here: salekit.jax has to learn it."""
    for name, known in (("sparse_attention", OPTIONS), ("dense_attention", DENSE_OPTIONS)):
        there, here = getattr(salekit, name), getattr(salekit_jax, name)
        want = {x.name for x in inspect.signature(there).parameters.values() if x.kind is x.KEYWORD_ONLY}
        got = {x.name for x in inspect.signature(here).parameters.values() if x.kind is x.KEYWORD_ONLY}
        assert got | known == want - {"out", "stream", "k_statistics"}
    with pytest.raises(TypeError, match=r"dense_attention\(\) got an unexpected keyword argument 'block'"):
        salekit_jax.dense_attention(Q, K, V, block=(64, 32))


def test_bad_arguments_show_when_traced():
    with pytest.raises(ArgumentError, match="k: got head_dim 32"):
        jax.eval_shape(lambda k: salekit_jax.sparse_attention(Q, k, V), K[..., :32])
    for name in ("causal", "softmax_scale", "query_stride", "sink", "softcap", "window_size"):
        with pytest.raises(ArgumentError, match=f"{name}: got "):
            jax.jit(lambda x, name=name: salekit_jax.sparse_attention(Q, K, V, **{name: x}))(1)


def test_no_derivative():
    def loss(q, stop):
        return salekit_jax.sparse_attention(stop(q), K, V).astype(jnp.float32).sum() + q.astype(jnp.float32).sum()

    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(ArgumentError, match="no backward pass.*stop_gradient"):
            transform(lambda q: loss(q, lambda x: x))(jnp.asarray(Q))
        assert (transform(lambda q: loss(q, jax.lax.stop_gradient))(jnp.asarray(Q)) == 1).all()
    with pytest.raises(ArgumentError, match="no backward pass"):
        jax.jvp(lambda taus: salekit_jax.sparse_attention(Q, K, V, thresholds=taus), (TAUS,), (TAUS,))
    with pytest.raises(ArgumentError, match="no backward pass.*sink_logits"):
        jax.grad(lambda s: salekit_jax.dense_attention(Q, K, V, sink_logits=s).astype(jnp.float32).sum())(SINK_LOGITS)


def test_tracers_outside_salekit_jax():
    for name, call in (
        ("q", lambda x: salekit.sparse_attention(x, K, V)),
        ("v", lambda x: salekit.dense_attention(Q, K, x)),
        ("thresholds", lambda x: salekit.sparse_attention(Q, K, V, thresholds=x)),
        ("out", lambda x: salekit.sparse_attention(Q, K, V, out=x)),
    ):
        with pytest.raises(DtypeError, match=f"{name}: is traced by JAX and has no data.*salekit.jax"):
            jax.jit(call)(Q)


def test_an_error_of_xla_s_own(monkeypatch):
    """XLA's text comes back: a program on the CPU has no GPU stream to ask for."""
    from salekit import xla_attention

    monkeypatch.setattr(xla_attention, "run_on_host", lambda call: call.stream())
    with pytest.raises(Exception, match=r"INTERNAL.*FfiError: \w"):
        jax.block_until_ready(jax.jit(lambda q: salekit_jax.dense_attention(q, K, V))(Q))


def test_an_error_inside_a_running_program(monkeypatch):
    from salekit import xla_attention

    def fail(call):
        raise ArgumentError("q: is not to our liking")

    monkeypatch.setattr(xla_attention, "run_on_host", fail)
    with pytest.raises(Exception, match="INVALID_ARGUMENT.*ArgumentError: q: is not to our liking"):
        jax.block_until_ready(jax.jit(lambda q: salekit_jax.dense_attention(q, K, V))(Q))
    monkeypatch.undo()
    assert bits(salekit_jax.dense_attention(Q, K, V)) == bits(salekit.dense_attention(Q, K, V))
