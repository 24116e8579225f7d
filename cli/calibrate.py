"""salekit calibrate: per-head thresholds from dumps of q, k and v."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import backends, options, render

TWIN = "the NumPy twin calibrates, which takes long beyond a few thousand tokens"


@click.command()
@click.argument("files", type=click.Path(exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--max-relative-error", type=options.Finite(min=0), help="Of each head's output.  [default: 0.1]")
@click.option("--max-error", type=options.Finite(min=0), help="Sum of |out - dense| over seqlen (the paper's theta).")
@click.option("--min-recall", type=options.Finite(0, 1), help="Attention mass kept, mean over rows.")
@click.option("--density", type=options.Finite(0, 1), help="A budget: the mean over each layer's heads.")
@options.block
@options.estimator
@options.query_stride
@options.skipped
@options.backend
@options.force
@options.as_json
@click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), required=True, help="Write this JSON.")
def calibrate(
    files, max_relative_error, max_error, min_recall, density, block, estimator, query_stride, skipped, backend, force,
    as_json, output,
) -> None:
    """Find each head's largest threshold that meets a target, on FILES (.safetensors or .npz).

    A file may hold many layers (layers.12.q, layers.12.k, ...); a plain q, k, v is layer 0. Files of one layer at
    several lengths make thresholds that follow the length. Load the result with salekit.load_thresholds(path,
    layer=..., seqlen=...). With --skipped pool errors are those of a call with skipped="pool"; recall stays the mass
    that the selected blocks hold.
    """
    targets = {"relative_error": max_relative_error, "error": max_error, "recall": min_recall, "density": density}
    given = {name: value for name, value in targets.items() if value is not None} or {"relative_error": 0.1}
    if len(given) > 1:
        raise click.UsageError("give one of --max-relative-error, --max-error, --min-recall and --density")
    options.check_output("-o", output, *files, force=force)
    ((target, value),) = given.items()

    from salekit import __version__, thresholds

    _check_layers(files)
    use_gpu = backends.use_gpu(backend, TWIN)
    found: dict[str, dict[int, np.ndarray]] = {}
    rows, inputs, used = [], [], {}
    for file in files:
        inputs.append({"name": Path(file).name, "sha256": _sha256(file)})
        plan_options = dict(block=block, estimator=estimator, query_stride=query_stride, skipped=skipped)
        for layer, plan, tau, measured in _layers(file, target, value, plan_options, use_gpu):
            found.setdefault(layer, {})[plan.seqlen_k] = tau
            used = {"estimator": plan.estimator, "softmax_scale": plan.softmax_scale}
            rows += [_row(layer, plan.seqlen_k, head, tau, measured) for head in range(len(tau))]
    about = {
        "salekit": __version__,
        "target": {target: value},
        **used,
        "block": list(block),
        "query_stride": query_stride,
        "skipped": skipped,
        "inputs": inputs,
        "measured": rows,
    }
    thresholds.save_thresholds(output, found, about)
    render.note(f"wrote {output}")
    fits = {layer: thresholds.fit_lengths(by_length) for layer, by_length in found.items() if len(by_length) > 1}
    if as_json:
        render.print_json({"schema": 1, "kind": "salekit-calibration", **about, "fits": fits})
    else:
        _print(rows, target, value, skipped)
        _print_fits(fits)


def _check_layers(files: tuple[str, ...]) -> None:
    """click.UsageError unless a layer is at each length once, with the same heads in all files."""
    from salekit.data_files import iter_layers

    heads: dict[str, int] = {}
    seen = set()
    for file in files:
        for layer, (q, k, *_) in iter_layers(file):
            if (layer, k.shape[1]) in seen:
                raise click.UsageError(f"{file}: layer {layer} at {k.shape[1]} tokens was in a file before")
            if heads.setdefault(layer, q.shape[2]) != q.shape[2]:
                raise click.UsageError(f"{file}: layer {layer} has {q.shape[2]} heads here and others in a file before")
            seen.add((layer, k.shape[1]))


def _sha256(file: str) -> str:
    from salekit.untrusted_files import open_plain

    digest = hashlib.sha256()
    with open_plain(file) as data:
        while chunk := data.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _layers(file: str, target: str, value: float, plan_options: dict[str, Any], use_gpu: bool):
    """(layer, plan, thresholds, what they give) of each layer of a file, one at a time."""
    from salekit import calibration
    from salekit.data_files import iter_layers

    for layer, (q, k, v, _) in iter_layers(file):
        started = time.perf_counter()
        options.check_qkv(f"{file}, layer {layer}", q, k, v)
        if use_gpu:
            q, k, v = backends.on_gpu(q, k, v)
        plan = options.make_plan(q, k, v, **plan_options, dense_below=0)
        prepared = calibration.Layer(q, k, v, plan)
        steps = calibration.GRID if target == "density" else calibration.STEPS
        with render.progress(f"{Path(file).name}, layer {layer}", steps * prepared.num_groups) as tick:
            if target == "density":
                tau, measured = calibration.calibrate_density(prepared, value, tick)
            else:
                tau, measured = calibration.calibrate(prepared, target, value, tick)
        seconds = time.perf_counter() - started
        render.note(f"layer {layer}: {plan.num_heads} heads, {plan.seqlen_k} tokens, {seconds:.2f} s")
        yield layer, plan, tau, measured


def _row(layer: str, seqlen: int, head: int, tau: np.ndarray, measured: Any) -> dict[str, Any]:
    values = {name: float(getattr(measured, name)[head]) for name in ("density", "relative_error", "error", "recall")}
    return {"layer": layer, "seqlen": seqlen, "head": head, "tau": float(tau[head])} | {
        name: value if np.isfinite(value) else None for name, value in values.items()
    }


def _print(rows: list[dict[str, Any]], target: str, value: float, skipped: str) -> None:
    shown = ("tau", "density", "relative_error", "error", "recall")
    render.table(
        f"{target.replace('_', ' ')} {value:g}" + (", skipped blocks pooled" if skipped == "pool" else ""),
        ["layer", "seqlen", "head", *(name.replace("_", " ") for name in shown)],
        [
            [row["layer"], row["seqlen"], row["head"], *("-" if row[x] is None else f"{row[x]:.4g}" for x in shown)]
            for row in rows
        ],
    )
    mean = sum(row["density"] for row in rows) / len(rows)
    render.text(f"mean density {mean:.4f}")


def _print_fits(fits: dict[str, dict[str, list]]) -> None:
    """How tau moves with the length, of layers with several."""
    rows = [
        [layer, head, *("-" if x is None else f"{x:.3g}" for x in numbers)]
        for layer, fit in fits.items()
        for head, numbers in enumerate(zip(fit["slope"], fit["residual"]))
    ]
    if rows:
        render.text()
        render.table("ln tau over ln seqlen", ["layer", "head", "slope", "residual"], rows)
