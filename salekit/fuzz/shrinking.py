"""Make a failing case small: greedily, for as long as the same check fails."""

from __future__ import annotations

import time
from typing import Callable, Iterator

from .cases import Case

MOST_TRIES = 300


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    """The smallest case found that still fails. fails(case): whether the check that failed fails on that case, too.

    Steps are tried in the order of :func:`steps`, from the first again after each that holds, until none does, or
    ``seconds`` or MOST_TRIES are over.
    """
    end, tries = time.monotonic() + seconds, 0
    seen = {case}
    moved = True
    while moved:
        moved = False
        for smaller in steps(case):
            if smaller in seen:
                continue
            seen.add(smaller)
            if tries >= MOST_TRIES or time.monotonic() > end:
                return case
            tries += 1
            if fails(smaller):
                case, moved = smaller, True
                break
    return case


def steps(case: Case) -> Iterator[Case]:
    """Cases that are simpler by one choice each: sizes first, then options, then data."""
    for changes in _steps(case):
        smaller = _consistent(case.replace(**changes))
        if smaller != case:
            yield smaller


def _consistent(case: Case) -> Case:
    """What lists of one entry a head are, for as many heads as there are, and cuts within the rows."""
    found = {}
    for name in ("thresholds", "sink_logits"):
        values = getattr(case, name)
        if len(values) > 1 or (name == "sink_logits" and values):
            found[name] = values[: case.num_heads]
    rows = case.lengths[0][0]
    found["cuts"] = tuple(min(cut, rows) for cut in case.cuts)
    return case.replace(**found)


def _steps(case: Case) -> Iterator[dict]:
    packed = case.kind in ("varlen", "paged")
    if packed:
        for i in range(len(case.lengths)):
            if len(case.lengths) > 1:
                yield dict(lengths=case.lengths[:i] + case.lengths[i + 1 :])
        if len(case.lengths) == 1:
            yield dict(kind="call", batch=1)
    if case.batch > 1:
        yield dict(batch=1)
        yield dict(batch=case.batch - 1)
    if case.num_heads > 1:
        yield dict(num_heads=1, num_kv_heads=1)
        group = case.num_heads // case.num_kv_heads
        if case.num_kv_heads > 1:
            yield dict(num_heads=group, num_kv_heads=1)
        if group > 1:
            yield dict(num_heads=case.num_kv_heads)
            yield dict(num_heads=(group - 1) * case.num_kv_heads)
    for i, (rows, keys) in enumerate(case.lengths):
        for smaller in _shorter(rows, keys):
            yield dict(lengths=case.lengths[:i] + (smaller,) + case.lengths[i + 1 :])
    if len(case.cuts) > 1:
        for i in range(len(case.cuts)):
            yield dict(cuts=case.cuts[:i] + case.cuts[i + 1 :])
    if case.kind in ("chunked", "dense"):
        yield dict(kind="call", cuts=(), statistics=False)
    defaults = Case(seed=0)
    for name in (
        "strides",
        "layout",
        "out",
        "on_device",
        "dtype",
        "head_dim",
        "statistics",
        "skipped",
        "attend",
        "softcap",
        "window_size",
        "sink_logits",
        "softmax_scale",
        "query_stride",
        "full_rows",
        "sink",
        "local",
        "dense_below",
        "block",
        "estimator",
        "causal",
        "page_size",
    ):
        if getattr(case, name) != getattr(defaults, name):
            yield {name: getattr(defaults, name)}
    if len(case.thresholds) > 1:
        for tau in sorted(set(case.thresholds)):
            yield dict(thresholds=(tau,))
    if case.thresholds != defaults.thresholds:
        yield dict(thresholds=defaults.thresholds)
    for i in range(len(case.spots)):
        yield dict(spots=case.spots[:i] + case.spots[i + 1 :])
    for name in ("scales", "offset", "outliers", "constant_rows", "duplicated_keys", "zero_rows", "distribution"):
        if getattr(case, name) != getattr(defaults, name):
            yield {name: getattr(defaults, name)}
    if case.scales != defaults.scales:
        for i in range(3):
            yield dict(scales=case.scales[:i] + (1.0,) + case.scales[i + 1 :])


def _shorter(rows: int, keys: int) -> Iterator[tuple[int, int]]:
    for less in (lambda n: n // 2, lambda n: n - 128, lambda n: n - 32, lambda n: n - 1):
        if less(rows) >= 1 and less(keys) >= 1:
            yield less(rows), less(keys)
    for less in (lambda n: n // 2, lambda n: n - 32, lambda n: n - 1):
        if less(rows) >= 1:
            yield less(rows), keys
        if less(keys) >= 1:
            yield rows, less(keys)
