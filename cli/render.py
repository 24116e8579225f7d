"""All that is printed: results on stdout, notes and progress on stderr. The only file that knows rich."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence, TextIO

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from salekit.errors import escaped

MAX_TABLE_WIDTH = 1000
PROGRESS_SECONDS = 10.0  # between two lines of progress, where there is no bar
SHADES = " .:-=+*#%@"  # lightest to darkest, where there is no colour
_NOTHING, _HALVES = "·", "▀"  # a cell in which no block is set; two rows of a picture
_ASCII = str.maketrans({_NOTHING: "`", "±": "+-"})  # where the encoding has no other
_LETTERS = "abcdefgh"  # of kinds, where there is no colour
_RAMP = ((13, 8, 35), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright


def discard(stream: TextIO) -> None:
    """What is still to be written there goes nowhere: its reader has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Console(Console):
    """Without its reader it goes on, so that the exit code stays the command's; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        discard(self.file)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except BrokenPipeError:  # of a rich without on_broken_pipe
            discard(self.file)

    def shown(self, text: str) -> str:
        """A text as the stream's encoding can show it."""
        return text if self.has(text) else text.translate(_ASCII)

    def has(self, text: str) -> bool:
        """Whether the stream's encoding has these characters."""
        try:
            text.encode(self.encoding)
            return True
        except UnicodeEncodeError:
            return False


def _console(stderr: bool = False) -> _Console:
    return _Console(stderr=stderr, highlight=False, soft_wrap=True)


def _text(text: str, console: _Console) -> Text:
    """Without what moves a terminal's cursor: names of files, and what they hold, may be anybody's."""
    return Text(console.shown(escaped(text, keep="\n")))


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    try:
        sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)


def note(text: str) -> None:
    """A line on stderr."""
    console = _console(stderr=True)
    console.print(_text(text, console))


def text(line: str = "") -> None:
    """A line on stdout."""
    console = _console()
    console.print(_text(line, console))


def legend(names: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> None:
    """A line on stdout for each kind of ``kinds``, with its colour, or its letter."""
    console = _console()
    for letter, name, colour in zip(_LETTERS, names, colours):
        mark = Text(letter) if _is_plain(console) else Text("  ", style="on rgb({},{},{})".format(*colour))
        console.print(Text("  ") + mark + _text(f"  {name}", console))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; cells are shown as ``str`` gives them, never cut.

    On a terminal that is too narrow columns are closer, and cells go on in a next line, at a space.
    """
    console = _console()
    title = escape(console.shown(escaped(title)))
    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(_text(str(cell), console) for cell in row))
    if not console.is_terminal:
        console.width = max(console.width, 400)  # a file or a pipe has no width to fit
    options = console.options.update(max_width=MAX_TABLE_WIDTH)
    if console.is_terminal and console.measure(drawn, options=options).maximum > console.width:
        drawn.padding, drawn.collapse_padding, drawn.show_edge = (0, 1), True, False
        _fold(drawn, console.width - 2 * (len(columns) - 1))
    needed = console.measure(drawn, options=options).maximum
    console.width = max(console.width, needed)  # where words are too wide for it, the terminal wraps lines
    console.print(drawn, crop=False)


def _fold(drawn: Table, room: int) -> None:
    """Makes the widest columns narrower until all fit into ``room``, or each is as wide as its longest word."""
    texts = [[str(column.header), *map(str, column.cells)] for column in drawn.columns]
    least = [max(cell_len(word) for text in of for word in (text.split() or [""])) for of in texts]
    widths = [max(map(cell_len, of)) for of in texts]
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        widths[widest] -= 1
    for column, width in zip(drawn.columns, widths):
        column.width, column.no_wrap = width, False


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress on stderr: a bar, gone when done, where that is a terminal, else a line now and then.

    Yields a function that advances it by one, for any thread.
    """
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, total)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(escape(escaped(label)), total=total)
        yield lambda: bar.advance(task)


def _lines(label: str, total: int) -> Callable[[], None]:
    done, last, lock = 0, time.monotonic(), threading.Lock()

    def advance() -> None:
        nonlocal done, last
        with lock:
            done += 1
            if done < total and time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                note(f"{label}: {done} of {total}")

    return advance


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
    if _is_plain(console):
        nothing = console.shown(_NOTHING)
        for row in values:
            shades = [
                " " if np.isnan(x) else SHADES[max(1, round(x * (len(SHADES) - 1)))] if x > 0 else nothing for x in row
            ]
            console.print(Text("".join(shades)))
        return
    _picture(ramp(values), console)


def kinds(cells: np.ndarray, colours: np.ndarray) -> None:
    """Draw cells of several kinds, as ``legend`` has them: in colour, or a letter a cell without.

    cells: int [rows, columns], 1 + the kind; 0: no block is set, -1: nothing there. colours: uint8 RGB of each.
    """
    console = _console()
    if not _is_plain(console):
        _picture(colours, console)
        return
    letters = np.array([*" ", console.shown(_NOTHING), *_LETTERS])
    for row in letters[cells + 1]:
        console.print(Text("".join(row)))


def _is_plain(console: _Console) -> bool:
    """Whether pictures are shades, not colours."""
    return console.color_system is None or console.no_color or not console.has(_HALVES)


def _picture(colours: np.ndarray, console: _Console) -> None:
    """uint8 RGB [rows, columns, 3], two rows a line."""
    for top in range(0, len(colours), 2):
        line = Text()
        for column in range(colours.shape[1]):
            upper = "rgb({},{},{})".format(*colours[top, column])
            lower = "rgb({},{},{})".format(*colours[top + 1, column]) if top + 1 < len(colours) else "black"
            line.append(_HALVES, style=f"{upper} on {lower}")
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
