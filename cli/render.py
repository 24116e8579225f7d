"""All that is printed: results on stdout, notes and progress on stderr. The only file that knows rich."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from salekit.errors import escaped

MAX_TABLE_WIDTH = 1000
SHADES = " .:-=+*#%@"  # lightest to darkest, where there is no colour
_RAMP = ((13, 8, 35), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _text(text: str) -> Text:
    """Without what moves a terminal's cursor: names of files, and what they hold, may be anybody's."""
    return Text(escaped(text, keep="\n"))


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line on stderr."""
    _console(stderr=True).print(_text(text))


def text(line: str = "") -> None:
    """A line on stdout."""
    _console().print(_text(line))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; cells are shown as ``str`` gives them, never cut."""
    console = _console()
    drawn = Table(title=escape(escaped(title)) or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(_text(str(cell)) for cell in row))
    if not console.is_terminal:
        console.width = max(console.width, 400)  # a file or a pipe has no width to fit
    needed = console.measure(drawn, options=console.options.update(max_width=MAX_TABLE_WIDTH)).maximum
    console.width = max(console.width, needed)  # a narrow terminal wraps lines; cells stay whole
    console.print(drawn, crop=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, gone when done, where that is a terminal; yields a function that advances it by one."""
    console = _console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(escaped(label)), total=total)
        yield lambda: bar.advance(task)


def ramp(values: np.ndarray) -> np.ndarray:
    """uint8 RGB of values in [0, 1]; NaN is black."""
    stops = np.array(_RAMP, float)
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(stops) - 1)
    low = np.minimum(position.astype(int), len(stops) - 2)
    fraction = (position - low)[..., None]
    colours = (stops[low] * (1 - fraction) + stops[low + 1] * fraction).astype(np.uint8)
    colours[np.isnan(values)] = 0
    return colours


def heat_map(values: np.ndarray) -> None:
    """Draw values in [0, 1] (NaN: nothing there): two rows a line in colour, or one shade a cell without."""
    console = _console()
    if console.color_system is None or console.no_color:
        for row in values:
            shades = [
                " " if np.isnan(x) else SHADES[max(1, round(x * (len(SHADES) - 1)))] if x > 0 else "·" for x in row
            ]
            console.print(Text("".join(shades)))
        return
    picture(ramp(values))


def picture(colours: np.ndarray) -> None:
    """Draw uint8 RGB [rows, columns, 3], two rows a line; without colour, a shade a cell by its brightness."""
    console = _console()
    if console.color_system is None or console.no_color:
        for row in colours.max(axis=2) / 255:
            console.print(Text("".join(SHADES[round(x * (len(SHADES) - 1))] for x in row)))
        return
    for top in range(0, len(colours), 2):
        line = Text()
        for column in range(colours.shape[1]):
            upper = "rgb({},{},{})".format(*colours[top, column])
            lower = "rgb({},{},{})".format(*colours[top + 1, column]) if top + 1 < len(colours) else "black"
            line.append("▀", style=f"{upper} on {lower}")
        console.print(line)


def terminal_width() -> int:
    """Columns to draw in."""
    return _console().width


def verdicts(title: str, checks: list[dict[str, Any]]) -> None:
    """A table of checks as ``Check.to_json`` gives them."""
    rows = [
        [
            check["stage"],
            check["compared"],
            number(check["error"]),
            number(check["bound"]),
            "ok" if check["passed"] else "FAILED",
        ]
        for check in checks
    ]
    table(title, ["stage", "what is compared", "error", "bound", "verdict"], rows)


def number(x: float | None) -> str:
    if x is None:
        return "not finite"
    return "0" if x == 0 else f"{x:.3g}"
