"""salekit profile: what each kernel of a call does, needs and reaches; on a GPU timed, for a named one predicted."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click

from salekit.errors import GpuError, SalekitError
from salekit.plans import HEAD_DIMS
from salekit.written_files import write

from . import bench, options, render, roofline

SCHEMA = 1
DEFAULT_SEQLEN = "32k"
MOST_TOKENS = 2**24  # no call has more, and the blocks of more would take long to count
DEFAULT_DENSITY = 0.2


def _known_gpu(context: Any, parameter: Any, name: str | None) -> str | None:
    if name is None:
        return None
    from salekit.ceilings import KNOWN

    if name.lower() not in KNOWN:
        raise click.BadParameter(f"nothing is known of {name!r}; wants one of {', '.join(KNOWN)}")
    return name.lower()


@click.command("profile")
@click.option("--seqlen", default=None, help=f"Tokens, as 4096 or 128k, up to 16m.  [default: {DEFAULT_SEQLEN}]")
@click.option("--heads", type=click.IntRange(min=1), default=None, help="Query heads.  [default: 32]")
@click.option(
    "--kv-heads", type=click.IntRange(min=1), default=None, help="KV heads. Default: a quarter of the heads, or 1."
)
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), default="128", show_default=True)
@click.option("--dtype", type=click.Choice(list(bench.DTYPES)), default="bf16", show_default=True)
@options.estimator
@options.query_stride
@options.attend
@options.block
@options.skipped
@options.tau
@click.option(
    "--density",
    type=options.Finite(0, 1),
    default=None,
    help=f"Blocks that a prediction takes as selected.  [default: {DEFAULT_DENSITY}]",
)
@click.option(
    "--masks",
    "masks_file",
    type=click.Path(exists=True, dir_okay=False),
    help="Attend through these masks (npz).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the generated input.")
@click.option(
    "--gpu",
    "gpu_name",
    metavar="NAME",
    default=None,
    callback=_known_gpu,
    help="Predict for this GPU (h100) from what was measured on one; needs no GPU.",
)
@click.option("--remeasure", is_flag=True, help="Measure this GPU's ceilings again.")
@click.option(
    "--roofline", "picture", type=click.Path(dir_okay=False, writable=True), help="Draw a roofline: .svg or .png."
)
@click.option(
    "--trace", "trace_file", type=click.Path(dir_okay=False, writable=True), help="Write a Chrome trace (JSON)."
)
@options.force
@options.as_json
def profile(**settings: Any) -> None:
    """Time each kernel of a call and compare it with what the GPU can do at most.

    Time and spread, operations, bytes, rate, share of the bound; registers, shared memory, spills, occupancy. The
    ceilings are measured once a GPU and kept. Without a GPU, --gpu h100 predicts: every kernel as fast as its bound.
    """
    _check_outputs(settings)
    report, trace = run_profile(**settings)
    if settings["picture"]:
        title = f"salekit profile: {report['gpu']['name']}" + (", a prediction" if report["predicted"] else "")
        roofline.save(roofline.layout(report), Path(settings["picture"]), title)
        render.note(f"wrote {settings['picture']}")
    if settings["trace_file"]:
        write(settings["trace_file"], json.dumps(trace) + "\n")
        render.note(f"wrote {settings['trace_file']}")
    if settings["as_json"]:
        render.print_json(report)
    else:
        _print_tables(report)


def _check_outputs(settings: dict[str, Any]) -> None:
    """What is wrong with the options is said before anything is measured."""
    picture, trace, masks, force = (settings[name] for name in ("picture", "trace_file", "masks_file", "force"))
    options.check_output("--roofline", picture, masks, force=force)
    options.check_output("--trace", trace, picture, masks, force=force)
    if settings["gpu_name"]:
        for name in ("trace_file", "remeasure"):
            if settings[name]:
                option = "--trace" if name == "trace_file" else "--remeasure"
                raise click.UsageError(f"{option} is about what runs here; --gpu predicts")
        options.refuse(("tau", "seed"), "of what runs here; --gpu predicts, from --density or --masks")
    if settings["density"] is not None and settings["masks_file"]:
        raise click.UsageError("--density and --masks exclude each other: the masks have a density")
    if settings["picture"]:
        path = Path(settings["picture"])
        if path.suffix.lower() not in roofline.SUFFIXES:
            wanted = " or ".join(roofline.SUFFIXES)
            raise click.UsageError(f"--roofline: {path.name} has no suffix that can be drawn; wants {wanted}")
        roofline.check_drawable(path)


def run_profile(
    *,
    seqlen: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: str,
    dtype: str,
    estimator: str,
    query_stride: int,
    attend: str,
    block: tuple[int, int],
    skipped: str,
    tau: float,
    density: float | None,
    masks_file: str | None,
    seed: int,
    gpu_name: str | None,
    remeasure: bool,
    trace_file: str | None = None,
    **_: Any,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the report as a JSON object, the Chrome trace if a file for it is named). Raises SalekitError children and
    click.UsageError."""
    settings: dict[str, Any] = dict(
        estimator=estimator, attend=attend, query_stride=query_stride, block=block, dense_below=0, skipped=skipped
    )
    if gpu_name is None:
        _need_gpu()
        if density is not None:
            raise click.UsageError("--density is for predictions (--gpu); what runs here has that of --tau or --masks")
    masks = bench.load_masks(masks_file, block) if masks_file else None
    if seqlen is not None:
        tokens = options.parse_seqlen(seqlen, "--seqlen")
        if tokens > MOST_TOKENS:
            raise click.UsageError(f"--seqlen: got {seqlen}; wants at most {options.seqlen_name(MOST_TOKENS)}")
        seqlen = str(tokens)
    elif masks is None:
        seqlen = DEFAULT_SEQLEN
    [case] = bench.cases_of(seqlen, heads, kv_heads, int(head_dim), dtype, None, masks, True, seed)
    report = _head(settings, case, dtype, masks_file)
    if gpu_name:
        _predict(report, case, settings, dtype, masks, DEFAULT_DENSITY if density is None else density, gpu_name)
        return report, None
    report["settings"].update(tau=tau if math.isfinite(tau) else "inf", seed=seed)  # JSON has no infinity
    tau = options.rounded(tau)
    return report, _measure(report, case, settings, tau, masks, remeasure, trace_file is not None)


