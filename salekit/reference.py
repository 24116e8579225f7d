"""The NumPy twin of every stage: the specification that runs.

Follows Ji et al., "SALE" (arXiv 2505.24179), with the fine print that makes twin and kernels agree
(docs/algorithm.md). All arrays are ``[batch, seqlen, heads, head_dim]`` (float16, bfloat16 or float32) views; per-row
results are ``[batch, heads, seqlen]``.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .block_mask import BlockMask
from .codes import Quantized
from .plans import CLAMP, KEY_BLOCK, SELECT_ALL, SELECT_NONE, TILE_ROWS, Plan, ceil_div

TINY = np.float32(2.0**-100)  # a group whose amax is below this is a zero group
E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0
LOW_BIT_Q_SAMPLE = 8  # channels of q and k are balanced by every 8th row of q
LOW_BIT_P_EXPONENT = 6  # p is rounded to e4m3 at 2 ** this times its value: room for a maximum raised late


def _heads_first(x: np.ndarray) -> np.ndarray:
    """[batch, seqlen, heads, d] -> float32 [batch, heads, seqlen, d]."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 2).astype(np.float32))


def _kv(plan: Plan, head: int) -> int:
    return head // plan.group_size


# --- quantise ------------------------------------------------------------------------------------------------------
def channel_means(x: np.ndarray) -> np.ndarray:
    """float32 [batch, heads, head_dim]: the mean over all rows."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _heads_first(x).mean(axis=2, dtype=np.float64).astype(np.float32)


def _codes(x: np.ndarray, amax: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 like x and scales like amax; amax broadcasts against x."""
    limit32 = np.float32(limit)
    with np.errstate(all="ignore"):
        finite = np.isfinite(amax)
        zero = amax < TINY
        usable = np.where(finite & ~zero, amax, np.float32(1)).astype(np.float32)
        factor = limit32 / usable
        codes = np.clip(np.rint(np.where(np.isfinite(x), x, 0) * factor), -limit, limit)
        codes = np.where(finite & ~zero, codes, 0).astype(np.int8)
        scale = np.where(zero, np.float32(1), np.where(finite, usable / limit32, np.float32(np.nan)))
    return codes, scale.astype(np.float32)


def _amax(x: np.ndarray, axis) -> np.ndarray:
    return np.abs(x).max(axis=axis, keepdims=True)


