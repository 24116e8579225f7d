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


@pytest.mark.parametrize("path", (("int8", "mma", 8), ("int8-sp24", "mma", 8), ("int4", "mma", 4), ("int4", "mma", 8)))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 1), (300, 70), (640, 640), (129, 2500)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masks_are_the_twins(head_dim, lengths, causal, path):
    for options in (dict(block_q=64), dict(block_k=64, heads=4, kv_heads=2)):
        plan = make_estimate_plan(path[0], *lengths, causal=causal, head_dim=head_dim, **options)
        check_estimate(plan, path)
        windowed = plan.replace(window_left=150, window_right=-1 if causal else 40, arch=jit.device_arch())
        check_windowed(windowed, *make_codes(windowed), path[2])


@pytest.mark.parametrize("name", (None, "softcap", "window", "sinks", "all"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("block", ((64, 32), (128, 32), (128, 128)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention(head_dim, block, dtype, name):
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
                result = run("sm80", q, k, v, mask, plan, sinks, layout)
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
        quantized = salekit.quantize(*on_gpu[:2], plan)
        statistics = salekit.anchor_statistics(*on_gpu[:2], quantized.k_mean, plan)
        by_scores = salekit.mask_from_scores(salekit.block_scores(quantized, *statistics, plan), 0.05, plan)
        assert (by_scores.to_dense() != got.to_dense()).sum() <= 1  # one that rounding decides
        dense, dense_lse = salekit.dense_attention(*on_gpu, return_lse=True)
        sums = output_sums(out, lse, dense, dense_lse, plan)
        difference = out.get().astype(np.float64) - dense.get().astype(np.float64)
        assert np.allclose(sums.squares, np.square(difference).sum((0, 1, 3)), rtol=1e-4)
        assert np.allclose(sums.norm, np.square(dense.get().astype(np.float64)).sum((0, 1, 3)), rtol=1e-4)
