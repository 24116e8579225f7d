"""Selection and attention with softcap, window and sink logits, in plain float64 from their definitions, for small
sizes. Shares no code with the twin."""

import numpy as np


def visible(nq, nk, causal, window=(-1, -1)):
    """bool [nq, nk]: query i, at position i + nk - nq, sees keys from left before it to right after it."""
    left, right = window
    position, key = np.arange(nq)[:, None] + nk - nq, np.arange(nk)[None]
    too_early = (left >= 0) & (key < position - left)
    too_late = ((right >= 0) & (key > position + right)) | (causal & (key > position))
    return ~(too_early | too_late)


def capped(s, softcap):
    return s if softcap == 0 else softcap * np.tanh(s / softcap)


def attend(q, k, v, allowed, scale, softcap=0.0, sink=-np.inf):
    """out [nq, d], lse [nq] of one head over the allowed pairs, and p [nq, nk]; all float64."""
    s = np.where(allowed, capped(scale * (q @ k.T), softcap), -np.inf)
    with np.errstate(all="ignore"):
        top = np.maximum(s.max(axis=1, initial=-np.inf), sink)
        base = np.where(np.isneginf(top), 0, top)
        p = np.where(allowed, np.exp(s - base[:, None]), 0)
        total = p.sum(axis=1) + (0 if np.isneginf(sink) else np.exp(sink - base))
        p = np.where(total[:, None] == 0, 0, p / total[:, None])
        lse = np.where(total == 0, -np.inf, top + np.log(total))
    return p @ v, lse, p


def anchors(nq, nk, causal, sink_keys=32, local=128):
    """bool [nq, nk]: the anchor keys of each row, before any visibility."""
    found = np.zeros((nq, nk), bool)
    found[:, : -(-sink_keys // 32) * 32] = True
    for i in range(nq):
        position = 64 * (i // 64) + nk - nq
        begin = max(0, position - local) // 32 * 32
        end = nk if causal else max(0, -(-(position + 64 + local) // 32) * 32)
        found[i, begin:end] = True
    return found


def select(estimated, exact, tau, causal, window=(-1, -1), softcap=0.0, sink=-np.inf, block=(64, 32), local=128):
    """(bits, margins) of one head, [query blocks, key blocks].

    estimated, exact: float64 [nq, nk], scores with the raw keys before the cap. A bit is set when a visible pair's
    share of what its row is known to sum to exceeds tau, or when the block holds a visible anchor of one of its 64-row
    tiles. margins: how far the block's best visible pair is from ln(tau), in natural logarithms.
    """
    nq, nk = estimated.shape
    seen, known = visible(nq, nk, causal, window), anchors(nq, nk, causal, local=local)
    shape = (-(-nq // block[0]), -(-nk // block[1]))
    bits, best = np.zeros(shape, bool), np.full(shape, -np.inf)
    for i in range(nq):
        if not seen[i].any():
            continue
        logits = np.append(capped(exact[i, known[i] & seen[i]], softcap), sink)
        with np.errstate(divide="ignore"):
            log_sum = np.logaddexp.reduce(logits)  # m + ln(l)
        for j in np.flatnonzero(seen[i]):
            at = i // block[0], j // block[1]
            best[at] = max(best[at], capped(estimated[i, j], softcap) - log_sum)
    with np.errstate(divide="ignore"):
        bits |= best > np.log(tau)
        margins = np.abs(best - np.log(tau))
    for first in range(0, nq, 64):  # anchors are whole 32-key blocks of 64-row tiles that see some of them
        of_tile, of_rows = seen[first : first + 64], known[first]
        for key in range(0, nk, 32):
            if of_rows[key : key + 32].any() and of_tile[:, key : key + 32].any():
                bits[first // block[0], key // block[1]] = True
    return bits, margins
