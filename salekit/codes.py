"""Quantised q and k, and the two orders their codes are stored in.

Rows: int8 ``[batch, heads, seqlen, head_dim]``, one code a byte, as the NumPy twin computes them.
Tiles: uint8 ``[batch, heads, num_tiles, 128 * row_bytes]``, as the kernels read them: 128-row tiles, rows past the end
zero, 4-bit codes packed with even d in the low nibble, 16-byte chunk c of a row stored at chunk ``c ^ s``, where s is
taken from address bits 7 and up: the 128-, 64- and 32-byte swizzles of the PTX manual ("Swizzling modes"), so that
a tile is copied to shared memory as it lies and read by ldmatrix or wgmma without bank conflicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .plans import CODE_TILE_ROWS, ceil_div


@dataclass(frozen=True)
class Quantized:
    """Codes, scales and corrections of one call (docs/algorithm.md). Arrays are NumPy's or CuPy's.

    q_codes, k_codes: rows (twin) or tiles (GPU), see the module's text. A non-finite group has codes 0, scale NaN.
    q_scale: float32; int8: [batch, num_heads, seqlen_q]; int4: [batch, num_heads, 8 * ceil(seqlen_q / 16)], entry
        ``8 * (i // 16) + i % 8`` for row i. The GPU pads rows to whole 128-row tiles.
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


def _swizzle(tiles: np.ndarray, row_bytes: int) -> np.ndarray:
    """The involution on ``[..., 128 * row_bytes]`` bytes that XORs 16-byte chunk indices with address bits 7 and up."""
    chunk = np.arange(CODE_TILE_ROWS * row_bytes // 16)
    target = chunk ^ ((chunk >> 3) & (row_bytes // 16 - 1))
    view = tiles.reshape(*tiles.shape[:-1], chunk.size, 16)
    return view[..., target, :].reshape(tiles.shape)


def rows_to_tiles(rows: np.ndarray, code_bits: int) -> np.ndarray:
    """int8 [batch, heads, seqlen, head_dim] codes -> uint8 tiles (see the module's text). NumPy."""
    batch, heads, seqlen, head_dim = rows.shape
    num_tiles = ceil_div(seqlen, CODE_TILE_ROWS)
    padded = np.zeros((batch, heads, num_tiles * CODE_TILE_ROWS, head_dim), np.int8)
    padded[:, :, :seqlen] = rows
    data = padded.view(np.uint8)
    if code_bits == 4:
        data = (data[..., 0::2] & 15) | (data[..., 1::2] << 4)
    row_bytes = data.shape[-1]
    return _swizzle(data.reshape(batch, heads, num_tiles, CODE_TILE_ROWS * row_bytes), row_bytes)


def tiles_to_rows(tiles: np.ndarray, code_bits: int, seqlen: int) -> np.ndarray:
    """The inverse of :func:`rows_to_tiles`; drops the padding rows."""
    batch, heads, num_tiles, tile_bytes = tiles.shape
    row_bytes = tile_bytes // CODE_TILE_ROWS
    data = _swizzle(tiles, row_bytes).reshape(batch, heads, num_tiles * CODE_TILE_ROWS, row_bytes)[:, :, :seqlen]
    if code_bits == 8:
        return np.ascontiguousarray(data).view(np.int8)
    rows = np.empty((*data.shape[:-1], 2 * row_bytes), np.int8)
    rows[..., 0::2] = (data << 4).view(np.int8) >> 4
    rows[..., 1::2] = data.view(np.int8) >> 4
    return rows
