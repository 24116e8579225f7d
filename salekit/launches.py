"""A call's launches one by one: recorded as ``programs`` records them, each timed between events of its own."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Iterator

from . import jit, nvtx, programs
from .attend import attend, is_segment
from .block_mask import BlockMask
from .jit import KernelInfo, KernelSpec
from .plans import Plan
from .staged import StagedCall
from .timing import LEAD_MS, SPREAD_GOAL, Timing, l2_flush

_MIN_SAMPLES, _MAX_SAMPLES = 5, 50


@dataclass(frozen=True)
class Launch:
    """One launch of a call, or the launches over its segments of the keys or in turns of its pools.

    spec, info, blocks_per_multiprocessor: None for a fill with zeros of ``fill_bytes``. grid: of the first.
    """

    stage: str
    spec: KernelSpec | None
    info: KernelInfo | None
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    blocks_per_multiprocessor: int | None = None
    fill_bytes: int = 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)


@dataclass(frozen=True)
class Span:
    """When something ran, in microseconds from the same start."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Trace:
    """One call. launches: by the GPU's events, in their order; stages, whole: by the host's clock, launching alone.

    order: of each of the launches, its place in ``LaunchedCall.launches``; kernels that take turns have several. Both
    clocks begin with an event that an idle GPU recorded; the GPU's times lag the host's by what that took, some
    microseconds.
    """

    launches: list[tuple[float, float]]
    order: list[int]
    stages: list[Span]
    whole: Span


class LaunchedCall:
    """The launches of one call with these arrays, on CuPy's current device and stream.

    Every run launches all of them in their order, for each needs what those before it have written.
    """

    def __init__(self, recorder: programs.Recorder, ports: list[Any], given: list[Any]):
        import cupy

        self._program = programs.Program(recorder, ports)
        programs.bind_context(cupy.cuda.runtime.getDevice())
        self._workspace = cupy.empty(max(1, self._program.workspace_bytes), "u1")
        self._arrays = given
        self._program.link(self._workspace.data.ptr, *(array.data.ptr for array in given))
        self._stream = cupy.cuda.get_current_stream()
        self.launches: list[Launch] = []
        self._steps: list[tuple[int, list[tuple]]] = []  # (place of the launch, its calls); one for each turn
        calls = self._program.calls(programs.Gpu(), self._stream.ptr)
        for operation, stage, call in zip(self._program.operations, self._program.stages, calls):
            launch = _describe(operation, stage, jit.loaded_kernels())
            if self._steps and _continues(launch, self.launches[self._steps[-1][0]]):
                self._steps[-1][1].append(call)
                continue
            place = next((i for i, other in enumerate(self.launches) if _takes_turns(launch, other)), None)
            if place is None:
                place = len(self.launches)
                self.launches.append(launch)
            self._steps.append((place, [call]))

    def run(self) -> None:
        """Launch everything."""
        for _, calls in self._steps:
            self._launch(calls)

    def time_each(self, max_seconds: float = 4.0) -> list[Timing]:
        """The time of each launch, in order, the L2 flushed before it; over all of its turns, where it has several.

        Runs of all launches end when every spread is at most SPREAD_GOAL, after some 50, or when ``max_seconds`` are
        spent.
        """
        import cupy

        flush = l2_flush()
        events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in self._steps]
        samples: list[list[float]] = [[] for _ in self.launches]
        self.run()  # warms up
        started = time.perf_counter()
        while True:
            for (_, calls), (start, end) in zip(self._in_ranges(), events):
                flush()
                start.record(self._stream)
                self._launch(calls)
                end.record(self._stream)
            self._stream.synchronize()
            sums = [0.0] * len(samples)
            for (place, _), (start, end) in zip(self._steps, events):
                sums[place] += cupy.cuda.get_elapsed_time(start, end)
            for of_launch, ms in zip(samples, sums):
                of_launch.append(ms)
            count, seconds = len(samples[0]), time.perf_counter() - started
            timings = [Timing.of(of_launch) for of_launch in samples]
            if count >= _MIN_SAMPLES and all(timing.spread <= SPREAD_GOAL for timing in timings):
                return timings
            if count >= _MAX_SAMPLES or (count >= 2 and seconds > max_seconds):
                return timings

    def time_whole(self, runs: int = 3) -> float:
        """Median milliseconds of all launches one after another, nothing flushed."""
        import cupy

        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        times = []
        for _ in range(runs):
            start.record(self._stream)
            self.run()
            end.record(self._stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end))
        return statistics.median(times)

    def trace(self) -> Trace:
        """One run right after others, as in a process that makes one call after another: nothing is flushed.

        Those before it keep the GPU busy for LEAD_MS, so that the host has launched everything when it begins.
        """
        import cupy

        leads = max(1, math.ceil(LEAD_MS / max(self.time_whole(), LEAD_MS / 50)))
        base = cupy.cuda.Event()
        events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in self._steps]
        self._stream.synchronize()
        zero = time.perf_counter()
        base.record(self._stream)
        for _ in range(leads):
            self.run()

        def now() -> float:
            return (time.perf_counter() - zero) * 1e6

        host: dict[str, list[float]] = {}
        begun = now()
        for (stage, calls), (start, end) in zip(self._in_ranges(), events):
            host.setdefault(stage, [now()])
            start.record(self._stream)
            self._launch(calls)
            end.record(self._stream)
            host[stage][1:] = [now()]
        whole = Span("", begun, now())
        self._stream.synchronize()

        def gpu_us(event: Any) -> float:
            return cupy.cuda.get_elapsed_time(base, event) * 1e3

        launches = [(gpu_us(start), gpu_us(end)) for start, end in events]
        order = [place for place, _ in self._steps]
        return Trace(launches, order, [Span(stage, *times) for stage, times in host.items()], whole)

    def _launch(self, calls: list[tuple]) -> None:
        for function, arguments in calls:
            function(*arguments)

    def _in_ranges(self) -> Iterator[tuple[str, list[tuple]]]:
        """(stage, calls) of each step, inside an NVTX range of the stage."""
        for stage, steps in groupby(self._steps, key=lambda step: self.launches[step[0]].stage):
            with nvtx.span(stage):
                for _, calls in steps:
                    yield stage, calls


