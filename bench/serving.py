"""What serving shapes cost on a GPU: packed and paged calls next to plain ones, merging, statistics, as JSON lines.

    python bench/serving.py [--seqlen 32768,131072] [--page-size 64] [--calls 100]

32 query heads, 8 KV heads, head_dim 128, bfloat16, causal, int8, generated inputs; CUDA events, L2 flushed, medians.
Pages lie in order. "host_us" is the host's time of a call after the first.
"""

from __future__ import annotations

import argparse
import json

import cupy
import numpy as np
from host_time import host_microseconds

import salekit
from salekit import workloads
from salekit.timing import time_call

CHUNK = 4096
OPTIONS = dict(estimator="int8", dense_below=0)


def difference(got, want) -> float:
    got, want = (x.get().astype(np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def on_gpu(values) -> cupy.ndarray:
    return cupy.asarray(np.asarray(values, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlen", default="32768,131072")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    for seqlen in map(int, options.seqlen.split(",")):
        q, k, v = workloads.llm_like_qkv(seqlen, num_heads=32, num_kv_heads=8, cuda=True)
        packed = [x[0] for x in (q, k, v)]
        pages = [x.reshape(-1, options.page_size, 8, 128) for x in packed[1:]]
        table = on_gpu(np.arange(len(pages[0]))[None])
        one, four = on_gpu([0, seqlen]), on_gpu(np.arange(5) * (seqlen // 4))
        quarters = [slice(i * seqlen // 4, (i + 1) * seqlen // 4) for i in range(4)]
        last, of_last = slice(seqlen - CHUNK, seqlen), on_gpu([0, CHUNK])
        statistics, more = salekit.key_statistics(k), k[:, :CHUNK]
        out, lse = salekit.sparse_attention(q, k, v, return_lse=True, **OPTIONS)
        held = {name: cupy.empty_like(x) for name, x in (("whole", q), ("packed", packed[0]), ("chunk", q[:, last]))}

        def paged(rows, sums, target, **more):
            return salekit.sparse_attention_varlen(
                rows, *pages, sums, None, rows.shape[0], seqlen, block_table=table, seqlens_k=one[1:], out=target,
                **OPTIONS, **more,
            )

        def packed_call(sums, longest, **more):
            return salekit.sparse_attention_varlen(
                *packed, sums, sums, longest, longest, out=held["packed"], **OPTIONS, **more
            )

        def apart():
            for part in quarters:
                salekit.sparse_attention(q[:, part], k[:, part], v[:, part], out=held["whole"][:, part], **OPTIONS)

        calls = {
            "one call": lambda: salekit.sparse_attention(q, k, v, out=held["whole"], **OPTIONS),
            "packed, one sequence": lambda: packed_call(one, seqlen),
            "paged, one sequence": lambda: paged(packed[0], one, held["packed"]),
            "packed, debug": lambda: packed_call(one, seqlen, debug=True),
            "paged, debug": lambda: paged(packed[0], one, held["packed"], debug=True),
            "four calls of a quarter": apart,
            "packed, four quarters": lambda: packed_call(four, seqlen // 4),
            f"chunk of {CHUNK}": lambda: salekit.sparse_attention(q[:, last], k, v, out=held["chunk"], **OPTIONS),
            f"chunk of {CHUNK}, paged": lambda: paged(packed[0][last], of_last, held["chunk"][0]),
            "chunk, statistics given": lambda: salekit.sparse_attention(
                q[:, last], k, v, out=held["chunk"], k_statistics=statistics, **OPTIONS
            ),
            "key_statistics": lambda: salekit.key_statistics(k),
            f"update by {CHUNK} keys": lambda: statistics.update(more),
            "merge_attention_states": lambda: salekit.merge_attention_states(out, lse, out, lse, out=held["whole"]),
        }
        for name, call in calls.items():
            call()
            record = {"seqlen": seqlen, "call": name, "ms": round(time_call(call, cuda=True).median_ms, 4)}
            record["host_us"] = host_microseconds(call, options.calls)["median_us"]
            if name in ("packed, one sequence", "paged, one sequence"):
                record["difference"] = difference(held["packed"], out[0])
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
