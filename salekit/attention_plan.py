"""AttentionPlan: what calls of one kind share. Arguments are checked when they are new; then launches are replayed."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from . import arrays, call_checks, key_statistics, memory, pipeline, programs, workspaces
from .attend import attend
from .block_mask import BlockMask
from .errors import ArgumentError
from .options import check_flag, plan_of_views
from .plans import Plan, ceil_div
from .thresholds import check_thresholds

MAX_PROGRAMS = 16  # of a plan: kinds of out and thresholds, and which results are wanted
MAX_PLANS = 64  # kinds of calls that sparse_attention and dense_attention remember; some 50 kB each, workspace apart


class AttentionPlan:
    """Attention calls of one kind: shapes, strides, dtype, GPU and options are fixed. Made by :func:`plan`.

    plan: the shapes and options, a ``Plan``. layout: "bshd" or "bhsd".

    **Workspace.** What a call needs between its stages lies in one piece of memory for each stream, which calls reuse
    and plans share; :func:`clear_workspaces` frees it. A call allocates only what it returns: with ``out`` given and
    neither lse nor mask wanted, nothing. ``run(workspace=...)`` takes memory of yours instead.

    **Threads.** Any number of threads may run a plan, on one stream or on several.

    **CUDA graphs.** Run a plan (or ``sparse_attention``) once before, with the same arguments, then again while its
    stream is captured: nothing synchronises. The graph owns the workspace of that call (an allocation and a release
    among its nodes), so nothing else can be given that memory and it lasts as long as the graph; CUDA allows one
    executable instance at a time of a graph with such nodes, and not to put it into another. With ``workspace=`` there
    are no such nodes, and that memory has to be yours alone while the graph can run. Inputs, and the returned arrays
    that were not passed as ``out``, have to be kept as long as the graph, as with anything that CuPy captures.
    Thresholds on the host are part of the graph; those in an array on the GPU are read at each replay.
    """

    def __init__(self, q: Any, k: Any, v: Any, layout: str, options: Mapping[str, Any]):
        views = call_checks.as_arrays(q, k, v, layout)
        self.plan: Plan = plan_of_views(*views[:2], **options)
        self.layout = layout
        self._options = options
        self._device, *self._kinds = self._kind = _kind_of(q, k, v)
        self._reaches = [arrays.reach(shape, strides, dtype.itemsize) for dtype, shape, strides in self._kinds]
        self._gpu = None if self._device is None else programs.Gpu()
        self._programs: workspaces.RecentlyUsed[programs.Program] = workspaces.RecentlyUsed(MAX_PROGRAMS)
        self._lock = threading.Lock()  # of the images of all programs

    def __repr__(self) -> str:
        (_, q, _), (_, k, _), _ = self._kinds
        place, kind = arrays.place_name(self._device), "dense" if self.plan.is_dense else self.plan.estimator
        return f"AttentionPlan(q={q}, k={k}, {self.plan.dtype}, {self.layout}, {kind}, {place})"

    @cached_property
    def workspace_bytes(self) -> int:
        """Bytes of workspace that a call needs at most; 0 on the twin. Compiles the kernels."""
        if self._device is None or self.plan.is_empty:
            return 0
        kinds = ("dense",) if self.plan.is_dense else ("dense", "scalar", "host", "device")
        variants = product((None,), kinds, (False,), (False, True))
        sinks = ceil_div(4 * self.plan.num_heads, programs.WORKSPACE_ALIGNMENT) * programs.WORKSPACE_ALIGNMENT
        with arrays.import_cupy().cuda.Device(self._device):
            # Fewer with k_statistics.
            return sinks + max(self._record(*variant).workspace_bytes for variant in variants)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        thresholds: Any = 0.008,
        return_lse: bool = False,
        return_mask: bool = False,
        out: Any = None,
        stream: Any = None,
        workspace: Any = None,
        sink_logits: Any = None,
        k_statistics: Any = None,
    ) -> Any:
        """One call, with the arguments, results and errors of :func:`sparse_attention`.

        q, k, v: with the shapes, strides, dtype and GPU that the plan was made for; ArgumentError otherwise.
        workspace: None, or memory on that GPU to use instead of the stream's: a contiguous array of at least
            ``workspace_bytes`` bytes, aligned to 256, that nothing else uses before the call has run on the GPU.
        """
        return_lse, return_mask = check_flag("return_lse", return_lse), check_flag("return_mask", return_mask)
        with arrays.on_stream(q, stream) as device:
            if device is None:
                data = dict(out=out, thresholds=thresholds, sink_logits=sink_logits)
                call = call_checks.check_call(q, k, v, layout=self.layout, **data, **self._options)
                self._check_kind(*(arrays.in_layout(x, self.layout) for x in (call.q, call.k, call.v)))
                check_statistics(k_statistics, self.plan, None)
                return pipeline.run_twin(call, return_lse, return_mask, k_statistics)
            q, k, v = arrays.on_device(device, q, k, v)
            self._check_kind(q, k, v)
            more = dict(sink_logits=sink_logits, k_statistics=k_statistics)
            return self._run(q, k, v, thresholds, return_lse, return_mask, out, workspace, **more)

    def _check_kind(self, q: Any, k: Any, v: Any) -> None:
        kind = _kind_of(q, k, v)
        if kind == self._kind:
            return
        call_checks.as_arrays(q, k, v, self.layout)  # says first what is wrong with any plan
        if kind[0] != self._device:
            raise ArgumentError(f"q: is on {arrays.place_name(kind[0])}; wants {arrays.place_name(self._device)}")
        for name, got, want in zip("qkv", kind[1:], self._kinds):
            if _without_unused(got) != _without_unused(want):
                got, want = ("dtype {}, shape {}, strides {} bytes".format(*x) for x in (got, want))
                raise ArgumentError(f"{name}: got {got}; this plan is for {want}")

    # --- on the GPU ------------------------------------------------------------------------------------------------
    def _run(
        self, q: Any, k: Any, v: Any, thresholds: Any, return_lse: bool, return_mask: bool, out: Any, workspace: Any,
        **more: Any,
    ) -> Any:
        """A call with the arguments of :meth:`_check`; q's GPU and the call's stream are current."""
        arguments = self._check(q, k, v, thresholds, return_lse, return_mask, out, workspace, **more)
        result, lse, mask = self._execute(arguments)
        return pipeline.pack(result if out is None else out, lse, mask, return_lse, return_mask)

    def _check(
        self,
        q: Any,
        k: Any,
        v: Any,
        thresholds: Any,
        return_lse: Any,
        return_mask: Any,
        out: Any,
        workspace: Any,
        sink_logits: Any = None,
        k_statistics: Any = None,
        lse_out: Any = None,
        words_out: Any = None,
    ) -> tuple:
        """The arguments of :meth:`_execute`, for any number of calls with the same CuPy arrays, which are of this kind.

        What the kind does not say is checked: addresses, thresholds, sink logits and out. lse_out, words_out: where lse
        and the mask's words go, contiguous CuPy arrays of their shapes (not checked); None allocates them.
        """
        at_q, at_k, at_v = q.data.ptr, k.data.ptr, v.data.ptr
        if (at_q | at_k | at_v) % arrays.ALIGNMENT:
            call_checks.as_arrays(q, k, v, self.layout)  # says which it is; empty arrays may have any address
        thresholds = check_thresholds(thresholds, self.plan.num_heads, q)
        check_statistics(k_statistics, self.plan, self._device)
        sink_kind = None
        if sink_logits is not None:
            sink_logits = call_checks.check_sink_logits(sink_logits, self.plan, q)
            sink_kind = "device" if programs.is_gpu_array(sink_logits) else "host"
        view, out_kind = None, None
        if out is not None:
            view = arrays.import_array("out", out, self._device)
            out_kind = (view.dtype, view.shape, view.strides)
        kind = _kind_of_thresholds(thresholds, self.plan)
        statistics = () if k_statistics is None or kind == "dense" else k_statistics.arrays
        key = (out_kind, kind, bool(return_lse), bool(return_mask), sink_kind, bool(statistics))
        program = self._programs.get(key)
        if view is not None and (program is None or view.data.ptr % arrays.ALIGNMENT):
            call_checks.check_out(view, arrays.in_layout(q, self.layout), self.layout)
        if view is not None:
            at, (of_q, of_k, of_v) = view.data.ptr, self._reaches
            end = at + arrays.reach(out_kind[1], out_kind[2], view.dtype.itemsize)[1]  # strides are positive
            if (
                (at < at_q + of_q[1] and at_q + of_q[0] < end)
                or (at < at_k + of_k[1] and at_k + of_k[0] < end)
                or (at < at_v + of_v[1] and at_v + of_v[0] < end)
            ):
                call_checks.check_apart(view, q=q, k=k, v=v)
        if program is None and not self.plan.is_empty:
            program = self._program(key)
        if program is not None and workspace is not None:
            workspace = call_checks.check_workspace(workspace, self._device, program.workspace_bytes)
        return program, key, (q, k, v), thresholds, sink_logits, statistics, view, workspace, lse_out, words_out

    def _execute(self, arguments: tuple) -> tuple[Any, Any, BlockMask | None]:
        """A call with what :meth:`_check` returned, or another with the same; (out, lse, mask)."""
        program, key, qkv, _, sink_logits, _, out, *_ = arguments
        if program is None:
            return self._run_empty(*qkv, out, sink_logits)
        try:
            return self._submit(*arguments)
        except Exception as error:
            if not memory.is_short(error):
                raise
        return memory.once_more(lambda: self._submit(*arguments), *self._needs(key, program))

    def _needs(self, key: tuple, program: programs.Program) -> tuple[int, str, str]:
        """Bytes that a call allocates, what for, and what to do when they are not there."""
        plan, (out_kind, _, return_lse, return_mask, *_) = self.plan, key
        rows = plan.batch * plan.num_heads * plan.seqlen_q
        results = (0 if out_kind else rows * plan.head_dim * 2) + (4 * rows if return_lse else 0)
        results += 4 * math.prod(plan.words_shape) if return_mask else 0
        what = f"a call that takes {program.workspace_bytes:,} bytes of workspace and {results:,} of results"
        advice = f"{arrays.FEWER}; out= and workspace= take memory that is there"
        return program.workspace_bytes + results, what, advice

    def _submit(
        self,
        program: programs.Program,
        key: tuple,
        qkv: tuple,
        thresholds: Any,
        sink_logits: Any,
        statistics: tuple,
        out: Any,
        workspace: Any,
        lse: Any,
        words: Any,
    ) -> tuple[Any, Any, BlockMask | None]:
        """Allocate what the caller gets and launch; (out, lse, mask)."""
        cupy, plan, (q, k, v) = arrays.import_cupy(), self.plan, qkv
        _, kind, return_lse, return_mask, sink_kind, _ = key
        mask = None
        if out is None:
            out = cupy.ndarray(q.shape, q.dtype)
        addresses = [q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr]
        if kind == "device":
            addresses.append(thresholds.data.ptr)
        addresses += [x.data.ptr for x in statistics]
        if sink_kind == "device":
            addresses.append(sink_logits.data.ptr)
        if return_lse:
            if lse is None:
                lse = cupy.ndarray((plan.batch, plan.num_heads, plan.seqlen_q), np.float32)
            addresses.append(lse.data.ptr)
        if return_mask:
            mask = pipeline.block_mask(cupy.ndarray(plan.words_shape, np.uint32) if words is None else words, plan)
            addresses.append(mask.words.data.ptr)
        stream = cupy.cuda.get_current_stream().ptr
        programs.bind_context(self._device)

        is_captured = workspaces.is_capturing(stream)

        def launch(base: int) -> None:
            with self._lock:
                program.link(base, *addresses)
                program.write_values(thresholds)
                program.write_values(sink_logits, 1)
                program.submit(self._gpu, stream, is_captured)

        workspaces.use(self._device, stream, is_captured, program.workspace_bytes, workspace, launch)
        return out, lse, mask

    def _program(self, key: tuple) -> programs.Program:
        return self._programs.get(key) or self._programs.add(key, self._record(*key))

    def _record(
        self,
        out_kind: tuple | None,
        kind: str,
        return_lse: bool,
        return_mask: bool,
        sink_kind: str | None = None,
        has_statistics: bool = False,
    ) -> programs.Program:
        """The launches of calls with such an out, such thresholds and sink logits and these results."""
        plan = self.plan
        with programs.Recorder(self._device) as recorder:
            ports = [recorder.array(shape, dtype, strides) for dtype, shape, strides in self._kinds]
            dtype, shape, _ = self._kinds[0]
            ports.append(recorder.array(shape, dtype, out_kind and out_kind[2]))
            thresholds, of_thresholds = pipeline.recorded_thresholds(recorder, plan, kind)
            ports += of_thresholds
            statistics = None
            if has_statistics:
                statistics = recorded_statistics(recorder, plan)
                ports += statistics.arrays
            sinks, of_sinks = pipeline.recorded_sinks(recorder, plan, sink_kind)
            ports += of_sinks
            views = (arrays.in_layout(x, self.layout) for x in ports[:4])
            lse, mask = pipeline.run_stages(*views, thresholds, plan, return_lse, return_mask, sinks, statistics)
        ports += [lse] if return_lse else []
        ports += [mask.words] if return_mask else []
        program = programs.Program(recorder, ports)
        if bool(program.parameters) != (kind in ("scalar", "host")):
            raise RuntimeError("the launches of this program do not take the thresholds")
        return program

    def _run_empty(self, q: Any, k: Any, v: Any, out: Any, sink_logits: Any) -> tuple[Any, Any, BlockMask]:
        """A call without a query row or without a key."""
        if out is None:
            out = arrays.allocate(arrays.import_cupy().empty, q.shape, q.dtype)
        views = (arrays.in_layout(x, self.layout) for x in (q, k, v, out))
        return out, attend_nothing(*views, self.plan, sink_logits), pipeline.all_visible(q, self.plan)


def attend_nothing(q: Any, k: Any, v: Any, out: Any, plan: Plan, sink_logits: Any) -> Any:
    """The lse of a call without a query row or without a key, of CuPy's bshd views; out is zeroed."""
    if q.size and programs.is_gpu_array(sink_logits):  # lse is made of what the host does not know
        return attend(q, k, v, None, plan, out=out, return_lse=True, sink_logits=sink_logits)[1]
    sink_logits = None if programs.is_gpu_array(sink_logits) else sink_logits  # no row has an lse
    return pipeline.empty_attention(out, plan, sink_logits)


