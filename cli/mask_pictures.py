"""Pictures of block masks: cells, colours, contact sheets, SVG and a page that a browser opens."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Callable
from xml.sax.saxutils import escape

import numpy as np

from . import render

MAX_PIXELS = 4096  # a side of a PNG; larger masks are drawn coarser
MAX_CELLS = (4096, 8192)  # rows and columns of a head in a page
MAX_PAGE_BYTES = 20_000_000  # of a page with best scores; a larger one goes without
LOWEST_SCORE = float(np.log(2.0**-20))  # in a page; smaller ones are shown as this one
FAINTEST = 0.15  # what a cell with one set block of many is drawn as
GAP = 4  # pixels between the heads of a sheet
_PANEL = 480  # units of a head's width in an SVG, and most of its cells: a viewer that scales down would drop some
_GREY, _ORANGE, _BLUE, _GREEN, _RED = (150, 150, 158), (249, 142, 9), (70, 140, 255), (80, 200, 120), (235, 70, 90)


@dataclass(frozen=True)
class Layer:
    """Blocks of one kind. name: for the legend; colour: RGB."""

    name: str
    colour: tuple[int, int, int]


SELECTED = (Layer("selected", _ORANGE),)
ANCHORS = (Layer("selected by a score", _ORANGE), Layer("anchor", _BLUE))
DIAGONAL = (Layer("full", _ORANGE), Layer("on the diagonal or a ragged end", _BLUE))
DIFFERENCE = (Layer("in both", _GREY), Layer("in the first alone", _ORANGE), Layer("in the second alone", _BLUE))


def tau_layers(taus: list[float]) -> tuple[Layer, ...]:
    """A colour for each tau, rising: what stays selected up to the largest is brightest."""
    colours = render.ramp(np.linspace(0.3, 1, len(taus)))
    return tuple(Layer(f"tau {tau:g}", tuple(int(c) for c in colour)) for tau, colour in zip(taus, colours))


@dataclass(frozen=True)
class Drawing:
    """What is drawn: kinds(head) is uint8 [num_q_blocks, num_k_blocks], 0 where nothing is, else 1 + the layer's index.

    labels: a text a head. Where a cell stands for several blocks the last layer that is in it gives the colour.
    scores(head): float32 like kinds(head), salekit.block_scores, for pages; None where they are not known.
    rows: names of a sheet's rows, each with as many heads, one row after another; empty: about as many rows as columns.
    """

    layers: tuple[Layer, ...]
    kinds: Callable[[int], np.ndarray]
    labels: list[str]
    visible: np.ndarray
    block_q: int
    block_k: int
    seqlen_q: int
    seqlen_k: int
    scores: Callable[[int], np.ndarray] | None = None
    rows: tuple[str, ...] = ()

    def columns(self, heads: list[int]) -> int:
        """Of a sheet of these heads."""
        return len(heads) // len(self.rows) if self.rows else int(np.ceil(np.sqrt(len(heads))))


def pooled(values: np.ndarray, rows: int, columns: int, reduce: Any = np.add) -> np.ndarray:
    """values pooled into that many rows and columns, at most those they have, of nearly equal size."""
    edges = np.arange(rows + 1) * values.shape[0] // rows
    column_edges = np.arange(columns) * values.shape[1] // columns
    # Row by row: a reduceat over all would first make all values as wide as the result.
    bands = (reduce.reduce(values[first:end], 0) for first, end in zip(edges[:-1], edges[1:]))
    return np.stack([reduce.reduceat(band, column_edges) for band in bands])


def cells(bits: np.ndarray, visible: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
    """Density of the visible blocks of each cell, NaN where none is; a cell with a set block is at least FAINTEST."""
    shape = min(bits.shape[0], max_rows), min(bits.shape[1], max_columns)
    set_blocks, seen = (pooled(values, *shape) for values in (bits, visible))
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.where(seen > 0, set_blocks / seen, np.nan)
    return np.where(set_blocks > 0, np.maximum(density, FAINTEST), density)


def head_kinds(drawing: Drawing, head: int, max_rows: int, max_columns: int) -> np.ndarray:
    """int [rows, columns] of a head: 1 + the cell's last layer, 0 where no block is set, -1 where none is visible."""
    kinds = drawing.kinds(head)
    shape = min(kinds.shape[0], max_rows), min(kinds.shape[1], max_columns)
    last = pooled(kinds, *shape, np.maximum).astype(np.int64)
    return np.where(pooled(drawing.visible, *shape, np.maximum), last, -1)


def head_picture(drawing: Drawing, head: int, max_rows: int, max_columns: int) -> np.ndarray:
    """uint8 RGB [rows, columns, 3] of a head."""
    kinds = drawing.kinds(head)
    density = cells(kinds > 0, drawing.visible, max_rows, max_columns)
    if len(drawing.layers) == 1:
        return render.ramp(density)
    top = pooled(kinds, *density.shape, np.maximum)
    palette = np.array([(0, 0, 0)] + [layer.colour for layer in drawing.layers], float)
    # A kind that stands out may be one block of many: it is never fainter than half.
    strength = np.where(top > 1, 0.5 + 0.5 * np.nan_to_num(density), np.nan_to_num(density))
    picture = palette[top] * strength[..., None]
    empty = render.ramp(np.zeros((1, 1)))[0, 0]
    picture = np.where((top == 0)[..., None], empty, picture)
    return np.where(np.isnan(density)[..., None], 0, picture).astype(np.uint8)