def _continues(launch: Launch, before: Launch) -> bool:
    return launch.spec is not None and launch.spec == before.spec and is_segment(launch.spec)


def _takes_turns(launch: Launch, before: Launch) -> bool:
    """Pools are made and attended to for some query blocks at a time."""
    return launch.stage == "pool" and launch.spec == before.spec and before.stage == "pool"


def _describe(operation: Any, stage: str, kernels: dict[int, tuple[KernelSpec, jit.Kernel]]) -> Launch:
    if isinstance(operation, programs.Fill):
        return Launch(stage, None, None, (0, 0, 0), (0, 0, 0), fill_bytes=operation.num_bytes)
    spec, kernel = kernels[operation.function]
    blocks = kernel.blocks_per_multiprocessor(math.prod(operation.block))
    return Launch(stage, spec, kernel.info, operation.grid, operation.block, blocks)


def launch_sparse(q: Any, k: Any, v: Any, thresholds: float, plan: Plan, mask: BlockMask | None = None) -> LaunchedCall:
    """The launches of ``sparse_attention`` with these bshd CuPy arrays, as the plan says.

    mask: attended through instead of the estimated one, which is computed all the same; CuPy's.
    """
    given = [q, k, v] + ([] if mask is None else [mask.words])
    with programs.Recorder(q.data.device_id) as recorder:
        ports = [recorder.array(x.shape, x.dtype, x.strides) for x in given]
        if mask is not None:
            mask = replace(mask, words=ports[3])
        StagedCall(*ports[:3], thresholds, plan, mask).total()
    return LaunchedCall(recorder, ports, given)


def launch_dense(q: Any, k: Any, v: Any, plan: Plan) -> LaunchedCall:
    """The launches of an exact call with these bshd CuPy arrays that attends to everything."""
    given = [q, k, v]
    with programs.Recorder(q.data.device_id) as recorder:
        ports = [recorder.array(x.shape, x.dtype, x.strides) for x in given]
        with programs.stage("dense"):
            attend(*ports, None, plan.replace(attend="exact"))
    return LaunchedCall(recorder, ports, given)
