"""Statistics of keys, kept from chunk to chunk: what the estimators need to know of all keys of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable

import numpy as np

from . import arrays, call_checks, jit, reference
from .errors import ArgumentError, DtypeError
from .plans import HEAD_DIMS, MAX_GRID, MAX_SEQLEN, Plan
from .quantize import REDUCE_ROWS, channel_partials, reduce_spec

_NULL = np.uint64(0)
_FIELDS = ("mean", "rms", "amax", "scale", "num_keys", "state")


@dataclass(frozen=True, repr=False)
class KeyStatistics:
    """Statistics of the keys of a batch of sequences, NumPy's or CuPy's; made by :func:`key_statistics`.

    mean: float32 [batch, num_kv_heads, head_dim], what smoothing takes off each key. rms: likewise, root of the mean
        squared deviation from it (int8-sp24 prunes q by it). amax, scale: float32 [batch, num_kv_heads], the largest
        deviation, which int8 takes to 127, and that divided by 127.
    num_keys: int32 [batch]. state: float32 [batch, num_kv_heads, 4, head_dim], sum, smallest, largest and squared
        deviations: what more keys are added to.
    """

    mean: Any
    rms: Any
    amax: Any
    scale: Any
    num_keys: Any
    state: Any

    def __repr__(self) -> str:
        batch, heads, head_dim = self.mean.shape
        place = arrays.place_name(self.mean.data.device_id if arrays.is_cuda(self.mean) else None)
        return f"KeyStatistics(batch={batch}, num_kv_heads={heads}, head_dim={head_dim}, {place})"

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """What a call takes, in this order: mean, rms, amax, scale."""
        return self.mean, self.rms, self.amax, self.scale

    @classmethod
    def stack(cls, parts: Iterable["KeyStatistics"]) -> "KeyStatistics":
        """Those of a batch from those of its sequences, in their order: for packed sequences. On the GPU copies on the
        current stream. Raises ArgumentError when they are not alike or there are none, DtypeError."""
        parts = list(parts)
        if not parts:
            raise ArgumentError("parts: got none; wants at least one KeyStatistics")
        for part in parts:
            if not isinstance(part, cls):
                raise DtypeError(f"parts: got {type(part).__name__}; wants what key_statistics returns")
        first = parts[0].mean
        place = first.data.device_id if arrays.is_cuda(first) else None
        for part in parts:
            check(part, part.mean.shape[0], *first.shape[1:], place, wanted_by="the first", name="parts")
        return cls(**{name: _concatenate([getattr(part, name) for part in parts]) for name in _FIELDS})

    def of_sequence(self, index: int) -> "KeyStatistics":
        """Those of one sequence of the batch, as a batch of one; views. ArgumentError if there is none."""
        batch = self.mean.shape[0]
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < batch:
            raise ArgumentError(f"index: got {index!r}; wants 0 to {batch - 1}, one of the sequences")
        part = slice(index, index + 1)
        return KeyStatistics(**{name: getattr(self, name)[part] for name in _FIELDS})

    def update(self, k: Any, *, layout: str = "bshd", stream: Any = None) -> "KeyStatistics":
        """The statistics of these keys and of ``k`` together; k as in :func:`key_statistics`, of the same batch, heads
        and head_dim. Nothing is read again but k. Raises ArgumentError, DtypeError."""
        with arrays.on_stream(k, stream, "k") as device:
            view = _check_keys(k, device, layout)
            batch, _, heads, head_dim = view.shape
            check(self, batch, heads, head_dim, device, wanted_by="k")
            return _of_keys(view, device, self)

    def merge(self, other: "KeyStatistics", *, stream: Any = None) -> "KeyStatistics":
        """The statistics of both sets of keys together, such as those of two devices' shares of one sequence."""
        with arrays.on_stream(self.mean, stream) as device:
            check(other, *self.mean.shape, device, wanted_by="these statistics", name="other")
            if device is None:
                return KeyStatistics(*reference.merge_key_statistics(
                    self.num_keys, self.state, other.num_keys, other.state
                ))
            return _combine(self, other.state, 1, 0, other.num_keys)


def key_statistics(k: Any, *, layout: str = "bshd", stream: Any = None) -> KeyStatistics:
    """Statistics of keys, for ``k_statistics`` of :func:`salekit.sparse_attention`.

    A call without them takes its own, over all keys that it is given. In a chunked prefill those differ from chunk to
    chunk, and with them the codes, the scores and now and then a bit of the mask. Chunks that are given the same
    statistics have the same masks as one call over all of them that is given these.

    k: [batch, seqlen_k, num_kv_heads, head_dim], float16 or bfloat16, as in ``sparse_attention``. On the GPU two
    launches, no synchronisation; the results are allocated. Raises ArgumentError, DtypeError, GpuError, CompileError,
    OutOfMemoryError.
    """
    with arrays.on_stream(k, stream, "k") as device:
        return _of_keys(_check_keys(k, device, layout), device, None)


