"""Softcap, windows and sink logits of packed sequences and pages on the twin, against float64 from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import score_oracle
from test_host_scores import check_attention, dequantised, scores_of
from test_host_serving import ESTIMATORS, FP16, LENGTHS, Batch, draw, running, same

import salekit
from salekit import reference
from salekit.errors import ArgumentError, DtypeError

SINK_LOGITS = np.array([1.5, -0.5], np.float32)
FEATURES = {
    "softcap": dict(softcap=3.0),
    "window": dict(window_size=(40, 10)),
    "left": dict(window_size=(70, -1)),
    "sinks": dict(sink_logits=SINK_LOGITS),
    "window-sinks": dict(window_size=(40, 10), sink_logits=SINK_LOGITS),
    "all": dict(softcap=3.0, window_size=(40, 10), sink_logits=SINK_LOGITS),
}
SELECTION = dict(thresholds=0.15, dense_below=0, block=(64, 32), local=32)


def make(rows, keys, **options):
    return Batch(rows, keys, **{**dict(heads=2, kv_heads=1), **options})


def window_of(options, causal):
    left, right = options.get("window_size", (-1, -1))
    return left, 0 if causal else right


def one_call(result, some):
    """out [1, rows, heads, head_dim] and lse [1, heads, rows] of one sequence."""
    return result[0][None, some], result[1][None, :, some]


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("rows, keys", LENGTHS)
@pytest.mark.parametrize("name", FEATURES)
def test_dense_is_float64(name, rows, keys, causal):
    options, batch = FEATURES[name], make(rows, keys, seed=1)
    for result in (batch.packed(causal=causal, **options), batch.paged(causal=causal, **options)):
        for some, q, k, v in batch.each():
            seen = score_oracle.visible(len(q), len(k), causal, window_of(options, causal))
            check_attention(one_call(result, some), q[None], k[None], v[None], [seen] * 2, options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("rows, keys", LENGTHS)
@pytest.mark.parametrize("name", FEATURES)
def test_packed_is_each_sequence_alone(name, rows, keys, causal, estimator):
    batch = make(rows, keys, seed=2)
    options = dict(FEATURES[name], causal=causal, estimator=estimator, query_stride=2, full_rows=16, **SELECTION)
    results = [batch.packed(**options), batch.paged(**options)]
    for some, *qkv in batch.each():
        want, want_lse = salekit.sparse_attention(*(x[None] for x in qkv), return_lse=True, **options)
        for out, lse in results:
            assert same(out[some], want[0]) and same(lse[:, some], want_lse[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", FEATURES)
def test_selection_and_attention_are_float64(name, causal, estimator):
    """Each sequence's blocks by their definition, but for those within a rounding of tau, and attention over them."""
    options, batch = FEATURES[name], make((70, 1, 33, 130), (300, 97, 64, 513), seed=3)
    kind = dict(SELECTION, causal=causal, estimator=estimator)
    results = [batch.packed(**kind, **options), batch.paged(**kind, **options)]
    sinks, window = options.get("sink_logits", np.full(2, -np.inf)), window_of(options, causal)
    density = []
    for some, *qkv in batch.each():
        q, k, v = (x[None] for x in qkv)
        mask = salekit.sparse_attention(q, k, v, return_mask=True, **kind, **options)[1]
        density += [mask.density().min()]
        no_data = {name: x for name, x in (kind | options).items() if name not in ("thresholds", "sink_logits")}
        plan = salekit.make_plan(q, k, v, **no_data)
        codes = reference.quantize(q, k, plan)
        seen, allowed = score_oracle.visible(*q.shape[1:2], *k.shape[1:2], causal, window), []
        for head in range(2):
            shift = plan.softmax_scale * q[0, :, head].astype(np.float64) @ codes.k_mean[0, 0].astype(np.float64)
            want, margins = score_oracle.select(
                dequantised(codes, plan, head) + shift[:, None], scores_of(q, k, head, 1, plan.softmax_scale),
                kind["thresholds"], causal, window, plan.softcap, float(sinks[head]), (64, 32), 32,
            )
            bits = mask.to_dense()[0, head]
            assert ((bits == want) | (margins < 1e-4)).all()
            allowed.append(seen & np.repeat(np.repeat(bits, 64, 0), 32, 1)[: q.shape[1], : k.shape[1]])
        for result in results:
            check_attention(one_call(result, some), q, k, v, allowed, options)
    assert min(density) < 0.97 or "window_size" in options


