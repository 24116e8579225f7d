"""mean_queries, pool_skipped and attend_pools against the twin: what skipped="pool" adds to attention."""

from __future__ import annotations

import numpy as np
import pytest
from test_kernel_attend import ROUNDOFF, attend_module, make_inputs, make_plan, on_gpu, pack, poison

import salekit
from salekit import arrays, jit, programs, reference, skipped_mass
from salekit.block_mask import BlockMask
from salekit.plans import BLOCKS

pytestmark = pytest.mark.gpu


def anchored_mask(plan, density: float, seed: int = 1) -> BlockMask:
    """Random bits, and those of blocks that only some rows of a query block see, as ``estimate`` sets them."""
    rng = np.random.default_rng(seed)
    bits = rng.random((plan.batch, plan.num_heads, plan.num_q_blocks, plan.num_k_blocks)) < density
    ends = np.minimum((np.arange(plan.num_k_blocks) + 1) * plan.block_k, plan.seqlen_k)
    if plan.causal:
        seen = np.arange(plan.num_q_blocks) * plan.block_q + plan.offset + 1
        bits |= ends[None] > seen[:, None]
    return pack(bits, plan)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that the stages ask for is full of NaN."""

    allocate = arrays.empty

    def empty(shape, dtype=np.float32):
        import cupy

        if programs.active():
            return allocate(shape, dtype)
        array = cupy.empty(shape, dtype)
        if array.size:
            poison(array)
        return array

    monkeypatch.setattr(arrays, "empty", empty)


@pytest.fixture(autouse=True, params=("this GPU's", "portable"))
def kernels(request, monkeypatch):
    """Every test runs both kernels that pool."""
    monkeypatch.setattr(run, "arch", "sm_80" if request.param == "portable" else jit.device_arch(), raising=False)


def run(q, k, v, mask: BlockMask, plan, layout: str = "bshd"):
    """out (bshd) and lse, on the host."""
    import cupy

    words = cupy.asarray(mask.words)
    mask = BlockMask(words, mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal)
    views = [on_gpu(x, layout) for x in (q, k, v)]
    out, lse = attend_module.attend(*views, mask, plan.replace(skipped="pool", arch=run.arch), return_lse=True)
    return out.get(), lse.get()


def twin(q, k, v, mask: BlockMask, plan):
    return skipped_mass.attend_with_pools(q, k, v, mask, plan, skipped_mass.blocks_of_a_pool(mask))


def check(result, q, k, v, mask, plan) -> None:
    """Next to the twin, both of which round the outputs twice; the kernels round pooled keys and values, too, and the
    weights that go into them. Each of these is off by unit roundoff at most, evenly spread; they are independent."""
    out, lse = (x.astype(np.float64) for x in result)
    want, want_lse = (x.astype(np.float64) for x in twin(q, k, v, mask, plan))
    assert (np.isnan(out) == np.isnan(want)).all()
    assert (np.isneginf(lse) == np.isneginf(want_lse)).all() and (np.isnan(lse) == np.isnan(want_lse)).all()
    u, known, finite = ROUNDOFF[plan.dtype], np.isfinite(want_lse), np.isfinite(want)
    out, want = (np.where(finite, x, 0) for x in (out, want))
    error = np.abs(out - want)
    assert np.linalg.norm(error) <= 3 * u * np.linalg.norm(want)
    assert error.max() <= 8 * u * np.abs(np.where(np.isfinite(v), v, 0).astype(np.float64)).max()
    # A pooled key is off by u of itself, which the bias makes good for the mean query alone.
    off = np.abs(np.where(known, lse, 0) - np.where(known, want_lse, 0))
    assert np.sqrt(np.square(off).mean()) <= 2 * u
    plain, _ = reference.attend(q, k, v, mask, plan)
    pooled = np.linalg.norm(np.where(finite, plain.astype(np.float64) - want, 0))
    assert pooled == 0 or pooled >= 10 * np.linalg.norm(error)  # there is something that the kernels could miss


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("block", BLOCKS)
def test_random_masks(block, head_dim, dtype):
    plan = make_plan(777, 1301, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, block_q=block[0], block_k=block[1])
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.3)
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("heads, kv_heads, batch", ((1, 1, 1), (3, 1, 2), (12, 1, 1), (4, 4, 3), (10, 2, 1)))
def test_heads_and_batches(heads, kv_heads, batch):
    plan = make_plan(515, 901, heads=heads, kv_heads=kv_heads, batch=batch)
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.2)
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("seqlen_q, seqlen_k", ((1, 4000), (65, 63), (200, 90), (129, 129), (2049, 2049), (130, 5001)))
@pytest.mark.parametrize("causal", (True, False))
def test_lengths(seqlen_q, seqlen_k, causal):
    plan = make_plan(seqlen_q, seqlen_k, causal=causal, dtype="float16")
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.2)
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("density", (0.0, 1.0))
def test_nothing_or_everything_skipped(density):
    plan = make_plan(700, 1100, causal=False, dtype="float16")
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, density)
    assert mask.density().max() == density
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


def test_large_scores():
    """The second order reaches its limit."""
    plan = make_plan(400, 2000, dtype="float16")
    q, k, v = make_inputs(plan)
    q = (4 * q).astype(q.dtype)
    mask = anchored_mask(plan, 0.3)
    out, lse = run(q, k, v, mask, plan)
    want, want_lse = (x.astype(np.float64) for x in twin(q, k, v, mask, plan))
    # A score is off by u * |q - q'| * |pooled key|, some 2^-11 * 8; it moves out by as much of the values' spread.
    assert np.linalg.norm(out - want) <= 8 * 2.0**-11 * np.linalg.norm(want)
    assert np.abs(lse - want_lse).max() <= 8 * 2.0**-11 * 8


def test_layouts_are_the_same():
    plan = make_plan(300, 800, heads=4, kv_heads=2)
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.2)
    for a, b in zip(run(q, k, v, mask, plan), run(q, k, v, mask, plan, "bhsd")):
        assert a.tobytes() == b.tobytes()


def test_what_is_not_finite():
    plan = make_plan(515, 900, dtype="float16")
    q, k, v = make_inputs(plan)
    q[0, 140, 0, 5] = np.nan  # its block does not select everything here: the row alone is lost
    q[0, 300, 1, 2] = np.inf
    v[0, 10, 0, 3] = np.inf  # nowhere selected
    v[0, 20, 0, 4] = -np.inf
    v[0, 600, 0, 7] = np.nan
    v[0, 880:, 0, 9] = np.nan  # past what most rows see
    bits = anchored_mask(plan, 0.3).to_dense()
    bits[..., 0] = False
    mask = pack(bits, plan)
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


def test_in_turns(monkeypatch):
    plan = make_plan(3000, 3000, heads=6, kv_heads=2, batch=2)
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.1)
    whole = run(q, k, v, mask, plan)
    check(whole, q, k, v, mask, plan)
    assert len(skipped_mass.turns(plan, 128)) == 1
    monkeypatch.setattr(skipped_mass, "POOL_BYTES", 3 << 20)
    assert len(skipped_mass.turns(plan, 128)) >= 3
    for a, b in zip(whole, run(q, k, v, mask, plan)):
        assert a.tobytes() == b.tobytes()


def test_twenty_runs_are_the_same():
    plan = make_plan(1500, 1500, heads=4, kv_heads=2)
    q, k, v = make_inputs(plan)
    mask = anchored_mask(plan, 0.2)
    first = run(q, k, v, mask, plan)
    for _ in range(19):
        for a, b in zip(first, run(q, k, v, mask, plan)):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "options", ({}, {"block": (64, 64), "estimator": "int4"}, {"query_stride": 4, "causal": False})
)
def test_whole_calls(options):
    """A call's pools are those of its own mask; with lse or without, planned or staged."""
    import cupy

    if run.arch != jit.device_arch():
        pytest.skip("a call takes what suits the GPU")

    sample = [salekit.load_sample()[name][:, :2048] for name in "qkv"]
    gpu = [cupy.asarray(x) for x in sample]
    options = {"dense_below": 0, "estimator": "int8", **options}
    out, lse, mask = salekit.sparse_attention(
        *gpu, thresholds=0.1, skipped="pool", return_lse=True, return_mask=True, **options
    )
    assert mask.density().mean() < 0.6
    plan = salekit.make_plan(*sample, **options)
    check((out.get(), lse.get()), *sample, BlockMask(
        mask.words.get(), mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal
    ), plan)
    alone = salekit.sparse_attention(*gpu, thresholds=0.1, skipped="pool", **options)
    assert alone.tobytes() == out.tobytes()
    dropped = salekit.sparse_attention(*gpu, thresholds=0.1, **options).get().astype(np.float64)
    dense = salekit.dense_attention(*gpu).get().astype(np.float64)
    if options.get("causal", True):  # what the model's heads were made for
        assert np.linalg.norm(out.get() - dense) <= 0.8 * np.linalg.norm(dropped - dense)


def test_low_bit_attention_with_pools():
    import cupy

    if run.arch != "sm_90a":
        pytest.skip("low-bit attention needs an sm_90 GPU")
    gpu = [cupy.asarray(salekit.load_sample()[name]) for name in "qkv"]
    options = dict(thresholds=0.1, dense_below=0, skipped="pool", return_lse=True)
    exact, exact_lse = (x.get().astype(np.float64) for x in salekit.sparse_attention(*gpu, **options))
    low, lse = (x.get().astype(np.float64) for x in salekit.sparse_attention(*gpu, attend="int8-fp8", **options))
    assert np.linalg.norm(low - exact) <= 0.04 * np.linalg.norm(exact)
    assert np.abs(lse - exact_lse).max() <= 0.1  # e4m3 sums round p
