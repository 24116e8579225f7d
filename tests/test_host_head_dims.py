"""Head dims 96, 192 and 256: the twin against float64, their codes' order, and which kernels know them."""

from __future__ import annotations

import numpy as np
import pytest
import score_oracle
from test_host_scores import FEATURES, check_attention, dequantised, make, scores_of, window_of

import salekit
from salekit import catalog, codes, reference
from salekit.errors import ArgumentError
from salekit.plans import HEAD_DIMS, padded_dim


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24", "int4"))
@pytest.mark.parametrize("name", (None, "all"))
@pytest.mark.parametrize("head_dim", (96, 192, 256))
def test_calls_follow_float64(head_dim, name, estimator):
    options = FEATURES[name] if name else {}
    q, k, v = make(130, 300, d=head_dim, seed=5)
    kind = dict(estimator=estimator, block=(64, 32), local=32, dense_below=0)
    plan = salekit.make_plan(q, k, v, **kind, **{key: x for key, x in options.items() if key != "sink_logits"})
    out, lse, mask = salekit.sparse_attention(
        q, k, v, thresholds=0.1, return_lse=True, return_mask=True, **kind, **options
    )
    quantized, window = reference.quantize(q, k, plan), window_of(options, True)
    sinks = options.get("sink_logits", np.full(2, -np.inf))
    allowed = []
    for head in range(2):
        shift = plan.softmax_scale * q[0, :, head].astype(np.float64) @ quantized.k_mean[0, 0].astype(np.float64)
        estimated = dequantised(quantized, plan, head) + shift[:, None]
        exact = scores_of(q, k, head, 1, plan.softmax_scale)
        want, margins = score_oracle.select(
            estimated, exact, 0.1, True, window, plan.softcap, float(sinks[head]), (64, 32), 32
        )
        bits = mask.to_dense()[0, head]
        assert ((bits == want) | (margins < 1e-4)).all()
        seen = score_oracle.visible(130, 300, True, window)
        allowed.append(seen & np.repeat(np.repeat(bits, 64, 0), 32, 1)[:130, :300])
    check_attention((out, lse), q, k, v, allowed, options)


@pytest.mark.parametrize("code_bits", (4, 8))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_hold_rows(head_dim, code_bits):
    rng = np.random.default_rng(head_dim)
    largest = 7 if code_bits == 4 else 127
    rows = rng.integers(-largest, largest + 1, (1, 2, 200, head_dim)).astype(np.int8)
    tiles = codes.rows_to_tiles(rows, code_bits)
    row_bytes = padded_dim(head_dim) * code_bits // 8
    assert tiles.shape == (1, 2, 2, 128 * row_bytes)
    assert np.array_equal(codes.tiles_to_rows(tiles, code_bits, 200, head_dim), rows)
    padded = codes.tiles_to_rows(tiles, code_bits, 256)
    assert padded.shape[-1] == padded_dim(head_dim)
    assert not padded[..., head_dim:].any() and not padded[:, :, 200:].any()
    # Eight rows at one 16-byte chunk lie in all eight groups of four banks where rows are as long as those.
    if row_bytes >= 128:
        marked = np.zeros((1, 1, 128, padded_dim(head_dim)), np.int8)
        marked[0, 0, 8:16, :16] = 1
        found = np.flatnonzero(codes.rows_to_tiles(marked, 8)[0, 0, 0].reshape(-1, 16).any(axis=1))
        assert sorted(found % 8) == list(range(8))
    # As wgmma reads them: 128-byte rows, eight to a group; the second halves of 256-byte rows a group further.
    if row_bytes == 256:
        marked = np.zeros((1, 1, 128, 256), np.int8)
        marked[0, 0, 8:16, 128:] = 1
        found = np.flatnonzero(codes.rows_to_tiles(marked, 8)[0, 0, 0])
        assert found[0] == 8 * 256 + 1024 and len(found) == 1024 == found[-1] - found[0] + 1


@pytest.mark.parametrize("row_bytes", (64, 128, 256))
def test_wgmma_finds_each_byte(row_bytes):
    """By the addresses that a descriptor gives: wgmma_descriptor and wgmma_step of cuda_src/ptx/wgmma.cuh."""
    rows = np.random.default_rng(row_bytes).integers(-128, 128, (1, 1, 128, row_bytes)).astype(np.int8)
    tile = codes.rows_to_tiles(rows, 8)[0, 0, 0].view(np.int8)
    row, byte = np.arange(128)[:, None], np.arange(32)[None]
    for step in range(row_bytes // 32):
        base = 16 * (step // 4 * (1024 // 16) + step % 4 * 2)
        address = base + row // 8 * (8 * row_bytes) + row % 8 * min(row_bytes, 128) + byte
        address ^= (address >> 7 & (min(row_bytes, 128) // 16 - 1)) << 4
        assert np.array_equal(tile[address], rows[0, 0, :, 32 * step : 32 * step + 32])


def test_padded_dims():
    assert [padded_dim(x) for x in HEAD_DIMS] == [64, 128, 128, 256, 256]


@pytest.mark.parametrize("head_dim", (96, 192, 256))
def test_low_bit_attention_takes_64_and_128(head_dim):
    with pytest.raises(ArgumentError, match=f"attend: 'int8-fp8' takes head_dim 64 and 128, q has {head_dim}"):
        salekit.sparse_attention(*make(20, 40, d=head_dim), attend="int8-fp8")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sparse_codes_hold_rows(head_dim):
    rng = np.random.default_rng(head_dim)
    rows = rng.integers(-127, 128, (1, 2, 200, head_dim)).astype(np.int8)
    fours = rows.reshape(-1, 4)
    np.put_along_axis(fours, rng.permuted(np.tile(np.arange(4), (len(fours), 1)), axis=1)[:, :2], 0, axis=1)
    sparse = codes.rows_to_sparse(rows)
    assert sparse.shape == (1, 2, 4, -(-head_dim // 64), 5, 128)
    assert np.array_equal(codes.sparse_to_rows(sparse, 200, head_dim), rows)
    padded = codes.sparse_to_rows(sparse, 256)
    assert not padded[..., head_dim:].any() and not padded[:, :, 200:].any()


@pytest.mark.parametrize("head_dim", (96, 192, 256))
def test_hopper_kernels_know_other_dims(head_dim):
    """But for anchors and int4."""
    given = make(300, 300, d=head_dim)
    plan = salekit.make_plan(*given, estimator="int8-sp24", query_stride=4, full_rows=0).replace(arch="sm_90a")
    assert plan.q_is_sparse and plan.holds_tested_rows and plan.num_positions < plan.padded_q
    sources = {spec.source for spec in catalog.call_specs(plan)}
    assert {"quantize_int8_sparse", "estimate_int8_sm90", "attend_sm90", "anchor_statistics"} <= sources
    assert not {"estimate_sm80", "anchor_statistics_sm90"} & sources
    plan = plan.replace(estimator="int4")
    assert not plan.holds_tested_rows and plan.num_positions == plan.padded_q
    sources = {spec.source for spec in catalog.call_specs(plan)}
    assert {"estimate_sm80", "attend_sm90"} <= sources and "estimate_int4_sm90" not in sources
