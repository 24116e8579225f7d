"""The attention call as an XLA custom call: ``salekit_attention`` on platforms "cpu" (the twin) and "CUDA".

Operands: q, k, v and, where the config says so, thresholds and sink logits. Results: out and, where wanted, lse and the
mask's words. The attribute "config" is a JSON text that says everything else. So a call means the same in another
process, too: in a cache of compiled programs, or in an exported one.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Callable

import numpy as np

from . import arrays, call_checks, pipeline, workspaces
from .attention_plan import MAX_PLANS, AttentionPlan, plan_of
from .errors import ArgumentError, DtypeError, GpuError
from .options import OPTIONS
from .xla_ffi import (
    FAILED_PRECONDITION,
    INTERNAL,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    Call,
    describe,
    host_array,
    make_handler,
)

TARGET = "salekit_attention"
ATTRIBUTE = "config"
_KEY = ATTRIBUTE.encode()  # as XLA gives it
SCHEMA = 1
_QUIET_SECONDS = 0.1
_MAX_STREAMS = 64
_MAX_CALLS = 256  # kinds of calls, each with the addresses of its buffers
_MAX_ARRAYS = 1024  # buffers that calls have had, each with its CuPy array


@dataclass(frozen=True)
class Config:
    """What a call is, apart from its shapes. thresholds: tau of all heads; None when they are an operand."""

    thresholds: float | None
    layout: str = "bshd"
    return_lse: bool = False
    return_mask: bool = False
    options: dict = field(default_factory=dict)  # of sparse_attention
    has_sinks: bool = False
    schema: int = SCHEMA

    def encode(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=_plain)

    @classmethod
    def decode(cls, text: str | bytes) -> "Config":
        try:
            config = cls(**json.loads(text, object_hook=_with_tuples))
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"config: got {text!r}; wants what this version of salekit writes ({error})") from error
        if config.schema != SCHEMA:
            raise ArgumentError(f"config: got schema {config.schema}; wants {SCHEMA}: compiled for another salekit")
        if not isinstance(config.options, dict) or not config.options.keys() <= OPTIONS:
            raise ArgumentError(f"config: got options {config.options!r}; wants those of this version of salekit")
        return config

    @property
    def num_operands(self) -> int:
        return 3 + (self.thresholds is None) + self.has_sinks

    def thresholds_and_sinks(self, others: list) -> tuple[Any, Any]:
        """Those of a call with these operands after q, k and v; None: no sink logits."""
        return self.thresholds if self.thresholds is not None else others[0], others[-1] if self.has_sinks else None

    @property
    def num_results(self) -> int:
        return 1 + self.return_lse + self.return_mask


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be an option")


def _with_tuples(values: dict) -> dict:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


@lru_cache(maxsize=256)
def _decode(text: bytes) -> Config:
    return Config.decode(text)


def _config_of(call: Call) -> Config:
    config = _decode(call.attributes.get(_KEY, b"{}"))
    got, want = (len(call.operands), len(call.results)), (config.num_operands, config.num_results)
    if got != want:
        raise ArgumentError(f"config: got {got} operands and results; wants {want}")
    return config


# --- on the host ---------------------------------------------------------------------------------------------------
def run_on_host(call: Call) -> None:
    """The twin on XLA's buffers, in place."""
    config = _config_of(call)
    buffers = [host_array(kind, at) for kind, at in zip(call.operands + call.results, call.addresses)]
    (q, k, v, *others), (out, *wanted) = buffers[: config.num_operands], buffers[config.num_operands :]
    thresholds, sinks = config.thresholds_and_sinks(others)
    # As on a GPU, where nobody looks: NaN or a negative value is a dense head, any value a sink logit.
    thresholds = np.where(thresholds >= 0, thresholds, np.float32(0)) if config.thresholds is None else thresholds
    checked = call_checks.check_call(
        q, k, v, layout=config.layout, out=out, thresholds=thresholds,
        sink_logits=None if sinks is None else np.zeros_like(sinks), **config.options,
    )
    result = pipeline.run_twin(replace(checked, sink_logits=sinks), config.return_lse, config.return_mask)
    extras = list(result[1:]) if wanted else []
    if config.return_mask:
        extras[-1] = extras[-1].words
    for target, extra in zip(wanted, extras):
        _check_result(target, extra.shape, extra.dtype)
        target[...] = extra


def _check_result(target: Any, shape: tuple, dtype: Any) -> None:
    if (target.shape, target.dtype) != (shape, dtype):
        raise ArgumentError(f"result: got {target.dtype}{target.shape}; wants {dtype}{shape}")


# --- on a GPU ------------------------------------------------------------------------------------------------------
_streams: workspaces.RecentlyUsed[Any] = workspaces.RecentlyUsed(_MAX_STREAMS)
# A call's plan, and what it runs on. The arrays own nothing, so they serve every call with such buffers there.
_prepared: workspaces.RecentlyUsed[tuple[AttentionPlan, tuple]] = workspaces.RecentlyUsed(_MAX_CALLS)
_arrays: workspaces.RecentlyUsed[Any] = workspaces.RecentlyUsed(_MAX_ARRAYS)
_plans: workspaces.RecentlyUsed[AttentionPlan] = workspaces.RecentlyUsed(MAX_PLANS)


