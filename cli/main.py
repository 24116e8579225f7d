"""The ``salekit`` command group: finds commands one file each, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from enum import IntEnum

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


class _Group(click.Group):
    """Imports a command's file when it is asked for, so that ``--help`` is instant."""

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
            click.echo(f"salekit: warning: {message}", err=True)
        else:
            show(message, category, *place)

    warnings.showwarning = show_briefly


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    _show_warnings()
    try:
        code = cli.main(args=arguments, prog_name="salekit", standalone_mode=False)
    except click.exceptions.Abort:
        code = ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.message = escaped(error.message, keep="\n")
        error.show()
        code = error.exit_code
    except SalekitError as error:
        click.echo(f"salekit: error: {escaped(str(error), keep=_LINES)}", err=True)
        code = exit_code_of(error)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader has gone: nothing is left to say, and the interpreter must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.OK
    except (OSError, MemoryError) as error:
        click.echo(f"salekit: error: {escaped(str(error)) or 'out of memory'}", err=True)
        code = ExitCode.FAILED
    sys.exit(int(code) if isinstance(code, int) else 0)