def _need_gpu() -> None:
    from salekit.jit import device_arch

    try:
        device_arch()
    except GpuError as error:
        from salekit.ceilings import KNOWN

        raise GpuError(f"{error}; to predict for a GPU that is not here: --gpu {'|'.join(KNOWN)}") from None


def _head(settings: dict, case: dict, dtype: str, masks_file: str | None) -> dict[str, Any]:
    from salekit import timing

    return {
        "schema": SCHEMA,
        "kind": "salekit-profile",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": timing.versions(),
        "commit": timing.git_commit(),
        "command": timing.command_line(),
        "settings": {
            **settings,
            **{name: case[name] for name in ("seqlen_q", "seqlen_k", "batch", "heads", "kv_heads", "head_dim")},
            "dtype": dtype,
            "causal": True,
            "masks": Path(masks_file).name if masks_file else None,
        },
    }


# --- without the GPU -----------------------------------------------------------------------------------------------
def _predict(report: dict, case: dict, settings: dict, dtype: str, masks: Any, density: float, gpu_name: str) -> None:
    """Fills the report with a prediction: each kernel takes the time of what bounds it."""
    from salekit import call_checks, ceilings, work
    from salekit.plans import MAX_GRID, resolve_estimator

    known = ceilings.KNOWN[gpu_name]
    of_q, of_kv = (
        (case["batch"], case[length], case[heads], case["head_dim"])
        for length, heads in (("seqlen_q", "heads"), ("seqlen_k", "kv_heads"))
    )
    if case["heads"] > MAX_GRID:
        raise click.UsageError(f"--heads: got {case['heads']}; wants at most {MAX_GRID}")
    stand_ins = call_checks.examples(of_q, of_kv, of_kv, bench.DTYPES[dtype], None)
    plan = options.make_plan(*stand_ins, **settings)  # refuses what the call would refuse
    plan = plan.replace(arch=known.arch, estimator=resolve_estimator(settings["estimator"], known.arch))
    if masks is None:
        pairs, density = work.pairs_at(plan, density)
    else:
        blocks = bench.given_mask(masks, plan.num_heads, masks.words).selected_blocks()
        pairs, density = work.pairs_of(plan, blocks.flat), float(blocks.mean() / plan.visible_blocks.sum())
    sparse, dense = work.sparse_work(plan, pairs), work.dense_work(plan)
    compiled = _compile({one.spec for one in sparse + dense}, known.arch)

    def entry(one: work.Work) -> dict[str, Any]:
        seconds, bound = known.seconds(one)
        info = compiled.get(one.spec)
        return {
            **_entry_of(one, seconds * 1e3, bound, seconds * 1e3),
            "share": None,
            **_resources(info, one.threads, known.arch, None),
        }

    kernels, dense_kernels = ([entry(one) for one in part] for part in (sparse, dense))
    _finish(
        report, plan, known, {"name": gpu_name}, True, density, kernels, dense_kernels, call_ms=None, dense_call_ms=None
    )


