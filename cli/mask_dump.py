"""salekit mask-dump: look at a block mask, compare two, or save one in the form that something else reads."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Callable

import click
import numpy as np

from salekit.errors import escaped
from salekit.written_files import write, writing

from . import backends, options, render

PICTURES = ("term", "png", "svg", "html")
SHEETS = ("png", "svg", "html")  # what draws several layers
SUFFIXES = {".png": "png", ".svg": "svg", ".html": "html", ".npz": "npz"}  # of an output, and what they stand for
LISTS = ("csr", "flex", "flashinfer", "fa4")
TAU_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of --tau, for --overlay tau


@click.command("mask-dump")
@click.argument("file", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--sample", is_flag=True, help="The built-in real sample instead of a file.")
@click.option(
    "--head", "heads", type=click.IntRange(min=0), multiple=True, help="Head to draw, repeatable. Default: all."
)
@click.option(
    "--layer",
    "layers",
    type=click.IntRange(min=0),
    multiple=True,
    help="Layer of a file that holds several, repeatable (png, svg, html). Default: all.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice([*PICTURES, "npz", *LISTS]),
    default=None,
    help="Pictures, the packed mask, or index lists: CSR, FlexAttention, FlashInfer, FlashAttention-4 (all npz).  "
    "[default: what OUT's suffix says; term without -o]",
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
@options.force
@options.as_json
@options.output
def mask_dump(
    file, sample, heads, layers, form, overlay, other_file, diff_estimator, width, tau, block, estimator, query_stride,
    backend, force, as_json, output,
) -> None:
    """Draw or save the block mask of q, k, v (FILE: .safetensors or .npz) or a mask file (.npz).

    A cell that stands for several blocks shows their density, and is never blank when one of them is set. Several heads
    make a contact sheet (png, svg) or a list to choose from (html, one file that needs no network); so do several
    layers, a row each. The other formats hold one layer. A mask file is what it is: --tau, --block, --estimator,
    --query-stride and --backend are for q, k and v.
    """
    if sample == (file is not None):
        raise click.UsageError("give either FILE or --sample")
    options.check_output("-o", output, file, other_file, force=force)
    form = _format(form, output)
    if form != "term" and not output:
        raise click.UsageError(f"--format {form} needs -o FILE")
    if sum((overlay != "none", other_file is not None, diff_estimator is not None)) > 1:
        raise click.UsageError("--overlay, --diff and --diff-estimator exclude each other")
    if (overlay != "none" or other_file or diff_estimator) and form not in PICTURES:
        raise click.UsageError(f"--format {form} holds one mask; overlays and differences are for pictures")
    source = _Source(file, block, query_stride, backend)
    source.choose(layers, heads, f"--format {form}" if form not in SHEETS else other_file and "--diff")
    if source.is_mask and (overlay == "tau" or diff_estimator):
        raise click.UsageError(f"{file} is a mask: --overlay tau and --diff-estimator need q, k and v")
    if source.is_mask:
        options.refuse(("tau", "block", "estimator", "query_stride", "backend"), f"{file} is a mask, which has its own")

    mask, *masks = source.masks(estimator, [tau, *([tau * x for x in TAU_STEPS] if overlay == "tau" else [])])
    other = None
    if other_file:
        other = _load_mask(other_file)
    elif diff_estimator:
        (other,) = source.masks(diff_estimator, [tau])
    if other is not None and _shape(other) != _shape(mask):
        raise click.UsageError(f"the masks differ in shape: {_shape(mask)} and {_shape(other)} (heads, tokens, blocks)")
    if other is not None and _sight(other) != _sight(mask):
        raise click.UsageError(f"the masks differ in what rows see: {_sight(mask)} and {_sight(other)}")
    chosen, labels = source.panels()
    metadata = source.metadata(tau, estimator, query_stride)

    scores = source.scores(estimator) if form == "html" else None
    drawing = _drawing(mask, labels, overlay, masks, tau, other, scores, source.rows)
    title = f"{source.title}: {mask.seqlen_q} x {mask.seqlen_k} tokens, blocks {mask.block_q}x{mask.block_k}"
    if output:
        held, about = (mask, metadata) if form in PICTURES else _of_heads(mask, chosen, metadata)
        _save(Path(output), form, held, drawing, chosen, title, about)
        render.note(f"wrote {output}")
    if as_json:
        render.print_json(_summary(mask, drawing, chosen, metadata, source))
    elif form == "term":
        _draw(mask, drawing, chosen, width or max(8, min(96, render.terminal_width())))


class _Source:
    """Where masks come from: a mask file, or q, k and v of one or several layers, of which one is held at a time.

    The heads of several layers are counted through: those of the first layer, those of the second, and so on.
    """

    def __init__(self, file: str | None, block: tuple[int, int], query_stride: int, backend: str):
        self.file, self.block, self.query_stride, self.backend = file, block, query_stride, backend
        self.name = "built-in sample" if file is None else escaped(Path(file).name)
        self.is_mask = file is not None and file.endswith(".npz") and not _holds_qkv(file)
        self.held: dict[tuple[str, str], Any] = {}

    def choose(self, layers: tuple[int, ...], heads: tuple[int, ...], of_one_layer: str | None) -> None:
        """Which layers and heads are wanted. of_one_layer: the option that takes no more than one. click.UsageError."""
        shapes = self._shapes()
        missing = [str(layer) for layer in layers if str(layer) not in shapes]
        if missing:
            raise click.UsageError(f"--layer {missing[0]}: {self.name} holds {', '.join(shapes)}")
        self.layers = list(dict.fromkeys(map(str, layers))) or list(shapes)
        self.several = len(self.layers) > 1
        if self.several and of_one_layer:
            raise click.UsageError(
                f"{of_one_layer} takes one layer, not {', '.join(self.layers)} of {self.name}; --layer chooses one"
            )
        if len({shapes[layer] for layer in self.layers}) > 1:
            raise click.UsageError(f"{self.name}: the layers differ in shape; --layer chooses those that are alike")
        for layer in self.layers:
            if any(0 in shape for shape in shapes[layer]):
                raise click.UsageError(f"{self.name} {self._sizes(shapes[layer])}: there is nothing to draw")
        (batch, *_, self.heads_a_batch, _) = shapes[self.layers[0]][0]
        self.num_heads = batch * self.heads_a_batch
        for head in heads:
            if head >= self.num_heads:
                raise click.UsageError(f"--head {head}: there are heads 0 to {self.num_heads - 1}")
        self.heads = list(heads) or list(range(self.num_heads))
        self.rows = tuple(f"layer {layer}" for layer in self.layers) if self.several else ()
        self.layer = {"layer": self.layers[0]} if len(shapes) > 1 and not self.several else {}
        self.title = self.name
        if len(shapes) > 1:
            self.title += f", {len(self.rows)} layers" if self.several else f", layer {self.layers[0]}"

    def _shapes(self) -> dict[str, tuple[Any, ...]]:
        """Shapes of q and k by layer; a mask is layer 0, and has (batch, rows, heads, keys)."""
        if self.is_mask:
            mask = _load_mask(self.file)
            batch, heads, *_ = mask.words.shape
            return {"0": ((batch, mask.seqlen_q, heads, mask.seqlen_k),)}
        from salekit.data_files import iter_layers, load_sample

        if self.file is None:
            sample = load_sample()
            return {"0": (sample["q"].shape, sample["k"].shape)}
        return {layer: (q.shape, k.shape) for layer, (q, k, *_) in iter_layers(self.file)}

    def _sizes(self, shapes: tuple[Any, ...]) -> str:
        if self.is_mask:
            return "is a mask of batch {}, {} rows, {} heads and {} keys".format(*shapes[0])
        return "has shapes {} and {}".format(*shapes)

    def metadata(self, tau: float, estimator: str, query_stride: int) -> dict[str, Any]:
        """What the masks were made with; of a mask file that is what it says."""
        if not self.is_mask:
            from salekit.jit import device_arch
            from salekit.plans import resolve_estimator

            estimator = resolve_estimator(estimator, device_arch() if self._use_gpu else None)
            made_with = {"tau": tau, "estimator": estimator, "query_stride": query_stride}
            return {"source": self.name, **self.layer, **made_with}
        from salekit.untrusted_files import Npz

        with Npz(self.file) as archive:
            return {"source": self.name, **archive.metadata()}

    def panels(self) -> tuple[list[int], list[str]]:
        """(the heads to draw, a label for every head), counted through the layers."""
        if not self.several:
            return self.heads, self._labels()
        labels = [f"{row}, head {head}" for row in self.rows for head in self.heads]
        return list(range(len(labels))), labels

    def numbers(self, chosen: list[int]) -> dict[str, Any]:
        """Of the heads in a summary; of several layers, the layer of each, too."""
        if not self.several:
            return {"heads": chosen}
        return {
            "layers": [layer for layer in self.layers for _ in self.heads],
            "heads": self.heads * len(self.layers),
        }

    def _labels(self) -> list[str]:
        """A mask file's own names, where it has one for each head."""
        if self.is_mask:
            from salekit.block_mask import head_name
            from salekit.untrusted_files import Npz

            with Npz(self.file) as archive:
                names = archive.names
            batches = range(self.num_heads // self.heads_a_batch)
            own = [head_name(b, h, len(batches)) for b in batches for h in range(self.heads_a_batch)]
            if len(names) == self.num_heads and (len(batches) > 1 or set(names) != set(own)):
                return own if set(names) == set(own) else [escaped(name) for name in names]
        return [f"head {head}" for head in range(self.num_heads)]

    def masks(self, estimator: str, taus: list[float]) -> list[Any]:
        """A mask on the host for each tau; a mask file is what it is. Several layers lie one after another."""
        if self.is_mask:
            return [_load_mask(self.file)]
        of_layers = [self._masks_of(layer, estimator, taus) for layer in self.layers]
        if not self.several:
            return of_layers[0]
        return [replace(of[0], words=np.concatenate([mask.words for mask in of])) for of in zip(*of_layers)]

    def _masks_of(self, layer: str, estimator: str, taus: list[float]) -> list[Any]:
        import salekit

        _, _, plan, codes, statistics = self._prepared(layer, estimator)
        masks = []
        for tau in taus:
            limits = salekit.row_limits(*statistics, codes, options.rounded(tau), plan)
            masks.append(salekit.estimate(codes, limits, plan).to_numpy())
        return masks

    def scores(self, estimator: str) -> Callable[[int], np.ndarray] | None:
        """Block scores of a head, counted through: float32 [num_q_blocks, num_k_blocks]. A mask: None."""
        if self.is_mask:
            return None
        held: dict[str, Any] = {}

        def of_head(head: int) -> np.ndarray:
            index, head = divmod(head, len(self.heads)) if self.several else (0, head)
            layer = self.layers[index]
            if layer not in held:
                held.clear()
                held[layer] = self._scores_of(layer, estimator)
            scores = held[layer]
            one = scores[divmod(head, scores.shape[1])]
            return one if isinstance(one, np.ndarray) else one.get()

        return of_head

    def _scores_of(self, layer: str, estimator: str):
        import salekit

        q, k, plan, codes, statistics = self._prepared(layer, estimator)
        wanted = salekit.scores_plan(plan)
        if wanted is not plan:
            codes = salekit.quantize(q, k, wanted)
        return salekit.block_scores(codes, *statistics, wanted)

    def _prepared(self, layer: str, estimator: str) -> tuple[Any, ...]:
        """q, k, plan, codes, anchor statistics. What another layer had is let go first."""
        if (layer, estimator) not in self.held:
            self.held = {key: value for key, value in self.held.items() if key[0] == layer}
            self.held[layer, estimator] = self._prepare(layer, estimator)
        return self.held[layer, estimator]

    def _prepare(self, layer: str, estimator: str) -> tuple[Any, ...]:
        import salekit

        q, k, v = self._load(layer)
        if self._use_gpu:
            q, k, v = backends.on_gpu(q, k, v)
        plan = options.make_plan(
            q, k, v, block=self.block, estimator=estimator, query_stride=self.query_stride, dense_below=0
        )
        codes = salekit.quantize(q, k, plan)
        return q, k, plan, codes, salekit.anchor_statistics(q, k, codes.k_mean, plan)

    @cached_property
    def _use_gpu(self) -> bool:
        return backends.use_gpu(self.backend, "the NumPy twin computes the mask")

    def _load(self, layer: str) -> tuple[np.ndarray, ...]:
        """q, k and v; of several layers, only what the chosen heads need."""
        from salekit.data_files import iter_layers, load_sample

        if self.file is None:
            return tuple(load_sample().values())
        (_, (q, k, v, _)), = iter_layers(self.file, layer)
        if not self.several or self.heads == list(range(self.num_heads)):
            return q, k, v
        size = self.heads_a_batch // k.shape[2]
        at = [divmod(head, self.heads_a_batch) for head in self.heads]
        chosen = [[q[batch, :, head] for batch, head in at]]
        chosen += [[x[batch, :, head // size] for batch, head in at] for x in (k, v)]
        return tuple(np.stack(heads, axis=1)[None] for heads in chosen)


def _format(form: str | None, output: str | None) -> str:
    """What to make: by the output's suffix where --format does not say. click.UsageError."""
    if form is None and output:
        form = SUFFIXES.get(Path(output).suffix.lower())
        if form is None:
            raise click.UsageError(f"-o {output}: no format has this suffix; wants --format, or {', '.join(SUFFIXES)}")
    if form == "term" and output:
        raise click.UsageError("--format term is for the terminal; -o wants another")
    return form or "term"


def _load_mask(file: str):
    from salekit.block_mask import BlockMask

    return BlockMask.load_npz(file)


def _holds_qkv(file: str) -> bool:
    from salekit.untrusted_files import Npz

    with Npz(file) as archive:
        return {"q", "k", "v"} <= {name.rpartition(".")[2] for name in archive.names}


def _shape(mask) -> tuple[int, ...]:
    return (*mask.words.shape[:2], mask.seqlen_q, mask.seqlen_k, mask.block_q, mask.block_k)


def _sight(mask) -> str:
    """What the rows see, however it was said."""
    left, right = mask.window_left, 0 if mask.causal else mask.window_right
    left, right = (-1 if x >= most else x for x, most in ((left, mask.seqlen_k - 1), (right, mask.seqlen_q - 1)))
    return ("causal" if right == 0 else "not causal") + (f", window {(left, right)}" if left >= 0 or right > 0 else "")


# --- what is drawn -------------------------------------------------------------------------------------------------
def _drawing(mask, labels: list[str], overlay: str, tau_masks: list[Any], tau: float, other, scores, rows):
    from salekit import mask_lists

    from . import mask_pictures as pictures

    density = mask.density().ravel()
    labels = [f"{label}, density {density[i]:.4f}" for i, label in enumerate(labels)]
    layers, kinds = pictures.SELECTED, lambda bits, head: bits.view(np.uint8)
    if other is not None:
        layers, kinds = pictures.DIFFERENCE, _differences(other)
    elif overlay == "anchors":
        anchors = _anchors(mask)
        layers, kinds = pictures.ANCHORS, lambda bits, head: bits * (1 + anchors.view(np.uint8))
    elif overlay == "diagonal":
        full = mask_lists.full_blocks(mask)
        layers, kinds = pictures.DIAGONAL, lambda bits, head: bits * (2 - full.view(np.uint8))
    elif overlay == "tau":
        layers = pictures.tau_layers([tau * step for step in TAU_STEPS])
        kinds = lambda bits, head: sum(_head(m, head).astype(np.uint8) for m in tau_masks)  # noqa: E731
    return pictures.Drawing(
        layers, lambda head: kinds(_head(mask, head), head), labels, mask.visible(), mask.block_q, mask.block_k,
        mask.seqlen_q, mask.seqlen_k, scores, rows,
    )


def _head(mask, head: int) -> np.ndarray:
    """bool [num_q_blocks, num_k_blocks] of one head, counted through the batches."""

    batch, index = divmod(head, mask.words.shape[1])
    words = mask.words[batch : batch + 1, index : index + 1]
    one = replace(mask, words=words)
    return one.to_dense()[0, 0]


def _differences(other) -> Callable[[np.ndarray, int], np.ndarray]:
    def kinds(bits: np.ndarray, head: int) -> np.ndarray:
        first, second = bits.view(np.uint8), _head(other, head).view(np.uint8)
        return 2 * first + 3 * second - 4 * (first & second)  # in both: 1

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
        with writing(path) as file:
            mask.save_npz(file, metadata)
    elif form == "png":
        write(path, pictures.encode_png(pictures.sheet(drawing, chosen)))
    elif form == "svg":
        write(path, pictures.encode_svg(drawing, chosen, title))
    elif form == "html":
        write(path, pictures.encode_html(drawing, chosen, title))
    else:
        lists = {
            "csr": mask_lists.to_csr,
            "flex": mask_lists.to_flex_attention,
            "fa4": mask_lists.to_flash_attention_4,
            "flashinfer": _flashinfer_arrays,
        }[form](mask)
        with writing(path) as file:
            np.savez_compressed(file, block=np.array([mask.block_q, mask.block_k]), **lists)


def _flashinfer_arrays(mask) -> dict[str, np.ndarray]:
    """A BSR matrix a head: h0_indptr, h0_indices, h1_indptr, ..."""
    from salekit import mask_lists

    return {
        f"h{head}_{name}": array
        for head, lists in enumerate(mask_lists.to_flashinfer(mask))
        for name, array in lists.items()
    }


def _of_heads(mask, heads: list[int], metadata: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(these heads alone, as one batch; metadata that say which they were)."""
    words = mask.words.reshape(-1, *mask.words.shape[2:])
    if heads == list(range(len(words))):
        return mask, metadata
    before = metadata.get("heads")  # of a mask file that holds some heads of another
    if isinstance(before, list) and len(before) == len(words):
        return replace(mask, words=words[heads][None]), {**metadata, "heads": [before[head] for head in heads]}
    return replace(mask, words=words[heads][None]), {**metadata, "heads": heads}


def _plain(value: Any) -> Any:
    """A text or a number as JSON has it; None for what else a file may say."""
    if isinstance(value, float) and not np.isfinite(value):
        return "inf" if value > 0 else None  # JSON has no infinity
    return value if isinstance(value, (str, int, float)) else None


def _summary(mask, drawing, chosen: list[int], metadata: dict[str, Any], source) -> dict[str, Any]:
    density = mask.density().ravel()
    names = ("source", *(("layer",) if "layer" in metadata else ()), "tau", "estimator", "query_stride")
    summary = {
        "schema": 1,
        "kind": "salekit-mask",
        **{name: _plain(metadata.get(name)) for name in names},
        "block": [mask.block_q, mask.block_k],
        "seqlen_q": mask.seqlen_q,
        "seqlen_k": mask.seqlen_k,
        "causal": mask.causal,
        **source.numbers(chosen),
        "density": [float(density[h]) for h in chosen],
    }
    if len(drawing.layers) > 1:
        counts = [_counts(drawing, h) for h in chosen]
        summary["blocks"] = {
            layer.name: [count[i] for count in counts] for i, layer in enumerate(drawing.layers)
        }
    return summary


def _counts(drawing, head: int) -> list[int]:
    """Blocks of each layer."""
    kinds = drawing.kinds(head)
    return [int(np.count_nonzero(kinds == 1 + i)) for i in range(len(drawing.layers))]


def _draw(mask, drawing, chosen: list[int], width: int) -> None:
    from . import mask_pictures as pictures

    for head in chosen:
        name, density = drawing.labels[head].rsplit(",", 1)
        render.text(
            f"{name}: {mask.seqlen_q} x {mask.seqlen_k} tokens, blocks {mask.block_q}x{mask.block_k},{density}"
        )
        rows = max(4, width // 2)
        if len(drawing.layers) == 1:
            render.heat_map(pictures.cells(drawing.kinds(head), drawing.visible, rows, width))
            continue
        names = [f"{layer.name}: {count} blocks" for layer, count in zip(drawing.layers, _counts(drawing, head))]
        render.legend(names, [layer.colour for layer in drawing.layers])
        render.kinds(
            pictures.head_kinds(drawing, head, rows, width), pictures.head_picture(drawing, head, rows, width)
        )
