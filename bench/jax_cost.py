"""What salekit costs inside a jitted JAX program, next to the same calls made directly, as JSON lines.

    python bench/jax_cost.py [--seqlen 2048,8192,32768,131072] [--calls 200]

For each length: what XLA's call of salekit takes on the host (its handler, from reading the call frame to the last
launch; ctypes adds some 2 us), and a direct call of ``salekit.sparse_attention`` with ``out=``; then the GPU's time of
both between events on the call's own stream, and both end to end, waiting for the result. Without a GPU: what reading
the frame takes, the twin left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from typing import Any, Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the rest is for CuPy, which makes the direct calls

import jax
import jax.numpy as jnp
import numpy as np

import salekit
import salekit.jax
from salekit import workloads, xla_attention, xla_ffi

SHAPES = {2048: (4, 2), 8192: (32, 8)}
OPTIONS = {"dense_below": 0}


class HandlerClock:
    """Wraps the handler while it is active: host microseconds of each call, and its events when ``with_events``."""

    def __init__(self, name: str, run: Callable | None = None, with_events: bool = False):
        self.microseconds: list[float] = []
        self.events: list[tuple] = []
        self._name, self._run, self._with_events = name, run, with_events
        self._started = threading.local()

    def __enter__(self) -> "HandlerClock":
        self._read, self._original = xla_ffi.read_call, getattr(xla_attention, self._name)
        run = self._run or self._original

        def read_call(frame):
            self._started.time = time.perf_counter()
            return self._read(frame)

        def timed(call):
            if self._with_events:
                pair = _events()
                stream = xla_attention.arrays.external_stream(call.stream())
                pair[0].record(stream)
                run(call)
                pair[1].record(stream)
                self.events.append(pair)
            else:
                run(call)
                self.microseconds.append((time.perf_counter() - self._started.time) * 1e6)

        xla_ffi.read_call = read_call
        setattr(xla_attention, self._name, timed)
        return self

    def __exit__(self, *_: Any) -> None:
        xla_ffi.read_call = self._read
        setattr(xla_attention, self._name, self._original)


def _events() -> tuple:
    import cupy

    return cupy.cuda.Event(), cupy.cuda.Event()


def summary(samples: list[float], digits: int = 1) -> dict[str, float]:
    samples = sorted(samples)
    return {"median": round(statistics.median(samples), digits), "p90": round(samples[len(samples) * 9 // 10], digits)}


def wall_ms(call: Callable[[], Any], wait: Callable[[Any], Any], count: int) -> dict[str, float]:
    samples = []
    for index in range(count + 3):
        started = time.perf_counter()
        wait(call())
        samples.append((time.perf_counter() - started) * 1e3)
    return summary(samples[3:], 3)


def on_gpu(seqlen: int, calls: int) -> dict[str, Any]:
    import cupy

    heads, kv_heads = SHAPES.get(seqlen, (32, 8))
    q, k, v = workloads.llm_like_qkv(seqlen, num_heads=heads, num_kv_heads=kv_heads, cuda=True)
    out = cupy.empty_like(q)
    on_jax = [jnp.asarray(x.get()) for x in (q, k, v)]
    record: dict[str, Any] = {"seqlen": seqlen, "heads": heads, "kv_heads": kv_heads}

    def direct():
        return salekit.sparse_attention(q, k, v, out=out, **OPTIONS)

    program = jax.jit(lambda q, k, v: salekit.jax.sparse_attention(q, k, v, **OPTIONS))

    def jitted():
        return program(*on_jax)

    same = np.array_equal(np.asarray(jitted()).view(np.uint16), direct().get().view(np.uint16))
    record["same_bits"] = bool(same)
    few = max(10, min(calls, 2**21 // seqlen))
    for _ in range(3):
        jax.block_until_ready(jitted())
    with HandlerClock("run_on_gpu") as clock:
        for _ in range(max(1, few // 5)):
            jax.block_until_ready([jitted() for _ in range(5)])  # so few that no queue fills
    record["handler_us"] = summary(clock.microseconds)
    samples = []
    for _ in range(max(1, few // 5)):
        cupy.cuda.Device().synchronize()
        for _ in range(5):
            started = time.perf_counter()
            direct()
            samples.append((time.perf_counter() - started) * 1e6)
    cupy.cuda.Device().synchronize()
    record["direct_call_us"] = summary(samples)

    with HandlerClock("run_on_gpu", with_events=True) as clock:
        for _ in range(few):
            jax.block_until_ready(jitted())
    cupy.cuda.Device().synchronize()
    record["gpu_ms_in_jit"] = summary([cupy.cuda.get_elapsed_time(*pair) for pair in clock.events], 4)
    pairs = [_events() for _ in range(few)]
    for start, end in pairs:
        start.record()
        direct()
        end.record()
        end.synchronize()
    record["gpu_ms_direct"] = summary([cupy.cuda.get_elapsed_time(*pair) for pair in pairs], 4)
    stream = cupy.cuda.get_current_stream()
    record["whole_ms_in_jit"] = wall_ms(jitted, jax.block_until_ready, few)
    record["whole_ms_direct"] = wall_ms(direct, lambda _: stream.synchronize(), few)
    return record


def on_host(calls: int) -> dict[str, Any]:
    q, k, v = (jnp.ones((1, 64, heads, 64), jnp.bfloat16) for heads in (2, 1, 1))
    record: dict[str, Any] = {"gpu": None}
    for name, extras in (("out", {}), ("out, lse, mask, taus", {"return_lse": True, "return_mask": True})):
        taus = {"thresholds": jnp.ones(2)} if extras else {}
        program = jax.jit(lambda q, k, v: salekit.jax.sparse_attention(q, k, v, **extras, **taus, **OPTIONS))
        jax.block_until_ready(program(q, k, v))
        with HandlerClock("run_on_host", run=xla_attention._config_of) as clock:
            for _ in range(calls):
                jax.block_until_ready(program(q, k, v))
        record[f"read_us ({name})"] = {**summary(clock.microseconds), "least": round(min(clock.microseconds), 1)}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seqlen", default="2048,8192,32768,131072")
    options = parser.parse_args()
    versions = {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "device": jax.devices()[0].device_kind}
    if jax.default_backend() != "gpu":
        print(json.dumps({**versions, **on_host(options.calls)}))
        return
    for seqlen in map(int, options.seqlen.split(",")):
        print(json.dumps({**versions, **on_gpu(seqlen, options.calls)}), flush=True)


if __name__ == "__main__":
    main()
