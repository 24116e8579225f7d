"""Measures the test suite: which mutations of the kernels (bench/mutation_list.py) do its GPU tests catch?

    python bench/mutations.py --list               what they are
    python bench/mutations.py --check              no GPU: each occurs once, compiles, and changes the machine code
    python bench/mutations.py --json FILE          runs all of them; exits 1 if one is not caught
    python bench/mutations.py --quick --json FILE  the tests about the mutated code alone
    python bench/mutations.py --missed FILE        the whole suite for what FILE does not have as caught; updates FILE

Each mutation gets a copy of the checkout of its own, in which pytest runs the tests about the mutated code and, if
they pass, all GPU tests but those that time the GPU or the host. Before that, the tests run on a copy without a
mutation: one that fails there catches nothing. Copies share a cache of compiled kernels, which starts as a copy of
salekit's: its keys are made of the sources, so mutants do not meet in it. A mutation is caught when a test fails, when
the GPU reports an error, or when the tests take longer than --timeout; a mutant that does not compile is not caught.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the checkout is not on the path
    sys.path.insert(0, str(ROOT))

from bench.mutation_list import MUTATIONS, Mutation
from salekit import catalog, jit
from salekit.errors import CompileError

SCHEMA = 1
COPIED = ("salekit", "cli", "cuda_src", "tests", "bench", "examples", "pyproject.toml")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "results", "*.pyc")
MARKERS = "gpu and not alone"  # what times the GPU fails when others use it, mutated or not
TIMED = "not is_quick and not in_little_time"  # and what times the host
SUITE_TIMEOUT = 400  # seconds
CACHE_BYTES = 8 * 2**30  # no kernel leaves the cache during a run
CUDA_ERROR = re.compile(r"cudaError\w+|CUDA_ERROR\w+|CUDARuntimeError|CUDADriverError")
CAUGHT = ("failed", "CUDA error", "timeout", "crash")
CHECKED_INSTANCES = 12  # of a kernel, in search of one that the mutation changes


@dataclass(frozen=True)
class Run:
    """One run of pytest. outcome: "passed", one of CAUGHT, or what makes the run worthless; test: which failed."""

    outcome: str
    seconds: float
    test: str | None = None
    message: str | None = None


# --- copies -------------------------------------------------------------------------------------------------------
def source(mutation: Mutation) -> str:
    """The mutated file's text. Raises ValueError when the old text does not occur exactly once."""
    text = (ROOT / "cuda_src" / mutation.file).read_text()
    if text.count(mutation.before) != 1:
        raise ValueError(f"{mutation.label}: occurs {text.count(mutation.before)} times in {mutation.file}")
    return text.replace(mutation.before, mutation.after)


@contextmanager
def copy_of_checkout(folder: Path, mutation: Mutation | None):
    """A copy of what the tests need, mutated, that is removed in the end."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=NOT_COPIED)
        else:
            shutil.copy2(path, copy / name)
    (copy / "bench" / "results").mkdir(exist_ok=True)
    if mutation is not None:
        (copy / "cuda_src" / mutation.file).write_text(source(mutation))
    try:
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def seed_cache(folder: Path) -> None:
    """Copies salekit's cache of compiled kernels to ``folder``."""
    folder.mkdir()
    kept = jit.cache_dir()
    if kept is not None and kept.is_dir():
        for path in kept.iterdir():
            if path.suffix in (".json", ".cubin"):
                shutil.copy2(path, folder / path.name)