def _compile(specs: set, arch: str) -> dict:
    """What the compiler says of each kernel; nothing where there is no compiler. Raises CompileError."""
    from salekit import jit

    found = {}
    try:
        with render.progress(f"compiling for {arch}", len(specs)) as advance:
            for spec in specs:
                found[spec] = jit.compile_kernel(spec, arch).info
                advance()
    except GpuError as error:
        render.note(f"no registers, shared memory and spills: {error}")
    return found


# --- with it -------------------------------------------------------------------------------------------------------
def _measure(
    report: dict, case: dict, settings: dict, tau: float, masks: Any, remeasure: bool, with_trace: bool
) -> dict[str, Any] | None:
    """Fills the report with what this GPU does; returns the trace."""
    from salekit import ceilings, launches, nvtx, timing, work
    from salekit.attention import dense_attention, sparse_attention
    from salekit.staged import StagedCall

    limits = ceilings.of_this_gpu(remeasure, render.note)
    q, k, v = case["make"]()
    plan = options.make_plan(q, k, v, **settings)
    mask = None if masks is None else bench.given_mask(masks, case["heads"], q)
    attended = mask or StagedCall(q, k, v, tau, plan).estimated
    blocks = attended.selected_blocks()
    render.note(f"profile: {plan.seqlen_q} tokens, {plan.num_heads}/{plan.num_kv_heads} heads, {plan.estimator}")
    sparse = launches.launch_sparse(q, k, v, tau, plan, mask)
    dense = launches.launch_dense(q, k, v, plan)

    def whole() -> Any:
        return sparse_attention(q, k, v, thresholds=tau, **settings)

    with timing.ClockSampler() as sampler:
        # With given masks the call's own mask would be attended to, so its launches run one after another instead.
        call = timing.time_call(whole if mask is None else sparse.run, cuda=True)
        dense_call = timing.time_call(lambda: dense_attention(q, k, v), cuda=True)
        with nvtx.switched_on():
            times, dense_times = sparse.time_each(), dense.time_each()
            traced = sparse.trace() if with_trace else None
    parts = []
    for launched, timings, model in (
        (sparse, times, work.sparse_work(plan, work.pairs_of(plan, blocks.flat))),
        (dense, dense_times, work.dense_work(plan)),
    ):
        pairs = zip(launched.launches, timings, _models(launched.launches, model))
        parts.append([_timed_entry(launch, timing_, one, limits) for launch, timing_, one in pairs])
    visible = plan.visible_blocks.sum()
    _finish(
        report,
        plan,
        limits,
        timing.gpu_info(),
        False,
        float(blocks.mean() / visible),
        *parts,
        call_ms=call.as_json(),
        dense_call_ms=dense_call.as_json(),
    )
    report["clocks"] = sampler.result
    return None if traced is None else _chrome_trace(report, traced)


def _models(launched: list, model: list) -> list:
    """The work of each launch; None for a fill. SalekitError when the launches are not those of the model."""
    specs = [launch.spec for launch in launched if launch.spec is not None]
    if specs != [one.spec for one in model]:
        raise SalekitError(
            "profile: the call launched "
            + ", ".join(spec.expression for spec in specs)
            + "; its work is known for "
            + ", ".join(one.spec.expression for one in model)
        )
    rest = iter(model)
    return [None if launch.spec is None else next(rest) for launch in launched]


def _timed_entry(launch: Any, timing: Any, one: Any, limits: Any) -> dict[str, Any]:
    times = {"spread": round(timing.spread, 4), "min_ms": timing.min_ms, "max_ms": timing.max_ms}
    if one is None:
        floor = launch.fill_bytes / limits.bytes_per_s
        entry = _entry(launch.stage, "fill", None, {}, 0, launch.fill_bytes, timing.median_ms, "memory", floor * 1e3)
        resources = _resources(None, 0, limits.arch, None)
    else:
        floor, bound = limits.seconds(one)
        entry = _entry_of(one, timing.median_ms, bound, floor * 1e3)
        resources = _resources(launch.info, launch.threads, limits.arch, launch.blocks_per_multiprocessor)
    grid = {"grid": [int(size) for size in launch.grid]}
    return {**entry, "share": floor * 1e3 / timing.median_ms, **times, "samples": timing.samples, **grid, **resources}


