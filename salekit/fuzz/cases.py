"""A fuzz case: every choice of a call, its arrays and how they are passed, as plain values that a JSON file holds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import BFLOAT16, LAYOUTS
from ..errors import FileFormatError
from ..plans import BLOCKS, DTYPES, ESTIMATORS, HEAD_DIMS, LOW_BIT_HEAD_DIMS, POOLED_HEAD_DIMS, QUERY_STRIDES, SKIPPED
from ..sequences import PAGE_SIZES
from ..untrusted_files import Npz
from ..written_files import writing

SCHEMA = 1
META = "salekit-fuzz-case"  # what a file's metadata say that it is
KINDS = ("call", "dense", "varlen", "paged", "chunked")
STRIDES = ("contiguous", "padded", "fused", "reversed", "shared")
OUTS = ("none", "given", "strided")
DISTRIBUTIONS = ("normal", "clustered", "integers", "sinks")
BAD_VALUES = ("nan", "inf", "-inf")
LARGEST = 6e4  # elements of q, k and v: the products of 16-bit roundings with it still fit float16
MAX_LENGTH = 5000  # of ordinary cases
MAX_PAIRS = 12_000_000  # row-key pairs of all heads of an ordinary case: what NumPy checks in a fraction of a second
MANY_PAIRS = 80_000_000  # the same of one case in thirty
LONG_LENGTHS = (32768, 65536, 131072)  # of a soak's long cases


class Spot(NamedTuple):
    """An element that is not finite. Places count modulo the array's sizes, so that smaller arrays have one, too."""

    tensor: str  # "q", "k" or "v"
    value: str  # of BAD_VALUES
    sequence: int
    row: int
    head: int
    channel: int


@dataclass(frozen=True)
class Case:
    """One call. Data follow from ``seed`` and the fields under "data"; everything else is passed to the library.

    lengths: (rows, keys) of each sequence; one pair, of all batches, but for "varlen" and "paged".
    kind: "call" is sparse_attention, "dense" dense_attention, "chunked" one sparse_attention a chunk of the rows, cut
        at ``cuts``, with statistics of all keys when ``statistics``.
    strides: how q, k and v lie in memory: "padded" with NaN around, "fused" as one array, "reversed" from the last
        row to the first, "shared" with k and v the same memory for each batch. on_device: whether thresholds, sink
        logits and lengths are arrays on the GPU.
    """

    seed: int
    kind: str = "call"
    lengths: tuple[tuple[int, int], ...] = ((128, 128),)
    batch: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "float16"
    layout: str = "bshd"
    strides: str = "contiguous"
    out: str = "none"
    on_device: bool = False
    # options
    causal: bool = True
    softmax_scale: float = 0.0  # 0: the default
    estimator: str = "int8"
    attend: str = "exact"
    block: tuple[int, int] = (128, 32)
    query_stride: int = 1
    full_rows: int = 1024
    sink: int = 32
    local: int = 128
    dense_below: int = 0
    skipped: str = "drop"
    softcap: float = 0.0
    window_size: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = (0.2,)  # one, or one a head
    sink_logits: tuple[float, ...] = ()
    page_size: int = 16
    cuts: tuple[int, ...] = ()
    statistics: bool = False
    # data
    distribution: str = "normal"
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of q, k and v
    offset: float = 0.0  # of all keys, in their scale
    outliers: int = 0  # channels of q and k that are 20 times as large
    constant_rows: bool = False  # rows of q whose elements are all equal
    duplicated_keys: bool = False  # every key four times
    zero_rows: bool = False  # some rows of q, k and v
    spots: tuple[Spot, ...] = ()
    sampled_rows: int = 0  # rows of a head that are checked; 0: all

    @property
    def pairs(self) -> int:
        """Row-key pairs of all heads."""
        copies = 1 if self.kind in ("varlen", "paged") else self.batch
        return copies * self.num_heads * sum(rows * keys for rows, keys in self.lengths)

    @property
    def numpy_dtype(self) -> np.dtype:
        return BFLOAT16 if self.dtype == "bfloat16" else np.dtype(np.float16)

    @property
    def window(self) -> int | tuple[int, int] | None:
        """``window_size`` as a call takes it."""
        return self.window_size[0] if len(self.window_size) == 1 else self.window_size or None

    def options(self) -> dict[str, Any]:
        """The options of ``sparse_attention`` that a Plan holds."""
        names = ("causal", "estimator", "attend", "block", "query_stride", "full_rows", "sink", "local", "dense_below")
        found = {name: getattr(self, name) for name in names}
        found["softmax_scale"] = self.softmax_scale or None
        if self.kind not in ("varlen", "paged"):
            found.update(skipped=self.skipped, softcap=self.softcap, window_size=self.window)
        return found

    def describe(self) -> str:
        """What differs from the defaults, in one line."""
        of = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name}={x}" for name, x in of.items() if x != type(self).__dataclass_fields__[name].default)

    def replace(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **_to_json(asdict(self))}

    @classmethod
    def from_json(cls, content: Any, name: str = "case") -> "Case":
        """FileFormatError, with ``name``, for anything but what :meth:`to_json` gives."""
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            got = content.get("schema") if isinstance(content, dict) else content
            raise FileFormatError(f"{name}: got schema {got!r} of a fuzz case; wants {SCHEMA}")
        content = {key: value for key, value in content.items() if key != "schema"}
        known = {field.name: field for field in fields(cls)}
        for key in (*known, *content):
            if key not in content or key not in known:
                raise FileFormatError(f"{name}: fuzz case: {key}: {'missing' if key in known else 'not known'}")
        found = {key: _from_json(name, key, value) for key, value in content.items()}
        case = cls(**found)
        _check(case, name)
        return case


