"""Block masks as the lists of indices that other libraries take, and back. NumPy; one head is unpacked at a time.

A set block is *full* when all its pairs are inside the matrix and visible, else *partial*: on the causal diagonal, at a
window's edge or at a ragged end. Who takes the partial ones has to mask inside them. The lists hold neither lengths nor
window: who reads them back gives those of the mask, as to ``BlockMask.from_dense``.
"""

from __future__ import annotations

import math
from typing import Iterator

import numpy as np

from .block_mask import BlockMask, check_words
from .errors import ArgumentError
from .plans import ceil_div


def heads(mask: BlockMask) -> Iterator[np.ndarray]:
    """bool [num_q_blocks, num_k_blocks] of each head, batch by batch."""
    check_words(mask)
    words = mask.to_numpy().words
    for index in np.ndindex(*words.shape[:2]):
        bits = np.unpackbits(np.ascontiguousarray(words[index]).view(np.uint8), axis=-1, bitorder="little")
        yield bits[:, : mask.num_k_blocks].astype(bool)


def full_blocks(mask: BlockMask) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks]: blocks whose pairs are all inside the matrix and visible, set or not."""
    first_row = np.arange(mask.num_q_blocks)[:, None] * mask.block_q
    first_key = np.arange(mask.num_k_blocks)[None] * mask.block_k
    last_row, last_key = first_row + mask.block_q - 1, first_key + mask.block_k - 1
    full = (last_row < mask.seqlen_q) & (last_key < mask.seqlen_k)
    offset, right = mask.seqlen_k - mask.seqlen_q, 0 if mask.causal else mask.window_right
    if right >= 0:
        full &= last_key <= first_row + offset + right
    if mask.window_left >= 0:
        full &= first_key >= last_row + offset - mask.window_left
    return full


def to_csr(mask: BlockMask) -> dict[str, np.ndarray]:
    """indptr int64 [batch, num_heads, num_q_blocks + 1] and indices int32 [set blocks]: compressed sparse rows.

    Row i of a head has the key blocks ``indices[indptr[b, h, i] : indptr[b, h, i + 1]]``, rising; heads follow one
    another.
    """
    check_words(mask)
    batch, num_heads = mask.words.shape[:2]
    indptr = np.zeros((batch * num_heads, mask.num_q_blocks + 1), np.int64)
    indices = [np.zeros(0, np.int32)]
    start = 0
    for head, bits in enumerate(heads(mask)):
        indptr[head] = start + np.concatenate([[0], np.cumsum(bits.sum(axis=1))])
        indices.append(np.nonzero(bits)[1].astype(np.int32))
        start = indptr[head, -1]
    return {"indptr": indptr.reshape(batch, num_heads, mask.num_q_blocks + 1), "indices": np.concatenate(indices)}


def from_csr(
    lists: dict[str, np.ndarray],
    block_q: int,
    block_k: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
) -> BlockMask:
    """The BlockMask of :func:`to_csr`'s lists."""
    blocks = (block_q, block_k, seqlen_q, seqlen_k, causal, window_left, window_right)
    indptr, indices = (np.asarray(lists[name]) for name in ("indptr", "indices"))
    empty = _empty(indptr.shape[:2], *blocks)
    counts = np.diff(indptr, axis=-1)
    if counts.shape != empty.shape[:3] or (counts < 0).any() or counts.sum() != indices.size:
        raise ArgumentError(f"indptr: got shape {indptr.shape} and {indices.size} indices, which do not fit the blocks")
    rows = np.repeat(np.arange(counts.size), counts.ravel())
    return _fill(empty, [(rows, indices)], *blocks)


def to_flashinfer(mask: BlockMask) -> list[dict[str, np.ndarray]]:
    """Of each head, batch by batch: indptr int32 [num_q_blocks + 1] and indices int32 [set blocks], a BSR matrix.

    What ``flashinfer.BlockSparseAttentionWrapper.plan(indptr, indices, M, N, R, C, ...)`` takes, with M = seqlen_q,
    N = seqlen_k, R = block_q, C = block_k; it attends all its heads by one matrix, so a call is made for each of ours.
    Partial blocks are among them.
    """
    lists = []
    for bits in heads(mask):
        indptr = np.concatenate([[0], np.cumsum(bits.sum(axis=1))]).astype(np.int32)
        lists.append({"indptr": indptr, "indices": np.nonzero(bits)[1].astype(np.int32)})
    return lists


def from_flashinfer(
    lists: list[dict[str, np.ndarray]],
    batch: int,
    block_q: int,
    block_k: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    *,
    num_heads: int | None = None,
) -> BlockMask:
    """The BlockMask of :func:`to_flashinfer`'s lists. num_heads: by default len(lists) / batch, 0 of batch 0."""
    blocks = (block_q, block_k, seqlen_q, seqlen_k, causal, window_left, window_right)
    if num_heads is None:
        num_heads = len(lists) // max(1, batch)
    if len(lists) != batch * num_heads:
        raise ArgumentError(f"lists: got {len(lists)}; wants batch x num_heads = {batch} x {num_heads}")
    indptr = np.zeros((len(lists), ceil_div(seqlen_q, block_q) + 1), np.int64)
    start = 0
    for row, head in zip(indptr, lists):
        if np.shape(head["indptr"]) != row.shape:
            raise ArgumentError(f"indptr: got shape {np.shape(head['indptr'])}; wants {row.shape}")
        row[:] = head["indptr"]
        row += start
        start = row[-1]
    indices = np.concatenate([np.zeros(0, np.int32), *(head["indices"] for head in lists)])
    return from_csr({"indptr": indptr.reshape(batch, num_heads, indptr.shape[-1]), "indices": indices}, *blocks)


