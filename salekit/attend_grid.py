"""How the attention kernels are launched: what exact and low-bit attention have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, jit
from .block_mask import BlockMask
from .plans import KEY_BLOCK, Plan, ceil_div

DENSE_BLOCK_Q = 128  # query rows of a CTA when there is no mask to say so
SM90_THREADS = 384  # a producer and two consumer warpgroups
NULL = np.uint64(0)  # a pointer that a kernel does not read or write


def persistent_grid(plan: Plan) -> tuple[int, Any]:
    """How many CTAs Hopper's attention kernels get, and the counter that deals out further work items, or null."""
    num_items = plan.batch * plan.num_heads * ceil_div(plan.seqlen_q, DENSE_BLOCK_Q)
    num_ctas = min(num_items, jit.multiprocessors())
    return num_ctas, NULL if num_items == num_ctas else arrays.zeros((1,), np.uint32)


def expand_log2(mask: BlockMask | None) -> int:
    """A mask bit stands for 2 ** this many 32-key blocks."""
    return 0 if mask is None else (mask.block_k // KEY_BLOCK).bit_length() - 1
