"""Block selection and attention pair by pair in plain float64, for small sizes. Shares no code with the twin."""

import math

import numpy as np


def anchor_keys(tile, nq, nk, causal, sink=32, local=128):
    """Anchor keys of the 64-row tile, before any causal limit."""
    position = 64 * tile + nk - nq
    begin = max(0, position - local) // 32 * 32
    end = nk if causal else max(0, -(-(position + 64 + local) // 32) * 32)
    return [j for j in range(nk) if j < -(-sink // 32) * 32 or begin <= j < end]


def sees(i, j, nq, nk, causal):
    return not causal or j <= i + nk - nq


def select(scores, exact, tau, causal, block_q, block_k, sink=32, local=128):
    """bool [query blocks, key blocks] of one head: scores decide, exact gives m and l; both float64 [nq, nk]."""
    nq, nk = scores.shape
    bits = np.zeros((-(-nq // block_q), -(-nk // block_k)), bool)
    for i in range(nq):
        seen = [j for j in range(nk) if sees(i, j, nq, nk, causal)]
        anchors = [j for j in anchor_keys(i // 64, nq, nk, causal, sink, local) if sees(i, j, nq, nk, causal)]
        if not seen:
            continue
        m = max(exact[i, j] for j in anchors)
        l = sum(math.exp(exact[i, j] - m) for j in anchors)
        for j in seen:
            if math.exp(scores[i, j] - m) / l > tau:
                bits[i // block_q, j // block_k] = True
        # The anchor blocks of the row's tile, as far as the tile's last row sees.
        last = min(64 * (i // 64) + 63, nq - 1)
        for j in anchor_keys(i // 64, nq, nk, causal, sink, local):
            first = j // 32 * 32
            if sees(last, first, nq, nk, causal):
                bits[i // block_q, first // block_k] = True
    return bits


def attend(q, k, v, bits, scale, causal, block_q, block_k):
    """out [nq, d], lse [nq] of one head in float64 over the selected, visible pairs."""
    nq, nk = len(q), len(k)
    out, lse = np.zeros((nq, v.shape[1])), np.full(nq, -np.inf)
    for i in range(nq):
        keys = [j for j in range(nk) if bits[i // block_q, j // block_k] and sees(i, j, nq, nk, causal)]
        if keys:
            s = scale * (k[keys] @ q[i])
            p = np.exp(s - s.max())
            out[i], lse[i] = p @ v[keys] / p.sum(), s.max() + math.log(p.sum())
    return out, lse
