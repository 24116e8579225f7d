"""salekit's attention inside jitted JAX programs, next to JAX's own: ``python -m examples.jax_attention --help``."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any, Callable

from salekit.cli.main import exit_code_of

from salekit.errors import ArgumentError, SalekitError

RUNS = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.jax_attention", description=__doc__)
    parser.add_argument("--seqlen", type=int, help="tokens; default 32768 on a GPU, 1024 on the twin")
    parser.add_argument("--heads", type=int, help="query heads; default 32 on a GPU, 8 on the twin")
    parser.add_argument("--kv-heads", type=int, help="default a quarter of --heads")
    parser.add_argument("--tau", type=float, default=0.008, help="threshold of all heads (default %(default)s)")
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="run on the CPU, as N devices")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        run(options)
    except SalekitError as error:
        print(f"jax_attention: error: {error}", file=sys.stderr)
        sys.exit(int(exit_code_of(error)))


def check(options: argparse.Namespace) -> None:
    for name in ("seqlen", "heads", "kv_heads", "cpu_devices"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ArgumentError(f"--{name.replace('_', '-')}: got {given}; wants at least 1")
    if not options.tau >= 0:
        raise ArgumentError(f"--tau: got {options.tau:g}; wants a number >= 0 or inf")


def run(options: argparse.Namespace) -> None:
    check(options)
    if options.cpu_devices is not None:  # before JAX starts
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.cpu_devices}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import numpy as np

    import salekit.jax
    from salekit.workloads import llm_like_qkv

    on_gpu = jax.default_backend() == "gpu"
    seqlen = options.seqlen if options.seqlen is not None else 32768 if on_gpu else 1024
    heads = options.heads if options.heads is not None else 32 if on_gpu else 8
    kv_heads = options.kv_heads if options.kv_heads is not None else max(1, heads // 4)
    if heads % kv_heads:
        raise ArgumentError(f"--kv-heads: got {kv_heads} for {heads} heads; wants a number that divides them")
    where = "XLA's stream and buffers" if on_gpu else "the NumPy twin: times say nothing of a GPU"
    print(f"jax {jax.__version__} on {len(jax.devices())} x {jax.devices()[0].device_kind}; salekit on {where}")
    print(f"{seqlen} tokens, {heads} query and {kv_heads} KV heads of 128, bfloat16, causal, tau {options.tau:g}\n")
    q, k, v = llm_like_qkv(seqlen, num_heads=heads, num_kv_heads=kv_heads, cuda=on_gpu)
    q, k, v = (jnp.asarray(x.get() if on_gpu else x) for x in (q, k, v))
    taus = jnp.full(heads, options.tau, jnp.float32)

    def sparse(q, k, v, taus):
        return salekit.jax.sparse_attention(q, k, v, thresholds=taus, dense_below=0)

    def jax_own(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if on_gpu else "xla")

    # One program each. Nothing leaves the device between XLA's operations and salekit's.
    calls = {
        f"jax.nn.dot_product_attention ({'cuDNN' if on_gpu else 'XLA'})": (jax.jit(jax_own), (q, k, v)),
        "salekit.jax.dense_attention": (jax.jit(salekit.jax.dense_attention), (q, k, v)),
        "salekit.jax.sparse_attention": (jax.jit(sparse), (q, k, v, taus)),
    }
    print(f"{'under jit, ' + str(RUNS) + ' runs':46}{'ms, median':>12}{'error':>10}")
    dense = calls["salekit.jax.dense_attention"][0](q, k, v)
    for name, (call, arguments) in calls.items():
        try:
            out, milliseconds = timed(jax, call, *arguments)
        except Exception as error:  # cuDNN may be missing, or not know the shape
            print(f"{name:46}  {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        print(f"{name:46}{milliseconds:12.2f}{relative_error(jnp, out, dense):10.4f}")
    print("error: of the whole output against salekit's dense attention, relative, in the Euclidean norm\n")

    with_mask = jax.jit(
        lambda q, k, v: salekit.jax.sparse_attention(q, k, v, thresholds=taus, dense_below=0, return_mask=True)
    )
    density = with_mask(q, k, v)[1].density()
    low, high = density.min(), density.max()
    print(f"mask from inside the program: density {density.mean():.3f}, heads from {low:.3f} to {high:.3f}")

    two = jnp.stack([q, q[:, ::-1]])
    mapped = jax.jit(jax.vmap(sparse, in_axes=(0, None, None, None)))(two, k, v, taus)
    alone = jnp.stack([jax.jit(sparse)(each, k, v, taus) for each in two])
    print(f"vmap over two sets of queries: the same bits as two calls: {bool((mapped == alone).all())}")
    shard(jax, jnp, np, sparse, q, k, v, taus)


def shard(jax: Any, jnp: Any, np: Any, sparse: Callable, q: Any, k: Any, v: Any, taus: Any) -> None:
    """Heads over all devices: each runs its own, and nothing has to be exchanged."""
    devices = jax.devices()
    if len(devices) == 1 or k.shape[2] % len(devices) or not hasattr(jax, "shard_map"):
        print("shard_map: not shown; wants several devices, a number of KV heads that they divide, and JAX 0.6")
        return
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("heads",))
    heads, by_head = PartitionSpec(None, None, "heads"), PartitionSpec("heads")
    specs = (heads, heads, heads, by_head)
    sharded = jax.jit(jax.shard_map(sparse, mesh=mesh, in_specs=specs, out_specs=heads))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v, taus), specs)]
    out, milliseconds = timed(jax, sharded, *placed)
    same = np.array_equal(np.asarray(out), np.asarray(jax.jit(sparse)(q, k, v, taus)))
    print(f"shard_map, heads over {len(devices)} devices: {milliseconds:.2f} ms, the same bits: {same}")


def timed(jax: Any, call: Callable, *arguments: Any) -> tuple[Any, float]:
    """(result, median milliseconds until it is there), after a first call that compiles."""
    out = jax.block_until_ready(call(*arguments))
    samples = []
    for _ in range(RUNS):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        samples.append((time.perf_counter() - started) * 1e3)
    return out, statistics.median(samples)


def relative_error(jnp: Any, got: Any, want: Any) -> float:
    got, want = (x.astype(jnp.float32) for x in (got, want))
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


if __name__ == "__main__":
    main()
