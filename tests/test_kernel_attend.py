"""attend_sm80 against attention in float64 under the same mask."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest

from salekit.block_mask import BlockMask
from salekit.plans import BLOCKS, Plan, ceil_div

attend_module = importlib.import_module("salekit.attend")  # the package's attribute of that name is the function

pytestmark = pytest.mark.gpu

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Unit roundoff. p and out are rounded once each: |error| <= u * (sum p|v| + |out|), and an error in norm of about
# sqrt(2 / 3) * u, as the errors of both are spread evenly and independent. Float32 work adds less than 5%.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT32_SHARE = 1.05


def make_plan(seqlen_q, seqlen_k, *, batch=1, heads=2, kv_heads=1, head_dim=128, dtype="bfloat16", **options) -> Plan:
    return Plan(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        dtype=dtype, softmax_scale=head_dim**-0.5, dense_below=0, **options,
    )


def make_inputs(plan: Plan, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q_shape = (plan.batch, plan.seqlen_q, plan.num_heads, plan.head_dim)
    k_shape = (plan.batch, plan.seqlen_k, plan.num_kv_heads, plan.head_dim)
    dtype = DTYPES[plan.dtype]
    q = (1.5 * rng.standard_normal(q_shape, np.float32)).astype(dtype)
    k = rng.standard_normal(k_shape, np.float32).astype(dtype)
    v = (rng.standard_normal(k_shape, np.float32) + 0.25).astype(dtype)
    return q, k, v


def random_mask(plan: Plan, density: float, seed: int = 1) -> BlockMask:
    """Random visible blocks. The first head has an empty query block; the blocks of the last are few and far apart."""
    rng = np.random.default_rng(seed)
    bits = rng.random((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks)) < density
    bits[:, 0, plan.num_q_blocks // 2] = False
    bits[:, -1] &= rng.random(bits[:, -1].shape) < 0.3
    return pack(bits, plan)


def pack(bits: np.ndarray, plan: Plan) -> BlockMask:
    mask = BlockMask.from_dense(bits, plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal)
    return BlockMask.from_dense(
        bits & mask.visible(), plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k, plan.causal
    )


def all_selected(plan: Plan) -> BlockMask:
    return pack(np.ones((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks), bool), plan)


def finite_size(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), np.abs(x), 0)


def oracle(q, k, v, mask: BlockMask | None, plan: Plan):
    """Float64 attention: out, lse, and the bounds on their |error|."""
    bits = None if mask is None else mask.to_dense()
    group = plan.num_heads // plan.num_kv_heads
    seen = np.arange(plan.seqlen_k)[None] <= np.arange(plan.seqlen_q)[:, None] + plan.seqlen_k - plan.seqlen_q
    if not plan.causal:
        seen[:] = True
    out = np.zeros(q.shape)
    bound = np.zeros(q.shape)
    lse = np.full((plan.batch, plan.num_heads, plan.seqlen_q), -np.inf)
    lse_bound = np.zeros(lse.shape)
    u = ROUNDOFF[plan.dtype]
    with np.errstate(all="ignore"):
        for b in range(plan.batch):
            for h in range(plan.num_heads):
                kv = h // group
                rows, keys, values = (x.astype(np.float64) for x in (q[b, :, h], k[b, :, kv], v[b, :, kv]))
                allowed = seen
                if bits is not None:
                    wide = np.repeat(np.repeat(bits[b, h], mask.block_q, 0), mask.block_k, 1)
                    allowed = seen & wide[: plan.seqlen_q, : plan.seqlen_k]
                scores = np.where(allowed, plan.softmax_scale * (rows @ keys.T), -np.inf)
                top = scores.max(1, keepdims=True)
                p = np.exp(scores - np.where(top == -np.inf, 0, top))
                total = p.sum(1, keepdims=True)
                empty = total == 0
                p /= np.where(empty, 1, total)
                out[b, :, h] = p @ values
                bound[b, :, h] = FLOAT32_SHARE * u * (np.abs(out[b, :, h]) + p @ np.abs(values)) + 1e-6
                lse[b, h] = np.where(empty, -np.inf, top + np.log(total))[:, 0]
                # Float32 sums of head_dim products and a float32 exponent: 2^-18 leaves them five bits.
                size = plan.softmax_scale * (finite_size(rows) @ finite_size(keys).max(0))
                lse_bound[b, h] = 2.0**-18 * (1 + size)
    return out, lse, bound, lse_bound


def poison(array) -> None:
    array.data.memset(0xFF, array.nbytes)  # NaN in every dtype here


def on_gpu(x: np.ndarray, layout: str = "bshd"):
    """A bshd view of a larger array whose other rows and heads are NaN."""
    import cupy

    batch, rows, heads, dim = x.shape
    padded = np.full((batch, rows + 37, heads + 1, dim), np.nan, np.float32).astype(x.dtype)
    padded[:, :rows, :heads] = x
    order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
    return cupy.asarray(np.ascontiguousarray(padded.transpose(order))).transpose(order)[:, :rows, :heads]


def run(q, k, v, mask: BlockMask | None, plan: Plan, layout: str = "bshd", stages: int | None = None):
    """out (bshd) and lse of the kernel, on the host. Checks that nothing else is written."""
    import cupy

    if mask is not None:
        mask = BlockMask(
            cupy.asarray(mask.words), mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal
        )
    batch, rows, heads, dim = q.shape
    if layout == "bshd":
        whole = cupy.empty((batch, rows + 5, heads, dim), q.dtype)
        out = whole[:, :rows]
    else:
        whole = cupy.empty((batch, heads, rows + 5, dim), q.dtype)
        out = whole.transpose(0, 2, 1, 3)[:, :rows]
    lse = cupy.empty((batch, heads, rows + 5), np.float32)
    poison(whole)
    poison(lse)
    used_lse = cupy.empty((batch, heads, rows), np.float32)
    poison(used_lse)
    views = [on_gpu(x, layout) for x in (q, k, v)]
    if run.kernel == "sm90":
        from salekit import jit

        if stages is not None or jit.device_arch() != "sm_90a":
            pytest.skip("the Hopper kernel has fixed stages and needs an sm_90 GPU")
        attend_module._launch_sm90(*views, mask, plan, out, used_lse)
    else:
        attend_module._launch_sm80(*views, mask, plan, out, used_lse, stages)
    host = whole.get() if layout == "bshd" else whole.get().transpose(0, 2, 1, 3)
    assert (host[:, rows:].copy().view(np.uint16) == 0xFFFF).all()
    return np.ascontiguousarray(host[:, :rows]), used_lse.get()


@pytest.fixture(autouse=True, params=("sm80", "sm90"))
def kernel(request, monkeypatch):
    """Every test runs both kernels."""
    monkeypatch.setattr(run, "kernel", request.param, raising=False)


def check(result, q, k, v, mask, plan) -> None:
    out, lse = result
    want, want_lse, bound, lse_bound = oracle(q, k, v, mask, plan)
    got = out.astype(np.float64)
    assert (np.isnan(got) == np.isnan(want)).all()
    finite = ~np.isnan(want)
    error = np.where(finite, np.abs(got - want), 0)
    assert (error <= np.where(finite, bound, 0)).all()
    norm = np.linalg.norm(np.where(finite, want, 0))
    assert np.linalg.norm(error) <= ROUNDOFF[plan.dtype] * norm + 1e-30
    empty = np.isneginf(want_lse)
    assert (np.isneginf(lse) == empty).all()
    assert (got.transpose(0, 2, 1, 3)[empty] == 0).all()
    known = np.isfinite(want_lse)
    assert (np.abs(np.where(known, lse, 0) - np.where(known, want_lse, 0)) <= lse_bound).all()
    assert np.isnan(lse[np.isnan(want_lse)]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", (0.1, 0.5))
def test_random_masks(block, density, head_dim, dtype):
    plan = make_plan(777, 1301, head_dim=head_dim, dtype=dtype, block_q=block[0], block_k=block[1])
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, density)
    assert 0 < mask.density().max() < 0.9
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("stages", (1, 2))
@pytest.mark.parametrize("block_q", (64, 128))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_stages_give_the_same_bits(head_dim, block_q, stages):
    plan = make_plan(500, 900, head_dim=head_dim, block_q=block_q)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.4)
    result = run(q, k, v, mask, plan, stages=stages)
    check(result, q, k, v, mask, plan)
    default = run(q, k, v, mask, plan)
    for a, b in zip(result, default):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (1, 333), (64, 64), (127, 129), (333, 64), (300, 1), (640, 640)))
def test_dense_lengths(lengths, causal):
    plan = make_plan(*lengths, causal=causal)
    q, k, v = make_inputs(plan)
    check(run(q, k, v, None, plan), q, k, v, None, plan)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 333), (333, 64), (129, 2500), (640, 640)))
def test_masked_lengths(lengths, causal):
    plan = make_plan(*lengths, causal=causal, block_q=64)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.4)
    assert mask.density().max() < 0.9
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
@pytest.mark.parametrize("heads, kv_heads", ((2, 2), (4, 1), (8, 1), (6, 2)))
def test_batch_and_groups(heads, kv_heads, layout):
    plan = make_plan(200, 333, batch=2, heads=heads, kv_heads=kv_heads, block_q=64)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.4)
    assert mask.density().max() < 0.9
    check(run(q, k, v, mask, plan, layout), q, k, v, mask, plan)


@pytest.mark.parametrize("masked", (True, False))
def test_more_work_than_multiprocessors(masked):
    """CTAs of the Hopper kernel take one work item after the other, and fetch the next one's queries meanwhile."""
    from salekit import jit

    plan = make_plan(300, 420, batch=4, heads=16, kv_heads=4)
    assert plan.batch * plan.num_heads * ceil_div(plan.seqlen_q, 128) > jit.multiprocessors()
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.4) if masked else None
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("block_k", (32, 64, 128))
def test_all_selected_is_dense(block_k, causal):
    plan = make_plan(515, 1111, causal=causal, block_k=block_k)
    q, k, v = make_inputs(plan)
    dense, masked = run(q, k, v, None, plan), run(q, k, v, all_selected(plan), plan)
    for a, b in zip(dense, masked):
        assert a.tobytes() == b.tobytes()


