"""Packed batches of sequences and paged caches: checks, the loop of the twin, and the planned call on the GPU.

On the GPU the sequences are copied to padded arrays [batch, max_seqlen, heads, head_dim], zeros beyond each end, and
the stages run on those with the lengths of each (``Plan.has_lengths``); the rows of the output are copied back.
"""

from __future__ import annotations

import itertools
import operator
import os
import reprlib
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import arrays, call_checks, jit, memory, pipeline, programs, workspaces
from .attention_plan import (
    _kind_of_thresholds,
    attend_nothing,
    check_statistics,
    key_of_options,
    recorded_statistics,
)
from .errors import ArgumentError, DtypeError
from .options import check_count, check_flag, plan_of_views
from .plans import MAX_GRID, MAX_SEQLEN, Plan, ceil_div
from .reference import LOW_BIT_Q_SAMPLE
from .thresholds import as_thresholds, check_thresholds

PAGE_SIZES = (16, 32, 64, 128, 256)
DEBUG_VARIABLE = "SALEKIT_DEBUG"
MAX_PROGRAMS = 64  # kinds of calls that are remembered
_THREADS = 256  # of gather_sequences.cu, scatter_sequences.cu and locate_sequences.cu
_LOCATED_ROWS = 5
_NULL = np.uint64(0)


@dataclass(frozen=True)
class Sequences:
    """Checked arguments of a packed call.

    q: [1, total_q, num_heads, head_dim]; k, v: [1, total_k, num_kv_heads, head_dim], or with pages [num_pages,
        page_size, num_kv_heads, head_dim].
    cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table: int32 arrays as the caller gave them, or None.
    sink_logits: None, or float32 [num_heads] on the host or where q is.
    plan: of the padded batch. is_on_host: whether the lengths are, though q is on a GPU.
    """

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqlens_k: Any
    block_table: Any
    sink_logits: Any
    plan: Plan
    is_on_host: bool

    @property
    def total_q(self) -> int:
        return self.q.shape[1]

    @property
    def is_paged(self) -> bool:
        return self.block_table is not None

    @property
    def place_of_sinks(self) -> str | None:
        if self.sink_logits is None:
            return None
        return "device" if arrays.is_cuda(self.sink_logits) else "host"

    def located(self) -> np.ndarray:
        """int32 [5, batch], of lengths on the host, as locate_sequences.cu makes them of those on the GPU."""
        located = np.zeros((_LOCATED_ROWS, self.cu_seqlens_q.shape[0] - 1), np.int32)
        rows_q, rows_k, first_q, first_k, samples = located
        first_q[:] = self.cu_seqlens_q[:-1]
        np.subtract(self.cu_seqlens_q[1:], first_q, out=rows_q)
        if self.is_paged:
            rows_k[:] = self.seqlens_k
        else:
            first_k[:] = self.cu_seqlens_k[:-1]
            np.subtract(self.cu_seqlens_k[1:], first_k, out=rows_k)
        np.floor_divide(rows_q + (LOW_BIT_Q_SAMPLE - 1), LOW_BIT_Q_SAMPLE, out=samples)
        return located


# --- checks --------------------------------------------------------------------------------------------------------
def is_debugging(debug: Any) -> bool:
    if debug is None:
        return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    return check_flag("debug", debug)


