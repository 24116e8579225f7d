"""Quantised q and k, and the two orders their codes are stored in.

Rows: int8 ``[batch, heads, seqlen, head_dim]``, one code a byte, as the NumPy twin computes them.
Tiles: uint8 ``[batch, heads, num_tiles, 128 * row_bytes]``, as the kernels read them: 128-row tiles, rows past the end
zero, dims from head_dim to ``plans.padded_dim`` zero, 4-bit codes packed with even d in the low nibble, 16-byte chunk c
of a row stored at chunk ``c ^ s``, where s is taken from address bits 7 and up: the 128-, 64- and 32-byte swizzles of
the PTX manual ("Swizzling modes"), so that a tile is copied to shared memory as it lies and read by ldmatrix or wgmma
without bank conflicts. Of eight rows of 256 bytes the first halves come first, then the second ones, each as eight rows
of 128 bytes.
Sparse (q of int8-sp24 on Hopper): uint32 ``[batch, heads, num_tiles * 2, sparse_steps, 5, 128]``: for a 64-row tile,
64-dim step and thread of a warpgroup four words of the codes that are kept and one of metadata, as ``wgmma.sp`` takes
them from registers (cuda_src/ptx/wgmma_sp.cuh): codes go from memory straight to where they are multiplied.
With ``Plan.holds_tested_rows``, q's rows are those of ``Plan.row_of_position``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .plans import CODE_TILE_ROWS, Plan, ceil_div, padded_dim


@dataclass(frozen=True)
class Quantized:
    """Codes, scales and corrections of one call (docs/algorithm.md). Arrays are NumPy's or CuPy's.

    q_codes, k_codes: rows (twin) or tiles (GPU), see the module's text. A non-finite group has codes 0, scale NaN.
    q_scale: float32; int8: [batch, num_heads, seqlen_q] (GPU: plan.num_positions); int4: [batch, num_heads,
        8 * ceil(seqlen_q / 16)], entry ``8 * (i // 16) + i % 8`` for row i. The GPU pads rows to whole 128-row tiles.
    k_scale: float32; int8: [batch, num_kv_heads]; int4: [batch, num_kv_heads, 4 * ceil(seqlen_k / 32)], entry
        ``4 * (j // 32) + (j % 8) // 2`` for key j (GPU: padded likewise).
    k_mean: float32 [batch, num_kv_heads, head_dim].
    q_mean, correction: int4 only: float32 [batch, num_heads, head_dim] and [batch, num_heads, seqlen_k] (GPU: padded).
    """

    estimator: str
    code_bits: int
    q_codes: Any
    k_codes: Any
    q_scale: Any
    k_scale: Any
    k_mean: Any
    q_mean: Any = None
    correction: Any = None


def _places(row_bytes: int) -> np.ndarray:
    """Where each 16-byte chunk of a tile's rows lies, in chunks (see the module's text)."""
    row, chunk = np.divmod(np.arange(CODE_TILE_ROWS * row_bytes // 16), row_bytes // 16)
    if row_bytes == 256:
        half, chunk = np.divmod(chunk, 8)
        place = row // 8 * 128 + half * 64 + row % 8 * 8 + chunk
    else:
        place = row * (row_bytes // 16) + chunk
    return place ^ ((place >> 3) & (min(row_bytes, 128) // 16 - 1))


def _chunks(tiles: np.ndarray) -> np.ndarray:
    return tiles.reshape(*tiles.shape[:-1], tiles.shape[-1] // 16, 16)


def rows_to_tiles(rows: np.ndarray, code_bits: int) -> np.ndarray:
    """int8 [batch, heads, seqlen, head_dim] codes -> uint8 tiles (see the module's text). NumPy."""
    batch, heads, seqlen, head_dim = rows.shape
    num_tiles = ceil_div(seqlen, CODE_TILE_ROWS)
    padded = np.zeros((batch, heads, num_tiles * CODE_TILE_ROWS, padded_dim(head_dim)), np.int8)
    padded[:, :, :seqlen, :head_dim] = rows
    data = padded.view(np.uint8)
    if code_bits == 4:
        data = (data[..., 0::2] & 15) | (data[..., 1::2] << 4)
    row_bytes = data.shape[-1]
    tiles = np.empty((batch, heads, num_tiles, CODE_TILE_ROWS * row_bytes), np.uint8)
    _chunks(tiles)[..., _places(row_bytes), :] = _chunks(data.reshape(tiles.shape))
    return tiles


def tiles_to_rows(tiles: np.ndarray, code_bits: int, seqlen: int, head_dim: int | None = None) -> np.ndarray:
    """The inverse of :func:`rows_to_tiles`; drops the padding rows, and the padding dims when head_dim is given."""
    batch, heads, num_tiles, tile_bytes = tiles.shape
    row_bytes = tile_bytes // CODE_TILE_ROWS
    data = _chunks(tiles)[..., _places(row_bytes), :]
    data = data.reshape(batch, heads, num_tiles * CODE_TILE_ROWS, row_bytes)[:, :, :seqlen]
    if code_bits == 8:
        return np.ascontiguousarray(data[..., :head_dim]).view(np.int8)
    rows = np.empty((*data.shape[:-1], 2 * row_bytes), np.int8)
    rows[..., 0::2] = (data << 4).view(np.int8) >> 4
    rows[..., 1::2] = data.view(np.int8) >> 4
    return np.ascontiguousarray(rows[..., :head_dim])


def sparse_steps(head_dim: int) -> int:
    """Steps of 64 dims in which the sparse tensor cores multiply; what is past head_dim is zero."""
    return ceil_div(head_dim, 64)


def _sparse_places(head_dim: int) -> tuple[np.ndarray, ...]:
    """For (row of a 64-row tile, chunk of eight dims): step, word of codes, thread, thread of metadata, its byte."""
    row, chunk = np.arange(64)[:, None], np.arange(head_dim // 8)[None]
    high, part = row // 8 % 2, chunk % 8 // 4
    quad = row // 16 * 32 + row % 8 * 4
    return np.broadcast_arrays(chunk // 8, high + 2 * part, quad + chunk % 4, quad + high + 2 * part, chunk % 4)


def rows_to_sparse(rows: np.ndarray) -> np.ndarray:
    """int8 [batch, heads, seqlen, head_dim] codes, of every four at most two not zero -> sparse (the module's text).

    seqlen is padded to whole 128-row tiles. NumPy; raises ValueError for rows that are not pruned.
    """
    batch, heads, seqlen, given_dim = rows.shape
    halves, steps = 2 * ceil_div(seqlen, CODE_TILE_ROWS), sparse_steps(given_dim)
    head_dim = 64 * steps
    padded = np.zeros((batch, heads, halves * 64, head_dim), np.int8)
    padded[:, :, :seqlen, :given_dim] = rows
    fours = padded.reshape(-1, 4)
    if (np.count_nonzero(fours, axis=1) > 2).any():
        raise ValueError("rows_to_sparse: more than two of four codes are not zero")
    kept = np.sort(np.argsort(fours == 0, axis=1, kind="stable")[:, :2], axis=1)
    codes = np.take_along_axis(fours, kept, axis=1).view(np.uint8).astype(np.uint32)
    shape = (batch, heads, halves, 64, head_dim // 8, 4)  # an octet of dims keeps four codes
    codes = (codes.reshape(shape) << (8 * np.arange(4, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    positions = (kept.astype(np.uint32).reshape(shape) << (2 * np.arange(4, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    step, word, thread, owner, byte = _sparse_places(head_dim)
    sparse = np.zeros((batch, heads, halves, steps, 5, 128), np.uint32)
    sparse[..., step, word, thread] = codes
    metadata = np.zeros((*sparse.shape[:4], 128, 4), np.uint8)
    metadata[..., step, owner, byte] = positions
    sparse[..., 4, :] = metadata.view("<u4")[..., 0]
    return sparse


def sparse_to_rows(sparse: np.ndarray, seqlen: int, head_dim: int | None = None) -> np.ndarray:
    """The inverse of :func:`rows_to_sparse`; drops the padding rows, and the padding dims when head_dim is given."""
    batch, heads, halves, steps = sparse.shape[:4]
    step, word, thread, owner, byte = _sparse_places(64 * steps)
    codes = sparse[..., step, word, thread]
    metadata = np.ascontiguousarray(sparse[..., 4, :, None]).view(np.uint8)[..., step, owner, byte]
    rows = np.zeros((*codes.shape, 2, 4), np.int8)  # two groups of four in an octet
    for i in range(4):
        code = (codes >> np.uint32(8 * i)).astype(np.uint8).view(np.int8)
        place = (metadata >> np.uint8(2 * i)) & 3
        np.put_along_axis(rows[..., i // 2, :], place[..., None].astype(np.intp), code[..., None], axis=-1)
    return rows.reshape(batch, heads, halves * 64, 64 * steps)[:, :, :seqlen, :head_dim]


def q_codes_to_rows(quantized: Quantized, plan: Plan) -> np.ndarray:
    """q's codes of a GPU call as int8 rows [batch, num_heads, seqlen_q, head_dim] on the host; untested rows are 0."""
    codes = quantized.q_codes.get()
    if plan.q_is_sparse:
        held = sparse_to_rows(codes, plan.num_positions, plan.head_dim)
    else:
        held = tiles_to_rows(codes, quantized.code_bits, plan.num_positions, plan.head_dim)
    return spread_rows(held, plan, 0)


def spread_rows(held: np.ndarray, plan: Plan, fill: Any) -> np.ndarray:
    """[batch, num_heads, num_positions, ...] by position -> [batch, num_heads, seqlen_q, ...] by query row; NumPy.

    Rows that are not held get ``fill``.
    """
    rows = np.full((*held.shape[:2], plan.seqlen_q, *held.shape[3:]), fill, held.dtype)
    row = plan.row_of_position[: held.shape[2]]  # what follows the last row may have been dropped
    rows[:, :, row[row >= 0]] = held[:, :, row >= 0]
    return rows
