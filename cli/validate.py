"""salekit validate: each stage against the NumPy twin (the twin against float64), the pipeline against float64."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from salekit.checks import FEW, U32, UNIT_ROUNDOFF, Check, equal, share, within
from salekit.written_files import write

from . import backends, options, render
from .main import ExitCode
from .recomputing import heads_first, per_query_head, sampled_blocks, score_bound

SCHEMA = 1
MAX_ROWS = 512  # rows of a head that float64 attention is computed for; fewer than 1% of the work at 16K tokens
TWIN_SECONDS_A_PAIR = 5e-8  # the whole command without float64, a query head; at 4k tokens on two cores
@click.command("validate")
@click.option(
    "--input", "input_file", type=click.Path(exists=True, dir_okay=False), help="q, k, v (safetensors or npz)."
)
@click.option(
    "--layer", type=click.IntRange(min=0), default=None, help="Layer of an --input that holds several."
)
@click.option(
    "--seqlen", default=None, help="Only the first tokens, as 2k; without --input of a generated workload past 4k."
)
@options.backend
@options.estimator
@options.query_stride
@options.attend
@options.skipped
@options.tau
@options.block
@options.force
@options.as_json
@options.output
@click.pass_context
def validate(context: click.Context, **settings: Any) -> None:
    """Check every stage against the NumPy twin and the pipeline against float64 dense attention.

    Without arguments: the built-in sample, 4,096 tokens of real q, k, v. Without a GPU the twin itself is checked
    against float64. --attend int8-fp8 adds the error of low-bit attention; --skipped pool checks pools of skipped
    blocks, too, and says what they do to the error. Exit 5 when a verdict fails.
    A case that salekit fuzz wrote is replayed instead, with the options that it holds.
    """
    options.check_output("-o", settings["output"], settings["input_file"], force=settings["force"])
    report = run_validate(**settings)
    if settings["output"]:
        write(settings["output"], json.dumps(report, indent=2) + "\n")
        render.note(f"wrote {settings['output']}")
    if settings["as_json"]:
        render.print_json(report)
    else:
        _print_tables(report)
    if not report["passed"]:
        context.exit(ExitCode.ACCURACY)


def run_validate(
    *,
    input_file: str | None,
    seqlen: str | None,
    backend: str,
    estimator: str,
    query_stride: int,
    tau: float,
    block: tuple[int, int],
    attend: str = "exact",
    skipped: str = "drop",
    layer: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The report as a JSON object. Raises SalekitError children and click.UsageError."""
    from salekit import call_checks, timing
    from salekit.fuzz.cases import is_case_file

    cuda = backends.use_gpu(backend)
    if input_file and is_case_file(input_file):
        if seqlen is not None:
            raise click.UsageError("--seqlen: --input is a fuzz case, which has its own lengths")
        fixed = ("layer", "estimator", "query_stride", "attend", "skipped", "tau", "block")
        options.refuse(fixed, "--input is a fuzz case, which has options of its own")
        from .fuzz import replay

        return replay(input_file, cuda)
    q, k, v, source = _load(input_file, layer, seqlen)
    plan_options: dict[str, Any] = dict(
        estimator=estimator, query_stride=query_stride, block=block, dense_below=0
    )
    options.make_plan(q, k, v, **plan_options, attend=attend, skipped=skipped)  # refuses what a call refuses
    rounded = options.rounded(tau)
    render.note(
        f"validate: {source}, {q.shape[1]} tokens, {q.shape[2]}/{k.shape[2]} heads, head_dim {q.shape[3]}; "
        + ("GPU kernels against the NumPy twin" if cuda else "no GPU in use: the NumPy twin against float64")
    )
    seconds = TWIN_SECONDS_A_PAIR * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
    if seconds > 30:
        render.note(f"validate: the twin will take some {seconds / 60:.0f} minutes on two cores")
    started = time.perf_counter()
    if cuda:
        plan, checks, mask, out, lse = _check_kernels(q, k, v, rounded, plan_options)
    else:
        plan = call_checks.make_plan(q, k, v, **plan_options)
        checks, mask, out, lse = _check_twin(q, k, v, rounded, plan)
    low_bit = _low_bit(q, k, v, mask, plan, cuda) if attend == "int8-fp8" else None
    pooled = None
    if skipped == "pool":
        from . import pool_checks

        if cuda:
            pool_verdicts, pooled = pool_checks.check_kernels(q, k, v, rounded, mask, plan, plan_options)
        else:
            pool_verdicts, pooled = pool_checks.check_twin(q, k, v, mask, plan)
        checks += pool_verdicts
    render.note("validate: float64 attention")
    heads, pipeline_checks = _check_pipeline(q, k, v, mask, out, lse, plan, low_bit, pooled)
    checks += pipeline_checks
    return {
        "schema": SCHEMA,
        "kind": "salekit-validate",
        "passed": all(check.passed for check in checks),
        "backend": "cuda" if cuda else "numpy",
        "input": source,
        "tau": tau if np.isfinite(tau) else "inf",
        "skipped": skipped,
        "versions": timing.versions(),
        "commit": timing.git_commit(),
        "command": timing.command_line(),
        "gpu": timing.gpu_info() if cuda else None,
        "plan": {
            name: getattr(plan, name)
            for name in (
                "batch",
                "seqlen_q",
                "seqlen_k",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "dtype",
                "estimator",
                "block_q",
                "block_k",
                "query_stride",
                "arch",
            )
        },
        "float64_rows_per_head": len(sample_rows(plan)),
        "seconds": round(time.perf_counter() - started, 2),
        "checks": [check.to_json() for check in checks],
        "heads": heads,
    }