def check_sequences(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    block_table: Any,
    seqlens_k: Any,
    device: int | None,
    debug: bool,
    options: dict,
    sink_logits: Any = None,
) -> Sequences:
    """Everything but thresholds, statistics and out; inside ``on_stream``."""
    given = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table)
    kind, plan = _remembered(given, device, options, max_seqlen_q, max_seqlen_k)
    if plan is not None:  # only values are new
        k, v = (k[None], v[None]) if block_table is None else (k, v)
        sinks = call_checks.check_sink_logits(sink_logits, plan, q)
        sequences = Sequences(q[None], k, v, *given[3:], sinks, plan, isinstance(cu_seqlens_q, np.ndarray))
        check_values(sequences, debug)
        return sequences
    q, k, v = (arrays.import_array(name, x, device) for name, x in zip("qkv", (q, k, v)))
    _check_axes("q", q, 3, "[total_q, num_heads, head_dim]")
    is_paged = block_table is not None
    for name, x in (("k", k), ("v", v)):
        if is_paged:
            _check_axes(name, x, 4, "[num_pages, page_size, num_kv_heads, head_dim], as block_table is given")
        else:
            _check_axes(name, x, 3, "[total_k, num_kv_heads, head_dim]")
    q = q[None]
    k, v = (k, v) if is_paged else (k[None], v[None])
    _check_heads(q, k, v, device, is_paged)
    longest = tuple(map(check_count, ("max_seqlen_q", "max_seqlen_k"), (max_seqlen_q, max_seqlen_k)))
    # A window that hides no key of the longest sequences hides none of the others.
    base = plan_of_views(q, k, longest=longest, **options)
    if base.skipped != "drop":
        raise ArgumentError(f"skipped: {base.skipped!r} is not there for packed sequences and pages; wants 'drop'")
    sink_logits = call_checks.check_sink_logits(sink_logits, base, q)

    cu_seqlens_q, is_on_host = _check_lengths("cu_seqlens_q", cu_seqlens_q, device)
    if cu_seqlens_q.shape[0] < 1:
        raise ArgumentError("cu_seqlens_q: got no element; wants [batch + 1]")
    batch = cu_seqlens_q.shape[0] - 1
    if device is not None and batch > MAX_GRID:
        raise ArgumentError(f"cu_seqlens_q: got {batch} sequences; wants at most {MAX_GRID}")
    name, given = ("seqlens_k", seqlens_k) if is_paged else ("cu_seqlens_k", cu_seqlens_k)
    other = ("cu_seqlens_k", cu_seqlens_k) if is_paged else ("seqlens_k", seqlens_k)
    if given is None or other[1] is not None:
        kind = "with a block_table" if is_paged else "without a block_table"
        at_fault = name if given is None else other[0]
        raise ArgumentError(f"{at_fault}: a call {kind} wants {name}, and {other[0]} to be None")
    given, k_on_host = _check_lengths(name, given, device)
    if k_on_host != is_on_host:
        places = ["host memory" if x else arrays.place_name(device) for x in (k_on_host, is_on_host)]
        raise ArgumentError(f"{name}: is on {places[0]}; wants {places[1]}, where cu_seqlens_q is")
    wanted = batch + (0 if is_paged else 1)
    if given.shape[0] != wanted:
        raise ArgumentError(f"{name}: got {given.shape[0]} elements; wants {wanted}, for {batch} sequences")
    if is_paged:
        block_table = _check_table(block_table, k, batch, longest[1], device)
    plan = base.replace(batch=batch, has_lengths=device is not None)
    of_k = (None, given) if is_paged else (given, None)
    sequences = Sequences(q, k, v, cu_seqlens_q, *of_k, block_table, sink_logits, plan, is_on_host)
    check_values(sequences, debug)
    if kind is not None:
        _checked.add(kind, plan)
    return sequences


_checked: workspaces.RecentlyUsed[Plan] = workspaces.RecentlyUsed(MAX_PROGRAMS)


def _remembered(given: tuple, device: int | None, options: dict, *longest: Any) -> tuple[tuple | None, Plan | None]:
    """(kind, plan) of a call on a GPU: kinds are equal only when the same checks pass, but for those of values, of sink
    logits and of what is not here; plan is that of a call of the kind that has passed them, or None. kind: None where
    an argument is no array of CuPy's or, for lengths, NumPy's."""
    if device is None:
        return None, None
    array, kinds = arrays.import_cupy().ndarray, []
    for x in given:
        if type(x) is array:
            kinds.append((x.data.device_id, x.dtype, x.shape, x.strides, x.data.ptr % arrays.ALIGNMENT == 0))
        elif type(x) is np.ndarray:
            kinds.append((x.dtype, x.shape, x.strides))
        elif x is None:
            kinds.append(None)
        else:
            return None, None
    try:
        kind = (device, *kinds, key_of_options(options, *longest))
        return kind, _checked.get(kind)
    except TypeError:  # an option is wrong, or a list
        return None, None


