"""What has to travel in a wheel is named by pyproject.toml, and is found without the checkout's help."""

import subprocess
import sys
from pathlib import Path

import pytest

import salekit
from salekit import jit

ROOT = Path(__file__).resolve().parent.parent


def test_every_data_file_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"][package]
        packaged = {path for pattern in patterns for path in folder.glob(pattern)}
        kinds = (".c", ".cpp", ".cu", ".cuh", ".h", ".html", ".safetensors", ".txt", ".typed")
        files = {path for path in folder.rglob("*") if path.suffix in kinds}
        assert files and files == packaged
    assert set(settings["packages"]) == set(settings["package-dir"])


def test_version_is_the_projects():
    tomllib = pytest.importorskip("tomllib")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == salekit.__version__


def test_sources_and_sample_are_found():
    assert (jit.source_root() / "kernels" / "attend_sm80.cu").exists()
    assert salekit.load_sample()["q"].shape == (1, 4096, 2, 128)


def test_import_does_not_import_cupy_or_click():
    code = "import sys, salekit; print(sorted({'cupy', 'click', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_no_torch_in_the_package():
    for folder in ("salekit", "cli", "cuda_src", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text().splitlines()
            assert not [line for line in lines if line.strip().startswith(("import torch", "from torch"))], path