def _load(input_file: str | None, layer: int | None, seqlen: str | None):
    """q, k, v on the host and where they came from."""
    from salekit.data_files import load_qkv, load_sample

    lengths = [None] if seqlen is None else options.parse_seqlens(seqlen)
    if len(lengths) != 1:
        raise click.UsageError(f"--seqlen: got {seqlen}; wants one length")
    length = lengths[0]
    if layer is not None and not input_file:
        raise click.UsageError("--layer: is that of an --input; there is none")
    if input_file:
        q, k, v, _ = load_qkv(input_file, layer)
        source = Path(input_file).name + ("" if layer is None else f", layer {layer}")
    else:
        sample = load_sample()
        q, k, v, source = sample["q"], sample["k"], sample["v"], "the built-in sample"
    if 0 in (*q.shape, *k.shape):
        raise click.UsageError(f"--input: {source} has shapes {q.shape} and {k.shape}: there is nothing to compare")
    if not all(np.isfinite(x.astype(np.float32)).all() for x in (q, k, v)):
        raise click.UsageError(f"--input: {source} holds NaN or infinity; accuracy is measured on finite q, k, v")
    whole = q.shape[1]
    if length is None or length == whole:
        return q, k, v, source
    if length > whole and not input_file:
        from salekit.workloads import llm_like_qkv

        return (*llm_like_qkv(length, 2, 1), "a generated workload")
    if length > whole or k.shape[1] != whole:
        raise click.UsageError(f"--seqlen: got {length}; {source} has {whole} rows and {k.shape[1]} keys")
    return q[:, :length], k[:, :length], v[:, :length], source


def sample_rows(plan) -> np.ndarray:
    """Evenly spaced rows, the first and the last among them."""
    count = min(plan.seqlen_q, MAX_ROWS)
    return np.unique(np.linspace(0, max(0, plan.seqlen_q - 1), count).round().astype(np.int64))