def check_values(sequences: Sequences, debug: bool) -> None:
    """The lengths and the pages that they need: where these are on the host, or everywhere when debugging, at the cost
    of copies to the host that wait for the stream. Sink logits on the GPU, too, when debugging."""
    plan = sequences.plan
    if debug and sequences.place_of_sinks == "device":
        call_checks.check_sink_logits(_on_host(sequences.sink_logits), plan, sequences.q)
    if not (sequences.is_on_host or debug):
        return
    sums_q = _on_host(sequences.cu_seqlens_q)
    _check_sums("cu_seqlens_q", sums_q, sequences.total_q, plan.seqlen_q, "max_seqlen_q")
    if not sequences.is_paged:
        total = sequences.k.shape[1]
        _check_sums("cu_seqlens_k", _on_host(sequences.cu_seqlens_k), total, plan.seqlen_k, "max_seqlen_k")
        return
    lengths = _on_host(sequences.seqlens_k)
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > plan.seqlen_k:
        index = int(np.argmax((lengths < 0) | (lengths > plan.seqlen_k)))
        raise ArgumentError(
            f"seqlens_k: got {lengths[index]} for sequence {index}; wants 0 to max_seqlen_k = {plan.seqlen_k}"
        )
    if arrays.is_cuda(sequences.block_table) and not debug:
        return
    num_pages, page_size = sequences.k.shape[:2]
    table = _on_host(sequences.block_table)
    used = np.arange(table.shape[1])[None] < -(-lengths[:, None] // page_size)
    for index, place in np.argwhere(used & ((table < 0) | (table >= num_pages))):
        wants = f"wants 0 to {num_pages - 1}" if num_pages else "there are none, as k has no pages"
        raise ArgumentError(f"block_table: got page {table[index, place]} at [{index}, {place}]; {wants}")


def _check_axes(name: str, x: Any, ndim: int, wanted: str) -> None:
    if x.ndim != ndim:
        raise ArgumentError(f"{name}: got {x.ndim} axes, shape {x.shape}; wants {wanted}")


def _check_heads(q: Any, k: Any, v: Any, device: int | None, is_paged: bool) -> None:
    """dtype, strides, heads and head_dim by what checks any call; the rows of k and v are theirs alone."""
    for name, x in zip("qkv", (q, k, v)):
        call_checks.check_view(name, x, device)
    call_checks.as_arrays(q[:, :0], k[:1, :0] if k.shape[0] else k.reshape(1, 0, *k.shape[2:]),
                     v[:1, :0] if v.shape[0] else v.reshape(1, 0, *v.shape[2:]))
    if v.shape != k.shape:
        got, want = (x.shape if is_paged else x.shape[1:] for x in (v, k))
        raise ArgumentError(f"v: got shape {got}; wants {want}, as k has")
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] > MAX_SEQLEN:
            raise ArgumentError(f"{name}: got {x.shape[1]} rows; wants at most {MAX_SEQLEN}")


def _check_lengths(name: str, x: Any, device: int | None) -> tuple[Any, bool]:
    """int32 [n] as an array, and whether it is in host memory; lists are taken, too."""
    if isinstance(x, (list, tuple)):
        try:
            numbers = [operator.index(number) for number in x]
        except TypeError:
            numbers = None
        if numbers is None or any(isinstance(number, (bool, np.bool_)) for number in x):
            raise DtypeError(f"{name}: got {reprlib.repr(x)}; wants integers")
        if numbers and not -(2**31) <= min(numbers) <= max(numbers) < 2**31:
            raise ArgumentError(f"{name}: got a value beyond int32")
        x = np.array(numbers, np.int32)
    is_on_host = isinstance(x, np.ndarray)
    x = arrays.import_array(name, x, None if is_on_host else device)
    if x.dtype != np.int32:
        raise DtypeError(f"{name}: got dtype {x.dtype}; wants int32")
    if x.ndim != 1:
        raise ArgumentError(f"{name}: got {x.ndim} axes, shape {x.shape}; wants one")
    if x.shape[0] > 1 and x.strides[0] != 4:
        raise ArgumentError(f"{name}: is not contiguous; wants contiguous memory")
    return x, isinstance(x, np.ndarray)


