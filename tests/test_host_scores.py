"""Softcap, sliding windows and sink logits on the twin, against float64 from the definitions."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import score_oracle

import salekit
from salekit import reference
from salekit.block_mask import BlockMask
from salekit.errors import ArgumentError, DtypeError
from salekit.plans import BLOCKS, ESTIMATORS, SINKS, SOFTCAP, WINDOW

LENGTHS = ((1, 1), (1, 333), (70, 300), (300, 70), (257, 257), (129, 513))
WINDOWS = ((-1, -1), (0, 0), (40, 0), (100, 30), (-1, 5), (200, -1))
SINK_LOGITS = np.array([1.5, -0.5], np.float32)
FEATURES = {
    "softcap": dict(softcap=3.0),
    "window": dict(window_size=(170, 60)),
    "sinks": dict(sink_logits=SINK_LOGITS),
    "all": dict(softcap=3.0, window_size=(170, 60), sink_logits=SINK_LOGITS),
}


def make(nq, nk, heads=2, kv_heads=1, d=64, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    q = (2 * rng.standard_normal((1, nq, heads, d))).astype(dtype)
    k, v = ((rng.standard_normal((1, nk, kv_heads, d)) + 0.3).astype(dtype) for _ in range(2))
    return q, k, v


def scores_of(q, k, head, kv_heads, scale):
    """float64 [nq, nk] before the cap."""
    kv = head // (q.shape[2] // kv_heads)
    return scale * q[0, :, head].astype(np.float64) @ k[0, :, kv].astype(np.float64).T


def window_of(options, causal):
    left, right = options.get("window_size", (-1, -1))
    return left, 0 if causal else right


def check_attention(got, q, k, v, allowed, options, atol=2.0**-9):
    """out (float16: one rounding of 2^-11, values below 4) and lse of one call against float64; allowed per head."""
    out, lse = got
    sinks = options.get("sink_logits", np.full(q.shape[2], -np.inf))
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        rows, keys, values = (
            x.astype(np.float64) for x in (q[0, :, head], k[0, :, head // group], v[0, :, head // group])
        )
        want, want_lse, _ = score_oracle.attend(
            rows, keys, values, allowed[head], q.shape[3] ** -0.5, options.get("softcap", 0.0), sinks[head]
        )
        assert np.abs(out[0, :, head].astype(np.float64) - want).max(initial=0) <= atol
        known = np.isfinite(want_lse)
        assert np.array_equal(np.isneginf(lse[0, head]), ~known)
        assert np.abs(lse[0, head][known] - want_lse[known]).max(initial=0) <= 2e-5


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", FEATURES)
def test_dense_attention(name, lengths, causal):
    options = FEATURES[name]
    q, k, v = make(*lengths)
    got = salekit.dense_attention(q, k, v, causal=causal, return_lse=True, **options)
    seen = score_oracle.visible(*lengths, causal, window_of(options, causal))
    check_attention(got, q, k, v, [seen] * 2, options)


@pytest.mark.parametrize("window, causal", list(itertools.product(WINDOWS, (True, False))))
def test_windows(window, causal):
    q, k, v = make(150, 260)
    got = salekit.dense_attention(q, k, v, causal=causal, window_size=window, return_lse=True)
    seen = score_oracle.visible(150, 260, causal, (window[0], 0 if causal else window[1]))
    check_attention(got, q, k, v, [seen] * 2, {})


def test_a_window_is_the_table_of_its_definition():
    """Row i of 3 with 5 keys is at position i + 2."""
    q, k, _ = make(3, 5)
    v = np.broadcast_to(np.eye(5, 64, dtype=np.float16)[None, :, None], (1, 5, 1, 64))  # out shows who is seen
    tables = {
        ((1, 0), True): ["01100", "00110", "00011"],
        ((1, 1), False): ["01110", "00111", "00011"],
        ((-1, 0), False): ["11100", "11110", "11111"],
        ((0, -1), False): ["00111", "00011", "00001"],
        (2, True): ["01100", "00110", "00011"],
        (2, False): ["01110", "00111", "00011"],
        (1, True): ["00100", "00010", "00001"],
    }
    for (window, causal), table in tables.items():
        out = salekit.dense_attention(q, k, v, causal=causal, window_size=window)
        seen = ["".join(str(int(x > 0)) for x in row) for row in out[0, :, 0, :5].astype(np.float32)]
        assert seen == table, (window, causal)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 333), (300, 70), (129, 513)))
@pytest.mark.parametrize("name", FEATURES)
def test_masks_and_what_they_attend(name, lengths, causal, estimator):
    options = FEATURES[name]
    q, k, v = make(*lengths, seed=3)
    tau, block, local = 0.15, (64, 32), 32
    sinks = options.get("sink_logits", np.full(2, -np.inf, np.float32))
    kind = dict(causal=causal, estimator=estimator, block=block, local=local, dense_below=0)
    plan = salekit.make_plan(q, k, v, **kind, **{name: x for name, x in options.items() if name != "sink_logits"})
    result = salekit.sparse_attention(q, k, v, thresholds=tau, return_lse=True, return_mask=True, **kind, **options)
    codes = reference.quantize(q, k, plan)
    window = window_of(options, causal)
    seen = score_oracle.visible(*lengths, causal, window)
    allowed = []
    for head in range(2):
        rows = q[0, :, head].astype(np.float64)
        shift = plan.softmax_scale * rows @ codes.k_mean[0, 0].astype(np.float64)
        estimated = dequantised(codes, plan, head) + shift[:, None]
        exact = scores_of(q, k, head, 1, plan.softmax_scale)
        want, margins = score_oracle.select(
            estimated, exact, tau, causal, window, plan.softcap, float(sinks[head]), block, local
        )
        bits = result[2].to_dense()[0, head]
        assert ((bits == want) | (margins < 1e-4)).all()
        wide = np.repeat(np.repeat(bits, block[0], 0), block[1], 1)[: lengths[0], : lengths[1]]
        assert not (bits & ~result[2].visible()).any()
        allowed.append(seen & wide)
    check_attention(result[:2], q, k, v, allowed, options)
    if lengths == (129, 513):
        assert 0.1 < result[2].density().min() < 0.97


def dequantised(codes, plan, head):
    """float64 [nq, nk]: estimated scores with the smoothed keys."""
    acc = codes.q_codes[0, head].astype(np.float64) @ codes.k_codes[0, 0].astype(np.float64).T
    if plan.estimator != "int4":
        return plan.softmax_scale * acc * codes.q_scale[0, head].astype(np.float64)[:, None] * codes.k_scale[0, 0]
    rows, keys = np.arange(plan.seqlen_q), np.arange(plan.seqlen_k)
    sq = codes.q_scale[0, head][8 * (rows // 16) + rows % 8].astype(np.float64)[:, None]
    sk = codes.k_scale[0, 0][4 * (keys // 32) + keys % 8 // 2].astype(np.float64)[None]
    return plan.softmax_scale * (acc + np.rint(codes.correction[0, head][None] / (sq * sk))) * sq * sk


@pytest.mark.parametrize("name", FEATURES)
def test_every_block_size_is_the_union_of_the_finest(name):
    q, k, v = make(400, 700)
    options = dict(FEATURES[name], thresholds=0.05, dense_below=0, return_mask=True)
    fine = salekit.sparse_attention(q, k, v, block=(64, 32), **options)[1]
    for block in BLOCKS:
        mask = salekit.sparse_attention(q, k, v, block=block, **options)[1]
        assert np.array_equal(mask.words, fine.coarsen(*block).words)
        assert mask.density().max() <= 1


@pytest.mark.parametrize("name", FEATURES)
def test_tau_zero_and_infinite(name):
    options = dict(FEATURES[name], dense_below=0, return_mask=True, block=(64, 32))
    q, k, v = make(300, 500)
    causal_window = window_of(options, True)
    exact = np.zeros((300, 500))
    everything = salekit.sparse_attention(q, k, v, thresholds=[0.0, 0.0], **options)
    assert np.array_equal(everything[1].to_dense(), np.broadcast_to(everything[1].visible(), (1, 2, 5, 16)))
    dense = salekit.dense_attention(q, k, v, **FEATURES[name])
    assert np.abs(everything[0].astype(np.float32) - dense.astype(np.float32)).max() <= 2.0**-9
    anchors = salekit.sparse_attention(q, k, v, thresholds=np.inf, **options)[1].to_dense()
    want, _ = score_oracle.select(exact, exact, np.inf, True, causal_window)
    assert np.array_equal(anchors, np.broadcast_to(want, anchors.shape))


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("q", "k"))
@pytest.mark.parametrize("name", FEATURES)
def test_non_finite_input_selects_what_is_visible(name, where, value):
    q, k, v = make(200, 300)
    (q if where == "q" else k)[0, 150, 0, 3] = value
    options = dict(FEATURES[name], dense_below=0, block=(64, 32))
    out, mask = salekit.sparse_attention(q, k, v, thresholds=np.inf, return_mask=True, **options)
    bits, visible = mask.to_dense()[0, 0], mask.visible()
    if where == "q":  # what that row sees
        keys = score_oracle.visible(200, 300, True, window_of(FEATURES[name], True))[150]
        assert bits[150 // 64, np.flatnonzero(keys) // 32].all()
    else:
        assert np.array_equal(bits, visible)
    dense = salekit.dense_attention(q, k, v, **FEATURES[name]).astype(np.float32)
    assert np.array_equal(np.isnan(out.astype(np.float32)[0, :, 0]), np.isnan(dense[0, :, 0]))


def test_a_dominant_sink_selects_less_and_a_weak_one_changes_nothing():
    q, k, v = make(300, 600)
    options = dict(thresholds=0.02, dense_below=0, return_mask=True, return_lse=True, block=(64, 32))
    plain = salekit.sparse_attention(q, k, v, **options)
    for got, want in zip(
        salekit.sparse_attention(q, k, v, sink_logits=[-np.inf, -np.inf], **options)[:2], plain[:2]
    ):
        assert got.tobytes() == want.tobytes()
    strong = salekit.sparse_attention(q, k, v, sink_logits=[200.0, -np.inf], **options)
    anchors = salekit.sparse_attention(q, k, v, **{**options, "thresholds": np.inf})[2].to_dense()
    assert np.array_equal(strong[2].to_dense()[0, 0], anchors[0, 0])  # more than float32's exp can say
    assert np.array_equal(strong[2].to_dense()[0, 1], plain[2].to_dense()[0, 1])
    assert (strong[0][0, :, 0] == 0).all() and np.allclose(strong[1][0, 0], 200)


def test_a_window_that_hides_nothing_is_none():
    q, k, v = make(100, 300)
    plain = salekit.make_plan(q, k, v)
    for window in (None, (-1, -1), (-1, 0), (299, 0), (500, 7), 300, 2**40):
        assert salekit.make_plan(q, k, v, window_size=window) == plain
    assert salekit.make_plan(q, k, v, window_size=(298, 5)).window_left == 298
    both = salekit.make_plan(q, k, v, causal=False, window_size=(299, 98))
    assert (both.window_left, both.window_right) == (-1, 98)
    assert salekit.make_plan(q, k, v, causal=False, window_size=(299, 99)).has_window is False


def test_short_windows_are_dense():
    q, k, v = make(100, 300)
    for causal, window, keys in (
        (True, (70, 0), 71), (False, (70, 20), 91), (False, (70, 98), 169), (False, (70, 99), 170),
        (False, (70, -1), 170), (False, (-1, 20), 300), (False, (250, 99), 300), (True, None, 300),
    ):
        plan = salekit.make_plan(q, k, v, causal=causal, window_size=window)
        assert plan.replace(dense_below=keys).is_dense and not plan.replace(dense_below=keys - 1).is_dense


def test_a_cap_far_above_the_scores_changes_nothing_much():
    q, k, v = make(200, 300)
    plain, capped = (salekit.dense_attention(q, k, v, softcap=cap).astype(np.float32) for cap in (0.0, 1e4))
    assert np.abs(plain - capped).max() <= 2.0**-10


def test_chunks_equal_the_whole():
    q, k, v = make(300, 300)
    for options in FEATURES.values():
        causal = dict(options)
        if "window_size" in causal:
            causal["window_size"] = (70, 0)
        whole, lse = salekit.dense_attention(q, k, v, return_lse=True, **causal)
        for start, end in ((0, 1), (1, 130), (130, 300)):
            part, part_lse = salekit.dense_attention(
                q[:, start:end], k[:, :end], v[:, :end], return_lse=True, **causal
            )
            error = np.abs(part.astype(np.float32) - whole[:, start:end].astype(np.float32)).max()
            assert error <= 2.0**-9 and np.abs(part_lse - lse[:, :, start:end]).max() <= 1e-5


def test_states_merge_when_one_part_has_the_sink():
    q, k, v = make(64, 400)
    options = dict(causal=False, softcap=5.0, return_lse=True)
    whole, lse = salekit.dense_attention(q, k, v, sink_logits=SINK_LOGITS, **options)
    one = salekit.dense_attention(q, k[:, :150], v[:, :150], sink_logits=SINK_LOGITS, **options)
    other = salekit.dense_attention(q, k[:, 150:], v[:, 150:], **options)
    total = np.logaddexp(one[1], other[1])
    out = sum(
        x[0].astype(np.float64) * np.exp(x[1] - total).transpose(0, 2, 1)[..., None] for x in (one, other)
    )
    assert np.abs(total - lse).max() <= 1e-5 and np.abs(out - whole).max() <= 2.0**-9


@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
def test_layouts_and_groups(layout):
    q, k, v = make(130, 260, heads=4, kv_heads=2)
    options = dict(softcap=3.0, window_size=(70, 20), sink_logits=[0.0, 1.0, -1.0, 2.0], return_lse=True)
    order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
    out, lse = salekit.dense_attention(
        *(np.ascontiguousarray(x.transpose(order)) for x in (q, k, v)), layout=layout, **options
    )
    seen = score_oracle.visible(130, 260, True, (70, 0))
    kept = dict(softcap=3.0, sink_logits=np.array(options["sink_logits"]))
    check_attention((out.transpose(order), lse), q, k, v, [seen] * 4, kept)


@pytest.mark.parametrize("lengths", ((0, 5), (5, 0), (0, 0), (300, 70)))
def test_rows_without_a_key_have_the_sinks_lse(lengths):
    q, k, v = make(*lengths)
    for options in (dict(dense_below=0), dict()):
        out, lse = salekit.sparse_attention(
            q, k, v, sink_logits=SINK_LOGITS, window_size=5, return_lse=True, thresholds=0.02, **options
        )
        blind = max(0, lengths[0] - lengths[1])
        assert (out[:, :blind] == 0).all()
        assert np.array_equal(lse[0, :, :blind], np.broadcast_to(SINK_LOGITS[:, None], (2, blind)))
    assert lengths != (300, 70) or (lse[0, :, blind:] > SINK_LOGITS[:, None]).all()


def test_plans_take_them():
    q, k, v = make(200, 400)
    plan = salekit.plan(q, k, v, softcap=3.0, window_size=(70, 20), dense_below=0)
    assert plan.plan.score_features(True) == SOFTCAP | WINDOW | SINKS and plan.plan.softcap == 3.0
    for sinks in (None, SINK_LOGITS, SINK_LOGITS.astype(ml_dtypes.bfloat16), [1.5, -0.5]):
        got = plan.run(q, k, v, sink_logits=sinks, return_lse=True)
        want = salekit.sparse_attention(
            q, k, v, softcap=3.0, window_size=(70, 20), dense_below=0, sink_logits=sinks, return_lse=True
        )
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want))


# --- visible blocks --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window, causal", list(itertools.product(WINDOWS, (True, False))))
@pytest.mark.parametrize("block", BLOCKS)
def test_visible_blocks_are_those_of_visible_pairs(block, window, causal, tmp_path):
    for lengths in ((70, 300), (300, 70), (257, 257), (1, 1)):
        q, k, v = make(*lengths)
        plan = salekit.make_plan(q, k, v, causal=causal, window_size=window, block=block)
        pairs = score_oracle.visible(*lengths, causal, (window[0], 0 if causal else window[1]))
        padded = np.zeros((plan.num_q_blocks * block[0], plan.num_k_blocks * block[1]), bool)
        padded[: lengths[0], : lengths[1]] = pairs
        want = padded.reshape(plan.num_q_blocks, block[0], plan.num_k_blocks, block[1]).any((1, 3))
        assert np.array_equal(plan.visible_blocks, want.sum(1)) and plan.visible_pairs == pairs.sum()
        out, mask = salekit.sparse_attention(
            q, k, v, causal=causal, window_size=window, block=block, thresholds=0.0, return_mask=True
        )
        assert np.array_equal(mask.visible(), want)
        assert np.array_equal(mask.to_dense(), np.broadcast_to(want, (1, 2, *want.shape)))
        assert (mask.density() == 1).all() or not want.any()
    mask.save_npz(tmp_path / "mask.npz")
    assert BlockMask.load_npz(tmp_path / "mask.npz").visible().tolist() == mask.visible().tolist()


# --- errors ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option, value", [
    ("softcap", -1.0), ("softcap", float("nan")), ("softcap", float("inf")), ("softcap", True), ("softcap", "30"),
    ("softcap", None), ("softcap", 1e-38), ("window_size", 0), ("window_size", -1), ("window_size", (1,)),
    ("window_size", (1, 2, 3)), ("window_size", (-2, 0)), ("window_size", (1.0, 0)), ("window_size", "5"),
    ("window_size", True), ("window_size", (True, 0)), ("window_size", 5.0), ("sink_logits", [1.0]),
    ("sink_logits", [np.nan, 0.0]), ("sink_logits", [np.inf, 0.0]), ("sink_logits", [1e39, 0.0]),
    ("sink_logits", [[1.0], [2.0, 3.0]]), ("sink_logits", np.zeros((2, 1), np.float32)),
])
def test_bad_values(option, value):
    q, k, v = make(20, 40)
    for call in (salekit.sparse_attention, salekit.dense_attention):
        with pytest.raises(ArgumentError, match=f"^{option}: .*wants "):
            call(q, k, v, **{option: value})


@pytest.mark.parametrize("value", (np.array([True, False]), np.array([1j, 0]), 3.0, "ab"))
def test_sink_logits_that_are_no_numbers(value):
    with pytest.raises((ArgumentError, DtypeError), match="^sink_logits: got"):
        salekit.dense_attention(*make(20, 40), sink_logits=value)


@pytest.mark.parametrize("options", (dict(softcap=30.0), dict(window_size=8), dict(sink_logits=SINK_LOGITS)))
def test_low_bit_attention_has_none_of_them(options):
    with pytest.raises(ArgumentError, match="attend.*int8-fp8.*wants .*exact"):
        salekit.sparse_attention(*make(20, 40), attend="int8-fp8", **options)


def test_block_scores_know_neither_softcap_nor_windows():
    q, k, v = make(64, 64)
    for options in (dict(softcap=30.0), dict(window_size=8)):
        with pytest.raises(ArgumentError, match="plan: has softcap or a window"):
            salekit.scores_plan(salekit.make_plan(q, k, v, **options))


def test_every_row_is_tested_before_a_right_end():
    """A block that the last, untested rows alone see would else be lost to a head with a threshold of 0 in a list."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, n, 1, 64)).astype(np.float16) for n in (256, 512, 512))
    k[0, 416] = 2 * q[0, 127]
    options = dict(causal=False, window_size=(-1, 33), full_rows=0, local=0, dense_below=0, query_stride=4)
    assert salekit.make_plan(q, k, v, **options).query_stride == 1
    out, mask = salekit.sparse_attention(q, k, v, thresholds=[0.0], return_mask=True, **options)
    assert (mask.to_dense() == mask.visible()).all()
    assert np.abs(out.astype(np.float32) - salekit.dense_attention(
        q, k, v, causal=False, window_size=(-1, 33)).astype(np.float32)).max() < 2e-3
    for window in (None, (33, -1)):
        assert salekit.make_plan(q, k, v, **{**options, "window_size": window}).query_stride == 4


def test_caps_are_bounded():
    q, k, v = make(8, 8)
    salekit.make_plan(q, k, v, softcap=1e4)
    for cap in (1.0001e4, 1e8, -1.0, np.inf, np.nan):
        with pytest.raises(salekit.ArgumentError, match="softcap: got .*1e-37 to 10000|softcap: got"):
            salekit.make_plan(q, k, v, softcap=cap)