def sheet(drawing: Drawing, heads: list[int]) -> np.ndarray:
    """uint8 RGB of several heads in rows."""
    columns = drawing.columns(heads)
    rows = -(-len(heads) // columns)
    size = MAX_PIXELS // max(rows, columns) - GAP if len(heads) > 1 else MAX_PIXELS
    pictures = [head_picture(drawing, head, size, size) for head in heads]
    height, width = pictures[0].shape[:2]
    whole = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        whole[top : top + height, left : left + width] = picture
    return whole


def encode_png(rgb: np.ndarray) -> bytes:
    """A PNG of uint8 [height, width, 3] (PNG specification, third edition: 8-bit truecolour, filter 0)."""
    height, width, _ = rgb.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.zeros((height, 1 + 3 * width), np.uint8)
    lines[:, 1:] = rgb.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


def encode_svg(drawing: Drawing, heads: list[int], title: str) -> str:
    """Panels with axes in tokens and a legend; the cells are PNGs inside."""
    columns = drawing.columns(heads)
    height = max(40, round(_PANEL * drawing.visible.shape[0] * drawing.block_q / max(1, drawing.seqlen_k)))
    height = min(height, 2 * _PANEL)
    step_x, step_y = _PANEL + 70, height + 70
    width, total = columns * step_x + 20, 60 + -(-len(heads) // columns) * step_y + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{total}" fill="white"/>',
        f'<text x="20" y="22" font-size="15">{escape(title)}</text>',
    ]
    x = 20
    for layer in drawing.layers:
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="rgb{layer.colour}"/>')
        parts.append(f'<text x="{x + 17}" y="43">{escape(layer.name)}</text>')
        x += 40 + 8 * len(layer.name)
    for i, head in enumerate(heads):
        left, top = 60 + i % columns * step_x, 80 + i // columns * step_y
        png = base64.b64encode(encode_png(head_picture(drawing, head, _PANEL, _PANEL))).decode()
        parts.append(f'<text x="{left}" y="{top - 8}">{escape(drawing.labels[head])}</text>')
        parts.append(
            f'<image x="{left}" y="{top}" width="{_PANEL}" height="{height}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{png}"/>'
        )
        for text, at_x, at_y, anchor in (
            ("0", left, top + height + 15, "start"),
            (f"key {drawing.seqlen_k}", left + _PANEL, top + height + 15, "end"),
            ("0", left - 5, top + 10, "end"),
            (str(drawing.seqlen_q), left - 5, top + height, "end"),
        ):
            parts.append(f'<text x="{at_x}" y="{at_y}" font-size="11" text-anchor="{anchor}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def score_codes(scores: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(uint8 codes, low, high) of natural logarithms: 1 to 254 stand for low to high, in even steps.

    0: nothing is there (-inf); 255: selected at every finite tau. low is at least LOWEST_SCORE, and stands for what is
    below.
    """
    least, most = np.float32(LOWEST_SCORE), np.finfo(np.float32).max
    known = (scores > -np.inf) & (scores < most)
    clipped = np.maximum(scores, least, where=known, out=np.zeros_like(scores))
    low, high = (float(f(clipped[known])) if known.any() else 0.0 for f in (np.min, np.max))
    steps = np.rint((clipped - low) * (253 / max(high - low, 1e-6))) + 1
    codes = np.where(known, steps, np.where(scores >= most, 255, 0))
    return codes.astype(np.uint8), low, high


def _packed(cells: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(cells).tobytes(), 6)).decode()


def _add_scores(data: dict[str, Any], drawing: Drawing, heads: list[int], shape: tuple[int, int]) -> str:
    """Adds "best", codes a head, to a page's heads; returns why not, or an empty text."""
    if drawing.scores is None:
        return "no best scores: made from masks"
    size = sum(len(entry["cells"]) for entry in data["heads"])
    for entry, head in zip(data["heads"], heads):
        codes, low, high = score_codes(pooled(drawing.scores(head), *shape, np.maximum))
        entry["best"] = {"codes": _packed(codes), "low": low, "high": high}
        size += len(entry["best"]["codes"])
        if size > MAX_PAGE_BYTES:
            for other in data["heads"]:
                other.pop("best", None)
            return f"best scores left out: the page would exceed {MAX_PAGE_BYTES // 10**6} MB; choose fewer heads"
    return ""


def encode_html(drawing: Drawing, heads: list[int], title: str) -> str:
    """One page that needs nothing else: choose layer and head, zoom, drag, and read what is under the pointer."""
    shape = tuple(min(size, most) for size, most in zip(drawing.visible.shape, MAX_CELLS))
    data = {
        "title": title,
        "rows": shape[0],
        "columns": shape[1],
        "num_q_blocks": drawing.visible.shape[0],
        "num_k_blocks": drawing.visible.shape[1],
        "block_q": drawing.block_q,
        "block_k": drawing.block_k,
        "seqlen_q": drawing.seqlen_q,
        "seqlen_k": drawing.seqlen_k,
        "visible": [int(count) for count in drawing.visible.sum(axis=1)],
        "layers": [{"name": layer.name, "colour": layer.colour} for layer in drawing.layers],
        "sheet": drawing.rows,
        "heads": [],
    }
    for head in heads:
        kinds = drawing.kinds(head)
        data["heads"].append(
            {
                "label": drawing.labels[head],
                "set": [int(count) for count in (kinds > 0).sum(axis=1)],
                "cells": _packed(pooled(kinds, *shape, np.maximum)),
            }
        )
    data["note"] = _add_scores(data, drawing, heads, shape)
    page = resources.files("salekit.cli").joinpath("mask_view.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it may end the script
    return page.replace("{{title}}", escape(title)).replace("{{data}}", text)
