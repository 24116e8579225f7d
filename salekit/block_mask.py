"""BlockMask: one bit a block, packed little-endian in uint32 words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import ArgumentError, FileFormatError
from .plans import MAX_GRID, MAX_SEQLEN, ceil_div
from .untrusted_files import FREE_EXPANSION, Npz

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which key blocks each query block attends to.

    words: uint32 [batch, num_heads, num_q_blocks, ceil(num_k_blocks / 32)], NumPy, CuPy or JAX; bit j % 32 of word
    j // 32 is key block j. Bits past the last block and of blocks without a visible pair are 0. window_left,
    window_right: keys before and after a row's position that it sees, -1: all (or, after it, none in causal calls).
    Of words with other leading axes (``jax.vmap``'s) to_dense, selected_blocks, density and coarsen keep them; what
    writes files or lists raises ArgumentError. ``==`` compares bits, wherever they are; masks are not hashable.
    """

    words: Any
    block_q: int
    block_k: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    window_left: int = -1
    window_right: int = -1

    __hash__ = None  # type: ignore[assignment]  # the words may be written

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self._sizes() != other._sizes():
            return False
        return self.words is other.words or np.array_equal(self.to_numpy().words, other.to_numpy().words)

    def _sizes(self) -> tuple:
        lengths = (self.block_q, self.block_k, self.seqlen_q, self.seqlen_k)
        return (*lengths, self.causal, self.window_left, self.window_right)

    @property
    def num_q_blocks(self) -> int:
        """Rows of blocks: ceil(seqlen_q / block_q)."""
        return ceil_div(self.seqlen_q, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        """Columns of blocks: ceil(seqlen_k / block_k)."""
        return ceil_div(self.seqlen_k, self.block_k)

    @property
    def has_window(self) -> bool:
        """Whether window_left or window_right is given, not -1."""
        return self.window_left >= 0 or self.window_right >= 0

    def to_numpy(self) -> "BlockMask":
        """The same mask with its words on the host (copies from the GPU and synchronises)."""
        return replace(self, words=self.words.get() if hasattr(self.words, "get") else np.asarray(self.words))

    def to_dense(self) -> np.ndarray:
        """bool [batch, num_heads, num_q_blocks, num_k_blocks], NumPy."""
        check_words(self, any_leading=True)
        words = np.ascontiguousarray(self.to_numpy().words)
        if words.size == 0:
            return np.zeros((*words.shape[:-1], self.num_k_blocks), bool)
        bits = np.unpackbits(words.view(np.uint8), axis=-1, count=self.num_k_blocks, bitorder="little")
        return bits.view(bool)

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
        """Packs bool [batch, num_heads, num_q_blocks, num_k_blocks]; clears what has no visible pair. ArgumentError."""
        mask = cls(None, block_q, block_k, seqlen_q, seqlen_k, causal, window_left, window_right)
        bits, blocks = np.asarray(bits, bool), (mask.num_q_blocks, mask.num_k_blocks)
        if bits.ndim != 4 or bits.shape[2:] != blocks:
            raise ArgumentError(f"bits: got shape {bits.shape}; wants [batch, num_heads, {blocks[0]}, {blocks[1]}]")
        return mask._with(bits)

    def _with(self, bits: np.ndarray) -> "BlockMask":
        """This mask with these bits [..., num_q_blocks, num_k_blocks] of its visible blocks."""
        num_words = ceil_div(self.num_k_blocks, 32)
        padded = np.zeros((*bits.shape[:-1], num_words * 32), bool)
        padded[..., : self.num_k_blocks] = bits
        for row, (first, end) in enumerate(zip(*self._visible_ranges())):
            padded[..., row, :first] = False
            padded[..., row, end:] = False
        words = np.packbits(padded, axis=-1, bitorder="little").view("<u4").reshape(*bits.shape[:-1], num_words)
        return replace(self, words=words)

    def visible(self) -> np.ndarray:
        """bool [num_q_blocks, num_k_blocks]: blocks with a visible pair."""
        blocks, (first, end) = np.arange(self.num_k_blocks)[None], self._visible_ranges()
        seen = blocks >= first[:, None]
        seen &= blocks < end[:, None]
        return seen

    def _visible_ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, end), int64 [num_q_blocks]: the blocks of a row that have a visible pair are those between."""
        starts, offset = np.arange(self.num_q_blocks) * self.block_q, self.seqlen_k - self.seqlen_q
        ends = np.minimum(starts + self.block_q, self.seqlen_q)
        right = 0 if self.causal else self.window_right
        seen = ends + offset + right if right >= 0 else np.full(ends.shape, self.seqlen_k)
        end = np.clip(-(-seen // self.block_k), 0, self.num_k_blocks)
        if self.window_left < 0:
            return np.zeros_like(end), end
        key = starts + offset - self.window_left
        first = np.where(key >= self.seqlen_k, self.num_k_blocks, key // self.block_k)
        return np.clip(first, 0, self.num_k_blocks), end

    def selected_blocks(self) -> np.ndarray:
        """int64 [batch, num_heads]: set blocks. Head by head, for the unpacked bits of 1M tokens take gigabytes."""
        check_words(self, any_leading=True)
        words = self.to_numpy().words
        counts = np.zeros(words.shape[:-2], np.int64)
        for index in np.ndindex(*counts.shape):
            counts[index] = int.from_bytes(words[index].tobytes(), "little").bit_count()
        return counts

    def density(self) -> np.ndarray:
        """float64 [batch, num_heads]: set blocks over visible blocks."""
        first, end = self._visible_ranges()
        return self.selected_blocks() / max(1, int(np.maximum(end - first, 0).sum()))

    def coarsen(self, block_q: int, block_k: int) -> "BlockMask":
        """The OR of blocks up to larger ones (multiples of today's; else ArgumentError). NumPy words."""
        for name, size, own in (("block_q", block_q, self.block_q), ("block_k", block_k, self.block_k)):
            if size < 1 or size % own:
                raise ArgumentError(f"{name}: got {size}; wants a multiple of {own}, as the mask has")
        rows, cols = block_q // self.block_q, block_k // self.block_k
        dense, coarse = self.to_dense(), replace(self, block_q=block_q, block_k=block_k)
        nq, nk = coarse.num_q_blocks, coarse.num_k_blocks
        padded = np.zeros((*dense.shape[:-2], nq * rows, nk * cols), bool)
        padded[..., : dense.shape[-2], : dense.shape[-1]] = dense
        return coarse._with(padded.reshape(*dense.shape[:-2], nq, rows, nk, cols).any(axis=(-3, -1)))

    def save_npz(self, path, metadata: dict | None = None) -> None:
        """One uint8 [num_q_blocks, ceil(num_k_blocks / 8)] array a head, and ``__meta__``, a JSON text.

        Head h is ``h{h}``, of several batches ``b{b}_h{h}``. metadata: what else ``__meta__`` holds; of its keys the
        mask's own are replaced.
        """
        check_words(self)
        words = np.ascontiguousarray(self.to_numpy().words, "<u4")
        rows = words[..., None].view(np.uint8).reshape(*words.shape[:3], 4 * words.shape[3])
        rows = rows[..., : ceil_div(self.num_k_blocks, 8)]
        batch, num_heads = words.shape[:2]
        arrays = {head_name(b, h, batch): rows[b, h] for b, h in np.ndindex(batch, num_heads)}
        meta = dict(
            metadata or {},
            schema=SCHEMA,
            batch=batch,
            num_heads=num_heads,
            block_q=int(self.block_q),
            block_k=int(self.block_k),
            seqlen_q=int(self.seqlen_q),
            seqlen_k=int(self.seqlen_k),
            causal=bool(self.causal),
            window=[int(self.window_left), int(self.window_right)],
        )
        np.savez_compressed(path, __meta__=np.array(json.dumps(meta)), **arrays)

    @classmethod
    def load_npz(cls, path) -> "BlockMask":
        """Reads what :meth:`save_npz` writes; without ``__meta__`` the blocks are 64x32, causal. FileFormatError.

        Heads are found by their names; in an archive of other names and without a schema they are in its order.
        """
        with Npz(path) as archive:
            meta, arrays = archive.metadata(), archive.arrays(archive.names)
        if not isinstance(meta, dict):
            raise FileFormatError(f"{path}: damaged metadata: not a JSON object")
        schema = meta.get("schema", SCHEMA)
        if type(schema) is not int or schema != SCHEMA:
            raise FileFormatError(f"{path}: got schema {schema!r} of a mask; wants {SCHEMA}")
        heads = list(arrays.values())
        alike = all(x.ndim == 2 and x.dtype == np.uint8 and x.shape == heads[0].shape for x in heads)
        if not alike or not heads and "num_heads" not in meta:
            raise FileFormatError(f"{path}: wants one uint8 [num_q_blocks, num_k_blocks / 8] array a head, all alike")

        def number(name: str, default: int, least: int = 1, most: int = MAX_SEQLEN) -> int:
            value = meta.get(name, default)
            if type(value) is not int or not least <= value <= most:
                raise FileFormatError(f"{path}: damaged metadata: {name} is {value!r}")
            return value

        block_q, block_k = number("block_q", 64), number("block_k", 32)
        batch = number("batch", 1) if heads else number("batch", 1, 0, MAX_GRID)
        seqlen_q = number("seqlen_q", heads[0].shape[0] * block_q if heads else 0, 0)
        seqlen_k = number("seqlen_k", seqlen_q, 0)
        window, causal = meta.get("window", [-1, -1]), meta.get("causal", True)
        if type(window) is not list or any(type(x) is not int or not -1 <= x <= MAX_SEQLEN for x in window):
            raise FileFormatError(f"{path}: damaged metadata: window is {window!r}")
        if type(causal) is not bool:
            raise FileFormatError(f"{path}: damaged metadata: causal is {causal!r}")
        nq, nk = ceil_div(seqlen_q, block_q), ceil_div(seqlen_k, block_k)
        shape = heads[0].shape if heads else (nq, ceil_div(nk, 8))
        if shape != (nq, ceil_div(nk, 8)) or heads and len(heads) % batch or len(window) != 2:
            raise FileFormatError(
                f"{path}: arrays of {shape} do not fit seqlen {seqlen_q}x{seqlen_k}, blocks {block_q}x{block_k}"
            )
        num_heads = number("num_heads", len(heads) // batch if heads else 0, 0, MAX_GRID)
        if heads and batch * num_heads != len(heads):
            raise FileFormatError(f"{path}: has {len(heads)} arrays; wants {batch}x{num_heads}, one a head")
        if not heads and (batch * num_heads or nq * ceil_div(nk, 8) > FREE_EXPANSION):
            raise FileFormatError(f"{path}: has no arrays; wants {batch}x{num_heads} heads of {nq}x{nk} blocks")
        names = [head_name(b, h, batch) for b, h in np.ndindex(batch, num_heads)]
        missing = [name for name in names if name not in arrays]
        if missing and "schema" in meta:
            raise FileFormatError(f"{path}: has no {missing[0]!r}; wants {names[0]!r} to {names[-1]!r}, one a head")
        heads = heads if missing else [arrays[name] for name in names]
        shape = (batch, num_heads, nq, ceil_div(nk, 32) * 4)
        archive.check_bytes(math.prod(shape))  # four times those of the arrays, where rows have a byte
        try:
            rows = np.zeros(shape, np.uint8)
        except MemoryError:
            raise FileFormatError(f"{path}: {math.prod(shape)} bytes do not fit in memory") from None
        for (b, h), head in zip(np.ndindex(*rows.shape[:2]), heads):
            rows[b, h, :, : head.shape[1]] = head
        if nk % 8:
            rows[..., nk // 8] &= (1 << nk % 8) - 1  # bits past the last block
        words = rows.view("<u4")
        return cls(words, block_q, block_k, seqlen_q, seqlen_k, causal, *window)


def head_name(b: int, h: int, batch: int) -> str:
    """Of a head's array in an archive."""
    return f"h{h}" if batch == 1 else f"b{b}_h{h}"


def check_words(mask: BlockMask, any_leading: bool = False) -> None:
    """ArgumentError unless the words have their shape, or with ``any_leading`` other axes before the blocks."""
    shape, blocks = tuple(mask.words.shape), (mask.num_q_blocks, ceil_div(mask.num_k_blocks, 32))
    if shape[-2:] != blocks or not (any_leading or len(shape) == 4):
        leading = "..." if any_leading else "batch, num_heads"
        raise ArgumentError(f"words: got shape {shape}; wants [{leading}, {blocks[0]}, {blocks[1]}]")
