"""salekit mask-dump: look at a block mask, compare two, or save one in the form that something else reads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import click
import numpy as np

from . import backends, options, render

PICTURES = ("term", "png", "svg", "html")
LISTS = ("csr", "flex", "flashinfer", "fa4")
TAU_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of --tau, for --overlay tau


@click.command("mask-dump")
@click.argument("file", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--sample", is_flag=True, help="The built-in real sample instead of a file.")
@click.option(
    "--head", "heads", type=click.IntRange(min=0), multiple=True, help="Head to draw, repeatable. Default: all."
)
@click.option(
    "--format",
    "form",
    type=click.Choice([*PICTURES, "npz", *LISTS]),
    default="term",
    show_default=True,
    help="Pictures, the packed mask, or index lists: CSR, FlexAttention, FlashInfer, FlashAttention-4 (all npz).",
)
@click.option(
    "--overlay",
    type=click.Choice(["none", "anchors", "diagonal", "tau"]),
    default="none",
    show_default=True,
    help="Colour anchors, partial blocks, or what stays selected at tau / 4 to 4 tau.",
)
@click.option(
    "--diff", "other_file", type=click.Path(exists=True, dir_okay=False), help="Compare with this mask (npz)."
)
@click.option(
    "--diff-estimator",
    type=click.Choice(["int4", "int8", "int8-sp24"]),
    help="Compare with the mask of another estimator.",
)
@click.option("--width", type=click.IntRange(8, 1000), default=None, help="Columns of the terminal picture.")
@options.tau
@options.block
@options.estimator
@options.query_stride
@options.backend
@click.option("--force", is_flag=True, help="Overwrite an output that exists.")
@options.as_json
@options.output
def mask_dump(
    file, sample, heads, form, overlay, other_file, diff_estimator, width, tau, block, estimator, query_stride, backend,
    force, as_json, output,
) -> None:
    """Draw or save the block mask of q, k, v (FILE: .safetensors or .npz) or a mask file (.npz).

    A cell that stands for several blocks shows their density, and is never blank when one of them is set. Several heads
    make a contact sheet (png, svg) or a list to choose from (html, one file that needs no network).
    """
    if sample == (file is not None):
        raise click.UsageError("give either FILE or --sample")
    if form != "term" and not output:
        raise click.UsageError(f"--format {form} needs -o FILE")
    if output and not force and Path(output).exists():
        raise click.UsageError(f"{output} exists; --force overwrites it")
    if sum((overlay != "none", other_file is not None, diff_estimator is not None)) > 1:
        raise click.UsageError("--overlay, --diff and --diff-estimator exclude each other")
    if (overlay != "none" or other_file or diff_estimator) and form not in PICTURES:
        raise click.UsageError(f"--format {form} holds one mask; overlays and differences are for pictures")
    source = _Source(file, block, query_stride, backend)
    if source.is_mask and (overlay == "tau" or diff_estimator):
        raise click.UsageError(f"{file} is a mask: --overlay tau and --diff-estimator need q, k and v")

    mask, *masks = source.masks(estimator, [tau, *([tau * x for x in TAU_STEPS] if overlay == "tau" else [])])
    other = None
    if other_file:
        other = _load_mask(other_file)
    elif diff_estimator:
        (other,) = source.masks(diff_estimator, [tau])
    if other is not None and _shape(other) != _shape(mask):
        raise click.UsageError(f"the masks differ in shape: {_shape(mask)} and {_shape(other)} (heads, tokens, blocks)")
    num_heads = mask.words.shape[0] * mask.words.shape[1]
    for head in heads:
        if head >= num_heads:
            raise click.UsageError(f"--head {head}: there are heads 0 to {num_heads - 1}")
    chosen = list(heads) or list(range(num_heads))
    metadata = {"source": source.name, "tau": tau, "estimator": estimator, "query_stride": query_stride}

    scores = source.scores(estimator) if form == "html" else None
    drawing = _drawing(mask, source.labels(num_heads), overlay, masks, tau, other, scores)
    title = f"{source.name}: {mask.seqlen_q} x {mask.seqlen_k} tokens, blocks {mask.block_q}x{mask.block_k}"
    if output:
        _save(Path(output), form, mask, drawing, chosen, title, metadata)
        render.note(f"wrote {output}")
    if as_json:
        render.print_json(_summary(mask, drawing, chosen, metadata))
    elif form == "term":
        _draw(mask, drawing, chosen, width or max(8, min(96, render.terminal_width())))


class _Source:
    """Where masks come from: a mask file, or q, k and v."""

    def __init__(self, file: str | None, block: tuple[int, int], query_stride: int, backend: str):
        self.file, self.block, self.query_stride, self.backend = file, block, query_stride, backend
        self.name = "built-in sample" if file is None else Path(file).name
        self.is_mask = file is not None and file.endswith(".npz") and not _holds_qkv(file)

    def labels(self, num_heads: int) -> list[str]:
        """A mask file's own names, where it has one for each head."""
        if self.is_mask:
            with np.load(self.file, allow_pickle=False) as archive:
                names = [name for name in archive.files if name != "__meta__"]
            if len(names) == num_heads and not all(name == f"h{i}" for i, name in enumerate(names)):
                return names
        return [f"head {head}" for head in range(num_heads)]

    def masks(self, estimator: str, taus: list[float]) -> list[Any]:
        """A mask on the host for each tau; a mask file is what it is."""
        if self.is_mask:
            return [_load_mask(self.file)]
        import salekit

        _, _, plan, codes, statistics = self._prepared(estimator)
        masks = []
        for tau in taus:
            limits = salekit.row_limits(*statistics, codes, float(tau), plan)
            masks.append(salekit.estimate(codes, limits, plan).to_numpy())
        return masks

    def scores(self, estimator: str) -> Callable[[int], np.ndarray] | None:
        """Block scores of a head, counted through the batches: float32 [num_q_blocks, num_k_blocks]. A mask: None."""
        if self.is_mask:
            return None
        import salekit

        q, k, plan, codes, statistics = self._prepared(estimator)
        wanted = salekit.scores_plan(plan)
        if wanted is not plan:
            codes = salekit.quantize(q, k, wanted)
        scores = salekit.block_scores(codes, *statistics, wanted)

        def of_head(head: int) -> np.ndarray:
            one = scores[divmod(head, plan.num_heads)]
            return one if isinstance(one, np.ndarray) else one.get()

        return of_head

    @lru_cache(maxsize=2)
    def _prepared(self, estimator: str) -> tuple[Any, ...]:
        """q, k, plan, codes, anchor statistics."""
        import salekit
        from salekit.data_files import load_qkv, load_sample

        q, k, v = load_sample().values() if self.file is None else load_qkv(self.file)[:3]
        if backends.use_gpu(self.backend, "the NumPy twin computes the mask"):
            q, k, v = backends.on_gpu(q, k, v)
        plan = salekit.make_plan(
            q, k, v, block=self.block, estimator=estimator, query_stride=self.query_stride, dense_below=0
        )
        codes = salekit.quantize(q, k, plan)
        return q, k, plan, codes, salekit.anchor_statistics(q, k, codes.k_mean, plan)


