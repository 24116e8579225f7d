"""salekit fuzz: random calls that try to break the library, each checked in float64; failing ones shrunk to files."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from . import backends, options, render
from .main import ExitCode

SCHEMA = 1
CASES = 300
PROGRESS_SECONDS = 5.0


@click.command("fuzz")
@click.option("--cases", type=click.IntRange(1), default=None, help=f"How many cases; {CASES} without --minutes.")
@click.option(
    "--minutes",
    type=options.Finite(0, min_open=True),
    default=None,
    help="A soak of so long, long inputs among them; watches the GPU's memory.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=None, help="Of all that is drawn; printed. Default: random."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 128),
    default=1,
    show_default=True,
    help="Processes, which share the GPU; one core each.",
)
@options.backend
@options.as_json
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False),
    default="fuzz-failures",
    show_default=True,
    help="Folder for failing cases; made when there is one.",
)
@click.pass_context
def fuzz(context: click.Context, **settings: Any) -> None:
    """Make random calls that try to break the library, and check every one.

    Shapes, layouts, strides, options, thresholds and values are drawn from the seed; out, lse and mask are compared
    with float64 attention and with the twin within bounds that follow from roundings (docs/fuzz.md). A failing case
    is made small and written to a file that "salekit validate --input FILE" replays. Exit 5 when one fails,
    2 when it cannot be written. Ctrl-C or SIGTERM ends it with the report of what was checked, exit 130.
    """
    with _terminated_as_interrupted():
        report = run_fuzz(**settings)
    if settings["as_json"]:
        render.print_json(report)
    else:
        print_tables(report)
    if report["interrupted"]:
        context.exit(ExitCode.INTERRUPTED)
    if any(failed["not_written"] for failed in report["failed_cases"]):
        context.exit(ExitCode.USAGE)
    if not report["passed"]:
        context.exit(ExitCode.ACCURACY)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which a time limit sends, is Ctrl-C meanwhile."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_fuzz(
    *,
    cases: int | None,
    minutes: float | None,
    seed: int | None,
    workers: int,
    backend: str,
    output: str,
    **_: Any,
) -> dict[str, Any]:
    """The report as a JSON object. Raises SalekitError children and click.UsageError."""
    from salekit import timing
    from salekit.fuzz.running import run_many

    if cases is not None and minutes is not None:
        raise click.UsageError("--cases and --minutes: wants one of them")
    options.check_folder("-o", output)
    cases = CASES if cases is None and minutes is None else cases
    workers = workers if cases is None else min(workers, cases)
    cuda = backends.use_gpu(backend)
    seed = secrets.randbelow(2**32) if seed is None else seed
    what = f"{cases} cases" if minutes is None else f"{minutes:g} minutes"
    render.note(
        f"fuzz: seed {seed}, {what}, {workers} {'worker' if workers == 1 else 'workers'}; "
        + ("GPU kernels" if cuda else "no GPU in use: the NumPy twin")
    )
    last, latest, is_interrupted = time.monotonic(), None, False

    def progress(report: Any) -> None:
        nonlocal last, latest
        latest = report
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            render.note(f"fuzz: {report.cases} cases, {len(report.failures)} failed, {last - report.started:.0f} s")

    how = dict(on_gpu=cuda, cases=cases, minutes=minutes, workers=workers, folder=output)
    try:
        found = run_many(seed, progress=progress, **how)
    except KeyboardInterrupt:
        if latest is None:
            raise
        found, is_interrupted = latest, True
    memory = memory_verdict(found.live_bytes, found.pass_cases, found.passes)
    return {
        "schema": SCHEMA,
        "kind": "salekit-fuzz",
        "passed": not found.failures and (memory is None or memory["passed"]),
        "interrupted": is_interrupted,
        "seed": seed,
        "backend": "cuda" if cuda else "numpy",
        "workers": workers,
        "minutes": minutes,
        "gpu": timing.gpu_info() if cuda else None,
        "versions": timing.versions(),
        "commit": timing.git_commit(),
        "command": timing.command_line(),
        **found.to_json(),
        "memory": memory,
    }


def memory_verdict(live_bytes: list[int], pass_cases: int, passes: list[int]) -> dict[str, Any] | None:
    """Of a soak: nothing of CuPy's pool may be in use between cases, and the GPU's memory has to be, after the last of
    several passes over the same cases, what it was after the second, when all kernels and plans had been there. An
    interrupted one has no passes."""
    if not live_bytes:
        return None
    return {
        "samples": len(live_bytes),
        "live_bytes": max(live_bytes),
        "cases_of_a_pass": pass_cases,
        "used_after_passes": passes,
        "passed": max(live_bytes) == 0 and (len(passes) < 2 or passes[-1] <= passes[1]),
    }


# --- a case from a file --------------------------------------------------------------------------------------------
def replay(file: str, cuda: bool) -> dict[str, Any]:
    """The fuzzer's checks of a case in a file, as a report of validate. FileFormatError."""
    from salekit import timing
    from salekit.fuzz.cases import load
    from salekit.fuzz.checking import check_case

    case, given, failed = load(file)
    render.note(
        f"validate: {Path(file).name}, a fuzz case ({case.describe()}); "
        + ("GPU kernels" if cuda else "no GPU in use: the NumPy twin")
    )
    if failed:
        render.note(f"validate: it was written because of {failed}")
    started = time.perf_counter()
    outcome = check_case(case, cuda, given)
    return {
        "schema": SCHEMA,
        "kind": "salekit-validate",
        "passed": not outcome.failed,
        "backend": "cuda" if cuda else "numpy",
        "input": Path(file).name,
        "case": case.to_json(),
        "versions": timing.versions(),
        "commit": timing.git_commit(),
        "command": timing.command_line(),
        "gpu": timing.gpu_info() if cuda else None,
        "seconds": round(time.perf_counter() - started, 2),
        "checks": [check.to_json() for check in outcome.checks],
        "heads": [],
    }


