"""Thresholds tau: what callers pass, what the stages take, and files of them."""

from __future__ import annotations

import json
import math
import operator
import re
from functools import lru_cache
from numbers import Rational, Real
from pathlib import Path
from typing import Any

import numpy as np

from . import arrays
from .errors import ArgumentError, DtypeError, FileFormatError, SalekitError, escaped, shortened
from .options import as_float, check_block, shown
from .plans import MAX_SEQLEN
from .untrusted_files import MAX_JSON_BYTES, parse_json, read_json
from .written_files import write

SCHEMA = 1
SCHEMA_LAYERS = 3  # what :func:`save_thresholds` writes
OLDER_LAYERS = 2  # the same without fits
LOG2_RANGE = (-20.0, 12.0)  # of a tau that is calibrated or follows from a fit
_MOST_COEFFICIENT = 1e6  # of a fit in a file; exponents beyond it are no tau at any length
_LARGEST = float(np.finfo(np.float32).max)
REACH = 4.0  # a fit is followed to this many times the longest length at most, and to this part of the shortest


def as_thresholds(thresholds: Any, num_heads: int, q: Any) -> Any:
    """A float, or float32 [num_heads] where ``q`` (a checked array) is. Errors: see :func:`check_thresholds`."""
    values = check_thresholds(thresholds, num_heads, q)
    return arrays.import_cupy().asarray(values) if isinstance(values, np.ndarray) and arrays.is_cuda(q) else values


def check_thresholds(thresholds: Any, num_heads: int, q: Any) -> Any:
    """A float, or float32 [num_heads] on the host or where ``q`` (a checked array) is.

    Host values must be >= 0 and not NaN; inf is fine, and what is beyond float32 is inf. An array on the GPU is not
    read, so that nothing waits for it: NaN or a negative value there means a dense head. Raises ArgumentError,
    DtypeError.
    """
    if type(thresholds) is float and (0 <= thresholds <= _LARGEST or thresholds == math.inf):
        return thresholds
    if type(thresholds) in (list, tuple) and set(map(type, thresholds)) == {float}:
        return _check_list(tuple(thresholds), num_heads)
    want = q.device.id if arrays.is_cuda(q) else None
    values = _imported(thresholds, num_heads, want)
    if not arrays.is_cuda(values):
        values = _check_values(_as_host(values, num_heads))
        return np.ascontiguousarray(values, np.float32) if values.ndim else float(values)
    if values.dtype != np.float32:
        raise DtypeError(f"thresholds: got dtype {values.dtype} on the GPU; wants float32")
    _check_shape(values.shape, num_heads)
    if not values.flags.c_contiguous:
        raise ArgumentError("thresholds: is not contiguous; wants a contiguous array on the GPU")
    return values


def host_thresholds(thresholds: Any, num_heads: int) -> np.ndarray:
    """float64 [] or [num_heads] of thresholds in host memory, whatever their values; infinite where float32 has none.

    Raises ArgumentError, DtypeError.
    """
    return _as_host(_imported(thresholds, num_heads, None), num_heads)


@lru_cache(maxsize=64)
def _check_list(thresholds: tuple[float, ...], num_heads: int) -> np.ndarray:
    """Host thresholds that come as a list, the same at most calls. Read-only."""
    values = np.array(_check_values(_as_host(np.array(thresholds), num_heads)), np.float32)
    values.flags.writeable = False
    return values


def _imported(thresholds: Any, num_heads: int, device: int | None) -> Any:
    """An array in host memory or on ``device``."""
    if isinstance(thresholds, Real) and not isinstance(thresholds, (bool, np.bool_)):
        value = as_float(thresholds)
        if np.isinf(value) and isinstance(thresholds, Rational):
            raise ArgumentError(f"thresholds: got {shown(thresholds)}; wants a number that a float holds, or inf")
        return np.array(value)
    if isinstance(thresholds, (list, tuple)):
        try:
            thresholds = np.array(thresholds)
        except ValueError as error:
            raise ArgumentError(f"thresholds: got a ragged list; wants {num_heads} numbers, one a head") from error
        except TypeError as error:
            raise DtypeError(f"thresholds: got a list of other things than numbers ({error})") from error
    place = arrays.place_of("thresholds", thresholds, "a number, or one a head in a list, a NumPy or CuPy array")
    if place not in (None, device):
        wants = "host memory" if device is None else f"{arrays.place_name(device)} or host memory"
        raise ArgumentError(f"thresholds: is on {arrays.place_name(place)}; wants {wants}")
    return arrays.as_array("thresholds", thresholds, place)