def _chrome_trace(report: dict[str, Any], trace: Any) -> dict[str, Any]:
    """The trace in the Trace Event Format ("X": complete events, microseconds), which Perfetto reads, too."""
    host, gpu = 1, 2
    zero = trace.whole.start_us

    def event(name: str, process: int, thread: int, start_us: float, end_us: float, args: dict) -> dict[str, Any]:
        start, end = (round((at - zero) * 1000) for at in (start_us, end_us))  # nanoseconds, so that ends are exact
        return {
            "name": name,
            "ph": "X",
            "pid": process,
            "tid": thread,
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": args,
        }

    def name(kind: str, process: int, thread: int, text: str) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": text}}

    events = [
        name("process_name", host, 0, "host"),
        name("thread_name", host, 0, "launching, kernel by kernel"),
        name("process_name", gpu, 0, report["gpu"]["name"]),
        name("thread_name", gpu, 0, "kernels"),
        name("thread_name", gpu, 1, "stages"),
        event("sparse_attention", host, 0, trace.whole.start_us, trace.whole.end_us, report["settings"]),
        *(event(span.name, host, 0, span.start_us, span.end_us, {}) for span in trace.stages),
    ]
    stages: dict[str, list[float]] = {}
    for place, (start, end) in zip(trace.order, trace.launches):
        entry = report["kernels"][place]
        args = {key: entry[key] for key in _TRACED if entry[key] is not None}
        events.append(event(entry["kernel"], gpu, 0, start, end, args))
        stages.setdefault(entry["stage"], [start])[1:] = [end]
    events += [event(stage, gpu, 1, *times, {}) for stage, times in stages.items()]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {key: report[key] for key in ("title", "date", "commit", "command")},
    }


_TRACED = (
    "stage",
    "expression",
    "operations",
    "bytes",
    "bound",
    "floor_ms",
    "grid",
    "threads",
    "registers",
    "shared_bytes",
    "spill_bytes",
    "occupancy",
)


# --- what both have in common --------------------------------------------------------------------------------------
def _entry_of(one: Any, ms: float, bound: str, floor_ms: float) -> dict[str, Any]:
    operations = dict(one.operations)
    return _entry(one.stage, one.name, one.spec.expression, operations, one.read, one.written, ms, bound, floor_ms)


def _entry(
    stage: str,
    kernel: str,
    expression: str | None,
    operations: dict[str, int],
    read: int,
    written: int,
    ms: float,
    bound: str,
    floor_ms: float,
) -> dict[str, Any]:
    count = sum(operations.values())
    return {
        "stage": stage,
        "kernel": kernel,
        "expression": expression,
        "operations": operations,
        "num_operations": count,
        "read_bytes": read,
        "written_bytes": written,
        "bytes": read + written,
        "ms": ms,
        "operations_per_s": count / (ms * 1e-3),
        "bytes_per_s": (read + written) / (ms * 1e-3),
        "bound": bound,
        "floor_ms": floor_ms,
    }


def _resources(info: Any, threads: int, arch: str, blocks: int | None) -> dict[str, Any]:
    """Of a kernel. blocks: a multiprocessor's, as the driver says; computed where that is None."""
    from salekit import occupancy

    names = ("registers", "shared_bytes", "stack_bytes", "spill_bytes", "blocks_per_multiprocessor", "occupancy")
    if info is None:
        return {"threads": threads, **dict.fromkeys(names)}
    blocks = occupancy.blocks_per_multiprocessor(info, threads, arch) if blocks is None else blocks
    values = (
        info.registers,
        info.static_shared_bytes + info.dynamic_shared_bytes,
        info.stack_bytes,
        info.spill_store_bytes + info.spill_load_bytes,
        blocks,
        round(occupancy.occupancy(blocks, threads, arch), 4),
    )
    return {"threads": threads, **dict(zip(names, values))}