def _check_table(table: Any, k: Any, batch: int, max_seqlen_k: int, device: int | None) -> Any:
    table = arrays.import_array("block_table", table, device)
    page_size = k.shape[1]
    if page_size not in PAGE_SIZES:
        raise ArgumentError(f"k: got pages of {page_size} rows; wants one of {', '.join(map(str, PAGE_SIZES))}")
    if table.dtype != np.int32:
        raise DtypeError(f"block_table: got dtype {table.dtype}; wants int32")
    if table.ndim != 2 or table.shape[0] != batch:
        raise ArgumentError(f"block_table: got shape {table.shape}; wants [{batch}, max_pages_per_seq]")
    if table.size and table.shape[1] > 1 and table.strides[1] != 4:
        raise ArgumentError("block_table: the last axis is not contiguous; wants contiguous rows")
    if table.shape[1] * page_size < max_seqlen_k:
        raise ArgumentError(
            f"block_table: got {table.shape[1]} pages of {page_size} rows a sequence; wants at least "
            f"{ceil_div(max_seqlen_k, page_size)}, for max_seqlen_k = {max_seqlen_k}"
        )
    return table


def _check_sums(name: str, sums: np.ndarray, total: int, longest: int, longest_name: str) -> None:
    if sums[0] != 0:
        raise ArgumentError(f"{name}: starts at {sums[0]}; wants 0")
    wide = sums.astype(np.int64)
    lengths = wide[1:] - wide[:-1]
    if lengths.min(initial=0) < 0:
        index = int(np.argmax(lengths < 0))
        raise ArgumentError(f"{name}: decreases from {sums[index]} to {sums[index + 1]} at [{index + 1}]")
    if sums[-1] > total:
        raise ArgumentError(f"{name}: ends at {sums[-1]}; wants at most {total}, the rows that there are")
    if lengths.max(initial=0) > longest:
        index = int(lengths.argmax())
        wanted = f"at least {lengths[index]}, the length of sequence {index}"
        raise ArgumentError(f"{longest_name}: got {longest}; wants {wanted}")


def _on_host(x: Any) -> np.ndarray:
    return x.get() if arrays.is_cuda(x) else x


def check_out(out: Any, sequences: Sequences, device: int | None) -> Any:
    """``out`` as a view like q, [1, total_q, num_heads, head_dim]."""
    view = _view_of_out(out, sequences.q, device)
    call_checks.check_apart(view, q=sequences.q, k=sequences.k, v=sequences.v)
    return view


def _view_of_out(out: Any, q: Any, device: int | None) -> Any:
    if type(out) is type(q) and device is not None and out.flags.c_contiguous:  # most are: it is quick to see
        place = (out.data.device_id, out.data.ptr % arrays.ALIGNMENT)
        if place == (device, 0) and out.dtype == q.dtype and out.shape == q.shape[1:]:
            return out[None]
    view = arrays.import_array("out", out, device)
    _check_axes("out", view, 3, "[total_q, num_heads, head_dim]")
    if view.shape != q.shape[1:]:
        raise ArgumentError(f"out: got shape {view.shape}; wants {q.shape[1:]}, as q has")
    return call_checks.check_out(view[None], q, "bshd")


# --- the twin ------------------------------------------------------------------------------------------------------
def run_twin(
    sequences: Sequences, thresholds: Any, return_lse: bool, out: Any, k_statistics: Any
) -> tuple[Any, Any]:
    """A checked call with NumPy arrays, one sequence after the other: (out, lse)."""
    plan = sequences.plan
    thresholds = as_thresholds(thresholds, plan.num_heads, sequences.q)
    check_statistics(k_statistics, plan, None)
    if out is None:
        out = np.zeros(sequences.q.shape, sequences.q.dtype)
    sinks = sequences.sink_logits
    lse = np.full((plan.num_heads, sequences.total_q), -np.inf, np.float32)
    rows_q, rows_k, first_q, first_k, _ = sequences.located()
    for i in range(plan.batch):
        rows = slice(first_q[i], first_q[i] + rows_q[i])
        q, target = sequences.q[:, rows], out[:, rows]
        k, v = (keys_of_sequence(x, sequences, i, first_k[i], rows_k[i]) for x in (sequences.k, sequences.v))
        one = plan.replace(
            batch=1, seqlen_q=q.shape[1], seqlen_k=k.shape[1], dense_below=2**31 if plan.is_dense else 0
        )
        if one.is_empty:
            lse[:, rows] = pipeline.empty_attention(target, one, sinks)[0]
            continue
        statistics = None if k_statistics is None else k_statistics.of_sequence(i)
        of_rows, _ = pipeline.run_stages(q, k, v, target, thresholds, one, True, False, sinks, statistics)
        lse[:, rows] = of_rows[0]
    return out, lse if return_lse else None


