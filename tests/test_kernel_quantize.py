"""Quantisation, anchors and limits on the GPU against the twin, each within a derived bound."""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

import ml_dtypes  # noqa: E402

from salekit import codes, reference  # noqa: E402
from salekit.plans import SELECT_ALL, SELECT_NONE, Plan  # noqa: E402

EPS = 2.0**-24  # float32 unit roundoff
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_case(
    seqlen_q,
    seqlen_k,
    heads=4,
    kv_heads=2,
    batch=1,
    head_dim=128,
    dtype="bfloat16",
    estimator="int8",
    layout="bshd",
    seed=0,
    plant=None,
    **options,
):
    cp = pytest.importorskip("cupy")
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim)).astype(np.float32)
    k = (2 * rng.standard_normal((batch, seqlen_k, kv_heads, head_dim)) + 3 * rng.standard_normal(head_dim)).astype(
        np.float32
    )
    if plant:
        plant(q, k)
    q, k = q.astype(DTYPES[dtype]), k.astype(DTYPES[dtype])
    from salekit.jit import device_arch

    plan = Plan(
        batch,
        seqlen_q,
        seqlen_k,
        heads,
        kv_heads,
        head_dim,
        dtype,
        head_dim**-0.5,
        estimator=estimator,
        dense_below=0,
        arch=device_arch(),
        **options,
    )

    def move(x):
        if layout == "bhsd":
            return cp.asarray(np.ascontiguousarray(x.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
        return cp.asarray(x)

    return q, k, move(q), move(k), plan


CASES = [
    dict(seqlen_q=1, seqlen_k=1),
    dict(seqlen_q=127, seqlen_k=129, head_dim=64),
    dict(seqlen_q=1000, seqlen_k=1000, batch=2, layout="bhsd"),
    dict(seqlen_q=513, seqlen_k=2049, heads=8, kv_heads=1, dtype="float16"),
    dict(seqlen_q=2047, seqlen_k=511, heads=3, kv_heads=3, dtype="float16", head_dim=64),
]
ESTIMATORS = ("int8", "int8-sp24", "int4")


def stage(name):
    import importlib

    return importlib.import_module(f"salekit.{name}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_scales_follow_the_twin(case, estimator):
    q, k, q_gpu, k_gpu, plan = make_case(**case, estimator=estimator)
    want = reference.quantize(q, k, plan)
    got = stage("quantize").quantize(q_gpu, k_gpu, plan)
    # A mean of n float32 numbers summed in chunks: (32 + 32 + 1) roundings of at most the largest magnitude.
    top = np.abs(k.astype(np.float32)).max()
    assert np.abs(got.k_mean.get() - want.k_mean).max() <= 66 * EPS * top
    q_codes = codes.q_codes_to_rows(got, plan)
    k_codes = codes.tiles_to_rows(got.k_codes.get(), got.code_bits, plan.seqlen_k)
    # The means differ by rounding alone, so a code moves by at most one, and rarely; pruning may swap two near ties.
    assert np.abs(k_codes.astype(int) - want.k_codes).max() <= 1
    assert (k_codes != want.k_codes).mean() <= 1e-2
    if estimator == "int8":
        assert np.array_equal(q_codes, want.q_codes)
        assert np.array_equal(got.q_scale.get()[:, :, : plan.seqlen_q], want.q_scale)
    else:
        assert (q_codes != want.q_codes).mean() <= 1e-2
    for name, length in (("q_scale", want.q_scale.shape[-1]), ("k_scale", want.k_scale.shape[-1])):
        ours, twins = getattr(got, name).get()[..., :length], getattr(want, name)
        assert np.abs(ours - twins).max() <= 1e-5 * np.abs(twins).max() or estimator == "int8-sp24"
    if estimator == "int4":
        ours = got.correction.get()[:, :, : plan.seqlen_k]
        scale = np.abs(want.q_mean).sum() * top
        assert np.abs(ours - want.correction).max() <= 2 * plan.head_dim * EPS * scale
    # Rows past the end are zero codes: turn the tiles back with nothing dropped.
    if plan.q_is_sparse:
        rest = codes.sparse_to_rows(got.q_codes.get(), plan.padded_q)[:, :, plan.seqlen_q :]
    else:
        rest = codes.tiles_to_rows(got.q_codes.get(), got.code_bits, plan.padded_q)[:, :, plan.seqlen_q :]
    assert not rest.any()
    rest = codes.tiles_to_rows(got.k_codes.get(), got.code_bits, plan.padded_k)[:, :, plan.seqlen_k :]
    assert not rest.any()


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("block_q", (64, 128))
@pytest.mark.parametrize("stride, full_rows", ((2, 0), (4, 0), (2, 100), (4, 300), (4, 5000)))
def test_tested_rows_have_the_codes_of_all_rows(stride, full_rows, block_q, estimator):
    for lengths in ((1000, 1000), (129, 700), (2049, 300)):
        case = make_case(*lengths, estimator=estimator, query_stride=stride, full_rows=full_rows, block_q=block_q)
        q_gpu, k_gpu, plan = case[2:]
        some = stage("quantize").quantize(q_gpu, k_gpu, plan)
        whole_plan = plan.replace(query_stride=1)
        whole = stage("quantize").quantize(q_gpu, k_gpu, whole_plan)
        held = plan.row_of_position[plan.row_of_position >= 0]
        assert len(set(held)) == len(held) >= plan.seqlen_q // stride
        rows = [codes.q_codes_to_rows(x, p)[:, :, held] for x, p in ((some, plan), (whole, whole_plan))]
        assert np.array_equal(*rows)
        scales = [codes.spread_rows(x.q_scale.get(), p, 1)[:, :, held] for x, p in ((some, plan), (whole, whole_plan))]
        assert np.array_equal(*scales)


@pytest.mark.parametrize("arch", ("sm_80", None))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_ties_keep_the_lower_dims(head_dim, arch):
    """Weights of two sizes alone; one KV head's odd dims weigh four times as much as its even ones."""

    def plant(q, k):
        rng = np.random.default_rng(1)
        q[:] = rng.choice([-2, -1, 1, 2], q.shape)
        k[:] = rng.choice([-1, 1], (1, 1, 1, head_dim)) * rng.standard_normal(k.shape[:3])[..., None]
        k[:, :, 1, 1::2] *= 4

    q, k, q_gpu, k_gpu, plan = make_case(300, 1000, head_dim=head_dim, estimator="int8-sp24", plant=plant)
    if arch is not None:
        plan = plan.replace(arch=arch)
    want = reference.quantize(q, k, plan)
    got = stage("quantize").quantize(q_gpu, k_gpu, plan)
    assert np.array_equal(codes.q_codes_to_rows(got, plan), want.q_codes)
    assert np.array_equal(got.q_scale.get()[:, :, :300], want.q_scale)
    kept = (want.q_codes != 0).reshape(1, 2, 2, 300, head_dim // 4, 4).mean(axis=(0, 2, 3, 4))
    assert kept[0, 0] > 2 * kept[0, 3] and (kept[1, 1::2] == 1).all()


@pytest.mark.parametrize("seqlen_k", (1, 512, 513, 700, 1600))
def test_channel_statistics_of_keys_that_drift(seqlen_k):
    """Chunks of 512 keys with means far apart, so that what each weighs shows in rms."""

    def plant(q, k):
        k += 0.01 * np.arange(seqlen_k)[None, :, None, None]

    _, k, _, k_gpu, plan = make_case(1, seqlen_k, plant=plant)
    got = stage("quantize")._channel_statistics(k_gpu, plan, plan.lengths_of("k"), with_rms=True, with_amax=True)
    exact = k.astype(np.float64)
    mean = exact.mean(axis=1)
    amax = np.abs(exact - mean[:, None]).max(axis=(1, 3))
    wants = mean, np.sqrt(np.square(exact - mean[:, None]).mean(axis=1)), amax, np.where(amax == 0, 1, amax / 127)
    for ours, want in zip(got, wants):  # float32 sums over up to 512 keys, each of at most 66 numbers
        assert np.abs(ours.get() - want).max() <= 66 * EPS * np.abs(exact).max()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_codes_are_bitwise_repeatable(estimator):
    _, _, q_gpu, k_gpu, plan = make_case(700, 700, estimator=estimator)
    first = stage("quantize").quantize(q_gpu, k_gpu, plan)
    for _ in range(3):
        again = stage("quantize").quantize(q_gpu, k_gpu, plan)
        assert np.array_equal(first.q_codes.get(), again.q_codes.get())
        assert np.array_equal(first.k_codes.get(), again.k_codes.get())


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_anchor_statistics_follow_the_twin(case, causal):
    q, k, q_gpu, k_gpu, plan = make_case(**case, causal=causal)
    check_anchors(q, k, q_gpu, k_gpu, plan)


@pytest.mark.parametrize("sink, local", ((0, 0), (64, 256), (1, 33)))
def test_anchor_statistics_with_other_anchors(sink, local):
    check_anchors(*make_case(700, 900, sink=sink, local=local))


@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (6, 2), (8, 2), (8, 1), (12, 1)))
@pytest.mark.parametrize("stride, full_rows", ((1, 0), (2, 0), (4, 100), (4, 1024)))
@pytest.mark.parametrize("lengths", ((700, 900), (129, 130), (1500, 300)))
def test_anchor_statistics_of_tested_rows(lengths, stride, full_rows, heads):
    options = dict(heads=heads[0], kv_heads=heads[1], query_stride=stride, full_rows=full_rows)
    check_anchors(*make_case(*lengths, **options))
    if stride == 4:
        check_anchors(*make_case(*lengths, **options, local=256, causal=False))  # more keys than stay in shared memory


def test_anchor_statistics_of_many_short_heads():
    check_anchors(*make_case(70, 90, heads=16, kv_heads=16, batch=40, head_dim=64))  # several heads to each CTA


def check_anchors(q, k, q_gpu, k_gpu, plan):
    cp = pytest.importorskip("cupy")
    k_mean = reference.channel_means(k)
    m_twin, l_twin = reference.anchor_statistics(q, k, k_mean, plan)
    m, l = (x.get() for x in stage("anchors").anchor_statistics(q_gpu, k_gpu, cp.asarray(k_mean), plan))
    held = np.isin(np.arange(plan.seqlen_q), plan.row_of_position)
    assert np.array_equal(np.isneginf(m[..., held]), np.isneginf(m_twin[..., held]))
    seen = np.isfinite(m_twin) & held
    # A float32 dot of d terms: d + 1 roundings (tensor cores may truncate: twice that) of |q| . |k|, bounded by norms.
    norms = np.linalg.norm(q.astype(np.float64), axis=-1).max() * np.linalg.norm(k.astype(np.float64), axis=-1).max()
    bound = plan.softmax_scale * norms * 4 * (plan.head_dim + 2) * EPS
    assert np.abs(m[seen] - m_twin[seen]).max(initial=0) <= bound
    # l is a sum of exponentials whose arguments are off by twice that; ex2.approx adds 2^-22.
    assert (np.abs(l - l_twin) / np.maximum(l_twin, 1))[seen].max(initial=0) <= 2 * bound + 400 * EPS
    assert not l[..., held][~seen[..., held]].any()


# 60: the part of every other row ends within a code tile, before the last row.
@pytest.mark.parametrize("stride, full_rows", ((1, 0), (2, 0), (2, 60), (4, 100), (4, 1024)))
@pytest.mark.parametrize("tau", (0.0, 0.008, np.inf, "heads"))
@pytest.mark.parametrize("estimator", ("int8", "int4"))
def test_limits_follow_the_twin(estimator, tau, stride, full_rows):
    cp = pytest.importorskip("cupy")
    q, k, q_gpu, k_gpu, plan = make_case(700, 600, estimator=estimator, query_stride=stride, full_rows=full_rows)
    twin = reference.quantize(q, k, plan)
    m, l = reference.anchor_statistics(q, k, twin.k_mean, plan)
    tau_host = np.array([0.008, np.nan, -1, np.inf], np.float32) if tau == "heads" else float(tau)
    tau_gpu = cp.asarray(tau_host) if tau == "heads" else tau_host
    anchors = stage("anchors")
    want = anchors.row_limits(m, l, twin, tau_host, plan)

    def pad(x, length):
        full = np.ones((*x.shape[:-1], length), x.dtype)
        full[..., : x.shape[-1]] = x
        return cp.asarray(full)

    present = plan.row_of_position >= 0

    def by_position(x):
        held = np.ones((*x.shape[:-1], plan.num_positions), x.dtype)
        held[..., present] = x[..., plan.row_of_position[present]]
        return cp.asarray(held)

    moved = codes.Quantized(
        estimator,
        8,
        None,
        None,
        by_position(twin.q_scale) if estimator == "int8" else pad(twin.q_scale, plan.padded_q // 2),
        cp.asarray(twin.k_scale),
        None,
    )
    got = anchors.row_limits(cp.asarray(m), cp.asarray(l), moved, tau_gpu, plan).get()
    padding = got[:, :, ~present]
    got = codes.spread_rows(got, plan, np.inf if estimator == "int4" else SELECT_NONE)
    if estimator == "int4":
        assert np.isposinf(padding).all()
        assert np.array_equal(np.isinf(got), np.isinf(want)) and np.array_equal(
            got[np.isinf(got)], want[np.isinf(want)]
        )
        finite = np.isfinite(want)
        assert (
            np.abs(got[finite] - want[finite]).max(initial=0)
            <= 4 * EPS * np.abs(want[finite]).max(initial=1) + 8 * EPS * 20
        )
        return
    assert (padding == SELECT_NONE).all()
    special = np.isin(want, (SELECT_ALL, SELECT_NONE))
    assert np.array_equal(got[special], want[special])
    # y may differ by a few roundings (log is good to 1 ulp); T scales that, and the floor adds one.
    y_bound = 8 * EPS * (np.abs(m[np.isfinite(m)]).max() + 20)
    unit = plan.softmax_scale * twin.q_scale * np.repeat(twin.k_scale, plan.group_size, 1)[:, :, None]
    allowed = 1 + y_bound / unit + 4 * EPS * np.abs(want.astype(np.float64))
    assert (np.abs(got.astype(np.float64) - want) <= allowed)[~special].all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("q", "k"))
def test_non_finite_rows_and_heads_select_everything(where, value, estimator):
    def plant(q, k):
        if where == "q":
            q[0, 300, 1, 5] = value
        else:
            k[0, 200, 0, 7] = value

    q, k, q_gpu, k_gpu, plan = make_case(500, 500, estimator=estimator, plant=plant)
    quantized = stage("quantize").quantize(q_gpu, k_gpu, plan)
    m, l = stage("anchors").anchor_statistics(q_gpu, k_gpu, quantized.k_mean, plan)
    limits = stage("anchors").row_limits(m, l, quantized, float("inf"), plan)  # inf: only what must be selected is
    everything = codes.spread_rows(limits.get() == (-np.inf if estimator == "int4" else SELECT_ALL), plan, False)
    want = np.zeros_like(everything)
    if where == "q":
        want[0, 1, 300] = True
        # int4 smooths q: a non-finite row makes its head's mean non-finite, but anchors are of the raw q.
    else:
        want[0, :2] = True
    assert np.array_equal(everything, want)


def test_zero_and_tiny_groups():
    def plant(q, k):
        q[0, 10] = 0
        q[0, 11] = 1e-39
        k[0, :, 0] = 1.5  # constant: k' is 0 everywhere

    q, k, q_gpu, k_gpu, plan = make_case(200, 200, plant=plant)
    want = reference.quantize(q, k, plan)
    got = stage("quantize").quantize(q_gpu, k_gpu, plan)
    assert np.array_equal(got.q_scale.get()[:, :, :200], want.q_scale)
    assert (want.q_scale[0, :, 10:12] == 1).all() and want.k_scale[0, 0] == 1
    assert np.array_equal(codes.tiles_to_rows(got.q_codes.get(), 8, 200), want.q_codes)
    assert np.array_equal(got.k_scale.get(), want.k_scale) or np.allclose(got.k_scale.get(), want.k_scale, rtol=1e-5)