# --- kernels against the twin --------------------------------------------------------------------------------------
def _check_kernels(q, k, v, tau: float, plan_options: dict):
    from salekit import call_checks, reference
    from salekit.anchors import anchor_statistics, row_limits
    from salekit.attend import attend
    from salekit.attention import sparse_attention
    from salekit.codes import spread_rows
    from salekit.estimate import estimate
    from salekit.plans import SELECT_NONE
    from salekit.quantize import quantize

    from .bench import to_device

    gq, gk, gv = (to_device(x) for x in (q, k, v))
    plan = call_checks.make_plan(gq, gk, gv, **plan_options)

    render.note("validate: quantise")
    codes = quantize(gq, gk, plan)
    host = _codes_on_host(codes, plan)
    twin = reference.quantize(q, k, plan)
    checks = _compare_codes(host, twin, q, k, plan)

    render.note("validate: anchors and limits")
    gm, gl = anchor_statistics(gq, gk, codes.k_mean, plan)
    m, l = (x.get()[..., : plan.seqlen_q] for x in (gm, gl))
    twin_m, twin_l = reference.anchor_statistics(q, k, host.k_mean, plan)
    not_held = np.setdiff1d(np.arange(plan.seqlen_q), plan.row_of_position)  # undefined there, and not used
    m[..., not_held], l[..., not_held] = twin_m[..., not_held], twin_l[..., not_held]
    slack = score_bound(q, k, plan)
    norm_q = np.linalg.norm(heads_first(q), axis=-1)
    norm_mean = per_query_head(np.linalg.norm(host.k_mean.astype(np.float64), axis=-1), plan)[..., None]
    slack_m = (
        slack
        + plan.softmax_scale * plan.head_dim * U32 * norm_q * norm_mean
        + FEW * (1 + np.abs(np.nan_to_num(twin_m)))
    )
    checks.append(within("anchors", "m with the twin's", m, twin_m, slack_m))
    # Every exponent moves by two score errors; a row has fewer than 1024 anchors to sum.
    with np.errstate(all="ignore"):
        slack_l = twin_l * (np.expm1(2 * slack) + FEW * (1 + np.abs(np.nan_to_num(twin_m))) + 1024 * U32)
    checks.append(within("anchors", "l with the twin's", l, twin_l, slack_l))

    limits = row_limits(gm, gl, codes, tau, plan)
    host_limits = spread_rows(limits.get(), plan, np.inf if plan.estimator == "int4" else SELECT_NONE)
    y = reference.row_limits(m, l, tau, plan)
    with np.errstate(all="ignore"):
        slack_y = FEW * (np.abs(m) + np.abs(np.log(tau * l)) + 1)
    slack_y = np.where(np.isfinite(y), np.nan_to_num(slack_y), 0)
    if plan.estimator == "int4":
        checks.append(within("limits", "y with the twin's, from the same m and l", host_limits, y, slack_y))
    else:
        k_scale = per_query_head(host.k_scale, plan)[..., None]
        want = reference.integer_thresholds(y, host.q_scale, k_scale, plan)
        step = plan.softmax_scale * host.q_scale.astype(np.float64) * k_scale
        slack_t = np.where(np.isfinite(y), 1 + np.ceil(np.nan_to_num(slack_y / step)), 0)
        checks.append(within("limits", "T with the twin's, from the same m and l", host_limits, want, slack_t))

    render.note("validate: estimate")
    mask = estimate(codes, limits, plan)
    same_input = reference.estimate(host, host_limits, plan)
    checks.append(
        equal(
            "estimate",
            "mask bits with the twin's, from the same codes and limits",
            mask.to_dense(),
            same_input.to_dense(),
        )
    )

    out, lse, pipeline_mask = sparse_attention(
        gq, gk, gv, thresholds=tau, return_lse=True, return_mask=True, **plan_options
    )
    again = sparse_attention(gq, gk, gv, thresholds=tau, **plan_options)
    checks.append(equal("pipeline", "mask bits with those of the stages", pipeline_mask.to_dense(), mask.to_dense()))
    checks.append(equal("pipeline", "output bits of two runs", again.get().view(np.uint16), out.get().view(np.uint16)))
    twin_limits = reference.row_limits(twin_m, twin_l, tau, plan)
    if plan.estimator != "int4":
        twin_limits = reference.integer_thresholds(
            twin_limits, twin.q_scale, per_query_head(twin.k_scale, plan)[..., None], plan
        )
    twin_mask = reference.estimate(twin, twin_limits, plan)
    visible = mask.visible()
    different = (pipeline_mask.to_dense() != twin_mask.to_dense())[..., visible]
    # A bit may differ where a block's largest score lies within rounding of its limit. Integer scores spread over
    # thousands of values while limits and scores move by one or two: fewer than two blocks in a thousand.
    checks.append(share("pipeline", "share of mask bits that differ from the twin's", different, 2e-3))

    alone, _ = attend(gq, gk, gv, mask, plan, return_lse=True)
    checks.append(
        equal(
            "attend", "output bits with those of the pipeline", alone.get().view(np.uint16), out.get().view(np.uint16)
        )
    )
    return plan, checks, pipeline_mask.to_numpy(), out.get(), lse.get()


