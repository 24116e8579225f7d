"""salekit bench: dense attention, every stage and the whole call, timed with events and with the L2 flushed."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from salekit.errors import GpuError
from salekit.plans import HEAD_DIMS
from salekit.written_files import write

from . import options, render

SCHEMA = 1
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
TWIN_SECONDS_A_PAIR = 2e-8  # dense, every stage and the total once, a query head; at 2k and 4k tokens on two cores
TWIN_LIMIT_SECONDS = 120.0


@click.command("bench")
@click.option("--seqlen", default=None, help="Lengths, as 8k,32k,128k,1m. Default: 8k,32k,128k; without a GPU 1k,2k.")
@click.option("--heads", type=click.IntRange(min=1), default=None, help="Query heads. Default: 32; without a GPU 2.")
@click.option(
    "--kv-heads", type=click.IntRange(min=1), default=None, help="KV heads. Default: a quarter of the heads, or 1."
)
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), default="128", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option(
    "--input", "input_file", type=click.Path(exists=True, dir_okay=False), help="Real q, k, v instead of generated."
)
@click.option(
    "--masks",
    "masks_file",
    type=click.Path(exists=True, dir_okay=False),
    help="Attend through these masks (npz); estimation is timed as usual.",
)
@options.estimator
@options.query_stride
@options.attend
@options.skipped
@options.tau
@click.option(
    "--thresholds",
    "thresholds_file",
    type=click.Path(exists=True, dir_okay=False),
    help="Per-head thresholds (JSON) instead of --tau.",
)
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    default=None,
    help="Layer of an --input and of a --thresholds file that hold several.",
)
@options.block
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the generated input.")
@options.force
@options.as_json
@options.output
def bench(**settings: Any) -> None:
    """Time dense attention, each stage and the whole sparse call.

    CUDA events, L2 flushed before each sample, median and spread (interquartile range / median). Without a GPU the
    NumPy twin is timed, at small sizes.
    """
    files = (settings[name] for name in ("output", "input_file", "masks_file", "thresholds_file"))
    options.check_output("-o", *files, force=settings["force"])
    report = run_bench(**settings)
    text = json.dumps(report, indent=2)
    if settings["output"]:
        write(settings["output"], text + "\n")
        render.note(f"wrote {settings['output']}")
    if settings["as_json"]:
        render.print_json(report)
    else:
        _print_tables(report)


def run_bench(
    *,
    seqlen: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: str,
    dtype: str,
    input_file: str | None,
    masks_file: str | None,
    estimator: str,
    query_stride: int,
    attend: str,
    skipped: str,
    tau: float,
    thresholds_file: str | None,
    block: tuple[int, int],
    seed: int,
    layer: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The report as a JSON object. Raises SalekitError children and click.UsageError."""
    from salekit import data_files, timing

    if thresholds_file:
        options.refuse(("tau",), "--thresholds has those of each head; wants one of the two")
    elif layer is not None and not input_file:
        raise click.UsageError("--layer: is that of an --input or a --thresholds file; there is neither")
    cuda = _has_gpu()
    settings: dict[str, Any] = dict(
        estimator=estimator,
        attend=attend,
        query_stride=query_stride,
        block=block,
        dense_below=0,  # the sparse path is what is timed, at every length
        skipped=skipped,
    )
    masks = load_masks(masks_file, settings["block"]) if masks_file else None
    of_input = layer
    if input_file and thresholds_file and layer is not None and not data_files.holds_layers(input_file):
        of_input = None  # it is that of the thresholds alone
    cases = cases_of(seqlen, heads, kv_heads, int(head_dim), dtype, input_file, masks, cuda, seed, of_input)
    if not cuda:
        render.note("no usable GPU: timing the NumPy twin")
        for case in cases:
            _refuse_long(case)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "salekit-bench",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": timing.versions(),
        "commit": timing.git_commit(),
        "command": timing.command_line(),
        "backend": "cuda" if cuda else "numpy",
        "gpu": timing.gpu_info() if cuda else None,
        "settings": {
            **settings,
            "tau": None if thresholds_file else tau if math.isfinite(tau) else "inf",  # JSON has no infinity
            "thresholds": thresholds_file and Path(thresholds_file).name,
            "layer": layer,
            "input": Path(input_file).name if input_file else "generated",
            "seed": seed,
            "masks": Path(masks_file).name if masks_file else None,
            "causal": True,
        },
        "copy_bytes_per_s": None,
        "results": [],
    }
    if cuda:
        report["copy_bytes_per_s"] = timing.copy_bandwidth()
    for case in cases:
        render.note(
            f"bench: {case['seqlen_q']} tokens, {case['heads']}/{case['kv_heads']} heads, head_dim {case['head_dim']}"
        )
        thresholds = (thresholds_file, layer) if thresholds_file else options.rounded(tau)
        report["results"].append(_bench_case(case, settings, thresholds, masks, report, cuda))
    return report


