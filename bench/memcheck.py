"""Every kernel at small, odd sizes, to run under compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/memcheck.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/memcheck.py --few

    compute-sanitizer --tool synccheck --error-exitcode 9 python bench/memcheck.py --few
    compute-sanitizer --tool initcheck --error-exitcode 9 python bench/memcheck.py --few --no-pools
    SALEKIT_GUARD=1 python bench/memcheck.py

--few takes bf16, head_dim 128 and two lengths alone; --dims 96,192 takes those head_dims. initcheck does not see what
the copy engine stores, on Hopper the pools of skipped keys: --no-pools leaves them out. SALEKIT_GUARD=1 is salekit's
own guard bands, between which all memory is NaN at first: results would show what is read before it is written, those
pools included.
CuPy's memory pool is off, so that each buffer is an allocation that the tool can see the ends of. Kernels that hand
work items out have two CTAs at longer lengths: items and tiles then go round their rings more than once.
"""

import importlib
import sys
from itertools import product

import cupy
import ml_dtypes
import numpy as np

import salekit
from salekit import attend_grid, ceilings, jit, skipped_mass, workloads
from salekit.jit import device_arch
from salekit.output_difference import output_sums
from salekit.plans import BLOCKS, ESTIMATORS, LOW_BIT_ARCHS, LOW_BIT_HEAD_DIMS, POOLED_HEAD_DIMS
from salekit.plans import HEAD_DIMS as ALL_HEAD_DIMS

cupy.cuda.set_allocator(None)
FEW = "--few" in sys.argv
POOLS = "--no-pools" not in sys.argv
LENGTHS = ((65, 63), (333, 700)) if FEW else ((1, 1), (65, 63), (127, 1029), (333, 300))
DTYPES = (ml_dtypes.bfloat16,) if FEW else (np.float16, ml_dtypes.bfloat16)
HEAD_DIMS = (128,) if FEW else ALL_HEAD_DIMS
if "--dims" in sys.argv:
    HEAD_DIMS = tuple(int(dim) for dim in sys.argv[sys.argv.index("--dims") + 1].split(","))
MULTIPROCESSORS = jit.multiprocessors  # of this GPU


def main() -> None:
    rng = np.random.default_rng(0)
    attend = importlib.import_module("salekit.attend")
    estimate = importlib.import_module("salekit.estimate")
    calls, arch = 0, device_arch()
    for (seqlen_q, seqlen_k), dtype, head_dim in product(LENGTHS, DTYPES, HEAD_DIMS):
        jit.multiprocessors = MULTIPROCESSORS if seqlen_q < 100 else lambda: 2

        def draw(seqlen, heads):
            return rng.standard_normal((1, seqlen, heads, head_dim)).astype(np.float32).astype(dtype)

        q, k, v = draw(seqlen_q, 4), draw(seqlen_k, 2), draw(seqlen_k, 2)
        gpu = [cupy.asarray(x) for x in (q, k, v)]
        blocks = BLOCKS if (seqlen_q, head_dim) == (127, 128) else ((128, 32), (64, 64))
        for estimator, block, causal in product(ESTIMATORS, blocks, (True, False)):
            stride = 2 if seqlen_q > 300 else 1
            options = dict(
                estimator=estimator, block=block, causal=causal, query_stride=stride, full_rows=64, dense_below=0
            )
            out, lse, mask = salekit.sparse_attention(*gpu, return_lse=True, return_mask=True, **options)
            if arch in LOW_BIT_ARCHS and head_dim in LOW_BIT_HEAD_DIMS:
                low, _ = salekit.sparse_attention(*gpu, return_lse=True, attend="int8-fp8", **options)
                low, exact = low.get().astype(np.float32), out.get().astype(np.float32)
                assert np.linalg.norm(low - exact) <= 0.1 * np.linalg.norm(exact)
            plan = salekit.make_plan(*gpu, **options)
            if POOLS and head_dim in POOLED_HEAD_DIMS:
                pooled = salekit.sparse_attention(*gpu, thresholds=float("inf"), skipped="pool", **options)
                assert np.isfinite(pooled.get().astype(np.float32)).all()
                check_portable_pools(gpu, mask, plan, out, lse)
            attend._launch_sm80(*gpu, mask, plan, out, lse)
            if estimator != "int4":
                plan = plan.replace(arch="sm_80")  # all rows' codes in tiles, which is what the mma kernel reads
            codes = salekit.quantize(*gpu[:2], plan)
            m, l = salekit.anchor_statistics(*gpu[:2], codes.k_mean, plan)
            if estimator != "int4":
                limits = salekit.row_limits(m, l, codes, 0.008, plan)
                same = estimate.estimate(codes, limits, plan, kernel="mma")
                assert np.array_equal(same.words.get(), mask.words.get())
            by_scores = salekit.mask_from_scores(salekit.block_scores(codes, m, l, plan), 0.008, plan)
            assert np.bitwise_count(by_scores.words.get() ^ mask.words.get()).sum() <= 1  # one that rounding decides
            lse = cupy.zeros((1, 4, seqlen_q), np.float32)
            assert output_sums(out, lse, out, lse, plan).squares.max() == 0
            calls += 1
        calls += check_scores(gpu)
        for window in (None, (40, 0)):  # masks of all that is visible
            visible = dict(thresholds=0.0, window_size=window, return_mask=True)
            assert salekit.sparse_attention(*gpu, **visible)[1].density().max() == 1
            calls += 1
        dense = salekit.dense_attention(*gpu).get().astype(np.float32)
        twin = salekit.dense_attention(q, k, v).astype(np.float32)
        assert np.linalg.norm(dense - twin) <= 1e-2 * np.linalg.norm(twin)
    calls += check_serving() + check_tools()
    if arch == "sm_90a":
        calls += check_segments()
    cupy.cuda.Device().synchronize()
    print(f"{calls} calls")