def test_block_k_does_not_matter():
    coarse_plan = make_plan(400, 1500, block_k=128)
    fine_plan = coarse_plan.replace(block_k=32)
    q, k, v = make_inputs(coarse_plan)
    coarse = random_mask(coarse_plan, 0.3)
    fine = pack(np.repeat(coarse.to_dense(), 4, -1)[..., : fine_plan.num_k_blocks], fine_plan)
    for a, b in zip(run(q, k, v, coarse, coarse_plan), run(q, k, v, fine, fine_plan)):
        assert a.tobytes() == b.tobytes()


def test_nothing_selected():
    plan = make_plan(200, 400)
    q, k, v = make_inputs(plan)
    mask = pack(np.zeros((1, 2, plan.num_q_blocks, plan.num_k_blocks), bool), plan)
    out, lse = run(q, k, v, mask, plan)
    assert (out.astype(np.float32) == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("density", (0.02, 0.6))
@pytest.mark.parametrize("stages", (1, 2))
def test_list_is_refilled(density, stages):
    """Rows longer than the list of blocks in shared memory, which leave an odd block over now and then."""
    plan = make_plan(70, 70_001, heads=3, kv_heads=1, head_dim=64, block_q=64)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, density)
    check(run(q, k, v, mask, plan, stages=stages), q, k, v, mask, plan)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", ("q", "k"))
