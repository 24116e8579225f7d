"""The ``salekit`` command group: finds commands one file each, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any, Iterator

import click

from salekit import __version__
from salekit.errors import CacheWarning, CompileError, GpuError, SalekitError, escaped

COMMANDS = {
    "bench": "Time dense and sparse attention and each stage.",
    "calibrate": "Find each head's threshold for a target, from dumps of q, k and v.",
    "compare": "Compare SALE's masks with other ways to choose blocks, at equal density.",
    "doctor": "Say what this machine can run and what is missing.",
    "export": "Write kernels and a C host side for programs without Python.",
    "fuzz": "Make random calls that try to break the library, and check them in float64.",
    "kernels": "Compile every kernel and show registers, shared memory and spills.",
    "mask-dump": "Draw or save the block mask of q, k and v.",
    "profile": "Time each kernel and compare it with what the GPU can do; predict without one.",
    "validate": "Compare each stage with the twin and the whole with dense attention.",
}


_LINES = "\n\t"  # of a compiler's log


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    NO_GPU = 3
    COMPILE = 4
    ACCURACY = 5
    INTERRUPTED = 130


class _BrokenPipe(Exception):
    """Its cause, a BrokenPipeError, on the way past click, which would end the process with 1."""


@contextmanager
def _past_click() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _BrokenPipe from error


class _Group(click.Group):
    """Imports a command's file when it is asked for, so that ``--help`` is instant."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _past_click():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _past_click():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = name.replace("-", "_")
        return getattr(importlib.import_module(f"salekit.cli.{module}"), module)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="salekit")
def cli() -> None:
    """SALE sparse attention for long-context prefill: kernels, measurements and masks.

    Exit codes: 0 fine, 1 failed, 2 usage, 3 no or unsupported GPU, 4 compile error, 5 accuracy failed,
    130 interrupted.
    """


def exit_code_of(error: SalekitError) -> ExitCode:
    if isinstance(error, GpuError):
        return ExitCode.NO_GPU
    if isinstance(error, CompileError):
        return ExitCode.COMPILE
    return ExitCode.FAILED


def _show_warnings() -> None:
    """Those that salekit itself gives, as one line without a place in the code."""
    show = warnings.showwarning

    def show_briefly(message, category, *place) -> None:
        if issubclass(category, CacheWarning):
            _say(f"salekit: warning: {message}")
        else:
            show(message, category, *place)

    warnings.showwarning = show_briefly


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    try:
        _prepare_streams()
        _show_warnings()
        code = _run(arguments)
        code = _flush_streams(code if isinstance(code, int) else ExitCode.OK)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    sys.exit(int(code))


def _run(arguments: list[str] | None) -> int | None:
    """The exit code, or whatever a command returns."""
    try:
        return cli.main(args=arguments, prog_name="salekit", standalone_mode=False)
    except click.exceptions.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.message = escaped(error.message, keep="\n")
        with suppress(BrokenPipeError):
            error.show()
        return error.exit_code
    except SalekitError as error:
        _say(f"salekit: error: {escaped(str(error), keep=_LINES)}")
        return exit_code_of(error)
    except _BrokenPipe as error:
        return _failed(error.__cause__)
    except (OSError, MemoryError) as error:
        return _failed(error)


def _failed(error: OSError | MemoryError) -> ExitCode:
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return ExitCode.OK  # of stdout: the reader has what it wanted
    _say(f"salekit: error: {escaped(str(error)) or 'out of memory'}")
    return ExitCode.FAILED


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        click.echo(text, err=True)


# --- streams -------------------------------------------------------------------------------------------------------
def _prepare_streams() -> None:
    """Those that were closed lead nowhere, and what the encoding does not have is shown as Python writes it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        if mode == "w" and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _flush_streams(code: int) -> int:
    """The exit code after all is said; the interpreter has nothing left to flush, and to fail at."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            from .render import discard

            discard(stream)
            code = code or _failed(error)
    return code
