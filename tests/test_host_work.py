"""What each launch has to do, against counts one by one and against the launches that the stages really make."""

import ctypes
import itertools
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from salekit import reference, skipped_mass, work
from salekit.plans import BLOCKS, HEAD_DIMS, LOW_BIT_HEAD_DIMS, SUPPORTED_ARCHS, Plan

SHAPES = ((1, 1), (63, 63), (130, 130), (200, 333), (333, 200), (64, 700), (517, 517))


def make_plan(seqlen_q=200, seqlen_k=333, heads=4, kv_heads=2, head_dim=64, **options):
    options.setdefault("arch", "sm_90a")
    return Plan(2, seqlen_q, seqlen_k, heads, kv_heads, head_dim, "bfloat16", head_dim**-0.5, **options)


def visible_pairs(plan):
    """bool [seqlen_q, seqlen_k]"""
    if not plan.causal:
        return np.ones((plan.seqlen_q, plan.seqlen_k), bool)
    return np.arange(plan.seqlen_k)[None] <= np.arange(plan.seqlen_q)[:, None] + plan.seqlen_k - plan.seqlen_q


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("query_stride, full_rows", ((1, 0), (2, 100), (4, 0), (4, 64)))
def test_pairs_are_what_counting_gives(seqlen_q, seqlen_k, causal, query_stride, full_rows):
    for sink, local in ((32, 128), (0, 0), (70, 10), (1000, 1000)):
        plan = make_plan(
            seqlen_q, seqlen_k, causal=causal, query_stride=query_stride, full_rows=full_rows, sink=sink, local=local
        )
        visible = visible_pairs(plan)
        tested = np.zeros(seqlen_q, bool)
        for start in range(0, seqlen_q, plan.block_q):
            rows = range(start, min(start + plan.block_q, seqlen_q))
            whole = any(row >= seqlen_q - full_rows for row in rows)
            for row in rows:
                tested[row] = whole or (row - start) % query_stride == 0
        assert work.tested_pairs(plan) == visible[tested].sum()
        anchors = np.zeros_like(visible)
        for tile in range(plan.num_q_tiles):
            anchors[tile * 64 : (tile + 1) * 64, reference.anchor_keys(plan, tile)] = True
        assert work.anchor_pairs(plan) == (visible & anchors)[tested].sum()
        keys = np.arange(seqlen_k) < plan.sink_end
        for begin, end in map(plan.local_range, range(plan.num_q_tiles)):
            keys[begin:end] = True
        assert work.anchor_keys(plan) == keys.sum()


@pytest.mark.parametrize("query_stride", (1, 4))
def test_rows_are_counted_some_at_a_time(monkeypatch, query_stride):
    for seqlen_q, seqlen_k in ((1024, 1024), (1000, 1500), (1500, 1000)):
        plan = make_plan(seqlen_q, seqlen_k, query_stride=query_stride, full_rows=300)
        whole = work.tested_pairs(plan), work.anchor_pairs(plan)
        with monkeypatch.context() as patch:
            patch.setattr(work, "_ROWS_AT_ONCE", 256)
            assert (work.tested_pairs(plan), work.anchor_pairs(plan)) == whole


def test_long_calls_are_counted_in_little_memory():
    plan = make_plan(2**22, 2**22, query_stride=4, head_dim=128)
    tracemalloc.start()
    try:
        work.tested_pairs(plan), work.anchor_pairs(plan), work.anchor_keys(plan)
        assert tracemalloc.get_traced_memory()[1] < 2**25  # eight bytes a row
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
@pytest.mark.parametrize("causal", (True, False))
def test_anchor_blocks_are_those_of_the_twin(seqlen_q, seqlen_k, causal):
    for (block_q, block_k), (sink, local) in itertools.product(BLOCKS, ((32, 128), (0, 0), (70, 10), (1000, 1000))):
        plan = make_plan(seqlen_q, seqlen_k, causal=causal, block_q=block_q, block_k=block_k, sink=sink, local=local)
        folded = reference.fold_blocks(reference.anchor_blocks(plan)[None, None], plan)
        assert work.anchor_blocks(plan) == folded.sum()