def check_tools() -> int:
    """Generated inputs, and the products that measure ceilings."""
    calls = 0
    for head_dim, seqlen in product(HEAD_DIMS, (1, 300)):
        q, k, v = workloads.llm_like_qkv(seqlen, 2, 1, head_dim, cuda=True)
        assert all(np.isfinite(x.get().astype(np.float32)).all() for x in (q, k, v))
        calls += 1
    for arch in dict.fromkeys((device_arch(), "sm_80")):
        for measured in ceilings._products(arch).values():
            checksums = cupy.empty((2, measured.threads), np.uint32)
            jit.get_kernel(measured.spec)((2,), (measured.threads,), (checksums, np.int32(3)))
            calls += 1
    return calls


def check_portable_pools(gpu, mask, plan, out, lse) -> None:
    """The kernels that pool where Hopper's cannot."""
    out, lse = out.copy(), lse.copy()
    skipped_mass.add_pools(*gpu, mask, plan.replace(arch="sm_80"), out, lse)


def check_serving() -> int:
    """Packed sequences, pages, hostile lengths and pages, statistics of keys, merged states, score features."""
    rng = np.random.default_rng(2)
    rows, keys, calls = (65, 0, 1, 300), (65, 40, 333, 300), 0
    sums = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (rows, keys)]
    hostile = [np.array(x, np.int32) for x in ([-9, 2**31 - 1, 5, 70, 10**6], [0, 700, 2, 10**6, -3])]
    lengths, bad_lengths = (cupy.asarray(np.array(x, np.int32)) for x in (keys, (10**6, -1, 333, 300)))
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):

        def draw(*shape):
            return cupy.asarray(rng.standard_normal((*shape, head_dim)).astype(np.float32).astype(dtype))

        q, k, v, pages = draw(366, 4), draw(738, 2), draw(738, 2), draw(30, 32, 2)
        table = rng.integers(0, 30, (4, 11)).astype(np.int32)
        bad_table = np.where(rng.random(table.shape) < 0.3, 10**9, table).astype(np.int32)
        bad_table[0, :2] = -1, 30
        parts = [salekit.key_statistics(k[None, a:b]) for a, b in zip(sums[1], sums[1][1:])]
        statistics = salekit.KeyStatistics.stack([part.update(k[None, :65]).merge(part) for part in parts])
        for estimator, causal, given in product(ESTIMATORS, (True, False), (None, statistics)):
            options = dict(
                estimator=estimator, causal=causal, dense_below=0, k_statistics=given, query_stride=2, return_lse=True
            )
            for on_host, pair in ((True, sums), (False, sums), (False, hostile)):
                pair = pair if on_host else [cupy.asarray(x) for x in pair]
                out, lse = salekit.sparse_attention_varlen(q, k, v, *pair, 300, 333, **options)
                salekit.merge_attention_states(out, lse, out, lse)
                calls += 1
            sums_q = cupy.asarray(sums[0])
            for of_k, pages_of in ((lengths, table), (bad_lengths, bad_table)):
                options.update(block_table=cupy.asarray(pages_of), seqlens_k=of_k)
                salekit.sparse_attention_varlen(q, pages, pages, sums_q, None, 300, 333, **options)
                calls += 1
        sinks = cupy.asarray(np.array([1, -np.inf, 0, 2], np.float32))
        combinations = [dict(softcap=3.0, window_size=(40, 9), sink_logits=sinks)]
        combinations += [] if FEW else [dict(window_size=(100, -1))]
        for estimator, causal, of_scores in product(("int8", "int4"), (True, False), combinations):
            options = dict(of_scores, estimator=estimator, causal=causal, dense_below=0, local=32, return_lse=True)
            for pair in (sums, hostile):
                salekit.sparse_attention_varlen(q, k, v, *map(cupy.asarray, pair), 300, 333, **options)
            sums_q = cupy.asarray(sums[0])
            for of_k, pages_of in ((lengths, table), (bad_lengths, bad_table)):
                options.update(block_table=cupy.asarray(pages_of), seqlens_k=of_k)
                salekit.sparse_attention_varlen(q, pages, pages, sums_q, None, 300, 333, **options)
            calls += 4
        is_low_bit = device_arch() in LOW_BIT_ARCHS and head_dim in LOW_BIT_HEAD_DIMS
        for attend in ("exact", "int8-fp8") if is_low_bit else ("exact",):
            for dense_below in (0, 8192):
                salekit.sparse_attention_varlen(q, k, v, *sums, 300, 333, attend=attend, dense_below=dense_below)
                calls += 1
    return calls


