"""What is printed: tables on terminals that are too narrow for them, progress where there is no bar."""

from __future__ import annotations

import re

import pytest
from salekit.cli import render

COLUMNS = ["kernel", "what is compared", "ms", "shared KiB"]
ROWS = [
    ["attend_sm90<128, BFloat16, 128, false>", "out with float64, same mask, 512 rows a head", "213.348 ±1.2%", "226"],
    ["row_limits<true>", "y with float64", "0.058 ±4.8%", ""],
]


def shown(capsys, monkeypatch, width, **environment) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    render.table("a title", COLUMNS, ROWS)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("width", (120, 100, 80, 65))
def test_a_table_fits_the_terminal_and_its_words_stay_whole(capsys, monkeypatch, width):
    lines = shown(capsys, monkeypatch, width, FORCE_COLOR="1")
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for cell in (*COLUMNS, *ROWS[0], *ROWS[1]):
        assert set(cell.split()) <= set(words), cell


def test_a_table_that_fits_is_not_folded(capsys, monkeypatch):
    wide = shown(capsys, monkeypatch, 200, FORCE_COLOR="1")
    monkeypatch.delenv("FORCE_COLOR")
    assert [line for line in shown(capsys, monkeypatch, 20) if line] == [line for line in wide if line]


def test_words_are_whole_on_the_narrowest_terminal(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, 10, FORCE_COLOR="1")
    assert any("attend_sm90<128," in line for line in lines) and not any("…" in line for line in lines)


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    with render.progress("compiling for sm_80", 40) as advance:
        for _ in range(40):
            now[0] += 3.0
            advance()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[:2] == ["compiling for sm_80: 4 of 40", "compiling for sm_80: 8 of 40"]
    assert len(lines) == 9  # none when all is done


def test_short_work_says_nothing(capsys):
    with render.progress("x", 3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr() == ("", "")
