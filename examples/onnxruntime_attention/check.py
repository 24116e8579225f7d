"""How far apart two 16-bit computations of one attention, or of a model of one layer, may be."""

from __future__ import annotations

import numpy as np

HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# ONNX Runtime's nodes may round, in 16 bits, the scale (or its root, in q and in k), q and k scaled, and the scores.
SCORE_ROUNDINGS = 5
VALUE_ROUNDINGS = 4  # the softmax on either side, and the result on either side


def attention_tolerance(q: np.ndarray, k: np.ndarray, v: np.ndarray, same_inputs: bool = True) -> np.ndarray:
    """[batch, heads]: a bound on the Euclidean distance of two results for one row and head.

    q, k, v: [batch, seqlen, heads, head_dim], of one 16-bit dtype. A score is off by at most x = n u S, with n
    roundings, u half a unit in the last place, S a bound on all scores. ``out = sum_j p_j v_j`` moves along
    ``sum_j p_j ds_j (v_j - out)``, at most x max|v|, for ``sum_j p_j |v_j - out| <= max|v|``. Roundings of p and of out
    add u max|v| each; p that is subnormal in float16, and float32 sums, add 2^-23 max|v| a key. same_inputs=False: one
    side had q, k and v before they were rounded to 16 bits. What rounds before q, k and v is taken to be the same.
    """
    unit, (_, num_keys, _, head_dim) = HALF_ULP[q.dtype.name], k.shape
    longest_q, longest_k, longest_v = (np.linalg.norm(x.astype(np.float64), axis=3).max(axis=1) for x in (q, k, v))
    group = longest_q.shape[1] // longest_k.shape[1]
    longest_k, longest_v = (np.repeat(x, group, axis=1) for x in (longest_k, longest_v))
    scores = longest_q * longest_k * head_dim**-0.5
    extra = 0 if same_inputs else 1
    in_scores = (SCORE_ROUNDINGS + 2 * extra) * unit * scores
    return longest_v * (in_scores + (VALUE_ROUNDINGS + extra) * unit + num_keys * 2.0**-23)


def attention_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """[batch, heads]: the largest distance of a row. got, want: [batch, seqlen, heads, head_dim]."""
    return np.linalg.norm(got.astype(np.float64) - want.astype(np.float64), axis=3).max(axis=1)


def layer_tolerance(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, weights: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """[batch]: a bound on the distance of two rows of hidden, ``x + out @ weights``, in a model of one layer.

    out: [batch, seqlen, heads, head_dim]; weights: [width, width]; hidden: [batch, seqlen, width]. The distance of the
    heads' results, times the largest singular value of weights; both sides round the product and the sum.
    """
    unit = HALF_ULP[q.dtype.name]
    weights, hidden = weights.astype(np.float64), hidden.astype(np.float64)
    in_attention = np.sqrt((attention_tolerance(q, k, v, same_inputs=False) ** 2).sum(axis=1))
    product = np.linalg.norm(out.astype(np.float64).reshape(hidden.shape) @ weights, axis=2).max(axis=1)
    length = np.linalg.norm(hidden, axis=2).max(axis=1)
    return np.linalg.norm(weights, 2) * in_attention + 2 * unit * (product + length)


def row_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """[batch]: the largest distance of a row. got, want: [batch, seqlen, width]."""
    return np.linalg.norm(got.astype(np.float64) - want.astype(np.float64), axis=2).max(axis=1)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Of the whole array, in the Euclidean norm."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
