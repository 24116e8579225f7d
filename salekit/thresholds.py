"""Thresholds tau: what callers pass, what the stages take, and files of them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArgumentError, DtypeError, FileFormatError

SCHEMA = 1
SCHEMA_LAYERS = 2  # what :func:`save_thresholds` writes


def as_thresholds(thresholds: Any, num_heads: int, q: Any) -> Any:
    """A float, or float32 [num_heads] where ``q`` (a checked array) is. Errors: see :func:`check_thresholds`."""
    from .arrays import import_cupy, is_cuda

    values = check_thresholds(thresholds, num_heads, q)
    return import_cupy().asarray(values) if isinstance(values, np.ndarray) and is_cuda(q) else values


def check_thresholds(thresholds: Any, num_heads: int, q: Any) -> Any:
    """A float, or float32 [num_heads] on the host or where ``q`` (a checked array) is.

    Host values must be >= 0 and not NaN (inf is fine). An array on the GPU is not read, so that nothing waits for it:
    NaN or a negative value there means a dense head. Raises ArgumentError, DtypeError.
    """
    if type(thresholds) is float and thresholds >= 0:
        return thresholds
    if type(thresholds) in (list, tuple) and set(map(type, thresholds)) == {float}:
        return _check_list(tuple(thresholds), num_heads)
    from .arrays import _import_array, _place, is_cuda, place_name

    if isinstance(thresholds, Real) and not isinstance(thresholds, (bool, np.bool_)):
        return float(_check_values(np.float64(thresholds)))
    if isinstance(thresholds, np.ndarray) and thresholds.ndim == 0:
        return float(_check_values(_as_host(thresholds)))
    if isinstance(thresholds, (list, tuple)):
        try:
            thresholds = np.array(thresholds)
        except ValueError as error:
            raise ArgumentError(f"thresholds: got a ragged list; wants {num_heads} numbers, one a head") from error
    place, want = _place("thresholds", thresholds), q.device.id if is_cuda(q) else None
    if place is None:
        values = _as_host(_import_array("thresholds", thresholds, None))
        _check_shape(values.shape, num_heads)
        return np.ascontiguousarray(_check_values(values), np.float32)
    if place != want:
        wants = "host memory" if want is None else f"{place_name(want)} or host memory"
        raise ArgumentError(f"thresholds: is on {place_name(place)}; wants {wants}")
    values = _import_array("thresholds", thresholds, place)
    if values.dtype != np.float32:
        raise DtypeError(f"thresholds: got dtype {values.dtype} on the GPU; wants float32")
    _check_shape(values.shape, num_heads)
    if not values.flags.c_contiguous:
        raise ArgumentError("thresholds: is not contiguous; wants a contiguous array on the GPU")
    return values


@lru_cache(maxsize=64)
def _check_list(thresholds: tuple[float, ...], num_heads: int) -> np.ndarray:
    """Host thresholds that come as a list, the same at most calls. Read-only."""
    _check_shape((len(thresholds),), num_heads)
    values = np.array(_check_values(np.array(thresholds)), np.float32)
    values.flags.writeable = False
    return values


def _as_host(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise DtypeError(f"thresholds: got dtype {values.dtype}; wants real numbers")
    return values.astype(np.float64)


def _check_shape(shape: tuple, num_heads: int) -> None:
    if tuple(shape) != (num_heads,):
        raise ArgumentError(f"thresholds: got shape {tuple(shape)}; wants a scalar or [num_heads] = ({num_heads},)")


def _check_values(values: Any) -> Any:
    bad = np.flatnonzero(~(np.atleast_1d(values) >= 0))
    if bad.size:
        where = f" for head {bad[0]}" if np.ndim(values) else ""
        raise ArgumentError(f"thresholds: got {np.atleast_1d(values)[bad[0]]:g}{where}; wants values >= 0, not NaN")
    return values


def save_thresholds(path: str | Path, layers: dict[str, dict[int, Any]], about: dict[str, Any]) -> None:
    """Write thresholds that ``salekit calibrate`` found; the file appears whole or not at all.

    layers: by layer and seqlen, thresholds [num_heads]. about: at least estimator, block and query_stride, which they
    were found with; all of it goes into the file.
    """
    path = Path(path)
    content = {
        "schema": SCHEMA_LAYERS,
        "kind": "salekit-thresholds",
        **about,
        "layers": {
            layer: {str(seqlen): [float(x) for x in values] for seqlen, values in sorted(by_length.items())}
            for layer, by_length in layers.items()
        },
    }
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_thresholds(
    path: str | Path,
    *,
    layer: int | str | None = None,
    seqlen: int | None = None,
    estimator: str | None = None,
    block: tuple[int, int] | None = None,
) -> np.ndarray:
    """Per-head thresholds of a JSON file, float32 [num_heads].

    The file is what ``salekit calibrate`` writes, or ``{"schema": 1, "thresholds": [0.008, ...]}``, or the list alone;
    ``Infinity`` is a value. Of a calibrated file: layer is needed when it holds several; seqlen chooses among its
    lengths: between two, log tau is interpolated over log seqlen, beyond them the nearest counts (default: the
    longest). estimator, block: where given, they have to be those that the thresholds were found with.
    Raises FileFormatError, with the path, when it is missing, malformed or holds anything else; ArgumentError when
    layer, estimator or block are not the file's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: is not JSON: {error}") from error
    if isinstance(content, dict) and content.get("schema") == SCHEMA_LAYERS:
        return _of_layer(path, content, layer, seqlen, estimator, block)
    values = content
    if isinstance(content, dict):
        if content.get("schema") != SCHEMA:
            raise FileFormatError(f"{path}: got schema {content.get('schema')!r}; wants {SCHEMA} or {SCHEMA_LAYERS}")
        values = content.get("thresholds")
    return _numbers(path, values)