def keys_of_sequence(x: Any, sequences: Sequences, index: int, first: int, length: int) -> np.ndarray:
    """[1, length, num_kv_heads, head_dim] of k or v of one sequence."""
    if not sequences.is_paged:
        return x[:, first : first + length]
    pages = sequences.block_table[index, : ceil_div(int(length), x.shape[1])]
    return x[pages].reshape(1, -1, *x.shape[2:])[:, :length]


# --- on the GPU ----------------------------------------------------------------------------------------------------
class SequencesProgram:
    """The recorded launches of packed calls of one kind; any number of threads may submit it."""

    def __init__(self, key: tuple, sequences: Sequences, device: int, out_strides: Any):
        self._gpu, self._lock = programs.Gpu(), threading.Lock()
        _, _, *kinds = key
        self.program = _record(sequences, device, out_strides, *kinds)

    def submit(self, device: int, addresses: list[int], values: Any, sink_logits: Any, workspace: Any) -> None:
        stream = arrays.import_cupy().cuda.get_current_stream().ptr
        programs.bind_context(device)
        is_captured = workspaces.is_capturing(stream)

        def launch(base: int) -> None:
            with self._lock:
                self.program.link(base, *addresses)
                self.program.write_values(values)
                self.program.write_values(sink_logits, 1)
                self.program.submit(self._gpu, stream, is_captured)

        workspaces.use(device, stream, is_captured, self.program.workspace_bytes, workspace, launch)


_programs: workspaces.RecentlyUsed[SequencesProgram] = workspaces.RecentlyUsed(MAX_PROGRAMS)


def run_gpu(*arguments: Any) -> tuple[Any, Any]:
    """A checked call with CuPy arrays, the arguments of :func:`_run_gpu`; q's GPU and the call's stream are current."""
    found = None
    try:
        found = _run_gpu(*arguments)
    except Exception as error:
        if not memory.is_short(error):
            raise
    if found is None:
        advice = (
            "Free memory, or pass fewer sequences at a time, whose largest lengths size the workspace; workspace= "
            "takes memory that is there"
        )
        found = memory.once_more(lambda: _run_gpu(*arguments), 0, "packed sequences and their workspace", advice)
    return found


def workspace_bytes(
    sequences: Sequences, thresholds: Any, return_lse: bool, out: Any, k_statistics: Any, device: int | None
) -> int:
    """What :func:`run_gpu` takes with these arguments; compiles the kernels and runs nothing."""
    thresholds = check_thresholds(thresholds, sequences.plan.num_heads, sequences.q)
    check_statistics(k_statistics, sequences.plan, device)
    if device is None or _has_nothing_to_do(sequences):
        return 0
    if out is None:
        out = SimpleNamespace(dtype=sequences.q.dtype, shape=sequences.q.shape, strides=_packed(sequences.q))
    kind = _kind_of_thresholds(thresholds, sequences.plan)
    has_statistics = k_statistics is not None and kind != "dense"
    return _program_of(sequences, kind, return_lse, out, has_statistics, device).program.workspace_bytes


def _packed(x: Any) -> tuple[int, ...]:
    """Strides of an array of this shape and dtype without gaps."""
    sizes = (x.dtype.itemsize, *x.shape[:0:-1])
    return tuple(itertools.accumulate(sizes, operator.mul))[::-1]


def _has_nothing_to_do(sequences: Sequences) -> bool:
    return sequences.plan.is_empty or sequences.q.size == 0


