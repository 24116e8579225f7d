"""What softcap, a window, sink logits and other head dims cost on a GPU, as JSON lines.

    python bench/score_options.py [--seqlen 32768]

32 query heads, 8 KV heads, bfloat16, causal, int8, tau .008, generated inputs; CUDA events, L2 flushed, medians. Rates
count 4 * head_dim operations for each visible pair in a selected block (those of a dense call: all visible pairs).
"""

from __future__ import annotations

import argparse
import json

import cupy
import numpy as np

import salekit
from salekit import workloads
from salekit.timing import time_call

HEADS, KV_HEADS, WINDOW = 32, 8, 4096
OPTIONS = {
    "none": {},
    "softcap": {"softcap": 30.0},
    "sink logits": {"sink_logits": np.zeros(HEADS, np.float32)},
    f"window of {WINDOW}": {"window_size": (WINDOW - 1, 0)},
    "all three": {"softcap": 30.0, "sink_logits": np.zeros(HEADS, np.float32), "window_size": (WINDOW - 1, 0)},
}


def record(name: str, arrays: tuple[cupy.ndarray, ...], options: dict) -> None:
    out = cupy.empty_like(arrays[0])
    seqlen, head_dim = arrays[0].shape[1], arrays[0].shape[3]
    window = min(options.get("window_size", (seqlen, 0))[0] + 1, seqlen)
    pairs = HEADS * (window * (window + 1) // 2 + (seqlen - window) * window)
    dense = time_call(lambda: salekit.dense_attention(*arrays, out=out, **options), cuda=True).median_ms
    sparse = time_call(lambda: salekit.sparse_attention(*arrays, out=out, estimator="int8", dense_below=0, **options),
                       cuda=True).median_ms
    mask = salekit.sparse_attention(*arrays, estimator="int8", dense_below=0, return_mask=True, **options)[1]
    print(json.dumps({
        "seqlen": seqlen, "head_dim": head_dim, "options": name, "dense_ms": round(dense, 3),
        "dense_tflops": round(4 * head_dim * pairs / dense / 1e9, 1), "sparse_ms": round(sparse, 3),
        "density": round(float(np.mean(mask.density())), 4),
    }), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqlen", type=int, default=32768)
    seqlen = parser.parse_args().seqlen
    for head_dim in (128, 64, 96, 192, 256):
        arrays = workloads.llm_like_qkv(seqlen, HEADS, KV_HEADS, head_dim, cuda=True)
        for name, options in OPTIONS.items() if head_dim == 128 else (("none", {}),):
            record(name, arrays, options)


if __name__ == "__main__":
    main()
