"""A case's calls of the library: arrays laid out as it says, results brought back to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import salekit

from .. import arrays
from ..arrays import LAYOUTS
from ..plans import LOW_BIT_ARCHS, Plan
from .cases import Case

POISON = 0xFF  # bytes of memory that a call has to write, or must not touch: NaN in every type


@dataclass(frozen=True)
class Answer:
    """What one call of sparse or dense attention gave, and what it was given; on the host, bshd.

    mask: None for a dense call. rows: those of the sequence that the call had. untouched: whether what lies around a
    strided output is as before. again: the output of a second call that returned nothing else.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    plan: Plan
    out: np.ndarray
    lse: np.ndarray
    mask: Any
    again: np.ndarray | None
    untouched: bool
    rows: slice
    k_statistics: Any = None  # on the host


@dataclass(frozen=True)
class Packed:
    """What a packed or paged call gave: out [total_q, num_heads, head_dim], lse [num_heads, total_q]; again: out of a
    second call that returned nothing else."""

    out: np.ndarray
    lse: np.ndarray
    again: np.ndarray
    first_rows: np.ndarray  # [sequences + 1]
    untouched: bool


def adapted(case: Case, on_gpu: bool) -> Case:
    """The case as this machine's GPU can run it: low-bit attention is Hopper's."""
    if not on_gpu or case.attend == "exact":
        return case
    from ..jit import device_arch

    return case if device_arch() in LOW_BIT_ARCHS else case.replace(attend="exact")


def make_calls(case: Case, given: dict[str, list[np.ndarray]], on_gpu: bool) -> tuple[list[Answer], Packed | None]:
    """Run the case: one answer for a call, one a chunk, or one a sequence next to the packed result."""
    if case.kind in ("varlen", "paged"):
        answers = []
        for q, k, v in zip(given["q"], given["k"], given["v"]):
            answers.append(_call(case, q, k, v, on_gpu))
        return answers, _packed(case, given, on_gpu)
    q, k, v = (given[name][0] for name in "qkv")
    if case.kind != "chunked":
        return [_call(case, q, k, v, on_gpu)], None
    rows, keys = case.lengths[0]
    statistics = salekit.key_statistics(_on(k, on_gpu)) if case.statistics else None
    edges = sorted({0, *case.cuts, rows})
    answers = []
    for first, last in zip(edges, edges[1:]):
        full_rows = case.full_rows if last == rows else 0
        some = keys - rows + last
        one = _call(case.replace(full_rows=full_rows), q[:, first:last], k[:, :some], v[:, :some], on_gpu, statistics)
        answers.append(_replaced(one, rows=slice(first, last)))
    answers.append(_call(case, q, k, v, on_gpu, statistics))
    return answers, None


def _replaced(answer: Answer, **changes: Any) -> Answer:
    return Answer(**{**{name: getattr(answer, name) for name in answer.__dataclass_fields__}, **changes})


def _call(case: Case, q, k, v, on_gpu: bool, statistics: Any = None) -> Answer:
    placed = _place(case, q, k, v, on_gpu)
    options = dict(layout=case.layout)
    if case.sink_logits:
        options["sink_logits"] = _on(np.array(case.sink_logits, np.float32), on_gpu and case.on_device)
    names = ("causal", "softmax_scale", "softcap", "window_size") if case.kind == "dense" else None
    of_plan = {key: x for key, x in case.options().items() if names is None or key in names}
    options.update(of_plan)
    out, whole, place = _output(case, q, on_gpu)
    if case.kind == "dense":
        got = salekit.dense_attention(*placed, out=out, return_lse=True, **options)
        result, lse, mask = *got, None
        again = salekit.dense_attention(*placed, **options)
    else:
        thresholds = thresholds_of(case, on_gpu)
        options.update(thresholds=thresholds, k_statistics=statistics)
        result, lse, mask = salekit.sparse_attention(*placed, out=out, return_lse=True, return_mask=True, **options)
        again = salekit.sparse_attention(*placed, **options)
        mask = mask.to_numpy()
    plan_options = {key: x for key, x in of_plan.items() if case.kind != "dense"} or {
        key: x for key, x in of_plan.items()
    }
    order = LAYOUTS[case.layout]
    plan = salekit.make_plan(*placed, layout=case.layout, **plan_options)
    host, untouched = _result(result, out, whole, place)
    host = host.transpose(order)
    return Answer(
        q,
        k,
        v,
        plan,
        host,
        _off(lse),
        mask,
        _off(again).transpose(order),
        untouched,
        slice(0, q.shape[1]),
        None if statistics is None else _statistics_off(statistics),
    )


