"""How much each kernel of a call has to do: operations of matrix products and bytes, counted from a Plan. No GPU.

Operations are those of visible pairs (docs/kernels.md): ``4 * head_dim`` for attention and ``2 * head_dim`` for
estimation and anchors, per pair and query head; of estimation and anchors, pairs of the rows that query_stride tests.
Pools of skipped blocks take ``6 * head_dim`` for each mean query and key that all rows of its block see, whatever is
selected, and ``4 * head_dim`` for each row and pool.
What runs on CUDA cores is not counted. Bytes are the least that a kernel moves: each input read once, each output
written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Mapping

import numpy as np

from .anchors import kernel_specs as anchor_specs
from .attend import is_segment, sm80_grid
from .attend import kernel_specs as attend_specs
from .attend_grid import DENSE_BLOCK_Q
from .codes import sparse_steps
from .estimate import kernel_specs as estimate_specs
from .jit import KernelSpec
from .plans import CODE_TILE_ROWS, KEY_BLOCK, TILE_ROWS, Plan, ceil_div, padded_dim
from .quantize import kernel_specs as quantize_specs
from .reference import LOW_BIT_Q_SAMPLE, rows_that_vote
from .skipped_mass import POOL_KEYS
from .skipped_mass import kernel_specs as pool_specs

BF16, FP16, S8, SPARSE_S8, E4M3, S4 = "bf16", "fp16", "s8", "s8-2:4", "e4m3", "s4"
UNITS = (BF16, FP16, S8, SPARSE_S8, E4M3, S4)  # kinds of tensor core products; s8-2:4 counts as if nothing were pruned

_FLOAT = 4  # bytes; also of an int32 and of a mask word
_HALF = 2
_REDUCE_ROWS = 512  # REDUCE_ROWS of reduce_channels.cu
_KEY_BOUNDS = 592  # sizeof(KeyBounds) of tile/group_bounds.cuh
_KEY_FACTS = POOL_KEYS + 4  # KEY_FACTS of tile/pools.cuh
_ROWS_AT_ONCE = 2**18  # that are counted; whole blocks of any size
_POOL_TERMS = 2  # floats of PoolTerms of tile/pools.cuh


@dataclass(frozen=True)
class Work:
    """One launch, or the launches over segments of the keys, or over turns of the pools.

    stage: "quantize", "anchors", "estimate", "attend", "pool" or "dense"; of_what: the tensor it is for, where a stage
    launches a kernel several times; threads: of a CTA; operations: of each unit; read, written: bytes.
    """

    stage: str
    spec: KernelSpec
    of_what: str
    threads: int
    read: int
    written: int
    operations: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.source} ({self.of_what})" if self.of_what else self.spec.source

    @property
    def num_bytes(self) -> int:
        return self.read + self.written

    @property
    def num_operations(self) -> int:
        return sum(self.operations.values())


def sparse_work(plan: Plan, selected_pairs: int) -> list[Work]:
    """The launches of a sparse call, in order.

    selected_pairs: visible pairs in the selected blocks, over batches and query heads (:func:`pairs_at` has those of a
    density). Arrays are taken to be contiguous; 4-byte fills between the launches are not counted.
    """
    sizes = _Sizes(plan)
    return [
        *_quantize(sizes),
        *_anchors(sizes),
        *_estimate(sizes),
        *_attend(sizes, "attend", selected_pairs, sizes.words(plan.block_k)),
        *(_pools(sizes) if plan.skipped == "pool" else ()),
    ]


def dense_work(plan: Plan) -> list[Work]:
    """The launch of an exact call that attends to everything."""
    exact = plan.replace(attend="exact", skipped="drop", block_q=DENSE_BLOCK_Q)
    return list(_attend(_Sizes(exact), "dense", exact.visible_pairs * exact.batch * exact.num_heads, 0))


def pairs_at(plan: Plan, density: float) -> tuple[int, float]:
    """(selected pairs over batches and query heads, density) for that share of the visible blocks in each head.

    A mask has its anchors at least: a smaller density becomes theirs.
    """
    visible = int(plan.visible_blocks.sum())
    blocks = min(visible, max(anchor_blocks(plan), round(density * visible)))
    return plan.selected_pairs(blocks) * plan.batch * plan.num_heads, blocks / visible if visible else 0.0


def pairs_of(plan: Plan, selected_blocks: Iterable[int]) -> int:
    """Selected pairs over batches and query heads, from the set blocks of each."""
    return sum(plan.selected_pairs(int(count)) for count in selected_blocks)


def anchor_blocks(plan: Plan) -> int:
    """Blocks of a head's mask that hold an anchor and a visible pair."""
    tiles = plan.block_q // TILE_ROWS
    total = 0
    for row, visible in enumerate(plan.visible_blocks.tolist()):
        kept = [(0, ceil_div(plan.sink_end, plan.block_k))]
        for tile in range(row * tiles, min((row + 1) * tiles, plan.num_q_tiles)):
            begin, end = plan.local_range(tile)
            if begin < end:
                kept.append((begin // plan.block_k, ceil_div(end, plan.block_k)))
        done = 0
        for begin, end in sorted(kept):
            end = min(end, visible)
            total += max(0, end - max(begin, done))
            done = max(done, end)
    return total


# --- pairs of a head ---------------------------------------------------------------------------------------------
def tested_pairs(plan: Plan) -> int:
    """Visible pairs of the rows that query_stride tests."""
    return sum(int(limits.sum()) for _, limits in _tested_rows(plan))


def anchor_pairs(plan: Plan) -> int:
    """Visible pairs of those rows and their anchor keys."""
    total = 0
    for rows, limits in _tested_rows(plan):
        first = rows[0] // TILE_ROWS
        tiles = np.array([plan.local_range(tile) for tile in range(first, rows[-1] // TILE_ROWS + 1)], np.int64)
        begin, end = tiles[rows // TILE_ROWS - first].T
        end, sink = np.minimum(limits, end), np.minimum(limits, plan.sink_end)
        local, both = np.maximum(0, end - begin), np.maximum(0, np.minimum(sink, end) - begin)
        total += int((local + sink - both).sum())
    return total


def anchor_keys(plan: Plan) -> int:
    """Keys that are an anchor of some tile: the sink, and the local ranges, which follow one another without a gap."""
    if not plan.num_q_tiles:
        return plan.sink_end
    begin, end = plan.local_range(0)[0], plan.local_range(plan.num_q_tiles - 1)[1]
    return plan.sink_end + end - begin - max(0, min(plan.sink_end, end) - begin)


def keys_seen_whole(plan: Plan) -> np.ndarray:
    """int64 [num_q_blocks]: keys that all rows of a query block see: what they skip of them is pooled."""
    first_rows = range(0, plan.seqlen_q, plan.block_q)
    return np.array([plan.visible_keys(row + 1) for row in first_rows], np.int64)


def rows_of_blocks(plan: Plan) -> np.ndarray:
    """int64 [num_q_blocks]"""
    first_rows = np.arange(0, plan.seqlen_q, plan.block_q, dtype=np.int64)
    return np.minimum(plan.block_q, plan.seqlen_q - first_rows)


def _tested_rows(plan: Plan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows that query_stride tests, how many keys each of them sees), int64, some rows at a time."""
    for first in range(0, plan.seqlen_q, _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, plan.seqlen_q), dtype=np.int64)
        rows = rows[rows_that_vote(plan, rows)]
        seen = rows + plan.offset + 1 if plan.causal else np.full_like(rows, plan.seqlen_k)
        if rows.size:
            yield rows, np.minimum(seen, plan.seqlen_k)


# --- launches, in the order of the stages ------------------------------------------------------------------------
class _Sizes:
    """Bytes of what the stages of a plan hand on."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.heads, self.kv_heads = plan.batch * plan.num_heads, plan.batch * plan.num_kv_heads
        self.half = BF16 if plan.dtype == "bfloat16" else FP16
        self.q = self.heads * plan.seqlen_q * plan.head_dim * _HALF
        self.k = self.kv_heads * plan.seqlen_k * plan.head_dim * _HALF
        self.q_channels = self.heads * plan.head_dim * _FLOAT
        self.k_channels = self.kv_heads * plan.head_dim * _FLOAT
        self.held_rows = int((plan.row_of_position >= 0).sum()) if plan.holds_tested_rows else plan.seqlen_q
        self.held_q = self.heads * self.held_rows * plan.head_dim * _HALF
        self.statistics = 2 * self.heads * self.held_rows * _FLOAT  # m and l
        self.limits = self.heads * plan.num_positions * _FLOAT
        self.lse = self.heads * plan.seqlen_q * _FLOAT

    def words(self, block_k: int) -> int:
        plan = self.plan
        return self.heads * plan.num_q_blocks * ceil_div(ceil_div(plan.seqlen_k, block_k), 32) * _FLOAT

    def partials(self, heads: int, seqlen: int, kinds: int = 4) -> int:
        """Of reduce_channels; kinds: how many of its four statistics."""
        return heads * ceil_div(seqlen, _REDUCE_ROWS) * kinds * self.plan.head_dim * _FLOAT

    # What later stages read of the codes.
    @property
    def q_codes(self) -> int:
        plan = self.plan
        if plan.q_is_sparse:  # two of four codes and two bits for the place of each
            return self.heads * plan.num_positions * 64 * sparse_steps(plan.head_dim) * 5 // 8
        return self.heads * plan.num_positions * plan.code_row_bytes

    @property
    def k_codes(self) -> int:
        return self.kv_heads * self.plan.padded_k * self.plan.code_row_bytes

    @property
    def q_scale(self) -> int:
        plan = self.plan
        return self.heads * (plan.padded_q // 2 if plan.estimator == "int4" else plan.num_positions) * _FLOAT

    @property
    def k_scale(self) -> int:
        plan = self.plan
        return self.kv_heads * (plan.padded_k // 8 if plan.estimator == "int4" else 1) * _FLOAT

    @property
    def correction(self) -> int:
        return self.heads * self.plan.padded_k * _FLOAT

    @property
    def bounds(self) -> int:
        return self.heads * self.plan.padded_k // CODE_TILE_ROWS * _KEY_BOUNDS


def _quantize(sizes: _Sizes) -> Iterator[Work]:
    plan = sizes.plan
    reduce, finish, q_spec, k_spec, *_ = quantize_specs(plan)  # then for statistics of keys that are given

    def statistics(of_what: str, values: int, heads: int, seqlen: int, kinds: int, outputs: int) -> Iterator[Work]:
        yield Work("quantize", reduce, of_what, 256, values, sizes.partials(heads, seqlen))
        yield Work("quantize", finish, of_what, 4 * plan.head_dim, sizes.partials(heads, seqlen, kinds), outputs)

    if plan.estimator == "int4":
        yield from statistics("k", sizes.k, sizes.kv_heads, plan.seqlen_k, 3, sizes.k_channels)
        yield from statistics("q", sizes.q, sizes.heads, plan.seqlen_q, 3, sizes.q_channels)
        q_means = sizes.q_channels
        yield Work("quantize", q_spec, "q", 256, sizes.q + q_means, sizes.q_codes + sizes.q_scale)
        read = sizes.k + sizes.k_channels + q_means
        threads, written = 2 * padded_dim(plan.head_dim), sizes.k_codes + sizes.k_scale + sizes.correction
        yield Work("quantize", k_spec, "k", threads, read, written)
        return
    pruned = plan.estimator == "int8-sp24"
    rms = sizes.k_channels if pruned else 0
    scales = 2 * sizes.kv_heads * _FLOAT  # amax and the scale that comes of it
    kinds = 4 if pruned else 3
    yield from statistics("k", sizes.k, sizes.kv_heads, plan.seqlen_k, kinds, sizes.k_channels + rms + scales)
    yield Work("quantize", q_spec, "q", 256, sizes.held_q + rms, sizes.q_codes + sizes.q_scale)
    amax = sizes.kv_heads * _FLOAT
    yield Work("quantize", k_spec, "k", 256, sizes.k + sizes.k_channels + amax, sizes.k_codes)


def _anchors(sizes: _Sizes) -> Iterator[Work]:
    plan = sizes.plan
    main, *_, limits = anchor_specs(plan)
    read = sizes.held_q + sizes.kv_heads * anchor_keys(plan) * plan.head_dim * _HALF + sizes.k_channels
    operations = {sizes.half: 2 * plan.head_dim * sizes.heads * anchor_pairs(plan)}
    threads = 416 if main.source == "anchor_statistics_sm90" else 128
    yield Work("anchors", main, "", threads, read, sizes.statistics, operations)
    scales = 0 if plan.estimator == "int4" else sizes.q_scale + sizes.k_scale
    yield Work("anchors", limits, "", 128, sizes.statistics + scales, sizes.limits)


def _estimate(sizes: _Sizes) -> Iterator[Work]:
    plan = sizes.plan
    specs = iter(estimate_specs(plan))
    spec = next(specs)
    groups = 0
    if plan.estimator == "int4":
        groups = sizes.q_scale + sizes.k_scale + sizes.correction
        if spec.source == "prepare_int4_bounds":
            yield Work("estimate", spec, "", CODE_TILE_ROWS, sizes.k_scale + sizes.correction, sizes.bounds)
            spec, groups = next(specs), groups + sizes.bounds
    unit = S4 if plan.code_bits == 4 else SPARSE_S8 if plan.q_is_sparse else S8
    operations = {unit: 2 * plan.head_dim * sizes.heads * tested_pairs(plan)}
    read = sizes.q_codes + sizes.k_codes + sizes.limits + groups
    fine = sizes.words(KEY_BLOCK)
    threads = 128 if spec.source == "estimate_sm80" else 384
    yield Work("estimate", spec, "", threads, read, fine, operations)
    for coarsen in specs:
        yield Work("estimate", coarsen, "", 256, fine, sizes.words(plan.block_k))


def _attend(sizes: _Sizes, stage: str, pairs: int, words: int) -> Iterator[Work]:
    """pairs: over batches and query heads; words: bytes of the mask."""
    plan = sizes.plan
    products = 2 * plan.head_dim * pairs  # q.k, and as many p.v
    specs = attend_specs(plan)
    lse = sizes.lse if plan.skipped == "pool" else 0  # which the pools join
    if plan.attend == "exact":
        threads = sm80_grid(plan, plan.block_q)[1] if specs[0].source == "attend_sm80" else 384
        read = sizes.q + 2 * sizes.k + words
        segment = next((spec for spec in specs if is_segment(spec)), None)
        spec = segment if segment and words else specs[0]
        yield Work(stage, spec, "", threads, read, sizes.q + lse, {sizes.half: 2 * products})
        return
    reduce, balance, q_spec, k_spec, v_spec, main = specs[:6]
    sampled = ceil_div(plan.seqlen_q, LOW_BIT_Q_SAMPLE)
    q_part = sizes.heads * sampled * plan.head_dim * _HALF
    partials = 0
    for of_what, values, heads, seqlen in (
        ("q", q_part, sizes.heads, sampled),
        ("k", sizes.k, sizes.kv_heads, plan.seqlen_k),
        ("v", sizes.k, sizes.kv_heads, plan.seqlen_k),
    ):
        yield Work(stage, reduce, of_what, 256, values, sizes.partials(heads, seqlen))
        partials += sizes.partials(heads, seqlen, 3)
    channels = sizes.k_channels
    balances = 2 * channels  # of k and of q
    yield Work(stage, balance, "", 8 * plan.head_dim, partials, channels + balances + 2 * channels)
    q_codes, q_scale = sizes.heads * plan.padded_q * plan.head_dim, sizes.heads * plan.padded_q * _FLOAT
    k_codes = sizes.kv_heads * plan.padded_k * plan.head_dim
    k_scale = sizes.kv_heads * plan.padded_k // KEY_BLOCK * 4 * _FLOAT
    v_codes = sizes.kv_heads * plan.padded_k * (plan.head_dim + 8)  # eight channels are ones
    row_shift = q_scale if lse else 0
    yield Work(stage, q_spec, "q", 128, sizes.q + 2 * channels, q_codes + q_scale + row_shift)
    yield Work(stage, k_spec, "k", 128, sizes.k + 2 * channels, k_codes + k_scale)
    yield Work(stage, v_spec, "v", 128, sizes.k + channels, v_codes)
    read = q_codes + q_scale + row_shift + k_codes + k_scale + v_codes + channels + words
    yield Work(stage, main, "", 384, read, sizes.q + lse, {S8: products, E4M3: products})


def _pools(sizes: _Sizes) -> Iterator[Work]:
    """Of pools those that a block's rows attend to; a strip's last block has the kernels make a few more."""
    plan = sizes.plan
    seen, rows = keys_seen_whole(plan), rows_of_blocks(plan)
    pools = -(-seen // POOL_KEYS)
    if not pools.any():
        return
    *facts, means, pool, attending = _in_order(pool_specs(plan))
    mean_bytes = sizes.heads * plan.num_q_blocks * plan.head_dim * _HALF
    yield Work("pool", means, "", 128, sizes.q, mean_bytes)
    read = mean_bytes + 2 * sizes.k + sizes.words(plan.block_k)
    for spec in facts:
        fact_bytes = sizes.kv_heads * ceil_div(plan.seqlen_k, POOL_KEYS) * _KEY_FACTS * _FLOAT
        yield Work("pool", spec, "", 128, 2 * sizes.k, fact_bytes)
        read += fact_bytes
    pool_bytes = sizes.heads * int(pools.sum()) * (2 * plan.head_dim * _HALF + _POOL_TERMS * _FLOAT)
    pooling = {sizes.half: 6 * plan.head_dim * sizes.heads * int(seen.sum())}
    yield Work("pool", pool, "", 512 if facts else 128, read, pool_bytes, pooling)
    # Rows of blocks without a pool stay as they are.
    with_pools = sizes.heads * int(rows[pools > 0].sum())
    out_and_lse = with_pools * (plan.head_dim * _HALF + _FLOAT)
    read = with_pools * plan.head_dim * _HALF + mean_bytes + pool_bytes + out_and_lse
    products = {sizes.half: 4 * plan.head_dim * sizes.heads * int((rows * pools).sum())}
    yield Work("pool", attending, "", plan.block_q, read, out_and_lse, products)


def _in_order(specs: list[KernelSpec]) -> tuple[KernelSpec, ...]:
    """(measure_keys on Hopper, mean_queries, what pools there, attend_pools)."""
    by_name = {spec.source: spec for spec in specs}
    hopper = "pool_skipped_sm90" in by_name
    names = ("measure_keys", "mean_queries", "pool_skipped_sm90") if hopper else ("mean_queries", "pool_skipped")
    return tuple(by_name[name] for name in (*names, "attend_pools"))


def by_stage(work: Iterable[Any]) -> dict[str, list]:
    """Launches by stage, in order."""
    stages: dict[str, list] = {}
    for one in work:
        stages.setdefault(one.stage, []).append(one)
    return stages
