"""salekit in JAX: ``sparse_attention`` and ``dense_attention`` under jit, vmap and shard_map (docs/jax.md).

On a GPU XLA calls salekit with the addresses of its buffers and its own stream; on a CPU the NumPy twin runs on them.
Needs JAX 0.5 or newer: ``pip install 'salekit[jax]'``. Importing this module imports JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

try:
    import jax
    import jax.ffi
    import jax.numpy as jnp
    from jax.custom_batching import custom_vmap
except ImportError as error:
    raise ImportError(f"salekit.jax needs JAX 0.5 or newer: pip install 'salekit[jax]' ({error})") from error

from . import call_checks
from .block_mask import BlockMask
from .errors import ArgumentError, DtypeError
from .options import DENSE_OPTIONS, DenseOptions, Options, Unpack, check_flag, check_names, checked_options
from .pipeline import pack
from .plans import Plan
from .thresholds import check_thresholds
from .xla_attention import ATTRIBUTE, TARGET, Config, handlers, running

__all__ = ["dense_attention", "sparse_attention"]


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    thresholds: Any = 0.008,
    layout: str = "bshd",
    sink_logits: Any = None,
    return_lse: bool = False,
    return_mask: bool = False,
    **options: Unpack[Options],
) -> Any:
    """:func:`salekit.sparse_attention` for JAX arrays, traced or not.

    q: [batch, seqlen_q, num_heads, head_dim], float16 or bfloat16; k, v: [batch, seqlen_k, num_kv_heads, head_dim];
        ``layout="bhsd"`` swaps the middle axes. JAX arrays, or what ``jnp.asarray`` takes.
    thresholds: tau, a number, or real numbers [num_heads] (or a scalar) as an array, which may be traced. Values on the
        host are checked; in a JAX array NaN or a negative value means a dense head.
    sink_logits: None, or one more logit a head, as there: numbers, or float32 [num_heads] as an array, which may be
        traced. Values on the host are finite or -inf; NaN or +inf in a JAX array makes NaN of the head's output.
    options: the other ones of ``salekit.sparse_attention`` (causal, softmax_scale, estimator, block, dense_below,
        softcap, window_size, ...) but out, stream and k_statistics: values of Python, which are part of the compiled
        program.

    Returns out (like q, in its layout), or a tuple (out[, lse][, mask]): lse float32 [batch, num_heads, seqlen_q];
    mask a BlockMask, a pytree with its words as the leaf.
    vmap: the mapped axis joins the batch; thresholds or sink logits that are mapped make one call after another.
    shard_map: shard the heads of q, k, v, thresholds and sink_logits over the same axes of the mesh, or the batch.
    Without shard_map XLA gathers whole arrays on each device. No derivative: ArgumentError.
    Raises ArgumentError and DtypeError when it is traced. What shows only on the GPU (no CuPy, attend="int8-fp8"
    elsewhere than on Hopper, no memory) comes as JAX's error from the running program, with salekit's message.
    """
    check_names("sparse_attention", options)
    flags = check_flag("return_lse", return_lse), check_flag("return_mask", return_mask)
    operands = [_as_jax(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    plan = _plan(operands, layout, options)
    tau = _as_thresholds(thresholds, plan.num_heads)
    is_static = isinstance(tau, float)
    if not is_static:
        operands.append(tau)
    has_sinks = sink_logits is not None
    if has_sinks:
        operands.append(_as_sinks(sink_logits, plan))
    config = Config(tau if is_static else None, layout, *flags, checked_options(options, plan), has_sinks)
    out, *extras = _attention(config.encode())(*_varying_alike(operands))
    lse = extras[0] if config.return_lse else None
    mask = BlockMask(extras[-1], *_mask_fields(plan)) if config.return_mask else None
    return pack(out, lse, mask, *flags)


def dense_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bshd",
    sink_logits: Any = None,
    return_lse: bool = False,
    **options: Unpack[DenseOptions],
) -> Any:
    """Exact attention over every visible key: :func:`sparse_attention` with every block selected.

    Arguments, result (out, or (out, lse)) and errors are those of :func:`sparse_attention`; options are those of
    ``salekit.dense_attention`` (causal, softmax_scale, softcap, window_size).
    """
    check_names("dense_attention", options, DENSE_OPTIONS)
    data = dict(thresholds=0.0, sink_logits=sink_logits)
    return sparse_attention(q, k, v, layout=layout, return_lse=return_lse, **data, **options)


# --- checks, when a call is traced ---------------------------------------------------------------------------------
def _as_jax(name: str, x: Any) -> jax.Array:
    if x is None:  # NaN to older versions of JAX
        raise DtypeError(f"{name}: got NoneType; wants a JAX or NumPy array")
    try:
        return jnp.asarray(x)
    except Exception as error:  # of whatever protocol x has
        raise DtypeError(f"{name}: got {type(x).__name__}; wants a JAX or NumPy array ({error})") from error


def _plan(operands: Any, layout: str, options: Mapping[str, Any]) -> Plan:
    """The plan of a call with these operands, which is checked."""
    return call_checks.make_plan(*(_stand_in(name, x) for name, x in zip("qkv", operands)), layout=layout, **options)


def _stand_in(name: str, x: jax.Array) -> np.ndarray:
    """An array of such a shape and dtype for the checks."""
    if not isinstance(x.dtype, np.dtype):
        raise DtypeError(f"{name}: got dtype {x.dtype}; wants float16 or bfloat16")
    return call_checks.stand_in(x.shape, x.dtype, None)


def _as_thresholds(thresholds: Any, num_heads: int) -> Any:
    """A float, or float32 [num_heads] of JAX."""
    if not isinstance(thresholds, jax.Array):
        values = check_thresholds(thresholds, num_heads, np.empty(0))
        return values if isinstance(values, float) else jnp.asarray(values)
    if not any(jnp.issubdtype(thresholds.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise DtypeError(f"thresholds: got dtype {thresholds.dtype}; wants real numbers")
    if thresholds.shape not in ((), (num_heads,)):
        raise ArgumentError(
            f"thresholds: got shape {thresholds.shape}; wants a scalar or [num_heads] = ({num_heads},)"
        )
    return jnp.broadcast_to(thresholds.astype(jnp.float32), (num_heads,))


def _as_sinks(sink_logits: Any, plan: Plan) -> jax.Array:
    """float32 [num_heads] of JAX; checked as NumPy's are, but for values that only JAX has."""
    if not isinstance(sink_logits, jax.Array):
        return jnp.asarray(call_checks.check_sink_logits(sink_logits, plan, np.empty(0)))
    if not isinstance(sink_logits.dtype, np.dtype):
        raise DtypeError(f"sink_logits: got dtype {sink_logits.dtype}; wants real numbers")
    call_checks.check_sink_logits(np.zeros(sink_logits.shape, sink_logits.dtype), plan, np.empty(0))  # has values, too
    return sink_logits.astype(jnp.float32)


