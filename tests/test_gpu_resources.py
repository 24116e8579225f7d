"""What happens when a GPU is full, over many calls, in many threads, in forks, and at a million tokens.

docs/edges.md lists the attempts. Forks, and what fills the GPU, are processes of their own or give all of it back.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit import jit, workspaces
from salekit.errors import OutOfMemoryError
from salekit.workloads import llm_like_qkv

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
cp = pytest.importorskip("cupy")

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SPARSE = {"thresholds": 0.2, "dense_below": 0}
MILLION = 2**20
FREE_FOR_A_MILLION = 70 * 10**9


def make(seqlen, heads=4, kv_heads=2, head_dim=128, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return [
        cp.asarray(rng.standard_normal((batch, seqlen, h, head_dim), np.float32).astype(BF16))
        for h in (heads, kv_heads, kv_heads)
    ]


def bits(x):
    return x.get().tobytes()


def free_bytes():
    cp.cuda.Device().synchronize()
    return cp.cuda.runtime.memGetInfo()[0]


def empty_pools():
    salekit.clear_workspaces()
    gc.collect()
    cp.get_default_memory_pool().free_all_blocks()


class Filled:
    """All of the GPU but ``rest`` bytes, taken from the driver and not from CuPy's pool."""

    def __init__(self, rest):
        self._pieces = []
        piece = 2**33
        while piece >= 2 * MIB:
            if free_bytes() - rest < piece:
                piece //= 2
                continue
            try:
                self._pieces.append(cp.cuda.runtime.malloc(piece))
            except cp.cuda.runtime.CUDARuntimeError:
                piece //= 2

    def __enter__(self):
        return self

    def __exit__(self, *_):
        cp.cuda.Device().synchronize()
        for piece in self._pieces:
            cp.cuda.runtime.free(piece)
        self._pieces.clear()


# --- a full GPU --------------------------------------------------------------------------------------------------
def full_calls():
    q, k, v = llm_like_qkv(32768, 32, 8, cuda=True)
    out = cp.empty_like(q)
    plan = salekit.plan(q, k, v, dense_below=0)
    starts = np.array([0, 20000, 32768], np.int32)
    packed = [x[0] for x in (q, k, v)]
    return {
        "results": lambda: salekit.sparse_attention(q, k, v, return_lse=True, dense_below=0)[0],
        "workspace alone": lambda: salekit.sparse_attention(q, k, v, out=out, dense_below=0),
        "a plan": lambda: plan.run(q, k, v),
        "stages": lambda: salekit.attend(q, k, v, None, plan.plan)[0],
        "packed": lambda: salekit.sparse_attention_varlen(*packed, starts, starts, 20000, 20000, dense_below=0),
    }


@pytest.mark.parametrize("name", ["results", "workspace alone", "a plan", "stages", "packed"])
def test_a_full_gpu(name):
    """A small rest is left: one error with both numbers; nothing stays behind; with the memory back it is as before."""
    call = full_calls()[name]
    want = bits(call())
    small = make(64, 1, 1)
    want_small = bits(salekit.dense_attention(*small))
    empty_pools()
    before = cp.get_default_memory_pool().used_bytes()
    with Filled(24 * MIB):
        for _ in range(3):
            with pytest.raises(OutOfMemoryError) as error:
                call()
        assert isinstance(error.value, MemoryError) and isinstance(error.value, salekit.errors.SalekitError)
        assert error.value.wanted_bytes > error.value.free_bytes >= 0
        text = str(error.value)
        for number in (error.value.wanted_bytes, error.value.free_bytes):
            assert f"{number:,}" in text
        assert text.startswith("out of memory on cuda:") and "Free memory, or pass fewer" in text
        assert cp.get_default_memory_pool().used_bytes() == before and len(workspaces._workspaces) <= 1
        assert bits(salekit.dense_attention(*small)) == want_small  # what fits still runs
    assert bits(call()) == want
    empty_pools()


def test_a_full_gpu_with_workspaces_that_can_be_given_up():
    """What another stream kept is enough for this one: the second attempt succeeds, and nobody notices."""
    q, k, v = llm_like_qkv(65536, 32, 8, cuda=True)
    out = cp.empty_like(q)
    want = bits(salekit.sparse_attention(q, k, v, out=out, dense_below=0))
    empty_pools()
    stream = cp.cuda.Stream(non_blocking=True)
    salekit.sparse_attention(q, k, v, out=out, dense_below=0, stream=stream)
    stream.synchronize()
    out.data.memset_async(0, out.nbytes)
    with Filled(8 * MIB):
        assert bits(salekit.sparse_attention(q, k, v, out=out, dense_below=0)) == want
    empty_pools()


