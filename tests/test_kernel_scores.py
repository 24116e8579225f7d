"""Softcap, sliding windows and sink logits in the kernels: each stage against the twin or float64, calls as a whole."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import score_oracle
from test_kernel_attend import FLOAT32_SHARE, ROUNDOFF, make_inputs, make_plan, on_gpu, poison, random_mask
from test_kernel_estimate import make_inputs as make_codes
from test_kernel_estimate import make_plan as make_estimate_plan
from test_kernel_estimate import poison_odd_groups
from test_kernel_estimate import run as run_estimate
from test_kernel_estimate import to_gpu as codes_to_gpu

import salekit
from salekit import attend_grid, codes, jit, reference
from salekit.block_mask import BlockMask
from salekit.plans import NATIVE_INT4_ARCHS, SELECT_ALL, SELECT_NONE, ceil_div

attend_module = importlib.import_module("salekit.attend")
anchors_module = importlib.import_module("salekit.anchors")

pytestmark = pytest.mark.gpu

EPS = 2.0**-24
CAP_ERROR = 2.0**-21  # of tanh from ex2.approx and rcp.approx: 2^-22, twice
FEATURES = {  # softcap, (left, right), whether there are sinks
    "softcap": (4.0, (-1, -1), False),
    "window": (0.0, (200, 90), False),
    "left": (0.0, (33, -1), False),
    "sinks": (0.0, (-1, -1), True),
    "softcap-window": (4.0, (300, 0), False),
    "softcap-sinks": (4.0, (-1, -1), True),
    "window-sinks": (0.0, (127, -1), True),
    "all": (4.0, (200, 90), True),
}
LENGTHS = ((1, 1), (1, 333), (64, 64), (127, 129), (333, 64), (300, 1), (640, 640), (129, 2500))


def plan_of(name, seqlen_q, seqlen_k, **options):
    softcap, (left, right), _ = FEATURES[name]
    if options.get("causal", True):
        right = -1
    return make_plan(seqlen_q, seqlen_k, softcap=softcap, window_left=left, window_right=right, **options)


def sinks_of(name, plan):
    if not FEATURES[name][2]:
        return None
    return np.linspace(-2, 4, plan.num_heads).astype(np.float32)


def window_of(plan):
    return plan.window_left, 0 if plan.causal else plan.window_right


def allowed_of(mask, plan, batch, head, seen):
    if mask is None:
        return seen
    wide = np.repeat(np.repeat(mask.to_dense()[batch, head], mask.block_q, 0), mask.block_k, 1)
    return seen & wide[: plan.seqlen_q, : plan.seqlen_k]


def check_attention(out, lse, q, k, v, mask, plan, sinks) -> None:
    """Against float64 within the bounds of test_kernel_attend, and what the cap adds to a score's error."""
    u, group = ROUNDOFF[plan.dtype], plan.group_size
    seen = score_oracle.visible(plan.seqlen_q, plan.seqlen_k, plan.causal, window_of(plan))
    for b in range(plan.batch):
        for h in range(plan.num_heads):
            rows, keys, values = (x.astype(np.float64) for x in (q[b, :, h], k[b, :, h // group], v[b, :, h // group]))
            sink = -np.inf if sinks is None else float(sinks[h])
            allowed = allowed_of(mask, plan, b, h, seen)
            want, want_lse, p = score_oracle.attend(
                rows, keys, values, allowed, plan.softmax_scale, plan.softcap, sink
            )
            got = out[b, :, h].astype(np.float64)
            # An error of e in each score moves p by a factor of exp(2e) at most.
            moved = 2.1 * plan.softcap * CAP_ERROR
            bound = (FLOAT32_SHARE * u + moved) * (np.abs(want) + p @ np.abs(values)) + 1e-6
            assert (np.abs(got - want) <= bound).all()
            if plan.seqlen_q >= 64:  # rows enough for their errors to be spread evenly
                assert np.linalg.norm(got - want) <= (u + moved) * np.linalg.norm(want) + 1e-30
            known = np.isfinite(want_lse)
            assert np.array_equal(np.isneginf(lse[b, h]), ~known)
            assert (got[~allowed.any(1)] == 0).all()
            size = plan.softmax_scale * (np.abs(rows) @ np.abs(keys).max(0))
            lse_bound = 2.0**-18 * (1 + size + plan.softcap + (0 if sinks is None else abs(sink)))
            assert (np.abs(lse[b, h][known] - want_lse[known]) <= lse_bound[known]).all()


def run(kernel, q, k, v, mask, plan, sinks, layout="bshd"):
    """out and lse of an attention kernel, on the host. Checks that nothing else is written."""
    import cupy

    if mask is not None:
        mask = BlockMask(cupy.asarray(mask.words), mask.block_q, mask.block_k, *mask_sizes(plan))
    batch, rows, heads, dim = q.shape
    shape = (batch, rows + 5, heads, dim) if layout == "bshd" else (batch, heads, rows + 5, dim)
    whole = cupy.empty(shape, q.dtype)
    out = (whole if layout == "bshd" else whole.transpose(0, 2, 1, 3))[:, :rows]
    lse = cupy.empty((batch, heads, rows), np.float32)
    poison(whole)
    poison(lse)
    views = [on_gpu(x, layout) for x in (q, k, v)]
    if kernel == "sm90" and jit.device_arch() != "sm_90a":
        pytest.skip("needs an sm_90 GPU")
    launch = {"sm80": attend_module._launch_sm80, "sm90": attend_module._launch_sm90}[kernel]
    launch(*views, mask, plan, out, lse, sink_logits=None if sinks is None else cupy.asarray(sinks))
    host = whole.get() if layout == "bshd" else whole.get().transpose(0, 2, 1, 3)
    assert (np.ascontiguousarray(host[:, rows:]).view(np.uint16) == 0xFFFF).all()
    return np.ascontiguousarray(host[:, :rows]), lse.get()


def mask_sizes(plan):
    return plan.seqlen_q, plan.seqlen_k, plan.causal, plan.window_left, plan.window_right


def visible_mask(plan, density, seed=1):
    """random_mask without the blocks that the window hides."""
    mask = random_mask(plan, density, seed)
    whole = BlockMask.from_dense(mask.to_dense(), plan.block_q, plan.block_k, *mask_sizes(plan))
    return BlockMask.from_dense(whole.to_dense() & whole.visible(), plan.block_q, plan.block_k, *mask_sizes(plan))


# --- attend ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", FEATURES)
def test_dense_attention(name, lengths, causal, kernel):
    plan = plan_of(name, *lengths, causal=causal)
    q, k, v = make_inputs(plan)
    sinks = sinks_of(name, plan)
    check_attention(*run(kernel, q, k, v, None, plan, sinks), q, k, v, None, plan, sinks)


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("block", ((64, 32), (128, 32), (64, 128), (128, 64)))
@pytest.mark.parametrize("name", ("softcap", "window", "sinks", "all"))
def test_random_masks(name, block, head_dim, dtype, kernel):
    plan = plan_of(name, 777, 1301, head_dim=head_dim, dtype=dtype, block_q=block[0], block_k=block[1], causal=False)
    q, k, v = make_inputs(plan)
    mask, sinks = visible_mask(plan, 0.4), sinks_of(name, plan)
    check_attention(*run(kernel, q, k, v, mask, plan, sinks), q, k, v, mask, plan, sinks)


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
@pytest.mark.parametrize("heads, kv_heads", ((4, 1), (6, 2)))
def test_batches_and_groups(heads, kv_heads, layout, kernel):
    plan = plan_of("all", 200, 333, batch=2, heads=heads, kv_heads=kv_heads, block_q=64)
    q, k, v = make_inputs(plan)
    sinks = sinks_of("all", plan)
    for mask in (None, visible_mask(plan, 0.4)):
        check_attention(*run(kernel, q, k, v, mask, plan, sinks, layout), q, k, v, mask, plan, sinks)


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("left", (0, 31, 5000, 40_000))
def test_long_windows_begin_anywhere(left, kernel):
    """Walks over more blocks than a list or a warp holds at once, that stop at the window."""
    plan = make_plan(70, 70_001, heads=1, kv_heads=1, head_dim=64, window_left=left)
    q, k, v = make_inputs(plan)
    dense = run(kernel, q, k, v, None, plan, None)
    check_attention(*dense, q, k, v, None, plan, None)
    everything = BlockMask.from_dense(np.ones((1, 1, 1, 2188), bool), 128, 32, *mask_sizes(plan))
    mask = BlockMask.from_dense(everything.to_dense() & everything.visible(), 128, 32, *mask_sizes(plan))
    for a, b in zip(dense, run(kernel, q, k, v, mask, plan, None)):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
def test_extreme_sinks(kernel):
    plan = make_plan(130, 260, heads=4, kv_heads=2)
    q, k, v = make_inputs(plan)
    sinks = np.array([-np.inf, 500.0, -500.0, 0.0], np.float32)
    out, lse = run(kernel, q, k, v, None, plan, sinks)
    check_attention(out, lse, q, k, v, None, plan, sinks)
    assert (out[:, :, 1].astype(np.float32) == 0).all() and (lse[:, 1] == 500).all()


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", ("softcap", "sinks", "all"))
def test_non_finite_input(name, value, kernel):
    plan = plan_of(name, 200, 300)
    q, k, v = make_inputs(plan)
    q[0, 150, 0, 3] = value
    sinks = sinks_of(name, plan)
    out = run(kernel, q, k, v, None, plan, sinks)[0].astype(np.float32)
    want = reference.attend(q, k, v, None, plan, sinks)[0].astype(np.float32)
    assert np.array_equal(np.isnan(out), np.isnan(want))
    finite = ~np.isnan(want)
    assert np.abs(out - want)[finite].max() <= 4 * ROUNDOFF["bfloat16"] * np.abs(v.astype(np.float32)).max()


@pytest.mark.parametrize("name", ("softcap", "sinks", "softcap-sinks"))
def test_segments(name, monkeypatch):
    """Over two segments of the keys, which a call this small does not have."""
    if jit.device_arch() != "sm_90a":
        pytest.skip("segments are Hopper's")
    plan = plan_of(name, 200, 33_000, block_q=128, head_dim=128)
    q, k, v = make_inputs(plan)
    mask, sinks = random_mask(plan, 0.1), sinks_of(name, plan)
    monkeypatch.setattr(attend_grid, "WHOLE_BYTES", 0)
    monkeypatch.setattr(attend_grid, "SEGMENTED_ITEMS", 0)
    monkeypatch.setattr(attend_grid, "SEGMENT_BYTES", attend_grid.SEGMENT_GRAIN * 128 * 4)
    assert len(attend_grid.segment_starts(plan)) > 1
    assert len(attend_grid.segment_starts(plan.replace(window_left=100))) == 1
    check_attention(*run("sm90", q, k, v, mask, plan, sinks), q, k, v, mask, plan, sinks)


# --- anchors and limits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (1, 333), (333, 64), (700, 900)))
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("name", FEATURES)
def test_anchor_statistics_follow_the_twin(name, head_dim, lengths, causal):
    import cupy

    for options in (dict(heads=2), dict(heads=6, kv_heads=2, sink=64, local=300)):
        plan = plan_of(name, *lengths, causal=causal, head_dim=head_dim, **options).replace(arch=jit.device_arch())
        q, k, _ = make_inputs(plan)
        sinks, k_mean = sinks_of(name, plan), reference.channel_means(k)
        want = reference.anchor_statistics(q, k, k_mean, plan, sinks)
        on_device = None if sinks is None else cupy.asarray(sinks)
        got = anchors_module.anchor_statistics(on_gpu(q), on_gpu(k), cupy.asarray(k_mean), plan, on_device)
        assert len(got) == len(want) == (3 if plan.softcap else 2)
        m, l, *shift = (x.get() for x in got)
        seen = np.isfinite(want[0])
        assert np.array_equal(np.isneginf(m), ~seen) and not l[~seen].any()
        # As in test_kernel_quantize, and the cap's error.
        norms = np.linalg.norm(q.astype(np.float64), axis=-1).max() * np.linalg.norm(k.astype(float), axis=-1).max()
        bound = plan.softmax_scale * norms * 4 * (head_dim + 2) * EPS + plan.softcap * CAP_ERROR
        assert np.abs(m - want[0])[seen].max(initial=0) <= bound
        assert (np.abs(l - want[1]) / np.maximum(want[1], 1))[seen].max(initial=0) <= 2 * bound + 400 * EPS
        if shift:
            assert np.abs(shift[0] - want[2])[seen].max(initial=0) <= bound


@pytest.mark.parametrize("tau", (0.0, 0.02, 1e9, np.inf))
@pytest.mark.parametrize("estimator", ("int8", "int4"))
@pytest.mark.parametrize("name", ("softcap", "all"))
def test_limits_follow_the_twin(name, estimator, tau):
    import cupy

    plan = plan_of(name, 600, 700, estimator=estimator, arch="sm_80")
    q, k, _ = make_inputs(plan)
    q[0, 5, 0, 0] = np.inf
    twin = reference.quantize(q, k, plan)
    m, l, shift = reference.anchor_statistics(q, k, twin.k_mean, plan, sinks_of(name, plan))
    want = anchors_module.row_limits(m, l, twin, tau, plan, shift)

    def pad(x, length):
        padded = np.ones((*x.shape[:-1], length), x.dtype)
        padded[..., : x.shape[-1]] = x
        return cupy.asarray(padded)

    q_scale = pad(twin.q_scale, plan.padded_q if estimator == "int8" else plan.padded_q // 2)
    moved = codes.Quantized(estimator, 8, None, None, q_scale, cupy.asarray(twin.k_scale), None)
    got = anchors_module.row_limits(*(cupy.asarray(x) for x in (m, l)), moved, tau, plan, cupy.asarray(shift)).get()
    got = got[..., : plan.seqlen_q]
    # The limit on capped scores is off by a few roundings; atanh makes of them what its slope is there.
    y = (m + np.log(np.float32(tau) * l)).astype(np.float64) if 0 < tau < np.inf else np.zeros(m.shape)
    ratio = np.clip(y / plan.softcap, -1, 1)
    off = (8 * EPS * (np.abs(m) + 20)) / plan.softcap + 4 * EPS
    steep = np.abs(np.abs(y / plan.softcap) - 1) <= 4 * off  # either side of the cap
    slope = 1 / np.maximum(1 - (np.abs(ratio) + off) ** 2, 1e-9)
    bound = 2 * plan.softcap * off * slope + 16 * EPS * (np.abs(shift) + plan.softcap * 10)
    if estimator == "int4":
        special = ~np.isfinite(want)
        allowed = bound
    else:
        special = np.isin(want, (SELECT_ALL, SELECT_NONE))
        unit = plan.softmax_scale * twin.q_scale * np.repeat(twin.k_scale, plan.group_size, 1)[:, :, None]
        allowed = 1 + bound / unit + 4 * EPS * np.abs(want.astype(np.float64))
    sure = ~steep
    assert np.array_equal(got[special & sure], want[special & sure])
    known = sure & ~special
    assert (np.abs(got[known].astype(np.float64) - want[known]) <= allowed[known]).all()
    assert steep.mean() < 0.1 and (tau != 0.02 or known.mean() > 0.3)
    everything = -np.inf if estimator == "int4" else SELECT_ALL
    assert got[0, 0, 5] == everything
    if tau == 1e9 and name == "softcap":  # above any capped score
        assert (got[0, 1, 100:] == (np.inf if estimator == "int4" else SELECT_NONE)).all()


# --- estimate --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", (("int8", 8), ("int8-sp24", 8), ("int4", 4), ("int4", 8)), ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (1, 333), (300, 70), (129, 2500), (640, 640), (500, 3100)))
@pytest.mark.parametrize("window", ((0, -1), (200, 90), (-1, 5), (1500, 40)))
def test_windowed_masks_are_the_twins(window, lengths, causal, path):
    estimator, code_bits = path
    left, right = window[0], -1 if causal else window[1]
    for options in (dict(block_q=64), dict(block_k=128, local=32, heads=4, kv_heads=2), dict(head_dim=64, sink=0)):
        plan = make_estimate_plan(
            estimator, *lengths, causal=causal, window_left=left, window_right=right, arch=jit.device_arch(), **options
        )
        assert not plan.q_is_sparse or not plan.has_window
        quantized, limits = make_codes(plan)
        check_windowed(plan, quantized, limits, code_bits)
        if estimator == "int4":
            poison_odd_groups(quantized, limits)
            check_windowed(plan, quantized, limits, code_bits)


def check_windowed(plan, quantized, limits, code_bits) -> None:
    if code_bits == 4 and plan.arch not in (*NATIVE_INT4_ARCHS, "sm_90a"):
        pytest.skip("packed int4 codes are not used on this GPU")
    if not plan.has_window:
        pytest.skip("the window is causal's")
    expected = reference.estimate(quantized, limits, plan)
    tiles, gpu_limits = codes_to_gpu(quantized, limits, plan, code_bits)
    assert np.array_equal(run_estimate(tiles, gpu_limits, plan, "auto"), expected.words)


# --- calls -----------------------------------------------------------------------------------------------------
def draw(seqlen_q, seqlen_k, heads=4, kv_heads=2, head_dim=128, seed=0):
    plan = make_plan(seqlen_q, seqlen_k, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return make_inputs(plan, seed)


def options_of(name, heads=4):
    softcap, window, with_sinks = FEATURES[name]
    options = dict(softcap=softcap, window_size=window)
    return {**options, **({"sink_logits": np.linspace(-2, 4, heads).astype(np.float32)} if with_sinks else {})}


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24", "int4"))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 700), (65, 63), (333, 900), (900, 900)))
@pytest.mark.parametrize("name", FEATURES)
def test_calls_follow_the_twin(name, lengths, causal, estimator):
    import cupy

    q, k, v = draw(*lengths)
    options = dict(
        options_of(name), causal=causal, estimator=estimator, thresholds=0.05, dense_below=0, local=32, block=(64, 32)
    )
    out, lse, mask = salekit.sparse_attention(
        *(cupy.asarray(x) for x in (q, k, v)), return_lse=True, return_mask=True, **options
    )
    twin = salekit.sparse_attention(q, k, v, return_mask=True, **options)[1]
    got = mask.to_numpy()
    # Codes differ where a rounding falls the other way; few blocks hang on one.
    different = (got.to_dense() != twin.to_dense()).sum()
    assert different <= 2 + 0.01 * twin.selected_blocks().sum()
    assert not (got.to_dense() & ~got.visible()).any()
    kept = {key: x for key, x in options.items() if key not in ("thresholds", "sink_logits")}
    plan = salekit.make_plan(q, k, v, **kept)
    check_attention(out.get(), lse.get(), q, k, v, got, plan, options.get("sink_logits"))


@pytest.mark.parametrize("name", FEATURES)
def test_query_strides_and_tau(name):
    import cupy

    q, k, v = draw(700, 900)
    on_device = [cupy.asarray(x) for x in (q, k, v)]
    for tau, stride in ((0.0, 1), (np.inf, 1), (0.05, 2), (0.05, 4)):
        options = dict(
            options_of(name), thresholds=tau, query_stride=stride, full_rows=100, dense_below=0, return_mask=True
        )
        got = salekit.sparse_attention(*on_device, **options)[1].to_numpy().to_dense()
        want = salekit.sparse_attention(q, k, v, **options)[1].to_dense()
        assert (got != want).sum() <= (0 if tau in (0.0, np.inf) else 2 + 0.01 * want.sum())


@pytest.mark.parametrize("name", ("sinks", "all"))
def test_sinks_on_the_host_and_on_the_gpu(name):
    import cupy

    q, k, v = (cupy.asarray(x) for x in draw(500, 700))
    options = options_of(name)
    sinks = options.pop("sink_logits")
    plan = salekit.plan(q, k, v, dense_below=0, **options)
    poisoned = cupy.empty(q.shape, q.dtype)
    results = []
    for logits in (sinks, sinks + 3):
        for given in (logits, logits.tolist(), cupy.asarray(logits)):
            poison(poisoned)
            out, lse = plan.run(q, k, v, thresholds=0.05, sink_logits=given, out=poisoned, return_lse=True)
            results.append((out.get().tobytes(), lse.get().tobytes()))
    assert len(set(results[:3])) == len(set(results[3:])) == 1 and results[0] != results[3]
    workspace = cupy.empty(plan.workspace_bytes, np.uint8)
    again = plan.run(q, k, v, thresholds=0.05, sink_logits=sinks, workspace=workspace).get()
    assert again.tobytes() == results[0][0]

    stream = cupy.cuda.Stream(non_blocking=True)
    device_sinks = cupy.asarray(sinks)
    with stream:
        plan.run(q, k, v, thresholds=0.05, sink_logits=device_sinks, out=poisoned)
        stream.begin_capture()
        plan.run(q, k, v, thresholds=0.05, sink_logits=device_sinks, out=poisoned)
        graph = stream.end_capture()
        device_sinks.set(sinks + 3)
        graph.launch(stream)
        stream.synchronize()
    assert poisoned.get().tobytes() == results[3][0]


def test_calls_without_keys():
    import cupy

    q, k, v = (cupy.asarray(x) for x in draw(70, 0))
    sinks = np.array([1, -np.inf, 3, 4], np.float32)
    for given in (sinks, cupy.asarray(sinks)):
        out, lse = salekit.dense_attention(q, k, v, sink_logits=given, return_lse=True)
        assert (out.get() == 0).all()
        assert np.array_equal(lse.get()[0], np.broadcast_to(sinks[:, None], (4, 70)))


@pytest.mark.parametrize("name", FEATURES)
def test_chunks_equal_the_whole(name):
    import cupy

    q, k, v = (cupy.asarray(x) for x in draw(700, 700))
    options = options_of(name)
    whole, lse = (x.get() for x in salekit.dense_attention(q, k, v, return_lse=True, **options))
    for start, end in ((0, 1), (1, 300), (300, 700)):
        part = salekit.dense_attention(q[:, start:end], k[:, :end], v[:, :end], return_lse=True, **options)
        got, got_lse = (x.get() for x in part)
        # p and out are rounded once each, to bfloat16, relative to sums in another order.
        limit = 4 * ROUNDOFF["bfloat16"] * np.abs(v.get().astype(np.float32)).max()
        assert np.abs(got.astype(np.float32) - whole[:, start:end].astype(np.float32)).max() <= limit
        assert np.abs(got_lse - lse[:, :, start:end]).max() <= 2.0**-14


def test_the_mask_of_a_dense_call_is_what_is_visible():
    import cupy

    # The first rows of the last case see 31 blocks, one fewer than a word has.
    for lengths, block in (
        ((333, 900), (64, 32)), ((70, 5000), (128, 64)), ((300, 70), (128, 128)), ((128, 1056), (64, 32))
    ):
        q, k, v = (cupy.asarray(x) for x in draw(*lengths))
        for causal, window in ((True, (100, 0)), (False, (100, 37)), (False, (-1, 3)), (False, (0, 0))):
            mask = salekit.sparse_attention(
                q, k, v, causal=causal, window_size=window, block=block, thresholds=0.0, return_mask=True
            )[1].to_numpy()
            want = np.broadcast_to(mask.visible(), (1, 4, *mask.visible().shape))
            assert np.array_equal(mask.to_dense(), want)
            assert mask.num_q_blocks == ceil_div(lengths[0], block[0])
