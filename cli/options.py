"""Option values that several commands share."""

from __future__ import annotations

import re
from typing import Any

import click

from salekit.plans import BLOCKS, ESTIMATORS, SKIPPED

_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_seqlen(text: str) -> int:
    """ "4096", "128k" (131072), "1m" (1048576). click.BadParameter otherwise."""
    match = re.fullmatch(r"(\d{1,10})([km]?)", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a length; wants e.g. 4096, 32k or 1m")
    length = int(match[1]) * _UNITS[match[2]]
    if not 1 <= length <= 2**30:
        raise click.BadParameter(f"{text!r} is out of range; wants 1 to 1024m")
    return length


def parse_seqlens(text: str) -> list[int]:
    """ "8k,32k,128k" as a list of lengths."""
    return [parse_seqlen(part) for part in text.split(",")]


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
output = click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write to this file.")