def _codes_on_host(codes, plan):
    """The kernels' codes in the twin's order, padding dropped; rows that are not held have codes 0 and scale 1."""
    from salekit.codes import Quantized, q_codes_to_rows, spread_rows, tiles_to_rows
    from salekit.plans import ceil_div

    groups_q, groups_k = 8 * ceil_div(plan.seqlen_q, 16), 4 * ceil_div(plan.seqlen_k, 32)
    int4 = plan.estimator == "int4"
    return Quantized(
        codes.estimator,
        codes.code_bits,
        q_codes_to_rows(codes, plan),
        tiles_to_rows(codes.k_codes.get(), codes.code_bits, plan.seqlen_k),
        codes.q_scale.get()[..., :groups_q] if int4 else spread_rows(codes.q_scale.get(), plan, 1),
        codes.k_scale.get()[..., :groups_k] if int4 else codes.k_scale.get(),
        codes.k_mean.get(),
        codes.q_mean.get() if int4 else None,
        codes.correction.get()[..., : plan.seqlen_k] if int4 else None,
    )


def _mean_bound(x, mean) -> np.ndarray:
    """[batch, heads, d]: a float32 sum of n terms, in any order, is off by at most n 2^-24 sum |x|; then a rounding."""
    size = np.abs(heads_first(x)).mean(axis=2)
    return x.shape[1] * U32 * size + 2 * U32 * np.abs(mean)


def _compare_codes(host, twin, q, k, plan) -> list[Check]:
    int4, limit = plan.estimator == "int4", 7 if plan.estimator == "int4" else 127
    held = np.unique(plan.row_of_position[plan.row_of_position >= 0])
    bound_k = _mean_bound(k, twin.k_mean)
    checks = [within("quantise", "mean of k with the twin's", host.k_mean, twin.k_mean, bound_k)]
    worst_k = bound_k.max(axis=-1, keepdims=True)
    if int4:
        bound_q = _mean_bound(q, twin.q_mean)
        checks.append(within("quantise", "mean of q with the twin's", host.q_mean, twin.q_mean, bound_q))
        slack = bound_q.max(axis=-1, keepdims=True) / limit + 4 * U32 * twin.q_scale
        checks.append(within("quantise", "scales of q with the twin's", host.q_scale, twin.q_scale, slack))
        checks.append(within("quantise", "codes of q with the twin's", host.q_codes, twin.q_codes, 1))
    elif plan.estimator == "int8":
        ours, twins = ((x.q_scale[:, :, held], x.q_codes[:, :, held]) for x in (host, twin))
        checks.append(equal("quantise", "scales of q with the twin's", ours[0], twins[0]))
        checks.append(equal("quantise", "codes of q with the twin's", ours[1], twins[1]))
    else:
        # The rms decides which two of four stay; two weights within its rounding may swap, which moves whole codes.
        moved = np.abs(host.q_codes[:, :, held].astype(np.int32) - twin.q_codes[:, :, held]) > 1
        checks.append(share("quantise", "share of codes of q that differ from the twin's", moved, 1e-4))
    slack = (worst_k if int4 else worst_k[..., 0]) / limit + 4 * U32 * np.abs(twin.k_scale)
    checks.append(within("quantise", "scales of k with the twin's", host.k_scale, twin.k_scale, slack))
    # The means differ by less than a thousandth of a code's step, so a code can only tip over to its neighbour.
    checks.append(within("quantise", "codes of k with the twin's", host.k_codes, twin.k_codes, 1))
    if int4:
        keys = np.abs(heads_first(k) - twin.k_mean[:, :, None].astype(np.float64))
        keys, mean_q = per_query_head(keys, plan), np.abs(twin.q_mean.astype(np.float64))
        slack = np.einsum("bhsd,bhd->bhs", keys, plan.head_dim * 2 * U32 * mean_q + bound_q)
        slack += (mean_q * per_query_head(bound_k, plan)).sum(axis=-1)[..., None]
        checks.append(within("quantise", "correction with the twin's", host.correction, twin.correction, slack))
    return checks