def to_flex_attention(mask: BlockMask) -> dict[str, np.ndarray]:
    """What ``torch.nn.attention.flex_attention.BlockMask.from_kv_blocks`` takes, int32.

    kv_num_blocks [batch, num_heads, num_q_blocks] and kv_indices [..., num_k_blocks] of the partial blocks, for which
    the caller's mask_mod is called, full_kv_num_blocks and full_kv_indices of the full ones. Indices rise; the rest are
    0. BLOCK_SIZE is (block_q, block_k); the compiled kernels take multiples of 128.
    """
    counts, indices = _counted_lists(mask, mask.num_k_blocks)
    return {
        "kv_num_blocks": counts[0],
        "kv_indices": indices[0],
        "full_kv_num_blocks": counts[1],
        "full_kv_indices": indices[1],
    }


def to_flash_attention_4(mask: BlockMask) -> dict[str, np.ndarray]:
    """The tensors of FlashAttention-4's ``BlockSparseTensorsTorch``, int32.

    mask_block_cnt [batch, num_heads, num_q_blocks] and mask_block_idx [..., most blocks of a row] of the partial
    blocks, full_block_cnt and full_block_idx of the full ones. Indices rise; the rest are 0. block_size is (block_q,
    block_k).
    """
    counts, indices = _counted_lists(mask, None)
    return {
        "mask_block_cnt": counts[0],
        "mask_block_idx": indices[0],
        "full_block_cnt": counts[1],
        "full_block_idx": indices[1],
    }


def from_counted_lists(
    lists: dict[str, np.ndarray],
    block_q: int,
    block_k: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
) -> BlockMask:
    """The BlockMask of :func:`to_flex_attention`'s or :func:`to_flash_attention_4`'s lists."""
    blocks = (block_q, block_k, seqlen_q, seqlen_k, causal, window_left, window_right)
    parts = [np.asarray(x) for x in lists.values()]
    empty = _empty(parts[0].shape[:2], *blocks)
    entries = []
    for counts, indices in zip(parts[::2], parts[1::2]):
        if counts.shape != empty.shape[:3] or indices.shape[:-1] != counts.shape:
            raise ArgumentError(
                f"lists: got counts {counts.shape} and indices {indices.shape}, which do not fit the blocks"
            )
        taken = np.arange(indices.shape[-1]) < counts[..., None]
        rows = np.nonzero(taken.reshape(counts.size, indices.shape[-1]))[0]
        entries.append((rows, indices[taken]))
    return _fill(empty, entries, *blocks)


def _counted_lists(mask: BlockMask, width: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Counts and indices of the partial and of the full blocks; width: of the lists, default what the longest needs."""
    check_words(mask)
    shape = (*mask.words.shape[:2], mask.num_q_blocks)
    full = full_blocks(mask)
    counts = [np.zeros((shape[0] * shape[1], shape[2]), np.int32) for _ in range(2)]
    for head, bits in enumerate(heads(mask)):
        for part, chosen in enumerate((bits & ~full, bits & full)):
            counts[part][head] = chosen.sum(axis=1)
    widths = [max(1, int(count.max(initial=0))) if width is None else width for count in counts]
    indices = [np.zeros((*count.shape, columns), np.int32) for count, columns in zip(counts, widths)]
    for head, bits in enumerate(heads(mask)):
        for part, chosen in enumerate((bits & ~full, bits & full)):
            taken = np.arange(widths[part]) < counts[part][head][:, None]
            indices[part][head][taken] = np.nonzero(chosen)[1]
    return [x.reshape(shape) for x in counts], [x.reshape(*shape, x.shape[-1]) for x in indices]


def _empty(leading: tuple, block_q: int, block_k: int, seqlen_q: int, seqlen_k: int, *_) -> np.ndarray:
    return np.zeros((*leading, ceil_div(seqlen_q, block_q), ceil_div(seqlen_k, block_k)), bool)


def _fill(bits: np.ndarray, entries, *blocks) -> BlockMask:
    """Sets blocks (row of all heads, key block) in ``bits`` and packs them."""
    rows_of_all = bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1])
    for rows, indices in entries:
        if indices.size and not 0 <= indices.min() <= indices.max() < bits.shape[-1]:
            raise ArgumentError(f"indices: got {indices.min()} to {indices.max()}; wants 0 to {bits.shape[-1] - 1}")
        rows_of_all[rows, indices] = True
    return BlockMask.from_dense(bits, *blocks)