def _to_json(x: Any) -> Any:
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)  # JSON has no infinity
    if isinstance(x, dict):
        return {key: _to_json(value) for key, value in x.items()}
    return [_to_json(value) for value in x] if isinstance(x, (tuple, list)) else x


_CHOICES = {
    "kind": KINDS,
    "dtype": DTYPES,
    "layout": tuple(LAYOUTS),
    "strides": STRIDES,
    "out": OUTS,
    "estimator": ESTIMATORS,
    "attend": ("exact", "int8-fp8"),
    "block": BLOCKS,
    "query_stride": QUERY_STRIDES,
    "skipped": SKIPPED,
    "page_size": PAGE_SIZES,
    "distribution": DISTRIBUTIONS,
    "head_dim": HEAD_DIMS,
}
_COUNTS = (
    "seed",
    "batch",
    "num_heads",
    "num_kv_heads",
    "full_rows",
    "sink",
    "local",
    "dense_below",
    "outliers",
    "sampled_rows",
)
_FLAGS = ("on_device", "causal", "statistics", "constant_rows", "duplicated_keys", "zero_rows")
_NUMBERS = ("softmax_scale", "softcap", "offset")


def _from_json(name: str, key: str, value: Any) -> Any:
    def refuse(wants: str) -> FileFormatError:
        return FileFormatError(f"{name}: fuzz case: {key}: got {str(value)[:80]!r}; wants {wants}")

    def number(x: Any) -> float:
        if isinstance(x, str) and x in ("inf", "-inf"):
            return float(x)
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise refuse("numbers")
        try:
            return float(x)
        except OverflowError:
            raise refuse("numbers that float64 holds") from None

    def count(x: Any, least: int = 0) -> int:
        if isinstance(x, bool) or not isinstance(x, int) or not least <= x <= 2**62:
            raise refuse(f"integers >= {least}")
        return x

    if key in _FLAGS:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if key in _COUNTS:
        return count(value)
    if key in _NUMBERS:
        return number(value)
    if key in _CHOICES:
        value = tuple(value) if isinstance(value, list) else value
        if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[key]):
            raise refuse(f"one of {', '.join(map(str, _CHOICES[key]))}")
        return value
    if not isinstance(value, list):
        raise refuse("a list")
    if key == "lengths":
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise refuse("pairs")
        return tuple((count(rows), count(keys)) for rows, keys in value)
    if key == "spots":
        if not all(isinstance(spot, list) and len(spot) == len(Spot._fields) for spot in value):
            raise refuse(f"lists of {', '.join(Spot._fields)}")
        if not all(spot[0] in ("q", "k", "v") and spot[1] in BAD_VALUES for spot in value):
            raise refuse("tensors q, k, v with nan, inf or -inf")
        return tuple(Spot(*spot[:2], *map(count, spot[2:])) for spot in value)
    if key == "cuts":
        return tuple(map(count, value))
    if key == "window_size":
        return tuple(count(x, -1) for x in value)
    return tuple(map(number, value))


