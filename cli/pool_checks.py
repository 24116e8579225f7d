"""What salekit validate checks of pools of skipped blocks: the kernels against the twin, the twin against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from salekit.checks import FEW, U32, UNIT_ROUNDOFF, Check, equal, within

from . import render
from .recomputing import sampled_blocks, score_bound


def check_kernels(q, k, v, tau: float, mask: Any, plan: Any, plan_options: dict) -> tuple[list[Check], np.ndarray]:
    """Checks of the pool stage on the GPU, and its output. mask: on the host."""
    from salekit.attend import attend
    from salekit.attention import sparse_attention

    from .bench import to_device

    render.note("validate: pools")
    placed = [to_device(x) for x in (q, k, v)]
    on_gpu = replace(mask, words=to_device(mask.words))
    found = attend(*placed, on_gpu, plan.replace(skipped="pool"), return_lse=True)
    out, lse = (x.get() for x in found)
    call = sparse_attention(*placed, thresholds=tau, skipped="pool", **plan_options)
    checks = [equal("pool", "output bits of a call with those of the stages", call.get().view(np.uint16),
                    out.view(np.uint16))]
    return checks + _next_to_the_twin(q, k, v, mask, plan, out, lse), out


def _next_to_the_twin(q, k, v, mask, plan, out, lse) -> list[Check]:
    """Root mean squares of each head. Roundings to 16 bits are independent and evenly spread: u / sqrt(3) each.

    Kernels and twin round the output twice, the kernels also p (of keys and of pools), pooled values and the weights in
    them: sqrt(8 / 3) u of what is summed, below 2 u. A pooled key is rounded, and so are its weights, which moves its
    score by scale * sum (q - q')_d K_d u sqrt(2 / 3), where the bias does not make it good: for q' alone it does. A
    score that is off by s moves the output by s * p * |value - output|, lse by s * p.
    """
    from salekit import reference, skipped_mass

    each = skipped_mass.blocks_of_a_pool(mask)
    u = UNIT_ROUNDOFF[plan.dtype]
    want, want_lse = skipped_mass.attend_with_pools(q, k, v, mask, plan, each)
    _, own_lse = reference.attend(q, k, v, mask, plan)
    sizes = [  # sum p |v|, of selected keys and pools, and of selected keys alone
        np.moveaxis(x.astype(np.float64), 1, 2)
        for x in (
            skipped_mass.attend_with_pools(q, k, np.abs(v), mask, plan, each)[0],
            reference.attend(q, k, np.abs(v), mask, plan)[0],
        )
    ]
    some = np.isfinite(want_lse)
    with np.errstate(invalid="ignore"):
        share = np.where(some, -np.expm1(own_lse.astype(np.float64) - want_lse), 0)[..., None]
    pooled = np.maximum(sizes[0] - (1 - share) * sizes[1], 0)
    off = _score_errors(q, k, plan)[..., None] * u
    wanted = np.moveaxis(want.astype(np.float64), 1, 2)
    slack = 2 * u * sizes[0] + off * (pooled + share * np.abs(wanted))
    # A mean query may round the other way, which the score feels in the second order.
    lse_size = np.where(some, np.abs(want_lse), 0)
    slack_lse = share[..., 0] * (off[..., 0] + u) + FEW * (1 + lse_size) + score_bound(q, k, plan)

    def rms(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(x.reshape(*x.shape[:2], -1)).mean(axis=-1))

    got = np.moveaxis(out.astype(np.float64), 1, 2)
    with np.errstate(invalid="ignore"):
        lse_error = np.where(lse == want_lse, 0, lse.astype(np.float64) - want_lse)
    return [
        within("pool", "out with the twin's, root mean square a head", rms(got - wanted), 0 * rms(wanted), rms(slack)),
        within("pool", "lse with the twin's, root mean square a head", rms(lse_error), 0 * rms(share), rms(slack_lse)),
    ]


def _score_errors(q, k, plan) -> np.ndarray:
    """[batch, heads, seqlen_q]: how far rounding moves a pool's score, in u; a pooled key is within the keys' range."""
    from salekit.skipped_mass import mean_query

    most = np.square(np.abs(k.astype(np.float64)).max(axis=1) * np.sqrt(2 / 3))  # [batch, kv heads, d]
    errors = np.zeros((plan.batch, plan.num_heads, plan.seqlen_q))
    for b, head in np.ndindex(plan.batch, plan.num_heads):
        for first in range(0, plan.seqlen_q, plan.block_q):
            rows = q[b, first : first + plan.block_q, head]
            distance = rows.astype(np.float64) - mean_query(rows).astype(np.float64)
            errors[b, head, first : first + plan.block_q] = np.sqrt(
                np.square(distance) @ most[b, head // plan.group_size]
            )
    return plan.softmax_scale * errors


# --- the twin ------------------------------------------------------------------------------------------------------
def check_twin(q, k, v, mask, plan) -> tuple[list[Check], np.ndarray]:
    """Checks of the twin's pools in float64 by their definition, on some query blocks of each head, and its output."""
    from salekit import skipped_mass

    render.note("validate: pools")
    out, lse = skipped_mass.attend_with_pools(q, k, v, mask, plan, skipped_mass.blocks_of_a_pool(mask))
    bits = mask.to_dense()
    u = UNIT_ROUNDOFF[plan.dtype]
    blocks = sampled_blocks(mask.num_q_blocks)
    means: list[tuple] = []
    outs: list[tuple] = []
    lses: list[tuple] = []
    for b, head in np.ndindex(plan.batch, plan.num_heads):
        kv = head // plan.group_size
        key, value = (x[b, :, kv].astype(np.float64) for x in (k, v))
        longest = np.linalg.norm(key, axis=1).max()
        for block in blocks:
            rows = np.arange(block * mask.block_q, min((block + 1) * mask.block_q, plan.seqlen_q))
            queries = q[b, rows, head].astype(np.float64)
            mean = skipped_mass.mean_query(q[b, rows, head]).astype(np.float64)
            exact = queries.mean(axis=0)
            means.append((mean, exact, u * np.abs(exact) + len(rows) * U32 * np.abs(queries).mean(axis=0)))
            want, want_lse, size = _attend_block(queries, mean, key, value, bits[b, head, block], rows, mask, plan)
            # The output is rounded, and so was that over the selected keys. Scores of pools are sums of head_dim
            # products, three of them, with pooled keys that are sums of 128 in float32; a variance is one of 128, too.
            reach = plan.softmax_scale * longest * (np.linalg.norm(queries, axis=1) + np.linalg.norm(mean))[:, None]
            off = U32 * ((plan.head_dim + 2 * skipped_mass.POOL_KEYS) * reach + 4 * skipped_mass.POOL_KEYS)
            off = off + FEW * (1 + np.abs(np.nan_to_num(want_lse, neginf=0)))[:, None]
            outs.append((out[b, rows, head], want, u * (np.abs(want) + size) + np.expm1(2 * off) * size))
            lses.append((lse[b, head, rows], want_lse, off[:, 0]))
    where = f"{len(blocks)} query blocks a head"
    return [
        within("pool", text, *(np.concatenate([part[i].ravel() for part in parts]) for i in range(3)))
        for text, parts in (
            ("mean queries with float64", means),
            (f"out with float64, {where}", outs),
            (f"lse with float64, {where}", lses),
        )
    ], out


def _attend_block(queries, mean, key, value, bits, rows, mask, plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, lse, sum p |v|) of a query block over its selected keys and the pools of what it skips, in float64."""
    from salekit.skipped_mass import MOST_VARIANCE, POOL_KEYS

    scale, keys = plan.softmax_scale, np.arange(plan.seqlen_k)
    last = rows + plan.offset if plan.causal else np.full(len(rows), plan.seqlen_k - 1)
    selected = bits[keys // mask.block_k]
    ends = np.minimum((keys // mask.block_k + 1) * mask.block_k, plan.seqlen_k)
    skipped = np.flatnonzero(~selected & (ends - 1 <= last[0]))
    scores = np.where(selected[None] & (keys[None] <= last[:, None]), scale * (queries @ key.T), -np.inf)
    extra = [scores]
    values = [value]
    for group in np.unique(skipped // POOL_KEYS):
        members = skipped[skipped // POOL_KEYS == group]
        s = scale * (key[members] @ mean)
        w = np.exp(s - s.max())
        mass, w = s.max() + np.log(w.sum()), w / w.sum()
        pooled = w @ key[members]
        variance = w @ np.square(key[members] - pooled).sum(axis=1) / plan.head_dim
        distance = np.square(queries - mean).sum(axis=1)
        second_order = np.minimum(scale**2 / 2 * distance * variance, MOST_VARIANCE)
        extra.append((mass + scale * ((queries - mean) @ pooled) + second_order)[:, None])
        values.append((w @ value[members])[None])
    scores, value = np.concatenate(extra, axis=1), np.concatenate(values)
    top = scores.max(axis=1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), -np.inf)[:, 0]
    p = p / np.where(total > 0, total, 1)
    return p @ value, lse, p @ np.abs(value)
