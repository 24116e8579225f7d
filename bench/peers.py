"""Dense rivals on the same GPU, timed as `salekit bench` times: events, L2 flushed, median and spread.

    python bench/peers.py --seqlen 8k,32k,128k -o bench/results/peers.json

FlashAttention-2 and cuDNN come with PyTorch (scaled_dot_product_attention), FlashAttention-3 with the wheel `fa3-fwd`.
What is not installed, or refuses the shape, is left out with the reason. This is the only file here that imports torch.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import click

SCHEMA = 1
FLUSH_BYTES = 256 * 2**20
CHECK_ROWS = 64  # last rows compared with float64 before anything is timed
MAX_ERROR = {"fp8": 0.1, "other": 0.01}  # relative: bf16 rounds P and the output to 2^-8, e4m3 its inputs to 2^-4


def parse_seqlens(text: str) -> list[int]:
    units = {"k": 2**10, "m": 2**20}
    return [int(part[:-1]) * units[part[-1]] if part[-1] in units else int(part) for part in text.lower().split(",")]


def sdpa(torch, backend: str):
    """Causal attention of bhsd tensors through one backend of PyTorch's own attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(chosen):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def flash_attention_3():
    """FlashAttention-3 of bshd tensors, 16-bit or e4m3."""
    for name in ("flash_attn_interface", "fa3_fwd_interface", "fa3_fwd.flash_attn_interface"):
        try:
            function = importlib.import_module(name).flash_attn_func
            break
        except ImportError:
            continue
    else:
        raise ImportError("no FlashAttention-3: pip install fa3-fwd")

    def attend(q, k, v):
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attend


PEERS = {
    "FlashAttention-2 (torch SDPA)": lambda torch: sdpa(torch, "FLASH_ATTENTION"),
    "cuDNN (torch SDPA)": lambda torch: sdpa(torch, "CUDNN_ATTENTION"),
    "FlashAttention-3": lambda torch: flash_attention_3(),
    "FlashAttention-3 fp8": lambda torch: flash_attention_3(),
}


def relative_error(torch, out, q, k, v) -> float:
    """Of the last rows of head 0, against float64."""
    rows = min(CHECK_ROWS, q.shape[1])
    queries, keys, values = q[0, -rows:, 0].double(), k[0, :, 0].double(), v[0, :, 0].double()
    scores = queries @ keys.T * q.shape[-1] ** -0.5
    seqlen = q.shape[1]
    hidden = torch.arange(seqlen, device=q.device)[None] > torch.arange(seqlen - rows, seqlen, device=q.device)[:, None]
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    return float((out[0, -rows:, 0].double() - want).norm() / want.norm())


def time_ms(torch, function, max_seconds: float = 2.0) -> dict:
    """Median, spread (interquartile range / median) and count: the stop rule of salekit/timing.py."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def sample() -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def spread(samples: list[float]) -> float:
        if len(samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / statistics.median(samples)

    for _ in range(2):
        sample()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < 50:
        samples.append(sample())
        if len(samples) >= 5 and spread(samples) <= 0.01:
            break
        if len(samples) >= 2 and time.perf_counter() - started > max_seconds:
            break
    return {
        "median_ms": round(statistics.median(samples), 5),
        "spread": round(spread(samples), 5),
        "samples": len(samples),
    }


def run_peer(torch, name: str, make, seqlen: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    """One line of the report; ``error`` instead of a time when the peer cannot run."""
    record: dict = {"peer": name, "seqlen": seqlen}
    try:
        attend = make(torch)
        torch.manual_seed(0)
        shape = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (
            torch.randn(1, seqlen, count, head_dim, device="cuda", dtype=torch.bfloat16) for count in shape.values()
        )
        fp8 = name.endswith("fp8")
        inputs = tuple(x.to(torch.float8_e4m3fn) for x in (q, k, v)) if fp8 else (q, k, v)
        error = relative_error(torch, attend(*inputs), q, k, v)
        if not error <= MAX_ERROR["fp8" if fp8 else "other"]:
            return {**record, "error": f"wrong result: relative error {error:.3g}"}
        record |= {"relative_error": error, **time_ms(torch, lambda: attend(*inputs))}
        flop = 2 * head_dim * heads * seqlen * (seqlen + 1)
        record["tflops"] = round(flop / record["median_ms"] / 1e9, 1)
    except Exception as error:  # a missing wheel, an unsupported shape and too little memory all differ by library
        record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return record


@click.command()
@click.option("--seqlen", default="8k,32k,128k", show_default=True)
@click.option("--heads", default=32, show_default=True)
@click.option("--kv-heads", default=8, show_default=True)
@click.option("--head-dim", default=128, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of a table.")
@click.option("-o", "--output", type=click.Path(dir_okay=False))
def main(seqlen: str, heads: int, kv_heads: int, head_dim: int, as_json: bool, output: str | None) -> None:
    """Time dense causal bf16 attention of what is installed."""
    try:
        import torch
    except ImportError:
        raise click.ClickException("PyTorch is not installed; the rivals need it") from None
    if not torch.cuda.is_available():
        click.echo("Error: PyTorch sees no GPU", err=True)
        sys.exit(3)
    report = {
        "schema": SCHEMA,
        "kind": "salekit-peers",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": "bfloat16",
        "causal": True,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "results": [],
    }
    for length in parse_seqlens(seqlen):
        for name, make in PEERS.items():
            click.echo(f"{name}, {length} tokens", err=True)
            report["results"].append(run_peer(torch, name, make, length, heads, kv_heads, head_dim))
            torch.cuda.empty_cache()
    if output:
        Path(output).write_text(json.dumps(report, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(f"{'peer':32} {'seqlen':>8} {'ms':>10} {'spread':>7} {'TFLOPS':>7}")
    for record in report["results"]:
        if "error" in record:
            click.echo(f"{record['peer']:32} {record['seqlen']:>8} {record['error']}")
        else:
            click.echo(
                f"{record['peer']:32} {record['seqlen']:>8} {record['median_ms']:>10.3f} "
                f"{record['spread'] * 100:>6.1f}% {record['tflops']:>7.0f}"
            )


if __name__ == "__main__":
    main()