def _check(case: Case, name: str) -> None:
    """What the fields say together. Options that the library itself refuses are left to it."""
    packed = case.kind in ("varlen", "paged")
    rules = (
        (len(case.lengths) >= 1 if packed else len(case.lengths) == 1, "lengths: wants one pair, or one a sequence"),
        (max(map(max, case.lengths), default=0) <= 2**22, "lengths: wants at most 2**22"),
        (
            case.num_kv_heads >= 1 and case.num_heads % case.num_kv_heads == 0,
            "num_heads: wants a multiple of num_kv_heads",
        ),
        (len(case.thresholds) in (1, case.num_heads), "thresholds: wants one, or one a head"),
        (len(case.sink_logits) in (0, case.num_heads), "sink_logits: wants none, or one a head"),
        (len(case.window_size) in (0, 1, 2), "window_size: wants none, one or two"),
        (len(case.scales) == 3, "scales: wants three"),
        (
            all(a <= b for a, b in zip((0, *case.cuts), (*case.cuts, case.lengths[0][0] if case.lengths else 0))),
            "cuts: wants rising rows",
        ),
        (case.batch <= 64 and case.num_heads <= 64 and len(case.lengths) <= 64, "batch: wants at most 64 of all"),
    )
    for holds, wants in rules:
        if not holds:
            raise FileFormatError(f"{name}: fuzz case: {wants}")


# --- drawing -------------------------------------------------------------------------------------------------------
def draw(seed: int, index: int, *, long: bool = False) -> Case:
    """Case ``index`` of this seed: nothing else decides. long: one of 32K to 128K tokens, of which rows are sampled."""
    rng = np.random.default_rng([seed, index, int(long)])

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def choose(options: Any, weights: Any = None) -> Any:
        weights = None if weights is None else np.array(weights) / np.sum(weights)
        return options[int(rng.choice(len(options), p=weights))]

    kind = choose(KINDS, (64, 10, 10, 8, 8))
    head_dim = choose(HEAD_DIMS, (35, 7, 44, 7, 7))
    dtype = choose(DTYPES)
    case = Case(
        seed=int(rng.integers(2**48)),
        kind=kind,
        head_dim=head_dim,
        dtype=dtype,
        layout=choose(tuple(LAYOUTS)),
        strides=choose(STRIDES, (40, 30, 10, 10, 10)),
        out=choose(OUTS, (60, 20, 20)),
        on_device=chance(0.3),
        causal=chance(0.7),
        estimator=choose(ESTIMATORS),
        block=choose(BLOCKS, (2, 1, 1, 3, 1, 1)),
        query_stride=choose(QUERY_STRIDES, (6, 2, 2)),
        full_rows=choose((0, 1, 64, 200, 1024), (3, 1, 1, 2, 3)),
        page_size=choose(PAGE_SIZES),
    )
    case = case.replace(**_draw_options(case, rng, chance, choose))
    case = case.replace(**_draw_shape(case, rng, chance, choose, long))
    case = case.replace(**_draw_thresholds(case, rng, chance, choose))
    if case.strides == "fused" and case.lengths[0][0] != case.lengths[0][1] or kind in ("varlen", "paged"):
        case = case.replace(strides=choose(("contiguous", "padded")))
    return case.replace(**_draw_data(case, rng, chance, choose))