@pytest.mark.parametrize("head_dim", (96, 192, 256))
@pytest.mark.parametrize("name", (None, "all"))
def test_head_dims(name, head_dim):
    options, batch = FEATURES[name] if name else {}, make((65, 1, 0, 20), (200, 131, 9, 20), dim=head_dim, seed=4)
    for result in (batch.packed(**options), batch.paged(**options)):
        for some, q, k, v in batch.each():
            seen = score_oracle.visible(len(q), len(k), True, window_of(options, True))
            check_attention(one_call(result, some), q[None], k[None], v[None], [seen] * 2, options)
    for estimator in ESTIMATORS:
        kind = dict(options, estimator=estimator, **SELECTION)
        for out, lse in (batch.packed(**kind), batch.paged(**kind)):
            for some, *qkv in batch.each():
                want, want_lse = salekit.sparse_attention(*(x[None] for x in qkv), return_lse=True, **kind)
                assert same(out[some], want[0]) and same(lse[:, some], want_lse[0])


@pytest.mark.parametrize("sparse", (SELECTION, {}))
def test_without_a_visible_key_the_sink_is_all(sparse):
    """Sequences without keys, without rows, and rows before the first key of a causal call: out 0, lse the sink."""
    batch = make((3, 0, 80, 1), (0, 7, 5, 40), seed=5)
    blind = np.r_[0:3, 3:78]
    for name in ("sinks", "all"):
        for out, lse in (batch.packed(**sparse, **FEATURES[name]), batch.paged(**sparse, **FEATURES[name])):
            assert (out[blind] == 0).all() and (lse[:, blind] == SINK_LOGITS[:, None]).all()
            assert (lse[:, 78:] > SINK_LOGITS[:, None]).all() and (out[78:] != 0).any()
    # No sequence has a key; a head without a sink; and without any.
    batch = make((3, 4), (0, 0))
    for sinks, want in ((SINK_LOGITS, SINK_LOGITS), ([2.0, -np.inf], [2.0, -np.inf]), (None, [-np.inf] * 2)):
        for out, lse in (batch.packed(sink_logits=sinks), batch.paged(sink_logits=sinks, window_size=3)):
            assert (out == 0).all() and (lse == np.array(want, np.float32)[:, None]).all()