def test_kernels_that_are_loaded_on_a_full_gpu(monkeypatch):
    """A call whose kernels' code finds no room fails in one way, and runs as ever once there is room."""
    q, k, v = make(700, 2, 2)
    out, own = cp.empty_like(q), cp.empty(64 * MIB, np.uint8)
    kinds = [
        {"estimator": estimator, "block": block, **more}
        for estimator in ("int4", "int8", "int8-sp24")
        for block in ((64, 32), (128, 128))
        for more in ({}, {"window_size": (100, 50), "causal": False}, {"softcap": 20.0}, {"query_stride": 2})
    ]
    plans = [salekit.plan(q, k, v, dense_below=0, **kind) for kind in kinds]

    def run(plan):
        plan.run(q, k, v, out=out, workspace=own)
        return bits(out)

    want = [run(plan) for plan in plans]
    monkeypatch.setattr(jit, "_loaded", {})
    plans = [salekit.plan(q, k, v, dense_below=0, **kind) for kind in kinds]  # which have loaded nothing
    num_failed = 0
    for index, plan in enumerate(plans):
        empty_pools()
        with Filled(0):
            try:
                run(plan)
            except OutOfMemoryError:
                num_failed += 1
        assert [run(plan), run(plan)] == [want[index]] * 2
    assert num_failed  # or nothing was tried: the driver takes memory for code in pieces, of many kernels each


def test_a_pool_with_a_limit():
    """CuPy's own limit is named, too."""
    q, k, v = llm_like_qkv(32768, 32, 8, cuda=True)
    pool = cp.get_default_memory_pool()
    empty_pools()
    limit = pool.total_bytes() + 32 * MIB
    pool.set_limit(size=limit)
    try:
        with pytest.raises(OutOfMemoryError, match=f"CuPy's pool is limited to {limit:,}"):
            salekit.sparse_attention(q, k, v, dense_below=0)
    finally:
        pool.set_limit(size=0)
    assert np.isfinite(salekit.sparse_attention(q, k, v, dense_below=0).get().astype(np.float32)).all()


# --- many calls --------------------------------------------------------------------------------------------------
def mixed_calls():
    """Ten kinds of calls: lengths, heads, estimators, results, layouts, packed, dense."""
    one, two, three = make(1500), make(2300, 8, 2, 64), make(700, 3, 1, batch=2)
    swapped = [cp.asarray(np.ascontiguousarray(x.get().transpose(0, 2, 1, 3))) for x in one]
    packed = [x[0] for x in one]
    starts = np.array([0, 600, 1500], np.int32)
    taus = cp.asarray(np.full(4, 0.2, np.float32))
    return [
        lambda: salekit.sparse_attention(*one, **SPARSE),
        lambda: salekit.sparse_attention(*two, estimator="int4", return_lse=True, return_mask=True, **SPARSE),
        lambda: salekit.sparse_attention(*three, estimator="int8", block=(64, 32), **SPARSE),
        lambda: salekit.sparse_attention(*one, estimator="int8-sp24", query_stride=2, **SPARSE),
        lambda: salekit.dense_attention(*two, return_lse=True),
        lambda: salekit.sparse_attention(*swapped, layout="bhsd", **SPARSE),
        lambda: salekit.sparse_attention_varlen(*packed, starts, starts, 900, 900, **SPARSE),
        lambda: salekit.sparse_attention(*one, thresholds=taus, dense_below=0),
        lambda: salekit.sparse_attention(*one, thresholds=[0.1, 0.2, 0.3, 0.0], dense_below=0),
        lambda: salekit.key_statistics(one[1]),
    ]


def test_memory_after_a_thousand_calls_is_that_after_ten():
    calls = mixed_calls()
    for call in calls:  # compile and load
        call()
    pool, seen = cp.get_default_memory_pool(), {}
    for turn in range(1, 1001):
        calls[turn % len(calls)]()
        if turn in (10, 100, 1000):
            gc.collect()
            free = free_bytes()
            host = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            seen[turn] = (pool.used_bytes(), pool.total_bytes(), free, host)
    assert seen[1000][:3] == seen[10][:3], seen  # used, held by the pool, free on the GPU: to the byte
    assert seen[1000][3] - seen[100][3] <= 8 * MIB, seen  # of the process


# --- threads -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_workspace", [False, True])
def test_sixteen_threads(with_workspace):
    """Each with a stream of its own, all with the same three plans, in turn; and results as if they were alone."""
    inputs = [make(900 + 300 * i, seed=i) for i in range(3)]
    plans = [salekit.plan(*x, dense_below=0) for x in inputs]
    want = [bits(plan.run(*x, thresholds=0.2)) for plan, x in zip(plans, inputs)]
    size = max(plan.workspace_bytes for plan in plans)
    cp.cuda.Device().synchronize()
    problems, barrier = [], threading.Barrier(16)

    def work(index):
        try:
            stream = cp.cuda.Stream(non_blocking=True)
            with stream:
                workspace = cp.empty(size, np.uint8) if with_workspace else None
            barrier.wait()
            for turn in range(30):
                which = (index + turn) % 3
                got = plans[which].run(*inputs[which], thresholds=0.2, stream=stream, workspace=workspace)
                stream.synchronize()
                assert bits(got) == want[which], (index, turn)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not problems and not any(thread.is_alive() for thread in threads)