def _load_mask(file: str):
    from salekit.block_mask import BlockMask

    return BlockMask.load_npz(file)


def _holds_qkv(file: str) -> bool:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {"q", "k", "v"} <= set(archive.files)
    except Exception:
        return False  # the mask reader says what is wrong with it


def _shape(mask) -> tuple[int, ...]:
    return (*mask.words.shape[:2], mask.seqlen_q, mask.seqlen_k, mask.block_q, mask.block_k)


# --- what is drawn -------------------------------------------------------------------------------------------------
def _drawing(mask, labels: list[str], overlay: str, tau_masks: list[Any], tau: float, other, scores):
    from salekit import mask_lists

    from . import mask_pictures as pictures

    density = mask.density().ravel()
    labels = [f"{label}, density {density[i]:.4f}" for i, label in enumerate(labels)]
    layers, kinds = pictures.SELECTED, lambda bits, head: bits.astype(np.uint8)
    if other is not None:
        layers, kinds = pictures.DIFFERENCE, _differences(other)
    elif overlay == "anchors":
        anchors = _anchors(mask)
        layers, kinds = pictures.ANCHORS, lambda bits, head: bits * np.where(anchors, 2, 1).astype(np.uint8)
    elif overlay == "diagonal":
        full = mask_lists.full_blocks(mask)
        layers, kinds = pictures.DIAGONAL, lambda bits, head: bits * np.where(full, 1, 2).astype(np.uint8)
    elif overlay == "tau":
        layers = pictures.tau_layers([tau * step for step in TAU_STEPS])
        kinds = lambda bits, head: sum(_head(m, head).astype(np.uint8) for m in tau_masks)  # noqa: E731
    return pictures.Drawing(
        layers, lambda head: kinds(_head(mask, head), head), labels, mask.visible(), mask.block_q, mask.block_k,
        mask.seqlen_q, mask.seqlen_k, scores,
    )


