"""What each way of choosing blocks multiplies before attention, in units of the exact q.k product of visible pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import reference
from ..plans import Plan
from ..skipped_mass import POOL_KEYS
from ..work import keys_seen_whole, rows_of_blocks
from .field import FLEXPREFILL_ROWS, MINFERENCE_ROWS

EXACT_BITS = 16


class Product(NamedTuple):
    """Multiply-adds of one head over those of its exact q.k product, the bits of the factors, and what they are for."""

    operations: float
    bits: int
    what: str


def equivalent(products: list[Product]) -> float:
    """Multiply-adds weighed by their bits: a product of b bits counts b / 16."""
    return sum(product.operations * product.bits / EXACT_BITS for product in products)


def none(plan: Plan) -> list[Product]:
    return []


def whole(plan: Plan) -> list[Product]:
    return [Product(1.0, EXACT_BITS, "q.k")]


def estimator(plan: Plan, name: str, query_stride: int) -> list[Product]:
    """2:4 pruning halves the products of int8-sp24; a stride skips rows but for the last full_rows."""
    tested = plan.replace(query_stride=query_stride)
    seen = np.clip(np.arange(plan.seqlen_q) + plan.offset + 1, 0, plan.seqlen_k)
    share = float(seen[reference.rows_that_vote(tested)].sum() / max(1, plan.visible_pairs))
    bits = 4 if name == "int4" else 8
    return [Product(share * (0.5 if name == "int8-sp24" else 1), bits, "estimate"), _anchors(plan)]


def _anchors(plan: Plan) -> Product:
    """The statistics of step 2: every row with the anchor keys of its 64-row tile."""
    keys = sum(len(reference.anchor_keys(plan, tile)) for tile in range(plan.num_q_tiles))
    return Product(64 * keys / max(1, plan.visible_pairs), EXACT_BITS, "anchor statistics")


def minference(plan: Plan) -> list[Product]:
    return [_rows(plan, MINFERENCE_ROWS)]


def flexprefill(plan: Plan) -> list[Product]:
    """Of a query-aware head; a vertical-slash head goes without the last one."""
    pooled = (plan.num_k_blocks + int(plan.visible_blocks.sum())) / max(1, plan.visible_pairs)
    return [_rows(plan, FLEXPREFILL_ROWS), Product(pooled, EXACT_BITS, "pooled q.k")]


def xattention(plan: Plan, stride: int) -> list[Product]:
    return [Product(1 / stride, EXACT_BITS, "antidiagonals")]


def sparge(plan: Plan) -> list[Product]:
    """The similarity by the length of the mean unit row; the authors' kernel multiplies whole Gram matrices."""
    pairs = max(1, plan.visible_pairs)
    return [
        Product(int(plan.visible_blocks.sum()) / pairs, EXACT_BITS, "pooled q.k"),
        Product((plan.seqlen_q + plan.seqlen_k) / pairs, EXACT_BITS, "self-similarity"),
    ]


def quest(plan: Plan) -> list[Product]:
    return [Product(2 / plan.block_k, EXACT_BITS, "bounds of pages")]


def pools(plan: Plan) -> list[Product]:
    """Of ``skipped="pool"``: over all that a block's rows see together, whatever is selected, as kernels multiply."""
    seen, pairs = keys_seen_whole(plan), max(1, plan.visible_pairs)
    extra_keys = int((rows_of_blocks(plan) * -(-seen // POOL_KEYS)).sum())
    return [
        Product(3 * int(seen.sum()) / pairs, EXACT_BITS, "mean query.k, pooled k and v"),
        Product(2 * extra_keys / pairs, EXACT_BITS, "q.pooled k, p.pooled v"),
    ]


def _rows(plan: Plan, count: int) -> Product:
    rows = min(count, plan.seqlen_q)
    return Product(rows * plan.seqlen_k / max(1, plan.visible_pairs), EXACT_BITS, f"last {rows} rows")
