"""The example of serving shapes runs, on the twin and where there is a GPU on that, and what it prints holds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import salekit

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "serving_shapes" / "serving_shapes.py"


def run(*options: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(text: str, steps: int, chunks_differ: float) -> None:
    assert len(re.findall(r"^  step \d+: rows \[\d+, \d+\], keys \[\d+, \d+\], [\d.]+ ms", text, re.M)) == steps
    errors = re.findall(r"one call ([\d.]+), chunks ([\d.]+)", text)
    assert len(errors) == 2 and all(float(x) <= 0.05 for pair in errors for x in pair)
    differences = [float(x) for x in re.findall(r"same statistics, differ by (\S+)", text)]
    assert len(differences) == 2 and all(x <= chunks_differ for x in differences)
    (merged,) = re.findall(r"merged halves differ from dense attention by (\S+)", text)
    assert 0 < float(merged) <= 2.0**-7  # the output is rounded to bfloat16 twice more


def test_on_the_twin():
    check(run("--tokens", "400", "--chunk", "256", "--page-size", "32"), 2, 0.0)


def test_chunks_that_do_not_line_up():
    check(run("--tokens", "300", "--chunk", "100", "--page-size", "16"), 4, 0.05)


def test_the_shortest_sequences_and_chunks():
    assert "keys [2, 2]" in run("--tokens", "2", "--chunk", "1")
    assert "keys [1, 1]" in run("--tokens", "1")


def refused(capsys, monkeypatch, *options: str) -> tuple[int, str]:
    """(exit code, the last line of stderr), in this process and before any work."""
    names = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.setattr(salekit, "load_sample", None)
    try:
        code = names["main"]()
    except SystemExit as done:
        code = done.code
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "option, value, wants",
    (
        *(("--tokens", value, "a number from 1 to 4096") for value in ("0", "-1", "4097", "many")),
        ("--chunk", "0", "a number from 1 on"),
    ),
)
def test_sizes_that_make_no_sense(capsys, monkeypatch, option, value, wants):
    code, said = refused(capsys, monkeypatch, option, value)
    assert code == 2 and said == f"serving_shapes.py: error: argument {option}: got '{value}'; wants {wants}"


def test_pages_that_there_are_not(capsys, monkeypatch):
    code, said = refused(capsys, monkeypatch, "--page-size", "17")
    assert code == 2 and "--page-size: invalid choice: " in said


def test_without_a_gpu(capsys, monkeypatch):
    def no_gpu():
        raise salekit.GpuError("no usable GPU (a test)")

    monkeypatch.setattr("salekit.jit.device_arch", no_gpu)
    code, said = refused(capsys, monkeypatch, "--backend", "cuda")
    assert (code, said) == (3, "serving_shapes.py: error: no usable GPU (a test)")


@pytest.mark.gpu
def test_on_a_gpu():
    # The first bits of p differ where the tiles that it is summed over do.
    check(run("--backend", "cuda", "--tokens", "4096", "--chunk", "1024"), 5, 0.01)
