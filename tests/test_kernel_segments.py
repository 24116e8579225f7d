"""attend_sm90 over segments of the keys: against float64, and against one launch over all keys."""

from __future__ import annotations

import numpy as np
import pytest
from test_kernel_attend import ROUNDOFF, attend_module, check, make_inputs, make_plan, pack, random_mask, run

from salekit import attend_grid, jit

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    if jit.device_arch() != "sm_90a":
        pytest.skip("needs an sm_90 GPU")
    monkeypatch.setattr(run, "kernel", "sm90", raising=False)


@pytest.fixture
def in_segments(monkeypatch):
    """Calls to make the segments as short as they get: 32K keys."""

    def shorten(plan) -> int:
        monkeypatch.setattr(attend_grid, "WHOLE_BYTES", 0)
        monkeypatch.setattr(attend_grid, "SEGMENTED_ITEMS", 0)
        monkeypatch.setattr(attend_grid, "SEGMENT_BYTES", attend_grid.SEGMENT_GRAIN * plan.head_dim * 4)
        return len(attend_grid.segment_starts(plan))

    return shorten


@pytest.mark.parametrize("head_dim, block_q", ((64, 128), (96, 64), (128, 64), (128, 128), (192, 128), (256, 64)))
@pytest.mark.parametrize("causal, density", ((True, 0.4), (True, 0.01), (False, 0.05)))
def test_few_rows_many_keys(head_dim, block_q, causal, density, in_segments):
    plan = make_plan(190, 70_001, head_dim=head_dim, block_q=block_q, causal=causal)
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, density)
    assert in_segments(plan) == 2
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


@pytest.mark.parametrize("dtype, block", (("float16", (64, 128)), ("bfloat16", (128, 32))))
@pytest.mark.parametrize("causal, heads, kv_heads, batch", ((True, 4, 2, 1), (True, 3, 1, 2), (False, 2, 2, 1)))
def test_same_as_one_launch(dtype, block, causal, heads, kv_heads, batch, in_segments):
    plan = make_plan(
        66_100 if causal else 4000, 100_003 if causal else 131_072, batch=batch, heads=heads, kv_heads=kv_heads,
        dtype=dtype, causal=causal, block_q=block[0], block_k=block[1],
    )
    q, k, v = make_inputs(plan)
    mask = random_mask(plan, 0.05)
    whole = run(q, k, v, mask, plan)
    assert in_segments(plan) in (3, 4)
    first = run(q, k, v, mask, plan)
    # Both round p and out once: p by what it is relative to, which the order of the keys decides.
    out, wanted = (x[0].astype(np.float64) for x in (first, whole))
    assert np.linalg.norm(out - wanted) <= 2 * ROUNDOFF[dtype] * np.linalg.norm(wanted)
    assert np.abs(out - wanted).max() <= 4 * ROUNDOFF[dtype] * np.abs(v.astype(np.float32)).max()
    assert (np.isneginf(first[1]) == np.isneginf(whole[1])).all()
    known = np.isfinite(whole[1])
    assert np.abs(first[1][known] - whole[1][known]).max() <= 1e-4
    for a, b in zip(first, run(q, k, v, mask, plan)):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("where", ("first segment", "last segment", "nothing", "one in each"))
def test_rows_with_keys_in_some_segments(where, in_segments):
    plan = make_plan(700, 98_304, heads=2)
    q, k, v = make_inputs(plan)
    bits = np.zeros((1, 2, plan.num_q_blocks, plan.num_k_blocks), bool)
    grain = attend_grid.SEGMENT_GRAIN // 32
    if where == "first segment":
        bits[..., 5] = True
    elif where == "last segment":
        bits[..., 2 * grain + 3] = True
    elif where == "one in each":
        bits[..., ::grain] = True
    mask = pack(bits, plan)
    assert in_segments(plan) == 3
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


def test_non_finite_values_stay_where_they_are_selected(in_segments):
    plan = make_plan(300, 70_000)
    q, k, v = make_inputs(plan)
    k[0, 40, 0, 3] = np.nan
    mask = random_mask(plan, 0.1)
    assert in_segments(plan) == 2
    check(run(q, k, v, mask, plan), q, k, v, mask, plan)


def test_a_recorded_call(in_segments):
    import cupy

    import salekit

    plan = make_plan(66_000, 66_000)
    q, k, v = (cupy.asarray(x) for x in make_inputs(plan))
    whole = salekit.sparse_attention(q, k, v, dense_below=0)
    assert in_segments(plan) == 2
    prepared = salekit.plan(q, k, v, dense_below=0, full_rows=512)
    wanted = salekit.make_plan(q, k, v, dense_below=0, full_rows=512)
    codes = salekit.quantize(q, k, wanted)
    limits = salekit.row_limits(*salekit.anchor_statistics(q, k, codes.k_mean, wanted), codes, 0.008, wanted)
    staged, _ = attend_module.attend(q, k, v, salekit.estimate(codes, limits, wanted), wanted)
    for _ in range(3):
        out = prepared.run(q, k, v, thresholds=0.008)
        assert out.tobytes() == staged.tobytes()
    assert np.abs(out.get().astype(np.float32) - whole.get().astype(np.float32)).max() <= 0.1