def check_scores(gpu: list) -> int:
    """Softcap, a window and sink logits, dense and sparse, by Hopper's attention kernel and by the portable one."""
    attend = importlib.import_module("salekit.attend")
    sinks = cupy.asarray(np.linspace(-1, 2, gpu[0].shape[2]).astype(np.float32))
    combinations = [dict(softcap=3.0, window_size=(40, 9), sink_logits=sinks)]
    if not FEW:
        combinations += [dict(softcap=3.0), dict(window_size=(0, -1)), dict(sink_logits=sinks)]
    calls = 0
    for options, causal, estimator in product(combinations, (True, False), ("int8", "int4")):
        sparse = dict(estimator=estimator, block=(64, 64), local=32, thresholds=0.01, dense_below=0)
        out, lse, mask = salekit.sparse_attention(
            *gpu, causal=causal, return_lse=True, return_mask=True, **sparse, **options
        )
        plan = salekit.make_plan(
            *gpu, causal=causal, **{name: x for name, x in options.items() if name != "sink_logits"}
        )
        other = cupy.empty(out.shape, out.dtype)
        attend._launch_sm80(*gpu, mask, plan, other, lse, sink_logits=options.get("sink_logits"))
        for given, want in ((out, other), (salekit.dense_attention(*gpu, causal=causal, **options), None)):
            got = given.get().astype(np.float32)
            assert np.isfinite(got).all()
            if want is not None:
                want = want.get().astype(np.float32)
                assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want) + 1e-6
        calls += 2
    return calls


def check_segments() -> int:
    """Attention over two segments of the keys, which a call this small does not have, and over one."""
    rng, head_dim = np.random.default_rng(1), HEAD_DIMS[-1]
    q, k, v = (
        cupy.asarray(rng.standard_normal((1, seqlen, heads, head_dim), dtype=np.float32).astype(ml_dtypes.bfloat16))
        for seqlen, heads in ((200, 2), (33_000, 1), (33_000, 1))
    )
    options = dict(estimator="int8", thresholds=1.0, dense_below=0)
    whole = salekit.sparse_attention(q, k, v, **options).get().astype(np.float32)
    attend_grid.WHOLE_BYTES = attend_grid.SEGMENTED_ITEMS = 0
    attend_grid.SEGMENT_BYTES = attend_grid.SEGMENT_GRAIN * head_dim * 4
    plan = salekit.plan(q, k, v, **{name: x for name, x in options.items() if name != "thresholds"})
    segmented = plan.run(q, k, v, thresholds=options["thresholds"]).get().astype(np.float32)
    assert np.linalg.norm(segmented - whole) <= 2**-7 * np.linalg.norm(whole)
    return 2


if __name__ == "__main__":
    main()