# --- forks -------------------------------------------------------------------------------------------------------
def in_a_process(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "done", result.stdout + result.stderr


FORK = """
    import os, traceback
    import cupy as cp, numpy as np
    import salekit
    from salekit.errors import GpuError
    host = [np.random.default_rng(i).standard_normal((1, 200, 1, 64)).astype(np.float16) for i in range(3)]

    def forked(child):
        pid = os.fork()
        if pid == 0:
            try:
                child()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
"""


def test_a_child_of_a_process_that_had_used_the_gpu():
    in_a_process(textwrap.dedent(FORK) + textwrap.dedent("""
        gpu = [cp.asarray(x) for x in host]
        plan = salekit.plan(*gpu, dense_below=0)
        want = plan.run(*gpu).get().tobytes()
        twin = salekit.sparse_attention(*host, dense_below=0)

        def child():
            assert np.array_equal(salekit.sparse_attention(*host, dense_below=0), twin)
            for call in (lambda: salekit.sparse_attention(*gpu), lambda: plan.run(*gpu), lambda: salekit.plan(*gpu),
                         salekit.jit.device_arch, lambda: salekit.quantize(*gpu[:2], plan.plan)):
                try:
                    call()
                except GpuError as error:
                    assert str(error).startswith("this process was forked after its parent had started CUDA"), error
                else:
                    raise AssertionError("it ran")

        forked(child)
        assert plan.run(*gpu).get().tobytes() == want  # the parent is as it was
        print("done")
    """))


def test_a_child_that_is_the_first_to_use_the_gpu():
    """salekit and CuPy are imported in the parent; nothing of CUDA is started."""
    in_a_process(textwrap.dedent(FORK) + textwrap.dedent("""
        def child():
            gpu = [cp.asarray(x) for x in host]
            got = salekit.sparse_attention(*gpu, dense_below=0).get().astype(np.float32)
            want = salekit.sparse_attention(*host, dense_below=0).astype(np.float32)
            assert np.abs(got - want).max() <= 0.02

        forked(child)
        child()  # and then the parent
        print("done")
    """))


# --- a million tokens --------------------------------------------------------------------------------------------
def bound_of_a_million():
    """Bytes of workspace that int8-sp24 with query_stride=2 may take at 2**20 tokens, 32/8 heads, head_dim 128.

    While the mask is made there are: half of q's rows (and the last 1,024 of each head, and a tile of 64 to fill up),
    of 2:4 sparse codes 64 bytes and 16 of places, and a limit of 4; k's codes; the mask's bits. Nothing of the size of
    a score matrix, which has 2**40 entries a head. One MiB is for what has a size a head or a channel.
    """
    rows = 32 * (MILLION // 2 + 1024 // 2 + 64)
    mask = 32 * (MILLION // 128) * (MILLION // 32) // 8
    return rows * (64 + 16 + 4) + 8 * MILLION * 128 + mask + MIB


def test_a_million_tokens_in_one_call():
    empty_pools()
    if free_bytes() < FREE_FOR_A_MILLION:
        pytest.skip(f"needs {FREE_FOR_A_MILLION:,} bytes of free GPU memory")
    q, k, v = llm_like_qkv(MILLION, 32, 8, cuda=True)
    out = cp.empty_like(q)
    options = {"estimator": "int8-sp24", "query_stride": 2}
    plan = salekit.plan(q, k, v, **options)
    needed = plan.workspace_bytes  # the kernels are compiled and loaded
    assert 2**30 <= needed <= bound_of_a_million()  # at least the mask's bits
    empty_pools()
    pool, free = cp.get_default_memory_pool(), free_bytes()
    pool.set_limit(size=pool.total_bytes() + bound_of_a_million())  # beyond it the call would fail
    try:
        plan.run(q, k, v, out=out)
        cp.cuda.Device().synchronize()
    finally:
        pool.set_limit(size=0)
    assert free - free_bytes() <= bound_of_a_million() + 256 * MIB  # with code, stacks, graphs and the driver's own
    assert pool.used_bytes() <= sum(x.nbytes for x in (q, k, v, out)) + needed + MIB
    last = salekit.sparse_attention(q[:, -256:], k, v, **options)  # another call, with other kernels' shapes
    got, want = (x.get().astype(np.float32) for x in (out[:, -256:], last))
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want) > 0
    first = salekit.dense_attention(q[:, :128], k[:, :128], v[:, :128]).get().astype(np.float32)  # all of it is anchors
    assert np.abs(out[:, :128].get().astype(np.float32) - first).max() <= 0.02
    del q, k, v, out, last
    empty_pools()