def _finish(
    report: dict,
    plan: Any,
    limits: Any,
    gpu: dict,
    predicted: bool,
    density: float,
    kernels: list,
    dense: list,
    *,
    call_ms: Any,
    dense_call_ms: Any,
) -> None:
    title = (
        f"{options.seqlen_name(plan.seqlen_k)} tokens, {plan.num_heads}/{plan.num_kv_heads} heads, head_dim "
        f"{plan.head_dim}, {plan.dtype}, {plan.estimator}"
        + (f", query_stride {plan.query_stride}" if plan.query_stride > 1 else "")
        + f", attend {plan.attend}, blocks {plan.block_q}x{plan.block_k}, density {density:.3f}"
        + (", skipped blocks pooled" if plan.skipped == "pool" else "")
    )
    stages: dict[str, float] = {}
    for entry in kernels:
        stages[entry["stage"]] = stages.get(entry["stage"], 0.0) + entry["ms"]
    report["settings"]["estimator"] = plan.estimator
    report.update(
        predicted=predicted,
        title=title,
        gpu=gpu,
        arch=plan.arch,
        density=density,
        ceilings=limits.as_json(),
        kernels=kernels,
        dense=dense,
        stages_ms=stages,
        kernels_ms=sum(stages.values()),
        dense_ms=sum(entry["ms"] for entry in dense),
        call=call_ms,
        dense_call=dense_call_ms,
    )


# --- tables --------------------------------------------------------------------------------------------------------
def _print_tables(report: dict[str, Any]) -> None:
    predicted = report["predicted"]
    what = "prediction, nothing was timed:" if predicted else "salekit profile:"
    title = f"{what} {report['gpu']['name']}; {report['title']}"
    columns = ["kernel", "stage", "ms", "Gop", "MB", "rate", "bound"] + ([] if predicted else ["share"])
    rows = []
    for one in [*report["kernels"], *report["dense"]]:
        spread = "" if predicted else f" ±{one['spread'] * 100:.1f}%"
        row = [
            one["kernel"],
            one["stage"],
            f"{_ms(one['ms'])}{spread}",
            f"{one['num_operations'] / 1e9:.1f}" if one["num_operations"] else "-",
            f"{one['bytes'] / 1e6:.1f}",
            _rate(one),
            one["bound"],
        ]
        rows.append(row if predicted else [*row, _percent(one["share"])])
    render.table(title, columns, rows)
    rows, seen = [], set()
    for one in [*report["kernels"], *report["dense"]]:
        if one["registers"] is not None and one["expression"] not in seen:
            seen.add(one["expression"])
            rows.append(
                [
                    one["expression"],
                    one["registers"],
                    f"{one['shared_bytes'] / 1024:.1f}",
                    one["spill_bytes"],
                    one["threads"],
                    one["blocks_per_multiprocessor"],
                    f"{one['occupancy']:.0%}",
                ]
            )
    if rows:
        columns = ["kernel", "registers", "shared KiB", "spills", "threads", "CTAs an SM", "occupancy"]
        render.table(f"as compiled for {report['arch']}", columns, rows)
    total = report["kernels_ms"]
    rows = [[stage, f"{ms:.3f}", f"{ms / total:.1%}"] for stage, ms in report["stages_ms"].items()]
    render.table("stages, their kernels together", ["stage", "ms", "of the call"], rows)
    for line in _closing(report):
        render.text(line)


def _closing(report: dict[str, Any]) -> list[str]:
    ceilings = report["ceilings"]
    rates = ", ".join(f"{unit} {rate / 1e12:.0f}" for unit, rate in ceilings["operations_per_s"].items())
    sparse, dense = report["kernels_ms"], report["dense_ms"]
    if report["predicted"]:
        whole = (
            f"a prediction: {sparse:.3f} ms sparse, {dense:.3f} ms dense ({dense / sparse:.2f}x), if every kernel were "
            "as fast as what bounds it"
        )
    else:
        call, dense_call = report["call"]["median_ms"], report["dense_call"]["median_ms"]
        whole = (
            f"kernels together {sparse:.3f} ms sparse, {dense:.3f} dense; whole calls {call:.3f} ms sparse, "
            f"{dense_call:.3f} dense ({dense_call / call:.2f}x)"
        )
    return [
        whole,
        f"ceilings: memory {ceilings['bytes_per_s'] / 1e12:.2f} TB/s; products {rates} (10^12 operations a second)",
        f"ceilings from: {ceilings['source']}; {ceilings['date']}",
    ]


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms >= 0.01 else f"{ms:.4f}"


def _rate(one: dict[str, Any]) -> str:
    if one["bound"] == "memory":
        return f"{one['bytes_per_s'] / 1e9:.0f} GB/s"
    return f"{one['operations_per_s'] / 1e12:.0f} TOPS"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
