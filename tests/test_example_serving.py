"""The example of serving shapes runs, on the twin and where there is a GPU on that, and what it prints holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.gpu
def test_on_a_gpu():
    # The first bits of p differ where the tiles that it is summed over do.
    check(run("--backend", "cuda", "--tokens", "4096", "--chunk", "1024"), 5, 0.01)