def _of_layer(path, content: dict, layer, seqlen, estimator, block) -> np.ndarray:
    layers = content.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise FileFormatError(f"{path}: holds no layers")
    for name, want, got in (("estimator", estimator, content.get("estimator")), ("block", block, content.get("block"))):
        if want is not None and got != (list(want) if name == "block" else want):
            raise ArgumentError(f"{name}: {path} was calibrated with {got!r}, not with {want!r}")
    if layer is None and len(layers) > 1:
        raise ArgumentError(f"layer: {path} holds layers {', '.join(layers)}; wants one of them")
    name = next(iter(layers)) if layer is None else str(layer)
    if name not in layers:
        raise ArgumentError(f"layer: got {layer!r}; {path} holds {', '.join(layers)}")
    if not isinstance(layers[name], dict) or not layers[name]:
        raise FileFormatError(f"{path}: layer {name} holds no lengths")
    try:
        lengths = sorted(int(length) for length in layers[name])
    except ValueError as error:
        raise FileFormatError(f"{path}: layer {name}: {error}") from error
    if not _alike(layers[name]) or lengths[0] < 1:
        raise FileFormatError(f"{path}: layer {name}: lengths differ in their heads, or are not lengths")
    found = np.stack([_numbers(path, layers[name][str(length)]) for length in lengths])
    if seqlen is None or len(lengths) == 1:
        return found[-1]
    with np.errstate(divide="ignore"):
        logs = np.log(found.astype(np.float64))  # -inf for 0, which stays 0 next to it
    at = np.clip(np.log(max(1, seqlen)), np.log(lengths[0]), np.log(lengths[-1]))
    upper = min(len(lengths) - 1, max(1, int(np.searchsorted(np.log(lengths), at))))
    share = (at - np.log(lengths[upper - 1])) / (np.log(lengths[upper]) - np.log(lengths[upper - 1]))
    ends = [(1 - share, logs[upper - 1]), (share, logs[upper])]
    return np.exp(sum(weight * log for weight, log in ends if weight > 0)).astype(np.float32)


def _alike(by_length: dict) -> bool:
    return len({len(values) for values in by_length.values() if isinstance(values, list)}) == 1


def _numbers(path, values: Any) -> np.ndarray:
    if not isinstance(values, list) or not values:
        raise FileFormatError(f'{path}: wants a list of numbers, one a head, alone or under "thresholds"')
    for head, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise FileFormatError(f"{path}: got {value!r} for head {head}; wants a number >= 0")
    try:
        return np.array([float(value) for value in values], np.float32)
    except OverflowError as error:
        raise FileFormatError(f"{path}: holds a number too large for a float") from error
