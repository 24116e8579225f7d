"""Which blocks have to be selected, in float64 from the definitions, and which may go either way by a rounding.

A block is selected when some visible pair of a tested row has an estimated score above the row's limit
(docs/algorithm.md). ``Decisions.of_block`` gives for each key block the largest such difference, between a lower and
an upper bound on it over all roundings: above 0 both, the bit has to be set; below both, clear; otherwise the block is
in doubt. What may differ from float64, e = 2^-24:

- means: NumPy's are rounded once; the kernels add at most 104 deviations from the first row one by one, e each of
  mean |x| + max |x|. A shift of the mean by d moves amax by d, and a code x by its share of that and 4 roundings of x.
- codes: one that is so near to a tie may be its neighbour. Of a pair the sum of |other code| over such channels counts.
- pruning (int8-sp24): the second and third largest weights of four may change places where they are as near as the root
  mean squares are uncertain.
- correction (int4): rint of a quotient that is off by its float32 sum; taken at both ends.
- limit: where m is beyond 2^29, anything on a GPU; elsewhere m + ln(l) moves by the error of the anchors' scores (see
  ``oracle``) and 16e of its size; float32 quotients y / (softmax_scale sq sk) by 8e of y. Softcap: the uncapped limit
  at both ends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..checks import FEW, U32
from ..plans import Plan
from .oracle import CAP_ERROR, finite_norms, seen_range

TINY = 2.0**-100  # a group whose largest is below this is a zero group
LEAST_UNIT = 2.0**-120  # a smaller step between scores is not held by float32 with all its bits
CLAMP = 2.0**29  # half of what integer scores and limits are clamped to
LARGEST_SCORE = 2.0**29  # from about here on the kernels' exp(s - m) may overflow by the rounding of m log2(e)


class Codes(NamedTuple):
    """codes: [rows, head_dim]; near: those that may be their neighbour; scale: [rows]; off: relative error of scale."""

    codes: np.ndarray
    near: np.ndarray
    scale: np.ndarray
    off: np.ndarray


def _quantize(x: np.ndarray, off: np.ndarray, amax: np.ndarray, limit: int) -> Codes:
    """x [rows, head_dim], each off by ``off``, in groups whose largest is amax [rows] (off by the largest off)."""
    with np.errstate(all="ignore"):
        zero = amax < TINY
        usable = np.where(zero | ~np.isfinite(amax), 1, amax)[:, None]
        relative = np.broadcast_to(off, x.shape).max(axis=1) / usable[:, 0]
        y = np.clip(np.where(np.isfinite(x), x, 0) * limit / usable, -limit, limit)
        slack = limit * off / usable + np.abs(y) * (4 * U32 + relative[:, None])
        near = np.abs(np.abs(y - np.floor(y)) - 0.5) <= slack
        codes = np.where(zero[:, None], 0, np.rint(y))
        uncertain = (amax < 2 * TINY) & ((amax > TINY / 2) | (np.broadcast_to(off, x.shape).max(axis=1) > TINY / 4))
        relative = np.where(uncertain | (relative > 1e-3), np.inf, relative)
        relative = np.where(zero & ~uncertain, 0, relative)
    return Codes(codes, near & ~zero[:, None], np.where(zero, 1, amax / limit), relative)


class Decisions:
    """Of one call. q, k: [batch, rows, heads, head_dim], NumPy; thresholds: [num_heads]; k_statistics: NumPy's."""

    def __init__(
        self, q, k, plan: Plan, thresholds, sink_logits: Any = None, k_statistics: Any = None, on_gpu: bool = False
    ):
        self.q, self.k, self.plan, self.on_gpu, self.statistics = q, k, plan, on_gpu, k_statistics
        self.thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), (plan.num_heads,))
        self.sinks = np.full(plan.num_heads, -np.inf) if sink_logits is None else np.asarray(sink_logits, np.float64)
        self._keys, self._mean_query = (
            lru_cache(maxsize=2)(self._read_keys),
            lru_cache(maxsize=2)(self._read_mean_query),
        )

    def _mean(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the rows, and how far the library's may be off."""
        mean, off = x.mean(axis=0), 2 * U32 * np.abs(x.mean(axis=0))
        if self.on_gpu:
            off = off + 104 * U32 * (np.abs(x).mean(axis=0) + np.abs(x).max(axis=0))
        return mean, off

    def _read_keys(self, b: int, kv: int) -> dict[str, Any]:
        plan, keys = self.plan, self.k[b, :, kv].astype(np.float64)
        with np.errstate(all="ignore"):
            if self.statistics is None:
                mean, off = self._mean(keys)
            else:
                mean, off = self.statistics.mean[b, kv].astype(np.float64), np.zeros(plan.head_dim)
            smooth = keys - mean
            if plan.estimator == "int4":
                amax = _group_amax(smooth, 32, lambda j: j % 8 // 2)
            elif self.statistics is None:
                amax = np.broadcast_to(np.abs(smooth).max(initial=0), len(keys))
            else:
                amax = np.broadcast_to(np.float64(self.statistics.amax[b, kv]), len(keys))
            rms = np.sqrt(np.square(smooth).mean(axis=0))
            rms_off = 4 * U32 + off / np.where(rms == 0, 1, rms)
            if self.on_gpu:  # squares of deviations from the first of each 512 rows, less those of their mean
                from_first = keys - np.repeat(keys[::512], 512, axis=0)[: len(keys)]
                rms_off += 104 * U32 * np.square(from_first).mean(axis=0) / np.where(rms == 0, 1, np.square(rms))
            if self.statistics is not None:
                rms, rms_off = self.statistics.rms[b, kv].astype(np.float64), np.full(plan.head_dim, 4 * U32)
            is_bad = not np.isfinite(amax).all() if self.statistics is not None else not np.isfinite(keys).all()
            codes = _quantize(smooth, off + U32 * np.abs(smooth), amax, 7 if plan.estimator == "int4" else 127)
        return dict(
            keys=keys,
            norms=finite_norms(keys),
            mean=mean,
            off=off,
            smooth=smooth,
            codes=codes,
            rms=rms,
            rms_off=rms_off,
            is_bad=is_bad,
        )

    def _read_mean_query(self, b: int, head: int) -> tuple:
        """int4: (mean, its error, the groups' largest of each row, whether any row is not finite)."""
        rows = self.q[b, :, head].astype(np.float64)
        with np.errstate(all="ignore"):
            mean, off = self._mean(rows)
            amax = _group_amax(rows - mean, 16, lambda i: i % 8)
        return mean, off, amax, not np.isfinite(rows).all()

    def is_tested(self, rows: np.ndarray) -> np.ndarray:
        """Rows that query_stride tests and that see a key."""
        plan = self.plan
        start = rows // plan.block_q * plan.block_q
        end = np.minimum(start + plan.block_q, plan.seqlen_q)
        whole = end > plan.seqlen_q - plan.full_rows
        begins, ends = seen_range(plan, rows)
        return (whole | ((rows - start) % plan.query_stride == 0)) & (begins < ends)

    def anchors_of(self, tile: int) -> np.ndarray:
        """bool [seqlen_k]: the anchor keys of a 64-row tile, whether a row sees them or not."""
        plan, keys = self.plan, np.arange(self.plan.seqlen_k)
        position = 64 * tile + plan.seqlen_k - plan.seqlen_q
        begin = max(0, position - plan.local) // 32 * 32
        end = plan.seqlen_k if plan.causal else -(-(position + 64 + plan.local) // 32) * 32
        return (keys < -(-plan.sink // 32) * 32) | ((keys >= begin) & (keys < end))

    def of_block(self, b: int, head: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low, float64's own, high), [num_k_blocks]; +inf all: an anchor, or what selects everything."""
        plan = self.plan
        rows = np.arange(block * plan.block_q, min((block + 1) * plan.block_q, plan.seqlen_q))
        tested = rows[self.is_tested(rows)]
        found = np.full((3, plan.num_k_blocks * plan.block_k), -np.inf)
        with np.errstate(all="ignore"):
            if tested.size:
                bounds = self._pairs(b, head, tested)
                begins, ends = seen_range(plan, tested)
                keys = np.arange(plan.seqlen_k)
                sees = (keys >= begins[:, None]) & (keys < ends[:, None])
                for best, bound in zip(found, bounds):
                    best[: plan.seqlen_k] = np.where(sees, bound, -np.inf).max(axis=0, initial=-np.inf)
        for tile in np.unique(rows // 64):
            of_tile = rows[rows // 64 == tile]
            begins, ends = seen_range(plan, of_tile)
            known = self.anchors_of(tile)
            for first in range(0, plan.seqlen_k, 32):
                last = min(first + 32, plan.seqlen_k)
                if known[first:last].any() and ((begins < last) & (ends > first) & (begins < ends)).any():
                    found[:, first] = np.inf
        return tuple(found.reshape(3, plan.num_k_blocks, plan.block_k).max(axis=2))

    def _limits(self, b: int, head: int, rows: np.ndarray, of_keys: dict) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) [rows]: what a score has to exceed; -inf both: the row selects everything, +inf: nothing."""
        plan, tau = self.plan, self.thresholds[head]
        queries = self.q[b, rows, head].astype(np.float64)
        found = np.zeros((2, rows.size))
        begins, ends = seen_range(plan, rows)
        shift = plan.softmax_scale * (queries @ of_keys["mean"])
        norms = finite_norms(queries)
        mean_norm, off_norm = (
            np.linalg.norm(np.nan_to_num(of_keys[name], posinf=0, neginf=0)) for name in ("mean", "off")
        )
        shift_off = plan.softmax_scale * norms * ((plan.head_dim + 2) * U32 * mean_norm + off_norm)
        for tile in np.unique(rows // 64):
            of_tile = rows // 64 == tile
            keys = np.flatnonzero(self.anchors_of(tile))
            sees = (keys >= begins[of_tile][:, None]) & (keys < ends[of_tile][:, None])
            s = plan.softmax_scale * (queries[of_tile] @ of_keys["keys"][keys].T)
            terms = plan.head_dim / 2 + 4 if self.on_gpu else plan.head_dim + 2
            off = plan.softmax_scale * terms * U32 * norms[of_tile] * of_keys["norms"][keys].max(initial=0)
            if plan.softcap:
                s = plan.softcap * np.tanh(s / plan.softcap)
                off = np.minimum(off, 2 * plan.softcap) + plan.softcap * (CAP_ERROR if self.on_gpu else 4 * U32)
            s = np.where(sees, s, -np.inf)
            s = np.concatenate((s, np.full((len(s), 1), self.sinks[head])), axis=1)
            top = s.max(axis=1)
            total = np.exp(s - np.where(np.isneginf(top), 0, top)[:, None]).sum(axis=1)
            log_sum = top + np.log(total)
            moved = shift[of_tile] if not plan.softcap else np.zeros(of_tile.sum())
            y = log_sum - moved + np.log(tau)
            off = (
                off
                + 2 * U32 * keys.size
                + FEW * (2 + np.abs(top) + np.abs(log_sum) + np.abs(moved) + np.abs(np.log(tau)))
            )
            if not plan.softcap:
                off = off + shift_off[of_tile]
            if self.on_gpu:
                off = np.where(np.abs(top) > LARGEST_SCORE, np.inf, off)
            both = np.stack((y - off, y + off))
            if plan.softcap:
                ratio = np.clip(both / plan.softcap, -1, 1)
                both = plan.softcap * np.arctanh(ratio)
                slack = FEW * (1 + np.abs(both) + np.abs(shift[of_tile])) + shift_off[of_tile]
                both = both - shift[of_tile] + np.array([[-1], [1]]) * slack
            known = np.isfinite(log_sum) & np.isfinite(shift[of_tile])
            both = np.where(np.isposinf(tau), np.inf, both)
            found[:, of_tile] = np.where(known & (tau > 0), both, -np.inf)
        return found[0], found[1]

    def _pairs(self, b: int, head: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low, float64's own, high) [rows, seqlen_k]: estimated score less limit, of these rows with all keys."""
        plan, kv = self.plan, head // self.plan.group_size
        of_keys = self._keys(b, kv)
        limit_low, limit_high = self._limits(b, head, rows, of_keys)
        queries = self.q[b, rows, head].astype(np.float64)
        bad = ~np.isfinite(queries).all(axis=1) | of_keys["is_bad"]
        clean = np.where(np.isfinite(queries), queries, 0)
        if plan.estimator == "int4":
            mean_q, off_q, amax, any_bad = self._mean_query(b, head)
            codes = _quantize(np.nan_to_num(clean - mean_q), off_q + U32 * np.abs(clean), amax[rows], 7)
            bad = bad | (any_bad & np.isfinite(limit_high))
            score, off = self._products(codes, of_keys["codes"])
            more = self._correction(codes, of_keys, mean_q, off_q)
            low, high, far = score + more[0] - off, score + more[1] + off, more[2]
            score = score + (more[0] + more[1]) / 2
        else:
            kept, swapped = clean, 0.0
            if plan.estimator == "int8-sp24":
                kept, swapped = self._prune(clean, of_keys)
            codes = _quantize(kept, np.zeros_like(kept), np.abs(kept).max(axis=1), 127)
            score, off = self._products(codes, of_keys["codes"])
            off = off + swapped
            low, high, far = score - off, score + off, False
        unit = plan.softmax_scale * codes.scale[:, None] * of_keys["codes"].scale
        y = np.where(np.isfinite(limit_high), np.maximum(np.abs(limit_low), np.abs(limit_high)), 0)[:, None]
        doubtful = far | (unit < LEAST_UNIT) | (y > CLAMP * unit) & (np.abs(score) > CLAMP * unit)
        slack = 8 * U32 * (y + np.abs(score))
        low = np.where(doubtful, -np.inf, low - slack - limit_high[:, None])
        high = np.where(doubtful, np.inf, high + slack - limit_low[:, None])
        own = score - (limit_low + limit_high)[:, None] / 2
        never, always = np.isposinf(limit_low)[:, None], (np.isneginf(limit_high) | bad)[:, None]
        found = (np.where(always, np.inf, np.where(never, -np.inf, x)) for x in (low, own, high))
        return tuple(np.where(np.isnan(x), unknown, x) for x, unknown in zip(found, (-np.inf, 0.0, np.inf)))

    def _products(self, q: Codes, k: Codes) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the codes and how far they may be off, [rows, seqlen_k]."""
        unit = self.plan.softmax_scale * q.scale[:, None] * k.scale
        score = unit * (q.codes @ k.codes.T)
        near_q, near_k = q.near.astype(np.float64), k.near.astype(np.float64)
        moved = np.abs(q.codes) @ near_k.T if near_k.any() else 0
        if near_q.any():
            moved = moved + near_q @ (np.abs(k.codes) + near_k).T
        relative = q.off[:, None] + k.off + 8 * U32
        # Where a group is as small as the error of its mean, its codes may be anything up to the largest.
        unresolved = ~np.isfinite(relative)
        off = unit * moved + np.abs(score) * np.where(unresolved, 0, relative)
        return score, np.where(unresolved, np.inf, off)

    def _prune(self, queries: np.ndarray, of_keys: dict) -> tuple[np.ndarray, Any]:
        """(q with two of every four zero, how far other choices move scores [rows, seqlen_k])."""
        weight = (np.abs(queries) * np.nan_to_num(of_keys["rms"])).reshape(len(queries), -1, 4)
        order = np.argsort(-weight, axis=-1, kind="stable")
        ranked = np.take_along_axis(weight, order, axis=-1)
        keep = np.zeros(weight.shape, bool)
        np.put_along_axis(keep, order[..., :2], True, axis=-1)
        off = np.nan_to_num(of_keys["rms_off"], nan=1, posinf=1).reshape(-1, 4).max(axis=1)
        slack = ((2 * off + 4 * U32) * ranked[..., 1])[..., None]
        doubtful = ranked[..., 1:2] - ranked[..., 2:3] <= slack
        change = (doubtful & (np.abs(weight - ranked[..., 1:2]) <= slack) & (weight > 0)).reshape(queries.shape)
        kept = np.where(keep.reshape(queries.shape), queries, 0)
        if not change.any():
            return kept, 0.0
        keys = np.abs(of_keys["codes"].codes) * of_keys["codes"].scale[:, None]
        moved = np.where(change, np.abs(queries), 0) @ keys.T  # a code is 0 or at most twice its value
        # Another largest element gives the row another scale: each code is within half a step of both.
        largest = np.abs(np.where(change, queries, 0)).max(axis=1)
        step = np.where(largest >= np.abs(kept).max(axis=1), largest / 127, 0)
        return kept, self.plan.softmax_scale * (2 * moved + step[:, None] * keys.sum(axis=1))

    def _correction(self, codes: Codes, of_keys: dict, mean_q, off_q) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int4: (low, high) of the correction as a score, and where the clamp is near."""
        unit = codes.scale[:, None] * of_keys["codes"].scale
        smooth = np.abs(of_keys["smooth"])
        exact = of_keys["smooth"] @ mean_q
        off = smooth @ (self.plan.head_dim * 2 * U32 * np.abs(mean_q) + off_q) + np.abs(mean_q) @ of_keys["off"]
        relative = codes.off[:, None] + of_keys["codes"].off + 8 * U32
        size = np.abs(exact / unit)
        slack = off / unit + size * relative
        far = (size > CLAMP) | ~(slack < CLAMP)
        scale = self.plan.softmax_scale * unit
        return scale * np.rint(exact / unit - slack), scale * np.rint(exact / unit + slack), far


def _group_amax(x: np.ndarray, size: int, group_of) -> np.ndarray:
    """[rows]: the largest |x| in each row's group, of the rows with equal group_of in each ``size`` rows."""
    index = np.arange(len(x))
    group = index // size * size + group_of(index % size)
    amax = np.zeros(len(x) + size)
    np.maximum.at(amax, group, np.abs(x).max(axis=1, initial=0))
    return amax[group]