def _head(mask, head: int) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks] of one head, counted through the batches."""
    from salekit.block_mask import BlockMask

    batch, index = divmod(head, mask.words.shape[1])
    words = mask.words[batch : batch + 1, index : index + 1]
    one = BlockMask(words, mask.block_q, mask.block_k, mask.seqlen_q, mask.seqlen_k, mask.causal)
    return one.to_dense()[0, 0]


def _differences(other) -> Callable[[np.ndarray, int], np.ndarray]:
    def kinds(bits: np.ndarray, head: int) -> np.ndarray:
        second = _head(other, head)
        return np.where(bits & second, 1, np.where(bits, 2, np.where(second, 3, 0))).astype(np.uint8)

    return kinds


def _anchors(mask) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks]: blocks that hold an anchor by the default sink and local range."""
    from salekit import reference
    from salekit.plans import Plan

    plan = Plan(
        1, mask.seqlen_q, mask.seqlen_k, 1, 1, 128, "bfloat16", 1.0, block_q=mask.block_q, block_k=mask.block_k,
        causal=mask.causal,
    )
    return reference.fold_blocks(reference.anchor_blocks(plan)[None, None], plan)[0, 0]


# --- results -------------------------------------------------------------------------------------------------------
def _save(path: Path, form: str, mask, drawing, chosen: list[int], title: str, metadata: dict[str, Any]) -> None:
    from salekit import mask_lists

    from . import mask_pictures as pictures

    if form == "npz":
        mask.save_npz(path, metadata)
    elif form == "png" or form == "term":
        path.write_bytes(pictures.encode_png(pictures.sheet(drawing, chosen)))
    elif form == "svg":
        path.write_text(pictures.encode_svg(drawing, chosen, title), encoding="utf-8")
    elif form == "html":
        path.write_text(pictures.encode_html(drawing, chosen, title), encoding="utf-8")
    else:
        lists = {
            "csr": mask_lists.to_csr,
            "flex": mask_lists.to_flex_attention,
            "fa4": mask_lists.to_flash_attention_4,
            "flashinfer": _flashinfer_arrays,
        }[form](mask)
        with open(path, "wb") as file:  # a name without .npz stays what it is
            np.savez_compressed(file, block=np.array([mask.block_q, mask.block_k]), **lists)


def _flashinfer_arrays(mask) -> dict[str, np.ndarray]:
    """A BSR matrix a head: h0_indptr, h0_indices, h1_indptr, ..."""
    from salekit import mask_lists

    return {
        f"h{head}_{name}": array
        for head, lists in enumerate(mask_lists.to_flashinfer(mask))
        for name, array in lists.items()
    }


def _summary(mask, drawing, chosen: list[int], metadata: dict[str, Any]) -> dict[str, Any]:
    density, tau = mask.density().ravel(), metadata["tau"]
    summary = {
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
    if len(drawing.layers) > 1:
        counts = [np.bincount(drawing.kinds(h).ravel(), minlength=len(drawing.layers) + 1)[1:] for h in chosen]
        summary["blocks"] = {
            layer.name: [int(count[i]) for count in counts] for i, layer in enumerate(drawing.layers)
        }
    return summary


def _draw(mask, drawing, chosen: list[int], width: int) -> None:
    from . import mask_pictures as pictures

    for head in chosen:
        render.text(
            f"{drawing.labels[head].split(',')[0]}: {mask.seqlen_q} x {mask.seqlen_k} tokens, "
            f"blocks {mask.block_q}x{mask.block_k},{drawing.labels[head].split(',', 1)[1]}"
        )
        rows = max(4, width // 2)
        if len(drawing.layers) == 1:
            render.heat_map(pictures.cells(drawing.kinds(head), drawing.visible, rows, width))
            continue
        counts = np.bincount(drawing.kinds(head).ravel(), minlength=len(drawing.layers) + 1)[1:]
        for layer, count in zip(drawing.layers, counts):
            render.text(f"  {layer.name}: {count} blocks")
        render.picture(pictures.head_picture(drawing, head, rows, width))
