"""salekit and its rivals on one GPU, in one process: the script behind every figure that salekit states.

    python -m bench.peers --seqlen 32k,64k,128k --masks masks_128k_tau0.008.npz

Everything attends to the same generated q, k and v (rivals through DLPack) and is timed with the same events, the L2
flushed before each sample, in rounds that begin with another candidate each time. Clocks, power and throttle reasons
are read all the while; a sample that fell into a thermal or hardware slowdown is dropped, a power cap is recorded.
Results are compared with float64 before anything is timed. Sections:

rows        dense attention, and attention through given masks, of salekit and of every rival that is installed
stages      each stage before attention, every estimator and query_stride, and their sequence
end_to_end  the whole call; with --masks the same stages one after another, then attention through those masks
crossover   sparse_attention with its defaults against dense_attention, from 512 tokens up

It writes bench/results/<gpu>-<date>.json. A ratio or a speed-up is the other's time over ours: above 1 is faster.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Hashable

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the checkout is not on the path
    sys.path.insert(0, str(ROOT))

from salekit.cli import options, render  # noqa: E402
from salekit.cli.bench import given_mask  # noqa: E402

from bench import rivals as rivals_module  # noqa: E402
from salekit import arrays, call_checks, timing  # noqa: E402
from salekit.attend import attend as attend_stage  # noqa: E402
from salekit.attention import dense_attention, sparse_attention  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402
from salekit.errors import GpuError, SalekitError  # noqa: E402
from salekit.plans import ESTIMATORS, HEAD_DIMS, QUERY_STRIDES, TILE_ROWS, Plan  # noqa: E402
from salekit.staged import StagedCall  # noqa: E402
from salekit.thresholds import as_thresholds  # noqa: E402
from salekit.workloads import TAU, llm_like_qkv  # noqa: E402

SCHEMA = 2
SECTIONS = ("rows", "stages", "end_to_end", "crossover")
LOW_BIT = "int8-fp8"
ATTENDS = ("exact", LOW_BIT)
MASK_BLOCKS = ((128, 32), (64, 32), (128, 128))  # ours, the paper's, and the finest that FlexAttention takes
BASELINES = {"fa3": "speedup_fa3", "torch-fa2": "speedup_fa2", "salekit-dense": "speedup_own_dense"}
SECTION_SECONDS = {"rows": 15.0, "stages": 8.0, "end_to_end": 15.0, "crossover": 1.0}  # at most, of sampling a length
LONG = 2**18  # from here on only what the defaults and the fastest estimator do
CHECK_HEAD = 3
MAX_ERROR = 0.01  # relative: 16-bit types round P and the output to 2^-8 or better
MAX_LOW_BIT_ERROR = 0.25  # e4m3 rounds to 2^-4, before the exponential: this finds wrong results, not coarse ones


class Refused(Exception):
    """A candidate whose result is wrong."""


@dataclass(frozen=True)
class Config:
    """One way to run the whole call. masks: "own" (as estimated) or the name of a mask file."""

    masks: str
    tau: float
    estimator: str
    query_stride: int
    attend: str


@dataclass(frozen=True)
class Measured:
    """What became of a candidate: a time, or the reason that there is none."""

    timing: timing.Timing | None
    dropped: int = 0
    problem: str | None = None
    host_ms: float = 0.0  # until the call returned: what a lone call costs at least

    @property
    def ms(self) -> float | None:
        return self.timing.median_ms if self.timing else None


# --- one length ----------------------------------------------------------------------------------------------------
class Reference:
    """float64 attention of one head's last rows, on the host."""

    def __init__(self, q: Any, k: Any, v: Any):
        self.seqlen, heads = q.shape[1], q.shape[2]
        self.head = min(CHECK_HEAD, heads - 1)
        self.first_row = (self.seqlen - 1) // TILE_ROWS * TILE_ROWS  # of the last tile, which lies in one mask row
        kv_head = self.head // (heads // k.shape[2])
        queries = host_rows(q, self.head, self.first_row) * q.shape[3] ** -0.5
        self.values = host_rows(v, kv_head, 0)
        self.scores = queries @ host_rows(k, kv_head, 0).T
        self.scores[np.arange(self.seqlen)[None] > np.arange(self.first_row, self.seqlen)[:, None]] = -np.inf

    def error(self, out: Any, mask: BlockMask | None) -> float:
        """Relative distance of ``out`` (bshd, CuPy's or torch's) from attention through the mask."""
        scores = self.scores if mask is None else np.where(self._selected(mask), self.scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = weights @ self.values / weights.sum(axis=1, keepdims=True)
        if rivals_module.is_torch(out):
            got = rivals_module.last_rows(out, self.head, len(want))
        else:
            got = host_rows(out, self.head, self.first_row)
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    def _selected(self, mask: BlockMask) -> np.ndarray:
        words = mask.words[0, self.head, self.first_row // mask.block_q]
        words = words if isinstance(words, np.ndarray) else words.get()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        return np.repeat(bits, mask.block_k)[None, : self.seqlen]


def host_rows(array: Any, head: int, first_row: int) -> np.ndarray:
    """float64 [seqlen - first_row, head_dim]: the rows of one head of a bshd array of batch 1, NumPy's or CuPy's."""
    part = array[0, first_row:, head]
    if isinstance(part, np.ndarray):
        return part.astype(np.float64)
    rows = np.empty(part.shape, part.dtype)
    runtime = arrays.import_cupy().cuda.runtime
    width = rows.strides[0]  # copied row by row, for CuPy's copy of a strided view is a kernel that needs CUDA headers
    runtime.memcpy2D(
        rows.ctypes.data, width, part.data.ptr, part.strides[0], width, len(rows), runtime.memcpyDeviceToHost
    )
    return rows.astype(np.float64)


@dataclass(frozen=True)
class Case:
    """The inputs of one length, in CuPy's memory, and the masks to attend through."""

    q: Any
    k: Any
    v: Any
    file_masks: BlockMask | None  # on the host, when they are of this length
    masks_name: str

    @property
    def seqlen(self) -> int:
        return self.q.shape[1]

    @cached_property
    def plan(self) -> Plan:
        return call_checks.make_plan(self.q, self.k, self.v)

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.q, self.k, self.v)

    @cached_property
    def masks(self) -> dict[tuple[int, int], BlockMask]:
        """By block: the file's, ORed up to larger blocks, else what the defaults select."""
        blocks = MASK_BLOCKS[:1] if self.seqlen >= LONG else MASK_BLOCKS
        return {block: self._mask(block) for block in blocks}

    def _mask(self, block: tuple[int, int]) -> BlockMask:
        if self.file_masks is not None:
            same = block == (self.file_masks.block_q, self.file_masks.block_k)
            mask = self.file_masks if same else self.file_masks.coarsen(*block)
            return given_mask(mask, self.plan.num_heads, self.q)
        return sparse_attention(self.q, self.k, self.v, thresholds=TAU, block=block, return_mask=True)[1]

    @cached_property
    def torch(self) -> tuple[Any, Any, Any]:
        return tuple(rivals_module.as_torch(x) for x in (self.q, self.k, self.v))

    def flex_bits(self) -> np.ndarray | None:
        mask = self.masks.get((rivals_module.FLEX_BLOCK, rivals_module.FLEX_BLOCK))
        whole = self.seqlen % rivals_module.FLEX_BLOCK == 0
        return mask.to_dense()[0] if mask is not None and whole else None

    def staged(self, tau: float, mask: BlockMask | None = None, **settings: Any) -> StagedCall:
        plan = call_checks.make_plan(self.q, self.k, self.v, dense_below=0, **settings)
        return StagedCall(self.q, self.k, self.v, as_thresholds(tau, plan.num_heads, self.q), plan, mask)


# --- measuring -----------------------------------------------------------------------------------------------------
@dataclass
class Session:
    """What all sections share: the report that grows, the sampler that reads the GPU, and the time that is left."""

    report: dict[str, Any]
    sampler: timing.ClockSampler
    rivals: list[rivals_module.Rival]
    budget_seconds: float
    pending: list[str]  # the section of each group of candidates that is still to come
    skip_above_seconds: float
    started: float = field(default_factory=time.monotonic)
    seen: dict[Hashable, tuple[int, float]] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.report["notes"]:
            self.report["notes"].append(text)
            render.note(f"peers: {text}")

    def group_seconds(self, section: str) -> float:
        """What the next group of candidates may spend on sampling: its share of what is left, 0 when nothing is."""
        left = self.budget_seconds - (time.monotonic() - self.started)
        wanted = sum(SECTION_SECONDS[other] for other in self.pending)
        self.pending.remove(section)
        return max(0.0, SECTION_SECONDS[section] * min(1.0, left / wanted))

    def expected_seconds(self, section: str, name: Hashable, seqlen: int) -> float:
        """By the time at a shorter length; 0 where there is none. Attention grows with the square."""
        shorter, ms = self.seen.get((section, name), (seqlen, 0.0))
        return ms / 1e3 * (seqlen / shorter) ** 2

    def measure(
        self,
        section: str,
        seqlen: int,
        functions: dict[Hashable, Callable[[], Any]],
        check: Callable[[Hashable, Any], None] = lambda name, result: None,
    ) -> dict[Hashable, Measured]:
        """Time one group of candidates in turn; every name of ``functions`` is in the result."""
        found: dict[Hashable, Measured] = {}
        seconds = self.group_seconds(section)
        if seconds == 0:
            self.note(f"{section}, {options.seqlen_name(seqlen)}: left out, the budget is spent")
            return dict.fromkeys(functions, Measured(None))
        for name in functions:
            expected = self.expected_seconds(section, name, seqlen)
            if expected > self.skip_above_seconds:
                found[name] = Measured(None, problem=f"left out: would take about {expected:.0f} s a call")
        started = time.time()
        remaining = {name: function for name, function in functions.items() if name not in found}
        candidates = timing.time_in_turn(remaining, check=check, max_seconds=seconds)
        time.sleep(3 * timing.POLL_SECONDS)  # until the readings have caught up
        for name, candidate in candidates.items():
            found[name] = settle(candidate, self.sampler.slowed)
            if found[name].ms is not None:
                self.seen[section, name] = (seqlen, found[name].ms)
        for name in functions:
            if found[name].problem:
                self.note(f"{section}, {options.seqlen_name(seqlen)}, {describe(name)}: {found[name].problem}")
        if candidates:
            self.spans.append((started, time.time()))
            summary = self.sampler.summary(self.spans[-1])
            self.report["conditions"].append({"section": section, "seqlen": seqlen, **summary})
        return {name: found[name] for name in functions}


def settle(candidate: timing.Candidate, slowed: Callable[[float, float], bool]) -> Measured:
    """The candidate's time over the samples that no thermal or hardware slowdown fell into."""
    kept = [sample for sample in candidate.samples if not slowed(sample.start, sample.end)]
    dropped = len(candidate.samples) - len(kept)
    if candidate.error is not None:
        text = str(candidate.error).strip().splitlines() or [""]
        return Measured(None, dropped, f"{type(candidate.error).__name__}: {text[0]}"[:200])
    if not kept:
        return Measured(None, dropped, f"all {dropped} samples fell into a thermal or hardware slowdown")
    host_ms = statistics.median(sample.host_ms for sample in kept)
    return Measured(timing.Timing.of([sample.ms for sample in kept]), dropped, host_ms=host_ms)


def describe(name: Hashable) -> str:
    if isinstance(name, Config):
        return f"{name.estimator}/{name.query_stride}, {name.attend}, tau {name.tau:g}, masks {name.masks}"
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def accuracy_check(
    case: Case, masks: dict[Hashable, BlockMask | None], errors: dict[Hashable, float], low_bit: Callable
):
    """A check for ``Session.measure``: notes each candidate's error in ``errors``, and refuses what is wrong."""

    def check(name: Hashable, out: Any) -> None:
        limit = MAX_LOW_BIT_ERROR if low_bit(name) else MAX_ERROR
        errors[name] = case.reference.error(out, masks.get(name))
        if not errors[name] <= limit:
            raise Refused(f"wrong result: relative error {errors[name]:.3g}, wants {limit:g} or less")

    return check


def sampled(measured: Measured) -> dict[str, Any]:
    """What every entry of the report says about its time."""
    return {
        "ms": round(measured.ms, 5),
        "spread": round(measured.timing.spread, 5),
        "min_ms": round(measured.timing.min_ms, 5),
        "host_ms": round(measured.host_ms, 5),
        "samples": measured.timing.samples,
        "dropped": measured.dropped,
    }


# --- rows ----------------------------------------------------------------------------------------------------------
def measure_rows(session: Session, case: Case) -> None:
    functions, masks, about = own_rows(session, case)
    for rival in session.rivals:
        try:
            functions[rival.name] = rival.prepare(*case.torch, case.flex_bits() if rival.masked else None)
        except Exception as error:  # an unsupported shape and too little memory differ by library
            first = (str(error).splitlines() or [""])[0]
            session.note(f"rows, {options.seqlen_name(case.seqlen)}, {rival.name}: {first}"[:200])
            continue
        masks[rival.name] = case.masks[128, 128] if rival.masked else None
        about[rival.name] = {"version": rival.version} | ({"note": rival.note} if rival.note else {})
    errors: dict[Hashable, float] = {}
    check = accuracy_check(case, masks, errors, low_bit=lambda name: "fp8" in name)
    measured = session.measure("rows", case.seqlen, functions, check)
    rows = [
        row_of(name, case.plan, result, masks[name]) | {"relative_error": float(f"{errors[name]:.3g}")} | about[name]
        for name, result in measured.items()
        if result.ms is not None
    ]
    session.report["rows"] += with_ratios(rows)


def own_rows(session: Session, case: Case) -> tuple[dict, dict, dict]:
    """(functions, masks, further keys) of salekit's rows."""
    q, k, v = case.q, case.k, case.v
    functions: dict[Hashable, Callable[[], Any]] = {"salekit-dense": lambda: dense_attention(q, k, v)}
    masks: dict[Hashable, BlockMask | None] = {"salekit-dense": None}
    for (block_q, block_k), mask in case.masks.items():
        name = f"salekit-masks-{block_q}x{block_k}"
        plan = case.plan.replace(block_q=block_q, block_k=block_k)
        functions[name], masks[name] = partial(through_mask, case, mask, plan), mask
    if is_accepted(session, case, attend=LOW_BIT):
        name, mask = f"salekit-dense-{LOW_BIT}", case.masks[128, 32]
        functions[name], masks[name] = partial(sparse_attention, q, k, v, thresholds=0.0, attend=LOW_BIT), None
        name = f"salekit-masks-128x32-{LOW_BIT}"
        functions[name], masks[name] = partial(through_mask, case, mask, case.plan.replace(attend=LOW_BIT)), mask
    about = {name: {"version": session.report["versions"]["salekit"]} for name in functions}
    for name, mask in masks.items():
        if mask is not None:
            about[name]["masks"] = case.masks_name
    return functions, masks, about


def through_mask(case: Case, mask: BlockMask, plan: Plan) -> Any:
    return attend_stage(case.q, case.k, case.v, mask, plan)[0]


def is_accepted(session: Session, case: Case, **settings: Any) -> bool:
    """Whether salekit takes these settings for this input on this GPU."""
    try:
        call_checks.make_plan(case.q, case.k, case.v, **settings)
    except SalekitError as error:
        session.note(f"left out: {error}")
        return False
    return True


def row_of(name: str, plan: Plan, measured: Measured, mask: BlockMask | None) -> dict[str, Any]:
    """A row: tflops counts the visible pairs that are attended to, density the blocks."""
    density, pairs = 1.0, plan.visible_pairs * plan.num_heads
    block = None
    if mask is not None:
        plan = plan.replace(block_q=mask.block_q, block_k=mask.block_k)
        counts = mask.selected_blocks()
        density = float(counts.mean() / plan.visible_blocks.sum())
        pairs = sum(plan.selected_pairs(int(count)) for count in counts.flat)
        block = f"{mask.block_q}x{mask.block_k}"
    flop = 4 * plan.head_dim * pairs * plan.batch
    return {
        "name": name,
        "seqlen": plan.seqlen_k,
        **sampled(measured),
        "tflops": round(flop / measured.ms / 1e9, 1),
        "density": round(density, 5),
        "block": block,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with every other library's time over its own, and FlashAttention-3's as ``ratio_to_fa3``."""
    times = {row["name"]: row["ms"] for row in rows if not row["name"].startswith("salekit-")}
    for row in rows:
        ratios = {name: round(ms / row["ms"], 4) for name, ms in times.items()}
        row["ratio_to_fa3"] = ratios.get("fa3")
        row["ratios"] = ratios
    return rows


# --- stages --------------------------------------------------------------------------------------------------------
def measure_stages(session: Session, case: Case, settings: dict[str, Any]) -> None:
    functions: dict[Hashable, Callable[[], Any]] = {}
    for estimator, stride in variants(case.seqlen, settings):
        if not is_accepted(session, case, estimator=estimator, query_stride=stride):
            continue
        call = case.staged(TAU, estimator=estimator, query_stride=stride)
        wanted = ("quantize", "anchors", "estimate", "before-attention")
        for stage in wanted if stride == 1 else wanted[2:]:  # the others do not depend on it
            functions[stage, estimator, stride] = call.timed()[stage]
    measured = session.measure("stages", case.seqlen, functions)
    fa2 = next(
        (r["ms"] for r in session.report["rows"] if (r["name"], r["seqlen"]) == ("torch-fa2", case.seqlen)), None
    )
    for (stage, estimator, stride), result in measured.items():
        if result.ms is not None:
            entry = stage_of(stage, estimator, stride, case.plan, result)
            share = {"share_of_fa2": round(result.ms / fa2, 5)} if fa2 else {}
            session.report["stages"].append(entry | share)


def variants(seqlen: int, settings: dict[str, Any]) -> list[tuple[str, int]]:
    """(estimator, query_stride) to measure at a length."""
    pairs = list(product(settings["estimators"], settings["strides"]))
    if seqlen < LONG:
        return pairs
    return [pair for pair in pairs if pair in (("int8", 1), ("int8-sp24", 1), ("int8-sp24", 2))] or pairs[:1]


def stage_of(stage: str, estimator: str, stride: int, plan: Plan, measured: Measured) -> dict[str, Any]:
    """A stage: tops counts as if every visible pair of every row were multiplied, and only for ``estimate``."""
    operations = 2 * plan.head_dim * plan.visible_pairs * plan.num_heads * plan.batch
    return {
        "name": stage,
        "seqlen": plan.seqlen_k,
        "estimator": estimator,
        "query_stride": stride,
        **sampled(measured),
        "tops": round(operations / measured.ms / 1e9, 1) if stage == "estimate" else None,
    }


# --- end to end ----------------------------------------------------------------------------------------------------
def measure_end_to_end(session: Session, case: Case, settings: dict[str, Any]) -> None:
    functions: dict[Hashable, Callable[[], Any]] = {}
    masks: dict[Hashable, BlockMask | None] = {}
    for config in configs(case, settings):
        choice = dict(estimator=config.estimator, query_stride=config.query_stride, attend=config.attend)
        if not is_accepted(session, case, **choice):
            continue
        if config.masks == "own":
            call = partial(sparse_attention, case.q, case.k, case.v, thresholds=config.tau, **choice, return_mask=True)
            functions[config] = call
        else:
            masks[config] = case.masks[128, 32]
            functions[config] = case.staged(config.tau, masks[config], **choice).total
    densities = {config: mean_density(mask, case.plan) for config, mask in masks.items()}
    functions |= baselines(session, case)
    errors: dict[Hashable, float] = {}
    low_bit = lambda name: isinstance(name, Config) and name.attend == LOW_BIT  # noqa: E731
    accuracy = accuracy_check(case, masks, errors, low_bit)

    def check(name: Hashable, result: Any) -> None:
        if isinstance(name, Config) and name.masks == "own":
            result, masks[name] = result
            densities[name] = mean_density(masks[name], case.plan)
        accuracy(name, result)
        if isinstance(name, Config) and name.masks == "own":
            del masks[name]  # gigabytes at a million tokens

    measured = session.measure("end_to_end", case.seqlen, functions, check)
    base = {name: measured[name].ms for name in BASELINES if name in measured}
    session.report["end_to_end"] += [
        end_to_end_of(name, case.seqlen, densities[name], result, base)
        | {"relative_error": float(f"{errors[name]:.3g}")}
        for name, result in measured.items()
        if isinstance(name, Config) and result.ms is not None
    ]


def configs(case: Case, settings: dict[str, Any]) -> list[Config]:
    """The calls of a length: with a file's masks at its tau every attend, then on their own masks every tau."""
    found = []
    if case.file_masks is not None:
        for attend, (estimator, stride) in product(settings["attends"], variants(case.seqlen, settings)):
            found.append(Config(case.masks_name, TAU, estimator, stride, attend))
    for tau, attend, (estimator, stride) in product(
        settings["taus"], settings["attends"], variants(case.seqlen, settings)
    ):
        found.append(Config("own", tau, estimator, stride, attend))
    # int4 is the paper's estimator, not one for Hopper's end-to-end figures: its stages say what it costs.
    return [config for config in found if config.estimator != "int4" or settings["estimators"] == ("int4",)]


def baselines(session: Session, case: Case) -> dict[Hashable, Callable[[], Any]]:
    """What the calls are compared with, in the same rounds."""
    functions: dict[Hashable, Callable[[], Any]] = {"salekit-dense": lambda: dense_attention(case.q, case.k, case.v)}
    for rival in session.rivals:
        if rival.name in BASELINES:
            functions[rival.name] = rival.prepare(*case.torch, None)
    return functions


def mean_density(mask: BlockMask, plan: Plan) -> float:
    visible = plan.replace(block_q=mask.block_q, block_k=mask.block_k).visible_blocks.sum()
    return float(mask.selected_blocks().mean() / visible)


def end_to_end_of(
    config: Config, seqlen: int, density: float, measured: Measured, base: dict[str, float | None]
) -> dict[str, Any]:
    speedups = {key: round(base[name] / measured.ms, 4) if base.get(name) else None for name, key in BASELINES.items()}
    return {
        "seqlen": seqlen,
        "masks": config.masks,
        "tau": config.tau,
        "density": round(density, 5),
        "estimator": config.estimator,
        "query_stride": config.query_stride,
        "attend": config.attend,
        **sampled(measured),
        **speedups,
    }


# --- crossover -----------------------------------------------------------------------------------------------------
def measure_crossover(session: Session, lengths: list[int], make: Callable[[int], Case]) -> None:
    rows = []
    for seqlen in lengths:
        case = make(seqlen)
        functions = {
            "salekit-dense": partial(dense_attention, case.q, case.k, case.v),
            "salekit-sparse": partial(sparse_attention, case.q, case.k, case.v),
        }
        measured = session.measure("crossover", seqlen, functions)
        dense, sparse = measured["salekit-dense"], measured["salekit-sparse"]
        if dense.ms is not None and sparse.ms is not None:
            rows.append(crossover_row(seqlen, dense, sparse))
        del case, functions
        release_memory()
    session.report["crossover"] = {"from": crossover_of(rows), "rows": rows}


def crossover_row(seqlen: int, dense: Measured, sparse: Measured) -> dict[str, Any]:
    """slower: by more than both spreads together, and than 1%."""
    noise = max(0.01, dense.timing.spread + sparse.timing.spread)
    return {
        "seqlen": seqlen,
        "dense_ms": round(dense.ms, 5),
        "sparse_ms": round(sparse.ms, 5),
        "dense_host_ms": round(dense.host_ms, 5),
        "sparse_host_ms": round(sparse.host_ms, 5),
        "speedup": round(dense.ms / sparse.ms, 4),
        "noise": round(noise, 5),
        "slower": sparse.ms > dense.ms * (1 + noise),
    }


def crossover_of(rows: list[dict[str, Any]]) -> int | None:
    """The length from which sparse is faster at every longer one, beyond the noise; None when it never is."""
    found = None
    for row in sorted(rows, key=lambda row: -row["seqlen"]):
        if row["speedup"] <= 1 + row["noise"]:
            break
        found = row["seqlen"]
    return found


def crossover_lengths(longest: int) -> list[int]:
    return [2**power for power in range(9, 31) if 2**power <= longest]


# --- the report ----------------------------------------------------------------------------------------------------
def new_report(settings: dict[str, Any], gpu: dict[str, Any], commit: str | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "salekit-peers",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "command": timing.command_line(),
        "gpu": gpu["name"],
        "driver": gpu["driver"],
        "gpu_info": gpu,
        "versions": timing.versions(),
        "shape": {
            "batch": 1,
            "heads": settings["heads"],
            "kv_heads": settings["kv_heads"],
            "head_dim": settings["head_dim"],
            "causal": True,
            "layout": "bshd",
        },
        "dtype": settings["dtype"],
        "input": {"generator": "llm_like_qkv", "seed": settings["seed"], "masks": settings["masks_name"]},
        "clocks": None,
        "power": None,
        "notes": [],
        "conditions": [],
        "rows": [],
        "stages": [],
        "end_to_end": [],
        "crossover": None,
    }


def add_conditions(report: dict[str, Any], summary: dict[str, Any]) -> None:
    """Clocks and power while something was timed, next to the GPU's own limits."""
    gpu = report["gpu_info"]
    report["clocks"] = {
        "sm_mhz": summary["sm_mhz"],
        "memory_mhz": summary["memory_mhz"],
        "max_sm_mhz": gpu["max_sm_mhz"],
        "max_memory_mhz": gpu["max_memory_mhz"],
        "throttle": summary["throttle"],
        "temperature_c": summary["temperature_c"],
        "readings": summary["samples"],
    }
    report["power"] = {"median_w": summary["power_w"], "limit_w": gpu["power_limit_w"]}


def default_output(report: dict[str, Any]) -> Path:
    """bench/results/<gpu>-<date>.json; a shape other than the usual one is in the name."""
    shape = report["shape"]
    parts = [re.sub(r"[^a-z0-9]+", "-", report["gpu"].lower().replace("nvidia", "")).strip("-")]
    if shape["head_dim"] != 128:
        parts.append(f"d{shape['head_dim']}")
    if report["dtype"] != "bfloat16":
        parts.append(report["dtype"])
    return ROOT / "bench" / "results" / f"{'-'.join(parts)}-{report['date'][:10]}.json"


def print_tables(report: dict[str, Any]) -> None:
    shape = report["shape"]
    title = (
        f"{report['gpu']}, driver {report['driver']}; {shape['heads']}/{shape['kv_heads']} heads, "
        f"head_dim {shape['head_dim']}, {report['dtype']}, causal"
    )
    if report["rows"]:
        columns = ["name", "seqlen", "ms", "spread", "TFLOPS", "density", "FA3 / it", "error"]
        render.table(title, columns, [_row_cells(row) for row in report["rows"]])
    if report["stages"]:
        columns = ["stage", "seqlen", "estimator", "stride", "ms", "spread", "TOPS"]
        render.table("stages", columns, [_stage_cells(entry) for entry in report["stages"]])
    if report["end_to_end"]:
        columns = [
            "masks",
            "seqlen",
            "tau",
            "density",
            "estimator",
            "stride",
            "attend",
            "ms",
            "FA3",
            "FA2",
            "own dense",
        ]
        render.table("end to end: speed-up over", columns, [_call_cells(entry) for entry in report["end_to_end"]])
    if report["crossover"]:
        cells = [
            [options.seqlen_name(row["seqlen"])]
            + [f"{row[key]:.3f}" for key in ("dense_ms", "sparse_ms", "dense_host_ms", "sparse_host_ms")]
            + [f"{row['speedup']:.3f}", "yes" if row["slower"] else "no"]
            for row in report["crossover"]["rows"]
        ]
        render.table(
            "defaults against dense", ["seqlen", "dense ms", "sparse ms", "host", "host", "speed-up", "slower"], cells
        )
        start = report["crossover"]["from"]
        render.text(f"sparse is faster from {options.seqlen_name(start) if start else 'no length'} on")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        options.seqlen_name(row["seqlen"]),
        f"{row['ms']:.3f}",
        f"{row['spread'] * 100:.1f}%",
        f"{row['tflops']:.0f}",
        f"{row['density']:.3f}",
        _number(row["ratio_to_fa3"], 3),
        f"{row['relative_error']:.2g}",
    ]


def _stage_cells(entry: dict[str, Any]) -> list[str]:
    return [
        entry["name"],
        options.seqlen_name(entry["seqlen"]),
        entry["estimator"],
        str(entry["query_stride"]),
        f"{entry['ms']:.3f}",
        f"{entry['spread'] * 100:.1f}%",
        _number(entry["tops"], 0),
    ]


def _call_cells(entry: dict[str, Any]) -> list[str]:
    return [
        entry["masks"],
        options.seqlen_name(entry["seqlen"]),
        f"{entry['tau']:g}",
        f"{entry['density']:.3f}",
        entry["estimator"],
        str(entry["query_stride"]),
        entry["attend"],
        f"{entry['ms']:.3f}",
        *(_number(entry[key], 2) for key in BASELINES.values()),
    ]


# --- the command ---------------------------------------------------------------------------------------------------
class Several(click.ParamType):
    """Comma-separated values out of a few."""

    name = "LIST"

    def __init__(self, choices: tuple, convert: Callable[[str], Any] = str):
        self.choices, self.convert_one = choices, convert

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple:
        if isinstance(value, tuple):
            return value
        parts = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
        allowed = {str(choice): choice for choice in self.choices}
        for part in parts:
            if part not in allowed:
                self.fail(f"{part!r} is not one of {', '.join(allowed)}", param, ctx)
        return tuple(self.convert_one(part) for part in parts)


def several(name: str, choices: tuple, default: tuple, text: str, convert: Callable[[str], Any] = str):
    return click.option(
        name, type=Several(choices, convert), default=",".join(map(str, default)), show_default=True, help=text
    )


class Taus(click.ParamType):
    """Comma-separated thresholds."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(options.TAU.convert(part, param, ctx) for part in value.split(","))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seqlen", default="32k,64k,128k", show_default=True, help="Lengths, as 32k,64k,128k,1m.")
@several("--sections", SECTIONS, SECTIONS, "What to measure.")
@several("--rivals", tuple(rivals_module.RIVALS), tuple(rivals_module.RIVALS), "Which others, where installed.")
@several("--estimators", ESTIMATORS, ("int8", "int8-sp24", "int4"), "Estimators of stages and end_to_end.")
@several("--strides", QUERY_STRIDES, QUERY_STRIDES, "query_stride of stages and end_to_end.", int)
@several("--attends", ATTENDS, ATTENDS, "attend of end_to_end.")
@click.option("--taus", type=Taus(), default="0.008,0.016", show_default=True, help="Thresholds of end_to_end.")
@click.option("--masks", "masks_file", type=click.Path(exists=True, dir_okay=False), help="Masks (npz) of one length.")
@click.option("--heads", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), default="128", show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the generated input.")
@click.option("--budget-seconds", type=float, default=135.0, show_default=True, help="Of the whole run, roughly.")
@click.option("--skip-above-seconds", type=float, default=20.0, show_default=True, help="Leave out slower calls.")
@click.option("--commit", default=None, help="Recorded as the commit. Default: that of the checkout.")
@options.as_json
@options.output
def main(as_json: bool, output: str | None, **settings: Any) -> None:
    """Time salekit and its rivals on this GPU."""
    started = time.monotonic()
    settings |= {"head_dim": int(settings["head_dim"])}
    settings |= {"dtype": {"bf16": "bfloat16", "fp16": "float16"}[settings["dtype"]]}
    settings |= {"masks_name": Path(settings["masks_file"]).stem if settings["masks_file"] else None}
    lengths = options.parse_seqlens(settings["seqlen"])
    if settings["heads"] % settings["kv_heads"]:
        raise click.UsageError(f"--kv-heads: got {settings['kv_heads']}; wants a divisor of {settings['heads']}")
    try:
        report = run(settings, lengths, started, Path(output) if output else None)
    except SalekitError as error:
        click.echo(f"peers: error: {error}", err=True)
        sys.exit(3 if isinstance(error, GpuError) else 1)
    if as_json:
        render.print_json(report)
    else:
        print_tables(report)


def run(settings: dict[str, Any], lengths: list[int], started: float, output: Path | None) -> dict[str, Any]:
    """Measure every section at every length. The report is written after each, for a run may be cut off."""
    precompile(settings)
    render.note(f"peers: {time.monotonic() - started:.0f} s: kernels compiled")
    report = new_report(settings, timing.gpu_info(), settings["commit"] or timing.git_commit())
    file_masks = load_masks(settings)
    output = output or default_output(report)
    found, versions, notes = rivals_module.find(settings["rivals"])
    report["versions"] |= versions
    render.note(
        f"peers: {time.monotonic() - started:.0f} s: rivals found: {', '.join(r.name for r in found) or 'none'}"
    )
    make = partial(make_case, settings, file_masks)
    sweep = crossover_lengths(max(lengths)) if "crossover" in settings["sections"] else []
    sections = [section for section in settings["sections"] if section != "crossover"]
    pending = sections * len(lengths) + ["crossover"] * len(sweep)
    with timing.ClockSampler() as sampler:
        session = Session(
            report, sampler, found, settings["budget_seconds"], pending, settings["skip_above_seconds"], started
        )
        for note in notes:
            session.note(note)
        for seqlen in lengths:
            case = make(seqlen)
            for section in sections:
                render.note(f"peers: {time.monotonic() - started:.0f} s: {section}, {options.seqlen_name(seqlen)}")
                measure_section(session, section, case, settings)
                write(session, output)
                release_memory()
            del case
            release_memory()
        if sweep:
            measure_crossover(session, sweep, make)
    write(session, output)
    render.note(f"peers: wrote {output} after {time.monotonic() - started:.0f} s")
    return report


def measure_section(session: Session, section: str, case: Case, settings: dict[str, Any]) -> None:
    if section == "rows":
        measure_rows(session, case)
    elif section == "stages":
        measure_stages(session, case, settings)
    else:
        measure_end_to_end(session, case, settings)


def write(session: Session, output: Path) -> None:
    report = session.report
    add_conditions(report, session.sampler.summary(*session.spans))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def make_case(settings: dict[str, Any], file_masks: BlockMask | None, seqlen: int) -> Case:
    q, k, v = llm_like_qkv(
        seqlen,
        settings["heads"],
        settings["kv_heads"],
        settings["head_dim"],
        dtype=settings["dtype"],
        seed=settings["seed"],
        cuda=True,
    )
    fits = file_masks is not None and file_masks.seqlen_k == seqlen
    return Case(q, k, v, file_masks if fits else None, settings["masks_name"] if fits else "own")


def load_masks(settings: dict[str, Any]) -> BlockMask | None:
    """The mask file, on the host. click.UsageError when it has too few heads."""
    if not settings["masks_file"]:
        return None
    masks = BlockMask.load_npz(settings["masks_file"])
    if masks.words.shape[0] != 1 or masks.words.shape[1] < settings["heads"] or masks.seqlen_q != masks.seqlen_k:
        raise click.UsageError(
            f"--masks: got batch {masks.words.shape[0]}, {masks.words.shape[1]} heads and {masks.seqlen_q} rows for "
            f"{masks.seqlen_k} keys; wants batch 1, {settings['heads']} heads or more and as many rows as keys"
        )
    return masks


def precompile(settings: dict[str, Any]) -> None:
    """Compile all that this run may launch at once, so that no first call waits for a compiler."""
    from salekit import catalog, jit

    arch = jit.device_arch()
    jit.precompile([spec for _, spec in catalog.all_specs(arch) if is_wanted(spec.template, settings)], arch)


def is_wanted(template: tuple[str, ...], settings: dict[str, Any]) -> bool:
    """Whether a kernel of these template arguments can be of this head_dim and dtype."""
    other_dims = {str(dim) for dim in HEAD_DIMS} - {str(settings["head_dim"])}
    other_type = {"bfloat16": "Half", "float16": "BFloat16"}[settings["dtype"]]
    return other_type not in template and not other_dims.intersection(template[:1])


def release_memory() -> None:
    """Give the memory that CuPy and PyTorch hold in reserve back, so that the other can have it."""
    gc.collect()
    arrays.import_cupy().get_default_memory_pool().free_all_blocks()
    rivals_module.release_memory()


if __name__ == "__main__":
    main()