# --- what is timed -------------------------------------------------------------------------------------------------
def _bench_case(case, settings, thresholds, masks, report, cuda: bool) -> dict[str, Any]:
    """thresholds: a number, or (file, layer)."""
    from salekit import timing
    from salekit.attention import dense_attention, sparse_attention
    from salekit.staged import StagedCall
    from salekit.thresholds import as_thresholds

    q, k, v = case["make"]()
    plan = options.make_plan(q, k, v, **settings)
    if isinstance(thresholds, tuple):
        thresholds = _load_thresholds(*thresholds, plan)
    thresholds = as_thresholds(thresholds, case["heads"], q)
    call = StagedCall(q, k, v, thresholds, plan, given_mask(masks, case["heads"], q) if masks is not None else None)
    mask = call.mask or call.estimated

    whole_call = lambda: sparse_attention(q, k, v, thresholds=thresholds, **settings)  # noqa: E731
    functions = {
        "dense": lambda: dense_attention(q, k, v),
        "quantize": call.quantize,
        "anchors": call.anchors,
        "estimate": call.estimate,
        "attend": call.attend,
        **({"attend-selected": call.attend_selected} if plan.skipped == "pool" else {}),
        # With given masks the call's own mask would be attended to, so the same stages run one after another instead.
        "total": call.total if masks is not None else whole_call,
    }
    times = {}
    clocks = None
    if cuda:
        with timing.ClockSampler() as sampler:
            for name, function in functions.items():
                times[name] = timing.time_call(function, cuda=True)
        clocks = sampler.result
    else:
        for name, function in functions.items():
            times[name] = timing.time_call(function, cuda=False, warmup=1, min_samples=2, max_samples=3)

    blocks = mask.selected_blocks()
    result = {
        "seqlen_q": plan.seqlen_q,
        "seqlen_k": plan.seqlen_k,
        "batch": plan.batch,
        "heads": plan.num_heads,
        "kv_heads": plan.num_kv_heads,
        "head_dim": plan.head_dim,
        "dtype": plan.dtype,
        "estimator": plan.estimator,
        "arch": plan.arch,
        "times": {name: timing_.as_json() for name, timing_ in times.items()},
        "clocks": clocks,
    }
    visible = int(plan.visible_blocks.sum())
    result["density"] = float(blocks.mean() / visible)
    result["density_per_head"] = [round(float(x), 5) for x in blocks.mean(axis=0) / visible]
    if masks is not None:
        result["estimated_density"] = float(call.estimated.selected_blocks().mean() / visible)
    result["speedup"] = times["dense"].median_ms / times["total"].median_ms
    result["rates"] = _rates(plan, blocks, times, report)
    return result


def _load_thresholds(file: str, layer: int | None, plan):
    """Those of the plan's length. ArgumentError where they were found with something else than the plan has."""
    from salekit.thresholds import load_thresholds

    return load_thresholds(
        file,
        layer=layer,
        seqlen=plan.seqlen_k,
        estimator=plan.estimator,
        block=(plan.block_q, plan.block_k),
        skipped=plan.skipped,
        query_stride=plan.query_stride,
    )