def check_statistics(k_statistics: Any, plan: Plan, device: int | None) -> None:
    """ArgumentError or DtypeError when they are given and are not of such keys."""
    if k_statistics is not None:
        key_statistics.check(k_statistics, plan.batch, plan.num_kv_heads, plan.head_dim, device)


def recorded_statistics(recorder: programs.Recorder, plan: Plan) -> key_statistics.KeyStatistics:
    """Statistics whose arrays are symbols, for the ports of a program."""
    heads, channels = (plan.batch, plan.num_kv_heads), (plan.batch, plan.num_kv_heads, plan.head_dim)
    shapes = (channels, channels, heads, heads)
    return key_statistics.KeyStatistics(*(recorder.array(shape, np.float32) for shape in shapes), None, None)


# --- which calls are alike -----------------------------------------------------------------------------------------
_plans: workspaces.RecentlyUsed[AttentionPlan] = workspaces.RecentlyUsed(MAX_PLANS)


def plan_of(q: Any, k: Any, v: Any, layout: str, options: dict) -> AttentionPlan:
    """The plan of such calls, made at the first of them."""
    try:
        key = _key(q, k, v, layout, options)
        found = _plans.get(key)
    except TypeError:  # an option is no value that a dictionary takes: wrong, or a list for ``block``
        key = found = None
    if found is None:
        found = AttentionPlan(q, k, v, layout, options)
        found = _plans.add(key or (found._kind, layout, found.plan), found)
    return found