def test_non_finite_reaches_the_output(name, value):
    plan = make_plan(300, 300)
    q, k, v = make_inputs(plan)
    (q if name == "q" else k)[0, 150, 0, 3] = value
    mask = random_mask(plan, 0.6)
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)
    dense = run(q, k, v, None, plan)
    assert np.isnan(dense[0].astype(np.float32)).any()
    check(dense, q, k, v, None, plan)


def test_large_scores():
    plan = make_plan(130, 260, dtype="bfloat16")
    q, k, v = make_inputs(plan)
    q = (q.astype(np.float32) * 64).astype(q.dtype)
    mask = random_mask(plan, 0.5)
    out, lse = run(q, k, v, mask, plan)
    want, want_lse, _, lse_bound = oracle(q, k, v, mask, plan)
    # An error of e in a score moves p by e: the float32 sum of a score comes before its rounding to 16 bits.
    scale = np.abs(v.astype(np.float32)).max()
    tolerance = scale * (2 * ROUNDOFF["bfloat16"] + 2 * lse_bound.transpose(0, 2, 1)[..., None])
    assert (np.abs(out.astype(np.float64) - want) <= tolerance).all()
    known = np.isfinite(want_lse)
    assert (np.abs(lse[known] - want_lse[known]) <= lse_bound[known]).all()


