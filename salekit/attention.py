"""The public calls. On the GPU each kind of call is planned once (``attention_plan``) and replayed."""

from __future__ import annotations

import inspect
from typing import Any

from . import arrays, call_checks, pipeline, sequences
from .attention_plan import AttentionPlan, check_statistics, plan_of
from .options import OPTIONS, Options, Unpack, check_flag, check_names
from .plans import DENSE_BELOW


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    thresholds: Any = 0.008,
    causal: bool = True,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    estimator: str = "auto",
    attend: str = "exact",
    block: tuple[int, int] = (128, 32),
    query_stride: int = 1,
    full_rows: int = 1024,
    sink: int = 32,
    local: int = 128,
    dense_below: int = DENSE_BELOW,
    skipped: str = "drop",
    softcap: float = 0.0,
    window_size: int | tuple[int, int] | None = None,
    sink_logits: Any = None,
    k_statistics: Any = None,
    return_lse: bool = False,
    return_mask: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Sparse prefill attention by low-bit estimation (SALE, arXiv 2505.24179).

    q: [batch, seqlen_q, num_heads, head_dim], float16 or bfloat16; k, v: [batch, seqlen_k, num_kv_heads, head_dim];
        ``layout="bhsd"`` swaps the middle axes. head_dim 64, 96, 128, 192 or 256. Any strides with a contiguous last
        axis; on the GPU 16-byte aligned with strides that are multiples of 8 elements. NumPy arrays run on the twin;
        CuPy arrays, CUDA DLPack and ``__cuda_array_interface__`` objects on their GPU, without a host synchronisation.
    thresholds: tau, a scalar or float32 [num_heads]; 0 is a dense head, inf leaves the anchors. Values on the host are
        checked; in an array on the GPU NaN or a negative value means a dense head.
    causal: query i sees keys ``j <= i + seqlen_k - seqlen_q``. softmax_scale: default ``head_dim ** -0.5``.
    estimator: "int4" (the paper's), "int8", "int8-sp24" or "auto", which depends on the GPU alone.
    attend: "exact", or "int8-fp8": int8 products of q and k, e4m3 products of p and v; on GPUs, Hopper alone; head_dim
        64 and 128, and neither softcap, window_size nor sink_logits.
    block: (query rows, keys) of a mask block, 64 or 128 by 32, 64 or 128.
    query_stride: test every 1st, 2nd or 4th row of a block; the last ``full_rows`` rows are always tested, and all rows
        of calls that are not causal and have a window's right end.
    sink, local: keys at the start and before each query tile that are always kept.
    dense_below: up to this many keys, of all or in the window, the call is dense.
    skipped: "drop", as in the paper, or "pool": what is skipped of 128 neighbouring keys joins the softmax as one
        pooled key and value (docs/skipped-mass.md); calibrate thresholds with the same choice. head_dim 64 and 128,
        without softcap, window_size and sink_logits.
    softcap: scores become ``softcap * tanh(softmax_scale * q.k / softcap)``, as in Gemma 2; 0 leaves them as they are;
        at most 1e4, as a GPU's scores are off by some 1e-7 of it.
    window_size: (left, right): the row at position ``p = i + seqlen_k - seqlen_q`` sees keys ``p - left .. p + right``
        alone, -1: no limit on that side (flash-attn's meaning); with ``causal`` right is 0. An integer w is the w keys
        up to the row's own, (w - 1, w - 1), as ``sliding_window`` in Hugging Face's models.
    sink_logits: one more logit a head, that takes part in the softmax and has no value (gpt-oss): numbers on the host,
        or float32 [num_heads] where q is. -inf: none. Softcap and window_size do not touch it. lse includes it: of
        calls whose states are merged, pass it to one.
    k_statistics: what :func:`key_statistics` returned, where q is, instead of the statistics of this call's keys: those
        of all keys of a sequence whose chunks are to have the masks that they would have in one call (docs/serving.md).
    out: where to write, like q; it is returned. Memory that it shares with q, k or v is an error; other parts of the
        buffer that holds them are fine.
    stream: a CuPy stream, a ``cudaStream_t`` as int, an object with ``__cuda_stream__`` or ``cuda_stream``, or None for
        CuPy's current one.

    Returns out (like q, in its layout), or a tuple (out[, lse][, mask]): lse float32 [batch, num_heads, seqlen_q],
    natural log, over what was computed (pools included); mask a BlockMask. A row without a visible key has out 0 and
    lse -inf, or the head's sink logit. NaN and inf in q and k reach the output as in dense attention; those in v where
    their block is selected.
    On the GPU the first call of a kind (shapes, strides, dtype, options) compiles and plans; later ones reuse that and
    the stream's workspace, see :func:`plan`, which also says how to capture calls into a CUDA graph.
    Raises ArgumentError, DtypeError, GpuError, CompileError, OutOfMemoryError.
    """
    options = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        estimator=estimator,
        attend=attend,
        block=block,
        query_stride=query_stride,
        full_rows=full_rows,
        sink=sink,
        local=local,
        dense_below=dense_below,
        skipped=skipped,
        softcap=softcap,
        window_size=window_size,
    )
    return _call(q, k, v, thresholds, layout, options, return_lse, return_mask, out, stream, sink_logits, k_statistics)


def dense_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    softcap: float = 0.0,
    window_size: int | tuple[int, int] | None = None,
    sink_logits: Any = None,
    return_lse: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Exact attention over every visible key: ``sparse_attention`` with every block selected.

    Arguments, result (out, or (out, lse)) and errors are those of :func:`sparse_attention`.
    """
    options = dict(causal=causal, softmax_scale=softmax_scale, softcap=softcap, window_size=window_size)
    return _call(q, k, v, 0.0, layout, options, return_lse, False, out, stream, sink_logits)


def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    dtype: Any = None,
    device: int | None = None,
    layout: str = "bshd",
    **options: Unpack[Options],
) -> "AttentionPlan":
    """What :func:`sparse_attention` prepares for calls of one kind, to hold and to run.

    q, k, v, layout and options (causal, softmax_scale, estimator, attend, block, query_stride, full_rows, sink, local,
    dense_below, skipped, softcap, window_size) are those of ``sparse_attention``; sink logits are given to each run.
    The arrays are examples: their shapes, strides, dtype and GPU count, they are neither read nor kept. Raises what
    ``sparse_attention`` raises.
    Or q, k and v are shapes, tuples in ``layout``, of contiguous arrays. Then dtype is theirs, "float16" or "bfloat16",
    and device the number of their CUDA device, or None for host memory: a plan for the twin.
    """
    check_names("plan", options)
    q, k, v = call_checks.examples(q, k, v, dtype, device)
    with arrays.on_stream(q, None) as device:
        return AttentionPlan(*arrays.on_device(device, q, k, v), layout, options)


def sparse_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Any = None,
    seqlens_k: Any = None,
    thresholds: Any = 0.008,
    causal: bool = True,
    softmax_scale: float | None = None,
    estimator: str = "auto",
    attend: str = "exact",
    block: tuple[int, int] = (128, 32),
    query_stride: int = 1,
    full_rows: int = 1024,
    sink: int = 32,
    local: int = 128,
    dense_below: int = DENSE_BELOW,
    skipped: str = "drop",
    softcap: float = 0.0,
    window_size: int | tuple[int, int] | None = None,
    sink_logits: Any = None,
    k_statistics: Any = None,
    return_lse: bool = False,
    out: Any = None,
    stream: Any = None,
    workspace: Any = None,
    debug: bool | None = None,
) -> Any:
    """:func:`sparse_attention` of sequences with lengths of their own, packed one after the other or in pages.

    q: [total_q, num_heads, head_dim]; k, v: [total_k, num_kv_heads, head_dim]; sequence i has the rows from
        ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` and the keys from ``cu_seqlens_k[i]`` to ``cu_seqlens_k[i + 1]``.
        dtype and strides as in ``sparse_attention``.
    cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], from 0, rising; both in host memory (NumPy or a list) or both on q's
        GPU. max_seqlen_q, max_seqlen_k: ints, at least the longest of each; they size the workspace, and
        ``dense_below`` goes by them.
    block_table: int32 [batch, max_pages_per_seq], where q is. k and v are then pages, [num_pages, page_size,
        num_kv_heads, head_dim], page_size 16, 32, 64, 128 or 256: key j of sequence i is row ``j % page_size`` of page
        ``block_table[i, j // page_size]``. Entries past a sequence's end are not read. cu_seqlens_k is None, and
        seqlens_k, int32 [batch] where cu_seqlens_q is, has the numbers of keys.
    thresholds, causal (bottom-right aligned in each sequence), softmax_scale, estimator, block, query_stride, full_rows
        (of each sequence), sink, local, attend, softcap, out, stream: as in ``sparse_attention``.
    skipped: "drop"; there are no pools here.
    window_size: (left, right) or an integer, as there; row i of a sequence is at position ``i + seqlen_k - seqlen_q``
        of that sequence.
    sink_logits: one more logit a head, as there: numbers on the host, or float32 [num_heads] where q is.
    dense_below: the whole call is dense when max_seqlen_k, or what the window holds of it, is not above it.
    k_statistics: a KeyStatistics whose batch is that of the sequences, or None.
    workspace: None, or memory on q's GPU to use instead of the stream's: a contiguous array of at least
        :func:`varlen_workspace_bytes` bytes, aligned to 256, that nothing else uses before the call has run there. The
        twin does not look at it.
    debug: check what is on the GPU, too (see below); None: as the environment variable SALEKIT_DEBUG says, 1 or 0.

    Returns out (like q), or (out, lse): lse float32 [num_heads, total_q]. A sequence may have no rows or no keys: out 0
    and lse -inf, or the head's sink logit. Rows of q that are in no sequence have no defined output. Each sequence's
    output is that of a call of its own with the same options, but for roundings where its size makes that call take
    other kernels.
    What is wrong with lengths, pages or sink logits is an error before anything is written when they are on the host.
    On the GPU they are not looked at: nothing beyond the arrays is read or written, and a page that there is not has
    zeros, but the output is then undefined (NaN in the heads of NaN or +inf as a sink logit). With debug they are
    copied to the host and checked, which waits for the stream. Without it nothing synchronises, and a call with
    everything on the GPU can be captured into a CUDA graph, where lengths, pages and sink logits are read at each
    replay (those on the host are frozen).
    Raises ArgumentError, DtypeError, GpuError, CompileError, OutOfMemoryError.
    """
    options = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        estimator=estimator,
        attend=attend,
        block=block,
        query_stride=query_stride,
        full_rows=full_rows,
        sink=sink,
        local=local,
        dense_below=dense_below,
        skipped=skipped,
        softcap=softcap,
        window_size=window_size,
    )
    return_lse = check_flag("return_lse", return_lse)
    with arrays.on_stream(q, stream) as device:
        call = sequences.check_sequences(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqlens_k, device,
            sequences.is_debugging(debug), options, sink_logits,
        )
        target = None if out is None else sequences.check_out(out, call, device)
        if device is None:
            result, lse = sequences.run_twin(call, thresholds, return_lse, target, k_statistics)
        else:
            result, lse = sequences.run_gpu(call, thresholds, return_lse, target, k_statistics, device, workspace)
        result = result[0] if out is None else out
        return (result, lse) if return_lse else result