# --- the twin against float64 --------------------------------------------------------------------------------------
def _check_twin(q, k, v, tau: float, plan):
    """Checks of the twin by other means: float64, straight from the definitions, on a sample of rows."""
    from salekit import reference

    queries, keys = heads_first(q), heads_first(k)
    render.note("validate: quantise")
    codes = reference.quantize(q, k, plan)
    mean = keys.mean(axis=2)
    checks = [within("quantise", "mean of k with float64", codes.k_mean, mean, _mean_bound(k, mean))]
    smooth = keys - mean[:, :, None]
    checks += _check_dequantised(codes, queries, smooth, mean, plan, k)

    render.note("validate: anchors and limits")
    m, l = reference.anchor_statistics(q, k, codes.k_mean, plan)
    rows = sample_rows(plan)
    want = np.stack([_anchor_logsumexp(queries, smooth, int(row), plan) for row in rows], axis=-1)
    norm_q = np.linalg.norm(queries[:, :, rows], axis=-1)
    slack = (
        plan.softmax_scale * norm_q * per_query_head(np.linalg.norm(_mean_bound(k, mean), axis=-1), plan)[..., None]
    )
    with np.errstate(divide="ignore"):
        got = m[..., rows] + np.log(l[..., rows].astype(np.float64))
    # m and l are rounded to float32 once each.
    checks.append(within("anchors", "m + ln(l) with float64", got, want, slack + FEW * (1 + np.abs(m[..., rows]))))
    y = reference.row_limits(m, l, tau, plan)
    votes = np.isfinite(want) & reference.rows_that_vote(plan)[rows]
    if 0 < tau < np.inf:
        # tau * l is a float32: past the largest it is inf, and so is y; below the least normal it is rounded to steps
        # of 2^-149.
        product = tau * l[..., rows].astype(np.float64)
        past = ~(product < float(np.finfo(np.float32).max) * (1 - 2 * U32)) & np.isposinf(y[..., rows])
        wanted_y = np.where(past, np.inf, want + np.log(tau))
        wanted_y = np.where(votes, wanted_y, np.where(np.isfinite(want), np.inf, y[..., rows]))
        slack_y = slack + FEW * (2 + np.abs(m[..., rows]) + np.abs(np.log(tau)))
        slack_y = slack_y - np.log1p(-np.minimum(0.5, 2.0**-150 / np.maximum(product, 2.0**-149)))
        checks.append(within("limits", "y with float64", y[..., rows], wanted_y, slack_y))
    limits = y
    if plan.estimator != "int4":
        k_scale = per_query_head(codes.k_scale, plan)[..., None]
        limits = reference.integer_thresholds(y, codes.q_scale, k_scale, plan)
        step = plan.softmax_scale * codes.q_scale.astype(np.float64) * k_scale
        finite = np.isfinite(y) & (np.abs(limits.astype(np.int64)) < 2**30)
        x = np.where(finite, y, 0) / step
        middle = np.where(finite, limits + 0.5, 0.5 + 0 * x)
        # T <= y / step < T + 1, that is, half a unit around T + 1/2.
        checks.append(
            within("limits", "T + 1/2 with y / step", middle, np.where(finite, x, middle), 0.5 + FEW * (1 + np.abs(x)))
        )

    render.note("validate: estimate")
    mask = reference.estimate(codes, limits, plan)
    checks.append(_check_bits(codes, limits, mask, plan))
    render.note("validate: attend")
    out, lse = reference.attend(q, k, v, mask, plan)
    return checks, mask, out, lse