def _as_host(values: np.ndarray, num_heads: int) -> np.ndarray:
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise DtypeError(f"thresholds: got dtype {values.dtype}; wants real numbers")
    if values.ndim:
        _check_shape(values.shape, num_heads)
    with np.errstate(over="ignore", invalid="ignore"):
        wide, narrow = values.astype(np.float64), values.astype(np.float32)
    return np.where(np.isinf(narrow), narrow, wide)


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

    layers: by layer and seqlen, thresholds [num_heads]. about: at least estimator, block, query_stride and skipped,
    which they were found with; all of it goes into the file, with :func:`fit_lengths` of each layer that has several.
    Raises ArgumentError or DtypeError for what :func:`load_thresholds` would not read, before anything is written.
    """
    path, layers = Path(path), _check_layers(layers)
    if not isinstance(about, dict):
        raise ArgumentError(f"about: got {shown(about)}; wants a dict")
    own = {
        "schema": SCHEMA_LAYERS,
        "kind": "salekit-thresholds",
        "layers": {layer: {str(seqlen): taus for seqlen, taus in of.items()} for layer, of in layers.items()},
        "fits": {layer: fit_lengths(of) for layer, of in layers.items() if len(of) > 1},
    }
    if taken := own.keys() & about.keys():
        names = ", ".join(map(repr, sorted(taken)))
        raise ArgumentError(f"about: got {names}; wants other names, as salekit writes these itself")
    text = _as_json({"schema": own.pop("schema"), "kind": own.pop("kind"), **about, **own})
    write(path, text)


def _check_layers(layers: Any) -> dict[str, dict[int, list[float]]]:
    """By layer and rising seqlen, thresholds [num_heads] that can be loaded again."""
    if not isinstance(layers, dict) or not layers:
        raise ArgumentError(f"layers: got {shown(layers)}; wants a dict of one layer or more")
    found: dict[str, dict[int, list[float]]] = {}
    for layer, by_length in layers.items():
        if not isinstance(layer, (str, int, np.integer)) or isinstance(layer, bool) or str(layer) in found:
            raise ArgumentError(f"layers: got layer {shown(layer)}; wants names, each of them once")
        if not isinstance(by_length, dict) or not by_length:
            raise ArgumentError(f"layers: layer {layer}: got {shown(by_length)}; wants a dict of one length or more")
        lengths = {check_length(f"layers: layer {layer}: seqlen", length): x for length, x in by_length.items()}
        found[str(layer)] = {length: _check_saved(layer, length, lengths[length]) for length in sorted(lengths)}
        heads = {length: len(x) for length, x in found[str(layer)].items()}
        if len(set(heads.values())) > 1:
            raise ArgumentError(f"layers: layer {layer}: got {heads} heads by length; wants as many at each")
    return found


def _check_saved(layer: Any, seqlen: int, thresholds: Any) -> list[float]:
    try:
        num_heads = len(thresholds)
    except TypeError:
        num_heads = 0
    if num_heads == 0:
        raise ArgumentError(f"layers: layer {layer} at {seqlen}: got {shown(thresholds)}; wants numbers, one a head")
    try:
        return _check_values(host_thresholds(thresholds, num_heads)).tolist()
    except SalekitError as error:
        raise type(error)(f"layers: layer {layer} at {seqlen}: {error}") from error


def check_length(name: str, value: Any) -> int:
    try:
        length = operator.index(value)
    except TypeError:
        length = 0
    if isinstance(value, (bool, np.bool_)) or not 1 <= length <= MAX_SEQLEN:
        raise ArgumentError(f"{name}: got {shown(value)}; wants an integer from 1 to {MAX_SEQLEN}")
    return length


def _as_json(content: dict) -> str:
    """The text of a file that can be read again."""
    try:
        text = json.dumps(content, indent=2) + "\n"
        parse_json(text, "about")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"about: cannot be written as JSON: {error}") from error
    if len(text) > MAX_JSON_BYTES:
        raise ArgumentError(f"about: makes a file of {len(text)} bytes; wants at most {MAX_JSON_BYTES}")
    return text


def fit_lengths(by_length: dict[int, Any]) -> dict[str, list[float | None]]:
    """How each head's tau moves with the length: ``ln tau = intercept + slope * ln seqlen`` by least squares.

    by_length: by seqlen, two or more, thresholds [num_heads]. residual: root of the mean squared distance in ln tau.
    All three are None for a head that has a tau of 0 or inf, or whose fit is too steep to mean anything.
    """
    lengths = sorted(by_length)
    x = np.log(np.array(lengths, np.float64))
    with np.errstate(divide="ignore"):
        y = np.log(np.array([by_length[length] for length in lengths], np.float64))
    with np.errstate(invalid="ignore"):
        x_mean, y_mean = x.mean(), y.mean(axis=0)
        slope = ((x - x_mean)[:, None] * (y - y_mean)).sum(axis=0) / np.square(x - x_mean).sum()
        intercept = y_mean - slope * x_mean
        residual = np.sqrt(np.square(y - intercept - slope * x[:, None]).mean(axis=0))
    usable = np.isfinite(y).all(axis=0) & (np.abs(slope) < _MOST_COEFFICIENT) & (np.abs(intercept) < _MOST_COEFFICIENT)
    return {
        name: [float(value) if good else None for value, good in zip(values, usable)]
        for name, values in (("slope", slope), ("intercept", intercept), ("residual", residual))
    }


def _at_length(lengths: list[int], found: np.ndarray, fit: dict[str, list[float | None]], seqlen: int) -> np.ndarray:
    """float32 [num_heads] at any length, of found [lengths, num_heads] and their fit."""
    if seqlen in lengths:
        return found[lengths.index(seqlen)]
    upper = int(np.searchsorted(lengths, seqlen))
    # Without a fit: between two lengths the smaller tau, which keeps more; beyond them that of the nearest.
    result = found[max(0, upper - 1):upper + 1].min(axis=0)
    shortest, longest = np.log(lengths[0]), np.log(lengths[-1])
    reach = min(np.log(REACH), longest - shortest)
    at = np.clip(np.log(max(1, seqlen)), shortest - reach, longest + reach)
    low, high = np.log(2) * np.array(LOG2_RANGE)
    for head, (slope, intercept) in enumerate(zip(fit["slope"], fit["intercept"])):
        if slope is not None:
            result[head] = np.exp(np.clip(intercept + slope * at, low, high))
    return result


def load_thresholds(
    path: str | Path,
    *,
    layer: int | str | None = None,
    seqlen: int | None = None,
    estimator: str | None = None,
    block: tuple[int, int] | None = None,
    skipped: str | None = None,
    query_stride: int | None = None,
) -> np.ndarray:
    """Per-head thresholds of a JSON file, float32 [num_heads].

    The file is what ``salekit calibrate`` writes, or ``{"schema": 1, "thresholds": [0.008, ...]}``, or the list alone;
    ``Infinity`` is a value. Of a calibrated file: layer is needed when it holds several; seqlen (default: the
    longest that was measured) gives what was measured at that length, or at any other what the fit over its lengths
    says (:func:`fit_lengths`), beyond them for as far as they are apart, and at most to REACH times the longest and the
    REACH-th part of the shortest. A head without a fit, one with a tau of 0, takes the smaller tau of the lengths next
    to it. estimator, block, skipped, query_stride: where given, they have to be those that the thresholds of a
    calibrated file were found with; one that does not say what became of skipped blocks was found with "drop".
    Raises FileFormatError, with the path, when it is missing, malformed or holds anything else; ArgumentError when
    layer, estimator, block, skipped or query_stride are not the file's, or seqlen is no length.
    """
    seqlen = None if seqlen is None else check_length("seqlen", seqlen)
    block = None if block is None else check_block(block)
    content = read_json(path)
    if isinstance(content, dict) and content.get("schema") in (OLDER_LAYERS, SCHEMA_LAYERS):
        return _of_layer(path, content, layer, seqlen, estimator, block, skipped, query_stride)
    values = content
    if isinstance(content, dict):
        if content.get("schema") != SCHEMA:
            known = f"{SCHEMA}, {OLDER_LAYERS} or {SCHEMA_LAYERS}"
            raise FileFormatError(f"{path}: got schema {content.get('schema')!r}; wants {known}")
        values = content.get("thresholds")
    return _numbers(path, values)


def _of_layer(path, content: dict, layer, seqlen, estimator, block, skipped, query_stride) -> np.ndarray:
    layers = content.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise FileFormatError(f"{path}: holds no layers")
    for name, want, got in (
        ("estimator", estimator, content.get("estimator")),
        ("block", block, content.get("block")),
        ("skipped", skipped, content.get("skipped", "drop")),
        ("query_stride", query_stride, content.get("query_stride", 1)),
    ):
        if want is not None and got != (list(want) if name == "block" else want):
            raise ArgumentError(f"{name}: {path} was calibrated with {shortened(repr(got))}, not with {want!r}")
    held = shortened(escaped(", ".join(layers)))
    if layer is None and len(layers) > 1:
        raise ArgumentError(f"layer: {path} holds layers {held}; wants one of them")
    name = next(iter(layers)) if layer is None else str(layer)
    if name not in layers:
        raise ArgumentError(f"layer: got {layer!r}; {path} holds {held}")
    if not isinstance(layers[name], dict) or not layers[name]:
        raise FileFormatError(f"{path}: layer {name} holds no lengths")
    if not all(re.fullmatch("[1-9][0-9]{0,9}", length) for length in layers[name]) or not _alike(layers[name]):
        raise FileFormatError(f"{path}: layer {name}: lengths differ in their heads, or are not lengths")
    lengths = sorted(map(int, layers[name]))
    found = np.stack([_numbers(path, layers[name][str(length)]) for length in lengths])
    if seqlen is None or len(lengths) == 1:
        return found[-1]
    return _at_length(lengths, found, _fit_of(path, content, name, dict(zip(lengths, found))), seqlen)


def _fit_of(path, content: dict, layer: str, by_length: dict[int, np.ndarray]) -> dict[str, list[float | None]]:
    """The fit that the file holds, or for an older file the one that it would hold."""
    if content["schema"] == OLDER_LAYERS:
        return fit_lengths(by_length)
    fits, num_heads = content.get("fits"), len(next(iter(by_length.values())))
    fit = fits.get(layer) if isinstance(fits, dict) else None
    columns = [fit.get(name) if isinstance(fit, dict) else None for name in ("slope", "intercept")]
    for column in columns:
        if not isinstance(column, list) or len(column) != num_heads or not all(map(_is_coefficient, column)):
            raise FileFormatError(f"{path}: layer {layer}: fits: wants slope and intercept of each head, or null")
    if any((slope is None) != (intercept is None) for slope, intercept in zip(*columns)):
        raise FileFormatError(f"{path}: layer {layer}: fits: a slope without an intercept, or the other way round")
    return fit


def _is_coefficient(x: Any) -> bool:
    return x is None or (type(x) in (int, float) and abs(x) < _MOST_COEFFICIENT)  # which NaN is not


def _alike(by_length: dict) -> bool:
    return len({len(values) for values in by_length.values() if isinstance(values, list)}) == 1


def _numbers(path, values: Any) -> np.ndarray:
    if not isinstance(values, list) or not values:
        raise FileFormatError(f'{path}: wants a list of numbers, one a head, alone or under "thresholds"')
    for head, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise FileFormatError(f"{path}: got {value!r} for head {head}; wants a number >= 0")
    try:
        with np.errstate(over="ignore"):
            return np.array([float(value) for value in values], np.float32)
    except OverflowError as error:
        raise FileFormatError(f"{path}: holds a number too large for a float") from error
