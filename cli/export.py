"""salekit export: kernels and a C host side, for programs without Python."""

from __future__ import annotations

import click

from salekit.plans import BLOCKS, ESTIMATORS, HEAD_DIMS, SUPPORTED_ARCHS

from . import options, render

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}


@click.command("export")
@click.option("--arch", type=click.Choice(SUPPORTED_ARCHS), required=True, help="The GPUs' architecture.")
@click.option(
    "--head-dim", type=click.Choice([str(x) for x in HEAD_DIMS]), default="128", show_default=True, help="Of q, k, v."
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of q, k, v and the output."
)
@click.option(
    "--estimator", "estimators", type=click.Choice(ESTIMATORS), multiple=True, help="May be repeated; default: all."
)
@click.option("--block", "blocks", type=options.BLOCK, multiple=True, help="May be repeated; default: all.")
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False), required=True, help="New or empty folder to write to."
)
@click.option("--force", is_flag=True, help="Replace an earlier export in that folder, and write over other files.")
@options.as_json
def export(
    arch: str, head_dim: str, dtype: str, estimators: tuple, blocks: tuple, folder: str, force: bool, as_json: bool
) -> None:
    """Write cubins, a C host side and a CMake project that runs sparse attention without Python.

    The programs need the CUDA driver alone. Any batch, lengths, heads, strides and query stride; no GPU is needed here.
    """
    from salekit import export as exports

    options.check_folder("-o", folder)
    target = exports.Target(
        arch, int(head_dim), DTYPES[dtype], estimators or ESTIMATORS, tuple(map(tuple, blocks)) or BLOCKS
    )
    with render.progress(f"compiling {target.tag}", len(target.specs())) as advance:
        report = exports.export(folder, target, force, advance)
    if as_json:
        render.print_json(report)
        return
    columns = ["kernel", "registers", "shared KiB"]
    rows = [
        [x["name"], x["registers"], f"{(x['dynamic_shared_bytes'] + x['static_shared_bytes']) / 1024:.1f}"]
        for x in report["kernels"]
    ]
    render.table(f"{len(rows)} kernels for {arch}, NVRTC {report['nvrtc']}, in {folder}", columns, rows)
    render.text(f"Build: cmake -B {folder}/build {folder} && cmake --build {folder}/build")