def _check_dequantised(codes, queries, smooth, mean, plan, k) -> list[Check]:
    """|x - code * scale| <= scale / 2: what rounding to nearest promises, whatever the scale."""
    if plan.estimator == "int4":
        rows, keys = np.arange(plan.seqlen_q), np.arange(plan.seqlen_k)
        q_scale = codes.q_scale[..., 8 * (rows // 16) + rows % 8].astype(np.float64)[..., None]
        k_scale = codes.k_scale[..., 4 * (keys // 32) + keys % 8 // 2].astype(np.float64)[..., None]
        target = queries - queries.mean(axis=2, keepdims=True)
    else:
        q_scale = codes.q_scale.astype(np.float64)[..., None]
        k_scale = codes.k_scale.astype(np.float64)[..., None, None]
        target = queries
    checks = []
    got = codes.q_codes * q_scale
    if plan.estimator == "int8-sp24":
        kept = (codes.q_codes != 0).reshape(*codes.q_codes.shape[:-1], -1, 4).sum(axis=-1)
        checks.append(equal("quantise", "groups of four channels of q with more than two kept", kept > 2, kept < 0))
        target = np.where(codes.q_codes != 0, target, 0)
    extra = 256 * U32 * np.abs(target)  # float32 quotients and products, and the float32 mean
    checks.append(within("quantise", "code * scale with q", got, target, q_scale / 2 + extra + 1e-6 * q_scale))
    slack = k_scale / 2 + 256 * U32 * np.abs(smooth) + _mean_bound(k, mean)[:, :, None]
    checks.append(within("quantise", "code * scale with k - mean", codes.k_codes * k_scale, smooth, slack))
    return checks


def _anchor_logsumexp(queries, smooth, row: int, plan) -> np.ndarray:
    """float64 [batch, heads]: ln sum exp(s) over the row's visible anchor keys, written from the definition."""
    position = row + plan.seqlen_k - plan.seqlen_q
    tile_position = row // 64 * 64 + plan.seqlen_k - plan.seqlen_q
    keys = np.arange(plan.seqlen_k)
    sink = keys < -(-plan.sink // 32) * 32
    anchors = (sink | (keys >= max(0, tile_position - plan.local) // 32 * 32)) & (keys <= position)
    if not anchors.any():
        return np.full(queries.shape[:2], -np.inf)
    near = per_query_head(smooth[:, :, anchors], plan)
    scores = plan.softmax_scale * np.einsum("bhd,bhkd->bhk", queries[:, :, row], near)
    top = scores.max(axis=-1)
    return top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))


def _check_bits(codes, limits, mask, plan) -> Check:
    """The bits of some query blocks, from integer products pair by pair."""
    from salekit.reference import integer_thresholds

    got, want = [], []
    dense = mask.to_dense()
    blocks = sampled_blocks(plan.num_q_blocks)
    keys = np.arange(plan.seqlen_k)
    offset = plan.seqlen_k - plan.seqlen_q
    for b in range(plan.batch):
        for head in range(plan.num_heads):
            kv = head // plan.group_size
            codes_k = codes.k_codes[b, kv].astype(np.float64)  # exact, and a library does the product
            for block in blocks:
                rows = np.arange(block * plan.block_q, min((block + 1) * plan.block_q, plan.seqlen_q))
                acc = codes.q_codes[b, head, rows].astype(np.float64) @ codes_k.T
                t = limits[b, head, rows][:, None]
                if plan.estimator == "int4":
                    q_scale = codes.q_scale[b, head, 8 * (rows // 16) + rows % 8][:, None]
                    k_scale = codes.k_scale[b, kv, 4 * (keys // 32) + keys % 8 // 2][None]
                    acc = acc + np.clip(np.rint(codes.correction[b, head][None] / (q_scale * k_scale)), -(2**30), 2**30)
                    t = integer_thresholds(t, q_scale, k_scale, plan)
                visible = keys[None] <= rows[:, None] + offset
                start = rows // 64 * 64 + offset
                local = keys[None] >= (np.maximum(0, start - plan.local) // 32 * 32)[:, None]
                anchor = local | (keys < -(-plan.sink // 32) * 32)[None]
                # An anchor block counts where a row of its 64-row tile sees any of its keys.
                pairs = ((acc > t) | anchor) & visible
                padded = np.zeros((rows.size, plan.num_k_blocks * plan.block_k), bool)
                padded[:, : plan.seqlen_k] = pairs
                want.append(padded.reshape(rows.size, plan.num_k_blocks, plan.block_k).any(axis=(0, 2)))
                got.append(dense[b, head, block])
    return equal(
        "estimate", f"mask bits of {len(blocks)} query blocks a head, pair by pair", np.array(got), np.array(want)
    )


# --- the pipeline against float64 ----------------------------------------------------------------------------------
def _low_bit(q, k, v, mask, plan, cuda: bool) -> np.ndarray:
    """Low-bit attention through the mask, on the host. ArgumentError where it is not built."""
    from salekit import call_checks
    from salekit.attend import attend

    render.note("validate: low-bit attention")
    if cuda:
        from salekit.arrays import import_cupy

        as_gpu = import_cupy().asarray
        q, k, v = (as_gpu(x) for x in (q, k, v))
        mask = replace(mask, words=as_gpu(mask.words))
    options = dict(estimator=plan.estimator, query_stride=plan.query_stride, block=(plan.block_q, plan.block_k))
    out, _ = attend(q, k, v, mask, call_checks.make_plan(q, k, v, **options, dense_below=0, attend="int8-fp8"))
    return out.get() if cuda else out


def _check_pipeline(
    q, k, v, mask, out, lse, plan, low_bit=None, pooled=None
) -> tuple[list[dict[str, Any]], list[Check]]:
    """Per head: density, recall and output error over sampled rows; checks of out and lse against float64 under the
    same mask. low_bit, pooled: outputs by low-bit attention and with pools, which are reported next to it."""
    rows = sample_rows(plan)
    bits, density = mask.to_dense(), mask.density()
    slack_s = score_bound(q, k, plan)[..., rows]
    u = UNIT_ROUNDOFF[plan.dtype]
    keys = np.arange(plan.seqlen_k)
    visible = keys[None] <= (rows + plan.seqlen_k - plan.seqlen_q)[:, None]
    heads: list[dict[str, Any]] = []
    seen: dict[str, list] = {"out": [], "lse": [], "recall": []}
    for b in range(plan.batch):
        for head in range(plan.num_heads):
            kv = head // plan.group_size
            queries, key, value = (x.astype(np.float64) for x in (q[b, rows, head], k[b, :, kv], v[b, :, kv]))
            scores = np.where(visible, plan.softmax_scale * (queries @ key.T), -np.inf)
            selected = bits[b, head][rows // plan.block_q][:, keys // plan.block_k]
            dense_out, dense_lse, dense_p = _softmax(scores, value)
            want, want_lse, p = _softmax(np.where(selected, scores, -np.inf), value)
            recall = (dense_p * selected).sum(axis=1)
            got, got_lse = out[b, rows, head].astype(np.float64), lse[b, head, rows].astype(np.float64)
            # P is rounded to 16 bits (u), so is the output; scores may be off by s, which moves p by 2s; ex2 and the
            # sums round in float32.
            s = slack_s[b, head][:, None]
            with np.errstate(invalid="ignore"):
                spread = p @ np.abs(value)
                count = selected.sum(axis=1)
                slack = (u + np.expm1(2 * s) + FEW * (1 + np.abs(want_lse))[:, None] + (count * U32)[:, None]) * spread
                slack = slack + u * np.abs(want)
                slack_lse = s[:, 0] + FEW * (1 + np.abs(want_lse)) + count * U32
            seen["out"].append((got, want, np.nan_to_num(slack)))
            seen["lse"].append((got_lse, want_lse, np.nan_to_num(slack_lse)))
            some = np.isfinite(dense_lse)
            ratio = np.exp(np.where(some, got_lse, 0) - np.where(some, dense_lse, 0))
            slack_recall = 2 * recall * np.where(np.isfinite(want_lse), slack_lse, 0) + FEW
            seen["recall"].append((ratio[some], recall[some], slack_recall[some]))
            scale = np.linalg.norm(dense_out)

            def relative(x: np.ndarray, dense_out=dense_out, scale=scale) -> float:
                return float(np.linalg.norm(x.astype(np.float64) - dense_out) / scale) if scale else 0.0

            low_bit_error = None
            if low_bit is not None:
                size = np.linalg.norm(want)
                difference = np.linalg.norm(low_bit[b, rows, head].astype(np.float64) - want)
                low_bit_error = float(difference / size) if size else 0.0
            heads.append(
                {
                    "batch": b,
                    "head": head,
                    "density": float(density[b, head]),
                    "recall": float(recall[some].mean()) if some.any() else 1.0,
                    "recall_worst_row": float(recall[some].min()) if some.any() else 1.0,
                    "relative_output_error": relative(got),
                    "low_bit_error": low_bit_error,
                    "pooled_output_error": None if pooled is None else relative(pooled[b, rows, head]),
                }
            )
    where = f"{len(rows)} rows a head"
    names = {
        "out": ("attend", f"out with float64, same mask, {where}"),
        "lse": ("attend", f"lse with float64, same mask, {where}"),
        "recall": ("pipeline", "exp(lse - dense lse) with the attention mass kept"),
    }
    checks = []
    for name, (stage, text) in names.items():
        got, want, slack = (np.concatenate([part[i].ravel() for part in seen[name]]) for i in range(3))
        checks.append(within(stage, text, got, want, slack))
    return heads, checks


def _softmax(scores: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, lse, p) in float64; an empty row has out 0, lse -inf, p 0."""
    top = scores.max(axis=1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), -np.inf)[:, 0]
    p = p / np.where(total > 0, total, 1)
    return p @ value, lse, p


# --- tables --------------------------------------------------------------------------------------------------------
def _print_tables(report: dict[str, Any]) -> None:
    if "case" in report:
        from .fuzz import print_replay

        return print_replay(report)
    plan = report["plan"]
    where = report["gpu"]["name"] if report["gpu"] else "NumPy twin, no GPU in use"
    title = (
        f"salekit validate: {where}; {report['input']}, {plan['seqlen_k']} tokens, {plan['estimator']}, "
        f"tau {report['tau']}, blocks {plan['block_q']}x{plan['block_k']}"
        + (", skipped blocks pooled" if report["skipped"] == "pool" else "")
    )
    render.verdicts(title, report["checks"])
    extra = {"pooled_output_error": "with pools", "low_bit_error": "low-bit error"}
    extra = {name: title for name, title in extra.items() if report["heads"] and report["heads"][0][name] is not None}
    rows = [
        [
            str(head["head"]) if plan["batch"] == 1 else f"{head['batch']}.{head['head']}",
            f"{head['density']:.4f}",
            f"{head['recall']:.4f}",
            f"{head['recall_worst_row']:.4f}",
            f"{head['relative_output_error']:.4f}",
            *(f"{head[name]:.4f}" for name in extra),
        ]
        for head in report["heads"]
    ]
    render.table(
        f"against float64 dense attention, {report['float64_rows_per_head']} rows a head"
        + ("; low-bit attention against float64 with the same mask" if "low_bit_error" in extra else ""),
        ["head", "density", "recall", "worst row", "output error", *extra.values()],
        rows,
    )
    render.note("all verdicts ok" if report["passed"] else "a verdict FAILED")