def thresholds_of(case: Case, on_gpu: bool) -> Any:
    if len(case.thresholds) == 1:
        return (
            case.thresholds[0]
            if not (on_gpu and case.on_device)
            else _on(np.full(case.num_heads, case.thresholds[0], np.float32), True)
        )
    return _on(np.array(case.thresholds, np.float32), True) if on_gpu and case.on_device else list(case.thresholds)


def _statistics_off(statistics: Any) -> Any:
    names = statistics.__dataclass_fields__
    return type(statistics)(**{name: _off(getattr(statistics, name)) for name in names})


# --- memory --------------------------------------------------------------------------------------------------------
def _on(x: np.ndarray, on_gpu: bool) -> Any:
    return arrays.import_cupy().asarray(x) if on_gpu else x


def _off(x: Any) -> np.ndarray:
    return x.get() if arrays.is_cuda(x) else x


def _nan(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    whole = np.empty(shape, dtype)
    whole.view(np.uint8).fill(POISON)
    return whole


def _place(case: Case, q, k, v, on_gpu: bool) -> list[Any]:
    """q, k and v as the case lays them out, in its layout."""
    order = LAYOUTS[case.layout]
    if case.strides == "fused" and q.shape[:2] == k.shape[:2]:
        heads, kv_heads = q.shape[2], k.shape[2]
        whole = np.concatenate((q, k, v), axis=2)
        whole = _on(np.ascontiguousarray(whole.transpose(order)), on_gpu).transpose(order)
        cuts = (slice(0, heads), slice(heads, heads + kv_heads), slice(heads + kv_heads, None))
        return [whole[:, :, cut].transpose(order) for cut in cuts]
    placed = []
    for name, x in zip("qkv", (q, k, v)):
        batch, rows, heads, dim = x.shape
        if case.strides == "padded":
            whole = _nan((batch + 1, rows + 37, heads + 1, dim + 8), x.dtype)
            whole[:batch, :rows, :heads, :dim] = x
            whole = _on(np.ascontiguousarray(whole.transpose(order)), on_gpu).transpose(order)
            view = whole[:batch, :rows, :heads, :dim]
        elif case.strides == "reversed":
            whole = _on(np.ascontiguousarray(x[:, ::-1].transpose(order)), on_gpu).transpose(order)
            view = whole[:, ::-1]
        elif case.strides == "shared" and name != "q" and batch:
            whole = _on(np.ascontiguousarray(x[:1].transpose(order)), on_gpu).transpose(order)
            view = _repeated(whole, batch)
        else:
            view = _on(np.ascontiguousarray(x.transpose(order)), on_gpu).transpose(order)
        placed.append(view.transpose(order))
    return placed


def _repeated(x: Any, batch: int) -> Any:
    """x of one batch as a view of several, the same memory for each."""
    shape, strides = (batch, *x.shape[1:]), (0, *x.strides[1:])
    if isinstance(x, np.ndarray):
        return np.lib.stride_tricks.as_strided(x, shape, strides)
    return type(x)(shape, x.dtype, memptr=x.data, strides=strides)


def _output(case: Case, q, on_gpu: bool) -> tuple[Any, Any, Any]:
    """(out as it is passed, the memory around it, where it lies there)."""
    if case.out == "none":
        return None, None, None
    batch, rows, heads, dim = q.shape
    order = LAYOUTS[case.layout]
    extra = (1, 3, 1, 8) if case.out == "strided" else (0, 0, 0, 0)
    whole = _nan(tuple(np.add(q.shape, extra)), q.dtype)
    whole = _on(np.ascontiguousarray(whole.transpose(order)), on_gpu)
    place = (slice(0, batch), slice(0, rows), slice(0, heads), slice(0, dim))
    place = tuple(place[axis] for axis in order)
    return whole[place], whole, place


def _result(result: Any, out: Any, whole: Any, place: Any) -> tuple[np.ndarray, bool]:
    """(what was returned, on the host; whether nothing around it was written)."""
    if out is None:
        return _off(result), True
    if result is not out:
        raise AssertionError("out: another array is returned than the one that was given")
    host = _off(whole)  # whole: CuPy copies a strided view by a kernel that needs the CUDA headers
    return host[place], _is_untouched(host, place)


def _is_untouched(whole: np.ndarray, place: tuple) -> bool:
    outside = np.ones(whole.shape, bool)
    outside[place] = False
    return bool((whole.view(np.uint16)[outside] == 0xFFFF).all())


# --- packed --------------------------------------------------------------------------------------------------------
def _packed(case: Case, given: dict[str, list[np.ndarray]], on_gpu: bool) -> Packed:
    rows, keys = (np.array(lengths, np.int64) for lengths in zip(*case.lengths))
    first_rows, first_keys = (np.concatenate(([0], np.cumsum(x))) for x in (rows, keys))
    q, k, v = (np.concatenate([x[0] for x in given[name]]) for name in "qkv")
    if case.strides == "padded":  # rows of wider ones
        q, k, v = (_widened(x) for x in (q, k, v))
    on_device = on_gpu and case.on_device
    sums_q, sums_k = (_on(x.astype(np.int32), on_device) for x in (first_rows, first_keys))
    options = dict(case.options(), thresholds=thresholds_of(case, on_gpu))
    if case.kind == "paged":
        k, v, table = _pages(case, k, v, keys, first_keys)
        options.update(block_table=_on(table, on_gpu), seqlens_k=_on(keys.astype(np.int32), on_device))
        sums_k = None
    placed = [
        _on(x, on_gpu) if case.strides != "padded" or case.kind == "paged" and i else _on_view(x, on_gpu)
        for i, x in enumerate((q, k, v))
    ]
    out, whole, place = _output(case.replace(layout="bshd"), q[None], on_gpu)
    out = None if out is None else out[0]
    inputs = (*placed, sums_q, sums_k, int(rows.max(initial=0)), int(keys.max(initial=0)))
    result, lse = salekit.sparse_attention_varlen(*inputs, out=out, return_lse=True, **options)
    again = _off(salekit.sparse_attention_varlen(*inputs, **options))
    host, untouched = _result(result, out, whole, place)
    host = np.ascontiguousarray(host if out is None else host[0])
    return Packed(host, _off(lse), again, first_rows, untouched)


def _widened(x: np.ndarray) -> np.ndarray:
    whole = _nan((x.shape[0] + 5, x.shape[1] + 1, x.shape[2] + 8), x.dtype)
    view = whole[: x.shape[0], : x.shape[1], : x.shape[2]]
    view[...] = x
    return view


def _on_view(x: np.ndarray, on_gpu: bool) -> Any:
    """A view and what is around it, on the GPU with the same strides."""
    if not on_gpu:
        return x
    return _on(x.base, True)[tuple(slice(0, n) for n in x.shape)]


def _pages(case: Case, k, v, keys, first_keys) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pages in random order among NaN, and the table; entries past an end are no pages."""
    size = case.page_size
    counts = -(-keys // size)
    order = np.random.default_rng([case.seed, 77]).permutation(int(counts.sum()) + 3)
    pages_k, pages_v = (_nan((len(order), size, *x.shape[1:]), x.dtype) for x in (k, v))
    table = np.full((len(keys), max(int(counts.max(initial=0)), 0) + 1), -1, np.int32)
    at = 0
    for i, count in enumerate(counts):
        for page in range(count):
            first = int(first_keys[i]) + page * size
            last = min(first + size, int(first_keys[i + 1]))
            table[i, page] = order[at]
            for pages, x in ((pages_k, k), (pages_v, v)):
                pages[order[at], : last - first] = x[first:last]
            at += 1
    return pages_k, pages_v, table
