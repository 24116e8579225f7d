"""Many cases, in one process or several, and what came of them."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Callable, Iterator

from ..checks import Check, json_number
from . import calls
from .cases import Case, draw, make_arrays, save
from .checking import CALLED, check_case, ratio
from .shrinking import shrink

LONG_EVERY = 40  # of a soak's cases one is long
SHRINK_SECONDS = 20.0
MOST_WRITTEN = 3  # failures of one check that a process shrinks and writes: a systematic one fails in a thousand cases
PASS_CASES = 120  # of memory_passes; attention_plan.MAX_PLANS and some
PASS_PAIRS = 2_000_000
PASSES_SHARE = 0.2  # of a soak's minutes: the time of memory_passes, less what the last cases took of it
MEASURED_EVERY = 16  # cases of a soak after which a process looks at its memory
# What a case is counted by; each has the values of a table's lines.
GROUPS = ("kind", "estimator", "attend", "skipped", "dtype", "head_dim", "layout", "strides", "scores", "data")


@dataclass(frozen=True)
class Result:
    """Of one case. file: where it was written when it failed, unless MOST_WRITTEN were or it could not be, of which
    not_written says why; shrunk: as it was, or was to be, written."""

    index: int
    case: Case
    checks: list[Check]
    in_doubt: int
    seconds: float
    file: str | None = None
    not_written: str | None = None
    shrunk: Case | None = None
    live_bytes: int | None = None  # of CuPy's pool, that are still in use after the case

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass
class Report:
    """Counts and worst ratios as cases come in."""

    seed: int
    cases: int = 0
    in_doubt: int = 0
    pairs: int = 0
    failures: list[Result] = field(default_factory=list)
    by_group: dict[str, dict[str, Counter]] = field(default_factory=dict)
    worst: dict[tuple[str, str], tuple[float, Check, int]] = field(default_factory=dict)
    checks: Counter = field(default_factory=Counter)
    live_bytes: list[int] = field(default_factory=list)  # of each result that has them
    pass_cases: int = 0  # of memory_passes
    passes: list[int] = field(default_factory=list)  # bytes of the GPU in use after each of them
    started: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        self.cases += 1
        self.in_doubt += result.in_doubt
        self.pairs += result.case.pairs
        for group, value in groups_of(result.case).items():
            counts = self.by_group.setdefault(group, {}).setdefault(value, Counter())
            counts["cases"] += 1
            counts["failed"] += bool(result.failed)
        for check in result.checks:
            name = name_of(check)
            self.checks[name] += 1
            of_check = ratio(check)
            # Of equals the first case's, whichever came first.
            if name not in self.worst or (of_check, -result.index) > (self.worst[name][0], -self.worst[name][2]):
                self.worst[name] = of_check, check, result.index
        if result.failed:
            self.failures.append(result)
        if result.live_bytes is not None:
            self.live_bytes.append(result.live_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "failures": len(self.failures),
            "pairs": self.pairs,
            "blocks_in_doubt": self.in_doubt,
            "seconds": round(time.monotonic() - self.started, 1),
            "groups": {
                group: {value: dict(counts) for value, counts in sorted(values.items())}
                for group, values in self.by_group.items()
            },
            "checks": [
                {
                    "stage": stage,
                    "compared": compared,
                    "cases": self.checks[stage, compared],
                    "worst_share_of_bound": json_number(share),
                    "error": json_number(check.error),
                    "bound": json_number(check.bound),
                    "case": index,
                }
                for (stage, compared), (share, check, index) in sorted(self.worst.items())
            ],
            "failed_cases": [
                {
                    "case": result.index,
                    "file": result.file,
                    "not_written": result.not_written,
                    "drawn": result.case.describe(),
                    "shrunk": None if result.shrunk is None else result.shrunk.describe(),
                    "checks": [check.to_json() for check in result.failed],
                }
                for result in self.failures
            ],
        }


def groups_of(case: Case) -> dict[str, str]:
    scores = [
        name
        for name, on in (("softcap", case.softcap), ("window", case.window_size), ("sinks", case.sink_logits))
        if on
    ]
    data = "not finite" if case.spots else "other scales" if case.scales != (1.0, 1.0, 1.0) else case.distribution
    own = dict(scores=" ".join(scores) or "plain", data=data)
    return {name: own[name] if name in own else str(getattr(case, name)) for name in GROUPS}


# --- one case ------------------------------------------------------------------------------------------------------
def run_case(
    seed: int,
    index: int,
    on_gpu: bool,
    folder: str | None,
    soak: bool = False,
    announce: Callable[[Result], None] | None = None,
) -> Result:
    """Draw, check; when it fails, announce that, shrink, which takes a while, and write to the folder."""
    case = draw(seed, index, long=is_long(index, on_gpu, soak))
    started = time.monotonic()
    outcome = check_case(case, on_gpu)
    result = Result(index, case, outcome.checks, outcome.in_doubt, time.monotonic() - started)
    if not outcome.failed:
        return result
    if announce is not None:
        announce(result)
    return write_failure(result, seed, on_gpu, folder)


def is_long(index: int, on_gpu: bool, soak: bool) -> bool:
    """Whether a case is a long one, which the twin would take hours for."""
    return soak and on_gpu and index % LONG_EVERY == LONG_EVERY - 1


def name_of(check: Check) -> tuple[str, str]:
    return check.stage, CALLED if check.compared.startswith(CALLED) else check.compared


_written: Counter = Counter()  # by check, in this process


def write_failure(result: Result, seed: int, on_gpu: bool, folder: str | None) -> Result:
    """The result with its case made small and, if there is a folder, written; as it is when this check has failed often
    enough."""
    name = name_of(result.failed[0])
    _written[name] += 1
    if _written[name] > MOST_WRITTEN:
        return result

    def fails(smaller: Case) -> bool:
        return name in map(name_of, check_case(smaller, on_gpu).failed)

    result = replace(result, shrunk=shrink(result.case, fails, SHRINK_SECONDS))
    check = result.failed[0]
    return _written_to(folder, seed, result, f"{check.stage}: {check.compared}")


def _written_to(folder: str | None, seed: int, result: Result, check: str) -> Result:
    if folder is None:
        return result
    file = Path(folder) / f"fuzz-{seed}-{result.index}.npz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file, result.shrunk, make_arrays(result.shrunk), check)
    except OSError as error:  # no room, perhaps: what was drawn is not lost
        return replace(result, not_written=f"{file}: {error.strerror or error}")
    return replace(result, file=str(file))


# --- memory --------------------------------------------------------------------------------------------------------
def live_bytes() -> int:
    """Bytes of CuPy's pool that this process uses when salekit has given back its workspaces: 0, if nothing leaks."""
    from .. import workspaces
    from ..arrays import import_cupy

    workspaces.clear_workspaces()
    gc.collect()
    return import_cupy().get_default_memory_pool().used_bytes()


