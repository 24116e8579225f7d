"""The frontier that ``salekit compare`` measured, drawn: by matplotlib into a file, or in letters on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from salekit.written_files import writing

from . import render

SUFFIXES = (".svg", ".png")
MIN_WIDTH, MAX_WIDTH, HEIGHT = 40, 100, 16  # columns and lines of the terminal's plot
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARGIN = 8  # columns of the axis' numbers


def check(path: str) -> None:
    """Whether a plot can be drawn to a file of this name. click.UsageError; ClickException without matplotlib."""
    if Path(path).suffix not in SUFFIXES:
        raise click.UsageError(f"--plot {path}: wants a name that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise click.ClickException("--plot needs matplotlib: pip install 'salekit[plot]'") from None


def _series(result: dict[str, Any], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """By method, the densities and the mean values that it has."""
    series = {}
    for method, of in result["methods"].items():
        points = [(p["mean"]["density"], p["mean"][name]) for p in of["points"] if p["mean"][name] is not None]
        if points:
            series[method] = tuple(map(list, zip(*points)))
    return series


def save(path: str, result: dict[str, Any]) -> None:
    """Recall and relative error over density, a line a method, as .svg or .png."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "salekit", "path.simplify": True})
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("recall", "relative_error")):
        for method, (x, y) in _series(result, name).items():
            axis.plot(x, y, label=method, linewidth=1.2, marker="o", markersize=2.5, **_style(method))
        axis.set_xlabel("density")
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    blocks = "x".join(map(str, result["block"]))
    figure.suptitle(
        f"{result['source']}: {len(result['heads'])} heads, {result['seqlen_k']} tokens, blocks {blocks}"
        + (", skipped blocks pooled" if result.get("skipped") == "pool" else ""),
        fontsize=9,
    )
    suffix = Path(path).suffix[1:]
    with writing(path) as file:
        figure.savefig(file, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)


_COLOURS = {"int4": "#8c510a", "int8": "#e66101", "int8-sp24": "#fdb863", "exact": "#000000", "oracle-mass": "#777777"}
_OTHERS = {
    "sink-local": "#999999",
    "minference": "#1b7837",
    "minference-v": "#7fbf7b",
    "flexprefill": "#2166ac",
    "xattention-8": "#5e3c99",
    "xattention-16": "#b2abd2",
    "sparge": "#c51b7d",
    "sparge-cdf": "#de77ae",
    "sparge-topk": "#f1b6da",
    "quest": "#01665e",
    "blasst": "#b2182b",
}


def _style(method: str) -> dict[str, Any]:
    base, _, stride = method.partition("/")
    line = {"": "-", "2": "--", "4": ":"}[stride]
    if base == "oracle-mass":
        line = "--"
    return {"color": _COLOURS.get(base) or _OTHERS.get(base), "linestyle": line}


def draw(result: dict[str, Any]) -> None:
    """Recall over density on the terminal, a letter a method; nothing where it is too narrow for that."""
    width = min(MAX_WIDTH, render.terminal_width()) - _MARGIN
    series = _series(result, "recall")
    points = [(x, y) for xs, ys in series.values() for x, y in zip(xs, ys)]
    if width + _MARGIN < MIN_WIDTH or len({x for x, _ in points}) < 2:
        return
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    cells = [[" "] * width for _ in range(HEIGHT)]
    legend = []
    for letter, (method, (xs, ys)) in zip(_LETTERS, series.items()):
        legend.append(f"{letter} {method}")
        for column in range(width):
            y = _between(left + (right - left) * column / (width - 1), xs, ys)
            if y is not None:
                row = round((high - y) / span * (HEIGHT - 1))
                # Methods that meet take turns, so that none hides the others.
                if cells[row][column] == " " or column % len(series) == len(legend) - 1:
                    cells[row][column] = letter
    render.text()
    render.text("recall over density")
    for row, line in enumerate(cells):
        label = f"{high - span * row / (HEIGHT - 1):.3f}" if row % 5 == 0 else ""
        render.text(f"{label:>{_MARGIN - 2}} |{''.join(line).rstrip()}")
    render.text(" " * (_MARGIN - 1) + "+" + "-" * (width - 1))
    render.text(" " * _MARGIN + f"{left:<{width // 2}.3g}{right:>{width - width // 2}.3g}")
    line = ""
    for entry in legend:
        if line and len(line) + len(entry) + 2 > width + _MARGIN:
            render.text(line)
            line = ""
        line += ("  " if line else "") + entry
    render.text(line)


def _between(x: float, xs: list[float], ys: list[float]) -> float | None:
    """Linear between the points; None outside them."""
    for i in range(len(xs)):
        if x == xs[i]:
            return ys[i]
        if i and xs[i - 1] < x < xs[i]:
            return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return None