def _draw_options(case: Case, rng, chance, choose) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if chance(0.25):
        found["sink"], found["local"] = choose(
            ((0, 0), (0, 64), (1, 33), (100, 64), (64, 300), (32, 100_000), (33, 16))
        )
    if chance(0.1):
        found["softmax_scale"] = float(2.0 ** rng.integers(-6, 1))
    if chance(0.12):
        found["dense_below"] = choose((64, 512, 8192))
    if case.kind in ("varlen", "paged"):
        if chance(0.1) and case.head_dim in LOW_BIT_HEAD_DIMS:
            found["attend"] = "int8-fp8"
        return found
    # Combinations of these are kernels of their own, which take seconds to compile: few, and most of them at 64 and
    # 128.
    feature = choose(("none", "scores", "low", "pool"), (62, 20, 9, 9))
    if case.kind == "dense":
        feature = choose(("none", "scores"), (6, 4))
        found["block"] = (128, 32)
    if feature == "scores":
        some = choose(("softcap", "window", "sinks", "window sinks", "softcap window", "all"), (3, 4, 3, 1, 1, 1))
        if "softcap" in some or some == "all":
            found["softcap"] = choose((1.0, 4.0, 30.0, 50.0))
        if "window" in some or some == "all":
            found["window_size"] = choose(((1,), (64,), (500,), (200, 90), (33, -1), (-1, 5), (0, 0), (1500, 40)))
        if "sinks" in some or some == "all":
            found["sink_logits"] = (0.0,)  # as many as heads, later
    elif feature == "low" and case.head_dim in LOW_BIT_HEAD_DIMS:
        found["attend"] = "int8-fp8"
    elif feature == "pool" and case.head_dim in POOLED_HEAD_DIMS and case.kind == "call":
        found["skipped"] = "pool"
    return found


def _length(rng, chance, choose, most: int) -> int:
    """0 to ``most``, mostly within one of a multiple of a block."""
    if chance(0.03) or most == 0:
        return 0
    length = int(rng.integers(1, most + 1)) if chance(0.5) else int(np.exp(rng.uniform(0, np.log(most))))
    if chance(0.6):
        edge = choose((32, 64, 128, 256))
        length = round(length / edge) * edge + int(rng.integers(-1, 2))
    return min(max(1, length), most)