def prune_2_of_4(q: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """Zero the two of every four dims with the smaller |q_d| * rms_d; ties keep the lower d. q, rms: [..., d]."""
    weight = (np.abs(q) * rms).reshape(*q.shape[:-1], -1, 4)
    order = np.argsort(-weight, axis=-1, kind="stable")
    keep = np.zeros(weight.shape, bool)
    np.put_along_axis(keep, order[..., :2], True, axis=-1)
    return np.where(keep.reshape(q.shape), q, np.float32(0))


def channel_rms(smooth_k: np.ndarray) -> np.ndarray:
    """float32 [batch, heads, head_dim]: root mean square over the keys of [batch, heads, seqlen, head_dim]."""
    return np.sqrt((smooth_k.astype(np.float64) ** 2).mean(axis=2)).astype(np.float32)


def key_statistics(k: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of ``key_statistics.KeyStatistics``, in their order, of [batch, seqlen, heads, head_dim] keys."""
    batch, seqlen, heads, dim = k.shape
    num_keys = np.full(batch, seqlen, np.int32)
    if seqlen == 0:
        nothing = np.zeros((batch, heads, dim), np.float32)
        state = np.stack([nothing, nothing + np.float32(np.inf), nothing - np.float32(np.inf), nothing], axis=2)
        return _finish_key_statistics(nothing, nothing, np.zeros((batch, heads), np.float32), num_keys, state)
    keys, mean = _heads_first(k), channel_means(k)
    with np.errstate(all="ignore"):
        smooth = keys - mean[:, :, None]
        squares = (smooth.astype(np.float64) ** 2).sum(axis=2)
        parts = (keys.sum(axis=2, dtype=np.float64), keys.min(axis=2), keys.max(axis=2), squares)
        state = np.stack(parts, axis=2).astype(np.float32)
        return _finish_key_statistics(mean, channel_rms(smooth), _amax(smooth, (2, 3))[:, :, 0, 0], num_keys, state)


def merge_key_statistics(num_a, state_a, num_b, state_b) -> tuple[np.ndarray, ...]:
    """The same of two sets of keys together, from how many they are, int32 [batch], and their states."""
    with np.errstate(all="ignore"):
        total = num_a + num_b
        counts = [num.astype(np.float64)[:, None, None] for num in (num_a, num_b, total)]
        # A set without a key adds nothing, whatever its state says.
        a, b = (np.where(count[..., None] > 0, state.astype(np.float64), [[0], [np.inf], [-np.inf], [0]])
                for count, state in zip(counts, (state_a, state_b)))
        some = counts[2] > 0
        sums = a[:, :, 0] + b[:, :, 0]
        mean = np.where(some, sums / counts[2], 0).astype(np.float32)
        low, high = np.minimum(a[:, :, 1], b[:, :, 1]), np.maximum(a[:, :, 2], b[:, :, 2])
        squares = np.zeros(mean.shape)
        for count, part in zip(counts, (a, b)):
            offset = part[:, :, 0] / np.maximum(count, 1) - mean
            squares += np.where(count > 0, part[:, :, 3] + count * offset**2, 0)
        low, high = (x.astype(np.float32) for x in (low, high))
        extremes = np.maximum(np.abs(high - mean), np.abs(low - mean)).max(axis=-1)
        amax = np.where(some[..., 0], extremes, np.float32(0)).astype(np.float32)
        rms = np.sqrt(np.where(some, squares / counts[2], 0).astype(np.float32))
        state = np.stack([sums, low, high, squares], axis=2).astype(np.float32)
    return _finish_key_statistics(mean, rms, amax, total.astype(np.int32), state)


def _finish_key_statistics(mean, rms, amax, num_keys, state) -> tuple[np.ndarray, ...]:
    return mean, rms, amax, _codes(np.zeros_like(amax), amax, 127)[1], num_keys, state


def quantize(q: np.ndarray, k: np.ndarray, plan: Plan, k_statistics=None) -> Quantized:
    """Codes in row order (see ``codes.Quantized``) by the plan's estimator; k_statistics instead of k's own."""
    k_mean = channel_means(k) if k_statistics is None else k_statistics.mean
    with np.errstate(all="ignore"):
        smooth_k = _heads_first(k) - k_mean[:, :, None]
        rows = _heads_first(q)
        if plan.estimator == "int4":
            return _quantize_int4(rows, smooth_k, k_mean, channel_means(q), plan)
        if plan.estimator == "int8-sp24":
            rms = channel_rms(smooth_k) if k_statistics is None else k_statistics.rms
            rms = np.repeat(rms, plan.group_size, axis=1)[:, :, None]
            finite = np.isfinite(rows).all(axis=-1, keepdims=True)
            rows = np.where(finite, prune_2_of_4(rows, np.nan_to_num(rms)), rows)
        q_codes, q_scale = _codes(rows, _amax(rows, -1), 127)
        k_amax = _amax(smooth_k, (2, 3)) if k_statistics is None else k_statistics.amax[:, :, None, None]
        k_codes, k_scale = _codes(smooth_k, k_amax, 127)
    return Quantized(plan.estimator, 8, q_codes, k_codes, q_scale[..., 0], k_scale[:, :, 0, 0], k_mean)


def _quantize_int4(rows, smooth_k, k_mean, q_mean, plan: Plan) -> Quantized:
    batch, heads, seqlen_q, d = rows.shape
    kv_heads, seqlen_k = smooth_k.shape[1:3]
    smooth_q = rows - q_mean[:, :, None]
    tiles = np.zeros((batch, heads, ceil_div(seqlen_q, 16) * 16, d), np.float32)
    tiles[:, :, :seqlen_q] = smooth_q
    tiles = tiles.reshape(batch, heads, -1, 2, 8, d)  # tile, half, row of the half
    q_codes, q_scale = _codes(tiles, _amax(tiles, (3, 5)), 7)
    blocks = np.zeros((batch, kv_heads, ceil_div(seqlen_k, 32) * 32, d), np.float32)
    blocks[:, :, :seqlen_k] = smooth_k
    blocks = blocks.reshape(batch, kv_heads, -1, 4, 4, 2, d)  # block, j // 8, group, j % 2
    k_codes, k_scale = _codes(blocks, _amax(blocks, (3, 5, 6)), 7)
    grouped = np.repeat(smooth_k, plan.group_size, axis=1)
    correction = np.einsum("bhd,bhjd->bhj", q_mean.astype(np.float64), grouped.astype(np.float64)).astype(np.float32)
    return Quantized(
        "int4",
        4,
        q_codes.reshape(batch, heads, -1, d)[:, :, :seqlen_q],
        k_codes.reshape(batch, kv_heads, -1, d)[:, :, :seqlen_k],
        q_scale.reshape(batch, heads, -1),
        k_scale.reshape(batch, kv_heads, -1),
        k_mean,
        q_mean,
        correction,
    )


# --- anchors -------------------------------------------------------------------------------------------------------
def anchor_keys(plan: Plan, tile: int) -> np.ndarray:
    """Sorted anchor keys of a 64-row tile: the sink and the local range, each key once."""
    begin, end = plan.local_range(tile)
    return np.union1d(np.arange(plan.sink_end), np.arange(begin, end)).astype(np.int64)


def _row_visible(plan: Plan, rows: np.ndarray) -> np.ndarray:
    """One past the last key that each row sees."""
    right = 0 if plan.causal else plan.window_right
    if right < 0:
        return np.full(rows.shape, plan.seqlen_k)
    return np.clip(rows + plan.offset + right + 1, 0, plan.seqlen_k)


def _row_first(plan: Plan, rows: np.ndarray) -> np.ndarray:
    """The first key that each row sees."""
    if plan.window_left < 0:
        return np.zeros(rows.shape, np.int64)
    return np.clip(rows + plan.offset - plan.window_left, 0, plan.seqlen_k)


def row_sees(plan: Plan, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [rows, keys]: the visible pairs of these rows and keys."""
    return (keys[None] >= _row_first(plan, rows)[:, None]) & (keys[None] < _row_visible(plan, rows)[:, None])


def cap_scores(s: np.ndarray, softcap: float) -> np.ndarray:
    """softcap * tanh(s / softcap) in the dtype of s; s itself when softcap is 0."""
    if softcap == 0:
        return s
    cap = s.dtype.type(softcap)
    return cap * np.tanh(s / cap)


def uncap_limits(y: np.ndarray, softcap: float) -> np.ndarray:
    """What an uncapped score has to exceed for its capped one to exceed y, float64; +inf: none does, -inf: all do."""
    if softcap == 0:
        return y.astype(np.float64)
    with np.errstate(all="ignore"):
        return softcap * np.arctanh(np.clip(y.astype(np.float64) / softcap, -1, 1))


def anchor_statistics(
    q: np.ndarray, k: np.ndarray, k_mean: np.ndarray, plan: Plan, sink_logits: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """m, l: float32 [batch, heads, seqlen_q], maximum of s and sum of exp(s - m) over a row's visible anchor keys.

    s is the score with the smoothed key: taken with the raw key, then softmax_scale * q.mean(k) is subtracted from m.
    With softcap, s is the capped score of the raw key, nothing is subtracted, and what would have been comes as a third
    array. The row's sink logit is one more s. A row without a visible key has m = -inf, l = 0. float64 inside.
    """
    m = np.full((plan.batch, plan.num_heads, plan.seqlen_q), -np.inf, np.float32)
    l, shifts = np.zeros_like(m), np.zeros_like(m)
    sinks = np.full(plan.num_heads, -np.inf) if sink_logits is None else sink_logits.astype(np.float64)
    queries, keys = _heads_first(q).astype(np.float64), _heads_first(k)
    with np.errstate(all="ignore"):
        for tile in range(plan.num_q_tiles):
            rows = np.arange(tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, plan.seqlen_q))
            anchors = anchor_keys(plan, tile)
            visible = row_sees(plan, rows, anchors)
            some = _row_first(plan, rows) < _row_visible(plan, rows)
            if not some.any():
                continue
            for head in range(plan.num_heads):
                kv = _kv(plan, head)
                tile_q = queries[:, head, rows]
                s = plan.softmax_scale * (tile_q @ keys[:, kv, anchors].astype(np.float64).swapaxes(1, 2))
                s = np.where(visible[None], cap_scores(s, plan.softcap), -np.inf)
                s = np.concatenate((s, np.full((*s.shape[:2], 1), sinks[head])), axis=2)
                top = s.max(axis=2)
                total = np.exp(s - np.where(np.isneginf(top), 0, top)[..., None]).sum(axis=2)
                shift = plan.softmax_scale * np.einsum("brd,bd->br", tile_q, k_mean[:, kv].astype(np.float64))
                if plan.softcap:
                    shifts[:, head, rows], shift = shift, 0
                m[:, head, rows] = np.where(some, top - shift, -np.inf)
                l[:, head, rows] = np.where(some, total, 0)
    return (m, l, shifts) if plan.softcap else (m, l)


def rows_that_vote(plan: Plan, rows: np.ndarray | None = None) -> np.ndarray:
    """bool, of each of these rows (default: all, [seqlen_q]): whether it sees a key and query_stride tests it."""
    rows = np.arange(plan.seqlen_q) if rows is None else rows
    block_start = rows // plan.block_q * plan.block_q
    block_end = np.minimum(block_start + plan.block_q, plan.seqlen_q)
    whole = block_end > plan.seqlen_q - plan.full_rows
    tested = whole | ((rows - block_start) % plan.query_stride == 0)
    return tested & (_row_first(plan, rows) < _row_visible(plan, rows))


def row_limits(m: np.ndarray, l: np.ndarray, thresholds, plan: Plan, shift: np.ndarray | None = None) -> np.ndarray:
    """y = m + ln(tau * l), float32 [batch, heads, seqlen_q]; -inf selects every visible block, +inf never votes.

    With softcap, y is the uncapped score that belongs to it, less shift (the third of the anchor statistics).
    """
    tau = np.broadcast_to(np.asarray(thresholds, np.float32), (plan.num_heads,))[None, :, None]
    with np.errstate(all="ignore"):
        y = (m + np.log(tau * l)).astype(np.float32)
        if plan.softcap:
            y = (uncap_limits(y, plan.softcap) - shift).astype(np.float32)
    y = np.where(np.isposinf(tau), np.float32(np.inf), y)
    known = np.isfinite(m) & np.isfinite(l) & np.isfinite(0 if shift is None else shift)
    y = np.where(known & (tau > 0), y, np.float32(-np.inf))
    return np.where(rows_that_vote(plan), y, np.float32(np.inf)).astype(np.float32)


def integer_thresholds(y: np.ndarray, q_scale: np.ndarray, k_scale: np.ndarray, plan: Plan) -> np.ndarray:
    """int32 T = floor(y / (softmax_scale * q_scale * k_scale)), clamped; the arguments broadcast."""
    with np.errstate(all="ignore"):
        x = np.floor(y / ((np.float32(plan.softmax_scale) * q_scale) * k_scale))
        everything = np.isnan(x) | np.isneginf(y)
        t = np.clip(np.where(np.isnan(x), 0, x).astype(np.float64), -CLAMP, CLAMP).astype(np.int64)
    t = np.where(everything, SELECT_ALL, t)
    return np.where(np.isposinf(y), SELECT_NONE, t).astype(np.int32)


# --- estimate ------------------------------------------------------------------------------------------------------
def anchor_blocks(plan: Plan) -> np.ndarray:
    """bool [num_q_tiles, 32-key blocks]: blocks that hold an anchor key of the 64-row tile and that it sees."""
    num_blocks = ceil_div(plan.seqlen_k, KEY_BLOCK)
    anchors = np.zeros((plan.num_q_tiles, num_blocks), bool)
    for tile in range(plan.num_q_tiles):
        begin, end = plan.local_range(tile)
        anchors[tile, : ceil_div(plan.sink_end, KEY_BLOCK)] = True
        if end > begin:
            anchors[tile, begin // KEY_BLOCK : ceil_div(end, KEY_BLOCK)] = True
    return anchors & visible_blocks(plan)


def visible_blocks(plan: Plan) -> np.ndarray:
    """bool [num_q_tiles, 32-key blocks]: blocks with a pair that is inside the matrix and visible."""
    starts = np.arange(ceil_div(plan.seqlen_k, KEY_BLOCK)) * KEY_BLOCK
    begins = np.array([plan.first_visible_key(t * TILE_ROWS) for t in range(plan.num_q_tiles)])
    ends = np.array([plan.visible_keys((t + 1) * TILE_ROWS) for t in range(plan.num_q_tiles)])
    return (starts[None] < ends[:, None]) & (starts[None] + KEY_BLOCK > begins[:, None])


def fold_blocks(fine: np.ndarray, plan: Plan) -> np.ndarray:
    """OR bits, or take the largest float, of 64-row tiles and 32-key blocks up to the plan's blocks."""
    rows, cols = plan.block_q // TILE_ROWS, plan.block_k // KEY_BLOCK
    shape = (*fine.shape[:2], plan.num_q_blocks * rows, plan.num_k_blocks * cols)
    padded = np.full(shape, False if fine.dtype == bool else -np.inf, fine.dtype)
    padded[:, :, : fine.shape[2], : fine.shape[3]] = fine
    return padded.reshape(*fine.shape[:2], plan.num_q_blocks, rows, plan.num_k_blocks, cols).max(axis=(3, 5))


def row_products(quantized: Quantized, plan: Plan):
    """(batch, head, rows, integer products of their codes with all keys') chunk by chunk, exact in float32.

    Keys are padded with zeros to whole 32-key blocks; a chunk is whole 64-row tiles.
    """
    padded_k = ceil_div(plan.seqlen_k, KEY_BLOCK) * KEY_BLOCK
    chunk = max(TILE_ROWS, (2**24 // max(padded_k, 1)) // TILE_ROWS * TILE_ROWS)
    for b in range(plan.batch):
        for head in range(plan.num_heads):
            codes_k = np.zeros((padded_k, plan.head_dim), np.float32)
            codes_k[: plan.seqlen_k] = quantized.k_codes[b, _kv(plan, head)]
            for start in range(0, plan.seqlen_q, chunk):
                rows = np.arange(start, min(start + chunk, plan.seqlen_q))
                # Exact: |sum of products| < 2^24 for head_dim <= 256.
                yield b, head, rows, quantized.q_codes[b, head, rows].astype(np.float32) @ codes_k.T


def visible_pairs(rows: np.ndarray, padded_k: int, plan: Plan) -> np.ndarray:
    """bool, broadcasts to [rows, padded_k]: pairs that are inside the matrix and visible."""
    if plan.causal or plan.has_window:
        return row_sees(plan, rows, np.arange(padded_k))
    return np.arange(padded_k)[None] < plan.seqlen_k


def estimate(quantized: Quantized, limits: np.ndarray, plan: Plan) -> BlockMask:
    """Select blocks from codes and limits: int32 T [batch, heads, seqlen_q] for int8*, float32 y for int4."""
    num_blocks = ceil_div(plan.seqlen_k, KEY_BLOCK)
    votes = np.zeros((plan.batch, plan.num_heads, plan.num_q_tiles, num_blocks), bool)
    for b, head, rows, acc in row_products(quantized, plan):
        if plan.estimator == "int4":
            scores, q_scale, k_scale = corrected_products(acc, quantized, rows, b, head, plan)
            vote = scores > integer_thresholds(limits[b, head, rows, None], q_scale, k_scale, plan)
        else:
            vote = acc > limits[b, head, rows, None]
        vote &= visible_pairs(rows, acc.shape[1], plan)
        vote = vote.reshape(rows.size, num_blocks, KEY_BLOCK).any(axis=2)
        tiles = np.arange(0, rows.size, TILE_ROWS)
        votes[b, head, rows[0] // TILE_ROWS + np.arange(tiles.size)] = np.logical_or.reduceat(vote, tiles, axis=0)
    bits = (votes | anchor_blocks(plan)) & visible_blocks(plan)
    sizes = (plan.block_q, plan.block_k, plan.seqlen_q, plan.seqlen_k)
    return BlockMask.from_dense(fold_blocks(bits, plan), *sizes, plan.causal, plan.window_left, plan.window_right)


def corrected_products(acc, quantized: Quantized, rows, b: int, head: int, plan: Plan):
    """int4: acc + rint(c_j / (sq * sk)) int64, and the scales of the row pair and of the key group that go with it."""
    kv = _kv(plan, head)
    q_scale = quantized.q_scale[b, head][8 * (rows // 16) + rows % 8][:, None]
    keys = np.arange(acc.shape[1])
    k_scale = quantized.k_scale[b, kv][4 * (keys // 32) + keys % 8 // 2][None]
    c = np.zeros(acc.shape[1], np.float32)
    c[: plan.seqlen_k] = quantized.correction[b, head]
    with np.errstate(all="ignore"):
        correction = np.fmax(np.float32(-CLAMP), np.fmin(np.float32(CLAMP), c[None] / (q_scale * k_scale)))
        correction = np.rint(correction).astype(np.int64)
    return acc.astype(np.int64) + correction, q_scale, k_scale


# --- attend --------------------------------------------------------------------------------------------------------
class _LowBit:
    """q, k, v as ``attend="int8-fp8"`` multiplies them (docs/algorithm.md, "Low-bit attention"); heads first."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: Plan):
        batch, heads, rows, dim = q.shape
        kv_heads, keys = k.shape[1:3]
        mean = k.mean(axis=2, dtype=np.float64).astype(np.float32)[:, :, None]
        smooth = k - mean
        largest_q = _amax(q[:, :, ::LOW_BIT_Q_SAMPLE].reshape(batch, kv_heads, -1, dim), 2)
        largest_k = _amax(smooth, 2)
        usable = (largest_q >= TINY) & (largest_k >= TINY) & np.isfinite(largest_q) & np.isfinite(largest_k)
        largest_q, largest_k = np.where(usable, largest_q, np.float32(1)), np.where(usable, largest_k, np.float32(1))
        balance = np.sqrt(largest_q / largest_k)  # of k; 1 / balance of q, rounded for itself
        balanced_q = q * np.repeat(np.sqrt(largest_k / largest_q), plan.group_size, axis=1)
        self.q, self.q_scale = _low_bit_codes(balanced_q, -1)
        blocks = np.zeros((batch, kv_heads, ceil_div(keys, KEY_BLOCK) * KEY_BLOCK, dim), np.float32)
        blocks[:, :, :keys] = smooth * balance
        blocks = blocks.reshape(batch, kv_heads, -1, KEY_BLOCK, dim)
        codes, scale = _low_bit_codes(blocks, (-2, -1))
        self.k = codes.reshape(batch, kv_heads, -1, dim)[:, :, :keys]
        self.k_scale = np.repeat(scale[..., 0, 0], KEY_BLOCK, axis=-1)[:, :, :keys]
        amax = _amax(v, 2)
        zero = amax < TINY
        factor = np.where(np.isfinite(amax) & ~zero, np.float32(E4M3_MAX) / np.where(zero, 1, amax), 0)
        self.v = np.where(factor == 0, 0, v * factor.astype(np.float32)).astype(E4M3).astype(np.float32)
        scale = np.where(zero, 1, np.where(np.isfinite(amax), amax / np.float32(E4M3_MAX), np.nan))
        self.v_scale = scale.astype(np.float32)[:, :, 0]
        self.row_shift = (q @ np.repeat(mean, plan.group_size, axis=1).swapaxes(-1, -2))[..., 0]  # what smoothing took

    def scores(self, b: int, head: int, kv: int, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """q.k of the smoothed keys, without softmax_scale."""
        products = self.q[b, head, rows].astype(np.float32) @ self.k[b, kv, cols].T.astype(np.float32)
        return products * (self.q_scale[b, head, rows] * self.k_scale[b, kv, cols][None])

    def weighted_values(self, p: np.ndarray, b: int, kv: int, cols: np.ndarray) -> np.ndarray:
        """p.v, from p as :func:`_round_p` leaves it."""
        return (p @ self.v[b, kv, cols]) * self.v_scale[b, kv]


def _low_bit_codes(x: np.ndarray, axis) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of groups along the axes; the scale of a group without a code but 0 is 0."""
    amax = _amax(x, axis)
    codes, scale = _codes(x, amax, 127)
    return codes, np.where(amax < TINY, np.float32(0), scale)


def _round_p(p: np.ndarray) -> np.ndarray:
    """p rounded to e4m3 at 2 ** LOW_BIT_P_EXPONENT times its value."""
    unit = np.float32(2.0**LOW_BIT_P_EXPONENT)
    return (p * unit).astype(E4M3).astype(np.float32) / unit


def attend(q, k, v, mask: BlockMask | None, plan: Plan, sink_logits=None) -> tuple[np.ndarray, np.ndarray]:
    """out like q and lse float32 [batch, heads, seqlen_q] over the selected, visible keys; mask None: all of them.

    sink_logits: None, or float32 [heads]: one more logit of each row, without a value; it is part of lse.
    """
    out = np.zeros(q.shape, q.dtype)
    sinks = np.full(plan.num_heads, -np.inf, np.float32) if sink_logits is None else sink_logits
    lse = np.broadcast_to(sinks[:, None], (plan.batch, plan.num_heads, plan.seqlen_q)).copy()
    if plan.seqlen_q == 0 or plan.seqlen_k == 0:
        return out, lse
    queries, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)
    bits = None if mask is None else mask.to_dense()
    block_q, block_k = (plan.block_q, plan.block_k) if mask is None else (mask.block_q, mask.block_k)
    scale = np.float32(plan.softmax_scale)
    with np.errstate(all="ignore"):
        low = _LowBit(queries, keys, values, plan) if plan.attend == "int8-fp8" else None
        for block in range(ceil_div(plan.seqlen_q, block_q)):
            rows = np.arange(block * block_q, min((block + 1) * block_q, plan.seqlen_q))
            first, end = _row_first(plan, rows).min(), _row_visible(plan, rows).max()
            for b in range(plan.batch):
                for head in range(plan.num_heads):
                    kv = _kv(plan, head)
                    if bits is None:
                        cols = np.arange(first, end)
                    else:
                        blocks = np.flatnonzero(bits[b, head, block])
                        cols = (blocks[:, None] * block_k + np.arange(block_k)).ravel()
                        cols = cols[(cols >= first) & (cols < end)]
                    if cols.size == 0:
                        continue
                    if low:
                        s = scale * low.scores(b, head, kv, rows, cols)
                    else:
                        s = scale * (queries[b, head, rows] @ keys[b, kv, cols].T)
                    s = cap_scores(s, plan.softcap)
                    s = np.where(row_sees(plan, rows, cols), s, np.float32(-np.inf))
                    top = np.maximum(s.max(axis=1, keepdims=True), sinks[head])
                    p = np.exp(s - np.where(np.isneginf(top), np.float32(0), top))
                    if low:
                        p = _round_p(p)
                    total = p.sum(axis=1, keepdims=True)
                    if not np.isneginf(sinks[head]):
                        total = total + np.exp(sinks[head] - top)
                    some = ~(total == 0)
                    weighted = low.weighted_values(p, b, kv, cols) if low else p @ values[b, kv, cols]
                    o = np.where(some, weighted / np.where(some, total, 1), 0)
                    if low:
                        top = top + scale * low.row_shift[b, head, rows][:, None]
                    out[b, rows, head] = o.astype(q.dtype)
                    lse[b, head, rows] = np.where(some, top + np.log(np.where(some, total, 1)), -np.inf)[:, 0]
    return out, lse


def dense_attention(q, k, v, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Exact attention: out like q, lse float32 [batch, heads, seqlen_q]."""
    return attend(q, k, v, None, plan)


def merge_states(out_a, lse_a, out_b, lse_b) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two sets of keys together, from that over each: out like out_a, lse float32 [batch, heads, rows].

    out_a, out_b: [batch, seqlen_q, heads, head_dim]. A side with lse -inf does not count, whatever its output is.
    """
    with np.errstate(all="ignore"):
        top = np.where(np.isnan(lse_a) | np.isnan(lse_b), np.float32(np.nan), np.maximum(lse_a, lse_b))
        has_a, has_b = ~np.isneginf(lse_a), ~np.isneginf(lse_b)
        weight_a = np.where(has_a, np.exp(lse_a - top), np.float32(0))
        weight_b = np.where(has_b, np.exp(lse_b - top), np.float32(0))
        total = weight_a + weight_b
        lse = np.where(has_a | has_b, top + np.log(total), np.float32(-np.inf)).astype(np.float32)
        merged = np.zeros(out_a.shape, np.float32)
        for has, weight, out in ((has_a, weight_a, out_a), (has_b, weight_b, out_b)):
            share, has = (np.moveaxis(x, 1, 2)[..., None] for x in (weight / total, has))
            merged += np.where(has, share * out.astype(np.float32), np.float32(0))
    return merged.astype(out_a.dtype), lse


def sparse_attention(q, k, v, thresholds, plan: Plan, sink_logits=None):
    """The whole pipeline: out, lse, mask (None when dense by length)."""
    if plan.is_dense or plan.seqlen_q == 0:
        return (*attend(q, k, v, None, plan, sink_logits), None)
    quantized = quantize(q, k, plan)
    m, l, *shift = anchor_statistics(q, k, quantized.k_mean, plan, sink_logits)
    limits = row_limits(m, l, thresholds, plan, *shift)
    if plan.estimator != "int4":
        limits = integer_thresholds(
            limits, quantized.q_scale, quantized.k_scale[:, :, None].repeat(plan.group_size, 1), plan
        )
    mask = estimate(quantized, limits, plan)
    return (*attend(q, k, v, mask, plan, sink_logits), mask)