@pytest.mark.parametrize("options", (
    dict(window_size=(90, 0), sink_logits=SINK_LOGITS), dict(softcap=3.0), dict(softcap=3.0, window_size=128)
))
def test_chunked_prefill_over_a_paged_cache(options):
    """As gpt-oss and Gemma layers are served: two prompts grow chunk by chunk, then token by token, in pages. Each
    chunk is what float64 attention over the whole prompt gives its rows."""
    rng = np.random.default_rng(6)
    lengths, page_size = (301, 170), 32
    q, k, v = ([draw(rng, n, heads, 64) for n in lengths] for heads in (2, 1, 1))
    pages_k, pages_v = (np.full((20, page_size, 1, 64), np.nan, FP16) for _ in range(2))
    table = rng.permutation(20).astype(np.int32).reshape(2, 10)
    out, lse = ([np.zeros_like(x) for x in q], [np.zeros((2, n), np.float32) for n in lengths])
    done = [0, 0]
    for step in ((128, 1), (100, 64), (71, 104), (1, 1), (1, 0)):
        new = [slice(a, a + n) for a, n in zip(done, step)]
        for i, rows in enumerate(new):
            for j in range(rows.start, rows.stop):
                for pages, x in ((pages_k, k), (pages_v, v)):
                    pages[table[i, j // page_size], j % page_size] = x[i][j]
        done = [rows.stop for rows in new]
        got, got_lse = salekit.sparse_attention_varlen(
            np.concatenate([x[rows] for x, rows in zip(q, new)]), pages_k, pages_v, running(step), None, 128, 301,
            block_table=table, seqlens_k=done, return_lse=True, **options,
        )
        for i, (rows, first) in enumerate(zip(new, (0, step[0]))):
            out[i][rows], lse[i][:, rows] = got[first : first + step[i]], got_lse[:, first : first + step[i]]
    assert tuple(done) == lengths
    window = options.get("window_size", (-1, 0))
    window = window if isinstance(window, tuple) else (window - 1, 0)
    for i, n in enumerate(lengths):
        seen = score_oracle.visible(n, n, True, window)
        check_attention((out[i][None], lse[i][None]), q[i][None], k[i][None], v[i][None], [seen] * 2, options)


def test_windows_are_each_sequence_s_own():
    """A window that hides nothing of the longest sequence is none; one that does counts from each one's own end."""
    batch = make((40, 2), (300, 60), seed=7)
    plain = batch.packed(**SELECTION)
    for window in (None, (-1, -1), 300, (299, 0)):
        for a, b in zip(batch.packed(window_size=window, **SELECTION), plain):
            assert same(a, b)
    options = dict(window_size=(59, 0), **SELECTION)  # hides nothing of the second
    out, lse = batch.packed(**options)
    assert same(out[40:], plain[0][40:]) and same(lse[:, 40:], plain[1][:, 40:]) and not same(out[:40], plain[0][:40])
    with pytest.raises(ArgumentError, match="window_size: got 0"):
        batch.packed(window_size=0)


def test_dense_by_the_window():
    batch = make((100, 100), (100, 400), seed=8)
    options = dict(thresholds=2.0, local=0, window_size=(149, 0))
    sparse, dense = (batch.packed(dense_below=n, **options)[0] for n in (149, 150))
    exact = batch.packed(thresholds=0.0, window_size=(149, 0))[0]
    assert same(dense, exact) and not same(sparse, exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_statistics(estimator):
    batch = make((70, 1), (500, 350), seed=9)
    options = dict(FEATURES["all"], estimator=estimator, **SELECTION)
    each = [salekit.key_statistics(k[None]) for _, _, k, _ in batch.each()]
    for result in (batch.packed, batch.paged):
        for a, b in zip(result(k_statistics=salekit.KeyStatistics.stack(each), **options), result(**options)):
            assert same(a, b)


# --- errors --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, error, match", (
    (dict(sink_logits=[1.0]), ArgumentError, r"sink_logits: got shape \(1,\); wants \(2,\), one a head"),
    (dict(sink_logits=np.zeros((1, 2), np.float32)), ArgumentError, r"sink_logits: got shape \(1, 2\)"),
    (dict(sink_logits=[np.nan, 0.0]), ArgumentError, "sink_logits: has a NaN or"),
    (dict(sink_logits=np.array([np.inf, 0.0])), ArgumentError, "sink_logits: has a NaN or"),
    (dict(sink_logits=[[1.0], [2.0, 3.0]]), ArgumentError, "sink_logits: got a ragged list"),
    (dict(sink_logits=np.array([True, False])), DtypeError, "sink_logits: got dtype bool"),
    (dict(sink_logits=1.0), DtypeError, "sink_logits: got float"),
    (dict(softcap=-1.0), ArgumentError, "softcap: got -1.0"),
    (dict(softcap=np.nan), ArgumentError, "softcap: got nan"),
    (dict(window_size=(1, 2, 3)), ArgumentError, "window_size: got"),
    (dict(window_size=(-2, 0)), ArgumentError, "window_size: got"),
    (dict(window_size=True), ArgumentError, "window_size: got True"),
    (dict(attend="int8-fp8", softcap=30.0), ArgumentError, "attend: 'int8-fp8' has no softcap.*wants 'exact'"),
    (dict(attend="int8-fp8", window_size=8), ArgumentError, "attend: 'int8-fp8' has no .*window_size; wants 'exact'"),
    (dict(attend="int8-fp8", sink_logits=[0.0, 0.0]), ArgumentError, "sink_logits: attend='int8-fp8' takes none"),
    (dict(skipped="pool"), ArgumentError, "skipped: 'pool' is not there for packed sequences and pages; wants 'drop'"),
    (dict(skipped="keep"), ArgumentError, "skipped: got 'keep'"),
))
@pytest.mark.parametrize("paged", (False, True))
def test_refused(paged, change, error, match):
    batch = make((30, 40), (50, 60), seed=10)
    out = np.full(batch.q.shape, 7, FP16)
    with pytest.raises(error, match=match):
        (batch.paged if paged else batch.packed)(out=out, **change)
    assert (out == 7).all()


@pytest.mark.parametrize("head_dim", (96, 192, 256))
def test_low_bit_attention_takes_64_and_128(head_dim):
    with pytest.raises(ArgumentError, match=f"attend: 'int8-fp8' takes head_dim 64 and 128, q has {head_dim}"):
        make((3,), (5,), dim=head_dim).paged(attend="int8-fp8")


def test_a_short_sequence_is_tested_as_by_itself():
    """Its right end hides nothing from it, but something from the longer one beside it."""
    rng = np.random.default_rng(9)
    rows, keys = (130, 900), (1200, 1400)
    q, k, v = (rng.standard_normal((sum(n), heads, 64)).astype(np.float16)
               for n, heads in ((rows, 2), (keys, 1), (keys, 1)))
    options = dict(causal=False, window_size=(-1, 200), query_stride=4, full_rows=0, block=(64, 32), dense_below=0)
    out = salekit.sparse_attention_varlen(
        q, k, v, [0, 130, 1030], [0, 1200, 2600], 900, 1400, thresholds=0.3, **options
    )
    own = salekit.sparse_attention(q[None, :130], k[None, :1200], v[None, :1200], thresholds=0.3, **options)
    assert np.array_equal(out[:130], own[0])