def _program_of(
    sequences: Sequences, kind: str, return_lse: bool, out: Any, has_statistics: bool, device: int
) -> SequencesProgram:
    """The program of calls of this kind. out: with the dtype, shape and strides of the output."""
    table = (sequences.block_table,) if sequences.is_paged else ()
    key = (
        (device, sequences.plan, sequences.is_on_host, sequences.is_paged),
        tuple((x.dtype, x.shape, x.strides) for x in (sequences.q, sequences.k, sequences.v, out, *table)),
        kind,
        bool(return_lse),
        has_statistics,
        sequences.place_of_sinks,
    )
    found = _programs.get(key)
    return found or _programs.add(key, SequencesProgram(key, sequences, device, out.strides))


def _run_gpu(
    sequences: Sequences,
    thresholds: Any,
    return_lse: bool,
    out: Any,
    k_statistics: Any,
    device: int,
    workspace: Any = None,
) -> tuple[Any, Any]:
    cupy, plan, q = arrays.import_cupy(), sequences.plan, sequences.q
    thresholds = check_thresholds(thresholds, plan.num_heads, q)
    check_statistics(k_statistics, plan, device)
    if out is None:
        out = cupy.ndarray(q.shape, q.dtype)
    lse = cupy.ndarray((plan.num_heads, sequences.total_q), np.float32) if return_lse else None
    sinks = sequences.sink_logits
    if _has_nothing_to_do(sequences):
        no_keys = q[:, :0, : plan.num_kv_heads]
        whole = plan.replace(batch=1, seqlen_q=sequences.total_q, seqlen_k=0, has_lengths=False)
        nothing = attend_nothing(q, no_keys, no_keys, out, whole, sinks)
        return out, nothing[0] if return_lse else None

    kind = _kind_of_thresholds(thresholds, plan)
    statistics = () if k_statistics is None or kind == "dense" else k_statistics.arrays
    given = [sequences.q, sequences.k, sequences.v]
    lengths = [x for x in (sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.seqlens_k) if x is not None]
    lengths = [] if sequences.is_on_host else lengths
    table = [sequences.block_table] if sequences.is_paged else []
    values = _values(sequences, kind, thresholds)
    addresses = [x.data.ptr for x in (*given, out, *lengths, *table)]
    addresses += [thresholds.data.ptr] if kind == "device" else []
    addresses += [x.data.ptr for x in statistics]
    addresses += [sinks.data.ptr] if sequences.place_of_sinks == "device" else []
    addresses += [lse.data.ptr] if return_lse else []
    program = _program_of(sequences, kind, return_lse, out, bool(statistics), device)
    if workspace is not None:
        workspace = call_checks.check_workspace(workspace, device, program.program.workspace_bytes)
    program.submit(device, addresses, values, sinks, workspace)
    return out, lse


def _values(sequences: Sequences, kind: str, thresholds: Any) -> Any:
    """What a run writes into the program's parameters: lengths from the host as the bits of floats, then thresholds."""
    parts = []
    if sequences.is_on_host:
        located = sequences.located().ravel()
        padded = np.zeros(ceil_div(located.size, pipeline.STORE_COUNT) * pipeline.STORE_COUNT, np.int32)
        padded[: located.size] = located
        parts.append(padded.view(np.float32))
    if kind == "host":
        parts.append(np.asarray(thresholds, np.float32))
    elif kind == "scalar":
        parts.append(np.array([thresholds], np.float32))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _record(
    sequences: Sequences,
    device: int,
    out_strides: Any,
    kind: str,
    return_lse: bool,
    has_statistics: bool,
    place_of_sinks: str | None = None,
) -> programs.Program:
    plan = sequences.plan
    with programs.Recorder(device) as recorder:
        q, k, v = (recorder.array(x.shape, x.dtype, x.strides) for x in (sequences.q, sequences.k, sequences.v))
        out = recorder.array(q.shape, q.dtype, out_strides)
        ports = [q, k, v, out]
        with programs.stage("gather"):
            if sequences.is_on_host:
                located = pipeline.store_values((_LOCATED_ROWS, plan.batch), np.int32)
            else:
                sums_q = recorder.array((plan.batch + 1,), np.int32)
                of_k = recorder.array((plan.batch + (0 if sequences.is_paged else 1),), np.int32)
                ports += [sums_q, of_k]
                located = _locate(sums_q, of_k, sequences)
            table = None
            if sequences.is_paged:
                given = sequences.block_table
                table = recorder.array(given.shape, np.int32, given.strides)
                ports.append(table)
            plan = plan.replace(lengths=located)
            padded = [_gather(x, located, side, plan, table) for x, side in ((q, "q"), (k, "k"), (v, "k"))]
            padded_out = arrays.empty((plan.batch, plan.seqlen_q, plan.num_heads, plan.head_dim), q.dtype)
        thresholds, of_thresholds = pipeline.recorded_thresholds(recorder, plan, kind)
        ports += of_thresholds
        statistics = None
        if has_statistics:
            statistics = recorded_statistics(recorder, plan)
            ports += statistics.arrays
        sinks, of_sinks = pipeline.recorded_sinks(recorder, plan, place_of_sinks)
        ports += of_sinks
        padded_lse, _ = pipeline.run_stages(
            *padded, padded_out, thresholds, plan, return_lse, False, sinks, statistics
        )
        lse = recorder.array((plan.num_heads, q.shape[1]), np.float32) if return_lse else None
        with programs.stage("scatter"):
            _scatter(padded_out, padded_lse, located, out, lse, plan)
        ports += [lse] if return_lse else []
    return programs.Program(recorder, ports)