def _draw_shape(case: Case, rng, chance, choose, long: bool) -> dict[str, Any]:
    group = choose((1, 2, 3, 4, 7, 8), (4, 3, 1, 2, 1, 1))
    kv_heads, batch = choose((1, 2, 3), (5, 3, 1)), choose((1, 2, 3), (6, 2, 1))
    if long:
        rows = choose(LONG_LENGTHS, (6, 3, 1))
        keys = rows if chance(0.7) else rows + choose((-1000, 1, 4096))
        packed = case.kind in ("varlen", "paged")
        lengths = ((rows, keys), (77, 1000)) if packed else ((rows, keys),)
        cuts = (rows // 2 // 128 * 128,) if case.kind == "chunked" else ()
        return dict(
            lengths=lengths,
            causal=case.causal or bool(cuts),
            batch=1,
            num_kv_heads=1,
            num_heads=min(group, 3),
            cuts=cuts,
            sampled_rows=16,
            statistics=bool(cuts),
            strides=choose(("contiguous", "padded")),
        )
    most = MAX_LENGTH if chance(0.35) else 1300
    if case.kind in ("varlen", "paged"):
        lengths = []
        for _ in range(int(rng.integers(1, 6))):
            keys = _length(rng, chance, choose, most // 2)
            lengths.append((choose((keys, 1, 0, _length(rng, chance, choose, most // 2)), (4, 2, 1, 4)), keys))
    else:
        rows = _length(rng, chance, choose, most)
        keys = rows
        if chance(0.45):
            keys = choose((_length(rng, chance, choose, most), rows + 1, max(0, rows - 1), rows + 128), (5, 1, 1, 1))
        lengths = [(rows, min(keys, MAX_LENGTH))]
    found = dict(lengths=tuple(lengths), batch=batch, num_kv_heads=kv_heads, num_heads=kv_heads * group)
    limit = MANY_PAIRS if chance(1 / 30) else MAX_PAIRS
    for change in (dict(batch=1), dict(num_kv_heads=1, num_heads=group), dict(num_kv_heads=1, num_heads=1)):
        if case.replace(**found).pairs > limit:
            found.update(change)
    while case.replace(**found).pairs > limit:
        found["lengths"] = tuple((rows * 3 // 4, keys * 3 // 4) for rows, keys in found["lengths"])
    if case.kind == "chunked":
        rows = found["lengths"][0][0]
        step = choose((128, 1), (3, 1))
        cuts = sorted(
            {min(rows, int(rng.integers(0, rows + 1)) // step * step) for _ in range(int(rng.integers(1, 4)))}
        )
        found["cuts"], found["statistics"] = tuple(cuts), chance(0.7)
        found["lengths"] = ((rows, max(rows, found["lengths"][0][1])),)
        found["causal"] = True
    return found


def _draw_thresholds(case: Case, rng, chance, choose) -> dict[str, Any]:
    def one() -> float:
        if chance(0.12):
            return choose((0.0, math.inf, 1e-30, 1e30))
        return float(np.float32(np.exp(rng.uniform(np.log(1e-4), np.log(3.0)))))

    many = case.num_heads if chance(0.4) else 1
    found: dict[str, Any] = {"thresholds": tuple(one() for _ in range(many))}
    if case.sink_logits:
        found["sink_logits"] = tuple(
            -math.inf if chance(0.1) else float(np.float32(rng.normal(0, 4))) for _ in range(case.num_heads)
        )
    return found


def _draw_data(case: Case, rng, chance, choose) -> dict[str, Any]:
    tiny = 2.0**-24 if case.dtype == "float16" else 1e-39

    def scale() -> float:
        return choose((1.0, 1e-3, tiny, 30.0, 1e3, LARGEST), (70, 8, 6, 10, 3, 3))

    found: dict[str, Any] = dict(
        distribution=choose(DISTRIBUTIONS, (4, 4, 1, 2)),
        offset=choose((0.0, 1.0, 20.0), (6, 3, 1)),
        outliers=choose((0, 1, 4), (7, 2, 1)),
        constant_rows=chance(0.08),
        duplicated_keys=chance(0.08),
        zero_rows=chance(0.08),
    )
    if chance(0.3):
        found["scales"] = (scale(), scale(), scale())
    if chance(0.15) and case.pairs:
        found["spots"] = tuple(
            Spot(choose(("q", "k", "v")), choose(BAD_VALUES), *(int(x) for x in rng.integers(0, 2**20, 4)))
            for _ in range(choose((1, 2, 5), (5, 3, 1)))
        )
    return found


# --- arrays --------------------------------------------------------------------------------------------------------
def make_arrays(case: Case) -> dict[str, list[np.ndarray]]:
    """ "q", "k", "v": of each sequence [batch, rows, heads, head_dim], contiguous, of the case's dtype.

    Rows of each sequence, batch and head are drawn from a generator of their own, so that a shorter or smaller case has
    the beginning of a larger one's.
    """
    found: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    batch = 1 if case.kind in ("varlen", "paged") else case.batch
    for index, (rows, keys) in enumerate(case.lengths):
        for place, (tensor, length, heads) in enumerate(
            (("q", rows, case.num_heads), ("k", keys, case.num_kv_heads), ("v", keys, case.num_kv_heads))
        ):
            array = np.empty((batch, length, heads, case.head_dim), case.numpy_dtype)
            for b, head in np.ndindex(batch, heads):
                of_batch = 0 if case.strides == "shared" and tensor != "q" else b
                rng = np.random.default_rng([case.seed, place, index, of_batch, head])
                values = _values(case, tensor, rng, length, head * case.num_kv_heads // heads)
                limit = np.float32(LARGEST)
                with np.errstate(all="ignore"):
                    array[b, :, head] = np.clip(values * np.float32(case.scales[place]), -limit, limit)
            found[tensor].append(array)
    for spot in case.spots:
        of_tensor = found[spot.tensor]
        array = of_tensor[spot.sequence % len(of_tensor)]
        if array.size:
            b, row, head, channel = (
                x % n for x, n in zip((spot.sequence, spot.row, spot.head, spot.channel), array.shape)
            )
            if case.strides == "shared" and spot.tensor != "q":
                b = slice(None)
            array[b, row, head, channel] = float(spot.value)
    return found


def _values(case: Case, tensor: str, rng: np.random.Generator, length: int, kv_head: int) -> np.ndarray:
    """float32 [length, head_dim], of size about 1."""
    dim = case.head_dim
    common = np.random.default_rng([case.seed, 9, kv_head])  # what q and k of a KV head share
    directions = common.standard_normal((8, dim), np.float32)
    channels = common.permutation(dim)
    x = rng.standard_normal((length, dim), np.float32)
    if case.distribution == "integers":
        x = np.rint(x)
    if case.distribution in ("clustered", "sinks") and tensor != "v":
        block = np.arange(length) // (64 if tensor == "q" else 32)
        chosen = rng.integers(0, 8, max(1, int(block.max(initial=0)) + 1))
        x = np.float32(0.5) * x + np.float32(0.75) * directions[chosen[block] if length else block]
    if case.distribution == "sinks" and tensor == "k":
        x[:4] = 2 * directions[0]
    if case.distribution == "sinks" and tensor == "q":
        x += np.float32(0.7) * directions[0]
    if tensor == "k" and case.offset:
        x += np.float32(case.offset) * common.standard_normal(dim, np.float32)
    if tensor != "v" and case.outliers:
        x[:, channels[: case.outliers]] *= 20
    if tensor == "q" and case.constant_rows:
        x[::3] = x[::3, :1]
    if tensor == "k" and case.duplicated_keys:
        x = x[np.arange(length) // 4 * 4]
    if case.zero_rows and length:
        x[rng.integers(0, length, 1 + length // 10)] = 0
    return x


# --- files ---------------------------------------------------------------------------------------------------------
def save(path: str | Path, case: Case, arrays: dict[str, list[np.ndarray]], check: str) -> None:
    """Write a case with its arrays and the name of the check that fails; the file appears whole or not at all.

    Entries: q0, k0, v0 of the first sequence, q1 and so on, 16-bit values as uint16; ``__meta__``, JSON.
    """
    meta = json.dumps({"kind": META, "case": case.to_json(), "check": check})
    entries = {f"{tensor}{index}": x.view(np.uint16) for tensor, of in arrays.items() for index, x in enumerate(of)}
    with writing(path) as file:
        np.savez_compressed(file, __meta__=np.array(meta), **entries)


def is_case_file(path: str | Path) -> bool:
    """Whether the file is what :func:`save` writes, damaged perhaps."""
    try:
        return _meta(path).get("kind") == META
    except Exception:  # whatever it is, it is no case: other readers say what is wrong with it
        return False


def _meta(path: str | Path) -> dict:
    with Npz(path) as file:
        return file.metadata()


def load(path: str | Path) -> tuple[Case, dict[str, list[np.ndarray]], str]:
    """(case, arrays, check) as :func:`save` was given them. FileFormatError, with the path, for anything else."""
    with Npz(path) as file:
        meta, entries = file.metadata(), file.arrays(file.names)
    if not isinstance(meta, dict) or meta.get("kind") != META:
        raise FileFormatError(f"{path}: is not a fuzz case")
    case = Case.from_json(meta.get("case"), str(path))
    batch = 1 if case.kind in ("varlen", "paged") else case.batch
    arrays: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for index, (rows, keys) in enumerate(case.lengths):
        for tensor, length, heads in (
            ("q", rows, case.num_heads),
            ("k", keys, case.num_kv_heads),
            ("v", keys, case.num_kv_heads),
        ):
            x, shape = entries.get(f"{tensor}{index}"), (batch, length, heads, case.head_dim)
            if x is None or x.dtype != np.uint16 or x.shape != shape:
                got = "none" if x is None else f"{x.dtype} {x.shape}"
                raise FileFormatError(f"{path}: {tensor}{index}: got {got}; wants uint16 {shape}, as the case says")
            arrays[tensor].append(np.ascontiguousarray(x).view(case.numpy_dtype))
    return case, arrays, str(meta.get("check", ""))