def print_replay(report: dict[str, Any]) -> None:
    where = report["gpu"]["name"] if report["gpu"] else "NumPy twin, no GPU in use"
    render.verdicts(f"salekit validate: {where}; {report['input']}, a fuzz case", report["checks"])
    render.note("all verdicts ok" if report["passed"] else "a verdict FAILED")


# --- tables --------------------------------------------------------------------------------------------------------
def print_tables(report: dict[str, Any]) -> None:
    where = report["gpu"]["name"] if report["gpu"] else "NumPy twin, no GPU in use"
    rows = [
        [group if first else "", value, str(counts["cases"]), str(counts["failed"])]
        for group, values in report["groups"].items()
        for first, (value, counts) in zip((True, *(False,) * len(values)), values.items())
    ]
    render.table(
        f"salekit fuzz: {where}; seed {report['seed']}, {report['cases']} cases, {report['pairs']:.2g} pairs of a row "
        f"and a key, {report['seconds']:.0f} s" + (", interrupted" if report["interrupted"] else ""),
        ["drawn", "", "cases", "failed"],
        rows,
    )
    rows = [
        [
            check["stage"],
            check["compared"],
            str(check["cases"]),
            render.number(check["worst_share_of_bound"]),
            render.number(check["error"]),
            render.number(check["bound"]),
            str(check["case"]),
        ]
        for check in report["checks"]
    ]
    render.table(
        "the worst of each check, as a share of its bound",
        ["stage", "what is compared", "cases", "share", "error", "bound", "in case"],
        rows,
    )
    if report["backend"] == "cuda":
        render.text(f"bits other than the twin's that roundings explain: {report['blocks_in_doubt']}")
    if report["memory"]:
        memory = report["memory"]
        used = ", ".join(f"{used / 2**20:.0f}" for used in memory["used_after_passes"])
        passes = f"; after passes over the same {memory['cases_of_a_pass']} cases {used} MiB of the GPU" if used else ""
        render.text(
            f"memory: {memory['live_bytes']} bytes in use between cases ({memory['samples']} times){passes}: "
            f"{'ok' if memory['passed'] else 'FAILED'}"
        )
    for failed in report["failed_cases"]:
        render.text(f"case {failed['case']} FAILED: {failed['drawn']}")
        for check in failed["checks"]:
            error, bound = (render.number(check[name]) for name in ("error", "bound"))
            render.text(f"  {check['stage']}: {check['compared']}: error {error}, bound {bound}")
        if failed["file"]:
            render.text(f"  shrunk: {failed['shrunk']}")
            render.text(f"  salekit validate --input {failed['file']}")
        elif failed["not_written"]:
            render.text(f"  shrunk: {failed['shrunk']}")
            render.text(f"  could not be written: {failed['not_written']}")
        else:
            is_cut = report["interrupted"] and failed["shrunk"] is None
            why = "this was interrupted" if is_cut else "this check failed in enough others"
            render.text(f"  not written, for {why}")
    which = "all cases until it was interrupted" if report["interrupted"] else "all cases"
    render.note(f"{which} ok" if report["passed"] else "a case FAILED" if report["failures"] else "memory FAILED")