def _key(q: Any, k: Any, v: Any, layout: str, options: dict) -> tuple:
    """Equal for two calls only when the same checks pass."""
    return _kind_of(q, k, v), key_of_options(options, layout)


def key_of_options(options: dict, *more: Any) -> tuple:
    """Equal for options, and what comes with them, only when they mean the same: types count, as True == 1 == 1.0."""
    values = (*more, *options.values())
    pairs = (*options.get("block", ()), *_sides(options.get("window_size")))
    return values, tuple(options), tuple(map(type, values)), tuple(map(type, pairs))


def _sides(window: Any) -> tuple:
    return window if isinstance(window, tuple) else ()


def _kind_of(q: Any, k: Any, v: Any) -> tuple:
    """(device or None, (dtype, shape, strides) of q, of k, of v)."""
    return (
        q.data.device_id if arrays.is_cuda(q) else None,
        (q.dtype, q.shape, q.strides),
        (k.dtype, k.shape, k.strides),
        (v.dtype, v.shape, v.strides),
    )


def _without_unused(kind: tuple) -> tuple:
    """The kind of an array without the strides that no element needs, which DLPack and NumPy give any value."""
    dtype, shape, strides = kind
    return dtype, shape, [stride for size, stride in zip(shape, strides) if size > 1 and 0 not in shape]


def _kind_of_thresholds(thresholds: Any, plan: Plan) -> str:
    if plan.is_dense or pipeline.is_zero(thresholds):
        return "dense"
    if isinstance(thresholds, float):
        return "scalar"
    return "device" if programs.is_gpu_array(thresholds) else "host"
