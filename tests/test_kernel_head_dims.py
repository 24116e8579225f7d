"""Head dims 96, 192 and 256: every stage on the GPU against its twin or float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from test_kernel_attend import make_inputs, make_plan
from test_kernel_estimate import check as check_estimate
from test_kernel_quantize import check_anchors, make_case
from test_kernel_scores import (
    check_attention,
    check_windowed,
    make_codes,
    make_estimate_plan,
    options_of,
    plan_of,
    run,
    sinks_of,
    visible_mask,
)

import salekit
from salekit import codes, jit, reference
from salekit.output_difference import output_sums

pytestmark = pytest.mark.gpu

HEAD_DIMS = (96, 192, 256)
EPS = 2.0**-24


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24", "int4"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_and_scales_follow_the_twin(head_dim, dtype, estimator):
    quantize = importlib.import_module("salekit.quantize").quantize
    for case in (dict(seqlen_q=1, seqlen_k=1), dict(seqlen_q=513, seqlen_k=1029, layout="bhsd", heads=8)):
        q, k, q_gpu, k_gpu, plan = make_case(**case, head_dim=head_dim, dtype=dtype, estimator=estimator)
        want, got = reference.quantize(q, k, plan), quantize(q_gpu, k_gpu, plan)
        top = np.abs(k.astype(np.float32)).max()
        # As in test_kernel_quantize; rows are fewer at a time, so sums are of up to 64 numbers.
        assert np.abs(got.k_mean.get() - want.k_mean).max() <= 100 * EPS * top
        for name, length in (("q", plan.seqlen_q), ("k", plan.seqlen_k)):
            tiles, rows = getattr(got, f"{name}_codes").get(), getattr(want, f"{name}_codes")
            if name == "q" and plan.q_is_sparse:
                all_dims = codes.sparse_to_rows(tiles, plan.padded_q)
            else:
                all_dims = codes.tiles_to_rows(tiles, got.code_bits, 128 * tiles.shape[2])
            assert not all_dims[..., head_dim:].any() and not all_dims[:, :, length:].any()
            mine = all_dims[:, :, :length, :head_dim]
            assert (mine != rows).mean() <= 1e-2
            assert estimator == "int8-sp24" or np.abs(mine.astype(int) - rows).max() <= 1
            scales = getattr(want, f"{name}_scale")
            ours = getattr(got, f"{name}_scale").get()[..., : scales.shape[-1]]
            assert np.abs(ours - scales).max() <= 1e-5 * np.abs(scales).max() or estimator == "int8-sp24"
        if estimator == "int4":
            ours = got.correction.get()[:, :, : plan.seqlen_k]
            assert np.abs(ours - want.correction).max() <= 2 * head_dim * EPS * np.abs(want.q_mean).sum() * top


@pytest.mark.parametrize("lengths", ((1, 1), (700, 900), (129, 130), (1500, 300)))
@pytest.mark.parametrize("heads", ((4, 4), (6, 2), (8, 1)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_anchor_statistics_follow_the_twin(head_dim, heads, lengths):
    options = dict(heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    check_anchors(*make_case(*lengths, **options))
    check_anchors(*make_case(*lengths, **options, local=256, causal=False))


@pytest.mark.parametrize("path", (
    ("int8", "mma", 8), ("int8-sp24", "mma", 8), ("int4", "mma", 4), ("int4", "mma", 8),
    ("int8", "wgmma", 8), ("int8-sp24", "wgmma", 8),
))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (300, 70), (640, 640), (129, 2500)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masks_are_the_twins(head_dim, lengths, causal, path):
    for options in (dict(block_q=64), dict(block_k=64, heads=4, kv_heads=2)):
        plan = make_estimate_plan(path[0], *lengths, causal=causal, head_dim=head_dim, **options)
        check_estimate(plan, path)
        if path[1] == "wgmma":
            continue
        windowed = plan.replace(window_left=150, window_right=-1 if causal else 40, arch=jit.device_arch())
        check_windowed(windowed, *make_codes(windowed), path[2])


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("stride, full_rows", ((2, 0), (4, 300), (4, 10_000)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tested_rows(head_dim, stride, full_rows, estimator):
    """Hopper's kernels hold nothing of the others: codes, scales, anchors, limits and masks are those of all rows."""
    if jit.device_arch() != "sm_90a":
        pytest.skip("needs an sm_90 GPU")
    options = dict(head_dim=head_dim, heads=6, kv_heads=2, query_stride=stride, full_rows=full_rows)
    for block_q, lengths in ((64, (1000, 1000)), (128, (129, 2100)), (128, (2500, 4200)), (64, (1, 70))):
        q, k, q_gpu, k_gpu, plan = make_case(*lengths, estimator=estimator, block_q=block_q, **options)
        quantize = importlib.import_module("salekit.quantize").quantize
        held, whole = plan, plan.replace(arch="sm_80")
        assert held.holds_tested_rows and not whole.holds_tested_rows
        masks = []
        for each in (held, whole):
            quantized = quantize(q_gpu, k_gpu, each)
            m, l = salekit.anchor_statistics(q_gpu, k_gpu, quantized.k_mean, each)
            limits = salekit.row_limits(m, l, quantized, 0.01, each)
            masks.append(salekit.estimate(quantized, limits, each).words.get())
        assert np.array_equal(*masks)


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long_rows_of_keys(head_dim, estimator):
    """More tiles than the ring has stages, a run of them, and words that are stored in parts."""
    for lengths, causal in (((300, 40_000), True), ((130, 33_001), False)):
        plan = make_estimate_plan(estimator, *lengths, causal=causal, head_dim=head_dim)
        check_estimate(plan, (estimator, "wgmma", 8))