def _locate(sums_q: Any, of_k: Any, sequences: Sequences) -> Any:
    plan = sequences.plan
    located = arrays.empty((_LOCATED_ROWS, plan.batch), np.int32)
    sums_k, lengths_k = (_NULL, of_k) if sequences.is_paged else (of_k, _NULL)
    jit.get_kernel(_LOCATE_SPEC)(
        (1,),
        (_THREADS,),
        (
            sums_q,
            sums_k,
            lengths_k,
            located,
            *map(np.int32, (plan.batch, sequences.total_q, sequences.k.shape[1], plan.seqlen_q, plan.seqlen_k)),
            np.int32(LOW_BIT_Q_SAMPLE),
        ),
    )
    return located


def _gather(x: Any, located: Any, side: str, plan: Plan, table: Any) -> Any:
    """[batch, max_seqlen, heads, head_dim], zeros beyond each sequence's end."""
    _, page_size, heads, head_dim = x.shape
    index, seqlen = "qk".index(side), plan.seqlen_q if side == "q" else plan.seqlen_k
    padded = arrays.empty((plan.batch, seqlen, heads, head_dim), x.dtype)
    if side == "q":
        table = None
    jit.get_kernel(_GATHER_SPEC)(
        (ceil_div(seqlen * heads * head_dim // 8, _THREADS), plan.batch),
        (_THREADS,),
        (
            arrays.tensor_view(x),
            arrays.tensor_view(padded),
            located[index],
            located[2 + index],
            _NULL if table is None else table,
            np.int64(0 if table is None else table.strides[0] // 4),
            np.int32(page_size),
            np.int32(x.shape[0]),
            np.int32(seqlen),
            np.int32(heads),
            np.int32(head_dim // 8),
        ),
    )
    return padded


def _scatter(padded: Any, padded_lse: Any, located: Any, out: Any, lse: Any, plan: Plan) -> None:
    threads = plan.seqlen_q * plan.num_heads * plan.head_dim // 8
    jit.get_kernel(_SCATTER_SPEC)(
        (ceil_div(threads, _THREADS), plan.batch),
        (_THREADS,),
        (
            arrays.tensor_view(padded),
            arrays.tensor_view(out),
            _NULL if lse is None else padded_lse,
            _NULL if lse is None else lse,
            located[0],
            located[2],
            *map(np.int32, (plan.seqlen_q, out.shape[1], plan.num_heads, plan.head_dim // 8)),
        ),
    )


_LOCATE_SPEC = jit.KernelSpec("locate_sequences")
_GATHER_SPEC = jit.KernelSpec("gather_sequences")
_SCATTER_SPEC = jit.KernelSpec("scatter_sequences")


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels that this module launches itself."""
    return [_LOCATE_SPEC, _GATHER_SPEC, _SCATTER_SPEC]