def given_mask(masks, heads: int, q):
    """The first ``heads`` heads of a mask file, where q is."""
    import numpy as np

    from salekit import arrays

    words = np.ascontiguousarray(masks.words[:, :heads])
    if arrays.is_cuda(q):
        words = arrays.import_cupy().asarray(words)
    return replace(masks, words=words)


def _rates(plan, blocks, times, report) -> dict[str, Any]:
    """Achieved rates. Pairs are causal; int8-sp24 and query_stride count as if every pair were multiplied."""
    from salekit import timing

    calls = plan.batch * plan.num_heads
    dense_flop = 4 * plan.head_dim * plan.visible_pairs * calls
    attend_flop = 4 * plan.head_dim * sum(plan.selected_pairs(int(count)) for count in blocks.flat)
    estimate_op = 2 * plan.head_dim * plan.visible_pairs * calls

    # Fewest passes: a mean before the codes costs a second pass over what it is subtracted from.
    q_bytes = plan.batch * plan.seqlen_q * plan.num_heads * plan.head_dim
    k_bytes = plan.batch * plan.seqlen_k * plan.num_kv_heads * plan.head_dim
    q_passes = 2 if plan.estimator == "int4" else 1
    moved = 2 * (q_passes * q_bytes + 2 * k_bytes) + (q_bytes + k_bytes) * plan.code_bits // 8

    def per_second(amount, name):
        return amount / (times[name].median_ms * 1e-3)

    rates: dict[str, Any] = {
        "dense_tflops": per_second(dense_flop, "dense") / 1e12,
        "attend_tflops": per_second(attend_flop, "attend-selected" if plan.skipped == "pool" else "attend") / 1e12,
        "estimate_tops": per_second(estimate_op, "estimate") / 1e12,
        "quantize_bytes_per_s": per_second(moved, "quantize"),
        "quantize_copy_share": None,
        "dense_chip_share": None,
        "attend_chip_share": None,
        "estimate_chip_share": None,
    }
    if report["copy_bytes_per_s"]:
        rates["quantize_copy_share"] = rates["quantize_bytes_per_s"] / report["copy_bytes_per_s"]
    if report["gpu"]:
        chip = timing.chip_rates(report["gpu"]["name"])
        integer = chip["int4"] if plan.code_bits == 4 else chip["int8"]
        if chip["half"]:
            rates["dense_chip_share"] = rates["dense_tflops"] / chip["half"]
            rates["attend_chip_share"] = rates["attend_tflops"] / chip["half"]
        if integer:
            rates["estimate_chip_share"] = rates["estimate_tops"] / integer
    return rates


# --- cases ---------------------------------------------------------------------------------------------------------
def _has_gpu() -> bool:
    from salekit.jit import device_arch

    try:
        device_arch()
    except GpuError:
        return False
    return True


def load_masks(path: str, block: tuple[int, int]):
    """The file's mask on the host, ORed up to ``block``."""
    from salekit.block_mask import BlockMask

    masks = BlockMask.load_npz(path)
    if 0 in (*masks.words.shape[:2], masks.seqlen_q, masks.seqlen_k):
        sizes = f"shape {masks.words.shape}, {masks.seqlen_q} rows and {masks.seqlen_k} keys"
        raise click.UsageError(f"--masks: {path} has {sizes}: there is nothing to time")
    if masks.has_window:
        raise click.UsageError(f"--masks: {path} is of calls with a window; wants one without")
    if (masks.block_q, masks.block_k) == block:
        return masks
    if block[0] % masks.block_q or block[1] % masks.block_k:
        raise click.UsageError(
            f"--block: got {block[0]}x{block[1]}; {path} has blocks of "
            f"{masks.block_q}x{masks.block_k}, which do not divide it"
        )
    return masks.coarsen(*block)