def _varying_alike(operands: list) -> list:
    """Inside shard_map: what is the same on some devices counts as varying where another operand varies."""
    return _varying_over(_axes_of(operands), operands)


def _varying_over(axes: frozenset, xs: list) -> list:
    """These, marked as varying along such axes of shard_map's mesh."""
    missing = [tuple(axes - _axes_of([x])) for x in xs]
    return [_vary(x, names) if names else x for x, names in zip(xs, missing)]


def _axes_of(operands: list) -> frozenset:
    """The axes of shard_map's mesh along which one of these varies; JAX before 0.6 does not say."""
    if not hasattr(jax, "typeof"):
        return frozenset()
    return frozenset().union(*(_axes_of_type(jax.typeof(x)) for x in operands))


def _axes_of_type(kind: Any) -> frozenset:
    manual = getattr(kind, "manual_axis_type", None)  # since JAX 0.10, in place of vma
    return frozenset((getattr(kind, "vma", ()) if manual is None else manual.varying) or ())


def _vary(x: jax.Array, axes: tuple) -> jax.Array:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)


# --- the call ------------------------------------------------------------------------------------------------------
def _results(operands: Any, plan: Plan, config: Config) -> list[jax.ShapeDtypeStruct]:
    shapes = [(operands[0].shape, operands[0].dtype)]
    shapes += [((plan.batch, plan.num_heads, plan.seqlen_q), jnp.float32)] * config.return_lse
    shapes += [(plan.words_shape, jnp.uint32)] * config.return_mask
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


@lru_cache(maxsize=256)
def _attention(config_text: str) -> Any:
    """The function (operands) -> [out, lse, mask words] of a config: one object, so that jit knows it again."""
    config = Config.decode(config_text)
    running.expect()

    @custom_vmap
    def call(*operands):
        plan = _plan(operands, config.layout, config.options)
        results = _results(operands, plan, config)
        if plan.is_empty:  # of the results lse alone is float32
            lse = operands[-1][:, None] if config.has_sinks else -jnp.inf
            found = [jnp.full(x.shape, lse if x.dtype == jnp.float32 else 0, x.dtype) for x in results]
        else:
            found = jax.ffi.ffi_call(TARGET, results)(*operands, **{ATTRIBUTE: config_text})
        return _varying_over(_axes_of(operands), found)  # an FFI call does not say so itself

    @call.def_vmap
    def map_over_batch(axis_size, in_batched, *operands):
        if any(in_batched[3:]):
            mapped = jax.lax.map(lambda each: call(*_merge(in_batched, operands, each)), _mapped(in_batched, operands))
            return mapped, [True] * len(mapped)
        qkv = [x if is_batched else _repeat(x, axis_size) for x, is_batched in zip(operands[:3], in_batched)]
        batch = qkv[0].shape[1]
        results = call(*(x.reshape(axis_size * x.shape[1], *x.shape[2:]) for x in qkv), *operands[3:])
        return [x.reshape(axis_size, batch, *x.shape[1:]) for x in results], [True] * len(results)

    @jax.custom_jvp
    def without_derivative(*operands):
        return call(*operands)

    @without_derivative.defjvp
    def refuse(primals, tangents):
        raise ArgumentError(
            "salekit.jax has no backward pass: no derivative goes through it; stop it with jax.lax.stop_gradient, on "
            "q, k, v, thresholds and sink_logits"
        )

    return jax.jit(without_derivative)


def _repeat(x: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(x, (count, *x.shape))


def _mapped(in_batched: Any, operands: Any) -> list:
    return [x for x, is_batched in zip(operands, in_batched) if is_batched]


def _merge(in_batched: Any, operands: Any, each: list) -> list:
    """The operands with ``each`` in the places of those that are mapped."""
    mapped = iter(each)
    return [next(mapped) if is_batched else x for x, is_batched in zip(operands, in_batched)]


# --- registration --------------------------------------------------------------------------------------------------
_MASK_FIELDS = ("block_q", "block_k", "seqlen_q", "seqlen_k", "causal", "window_left", "window_right")


def _mask_fields(plan: Plan) -> tuple:
    return tuple(getattr(plan, name) for name in _MASK_FIELDS)


def _register() -> None:
    jax.tree_util.register_dataclass(BlockMask, ["words"], list(_MASK_FIELDS))
    for platform, handler in handlers().items():
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=platform)


_register()