def test_operations_are_counted_as_the_documentation_counts():
    plan = Plan(1, 131072, 131072, 32, 8, 128, "bfloat16", 1.0, arch="sm_90a")
    [dense] = work.dense_work(plan)
    assert dense.operations == {work.BF16: 4 * 128 * 32 * 131072 * 131073 // 2}
    assert dense.num_operations == pytest.approx(1.41e14, rel=5e-3)  # docs/kernels.md
    by_name = {one.spec.source: one for one in work.sparse_work(plan, work.pairs_at(plan, 1.0)[0])}
    assert by_name["estimate_int8_sm90"].operations == {work.S8: dense.num_operations // 2}
    assert by_name["attend_sm90"].operations == dense.operations  # everything is selected
    assert by_name["estimate_int8_sm90"].num_operations == pytest.approx(7.04e13, rel=5e-3)


@pytest.mark.parametrize("density", (0.0, 0.2, 0.7, 1.0))
def test_selected_pairs_are_those_of_a_mask_of_that_density(density):
    plan = make_plan(512, 512)
    pairs, kept = work.pairs_at(plan, density)
    blocks = round(kept * plan.visible_blocks.sum())
    assert kept >= density - 1e-3 and blocks >= work.anchor_blocks(plan)
    # A mask with that many blocks: the anchors, and any others.
    anchors = reference.fold_blocks(reference.anchor_blocks(plan)[None, None], plan)[0, 0]
    seen = np.arange(plan.num_k_blocks)[None] < plan.visible_blocks[:, None]
    mask = anchors.copy()
    mask.flat[np.flatnonzero(seen & ~anchors)[: blocks - anchors.sum()]] = True
    cells = np.kron(mask, np.ones((plan.block_q, plan.block_k), bool))[:512, :512]
    assert pairs == (cells & visible_pairs(plan)).sum() * plan.batch * plan.num_heads
    assert work.pairs_of(plan, [blocks] * plan.batch * plan.num_heads) == pairs


def test_units_follow_the_codes_and_the_architecture():
    def units(**options):
        plan = make_plan(**options)
        found = {}
        for one in work.sparse_work(plan, 1000):
            for unit, count in one.operations.items():
                found.setdefault(one.stage, {})[unit] = count
        return {stage: set(counts) for stage, counts in found.items()}

    assert units(estimator="int8") == {"anchors": {"bf16"}, "estimate": {"s8"}, "attend": {"bf16"}}
    assert units(estimator="int8-sp24")["estimate"] == {"s8-2:4"}
    assert units(estimator="int8-sp24", arch="sm_80")["estimate"] == {"s8"}
    assert units(estimator="int4")["estimate"] == {"s8"} and units(estimator="int4", arch="sm_86")["estimate"] == {"s4"}
    assert units(attend="int8-fp8")["attend"] == {"s8", "e4m3"}
    plan = make_plan(attend="int8-fp8")
    products = work.sparse_work(plan, 1000)[-1].operations
    assert products == {"s8": 2 * 64 * 1000, "e4m3": 2 * 64 * 1000}


# --- against what the stages launch --------------------------------------------------------------------------------
def input_array(cupy, address, shape):
    """A CuPy array at an address that is only looked at."""
    memory = cupy.cuda.UnownedMemory(address, 1 << 33, None, 0)
    return cupy.ndarray(shape, np.float16, cupy.cuda.MemoryPointer(memory, 0))


@pytest.fixture
def recorded(monkeypatch):
    """A function that records a call of a plan: (stage, spec, threads, bytes of the arrays it was given)."""
    cupy = pytest.importorskip("cupy")
    from salekit import arrays, jit, launches, pipeline, programs, tensor_map

    notes, seen = [], {}

    def get_kernel(spec, arch=None):
        def launch(grid, block, args):
            for arg in args:
                if programs.is_gpu_array(arg):
                    seen[arg.data.ptr, arg.shape] = arg.nbytes
            recorder = programs.active()
            threads = math.prod(block if isinstance(block, tuple) else (block,))
            notes.append((recorder.stage, spec, threads, sum(seen.values())))
            seen.clear()
            recorder.launch(SimpleNamespace(ptr=1), (1,), (1,), 0, args)

        return launch

    def counted(function):
        def call(array, *rest):
            base = array.data.ptr >> 40  # the symbol: several maps of a tensor, or of its rows, are one input
            key = next((key for key in seen if key[0] >> 40 == base), (array.data.ptr, array.shape))
            seen[key] = max(array.nbytes, seen.get(key, 0))
            return function(array, *rest)

        return call

    for module in (jit, pipeline):
        monkeypatch.setattr(module, "get_kernel", get_kernel)
    monkeypatch.setattr(jit, "multiprocessors", lambda: 132)
    monkeypatch.setattr(arrays, "tensor_view", counted(arrays.tensor_view))
    monkeypatch.setattr(tensor_map, "tensor_map", counted(tensor_map.tensor_map))
    monkeypatch.setattr(launches, "LaunchedCall", lambda recorder, ports, given: None)

    def record(plan, dense=False):
        notes.clear()
        q_shape = (plan.batch, plan.seqlen_q, plan.num_heads, plan.head_dim)
        k_shape = (plan.batch, plan.seqlen_k, plan.num_kv_heads, plan.head_dim)
        qkv = [input_array(cupy, (i + 1) << 34, shape) for i, shape in enumerate((q_shape, k_shape, k_shape))]
        if dense:
            launches.launch_dense(*qkv, plan)
        else:
            launches.launch_sparse(*qkv, 0.008, plan)
        return list(notes)

    return record


# What is not read whole: three of four partials, scales that int4's limits do not need, rows and keys that no one asks.
PARTLY = {"finish_channels", "finish_balance", "row_limits", "anchor_statistics", "anchor_statistics_sm90"}


@pytest.mark.parametrize("arch", SUPPORTED_ARCHS)
@pytest.mark.parametrize("estimator", ("int4", "int8", "int8-sp24"))
@pytest.mark.parametrize("block", ((64, 32), (128, 64)))
def test_launches_are_those_that_the_stages_make(recorded, arch, estimator, block):
    attends = ("exact", "int8-fp8") if arch == "sm_90a" else ("exact",)
    for attend, query_stride, head_dim in itertools.product(attends, (1, 4), HEAD_DIMS):
        if attend != "exact" and head_dim not in LOW_BIT_HEAD_DIMS:
            continue
        plan = make_plan(
            1300,
            2100,
            arch=arch,
            estimator=estimator,
            attend=attend,
            query_stride=query_stride,
            head_dim=head_dim,
            block_q=block[0],
            block_k=block[1],
            full_rows=300,
        ).replace(dtype="float16")
        model = work.sparse_work(plan, work.pairs_at(plan, 0.3)[0])
        launched = recorded(plan)
        assert [(one.stage, one.spec, one.threads) for one in model] == [note[:3] for note in launched]
        for one, (*_, given) in zip(model, launched):
            # q's rows that are not tested are in its view, and are not read.
            partly = one.spec.source in PARTLY or (plan.holds_tested_rows and one.name.endswith("(q)"))
            if one.spec.source == "quantize_balanced":  # reads one of the two factors of each channel
                given -= plan.batch * plan.num_kv_heads * plan.head_dim * 4
            if partly:
                assert given / 4 <= one.num_bytes <= given, one
            else:
                assert one.num_bytes == given, one
        [dense] = work.dense_work(plan)
        [(stage, spec, threads, given)] = recorded(plan, dense=True)
        assert (dense.stage, dense.spec, dense.threads, dense.num_bytes) == (stage, spec, threads, given)


@pytest.mark.parametrize("seqlen_q, seqlen_k", SHAPES)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("block_q", (64, 128))
def test_pools_are_what_counting_gives(seqlen_q, seqlen_k, causal, block_q):
    plan = make_plan(seqlen_q, seqlen_k, causal=causal, block_q=block_q, skipped="pool")
    visible = visible_pairs(plan)
    blocks = [visible[start : start + block_q] for start in range(0, seqlen_q, block_q)]
    seen = [int(rows.all(axis=0).sum()) for rows in blocks]
    assert work.keys_seen_whole(plan).tolist() == seen
    assert work.rows_of_blocks(plan).tolist() == [len(rows) for rows in blocks]
    extra_keys = sum(len(rows) * math.ceil(count / 128) for rows, count in zip(blocks, seen))
    found = {one.spec.source: one for one in work.sparse_work(plan, 1000) if one.stage == "pool"}
    if not extra_keys:
        assert not found
        return
    heads = plan.batch * plan.num_heads
    assert found["pool_skipped_sm90"].operations == {work.BF16: 6 * 64 * heads * sum(seen)}
    assert found["attend_pools"].operations == {work.BF16: 4 * 64 * heads * extra_keys}
    assert found["pool_skipped_sm90"].written == heads * sum(math.ceil(n / 128) for n in seen) * (2 * 64 * 2 + 8)


@pytest.mark.parametrize("arch", SUPPORTED_ARCHS)
@pytest.mark.parametrize("attend", ("exact", "int8-fp8"))
@pytest.mark.parametrize("pool_bytes", (1 << 29, 1))  # all at once, a strip a turn
def test_launches_with_pools_are_those_that_the_stages_make(recorded, monkeypatch, arch, attend, pool_bytes):
    if attend == "int8-fp8" and arch != "sm_90a":
        pytest.skip("int8-fp8 runs on Hopper")
    monkeypatch.setattr(skipped_mass, "POOL_BYTES", pool_bytes)
    for head_dim, block_q in itertools.product((64, 128), (64, 128)):
        plan = make_plan(
            1300, 2100, arch=arch, attend=attend, estimator="int8", head_dim=head_dim, block_q=block_q, skipped="pool"
        ).replace(dtype="float16")
        model = work.sparse_work(plan, work.pairs_at(plan, 0.3)[0])
        launched = recorded(plan)
        turns = skipped_mass.turns(plan, block_q)
        assert len(turns) == (1 if pool_bytes > 1 else plan.batch * plan.num_kv_heads)
        assert [note[1] for note in launched[-2:]] * len(turns) == [note[1] for note in launched[-2 * len(turns) :]]
        launched = launched[: len(launched) - 2 * (len(turns) - 1)]  # of each kernel its first turn
        assert [(one.stage, one.spec, one.threads) for one in model] == [note[:3] for note in launched]
        if len(turns) > 1:
            continue
        pools = plan.batch * plan.num_heads * int((-(-work.keys_seen_whole(plan) // 128)).sum())
        unused = (turns[0].places - pools) * (4 * head_dim + 8)
        for one, (*_, given) in zip(model, launched):
            if one.spec.source == "quantize_balanced":  # reads one of the two factors of each channel
                given -= plan.batch * plan.num_kv_heads * plan.head_dim * 4
            if one.spec.source.startswith(("pool_skipped", "attend_pools")):
                given -= unused
            if one.spec.source == "attend_pools":  # out and lse are read and written
                given += plan.batch * plan.num_heads * plan.seqlen_q * (2 * head_dim + 4)
            if one.spec.source in PARTLY:
                assert given / 4 <= one.num_bytes <= given, one
            else:
                assert one.num_bytes == given, one
        assert [one.spec for one in work.dense_work(plan)] == [recorded(plan, dense=True)[0][1]]


def test_ctypes_layouts_agree_with_the_sources():
    import sys

    from salekit import estimate as _  # noqa: F401  the module behind the function of that name

    assert work._KEY_FACTS == skipped_mass._KEY_FACTS and 4 * work._POOL_TERMS == skipped_mass._TERMS.itemsize
    assert work._KEY_BOUNDS == ctypes.sizeof(ctypes.c_float) * sys.modules["salekit.estimate"]._KEY_BOUNDS_FLOATS


def test_segments_of_a_long_call_are_one_launch_of_the_model(recorded):
    from salekit.attend import is_segment
    from salekit.attend_grid import segments
    from salekit.launches import Launch, _continues

    plan = make_plan(2**18, 2**18, head_dim=128, estimator="int8")
    *others, attended = work.sparse_work(plan, work.pairs_at(plan, 0.2)[0])
    launched = [note[1] for note in recorded(plan)]
    assert launched == [one.spec for one in others] + [attended.spec] * len(segments(plan))
    assert is_segment(attended.spec) and len(segments(plan)) == 4 * plan.batch * plan.num_kv_heads
    first, second = (Launch("attend", spec, None, (1,) * 3, (1,) * 3) for spec in (attended.spec, others[-1].spec))
    assert _continues(first, first) and not _continues(second, second) and not _continues(second, first)
    [dense] = work.dense_work(plan)
    assert not is_segment(dense.spec)