def cases_of(
    seqlen, heads, kv_heads, head_dim: int, dtype: str, input_file, masks, cuda: bool, seed: int,
    layer: int | None = None,
) -> list[dict]:
    lengths = None if seqlen is None else options.parse_seqlens(seqlen)
    if input_file:
        options.refuse(("seed",), "is of a generated input; --input is none")
        wanted = {"--heads": heads, "--kv-heads": kv_heads}
        if options.given("head_dim"):
            wanted["--head-dim"] = head_dim
        if options.given("dtype"):
            wanted["--dtype"] = dtype
        cases = _cases_of_file(input_file, layer, lengths, wanted, cuda)
    else:
        if masks is not None:
            if lengths is not None and list(lengths) != [masks.seqlen_k]:
                raise click.UsageError(f"--seqlen: got {seqlen}; the masks are of {masks.seqlen_k} keys")
            lengths = [masks.seqlen_k]
            heads = heads or masks.words.shape[1]
        lengths = lengths or ([8192, 32768, 131072] if cuda else [1024, 2048])
        heads = heads or (32 if cuda else 2)
        kv_heads = kv_heads or (heads // 4 if heads % 4 == 0 else 1)
        if heads % kv_heads:
            raise click.UsageError(f"--kv-heads: got {kv_heads}; wants a number that divides --heads, {heads}")
        cases = [_generated(n, masks, heads, kv_heads, head_dim, dtype, cuda, seed) for n in lengths]
    if masks is not None:
        for case in cases:
            have = (masks.words.shape[0], masks.seqlen_q, masks.seqlen_k, masks.causal)
            if (
                have != (case["batch"], case["seqlen_q"], case["seqlen_k"], True)
                or masks.words.shape[1] < case["heads"]
            ):
                raise click.UsageError(
                    f"--masks: got batch, seqlen_q, seqlen_k, causal {have} and {masks.words.shape[1]} heads; "
                    "the input has "
                    f"{(case['batch'], case['seqlen_q'], case['seqlen_k'], True)} and {case['heads']} heads"
                )
    return cases


def _generated(seqlen: int, masks, heads, kv_heads, head_dim, dtype, cuda, seed) -> dict:
    batch, seqlen_q = (1, seqlen) if masks is None else (masks.words.shape[0], masks.seqlen_q)

    def make():
        from salekit.workloads import llm_like_qkv

        return llm_like_qkv(
            seqlen,
            heads,
            kv_heads,
            head_dim,
            dtype=DTYPES[dtype],
            batch=batch,
            seqlen_q=seqlen_q,
            seed=seed,
            cuda=cuda,
        )

    return dict(
        seqlen_q=seqlen_q, seqlen_k=seqlen, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, make=make
    )


def _cases_of_file(path: str, layer: int | None, lengths, wanted: dict[str, Any], cuda: bool) -> list[dict]:
    """wanted: by option, what the file has to have."""
    from salekit.arrays import DTYPE_NAMES
    from salekit.data_files import load_qkv

    q, k, v, _ = load_qkv(path, layer)
    dtype = {name: short for short, name in DTYPES.items()}[DTYPE_NAMES[q.dtype]]
    have = {"--heads": q.shape[2], "--kv-heads": k.shape[2], "--head-dim": q.shape[3], "--dtype": dtype}
    for name, want in wanted.items():
        if want not in (None, have[name]):
            raise click.UsageError(f"{name}: got {want}; {path} has {have[name]}")
    if 0 in (*q.shape, *k.shape):
        raise click.UsageError(f"--input: {path} has shapes {q.shape} and {k.shape}: there is nothing to time")
    whole = q.shape[1]
    if lengths is not None and q.shape[1] != k.shape[1]:
        raise click.UsageError(f"--seqlen: {path} has {q.shape[1]} rows and {k.shape[1]} keys and is taken whole")
    cases = []
    for length in lengths or [whole]:
        if length > whole:
            raise click.UsageError(f"--seqlen: got {length}; {path} has {whole} tokens")
        keys = k.shape[1] if length == whole else length

        def make(length=length, keys=keys):
            parts = [x[:, :n] for x, n in ((q, length), (k, keys), (v, keys))]
            if not cuda:
                return tuple(parts)
            return tuple(to_device(x) for x in parts)

        cases.append(
            dict(
                seqlen_q=length,
                seqlen_k=keys,
                batch=q.shape[0],
                heads=q.shape[2],
                kv_heads=k.shape[2],
                head_dim=q.shape[3],
                make=make,
            )
        )
    return cases


def to_device(x):
    """A CuPy copy of a NumPy array."""
    import cupy
    import numpy as np

    return cupy.asarray(np.ascontiguousarray(x))


def _refuse_long(case: dict) -> None:
    pairs = case["seqlen_q"] * case["seqlen_k"] * case["heads"] * case["batch"]
    seconds = 4 * TWIN_SECONDS_A_PAIR * pairs
    if seconds > TWIN_LIMIT_SECONDS:
        raise GpuError(
            f"{case['seqlen_k']} tokens and {case['heads']} heads would take the NumPy twin "
            f"about {_duration(seconds)}: run this on a machine with an NVIDIA GPU of compute capability 8.0 or newer "
            "('salekit doctor' says what is missing here), or time the twin with --seqlen 1k,2k --heads 2"
        )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


# --- tables --------------------------------------------------------------------------------------------------------
def _print_tables(report: dict[str, Any]) -> None:
    gpu = report["gpu"]
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else "NumPy twin"
    pooled = report["settings"]["skipped"] == "pool"
    names = {"dense": "dense", "quantize": "quantise", "anchors": "anchors", "estimate": "estimate", "attend": "attend"}
    names |= {"attend-selected": "no pools", "total": "total"} if pooled else {"total": "total"}
    rows = []
    for result in report["results"]:
        times = result["times"]
        rows.append(
            [
                options.seqlen_name(result["seqlen_q"]),
                *(_ms(times[name]) for name in names),
                f"{result['density']:.3f}",
                f"{result['speedup']:.2f}x",
            ]
        )
    first = report["results"][0]
    title = (
        f"salekit bench: {where}; {first['estimator']}, {first['heads']}/{first['kv_heads']} heads, head_dim "
        f"{first['head_dim']}, {first['dtype']}, causal"
        + (", skipped blocks pooled" if pooled else "")
        + "; ms, median ± spread"
    )
    render.table(title, ["seqlen", *names.values(), "density", "speed-up"], rows)
    rows = []
    for result in report["results"]:
        rates, clocks = result["rates"], result["clocks"] or {}
        rows.append(
            [
                options.seqlen_name(result["seqlen_q"]),
                _rate(rates["dense_tflops"], rates["dense_chip_share"]),
                f"{rates['quantize_bytes_per_s'] / 1e9:.0f}" + _share(rates["quantize_copy_share"]),
                _rate(rates["estimate_tops"], rates["estimate_chip_share"]),
                _rate(rates["attend_tflops"], rates["attend_chip_share"]),
                f"{clocks['sm_mhz']:.0f}" if clocks.get("sm_mhz") else "-",
                f"{clocks['power_w']:.0f}" if clocks.get("power_w") else "-",
            ]
        )
    render.table(
        "achieved rate (share of the data sheet's; quantise: of a device copy)",
        ["seqlen", "dense TFLOPS", "quantise GB/s", "estimate TOPS", "attend TFLOPS", "SM MHz", "W"],
        rows,
    )
    rows = []
    for result in report["results"]:
        heads = sorted(result["density_per_head"])
        rows.append(
            [
                options.seqlen_name(result["seqlen_q"]),
                f"{heads[0]:.4f}",
                f"{statistics.median(heads):.4f}",
                f"{heads[-1]:.4f}",
                " ".join(f"{x:.3f}" for x in result["density_per_head"]),
            ]
        )
    render.table("density a head", ["seqlen", "least", "median", "most", "heads in order"], rows)


def _ms(time_: dict[str, Any]) -> str:
    return f"{time_['median_ms']:.3f} ±{time_['spread'] * 100:.1f}%"


def _share(share: float | None) -> str:
    return "" if share is None else f" ({share * 100:.0f}%)"


def _rate(rate: float, share: float | None) -> str:
    return f"{rate:.2f}{_share(share)}" if rate < 10 else f"{rate:.0f}{_share(share)}"
