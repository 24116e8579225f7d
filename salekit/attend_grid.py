"""How the attention kernels are launched: what exact and low-bit attention have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit
from .block_mask import BlockMask
from .plans import KEY_BLOCK, Plan, ceil_div

DENSE_BLOCK_Q = 128  # query rows of a CTA when there is no mask to say so
SM90_THREADS = 384  # a producer and two consumer warpgroups
SM90_TILE_KEYS = {64: 128, 96: 128, 128: 128, 192: 96, 256: 64}  # by head_dim: AttendTiles of attend_sm90.cu
RUN = 16  # neighbouring query blocks of a head before the next head: ATTEND_RUN of tile/attend_ring.cuh
SEGMENT_GRAIN = 1024 * KEY_BLOCK  # segments start at a multiple of as many keys
# Of K and V of a KV head. On an H100 (50 MB of L2) sparse calls take 1.04 times density times the dense time at 64 MB,
# 1.17 at 128 MB and 1.32 at 256 MB; in segments of 32 MB 1.09, 1.10 and 1.08, of 64 MB 1.13 and 1.13-1.14.
WHOLE_BYTES = 80 << 20  # up to here a sparse call attends all keys in one launch
SEGMENT_BYTES = 32 << 20
SEGMENTED_ITEMS = 512  # work items of a KV head from which on they meet the same keys often enough
SEGMENT = np.dtype([(name, "<i4") for name in ("first_item", "num_items", "first_block", "end_block")])
NULL = np.uint64(0)  # a pointer that a kernel does not read or write


def persistent_grid(plan: Plan) -> tuple[int, Any]:
    """How many CTAs Hopper's attention kernels get, and the counter that deals out further work items, or null."""
    num_items = plan.batch * plan.num_heads * ceil_div(plan.seqlen_q, DENSE_BLOCK_Q)
    num_ctas = min(num_items, jit.multiprocessors())
    return num_ctas, NULL if num_items == num_ctas else arrays.zeros((1,), np.uint32)


def whole_call(plan: Plan) -> np.ndarray:
    """The ``SEGMENT`` record of everything."""
    num_items = plan.batch * plan.num_heads * ceil_div(plan.seqlen_q, DENSE_BLOCK_Q)
    return np.array([(0, num_items, 0, 2**31 - 1)], SEGMENT)


def segment_starts(plan: Plan) -> list[int]:
    """First keys of the segments that a sparse call attends one after the other, so that their K and V fit the L2."""
    num_bytes = plan.seqlen_k * plan.head_dim * 4
    num_items = plan.group_size * ceil_div(plan.seqlen_q, DENSE_BLOCK_Q)
    is_whole = num_bytes <= WHOLE_BYTES or num_items < SEGMENTED_ITEMS or plan.has_window
    count = 1 if is_whole else ceil_div(num_bytes, SEGMENT_BYTES)
    starts = {round(i * plan.seqlen_k / count / SEGMENT_GRAIN) * SEGMENT_GRAIN for i in range(count)}
    return sorted(start for start in starts if start < plan.seqlen_k)


def segments(plan: Plan) -> list[np.ndarray]:
    """``SEGMENT`` records in the order of their launches: all of a KV head's segments, then the next KV head's.

    A segment has the work items that see its keys, rounded up to whole runs; those come first among a KV head's.
    """
    num_q_blocks = ceil_div(plan.seqlen_q, DENSE_BLOCK_Q)
    group = plan.num_heads // plan.num_kv_heads
    starts = segment_starts(plan)
    records = []
    for kv_head in range(plan.batch * plan.num_kv_heads):
        for start, end in zip(starts, [*starts[1:], plan.seqlen_k]):
            # The first segment has all rows: those that see no key at all are written there.
            unseen = max(0, (start - plan.seqlen_k + plan.seqlen_q) // DENSE_BLOCK_Q) if plan.causal and start else 0
            unseen = 0 if plan.has_lengths else unseen  # by what a sequence's rows see, which is not known here
            blocks = min(num_q_blocks, ceil_div(num_q_blocks - unseen, RUN) * RUN)
            first_item = kv_head * group * num_q_blocks
            record = (first_item, group * blocks, start // KEY_BLOCK, ceil_div(end, KEY_BLOCK))
            records.append(np.array([record], SEGMENT))
    return records


def carried_floats(plan: Plan, records: list[np.ndarray]) -> int:
    """What the rows of a KV head that are in more than one segment have summed between two of them, in floats."""
    num_items = max((int(record["num_items"][0]) for record in records if record["first_block"][0]), default=0)
    return num_items * DENSE_BLOCK_Q * 2 * (plan.head_dim // 8 + 1) * 4


def expand_log2(mask: BlockMask | None) -> int:
    """A mask bit stands for 2 ** this many 32-key blocks."""
    return 0 if mask is None else (mask.block_k // KEY_BLOCK).bit_length() - 1