def check(
    statistics: Any, batch: int, heads: int, head_dim: int, device: int | None, *, wanted_by: str = "k",
    name: str = "k_statistics",
) -> KeyStatistics:
    """``statistics``, when they are of such keys and on that device."""
    if not isinstance(statistics, KeyStatistics):
        raise DtypeError(f"{name}: got {type(statistics).__name__}; wants what key_statistics returns, or None")
    if statistics.mean.shape != (batch, heads, head_dim):
        raise ArgumentError(
            f"{name}: got statistics of [batch, num_kv_heads, head_dim] {statistics.mean.shape}; wants "
            f"{(batch, heads, head_dim)}, as {wanted_by} has"
        )
    place = statistics.mean.data.device_id if arrays.is_cuda(statistics.mean) else None
    if place != device:
        got, want = arrays.place_name(place), arrays.place_name(device)
        raise ArgumentError(f"{name}: is on {got}; wants {want}, where {wanted_by} is")
    return statistics


def kernel_specs(plan: Plan) -> list[jit.KernelSpec]:
    """The kernels of this module for this plan's keys."""
    return [reduce_spec(plan), _combine_spec(plan.head_dim)]


def _check_keys(k: Any, device: int | None, layout: str) -> Any:
    view = call_checks.check_view("k", k, device, layout)
    if view.shape[3] not in HEAD_DIMS:
        raise ArgumentError(f"k: got head_dim {view.shape[3]}; wants one of {', '.join(map(str, HEAD_DIMS))}")
    if view.shape[2] < 1:
        raise ArgumentError(f"k: got {view.shape[2]} heads; wants at least 1")
    if device is not None and max(view.shape[0], view.shape[2]) > MAX_GRID:
        got = f"batch {view.shape[0]} and {view.shape[2]} heads"
        raise ArgumentError(f"k: got {got}; wants at most {MAX_GRID} of each")
    if view.shape[1] > MAX_SEQLEN:
        raise ArgumentError(f"k: got seqlen {view.shape[1]}; wants at most {MAX_SEQLEN}")
    return view


def _of_keys(k: Any, device: int | None, before: KeyStatistics | None) -> KeyStatistics:
    if device is None:
        fresh = reference.key_statistics(k)
        if before is None:
            return KeyStatistics(*fresh)
        *_, num_keys, state = fresh
        return KeyStatistics(*reference.merge_key_statistics(before.num_keys, before.state, num_keys, state))
    batch, seqlen, heads, head_dim = k.shape
    plan = Plan(batch, seqlen, seqlen, heads, heads, head_dim, arrays.DTYPE_NAMES[k.dtype], 1.0)
    partials, chunks = channel_partials(k, plan) if k.size else (None, 0)
    return _combine(before, partials, chunks, seqlen, None, k.shape)


def _combine(
    before: KeyStatistics | None, partials: Any, chunks: int, rows: int, num_keys: Any, shape: tuple | None = None
) -> KeyStatistics:
    """``before`` (None: no keys) and the keys of these partials, or of a state when num_keys says how many."""
    if shape is None:
        batch, heads, head_dim = before.mean.shape
    else:
        batch, _, heads, head_dim = shape
    channels = (batch, heads, head_dim)
    mean, rms = arrays.empty(channels), arrays.empty(channels)
    amax, scale = arrays.empty((batch, heads)), arrays.empty((batch, heads))
    total, state = arrays.empty((batch,), np.int32), arrays.empty((batch, heads, 4, head_dim))
    if batch:
        jit.get_kernel(_combine_spec(head_dim))(
            (heads, batch),
            (4 * head_dim,),
            (
                _NULL if before is None else before.num_keys,
                _NULL if before is None else before.state,
                _NULL if num_keys is None else num_keys,
                _NULL if partials is None else partials,
                np.int32(chunks),
                np.int32(REDUCE_ROWS),
                np.int32(rows),
                total,
                state,
                mean,
                rms,
                amax,
                scale,
            ),
        )
    return KeyStatistics(mean, rms, amax, scale, total, state)


def _concatenate(parts: list) -> Any:
    if not arrays.is_cuda(parts[0]):
        return np.concatenate(parts)
    shape = (sum(x.shape[0] for x in parts), *parts[0].shape[1:])
    whole = arrays.allocate(arrays.import_cupy().ndarray, shape, parts[0].dtype)
    at = 0
    for part in parts:
        whole[at : at + part.shape[0]].data.copy_from_device_async(part.data, part.nbytes)
        at += part.shape[0]
    return whole


def _combine_spec(head_dim: int) -> jit.KernelSpec:
    return jit.KernelSpec("combine_key_statistics", (str(head_dim),))


