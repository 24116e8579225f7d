"""Block masks at their edges: windows, other leading axes, odd files, nothing at all, sizes that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

import salekit
from salekit import mask_lists
from salekit.block_mask import BlockMask
from salekit.errors import ArgumentError, FileFormatError

WINDOWS = [
    (64, 32, 256, 256, True, 100, 0),
    (64, 32, 256, 256, True, 0, -1),
    (128, 32, 1000, 1300, True, 300, -1),
    (64, 64, 257, 333, False, 130, 70),
    (64, 64, 257, 333, False, -1, 200),
    (64, 64, 257, 333, False, 200, -1),
    (32, 128, 700, 300, False, 0, 0),
    (32, 32, 700, 300, True, 90, 500),  # what is after a row stays hidden
]
EMPTY = [
    (2, 3, 100, 0, False),
    (2, 3, 0, 100, True),
    (0, 3, 100, 200, True),
    (2, 0, 100, 200, True),
    (1, 0, 100, 200, False),
    (0, 2, 0, 0, True),
]
LISTS = {
    "csr": (mask_lists.to_csr, mask_lists.from_csr),
    "flashinfer": (mask_lists.to_flashinfer, None),
    "flex": (mask_lists.to_flex_attention, mask_lists.from_counted_lists),
    "flash4": (mask_lists.to_flash_attention_4, mask_lists.from_counted_lists),
}


def make(blocks, batch=2, heads=3, density=0.4, seed=0) -> BlockMask:
    shape = (batch, heads, -(-blocks[2] // blocks[0]), -(-blocks[3] // blocks[1]))
    return BlockMask.from_dense(np.random.default_rng(seed).random(shape) < density, *blocks)


def there_and_back(form: str, mask: BlockMask, *blocks) -> BlockMask:
    to, back = LISTS[form]
    if back is None:
        batch, heads = mask.words.shape[:2]
        return mask_lists.from_flashinfer(to(mask), batch, *blocks, num_heads=heads)
    return back(to(mask), *blocks)


def pairs_of(block_q, block_k, seqlen_q, seqlen_k, causal, left=-1, right=-1) -> np.ndarray:
    """bool [num_q_blocks, block_q, num_k_blocks, block_k]: visible pairs, one by one."""
    nq, nk = -(-seqlen_q // block_q), -(-seqlen_k // block_k)
    pairs = np.zeros((nq * block_q, nk * block_k), bool)
    behind = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - np.arange(seqlen_k)
    seen = np.ones_like(behind, bool)
    if left >= 0:
        seen &= behind <= left
    if causal or right >= 0:
        seen &= behind >= (0 if causal else -right)
    pairs[:seqlen_q, :seqlen_k] = seen
    return pairs.reshape(nq, block_q, nk, block_k)


# --- windows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blocks", WINDOWS)
def test_full_blocks_of_a_window(blocks):
    mask, pairs = make(blocks), pairs_of(*blocks)
    whole = pairs.all(axis=(1, 3))
    assert np.array_equal(mask.visible(), pairs.any(axis=(1, 3)))
    assert np.array_equal(mask_lists.full_blocks(mask), whole)
    lists, dense = mask_lists.to_flex_attention(mask), mask.to_dense()
    assert np.array_equal(lists["full_kv_num_blocks"], (dense & whole).sum(axis=-1))
    assert np.array_equal(lists["kv_num_blocks"], (dense & ~whole).sum(axis=-1))


def test_lists_of_a_call_with_a_window():
    x = np.zeros((1, 256, 1, 64), np.float16)
    options = dict(window_size=(100, 0), block=(64, 32), dense_below=0, return_mask=True)
    _, mask = salekit.sparse_attention(x, x, x, thresholds=0.0, **options)
    lists = mask_lists.to_flex_attention(mask)
    assert lists["full_kv_num_blocks"].tolist() == [[[0, 1, 1, 1]]]
    assert lists["kv_num_blocks"].tolist() == [[[2, 3, 5, 5]]]


@pytest.mark.parametrize("blocks", WINDOWS)
@pytest.mark.parametrize("form", LISTS)
def test_lists_give_the_window_back(form, blocks):
    mask = make(blocks)
    again = there_and_back(form, mask, *blocks)
    assert again == mask and (again.window_left, again.window_right) == blocks[-2:]
    assert np.array_equal(again.density(), mask.density())


def test_lists_take_the_window_by_name():
    blocks = dict(block_q=64, block_k=32, seqlen_q=256, seqlen_k=256, causal=False, window_left=40, window_right=9)
    mask = make(tuple(blocks.values()))
    assert mask_lists.from_csr(mask_lists.to_csr(mask), **blocks) == mask
    assert mask_lists.from_flashinfer(mask_lists.to_flashinfer(mask), 2, **blocks) == mask
    assert mask_lists.from_counted_lists(mask_lists.to_flash_attention_4(mask), **blocks) == mask


def test_lists_of_other_shapes():
    blocks = WINDOWS[0]
    mask = make(blocks)
    longer = (*blocks[:2], 500, *blocks[3:])
    with pytest.raises(ArgumentError, match="lists: got counts"):
        mask_lists.from_counted_lists(mask_lists.to_flex_attention(mask), *longer)
    with pytest.raises(ArgumentError, match="indptr: got shape"):
        mask_lists.from_csr(mask_lists.to_csr(mask), *longer)
    lists = mask_lists.to_flashinfer(mask)
    with pytest.raises(ArgumentError, match="indptr: got shape"):
        mask_lists.from_flashinfer(lists, 2, *longer)
    with pytest.raises(ArgumentError, match="lists: got 5; wants batch x num_heads = 2 x 2"):
        mask_lists.from_flashinfer(lists[:5], 2, *blocks)
    with pytest.raises(ArgumentError, match="lists: got 6; wants batch x num_heads = 2 x 4"):
        mask_lists.from_flashinfer(lists, 2, *blocks, num_heads=4)


# --- axes of the words -----------------------------------------------------------------------------------------------
def with_words(mask: BlockMask, words) -> BlockMask:
    sizes = (mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k)
    return BlockMask(words, *sizes, mask.causal, mask.window_left, mask.window_right)


def test_more_leading_axes():
    """As jax.vmap returns."""
    masks = [make(WINDOWS[2], seed=seed) for seed in range(4)]
    many = with_words(masks[0], np.stack([mask.words for mask in masks]))
    for method in ("selected_blocks", "density", "to_dense"):
        assert np.array_equal(getattr(many, method)(), np.stack([getattr(mask, method)() for mask in masks])), method
    coarse = [mask.coarsen(256, 64) for mask in masks]
    assert np.array_equal(many.coarsen(256, 64).words, np.stack([mask.words for mask in coarse]))
    none = BlockMask(np.zeros((5, 1, 2, 3, 0), np.uint32), 64, 32, 130, 0, False)
    assert none.to_dense().shape == (5, 1, 2, 3, 0) and none.density().shape == (5, 1, 2)
    one = with_words(masks[0], masks[0].words[1, 2])
    assert one.selected_blocks() == masks[0].selected_blocks()[1, 2]
    assert one.density() == masks[0].density()[1, 2]


def test_vmap_of_jax():
    jax = pytest.importorskip("jax")
    import salekit.jax

    q, k = np.random.default_rng(0).standard_normal((2, 3, 1, 600, 2, 64)).astype(np.float16)

    def call(q, k):
        return salekit.jax.sparse_attention(q, k, k, thresholds=0.1, dense_below=0, return_mask=True)[1]

    many, each = jax.vmap(call)(q, k), [call(*x) for x in zip(q, k)]
    assert many.density().shape == (3, 1, 2)
    assert np.array_equal(many.density(), np.stack([mask.density() for mask in each]))
    assert each[0] == each[0].to_numpy() and each[0] != each[1]
    with pytest.raises(ArgumentError, match="words: got shape"):
        mask_lists.to_csr(many)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 2), (3, 4, 2), (4, 2)])
def test_words_that_files_and_lists_do_not_take(tmp_path, shape):
    mask = BlockMask(np.zeros(shape, np.uint32), 64, 32, 256, 1300, False)
    wants = rf"words: got shape \({', '.join(map(str, shape))}\); wants \[batch, num_heads, 4, 2\]"
    for call in (*(to for to, _ in LISTS.values()), lambda mask: list(mask_lists.heads(mask))):
        with pytest.raises(ArgumentError, match=wants):
            call(mask)
    with pytest.raises(ArgumentError, match=wants):
        mask.save_npz(tmp_path / "m.npz")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(2, 4, 2, 3), (1, 2, 4, 3), (1, 2, 5, 2), (2,), ()])
def test_words_of_other_blocks(tmp_path, shape):
    mask = BlockMask(np.zeros(shape, np.uint32), 64, 32, 256, 1300, False)
    for call in (BlockMask.density, BlockMask.selected_blocks, BlockMask.to_dense, lambda x: x.coarsen(64, 64)):
        with pytest.raises(ArgumentError, match=r"words: got shape .*; wants \[\.\.\., 4, 2\]"):
            call(mask)
    with pytest.raises(ArgumentError, match=r"words: got shape .*; wants \[batch, num_heads, 4, 2\]"):
        mask.save_npz(tmp_path / "m.npz")


# --- files -----------------------------------------------------------------------------------------------------------
def rewritten(path, target, change):
    """The archive with its arrays in the order and by the names that ``change`` gives."""
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    np.savez(target, **change(content))
    return target


@pytest.mark.parametrize("batch, heads", [(1, 12), (2, 11)])
def test_heads_are_found_by_name(tmp_path, batch, heads):
    mask = make(WINDOWS[0], batch, heads)
    mask.save_npz(tmp_path / "m.npz")
    for number, order in enumerate((sorted, reversed)):
        path = rewritten(tmp_path / "m.npz", tmp_path / f"{number}.npz", lambda x: {name: x[name] for name in order(x)})
        with np.load(path) as archive:
            assert archive.files != sorted(archive.files, key=lambda name: (len(name), name))
        assert BlockMask.load_npz(path) == mask


def test_heads_without_metadata(tmp_path):
    rows = np.arange(12, dtype=np.uint8)[:, None, None].repeat(2, 1)
    np.savez(tmp_path / "m.npz", **{name: rows[int(name[1:])] for name in sorted(f"h{h}" for h in range(12))})
    mask = BlockMask.load_npz(tmp_path / "m.npz")
    assert np.array_equal(mask.words[0, :, 1, 0], np.arange(12) & 15)
    np.savez(tmp_path / "n.npz", L9_h0=rows[3], L10_h0=rows[2])  # no names of ours: in its order
    assert BlockMask.load_npz(tmp_path / "n.npz").words[0, :, 1, 0].tolist() == [3, 2]


@pytest.mark.parametrize("batch, wrong, missing", [
    (1, {"h1": "h3"}, "h1"),
    (1, {"h0": "head 0"}, "h0"),
    (1, {"h0": "x", "h1": "y", "h2": "z"}, "h0"),
    (2, {"b1_h2": "b2_h0"}, "b1_h2"),
    (2, {"b0_h1": "h1"}, "b0_h1"),
])
def test_heads_that_are_missing(tmp_path, batch, wrong, missing):
    make(WINDOWS[0], batch).save_npz(tmp_path / "m.npz")
    path = rewritten(tmp_path / "m.npz", tmp_path / "n.npz", lambda x: {wrong.get(name, name): x[name] for name in x})
    with pytest.raises(FileFormatError, match=f"has no '{missing}'"):
        BlockMask.load_npz(path)


@pytest.mark.parametrize("metadata", [
    {"window": [5, 5]}, {"window": "none"}, {"causal": 3, "batch": 9, "num_heads": 7, "seqlen_k": 1, "schema": "x"},
])
@pytest.mark.parametrize("blocks", [WINDOWS[0], WINDOWS[0][:5]])
def test_metadata_do_not_replace_the_mask_s(tmp_path, blocks, metadata):
    mask = make(blocks)
    mask.save_npz(tmp_path / "m.npz", {"source": "x", **metadata})
    assert BlockMask.load_npz(tmp_path / "m.npz") == mask
    with np.load(tmp_path / "m.npz") as archive:
        meta = json.loads(str(archive["__meta__"]))
    assert (meta["source"], meta["batch"], meta["num_heads"], meta["schema"]) == ("x", 2, 3, 1)


def test_numbers_of_numpy(tmp_path):
    mask = make((64, 32, 300, 400, True, 90, -1))
    sizes = [np.int64(x) for x in (64, 32, 300, 400)]
    same = BlockMask(mask.words, *sizes, np.bool_(True), np.int32(90), np.int64(-1))
    same.save_npz(tmp_path / "m.npz")
    assert BlockMask.load_npz(tmp_path / "m.npz") == mask == same


def test_files_without_a_window_s_and_heads_keys_stay_readable(tmp_path):
    mask = make((64, 32, 300, 400, True))
    mask.save_npz(tmp_path / "m.npz")

    def older(content):
        meta = json.loads(str(content["__meta__"]))
        meta = {key: value for key, value in meta.items() if key not in ("window", "num_heads")}
        return {**content, "__meta__": np.array(json.dumps(meta))}

    assert BlockMask.load_npz(rewritten(tmp_path / "m.npz", tmp_path / "n.npz", older)) == mask


@pytest.mark.parametrize("meta, match", [
    ({"batch": 1, "num_heads": 2}, "has no arrays"),
    ({"num_heads": 0, "batch": -1}, "batch is -1"),
    ({"num_heads": "2", "batch": 0}, "num_heads is '2'"),
    ({"num_heads": 2**30, "batch": 0}, f"num_heads is {2**30}"),
    ({"num_heads": 0, "batch": 2**30}, f"batch is {2**30}"),
    ({"num_heads": 9, "batch": 0, "seqlen_q": 2**30, "seqlen_k": 2**30, "block_q": 1, "block_k": 1}, "has no arrays"),
    ({"batch": 0}, "wants one uint8"),
])
def test_metadata_of_no_heads(tmp_path, meta, match):
    np.savez(tmp_path / "m.npz", __meta__=np.array(json.dumps({"schema": 1, **meta})))
    with pytest.raises(FileFormatError, match=match):
        BlockMask.load_npz(tmp_path / "m.npz")


# --- nothing -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch, heads, seqlen_q, seqlen_k, causal", EMPTY)
@pytest.mark.parametrize("window", [(-1, -1), (40, -1)])
def test_empty_masks_come_back(tmp_path, batch, heads, seqlen_q, seqlen_k, causal, window):
    blocks = (64, 32, seqlen_q, seqlen_k, causal, *window)
    mask = make(blocks, batch, heads)
    assert mask.density().shape == (batch, heads)
    for form in LISTS:
        assert there_and_back(form, mask, *blocks) == mask, form
    if batch:
        assert mask_lists.from_flashinfer(mask_lists.to_flashinfer(mask), batch, *blocks) == mask
    flex = mask_lists.to_flex_attention(mask)
    assert flex["kv_indices"].shape == flex["full_kv_indices"].shape == mask.to_dense().shape
    assert BlockMask.from_dense(mask.to_dense(), *blocks) == mask
    assert mask.coarsen(128, 64) == make((128, 64, *blocks[2:]), batch, heads, density=0)
    mask.save_npz(tmp_path / "m.npz")
    again = BlockMask.load_npz(tmp_path / "m.npz")
    assert again == mask and again.words.shape == mask.words.shape and again.words.dtype == np.uint32


def test_the_mask_of_a_call_without_keys(tmp_path):
    q, k = np.zeros((1, 100, 2, 64), np.float16), np.zeros((1, 0, 2, 64), np.float16)
    _, mask = salekit.sparse_attention(q, k, k, causal=False, return_mask=True)
    blocks = (mask.block_q, mask.block_k, 100, 0, False)
    for form in LISTS:
        assert there_and_back(form, mask, *blocks) == mask, form
    mask.save_npz(tmp_path / "m.npz")
    assert BlockMask.load_npz(tmp_path / "m.npz") == mask


# --- equality ------------------------------------------------------------------------------------------------------
class OnAnotherDevice:
    """Words as CuPy has them: on the host only through get."""

    def __init__(self, words):
        self.words, self.shape = words, words.shape

    def get(self):
        return self.words


def test_equality():
    mask, same, other = make(WINDOWS[0]), make(WINDOWS[0]), make(WINDOWS[0], seed=1)
    assert mask == same and not mask != same and mask in [other, same] and mask == mask
    assert mask != other and not mask == other and mask not in [other]
    assert mask == with_words(mask, OnAnotherDevice(mask.words.copy())) != other
    assert mask != mask.words.tobytes() and mask != None and (mask == 3) is False  # noqa: E711
    assert mask.__eq__(3) is NotImplemented
    for position, value in enumerate((32, 16, 255, 255, False, 101, 1)):
        sizes = [*WINDOWS[0][:position], value, *WINDOWS[0][position + 1 :]]
        assert mask != BlockMask(mask.words, *sizes), position
    assert mask != with_words(mask, mask.words[:1])
    same.words[0, 0, 0, 0] ^= 1
    assert mask != same


def test_masks_are_not_hashable():
    with pytest.raises(TypeError, match="unhashable type: 'BlockMask'"):
        hash(make(WINDOWS[0]))


# --- sizes that do not fit -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("block, match", [
    ((96, 32), "block_q: got 96; wants a multiple of 64"),
    ((64, 48), "block_k: got 48; wants a multiple of 32"),
    ((32, 32), "block_q: got 32"),
    ((128, 16), "block_k: got 16"),
    ((0, 32), "block_q: got 0"),
    ((64, -32), "block_k: got -32"),
])
def test_coarsen_to_sizes_that_do_not_fit(block, match):
    with pytest.raises(ArgumentError, match=match):
        make(WINDOWS[0]).coarsen(*block)


@pytest.mark.parametrize("blocks", WINDOWS)
def test_coarsen(blocks):
    mask = make(blocks, density=0.1)
    coarse = mask.coarsen(2 * blocks[0], 3 * blocks[1])
    bits = np.zeros((2, 3, 2 * coarse.num_q_blocks, 3 * coarse.num_k_blocks), bool)
    bits[:, :, : mask.num_q_blocks, : mask.num_k_blocks] = mask.to_dense()
    want = bits.reshape(2, 3, coarse.num_q_blocks, 2, coarse.num_k_blocks, 3).any(axis=(3, 5))
    assert np.array_equal(coarse.to_dense(), want) and mask.coarsen(*blocks[:2]) == mask
    assert (coarse.window_left, coarse.window_right) == blocks[-2:]


@pytest.mark.parametrize("shape", [(1, 2, 3, 11), (1, 2, 2, 10), (2, 3, 10), (3, 10), (1, 1, 2, 3, 10), ()])
def test_bits_of_other_shapes(shape):
    with pytest.raises(ArgumentError, match=r"bits: got shape .*; wants \[batch, num_heads, 3, 10\]"):
        BlockMask.from_dense(np.zeros(shape, bool), 128, 32, 300, 300, True)


@pytest.mark.parametrize("blocks", [(128, 32, 300, 300, True), (64, 32, 700, 300, True), *WINDOWS])
def test_invisible_bits_are_cleared(blocks):
    nq, nk = -(-blocks[2] // blocks[0]), -(-blocks[3] // blocks[1])
    given = np.ones((1, 2, nq, nk), bool)
    mask = BlockMask.from_dense(given, *blocks)
    assert np.array_equal(mask.to_dense(), np.broadcast_to(mask.visible(), given.shape)) and given.all()
    assert (mask.density() == 1).all()


def test_an_archive_of_other_names_keeps_its_order(tmp_path):
    """Without salekit's metadata, names that only look like its own say nothing."""
    heads = [np.full((2, 1), 1 << i, np.uint8) for i in range(3)]
    np.savez(tmp_path / "m.npz", h3=heads[0], h1=heads[1], h2=heads[2])
    words = BlockMask.load_npz(tmp_path / "m.npz").words
    assert words[0, :, 0, 0].tolist() == [1, 2, 4]