@pytest.mark.parametrize("kernel", ("sm80", "sm90"))
@pytest.mark.parametrize("name", (None, "softcap", "window", "sinks", "all"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("block", ((64, 32), (128, 32), (128, 128)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention(head_dim, block, dtype, name, kernel):
    shape = dict(head_dim=head_dim, dtype=dtype, block_q=block[0], block_k=block[1], heads=4, kv_heads=2)
    for lengths, causal in (((1, 333), True), ((333, 64), True), ((300, 777), False), ((130, 130), True)):
        if name is None:
            plan, sinks = make_plan(*lengths, causal=causal, **shape), None
        else:
            plan = plan_of(name, *lengths, causal=causal, **shape)
            sinks = sinks_of(name, plan)
        q, k, v = make_inputs(plan)
        for mask in (None, visible_mask(plan, 0.4)):
            for layout in ("bshd", "bhsd"):
                result = run(kernel, q, k, v, mask, plan, sinks, layout)
                check_attention(*result, q, k, v, mask, plan, sinks)


@pytest.mark.parametrize("estimator", ("int8", "int8-sp24", "int4"))
@pytest.mark.parametrize("name", (None, "all"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_calls_follow_the_twin(head_dim, name, estimator):
    import cupy

    base = make_plan(500, 700, heads=4, kv_heads=2, head_dim=head_dim)
    q, k, v = make_inputs(base)
    on_gpu = [cupy.asarray(x) for x in (q, k, v)]
    options = dict(options_of(name) if name else {}, estimator=estimator, local=32, dense_below=0, query_stride=2)
    data = dict(thresholds=0.05, return_lse=True, return_mask=True)
    out, lse, mask = salekit.sparse_attention(*on_gpu, **data, **options)
    twin = salekit.sparse_attention(q, k, v, **data, **options)[2]
    got = mask.to_numpy()
    assert (got.to_dense() != twin.to_dense()).sum() <= 2 + 0.01 * twin.selected_blocks().sum()
    sinks = options.pop("sink_logits", None)
    plan = salekit.make_plan(*on_gpu, **options)
    check_attention(out.get(), lse.get(), q, k, v, got, plan, sinks)
    if name is None:
        plan = salekit.scores_plan(plan)
        quantized = salekit.quantize(*on_gpu[:2], plan)
        statistics = salekit.anchor_statistics(*on_gpu[:2], quantized.k_mean, plan)
        by_scores = salekit.mask_from_scores(salekit.block_scores(quantized, *statistics, plan), 0.05, plan)
        assert (by_scores.to_dense() != got.to_dense()).sum() <= 1  # one that rounding decides
        dense, dense_lse = salekit.dense_attention(*on_gpu, return_lse=True)
        sums = output_sums(out, lse, dense, dense_lse, plan)
        difference = out.get().astype(np.float64) - dense.get().astype(np.float64)
        assert np.allclose(sums.squares, np.square(difference).sum((0, 1, 3)), rtol=1e-4)
        assert np.allclose(sums.norm, np.square(dense.get().astype(np.float64)).sum((0, 1, 3)), rtol=1e-4)