@pytest.mark.parametrize("block_q", (64, 128))
def test_scores_far_below_zero(block_q):
    """Negative scores alone, which rise to where the walk ends by more than float32's exponents reach."""
    plan = make_plan(200, 2000, dtype="float16", block_q=block_q)
    q, k, v = (x.astype(np.float32) for x in make_inputs(plan))
    q = 1 + 0.1 * q
    k = -np.linspace(0.5, 16, plan.seqlen_k, dtype=np.float32)[None, :, None, None] * (1 + 0.1 * k)
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    largest = plan.softmax_scale * np.einsum("id,jd->ij", q[0, :, 0].astype(float), k[0, :, 0].astype(float)).max()
    assert largest < 0
    for mask in (random_mask(plan, 0.4), None):
        check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("masked", (True, False))
def test_runs_are_equal(masked):
    plan = make_plan(700, 1400, heads=8, kv_heads=2)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.3) if masked else None
    first = run(q, k, v, mask, plan)
    for _ in range(2):
        for a, b in zip(first, run(q, k, v, mask, plan)):
            assert a.tobytes() == b.tobytes()


def test_stride_of_a_single_row():
    """DLPack producers give axes of size 1 a stride of 1."""
    import cupy

    plan = make_plan(1, 1)
    q, k, v = make_inputs(plan)
    views = [cupy.asarray(x) for x in (q, k, v)]
    views = [
        cupy.ndarray(x.shape, x.dtype, memptr=x.data, strides=(*x.strides[:1], 2, *x.strides[2:])) for x in views
    ]
    out, lse = attend_module.attend(*views, None, plan, return_lse=True)
    check((out.get(), lse.get()), q, k, v, None, plan)


@pytest.mark.parametrize("block_q", (64, 128))
def test_public_function(block_q):
    import cupy

    plan = make_plan(260, 520, block_q=block_q)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.4)
    device_mask = BlockMask(cupy.asarray(mask.words), block_q, 32, 260, 520, True)
    on_device = [cupy.asarray(x) for x in (q, k, v)]
    out, lse = attend_module.attend(*on_device, device_mask, plan, return_lse=True)
    check((out.get(), lse.get()), q, k, v, mask, plan)
    given = cupy.empty(q.shape, q.dtype)
    poison(given)
    result, nothing = attend_module.attend(*on_device, device_mask, plan, out=given)
    assert result is given and nothing is None
    check((given.get(), lse.get()), q, k, v, mask, plan)
    sources = {spec.source for spec in attend_module.kernel_specs(plan)}
    assert "attend_sm80" in sources
    assert ceil_div(260, block_q) == mask.num_q_blocks