def varlen_workspace_bytes(*arguments: Any, **options: Any) -> int:
    """Bytes of workspace that :func:`sparse_attention_varlen` takes with these arguments; 0 without a GPU.

    The arguments are that call's; its errors are raised. Compiles the kernels, runs nothing and writes nothing. What
    counts is shapes, strides, dtypes, the largest lengths, options, ``return_lse``, and whether lengths, thresholds and
    sink logits are on the host: calls that agree in these take the same.
    """
    try:
        given = _VARLEN.bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"varlen_workspace_bytes(): {error}") from None
    given.apply_defaults()
    given = given.arguments
    with arrays.on_stream(given["q"], given["stream"]) as device:
        packed = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        call = sequences.check_sequences(
            *(given[name] for name in (*packed, "block_table", "seqlens_k")), device,
            sequences.is_debugging(given["debug"]), {name: given[name] for name in OPTIONS}, given["sink_logits"],
        )
        return_lse = check_flag("return_lse", given["return_lse"])
        target = None if given["out"] is None else sequences.check_out(given["out"], call, device)
        return sequences.workspace_bytes(call, given["thresholds"], return_lse, target, given["k_statistics"], device)


_VARLEN = inspect.signature(sparse_attention_varlen)
varlen_workspace_bytes.__signature__ = _VARLEN.replace(return_annotation="int")


def _call(
    q: Any,
    k: Any,
    v: Any,
    thresholds: Any,
    layout: str,
    options: dict,
    return_lse: bool,
    return_mask: bool,
    out: Any,
    stream: Any,
    sink_logits: Any,
    k_statistics: Any = None,
) -> Any:
    return_lse, return_mask = check_flag("return_lse", return_lse), check_flag("return_mask", return_mask)
    with arrays.on_stream(q, stream) as device:
        if device is None:
            data = dict(out=out, thresholds=thresholds, sink_logits=sink_logits)
            call = call_checks.check_call(q, k, v, layout=layout, **data, **options)
            check_statistics(k_statistics, call.plan, None)
            return pipeline.run_twin(call, return_lse, return_mask, k_statistics)
        q, k, v = arrays.on_device(device, q, k, v)
        prepared = plan_of(q, k, v, layout, options)
        more = dict(sink_logits=sink_logits, k_statistics=k_statistics)
        return prepared._run(q, k, v, thresholds, return_lse, return_mask, out, None, **more)
