"""salekit compare: SALE's masks next to other ways to choose blocks, at equal density, on dumps of q, k and v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from . import backends, options, plots, render

TWIN = "the NumPy twin compares, which takes minutes beyond a few thousand tokens"
VALUES = ("recall", "relative_error")


def _densities(ctx: Any, param: Any, text: str) -> list[float]:
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values):
        raise click.BadParameter(f"{text!r} is not a list of densities; wants e.g. 0.1,0.2 (above 0, at most 1)")
    return values


def _methods(ctx: Any, param: Any, text: str) -> list[Any]:
    from salekit.selectors import SELECTORS

    names = list(SELECTORS) if text == "all" else list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in SELECTORS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not a method; wants some of {', '.join(SELECTORS)}")
    return [SELECTORS[name] for name in names]


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--sample", is_flag=True, help="The built-in real sample instead of a file.")
@click.option("--layer", type=click.IntRange(min=0), default=None, help="Layer of a file that holds several.")
@click.option(
    "--head", "heads", type=click.IntRange(min=0), multiple=True, help="Query head, repeatable. Default: all."
)
@click.option("--methods", default="all", show_default=True, callback=_methods, help="Names, with commas between them.")
@click.option(
    "--densities", default="0.05,0.1,0.2,0.3", show_default=True, callback=_densities, help="Compared at these."
)
@click.option(
    "--shared", is_flag=True, help="One setting for all heads, the density as their mean; else each head's own."
)
@click.option("--anchors", is_flag=True, help="SALE's sink and local window are kept by every method.")
@click.option("--per-head", is_flag=True, help="A table for each head, too.")
@options.block
@options.skipped
@options.backend
@options.as_json
@click.option("--plot", type=click.Path(dir_okay=False, writable=True), help="Draw to this .svg or .png (matplotlib).")
@options.force
def compare(
    file, sample, layer, heads, methods, densities, shared, anchors, per_head, block, skipped, backend, as_json, plot,
    force,
) -> None:
    """How much attention mass SALE's masks keep and how far the output is off, next to other ways to choose blocks.

    FILE (.safetensors or .npz) holds q, k and v. Every method chooses blocks of the same grid, at the same density;
    "cost" is what it multiplies before the attention, relative to the exact q.k product, a product of b bits counting
    b / 16. docs/compare.md says where each comes from, and what it was checked against. --skipped pool measures every
    method's error with pools of what it skips (docs/skipped-mass.md); masks, recall and cost stay the same.
    """
    if sample == (file is not None):
        raise click.UsageError("give either FILE or --sample")
    options.check_output("--plot", plot, file, force=force)
    if plot:
        plots.check(plot)
    name, layer_name, q, k, v = _load(file, layer)
    heads = list(dict.fromkeys(heads)) or list(range(q.shape[2]))
    if max(heads) >= q.shape[2]:
        raise click.UsageError(f"--head {max(heads)}: there are heads 0 to {q.shape[2] - 1}")

    from salekit import frontier

    use_gpu = backends.use_gpu(backend, TWIN)
    q, k, v = _of_heads(q, k, v, heads)
    options.check_qkv(f"{name}, layer {layer_name}", q, k, v)
    if use_gpu:
        q, k, v = backends.on_gpu(q, k, v)
    plan = options.make_plan(q, k, v, block=block, estimator="int8", dense_below=0, skipped=skipped)
    found = {}
    with render.progress(name, 1 + len(methods) * (1 + len(densities))) as tick:
        comparison = frontier.Comparison(q, k, v, plan, shared, anchors)
        tick()
        for method in methods:
            found[method.name] = comparison.points(method, densities, tick)
    result = {
        "schema": 1,
        "kind": "salekit-comparison",
        "source": name,
        "layer": layer_name,
        "heads": heads,
        "seqlen_q": plan.seqlen_q,
        "seqlen_k": plan.seqlen_k,
        "head_dim": plan.head_dim,
        "block": list(block),
        "shared": shared,
        "anchors": anchors,
        "skipped": skipped,
        "pools": _pools(plan) if skipped == "pool" else None,
        "methods": {method.name: _result(method, plan, *found[method.name]) for method in methods},
    }
    if plot:
        plots.save(plot, result)
        render.note(f"wrote {plot}")
    if as_json:
        render.print_json(result)
    else:
        _print(result, densities, per_head)


def _load(file: str | None, layer: int | None) -> tuple[str, str, Any, Any, Any]:
    """(name, layer, q, k, v) of the sample or of one layer of a file."""
    from salekit.data_files import iter_layers, load_sample

    if file is None:
        if layer:
            raise click.UsageError(f"--layer {layer}: the sample is layer 0")
        return "built-in sample", "0", *load_sample().values()
    names, chosen = [], None
    for name, (q, k, v, _) in iter_layers(file):
        names.append(name)
        if chosen is None and layer in (None, int(name)):
            chosen = name, q, k, v
    if layer is None and len(names) > 1:
        raise click.UsageError(f"{file} holds layers {', '.join(names)}; --layer chooses one")
    if chosen is None:
        raise click.UsageError(f"--layer {layer}: {file} holds {', '.join(names)}")
    return Path(file).name, *chosen


def _of_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: list[int]) -> tuple[np.ndarray, ...]:
    """The chosen query heads, each with its KV head."""
    if heads == list(range(q.shape[2])):
        return q, k, v
    size = q.shape[2] // k.shape[2]
    kv = [head // size for head in heads]
    return q[:, :, heads], k[:, :, kv], v[:, :, kv]


def _result(method: Any, plan: Any, points: list[Any], sparsest: np.ndarray) -> dict[str, Any]:
    from salekit.selectors.costs import equivalent

    cost = method.cost(plan)
    return {
        "source": method.source,
        "checked_against": method.checked_against,
        "knob": method.knob,
        "cost": equivalent(cost),
        "products": [_product(p) for p in cost],
        "sparsest": sparsest.tolist(),
        "points": [_point(method, plan, point) for point in points],
    }


def _product(product: Any) -> dict[str, Any]:
    return {"operations": product.operations, "bits": product.bits, "for": product.what}


def _point(method: Any, plan: Any, point: Any) -> dict[str, Any]:
    names = ("density", "recall", "relative_error", "error", "knob")
    values = {name: [_number(x) for x in getattr(point, name)] for name in names}
    mean = {name: _number(np.mean(getattr(point, name))) for name in names[:-1]}
    return {"wanted": point.wanted, "work": method.work(plan, point.wanted), "mean": mean, "heads": values}


def _pools(plan: Any) -> dict[str, Any]:
    """What pools multiply, in the units of a method's cost; a method's work has them in it."""
    from salekit.selectors import costs

    products = costs.pools(plan)
    return {"cost": costs.equivalent(products), "products": [_product(p) for p in products]}


def _number(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def _print(result: dict[str, Any], densities: list[float], per_head: bool) -> None:
    heads = result["heads"]
    kept = ", SALE's anchors kept by all" if result["anchors"] else ""
    setting = "one setting for all heads" if result["shared"] else "each head at the density"
    render.text(
        f"{result['source']}, layer {result['layer']}: {len(heads)} heads, {result['seqlen_k']} tokens, "
        f"blocks {result['block'][0]}x{result['block'][1]}; {setting}{kept}"
    )
    pools = result["pools"]
    if pools:
        render.text(f"errors with pools of what is skipped, which cost every method {pools['cost']:.3f} more")
    titles = {name: name.replace("_", " ") for name in VALUES}
    if pools:
        titles["relative_error"] += ", skipped blocks pooled"
    together = np.mean if result["shared"] else max  # of sparsest: from there on the method has a mask for all heads
    for name in VALUES:
        _table(f"{titles[name]}, mean of the heads", result, densities, lambda p, name=name: p["mean"][name], together)
    for index, head in enumerate(heads if per_head else []):
        for name in VALUES:
            _table(
                f"{titles[name]}, head {head}",
                result,
                densities,
                lambda p, name=name, index=index: p["heads"][name][index],
                together if result["shared"] else lambda heads, index=index: heads[index],
            )
    means = [point["mean"] for of in result["methods"].values() for point in of["points"]]
    if any(mean["density"] is None for mean in means):
        where = "" if result["shared"] else "on some head "
        render.text(f"-: {where}no mask of the method is this sparse (see sparsest) or this dense")
    if any(mean[name] is None and mean["density"] is not None for mean in means for name in VALUES):
        render.text("NaN: scores or outputs of some head leave float32")
    plots.draw(result)


def _cell(value: float | None, density: float | None) -> str:
    if value is None:
        return "-" if density is None else "NaN"
    return f"{value:.4f}"


def _table(title: str, result: dict[str, Any], densities: list[float], value: Any, sparsest: Any) -> None:
    """value: of a point, what a cell shows; sparsest: of the sparsest densities of the heads, the one that is shown."""
    rows = []
    for name, of in result["methods"].items():
        cells = [_cell(value(point), point["mean"]["density"]) for point in of["points"]]
        rows.append([name, f"{of['cost']:.3f}", f"{sparsest(of['sparsest']):.3f}", *cells])
    render.text()
    render.table(title, ["method", "cost", "sparsest", *(f"{density:g}" for density in densities)], rows)
