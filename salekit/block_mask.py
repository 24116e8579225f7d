"""BlockMask: one bit a block, packed little-endian in uint32 words."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import FileFormatError
from .plans import ceil_div
from .untrusted_files import Npz

SCHEMA = 1
_MOST = 2**30  # of a number in a file: options.MAX_SEQLEN


@dataclass(frozen=True)
class BlockMask:
    """Which key blocks each query block attends to.

    words: uint32 [batch, num_heads, num_q_blocks, ceil(num_k_blocks / 32)], NumPy, CuPy or JAX; bit j % 32 of word
    j // 32 is key block j. Bits past the last block and of blocks without a visible pair are 0. window_left,
    window_right: keys before and after a row's position that it sees, -1: all (or, after it, none in causal calls).
    """

    words: Any
    block_q: int
    block_k: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    window_left: int = -1
    window_right: int = -1

    @property
    def num_q_blocks(self) -> int:
        return ceil_div(self.seqlen_q, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return ceil_div(self.seqlen_k, self.block_k)

    @property
    def has_window(self) -> bool:
        return self.window_left >= 0 or self.window_right >= 0

    def to_numpy(self) -> "BlockMask":
        """The same mask with its words on the host (copies from the GPU and synchronises)."""
        return replace(self, words=self.words.get() if hasattr(self.words, "get") else np.asarray(self.words))

    def to_dense(self) -> np.ndarray:
        """bool [batch, num_heads, num_q_blocks, num_k_blocks], NumPy."""
        words = np.ascontiguousarray(self.to_numpy().words)
        if words.size == 0:
            return np.zeros((*words.shape[:3], self.num_k_blocks), bool)
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        return bits[..., : self.num_k_blocks].astype(bool)

    @classmethod
    def from_dense(
        cls,
        bits,
        block_q: int,
        block_k: int,
        seqlen_q: int,
        seqlen_k: int,
        causal: bool,
        window_left: int = -1,
        window_right: int = -1,
    ) -> "BlockMask":
        """Packs bool [batch, num_heads, num_q_blocks, num_k_blocks]."""
        num_words = ceil_div(bits.shape[-1], 32)
        padded = np.zeros((*bits.shape[:-1], num_words * 32), bool)
        padded[..., : bits.shape[-1]] = bits
        words = np.packbits(padded, axis=-1, bitorder="little").view("<u4").reshape(*bits.shape[:-1], num_words)
        return cls(words, block_q, block_k, seqlen_q, seqlen_k, causal, window_left, window_right)

    def visible(self) -> np.ndarray:
        """bool [num_q_blocks, num_k_blocks]: blocks with a visible pair."""
        starts, offset = np.arange(self.num_q_blocks) * self.block_q, self.seqlen_k - self.seqlen_q
        ends = np.minimum(starts + self.block_q, self.seqlen_q)
        right = 0 if self.causal else self.window_right
        seen = ends + offset + right if right >= 0 else np.full(ends.shape, self.seqlen_k)
        keys = np.arange(self.num_k_blocks)[None] * self.block_k
        visible = keys < seen[:, None]
        if self.window_left >= 0:
            visible &= np.minimum(keys + self.block_k, self.seqlen_k) > (starts + offset - self.window_left)[:, None]
        return visible

    def selected_blocks(self) -> np.ndarray:
        """int64 [batch, num_heads]: set blocks. Head by head, for the unpacked bits of 1M tokens take gigabytes."""
        words = self.to_numpy().words
        counts = np.zeros(words.shape[:2], np.int64)
        for index in np.ndindex(*counts.shape):
            counts[index] = int.from_bytes(words[index].tobytes(), "little").bit_count()
        return counts

    def density(self) -> np.ndarray:
        """float64 [batch, num_heads]: set blocks over visible blocks."""
        return self.selected_blocks() / max(1, int(self.visible().sum()))

    def coarsen(self, block_q: int, block_k: int) -> "BlockMask":
        """The OR of blocks up to larger ones (multiples of today's). NumPy words."""
        rows, cols = block_q // self.block_q, block_k // self.block_k
        dense = self.to_dense()
        nq, nk = ceil_div(self.seqlen_q, block_q), ceil_div(self.seqlen_k, block_k)
        padded = np.zeros((*dense.shape[:2], nq * rows, nk * cols), bool)
        padded[:, :, : dense.shape[2], : dense.shape[3]] = dense
        bits = padded.reshape(*dense.shape[:2], nq, rows, nk, cols).any(axis=(3, 5))
        sizes = (block_q, block_k, self.seqlen_q, self.seqlen_k)
        return BlockMask.from_dense(bits, *sizes, self.causal, self.window_left, self.window_right)

    def save_npz(self, path, metadata: dict | None = None) -> None:
        """One uint8 [num_q_blocks, ceil(num_k_blocks / 8)] array a head, and ``__meta__``, a JSON text."""
        words = np.ascontiguousarray(self.to_numpy().words, "<u4")
        rows = words[..., None].view(np.uint8).reshape(*words.shape[:3], 4 * words.shape[3])
        rows = rows[..., : ceil_div(self.num_k_blocks, 8)]
        batch = words.shape[0]
        arrays = {f"h{h}" if batch == 1 else f"b{b}_h{h}": rows[b, h] for b, h in np.ndindex(*words.shape[:2])}
        meta = dict(
            metadata or {},
            schema=SCHEMA,
            batch=batch,
            block_q=self.block_q,
            block_k=self.block_k,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            causal=self.causal,
            **({"window": [self.window_left, self.window_right]} if self.has_window else {}),
        )
        np.savez_compressed(path, __meta__=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load_npz(cls, path) -> "BlockMask":
        """Reads what :meth:`save_npz` writes; without ``__meta__`` the blocks are 64x32, causal. FileFormatError."""
        with Npz(path) as archive:
            meta, heads = archive.metadata(), list(archive.arrays(archive.names).values())
        if not heads or any(x.ndim != 2 or x.dtype != np.uint8 or x.shape != heads[0].shape for x in heads):
            raise FileFormatError(f"{path}: wants one uint8 [num_q_blocks, num_k_blocks / 8] array a head, all alike")
        if not isinstance(meta, dict):
            raise FileFormatError(f"{path}: damaged metadata: not a JSON object")

        def number(name: str, default: int, least: int = 1) -> int:
            value = meta.get(name, default)
            if type(value) is not int or not least <= value <= _MOST:
                raise FileFormatError(f"{path}: damaged metadata: {name} is {value!r}")
            return value

        block_q, block_k, batch = number("block_q", 64), number("block_k", 32), number("batch", 1)
        seqlen_q = number("seqlen_q", heads[0].shape[0] * block_q, 0)
        seqlen_k = number("seqlen_k", seqlen_q, 0)
        window, causal = meta.get("window", [-1, -1]), meta.get("causal", True)
        if type(window) is not list or any(type(x) is not int or not -1 <= x <= _MOST for x in window):
            raise FileFormatError(f"{path}: damaged metadata: window is {window!r}")
        if type(causal) is not bool:
            raise FileFormatError(f"{path}: damaged metadata: causal is {causal!r}")
        nq, nk = ceil_div(seqlen_q, block_q), ceil_div(seqlen_k, block_k)
        if heads[0].shape != (nq, ceil_div(nk, 8)) or len(heads) % batch or len(window) != 2:
            raise FileFormatError(
                f"{path}: arrays of {heads[0].shape} do not fit seqlen {seqlen_q}x{seqlen_k}, "
                f"blocks {block_q}x{block_k}"
            )
        rows = np.zeros((batch, len(heads) // batch, nq, ceil_div(nk, 32) * 4), np.uint8)
        for (b, h), head in zip(np.ndindex(*rows.shape[:2]), heads):
            rows[b, h, :, : head.shape[1]] = head
        if nk % 8:
            rows[..., nk // 8] &= (1 << nk % 8) - 1  # bits past the last block
        words = rows.reshape(*rows.shape[:3], ceil_div(nk, 32), 4).view("<u4")[..., 0]
        return cls(words, block_q, block_k, seqlen_q, seqlen_k, causal, *window)
