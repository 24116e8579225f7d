"""Option values that several commands share."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from salekit import written_files
from salekit.errors import ArgumentError
from salekit.plans import BLOCKS, ESTIMATORS, SKIPPED

_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_seqlen(text: str, option: str | None = None) -> int:
    """ "4096", "128k" (131072), "1m" (1048576). click.BadParameter otherwise, of the option where it is given."""
    hint = option and f"'{option}'"
    match = re.fullmatch(r"(\d{1,10})([km]?)", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a length; wants e.g. 4096, 32k or 1m", param_hint=hint)
    length = int(match[1]) * _UNITS[match[2]]
    if not 1 <= length <= 2**30:
        raise click.BadParameter(f"{text!r} is out of range; wants 1 to 1024m", param_hint=hint)
    return length


def parse_seqlens(text: str) -> list[int]:
    """ "8k,32k,128k", a --seqlen, as a list of lengths."""
    return [parse_seqlen(part, "--seqlen") for part in text.split(",")]


def seqlen_name(tokens: int) -> str:
    """The shortest text that ``parse_seqlen`` reads as ``tokens``: "128k"."""
    for unit, size in (("m", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


class _Block(click.ParamType):
    name = "QxK"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)x(\d+)", str(value))
        block = (int(match[1]), int(match[2])) if match else None
        if block not in BLOCKS:
            self.fail(f"{value!r} is not a block; wants one of {', '.join(f'{q}x{k}' for q, k in BLOCKS)}", param, ctx)
        return block


class _Tau(click.ParamType):
    name = "TAU"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            tau = float(value)
        except ValueError:
            tau = -1.0
        if not tau >= 0:
            self.fail(f"{value!r} is not a threshold; wants a number >= 0 or inf", param, ctx)
        return tau


class Finite(click.FloatRange):
    """A range without NaN and infinity, which click's lets through."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not finite; wants a number", param, ctx)
        return number


def rounded(tau: float) -> float:
    """tau as calls hold it, in float32: inf beyond it, 0 below."""
    with np.errstate(over="ignore"):
        return float(np.float32(tau))


def given(*names: str) -> list[str]:
    """Those of the running command's parameters that its command line has, as the options are spelt."""
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    spelt = {param.name: param.opts[-1] for param in context.command.params}
    return [spelt[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def refuse(names: tuple[str, ...], why: str) -> None:
    """click.UsageError when the command line has one of these parameters, which would be ignored."""
    found = given(*names)
    if found:
        raise click.UsageError(f"{', '.join(found)}: {why}")


def check_output(option: str, path: str | None, *others: str | None, force: bool) -> None:
    """``written_files.check_output``; a file that exists is overwritten with ``force`` alone. click.UsageError."""
    _refuse_dash(option, path)
    written_files.check_output(option, path, *others)
    if path is not None and Path(path).is_file() and not force:  # a pipe or a device has nothing to lose
        raise click.UsageError(f"{path} exists; --force overwrites it")


def check_folder(option: str, path: str) -> None:
    """``written_files.check_folder``. click.UsageError."""
    _refuse_dash(option, path)
    written_files.check_folder(option, path)


def _refuse_dash(option: str, path: str | None) -> None:
    if path == "-":
        raise click.UsageError(f"{option}: got -, which is not stdout here; wants a name (--json prints on stdout)")


def check_qkv(name: str, *tensors: np.ndarray) -> None:
    """click.UsageError unless q, k and v have elements, which are finite: else there is nothing to measure."""
    q, k, _ = tensors
    if 0 in (*q.shape, *k.shape):
        raise click.UsageError(f"{name}: has shapes {q.shape} and {k.shape}: there is nothing to measure")
    if not all(np.isfinite(row.astype(np.float32)).all() for x in tensors for rows in x for row in rows):
        raise click.UsageError(f"{name}: holds NaN or infinity; wants finite q, k and v")


def make_plan(*tensors: Any, **settings: Any) -> Any:
    """``salekit.make_plan``; where it refuses an option of the command line, click.UsageError names that."""
    from salekit import call_checks

    try:
        return call_checks.make_plan(*tensors, **settings)
    except ArgumentError as error:
        name, _, why = str(error).partition(": ")
        if not given(name):
            raise
        raise click.UsageError(f"{given(name)[0]}: {why}") from None


BLOCK, TAU = _Block(), _Tau()
block = click.option(
    "--block", type=BLOCK, default="128x32", show_default=True, help="Query rows x keys of a mask block."
)
tau = click.option("--tau", type=TAU, default=0.008, show_default=True, help="Threshold of every head.")
estimator = click.option(
    "--estimator",
    type=click.Choice(["auto", *ESTIMATORS]),
    default="auto",
    show_default=True,
    help="How scores are estimated.",
)
attend = click.option(
    "--attend",
    type=click.Choice(["exact", "int8-fp8"]),
    default="exact",
    show_default=True,
    help="How the selected blocks are attended to.",
)
query_stride = click.option(
    "--query-stride",
    type=click.Choice(["1", "2", "4"]),
    default="1",
    show_default=True,
    callback=lambda c, p, v: int(v),
    help="Test every n-th query row.",
)
skipped = click.option(
    "--skipped",
    type=click.Choice(SKIPPED),
    default="drop",
    show_default=True,
    help="Skipped blocks add nothing, or pooled keys and values.",
)
backend = click.option(
    "--backend",
    type=click.Choice(["auto", "numpy", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force = click.option("--force", is_flag=True, help="Overwrite an output that exists.")
output = click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write to this file.")
