"""Host time of a call after the first, allocations of CuPy's pool, and replays of a CUDA graph, as JSON lines.

    python bench/host_time.py [--calls 200] [--seqlen 2048,8192]

Times are of the host's clock alone: the GPU is synchronised every 10 calls, outside the timed part, so that the launch
queue never fills.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import cupy
import numpy as np

import salekit
from salekit import workloads
from salekit.timing import time_call

SHAPES = {2048: (4, 2), 8192: (32, 8)}


class Counter(cupy.cuda.memory_hook.MemoryHook):
    """Counts what is taken from CuPy's pool, and what the pool takes from the GPU."""

    name = "salekit-counter"

    def __init__(self):
        self.pool = self.gpu = 0

    def malloc_preprocess(self, **_):
        self.pool += 1

    def alloc_preprocess(self, **_):
        self.gpu += 1


class Exported:
    """An array of another library: DLPack alone."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


class Described:
    """An array of another library: a CUDA array interface alone."""

    def __init__(self, array):
        self.array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


def host_microseconds(function, calls: int) -> dict[str, float]:
    for _ in range(20):
        function()
    samples = []
    for _ in range(max(1, calls // 10)):
        cupy.cuda.Device().synchronize()
        for _ in range(10):
            started = time.perf_counter()
            function()
            samples.append((time.perf_counter() - started) * 1e6)
    cupy.cuda.Device().synchronize()
    samples.sort()
    return {"median_us": round(statistics.median(samples), 1), "p90_us": round(samples[len(samples) * 9 // 10], 1)}


def allocations(function, calls: int = 20) -> dict[str, float]:
    function()
    with Counter() as counter:
        for _ in range(calls):
            function()
    cupy.cuda.Device().synchronize()
    return {"pool_allocations": counter.pool / calls, "gpu_allocations": counter.gpu / calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seqlen", default="2048,8192")
    options = parser.parse_args()
    for seqlen in map(int, options.seqlen.split(",")):
        heads, kv_heads = SHAPES.get(seqlen, (32, 8))
        q, k, v = workloads.llm_like_qkv(seqlen, num_heads=heads, num_kv_heads=kv_heads, cuda=True)
        out = cupy.empty_like(q)
        others = [tuple(cupy.array(x) for x in (q, k, v)) for _ in range(2)]
        turn = [0]

        def moving(others=others, turn=turn):
            turn[0] += 1
            return salekit.sparse_attention(*others[turn[0] % 2], dense_below=0)

        taus = cupy.asarray(np.full(heads, 0.008, np.float32))
        calls = {
            "sparse": lambda: salekit.sparse_attention(q, k, v, dense_below=0),
            "sparse, out given": lambda: salekit.sparse_attention(q, k, v, dense_below=0, out=out),
            "sparse, other addresses": moving,
            "sparse, lse, mask": lambda: salekit.sparse_attention(
                q, k, v, dense_below=0, return_lse=True, return_mask=True
            ),
            "sparse, taus on the host": lambda: salekit.sparse_attention(
                q, k, v, dense_below=0, thresholds=[0.008] * heads
            ),
            "sparse, taus on the GPU": lambda: salekit.sparse_attention(q, k, v, dense_below=0, thresholds=taus),
            "sparse, int4": lambda: salekit.sparse_attention(q, k, v, dense_below=0, estimator="int4"),
            "dense": lambda: salekit.dense_attention(q, k, v),
            "dense, out given": lambda: salekit.dense_attention(q, k, v, out=out),
        }
        if hasattr(salekit, "plan"):
            plan = salekit.plan(q, k, v, dense_below=0)
            calls["plan.run, out given"] = lambda: plan.run(q, k, v, out=out)
            for name, wrap in (("DLPack", Exported), ("CUDA array interface", Described)):
                foreign = tuple(map(wrap, (q, k, v, out)))
                calls[f"plan.run, out given, {name}"] = lambda x=foreign: plan.run(*x[:3], out=x[3])
        for name, function in calls.items():
            record = {"seqlen": seqlen, "heads": heads, "call": name, **host_microseconds(function, options.calls)}
            record.update(allocations(function))
            if name in ("sparse, out given", "dense, out given"):
                record["total_ms"] = round(time_call(function, cuda=True).median_ms, 4)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