def memory_passes(seed: int, seconds: float) -> tuple[int, list[int]]:
    """(the cases of a pass, bytes of the GPU in use after each of three passes over the same cases).

    They are more than plans are kept if a third of ``seconds`` is enough for so many, and one at least. The first pass
    loads kernels. Nothing else may use the GPU meanwhile.
    """
    from ..arrays import import_cupy

    cupy, used = import_cupy(), []
    end_of_first = time.monotonic() + seconds / 3
    drawn = (calls.adapted(draw(seed, index), True) for index in itertools.count())
    small = (case for case in drawn if case.pairs < PASS_PAIRS)
    cases: list[Case] = []
    for number in range(3):
        if number == 0:
            while len(cases) < PASS_CASES and (not cases or time.monotonic() <= end_of_first):
                cases.append(next(small))
                calls.make_calls(cases[-1], make_arrays(cases[-1]), True)
        else:
            for case in cases:
                calls.make_calls(case, make_arrays(case), True)
        live_bytes()
        cupy.cuda.Device().synchronize()
        cupy.get_default_memory_pool().free_all_blocks()
        free, total = cupy.cuda.runtime.memGetInfo()
        used.append(total - free)
    return len(cases), used


# --- many cases ----------------------------------------------------------------------------------------------------
def run_many(
    seed: int,
    *,
    on_gpu: bool,
    cases: int | None = None,
    minutes: float | None = None,
    workers: int = 1,
    folder: str | None = None,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Cases 0, 1, ... of the seed, as many as ``cases`` says, or a soak for ``minutes`` with long ones among them, of
    one case at least. The last fifth of a soak on a GPU watches its memory.

    workers: processes that share the GPU; 1: this process. Which process takes a case decides nothing about it. A
    process that dies with a case has failed it, and is replaced. progress: called after each case, and when this is
    interrupted, with failures that were being shrunk among those of the report.
    """
    report, soak = Report(seed), minutes is not None
    share = 1 - PASSES_SHARE if on_gpu else 1
    end = None if minutes is None else report.started + 60 * minutes * share

    def indices() -> Iterator[int]:
        index = 0
        while (cases is None or index < cases) and (end is None or index == 0 or time.monotonic() < end):
            yield index
            index += 1

    results = _in_this_process if workers == 1 else _in_processes
    workers = workers if cases is None else min(workers, cases)
    failing: dict[int, Result] = {}  # which are being shrunk, by index
    try:
        with closing(results(seed, indices(), on_gpu, folder, soak, failing, workers)) as found:
            for result in found:
                failing.pop(result.index, None)
                report.add(result)
                if progress:
                    progress(report)
    except KeyboardInterrupt:
        for result in failing.values():
            report.add(result)
        if progress and report.cases:
            progress(report)
        raise
    if soak and on_gpu:
        report.pass_cases, report.passes = memory_passes(seed, report.started + 60 * minutes - time.monotonic())
    return report


def _in_this_process(seed, indices, on_gpu, folder, soak, failing, _workers) -> Iterator[Result]:
    def announce(result: Result) -> None:
        failing[result.index] = result

    for index in indices:
        try:
            result = _measured(run_case(seed, index, on_gpu, folder, soak, announce), on_gpu and soak)
        except Exception:  # the GPU is lost to this process
            yield _lost(seed, index, traceback.format_exc(limit=-4), on_gpu, folder, soak)
            return
        yield result


def _measured(result: Result, measure: bool) -> Result:
    return replace(result, live_bytes=live_bytes()) if measure and result.index % MEASURED_EVERY == 0 else result


def _work(connection: Any, seed: int, on_gpu: bool, folder: str | None, soak: bool) -> None:
    """A worker: takes indices until None comes, or nobody is there to ask or to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the one that listens ends the others
    answer: Result | str | None = None

    def announce(result: Result) -> None:
        with suppress(OSError):  # nobody is there: the next answer will show it
            connection.send((result,))

    while not isinstance(answer, str) and (index := _next_index(connection)) is not None:
        try:
            answer = _measured(run_case(seed, index, on_gpu, folder, soak, announce), on_gpu and soak)
        except Exception:  # this process's GPU may be lost: say why, and let another go on
            answer = traceback.format_exc(limit=-4)
        try:
            connection.send(answer)
        except OSError:
            return


def _next_index(connection: Any) -> int | None:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start meanwhile get no Ctrl-C, not even while they import; this one gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # to start it later would let interrupts through
    with _held(signal.SIGINT):
        yield


@contextmanager
def _held(*signals: int) -> Iterator[None]:
    """These signals come afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals) if hasattr(signal, "pthread_sigmask") else ()
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    def __init__(self, context: Any, arguments: tuple):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        with _without_interrupts():
            self.process.start()
        theirs.close()
        self.index: int | None = None

    def give(self, index: int | None) -> None:
        self.index = index
        self.connection.send(index)


def _in_processes(seed, indices, on_gpu, folder, soak, failing, workers) -> Iterator[Result]:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # of the workers, who have a core each
    context = multiprocessing.get_context("spawn")
    arguments = (seed, on_gpu, folder, soak)
    idle: list[_Worker] = []
    busy: dict[Any, _Worker] = {}
    try:
        while len(idle) < workers:
            idle.append(_Worker(context, arguments))
        while True:
            while idle and (index := next(indices, None)) is not None:
                worker = idle.pop()
                worker.give(index)
                busy[worker.connection] = worker
            if not busy:
                return
            for connection in wait(list(busy)):
                with _held(signal.SIGINT, signal.SIGTERM):  # what has been taken from a pipe is not lost
                    worker = busy.pop(connection)
                    try:
                        result = connection.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        result = f"the process ended with code {worker.process.exitcode}"
                    _note(result, failing)
                    if isinstance(result, tuple):  # the case when it is small is to come
                        busy[connection] = worker
                        continue
                if isinstance(result, str):
                    result = _lost(seed, worker.index, result, on_gpu, folder, soak)
                    worker = _Worker(context, arguments)
                idle.append(worker)
                yield result
    finally:
        for connection, worker in busy.items():  # this was interrupted
            with suppress(EOFError, OSError):
                _note(connection.recv() if connection.poll() else None, failing)
            worker.process.terminate()
        for worker in idle:
            with suppress(OSError):  # it has died
                worker.give(None)
        for worker in (*idle, *busy.values()):
            worker.process.join()


def _note(message: tuple | Result | str | None, failing: dict[int, Result]) -> None:
    """What a worker says of a failure: (the result,) before it shrinks it, and the result afterwards."""
    result = message[0] if isinstance(message, tuple) else message
    if isinstance(result, Result) and result.failed:
        failing[result.index] = result


def _lost(seed: int, index: int, why: str, on_gpu: bool, folder: str | None, soak: bool) -> Result:
    """The result of a case that took its process with it, as it was drawn."""
    case = draw(seed, index, long=is_long(index, on_gpu, soak))
    check = Check("call", f"{CALLED} ({why.strip()[-400:]})", 1.0, 0.0, False)
    return _written_to(folder, seed, Result(index, case, [check], 0, 0.0, shrunk=case), f"call: {CALLED}")
