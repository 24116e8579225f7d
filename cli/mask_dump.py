"""salekit mask-dump: look at a block mask, or save it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import click
import numpy as np

from salekit.errors import GpuError

from . import options, render

MAX_PNG = 4096  # pixels a side; larger masks are drawn coarser


@click.command("mask-dump")
@click.argument("file", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--sample", is_flag=True, help="The built-in real sample instead of a file.")
@click.option(
    "--head", "heads", type=click.IntRange(min=0), multiple=True, help="Head to draw, repeatable. Default: all."
)
@click.option("--format", "form", type=click.Choice(["term", "png", "npz"]), default="term", show_default=True)
@click.option("--width", type=click.IntRange(8, 1000), default=None, help="Columns of the terminal picture.")
@options.tau
@options.block
@options.estimator
@options.query_stride
@options.backend
@options.as_json
@options.output
def mask_dump(file, sample, heads, form, width, tau, block, estimator, query_stride, backend, as_json, output) -> None:
    """Draw or save the block mask of q, k, v (FILE: .safetensors or .npz) or a mask file (.npz).

    A cell that stands for several blocks shows their density, and is never blank when one of them is set.
    """
    if sample == (file is not None):
        raise click.UsageError("give either FILE or --sample")
    if form != "term" and not output:
        raise click.UsageError(f"--format {form} needs -o FILE")
    mask, source = _load_or_compute(file, tau, block, estimator, query_stride, backend)
    num_heads = mask.words.shape[0] * mask.words.shape[1]
    for head in heads:
        if head >= num_heads:
            raise click.UsageError(f"--head {head}: there are heads 0 to {num_heads - 1}")
    chosen = list(heads) or list(range(num_heads))
    density = mask.density().ravel()
    metadata = {"source": source, "tau": tau, "estimator": estimator, "query_stride": query_stride}
    if form == "npz":
        mask.save_npz(output, metadata)
    elif form == "png":
        dense = mask.to_dense().reshape(num_heads, mask.num_q_blocks, mask.num_k_blocks)
        pictures = [_cells(dense[h], mask.visible(), MAX_PNG, MAX_PNG) for h in chosen]
        gap = np.full((4, pictures[0].shape[1]), np.nan)
        stacked = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1])
        Path(output).write_bytes(encode_png(render.ramp(stacked)))
    if output:
        render.note(f"wrote {output}")
    if as_json:
        render.print_json(
            {
                "schema": 1,
                "kind": "salekit-mask",
                **metadata,
                "tau": tau if np.isfinite(tau) else "inf",
                "block": [mask.block_q, mask.block_k],
                "seqlen_q": mask.seqlen_q,
                "seqlen_k": mask.seqlen_k,
                "causal": mask.causal,
                "heads": chosen,
                "density": [float(density[h]) for h in chosen],
            }
        )
    elif form == "term":
        _draw(mask, chosen, num_heads, density, width or max(8, min(96, render.terminal_width())))


def _load_or_compute(file, tau, block, estimator, query_stride, backend):
    """(mask on the host, where it is from)."""
    from salekit.attention import sparse_attention
    from salekit.block_mask import BlockMask
    from salekit.data_files import load_qkv, load_sample

    if file is not None and file.endswith(".npz") and not _holds_qkv(file):
        return BlockMask.load_npz(file), Path(file).name
    if file is None:
        sample = load_sample()
        q, k, v, source = sample["q"], sample["k"], sample["v"], "built-in sample"
    else:
        (q, k, v, _), source = load_qkv(file), Path(file).name
    if backend != "numpy":
        try:
            from salekit.jit import device_arch

            device_arch()
            import cupy

            q, k, v = (cupy.asarray(x) for x in (q, k, v))
        except GpuError:
            if backend == "cuda":
                raise
            render.note("no usable GPU: the NumPy twin computes the mask")
    mask = sparse_attention(
        q,
        k,
        v,
        thresholds=tau,
        block=block,
        estimator=estimator,
        query_stride=query_stride,
        dense_below=0,
        return_mask=True,
    )[1]
    return mask.to_numpy(), source


def _holds_qkv(file: str) -> bool:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {"q", "k", "v"} <= set(archive.files)
    except Exception:
        return False  # the mask reader says what is wrong with it


def _cells(bits: np.ndarray, visible: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
    """Density of the visible blocks of each cell, NaN where none is; a cell with a set block is at least 0.15."""
    rows, columns = min(bits.shape[0], max_rows), min(bits.shape[1], max_columns)

    def pool(values: np.ndarray) -> np.ndarray:
        row_edges = np.arange(rows) * bits.shape[0] // rows
        column_edges = np.arange(columns) * bits.shape[1] // columns
        return np.add.reduceat(np.add.reduceat(values.astype(np.int64), row_edges, 0), column_edges, 1)

    set_blocks, seen = pool(bits), pool(visible)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.where(seen > 0, set_blocks / seen, np.nan)
    return np.where(set_blocks > 0, np.maximum(density, 0.15), density)


def _draw(mask, chosen, num_heads, density, width) -> None:
    dense = mask.to_dense().reshape(num_heads, mask.num_q_blocks, mask.num_k_blocks)
    visible = mask.visible()
    for head in chosen:
        render.text(
            f"head {head}: {mask.seqlen_q} x {mask.seqlen_k} tokens, blocks {mask.block_q}x{mask.block_k}, "
            f"density {density[head]:.4f}"
        )
        render.heat_map(_cells(dense[head], visible, max(4, width // 2), width))


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
