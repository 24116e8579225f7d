"""Attention in float64 over a given mask, and how far roundings may move what the library computes.

Bounds are worst cases, not spreads: rounding errors of equal keys or rows are equal, and fuzz cases have both. With u
the unit roundoff of q's type, e = 2^-24 that of float32 and s the error of a row's scores:

- **s.** A product of 16-bit numbers is exact in float32. NumPy adds head_dim of them one by one, each addition off by
  e; tensor cores add four or more at once, truncating, 2e each; so s is ``softmax_scale |q| max|k|`` times (head_dim
  + 2) e or (head_dim / 2 + 4) e, by Cauchy and Schwarz. A softcap passes it on with a slope of at most 1, limits it
  to what the cap can hold and adds 2^-21 of its own on a GPU (docs/algorithm.md).
- **lse** moves by s at most (it is the logarithm of a sum of exp), by 16e of its size for exp, log and the products
  around them, and by e a summed key.
- **out** is a mean of values with weights p. A score error of s moves p by a factor of exp(2s); exp, log and sums are
  off by what lse's are. The kernels round p to 16 bits (u, or 2^-25 where float16 has no smaller numbers), the output
  is rounded (u). Each counts times ``sum p |v|``, the last times |out|. No error takes the output out of the range of
  its values: that bounds it where scores are too large to mean anything in float32.
- **attend="int8-fp8"** is compared with float64 attention over its own 8-bit q, k and v. p is rounded to e4m3 at 2^6
  or more times its value relative to the largest (2^-4, or 2^-16 where e4m3 has no smaller numbers), in numerator and
  sum, and on Hopper sums of p.v fall short by up to 0.4%. A code may be its neighbour where a rounding decides
  (``_LowBit``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import reference
from ..checks import FEW, U32, UNIT_ROUNDOFF
from ..plans import Plan

CAP_ERROR = 2.0**-21
# What the smallest numbers of the type add to an output: half of float16's last place; of bfloat16, whose exponents are
# float32's, what float32 numbers below 2^-126 may be flushed to.
LEAST_OUTPUT = {"float16": 2.0**-25, "bfloat16": 2.0**-126}
LEAST_P = {"float16": 2.0**-25, "bfloat16": 2.0**-126}
E4M3_ROUNDOFF, E4M3_LEAST = 2.0**-4, 2.0**-16
SHORT_SUMS = 4e-3


class Expected(NamedTuple):
    """What some rows of a head have to be; float64 [rows, head_dim] and [rows].

    must_be_bad: elements that cannot be finite; may_be_bad: those that may be, as a NaN or inf of v is in a block that
    their rows' query block selects, or on a GPU another one of the same 128 rows.
    """

    out: np.ndarray
    out_bound: np.ndarray
    lse: np.ndarray
    lse_bound: np.ndarray
    must_be_bad: np.ndarray
    may_be_bad: np.ndarray


class Attention:
    """The oracle of one call. q [batch, rows, heads, head_dim], k, v likewise: NumPy; device: what computed it."""

    def __init__(self, q, k, v, plan: Plan, sink_logits: Any = None, on_gpu: bool = False):
        self.q, self.k, self.v, self.plan, self.on_gpu = q, k, v, plan, on_gpu
        self.sinks = np.full(plan.num_heads, -np.inf) if sink_logits is None else np.asarray(sink_logits, np.float64)
        self.low = _LowBit(q, k, v, plan) if plan.attend == "int8-fp8" and q.size and k.size else None
        self._keys = lru_cache(maxsize=2)(self._read_keys)

    def _read_keys(self, b: int, kv: int):
        """(keys, norms of the finite ones, values with 0 for what is not finite, (key, channel) of those)."""
        if self.low:
            keys, values = self.low.keys(b, kv), self.low.values(b, kv)
        else:
            keys, values = (x[b, :, kv].astype(np.float64) for x in (self.k, self.v))
        with np.errstate(invalid="ignore"):
            norms = np.linalg.norm(keys, axis=1)
        bad = ~np.isfinite(values)
        return keys, np.where(np.isfinite(norms), norms, 0), np.where(bad, 0, values), np.argwhere(bad)

    def rows_of(self, block: int) -> np.ndarray:
        return np.arange(block * self.plan.block_q, min((block + 1) * self.plan.block_q, self.plan.seqlen_q))

    def columns(self, bits: np.ndarray | None, block: int) -> np.ndarray:
        """Keys of the selected blocks that a row of the query block sees. bits: bool [num_k_blocks], None: all."""
        rows = self.rows_of(block)
        begins, ends = seen_range(self.plan, rows)
        cols = np.arange(begins.min(), max(ends.max(), begins.min()))
        return cols if bits is None else cols[bits[cols // self.plan.block_k]]

    def reached(self, bits: np.ndarray | None, block: int) -> np.ndarray:
        """bool [num_k_blocks]: blocks of which a row of this query block may get what is not finite in v. bits: bool
        [num_q_blocks, num_k_blocks], the head's mask; None: all visible blocks."""
        pairs = 128 // self.plan.block_q if self.on_gpu else 1  # query blocks that are attended together
        together = np.arange(block // pairs * pairs, min((block // pairs + 1) * pairs, self.plan.num_q_blocks))
        if bits is not None:
            return bits[together].any(axis=0)
        begins, ends = (np.concatenate(x) for x in zip(*(seen_range(self.plan, self.rows_of(i)) for i in together)))
        index = np.arange(self.plan.num_k_blocks)
        return (index >= begins.min() // self.plan.block_k) & (index * self.plan.block_k < ends.max())

    def expect(
        self, b: int, head: int, block: int, mask: np.ndarray | None, rows: np.ndarray | None = None
    ) -> Expected:
        """Of the query block's rows, or of those among them that are given. mask: bool [num_q_blocks, num_k_blocks]."""
        bits = None if mask is None else mask[block]
        reached = self.reached(mask, block)
        plan = self.plan
        rows = self.rows_of(block) if rows is None else rows
        keys, norms, values, bad = self._keys(b, head // plan.group_size)
        cols = self.columns(bits, block)
        u = UNIT_ROUNDOFF[plan.dtype]
        with np.errstate(all="ignore"):
            queries = self.low.queries(b, head, rows) if self.low else self.q[b, rows, head].astype(np.float64)
            begins, ends = seen_range(plan, rows)
            sees = (cols >= begins[:, None]) & (cols < ends[:, None])
            s = plan.softmax_scale * (queries @ keys[cols].T)
            error = self._score_error(queries, norms[cols].max(initial=0), b, head, rows)
            if plan.softcap:
                error = np.minimum(error, 2 * plan.softcap) + plan.softcap * (CAP_ERROR if self.on_gpu else 4 * U32)
                s = plan.softcap * np.tanh(s / plan.softcap)
            s = np.where(sees, s, -np.inf)
            sink = self.sinks[head]
            top = np.maximum(s.max(axis=1, initial=-np.inf), sink)
            base = np.where(np.isneginf(top), 0, top)
            weights = np.exp(s - base[:, None])
            total = weights.sum(axis=1) + (0 if np.isneginf(sink) else np.exp(sink - base))
            some = ~(total == 0)
            p = np.where(some[:, None], weights / np.where(some, total, 1)[:, None], 0)
            lse = np.where(some, top + np.log(np.where(some, total, 1)), -np.inf)
            chosen = values[cols]
            out, spread = p @ chosen, p @ np.abs(chosen)
            count = cols.size + 1
            size = np.where(np.isfinite(top), np.abs(top), 0)
            small = FEW * (1 + size) + count * 2 * U32
            lse_bound = error + small + FEW * np.abs(np.nan_to_num(lse, posinf=0, neginf=0))
            moved = (np.expm1(2 * error) + small)[:, None] * spread
            total = np.where(some, total, 1)[:, None]
            if self.low:
                rounded = E4M3_ROUNDOFF + E4M3_LEAST * count / total
                off = (
                    E4M3_ROUNDOFF * (spread + np.abs(out))
                    + E4M3_LEAST * (np.abs(chosen).sum(axis=0) + cols.size * np.abs(out)) / total
                )
                moved = (moved + off + (SHORT_SUMS if self.on_gpu else 0) * spread) / np.maximum(1 - rounded, 0.1)
                lse_bound = lse_bound - np.log1p(-np.minimum(rounded[:, 0], 0.9)) + (SHORT_SUMS if self.on_gpu else 0)
                shift, off = self.low.shift(b, head, rows)
                lse, lse_bound = np.where(some, lse + shift, lse), lse_bound + off
            elif self.on_gpu:
                moved = moved + u * spread + LEAST_P[plan.dtype] * np.abs(chosen).sum(axis=0) / total
            bound = moved + u * np.abs(out) + LEAST_OUTPUT[plan.dtype]
            hull = np.abs(chosen).max(axis=0, initial=0) * (1 + 4 * u) + np.abs(out) + LEAST_OUTPUT[plan.dtype]
            bound = np.fmin(bound, hull)
            lost = np.isnan(out).any(axis=1) | np.isnan(lse)
        must = np.repeat(lost[:, None], plan.head_dim, axis=1)
        may = must.copy()
        for key, channel in bad:
            place = np.searchsorted(cols, key)
            may[:, channel] |= reached[key // plan.block_k]
            if place < cols.size and cols[place] == key:
                must[:, channel] |= sees[:, place] & ~np.isneginf(s[:, place])
        return Expected(out, bound, lse, _of_the_rest(lse_bound, lost), must, may)

    def _score_error(self, queries, norm, b: int, head: int, rows) -> np.ndarray:
        """[rows]: s of the module's text."""
        plan = self.plan
        if self.low:  # integers are exact; scales and what else is float32
            size = plan.softmax_scale * finite_norms(queries) * norm
            # Hopper takes 1.5 * 2^23 off each integer after it is scaled: one of the roundings is of that size.
            unit = np.nan_to_num(self.low.codes.q_scale[b, head, rows, 0].astype(np.float64)) * np.nan_to_num(
                self.low.codes.k_scale[b, head // plan.group_size].astype(np.float64)).max(initial=0)
            return 8 * U32 * size + self.low.near(b, head, rows) + self.on_gpu * 0.75 * plan.softmax_scale * unit
        terms = plan.head_dim / 2 + 4 if self.on_gpu else plan.head_dim + 2
        return plan.softmax_scale * terms * U32 * finite_norms(queries) * norm


def _of_the_rest(bound: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Bounds of which those that overflowed bound nothing, and those of rows that are NaN are not looked at."""
    return np.where(np.isfinite(bound), bound, np.where(lost, 0, np.finfo(np.float64).max))


def finite_norms(x: np.ndarray) -> np.ndarray:
    """Norms of the rows, of what is finite in them."""
    return np.linalg.norm(np.where(np.isfinite(x), x, 0), axis=-1)


def seen_range(plan: Plan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first key, one past the last) that each row sees; from the definition of windows and causal calls."""
    position = rows + plan.seqlen_k - plan.seqlen_q
    begins = position - plan.window_left if plan.window_left >= 0 else np.zeros_like(position)
    ends = np.full_like(position, plan.seqlen_k)
    if plan.window_right >= 0:
        ends = np.minimum(ends, position + plan.window_right + 1)
    if plan.causal:
        ends = np.minimum(ends, position + 1)
    begins = np.clip(begins, 0, plan.seqlen_k)
    return begins, np.maximum(np.clip(ends, 0, plan.seqlen_k), begins)


class _LowBit:
    """q, k and v in 8 bits, by the twin's codes, and how far codes next to a tie may move scores."""

    def __init__(self, q, k, v, plan: Plan):
        self.plan = plan
        heads_first = [np.moveaxis(x, 1, 2).astype(np.float32) for x in (q, k, v)]
        with np.errstate(all="ignore"):
            self.codes = reference._LowBit(*heads_first, plan)
            q, k = heads_first[:2]
            # Where a code is next to a tie: x, in codes, is off by the roundings of the mean, of the balance and of x.
            mean = k.mean(axis=2, keepdims=True, dtype=np.float64)
            off = 104 * U32 * (np.abs(k).mean(axis=2, keepdims=True) + np.abs(k).max(axis=2, keepdims=True))
            self.mean_norm, self.mean_off = (
                np.linalg.norm(np.nan_to_num(x[:, :, 0], posinf=0, neginf=0), axis=-1) for x in (mean, off)
            )
            smooth = k - mean
            largest_q = (
                np.abs(q[:, :, :: reference.LOW_BIT_Q_SAMPLE])
                .reshape(plan.batch, plan.num_kv_heads, -1, plan.head_dim)
                .max(axis=2)
            )
            largest_k = np.abs(smooth).max(axis=2)
            usable = (largest_q >= 2.0**-100) & (largest_k >= 2.0**-100) & np.isfinite(largest_q * largest_k)
            ratio = np.sqrt(np.where(usable, largest_q, 1) / np.where(usable, largest_k, 1))
            unit = 1 / self.codes.k_scale.astype(np.float64)[..., None]
            x = smooth * ratio[:, :, None] * unit
            slack = (
                ratio[:, :, None] * unit * off
                + 16 * U32 * np.abs(x)
                + 2
                * np.abs(x)
                * np.max(off / np.where(largest_k == 0, 1, largest_k)[:, :, None], axis=-1, keepdims=True)
            )
            near = np.abs(np.abs(x - np.floor(x)) - 0.5) <= slack
            self.near_k = np.nan_to_num(near.sum(axis=-1) * self.codes.k_scale).max(axis=-1, initial=0)  # [batch, kv]
            group = plan.group_size
            x = q / np.repeat(ratio, group, axis=1)[:, :, None] / self.codes.q_scale
            slack = np.abs(x) * (
                32 * U32
                + np.repeat(np.max(off[:, :, 0] / np.where(largest_k == 0, 1, largest_k), axis=-1), group, axis=1)[
                    ..., None, None
                ]
            )
            near = np.abs(np.abs(x - np.floor(x)) - 0.5) <= slack
            self.near_q = np.nan_to_num(near.sum(axis=-1) * self.codes.q_scale[..., 0])  # [batch, heads, rows]
            self.rows = q

    def queries(self, b: int, head: int, rows) -> np.ndarray:
        return self.codes.q[b, head, rows].astype(np.float64) * self.codes.q_scale[b, head, rows]

    def keys(self, b: int, kv: int) -> np.ndarray:
        return self.codes.k[b, kv].astype(np.float64) * self.codes.k_scale[b, kv][:, None]

    def values(self, b: int, kv: int) -> np.ndarray:
        return self.codes.v[b, kv].astype(np.float64) * self.codes.v_scale[b, kv]

    def near(self, b: int, head: int, rows) -> np.ndarray:
        """[rows]: how far scores move when every code next to a tie is its neighbour."""
        kv = head // self.plan.group_size
        q_scale = np.nan_to_num(self.codes.q_scale[b, head, rows, 0].astype(np.float64))
        largest_k = 127 * np.nan_to_num(self.codes.k_scale[b, kv].astype(np.float64)).max(initial=0)
        return self.plan.softmax_scale * (127 * q_scale * self.near_k[b, kv] + self.near_q[b, head, rows] * largest_k)

    def shift(self, b: int, head: int, rows) -> tuple[np.ndarray, np.ndarray]:
        """What smoothing took from the rows' scores, and its error."""
        kv = head // self.plan.group_size
        size = finite_norms(self.rows[b, head, rows].astype(np.float64))
        off = self.plan.head_dim * U32 * self.mean_norm[b, kv] + self.mean_off[b, kv]
        scale = self.plan.softmax_scale
        return scale * self.codes.row_shift[b, head, rows].astype(np.float64), scale * off * size


# --- pools of what is skipped --------------------------------------------------------------------------------------
def with_pools(own: Expected, attention: Attention, b: int, head: int, block: int, bits: np.ndarray, rows) -> Expected:
    """The same rows with pools of the query block's skipped keys (docs/skipped-mass.md), made key by key.

    What the library merges are logarithms of masses L_i and outputs x_i, of the selected keys and of each pool, off by
    e_i and d_i. With w_i the share of each, the output is then off by
    ``(sum w_i (exp(e_i) - 1) (|x_i| + |out|) + sum w_i exp(e_i) d_i) / (1 - sum w_i (exp(e_i) - 1))`` at most.
    Of a pool on a GPU: weights and the pooled key are rounded to 16 bits (u each, of the keys' spread and of the key),
    which moves scores by softmax_scale |q - q'| times that, for the bias makes it good for q' itself; the sum of
    rounded weights is off by u; the variance is a difference of float32 sums; the mean query may be rounded the other
    way (2u), which moves the pooled key by softmax_scale times the covariance of the keys. Values as the weights do.
    """
    from ..skipped_mass import MOST_VARIANCE, POOL_KEYS, mean_query

    plan, kv = attention.plan, head // attention.plan.group_size
    scale, dim, on_gpu = plan.softmax_scale, plan.head_dim, attention.on_gpu
    of_block = attention.rows_of(block)
    ends = np.minimum((np.arange(plan.num_k_blocks) + 1) * plan.block_k, plan.seqlen_k)
    skipped = np.flatnonzero(~bits & (ends <= seen_range(plan, of_block)[1][0]))
    if skipped.size == 0:
        return own
    members = (skipped[:, None] * plan.block_k + np.arange(plan.block_k)).ravel()
    members = members[members < plan.seqlen_k]
    keys, values = (x[b, :, kv].astype(np.float64) for x in (attention.k, attention.v))
    values = np.where(np.isfinite(values), values, 0)
    queries = attention.q[b, rows, head].astype(np.float64)
    mean = mean_query(attention.q[b, of_block, head]).astype(np.float64)
    u = UNIT_ROUNDOFF[plan.dtype] if on_gpu else 0.0
    logits, off, outs, outs_off = [own.lse], [own.lse_bound], [own.out], [own.out_bound]
    with np.errstate(all="ignore"):
        distance = np.linalg.norm(queries - mean, axis=1)
        turned = 2 * u * np.linalg.norm(mean)  # how far the mean query may be another
        for group in np.unique(members // POOL_KEYS):
            some = members[members // POOL_KEYS == group]
            key, value = np.where(np.isfinite(keys[some]), keys[some], 0), values[some]
            s = scale * (key @ mean)
            w = np.exp(s - s.max())
            mass, w = s.max() + np.log(w.sum()), w / w.sum()
            pooled, squares = w @ key, w @ np.square(key).sum(axis=1)
            spread = w @ np.square(key - pooled).sum(axis=1)  # head_dim times the variance
            reach, farthest = np.linalg.norm(key, axis=1).max(), np.linalg.norm(key - pooled, axis=1).max()
            second = np.minimum(scale**2 / 2 * np.square(distance) * spread / dim, MOST_VARIANCE)
            logits.append(mass + scale * ((queries - mean) @ pooled) + second)
            size = scale * reach * (np.linalg.norm(queries, axis=1) + np.linalg.norm(mean))
            of_floats = U32 * ((dim + 2 * POOL_KEYS) * size + 4 * POOL_KEYS) + FEW * (1 + np.abs(mass))
            step = scale * turned * farthest  # that a score of q' moves relative to its pool's
            key_off = u * (np.linalg.norm(pooled) + np.sqrt(spread)) + np.expm1(2 * step) * np.sqrt(spread)
            spread_off = 3 * u * spread + 260 * U32 * squares + np.expm1(2 * step) * spread
            second_off = np.minimum(
                MOST_VARIANCE, scale**2 / 2 * (np.square(distance) * spread_off + 2 * distance * turned * spread) / dim
            )
            off.append(of_floats + u + scale * distance * key_off + step**2 + second_off)
            outs.append(np.broadcast_to(w @ value, own.out.shape))
            weights_off = (
                3 * u
                + np.expm1(2 * step)
                + np.expm1(2 * U32 * (dim + 2) * scale * reach * np.linalg.norm(mean))
                + FEW
                + POOL_KEYS * U32
            )
            outs_off.append(np.broadcast_to(2 * weights_off * (w @ np.abs(value)), own.out.shape))
        logits, off = np.stack(logits), np.stack(off)
        top = logits.max(axis=0)
        share = np.exp(logits - np.where(np.isneginf(top), 0, top))
        total = share.sum(axis=0)
        lse, share = top + np.log(total), (share / total)[..., None]
        outs, outs_off, grown = np.stack(outs), np.stack(outs_off), np.expm1(off)[..., None]
        out = (share * outs).sum(axis=0)
        moved = (share * grown).sum(axis=0)
        error = (share * (grown * (np.abs(outs) + np.abs(out)) + (1 + grown) * outs_off)).sum(axis=0)
        u = UNIT_ROUNDOFF[plan.dtype]
        least = 3 * LEAST_OUTPUT[plan.dtype] + LEAST_P[plan.dtype] * np.abs(values[members]).sum(axis=0)
        bound = (
            error / np.maximum(1 - moved, 1e-3) + 2 * u * (np.abs(out) + (share * np.abs(outs))[1:].sum(axis=0)) + least
        )
        most = max(np.abs(values[members]).max(initial=0), np.abs(np.nan_to_num(own.out)).max(initial=0))
        bound = np.where(moved < 0.5, np.fmin(bound, 2 * most + np.abs(out)), 2 * most + np.abs(out))
        lse_bound = -np.log1p(-np.minimum(moved[:, 0], 1 - 1e-9)) + FEW * (1 + np.abs(lse))
        lse_bound = np.where(moved[:, 0] < 0.5, lse_bound, off.max(axis=0) + FEW * (1 + np.abs(lse)))
    finite = np.isfinite(queries).all(axis=1)
    out, bound, lse, lse_bound = (
        np.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, before)
        for x, before in ((out, own.out), (bound, own.out_bound), (lse, own.lse), (lse_bound, own.lse_bound))
    )
    lost = np.isnan(out).any(axis=1) | np.isnan(lse)
    return Expected(
        out,
        bound,
        lse,
        _of_the_rest(lse_bound, lost),
        own.must_be_bad | lost[:, None],
        own.may_be_bad | lost[:, None],
    )