def run_on_gpu(call: Call) -> None:
    """Launch the call on XLA's stream; the workspace is that of the stream, from CuPy's memory.

    A program calls again with the same buffers more often than not: then one lookup finds all that the call needs.
    """
    cuda = arrays.import_cupy().cuda
    device = cuda.runtime.pointerGetAttributes(call.addresses[0]).device  # XLA's ordinals need not be CUDA's
    kind = (device, call.operands, call.results, call.attributes.get(_KEY))
    key = (kind, *call.addresses)
    with cuda.Device(device), _stream(device, call.stream()):
        plan, arguments = _prepared.get(key) or _prepared.add(key, _prepare(device, call, kind))
        plan._execute(arguments)


def _prepare(device: int, call: Call, kind: tuple) -> tuple[AttentionPlan, tuple]:
    config = _config_of(call)
    buffers = [_array(device, each, address) for each, address in zip(call.operands + call.results, call.addresses)]
    (q, k, v, *others), (out, *extras) = buffers[: config.num_operands], buffers[config.num_operands :]
    plan = _plan(kind, call, config, q, k, v)
    lse = extras.pop(0) if config.return_lse else None
    words = extras.pop() if config.return_mask else None
    thresholds, sinks = config.thresholds_and_sinks(others)
    arguments = plan._check(
        q, k, v, thresholds, config.return_lse, config.return_mask, out, workspace=None,
        sink_logits=sinks, lse_out=lse, words_out=words,
    )
    return plan, arguments


def _plan(kind: tuple, call: Call, config: Config, q: Any, k: Any, v: Any) -> AttentionPlan:
    found = _plans.get(kind)
    if found is None:
        found = plan_of(q, k, v, config.layout, config.options)
        shapes = [(found.plan.batch, found.plan.num_heads, found.plan.seqlen_q)] * config.return_lse
        shapes += [found.plan.words_shape] * config.return_mask
        for got, shape in zip(call.results[1:], shapes):
            if got[1:] != shape:
                raise ArgumentError(f"result: got shape {got[1:]}; wants {shape}")
        _plans.add(kind, found)
    return found


def _stream(device: int, pointer: int) -> Any:
    """CuPy's object for a stream. It owns nothing: where XLA gives the address to another stream, it is that one."""
    found = _streams.get((device, pointer))
    if found is None:
        with arrays.import_cupy().cuda.Device(device):
            found = _streams.add((device, pointer), arrays.external_stream(pointer))
    return found


def _array(device: int, kind: tuple, address: int) -> Any:
    """The CuPy array of a buffer. It owns nothing either, so one serves every call with such a buffer there."""
    key = (device, address, kind)
    found = _arrays.get(key)
    if found is None:
        cupy = arrays.import_cupy()
        dtype, shape, num_bytes = describe(kind)
        memory = cupy.cuda.UnownedMemory(address, num_bytes, None, device)
        found = _arrays.add(key, cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0)))
    return found


# --- for XLA -------------------------------------------------------------------------------------------------------
def _explain(error: BaseException) -> tuple[int, str]:
    code, text = INTERNAL, f"salekit: {type(error).__name__}: {error}"
    if isinstance(error, (ArgumentError, DtypeError)):
        code = INVALID_ARGUMENT
    elif isinstance(error, GpuError):
        code = FAILED_PRECONDITION
    elif isinstance(error, MemoryError):
        code = RESOURCE_EXHAUSTED
        text += "; the workspace is outside XLA's memory: leave it more, with XLA_PYTHON_CLIENT_MEM_FRACTION"
    return code, text


class _Running:
    """Handlers at work. Python must not end under them: it ends their threads, and what waits for these, another
    device in a collective operation or XLA for its threads, waits for ever."""

    def __init__(self) -> None:
        self._lock, self._count, self._changed = threading.Lock(), 0, -math.inf
        self._process, self._is_expected = os.getpid(), False

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._count -= 1
            self._changed = time.monotonic()

    def expect(self) -> None:
        """A program that will call a handler is being made."""
        self._is_expected = True

    def wait(self) -> None:
        """Until none has been at work for a moment, in which the program that called the last would call the next."""
        if os.getpid() != self._process:  # a forked child has none of these threads
            return
        asked = time.monotonic() if self._is_expected else -math.inf
        while self._count or time.monotonic() - max(asked, self._changed) < _QUIET_SECONDS:
            time.sleep(0.005)


running = _Running()


def _execute(run: Callable[[Call], None], call: Call) -> None:
    with running:
        run(call)


@lru_cache(maxsize=None)
def handlers() -> dict[str, Any]:
    """The handler of each of XLA's platforms, a C function. It looks up what it runs at each call."""
    atexit.register(running.wait)
    return {
        "cpu": make_handler(lambda call: _execute(run_on_host, call), _explain),
        "CUDA": make_handler(lambda call: _execute(run_on_gpu, call), _explain),
    }
