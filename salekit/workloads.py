"""LLM-like q, k and v, whose block densities under SALE follow those of real heads. Seeded; NumPy or GPU.

A query block of 128 rows has a direction x, a key block of 32 keys a vector y, both in 16 channels: a score is
``beta * x.y`` plus some noise, so that blocks matter or do not matter as blocks. x leans towards a direction of its
head's own, so that neighbouring query blocks choose overlapping keys. The first four keys are sinks: in one channel of
their own every row of a query head gives them the score ``sink_score``, which raises the head's limit and so sets its
density. Keys are shared by the query heads of a group: all that differs between heads lies on q's side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import BFLOAT16, import_cupy, tensor_view
from .plans import CODE_TILE_ROWS, KEY_BLOCK, TILE_ROWS, Plan, ceil_div

# Densities of 32 real heads at 131,072 tokens (8 layers of 4 heads; int8, tau .008, 128x32 blocks), anchors included.
REAL_DENSITIES = (
    0.0146, 0.0580, 0.1680, 0.2735, 0.0400, 0.1752, 0.0707, 0.9942, 0.0180, 0.0441, 0.2689, 0.0129, 0.1693, 0.6146,
    0.9829, 0.0378, 0.2041, 0.2722, 0.1634, 0.0164, 0.0267, 0.2887, 0.0607, 0.0820, 0.0232, 0.0124, 0.0394, 0.0587,
    0.0998, 0.0121, 0.9131, 0.9356,
)
REAL_SEQLEN = 131072
TAU = 0.008  # the threshold at which the densities hold

NUM_COHERENT = 16  # channels 0, 4, ..., 60: one in four, so that 2:4 pruning of q keeps what decides
SINK_CHANNEL = 1
NUM_SINKS = 4
SINK_KEY = 8.0  # a sink key's value in its channel; about the largest of the other values, as int8 has one scale a head
PERSISTENCE = 0.6  # share of x's energy that lies in its head's own direction
KEY_NOISE = 0.25  # standard deviation of a key's coherent channels around its block's
REST_NOISE = 0.2  # standard deviation, in score units, of what the other channels add
DIFFUSE_ABOVE = 0.5  # heads denser than this are diffuse: their rows differ more than their blocks do

# What sink_score_for() found for REAL_DENSITIES (its default arguments).
_SINK_SCORES = (
    10.795, 9.333, 7.844, 6.914, 9.718, 7.762, 9.063, 4.416, 10.567, 9.625, 6.951, 10.928, 7.835, 7.805, 5.122, 9.782,
    7.479, 6.921, 7.885, 10.694, 10.167, 6.801, 9.263, 8.872, 10.319, 10.999, 9.739, 9.312, 8.645, 11.014, 6.253, 6.026,
)


def anchor_share(seqlen: int) -> float:
    """Anchor blocks over visible blocks of 128x32 masks, causal, with the default sink and local."""
    plan = Plan(1, seqlen, seqlen, 1, 1, 64, "bfloat16", 1.0)
    anchors = 0
    for row in range(plan.num_q_blocks):
        first = plan.local_range(2 * row)[0] // KEY_BLOCK
        anchors += int(plan.visible_blocks[row]) - first + (first > 0)
    return anchors / int(plan.visible_blocks.sum())


@lru_cache(maxsize=1)
def target_densities() -> tuple[float, ...]:
    """Share of the blocks that are no anchors which each of the 32 profiles selects, at any length.

    With the anchors of 131,072 tokens added they are REAL_DENSITIES; shorter inputs have a larger share of anchors.
    """
    anchors = anchor_share(REAL_SEQLEN)
    return tuple(max(0.0, (density - anchors) / (1 - anchors)) for density in REAL_DENSITIES)


def profiles_of(num_heads: int) -> np.ndarray:
    """int [num_heads]: the profile (index into REAL_DENSITIES) of each head.

    32 heads or more take them in order, again and again; fewer take evenly spaced quantiles of the densities.
    """
    if num_heads >= len(REAL_DENSITIES):
        return np.arange(num_heads) % len(REAL_DENSITIES)
    order = np.argsort(REAL_DENSITIES)
    return order[((np.arange(num_heads) + 0.5) / num_heads * len(order)).astype(int)]


def _strength(density: float) -> tuple[float, float]:
    """(beta, row noise): standard deviations, in score units, of a block's score and of a row's departure from it."""
    return (1.0, 1.5) if density > DIFFUSE_ABOVE else (2.0, 0.5)


def sink_scores() -> np.ndarray:
    """float64 [32]: the sink score of each profile."""
    return np.array(_SINK_SCORES)


def sink_score_for(density: float, *, query_blocks: int = 64, key_blocks: int = 256, seed: int = 1) -> float:
    """The sink score at which a head selects ``density`` of the blocks that are no anchors, by bisection on a sample.

    A row's limit is ln(tau) plus the logarithm of the sum of exp(score) over its anchors, for m + ln(l) is just that;
    so a block is selected when some score in it, less the row's sum, exceeds ln(tau).
    """
    rng = np.random.default_rng(seed)
    beta, row_noise = _strength(density)
    # Eight local blocks hold what both 64-row tiles of a block can see; the rest are drawn afresh.
    own = _unit(rng.standard_normal(NUM_COHERENT))
    margin, sums = [], []
    for _ in range(query_blocks):
        x = _directions(rng, own, 1)[0]
        rows = beta * x + row_noise / 4 * rng.standard_normal((CODE_TILE_ROWS, NUM_COHERENT))
        y = rng.standard_normal((9 + key_blocks, 1, NUM_COHERENT))
        keys = (y + KEY_NOISE * rng.standard_normal((y.shape[0], KEY_BLOCK, NUM_COHERENT))).reshape(-1, NUM_COHERENT)
        scores = (rows.astype(np.float32) @ keys.T.astype(np.float32)).astype(np.float64)
        scores += REST_NOISE * rng.standard_normal(scores.shape, dtype=np.float32)
        local = scores[:, : 8 * KEY_BLOCK]
        row, position = np.arange(CODE_TILE_ROWS)[:, None], np.arange(8 * KEY_BLOCK)[None]
        tile_start = row // TILE_ROWS * TILE_ROWS
        seen = (position >= tile_start) & (position <= row + 128)
        sink_block = scores[:, 8 * KEY_BLOCK + NUM_SINKS : 9 * KEY_BLOCK]
        sums.append((np.exp(local) * seen).sum(axis=1) + np.exp(sink_block).sum(axis=1))
        margin.append(scores[:, 9 * KEY_BLOCK :].reshape(CODE_TILE_ROWS, key_blocks, KEY_BLOCK).max(axis=2))
    top, total = np.stack(margin), np.stack(sums)[..., None]

    def density_at(score: float) -> float:
        return float(((top - np.log(total + NUM_SINKS * np.exp(score))).max(axis=1) > np.log(TAU)).mean())

    low, high = -20.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if density_at(middle) > density else (low, middle)
    return (low + high) / 2


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _directions(rng: np.random.Generator, own: np.ndarray, count: int) -> np.ndarray:
    """Unit vectors [count, ...] that share PERSISTENCE of their energy with ``own``."""
    fresh = rng.standard_normal((count, *own.shape), dtype=np.float32)
    fresh -= (fresh * own).sum(axis=-1, keepdims=True) * own
    return np.sqrt(PERSISTENCE) * own + np.sqrt(1 - PERSISTENCE) * _unit(fresh)


def llm_like_qkv(
    seqlen: int,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    *,
    dtype: str = "bfloat16",
    batch: int = 1,
    seqlen_q: int | None = None,
    seed: int = 0,
    cuda: bool = False,
) -> tuple[Any, Any, Any]:
    """q [batch, seqlen_q, num_heads, head_dim], k and v [batch, seqlen, num_kv_heads, head_dim], bshd and contiguous.

    dtype: "bfloat16" or "float16". cuda: CuPy arrays by a kernel on the current stream, else NumPy; the block vectors
    are the same, the noise within blocks is another draw of the same distribution. Meant for the default softmax_scale.
    """
    seqlen_q = seqlen if seqlen_q is None else seqlen_q
    rng = np.random.default_rng([seed, seqlen, num_heads, num_kv_heads])
    profiles = profiles_of(num_heads)
    beta, row_noise = np.array([_strength(REAL_DENSITIES[p]) for p in profiles], np.float32).T
    root = np.float32(np.sqrt(head_dim))  # softmax_scale is 1 / root
    num_rest = head_dim - NUM_COHERENT - 1

    own = _unit(rng.standard_normal((batch, num_heads, NUM_COHERENT), dtype=np.float32))
    x = np.moveaxis(_directions(rng, own, ceil_div(seqlen_q, CODE_TILE_ROWS)), 0, 1)
    x = x * (beta * root)[:, None]
    num_key_blocks = ceil_div(seqlen, KEY_BLOCK)
    y = rng.standard_normal((batch, num_key_blocks, num_kv_heads, NUM_COHERENT), dtype=np.float32)
    z = rng.standard_normal((batch, num_key_blocks, num_kv_heads, NUM_COHERENT), dtype=np.float32)

    rest_k = np.float32(0.25)
    rest_q = np.float32(REST_NOISE * root / (np.sqrt(num_rest) * rest_k))
    sink_q = (sink_scores()[profiles] * root / SINK_KEY).astype(np.float32)
    kv = np.ones(num_kv_heads, np.float32)
    write = _fill_gpu if cuda else _fill_numpy
    same = dict(head_dim=head_dim, dtype=dtype)
    q = write(x, row_noise * root / 4, sink_q, rest_q, seqlen_q, CODE_TILE_ROWS, 0, seqlen_q, _seed(rng), **same)
    k = write(y, KEY_NOISE * kv, SINK_KEY * kv, rest_k, seqlen, KEY_BLOCK, NUM_SINKS, NUM_SINKS, _seed(rng), **same)
    v = write(z, 0.5 * kv, 0 * kv, 1.0, seqlen, KEY_BLOCK, 0, 0, _seed(rng), **same)
    return q, k, v


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


def _fill_numpy(
    vectors, noise_in, constant, noise_out, seqlen, block_rows, skip_rows, constant_rows, seed, *, head_dim, dtype
):
    """The twin of cuda_src/kernels/fill_workload.cu: the same distribution, other draws."""
    batch, _, heads, _ = vectors.shape
    numpy_dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(np.float16)
    tensor = np.empty((batch, seqlen, heads, head_dim), numpy_dtype)
    coherent = slice(0, 4 * NUM_COHERENT, 4)
    block = np.arange(seqlen) // block_rows
    rng = np.random.default_rng(seed)
    for b in range(batch):
        for head in range(heads):
            x = rng.standard_normal((seqlen, head_dim), dtype=np.float32)
            inner = vectors[b, block, head] + np.float32(noise_in[head]) * x[:, coherent]
            x *= np.float32(noise_out)
            x[:, coherent] = inner
            x[:skip_rows, coherent] = 0
            x[:, SINK_CHANNEL] = 0
            x[:constant_rows, SINK_CHANNEL] = constant[head]
            tensor[b, :, head] = x.astype(numpy_dtype)
    return tensor


def kernel_specs(plan: Plan) -> list:
    """The kernel that writes a workload of this plan's head_dim and dtype."""
    from .jit import KernelSpec

    return [KernelSpec("fill_workload", (str(plan.head_dim), plan.element))]


def _fill_gpu(
    vectors, noise_in, constant, noise_out, seqlen, block_rows, skip_rows, constant_rows, seed, *, head_dim, dtype
):
    cupy = import_cupy()
    from .jit import KernelSpec, get_kernel

    batch, _, heads, _ = vectors.shape
    tensor = cupy.empty((batch, seqlen, heads, head_dim), BFLOAT16 if dtype == "bfloat16" else np.dtype(np.float16))
    if tensor.size == 0:
        return tensor
    element = {"bfloat16": "BFloat16", "float16": "Half"}[dtype]
    host = [np.ascontiguousarray(x, np.float32) for x in (vectors, noise_in, constant)]
    get_kernel(KernelSpec("fill_workload", (str(head_dim), element)))(
        (ceil_div(seqlen * head_dim // 8, 256), heads, batch), (256,),
        (tensor_view(tensor), *(cupy.asarray(x) for x in host), np.float32(noise_out), np.int32(seqlen),
         np.int32(block_rows), np.int32(skip_rows), np.int32(constant_rows), np.uint64(seed)),
    )
    return tensor