# --- pytest -------------------------------------------------------------------------------------------------------
def run_tests(copy: Path, arguments: list[str], cache_dir: Path, timeout: float) -> Run:
    """pytest -x in a copy, by its own process group."""
    report = copy / "report.xml"
    environment = {
        **os.environ, "PYTHONPATH": str(copy), "SALEKIT_CACHE_DIR": str(cache_dir), "OPENBLAS_NUM_THREADS": "1",
        "SALEKIT_CACHE_MAX_BYTES": str(CACHE_BYTES), "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", MARKERS,
        f"--junitxml={report}", *arguments,
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=copy, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Run("timeout", time.monotonic() - started)
    return judge(process.returncode, report, output, time.monotonic() - started)


def judge(code: int, report: Path, output: str, seconds: float) -> Run:
    """What pytest's exit status, its JUnit report (there is none after a crash) and its output say."""
    tail = (output.strip().splitlines() or [""])[-1][:200]
    if code < 0:
        return Run("crash", seconds, None, f"signal {-code}")
    if code not in (0, 1) or not report.exists():
        return Run("pytest error", seconds, None, tail)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    for case in cases:
        for found in (*case.findall("failure"), *case.findall("error")):
            text = f"{found.get('message') or ''}\n{found.text or ''}"
            test = f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
            message = (found.get("message") or "").strip().splitlines()
            outcome = "failed"
            if "CompileError" in text:
                outcome = "does not compile"
            elif CUDA_ERROR.search(text):
                outcome = "CUDA error"
            return Run(outcome, seconds, test, message[0][:200] if message else None)
    if code != 0:
        return Run("pytest error", seconds, None, tail)
    ran = sum(case.find("skipped") is None for case in cases)
    return Run("passed", seconds) if ran else Run("nothing ran", seconds, None, tail)


def first_arguments(first: str) -> list[str]:
    file, *rest = shlex.split(first)
    return [f"tests/{file}", *rest]


def run_mutation(mutation: Mutation, folder: Path, cache_dir: Path, timeout: float, with_first: bool,
                 with_suite: bool) -> dict[str, Any]:
    """The record of one mutation."""
    seconds = 0.0
    with copy_of_checkout(folder, mutation) as copy:
        steps = [("first", first_arguments(mutation.first), timeout)] if with_first else []
        steps += [("suite", ["tests", "-k", TIMED], SUITE_TIMEOUT)] if with_suite else []
        for where, arguments, limit in steps:
            run = run_tests(copy, arguments, cache_dir, limit)
            seconds += run.seconds
            if run.outcome != "passed":
                break
    return {
        "mutation": mutation.label, "file": mutation.file, "kind": mutation.kind, "words": mutation.words,
        "caught": run.outcome in CAUGHT, "outcome": "not caught" if run.outcome == "passed" else run.outcome,
        "by": where, "test": run.test, "message": run.message, "seconds": round(seconds, 1),
    }


# --- without a GPU ------------------------------------------------------------------------------------------------
@cache
def instances() -> dict[str, list[tuple[jit.KernelSpec, str]]]:
    """Kernel -> its instances, each with an architecture: Hopper's, and sm_80 for those that only others launch."""
    found: dict[jit.KernelSpec, str] = {}
    for arch in ("sm_90a", "sm_80"):
        for _, spec in catalog.all_specs(arch):
            found.setdefault(spec, arch)
    by_kernel: dict[str, list[tuple[jit.KernelSpec, str]]] = {}
    for spec, arch in found.items():
        by_kernel.setdefault(spec.source, []).append((spec, arch))
    return by_kernel


@contextmanager
def mutated_sources(mutation: Mutation):
    """salekit compiles the mutated file in here."""
    text, read = source(mutation), jit._read
    try:
        jit._read = lambda name: text if name == mutation.file else read(name)
        jit._headers.cache_clear()
        yield
    finally:
        jit._read = read
        jit._headers.cache_clear()


def check(mutation: Mutation) -> str:
    """The instance whose machine code the mutation changes. Raises ValueError or CompileError."""
    of_kernel = instances()[mutation.kernel]
    for spec, arch in of_kernel[:: max(1, len(of_kernel) // CHECKED_INSTANCES)]:
        before = jit.compile_kernel(spec, arch).cubin
        with mutated_sources(mutation):
            after = jit._compile(spec, arch)[0]
        if after != before:
            return f"{spec.label} for {arch}"
    raise ValueError(f"{mutation.label}: changes the machine code of none of the kernel's instances")


def check_all(mutations: list[Mutation]) -> int:
    wrong = 0
    for mutation in mutations:
        try:
            print(f"{mutation.label:42} changes {check(mutation)}", flush=True)
        except (ValueError, CompileError) as error:
            wrong += 1
            print(f"{mutation.label:42} WRONG: {error}", flush=True)
    print(f"{len(mutations) - wrong} of {len(mutations)} compile and change the code")
    return 1 if wrong else 0


def print_list(mutations: list[Mutation]) -> None:
    for mutation in mutations:
        print(f"{mutation.label:42} {mutation.kind:26} {mutation.words}")
    kernels = Counter(mutation.kernel for mutation in mutations)
    print(f"{len(mutations)} mutations of {len(kernels)} kernels")


# --- the whole ----------------------------------------------------------------------------------------------------
def in_parallel(jobs: int, calls: dict[Any, Callable[[], Any]], done: Callable[[Any, Any], None], deadline: float):
    """Runs the calls, ``jobs`` at once, in their order; none begins after the deadline."""

    def guarded(call):
        return call() if time.monotonic() < deadline else None

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(guarded, call): key for key, call in calls.items()}
        for future in as_completed(futures):
            if future.result() is not None:
                done(futures[future], future.result())


@cache
def machine() -> dict[str, Any]:
    from salekit import timing

    return {"gpu": timing.gpu_info()["name"], "versions": timing.versions(), "commit": timing.git_commit()}


def report(records: dict[str, dict], options: argparse.Namespace, started: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "cuda_src_hash": jit.sources_hash(), **machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "jobs": options.jobs,
        "seconds": round(time.monotonic() - started, 1), "mutations": len(records),
        "caught": sum(record["caught"] for record in records.values()),
        "records": [records[mutation.label] for mutation in MUTATIONS if mutation.label in records],
    }


def run_all(mutations: list[Mutation], records: dict[str, dict], options: argparse.Namespace) -> int:
    """Runs the mutations and adds to ``records``. Returns the exit status."""
    started = time.monotonic()
    deadline = started + options.budget
    folder = Path(tempfile.mkdtemp(prefix="salekit-mutations-"))
    cache_dir = folder / "cache"
    seed_cache(cache_dir)
    unusable: dict[str, Run] = {}

    def controlled(first: str, run: Run) -> None:
        if run.outcome != "passed":
            unusable[first] = run
            print(f"UNMUTATED {run.outcome:16} {first}: {run.test or run.message}", flush=True)

    def control(arguments: list[str], limit: float) -> Run:
        with copy_of_checkout(folder, None) as copy:
            return run_tests(copy, arguments, cache_dir, limit)

    def finished(mutation: Mutation, record: dict) -> None:
        records[mutation.label] = record
        by = record["test"] or record["message"] or ""
        print(f"{record['seconds']:6.1f} s  {record['outcome']:16} {mutation.label:42} {by}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report(records, options, started), indent=2) + "\n")

    try:
        if not options.no_control:  # twice the timeout, for they compile what all share
            firsts = dict.fromkeys(mutation.first for mutation in mutations)
            calls = {x: partial(control, first_arguments(x), 2 * options.timeout) for x in firsts}
            if options.missed:
                calls = {"the whole suite": partial(control, ["tests", "-k", TIMED], SUITE_TIMEOUT)}
            in_parallel(options.jobs, calls, controlled, deadline)
            print(f"{len(calls) - len(unusable)} of {len(calls)} runs of tests pass without a mutation", flush=True)
        if "the whole suite" in unusable:
            return 1
        usable = [mutation for mutation in mutations if mutation.first not in unusable]
        steps = {"with_first": not options.missed, "with_suite": not options.quick}
        in_parallel(
            options.jobs,
            {m: partial(run_mutation, m, folder, cache_dir, options.timeout, **steps) for m in usable},
            finished, deadline,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    caught = [m.label for m in mutations if records.get(m.label, {}).get("caught")]
    for mutation in mutations:
        if mutation.label not in caught:
            why = "its tests fail without it" if mutation.first in unusable else "not run"
            print(f"NOT CAUGHT: {mutation.label}: {records.get(mutation.label, {}).get('outcome', why)}")
    print(f"{len(caught)} of {len(mutations)} caught, {time.monotonic() - started:.0f} s")
    return 0 if len(caught) == len(mutations) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the mutations")
    mode.add_argument("--check", action="store_true", help="compile each of them; needs no GPU")
    mode.add_argument("--quick", action="store_true", help="run the tests about the mutated code alone")
    mode.add_argument("--missed", type=Path, metavar="FILE", help="the whole suite for what FILE has as not caught")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels, or kernel:name; * stands for anything")
    parser.add_argument("--jobs", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)), help="at once")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for the tests about the mutated code")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none begins")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests without a mutation first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, after each mutation")
    options = parser.parse_args()
    if options.missed and options.json is None:
        options.json = options.missed
    return options


def main() -> int:
    options = parse()
    names = options.only or ["*"]
    mutations = [m for m in MUTATIONS if any(fnmatch.fnmatch(x, name) for name in names for x in (m.label, m.kernel))]
    if not mutations:
        print(f"no mutation is called {' or '.join(names)}", file=sys.stderr)
        return 2
    if options.list:
        print_list(mutations)
        return 0
    if options.check:
        return check_all(mutations)
    records = {}
    if options.missed:
        records = {record["mutation"]: record for record in json.loads(options.missed.read_text())["records"]}
        mutations = [m for m in mutations if not records.get(m.label, {}).get("caught")]
    return run_all(mutations, records, options)


if __name__ == "__main__":
    sys.exit(main())
