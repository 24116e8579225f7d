"""Masks as other libraries' lists of indices, and back."""

from __future__ import annotations

import numpy as np
import pytest

from salekit import mask_lists
from salekit.block_mask import BlockMask
from salekit.errors import ArgumentError

SHAPES = [
    (128, 32, 1000, 1000, True),
    (64, 32, 130, 1029, True),
    (128, 128, 700, 300, True),
    (64, 64, 257, 333, False),
    (128, 32, 1, 1, True),
]


def random_mask(blocks, density=0.3, batch=2, heads=3) -> BlockMask:
    block_q, block_k, seqlen_q, seqlen_k, causal = blocks
    rng = np.random.default_rng(0)
    shape = (batch, heads, -(-seqlen_q // block_q), -(-seqlen_k // block_k))
    bits = rng.random(shape) < density
    bits[0, 0] = False
    bits[-1, -1] = True
    visible = BlockMask.from_dense(bits, *blocks).visible()
    return BlockMask.from_dense(bits & visible, *blocks)


@pytest.mark.parametrize("blocks", SHAPES)
@pytest.mark.parametrize(
    "there, back",
    [
        (mask_lists.to_csr, mask_lists.from_csr),
        (mask_lists.to_flashinfer, lambda lists, *blocks: mask_lists.from_flashinfer(lists, 2, *blocks)),
        (mask_lists.to_flex_attention, mask_lists.from_counted_lists),
        (mask_lists.to_flash_attention_4, mask_lists.from_counted_lists),
    ],
    ids=["csr", "flashinfer", "flex", "flash4"],
)
def test_round_trip(there, back, blocks):
    mask = random_mask(blocks)
    again = back(there(mask), *blocks)
    assert np.array_equal(again.words, mask.words) and again.causal == mask.causal


@pytest.mark.parametrize("blocks", SHAPES)
def test_full_and_partial_blocks(blocks):
    """Pair by pair: a full block has every pair, a partial one lacks some."""
    block_q, block_k, seqlen_q, seqlen_k, causal = blocks
    mask = random_mask(blocks)
    pairs = np.zeros((mask.num_q_blocks * block_q, mask.num_k_blocks * block_k), bool)
    pairs[:seqlen_q, :seqlen_k] = True
    if causal:
        pairs[:seqlen_q] &= np.arange(pairs.shape[1]) <= np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    whole = pairs.reshape(mask.num_q_blocks, block_q, mask.num_k_blocks, block_k).all(axis=(1, 3))
    assert np.array_equal(mask_lists.full_blocks(mask), whole)
    lists = mask_lists.to_flex_attention(mask)
    dense = mask.to_dense()
    assert np.array_equal(lists["full_kv_num_blocks"], (dense & whole).sum(axis=-1))
    assert np.array_equal(lists["kv_num_blocks"], (dense & ~whole).sum(axis=-1))
    assert lists["kv_indices"].shape == dense.shape and lists["kv_indices"].dtype == np.int32


def test_known_lists():
    bits = np.zeros((1, 1, 3, 3), bool)
    bits[0, 0] = [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    mask = BlockMask.from_dense(bits, 64, 64, 192, 192, True)
    csr = mask_lists.to_csr(mask)
    assert csr["indptr"].tolist() == [[[0, 1, 2, 4]]] and csr["indices"].tolist() == [0, 1, 0, 2]
    (head,) = mask_lists.to_flashinfer(mask)
    assert head["indptr"].tolist() == [0, 1, 2, 4] and head["indptr"].dtype == np.int32
    fa4 = mask_lists.to_flash_attention_4(mask)
    assert fa4["mask_block_cnt"].tolist() == [[[1, 1, 1]]] and fa4["mask_block_idx"].tolist() == [[[[0], [1], [2]]]]
    assert fa4["full_block_cnt"].tolist() == [[[0, 0, 1]]] and fa4["full_block_idx"].tolist() == [[[[0], [0], [0]]]]


def test_lists_that_do_not_fit():
    mask = random_mask(SHAPES[0])
    lists = mask_lists.to_csr(mask)
    with pytest.raises(ArgumentError, match="indptr"):
        mask_lists.from_csr({**lists, "indices": lists["indices"][:-1]}, *SHAPES[0])
    with pytest.raises(ArgumentError, match="indices: got"):
        mask_lists.from_csr({**lists, "indices": lists["indices"] + 20}, *SHAPES[0])
