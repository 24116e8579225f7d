"""Segments of long sparse calls: each work item meets each of its key blocks once, in order."""

from __future__ import annotations

import numpy as np
import pytest

from salekit import attend_grid
from salekit.plans import Plan, ceil_div


def make_plan(seqlen_q: int, seqlen_k: int, causal: bool = True, batch: int = 1, head_dim: int = 128) -> Plan:
    return Plan(batch, seqlen_q, seqlen_k, 6, 2, head_dim, "bfloat16", head_dim**-0.5, causal=causal)


def q_blocks_of(items: np.ndarray, plan: Plan) -> np.ndarray:
    """What Rows of tile/attend_ring.cuh makes of work items."""
    num_q_blocks, group = ceil_div(plan.seqlen_q, 128), plan.num_heads // plan.num_kv_heads
    run, in_run = np.divmod(items % (group * num_q_blocks), group * attend_grid.RUN)
    first = run * attend_grid.RUN
    return num_q_blocks - 1 - (first + in_run % np.minimum(attend_grid.RUN, num_q_blocks - first))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k",
    ((2**18, 2**18), (2**20, 2**20), (200_001, 200_001), (500, 300_000), (300_000, 290_000), (1, 2**19)),
)
def test_each_item_meets_its_blocks_once(seqlen_q, seqlen_k, causal, batch, monkeypatch):
    monkeypatch.setattr(attend_grid, "SEGMENTED_ITEMS", 0)
    plan = make_plan(seqlen_q, seqlen_k, causal, batch)
    records = attend_grid.segments(plan)
    assert len(records) > batch * plan.num_kv_heads
    num_q_blocks = ceil_div(seqlen_q, 128)
    carried_items = attend_grid.carried_floats(plan, records) / (128 * 2 * 17 * 4)
    reached = np.zeros(batch * plan.num_heads * num_q_blocks, np.int64)
    done = 2**31
    for record in records:
        first, count, begin, end = (int(x) for x in record[0])
        assert begin % 1024 == 0 and begin < end
        items = np.arange(first, first + count)
        last_rows = np.minimum((q_blocks_of(items, plan) + 1) * 128, seqlen_q) - 1
        keys = np.clip(last_rows + seqlen_k - seqlen_q + 1, 0, seqlen_k) if causal else np.full(count, seqlen_k)
        visible = -(-keys // 32)
        sees = (visible > begin) | (begin == 0)  # others are done
        assert (reached[items[sees]] == begin).all() and (reached[items[~sees]] == done).all()
        assert not begin or (items[sees] - first < carried_items).all()
        reached[items[sees]] = np.where(visible > end, end, done)[sees]  # an output once no segment follows
    assert (reached == done).all()
    assert len({int(record["first_item"][0]) for record in records}) == batch * plan.num_kv_heads


def test_segments_follow_the_size_of_k_and_v():
    assert attend_grid.segment_starts(make_plan(2**17, 2**17)) == [0]
    assert attend_grid.segment_starts(make_plan(2**18, 2**18)) == [0, 2**16, 2**17, 3 * 2**16]
    assert attend_grid.segment_starts(make_plan(2**18, 2**18, head_dim=64)) == [0]
    assert attend_grid.segment_starts(make_plan(1, 5)) == [0]
    assert attend_grid.segment_starts(make_plan(1, 2**20)) == [0]
    assert len(attend_grid.segment_starts(make_plan(2**20, 2**20))) == 16
