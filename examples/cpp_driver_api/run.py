"""Exports kernels, builds the C++ program that an export holds, runs it, and compares its bits with Python's.

    python examples/cpp_driver_api/run.py

on the built-in sample; needs a GPU, a C++ compiler and cuda.h. The program links with the CUDA driver alone. Exit code
0 when out, lse and mask are equal to salekit.sparse_attention's to the last bit in every case, 1 when not, 3 without a
GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import salekit
from salekit import export, jit

MAGIC = int.from_bytes(b"SALE", "little")
CASES = {  # options of the program, and the same for Python
    "int8": {"estimator": "int8"},
    "int4": {"estimator": "int4"},
    "int8-sp24, every 2nd row": {"estimator": "int8-sp24", "query_stride": 2},
    "blocks of 64x64, chunk": {"block": (64, 64), "chunk": 1000},
    "thresholds in an array": {"thresholds": [0.004, 0.016]},
    "not causal": {"causal": False},
    "dense": {"dense_below": 8192},
}


def write_input(path: Path, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """q, k, v: NumPy bshd arrays. The format is told in the program's head."""
    batch, seqlen_q, num_heads, head_dim = q.shape
    sizes = (MAGIC, 1, batch, seqlen_q, k.shape[1], num_heads, k.shape[2], head_dim)
    parts = [np.array(sizes, "<i4"), *(np.ascontiguousarray(x) for x in (q, k, v))]
    path.write_bytes(b"".join(part.tobytes() for part in parts))


def program_options(thresholds=0.008, block=(128, 32), causal=True, **options) -> list[str]:
    """The program's options for those of ``salekit.sparse_attention``."""
    # As text that both languages round to the same float32.
    taus = ",".join(str(float(np.float32(tau))) for tau in np.atleast_1d(thresholds))
    words = ["--tau" if np.ndim(thresholds) == 0 else "--taus", taus]
    words += ["--block", "x".join(map(str, block)), *([] if causal else ["--non-causal"])]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# --- building ------------------------------------------------------------------------------------------------------
def find_include() -> Path | None:
    """The folder of cuda.h: of the toolkit, or of NVIDIA's wheels."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    folders = [Path(root) / "include" for root in (*roots, "/usr/local/cuda", "/usr") if root]
    folders += [path for entry in sys.path for path in sorted(Path(entry or ".").glob("nvidia/*/include"))]
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def find_driver() -> str:
    """The path of libcuda. OSError without one."""
    ctypes.CDLL("libcuda.so.1")
    with open("/proc/self/maps") as maps:
        return next(line.split(maxsplit=5)[5].strip() for line in maps if "/libcuda.so" in line)


def build(folder: Path, target: Path, include: Path, driver: list) -> Path:
    """Compile an export's program by hand. driver: what to compile or link with as libcuda."""
    target.mkdir(parents=True, exist_ok=True)
    paths = (f"-I{include}", f"-I{folder}")
    program, objects = target / "salekit_example", []
    commands = []
    for source in sorted(folder.glob("*.c")):
        objects.append(target / f"{source.stem}.o")
        commands.append(("cc", "-std=c11", "-O2", *paths, "-c", source, "-o", objects[-1]))
    commands.append(("c++", "-std=c++17", "-O2", *paths, folder / "main.cpp", *objects, *driver, "-o", program))
    for command in commands:
        subprocess.run([str(word) for word in command], check=True)
    return program


def build_with_cmake(folder: Path, target: Path, driver: str) -> Path:
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["cmake", "-S", str(folder), "-B", str(target), f"-DSALEKIT_DRIVER={driver}"], **quiet)
    subprocess.run(["cmake", "--build", str(target)], **quiet)
    return target / "salekit_example"


# --- running -------------------------------------------------------------------------------------------------------
def run_program(program: Path, folder: Path, given: Path, words: list[str]) -> tuple[tuple[bytes, bytes, bytes], str]:
    """((out, lse, mask), what it printed). RuntimeError with its message when it fails."""
    result = given.with_suffix("")
    command = [str(word) for word in (program, folder, given, result, *words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{program} ended with {done.returncode}")
    parts = tuple(Path(f"{result}.{name}.bin").read_bytes() for name in ("out", "lse", "mask"))
    return parts, done.stdout


def run_python(q: np.ndarray, k: np.ndarray, v: np.ndarray, options: dict) -> tuple[bytes, bytes, bytes]:
    """The bits of out, lse and mask on the GPU."""
    import cupy

    arrays = [cupy.asarray(x) for x in (q, k, v)]
    out, lse, mask = salekit.sparse_attention(*arrays, **options, return_lse=True, return_mask=True)
    return tuple(x.get().tobytes() for x in (out, lse, mask.words))


def differing(got: tuple, want: tuple) -> list[str]:
    return [name for name, a, b in zip(("out", "lse", "mask"), got, want) if a != b]


def run(arguments: argparse.Namespace, arch: str, driver: str) -> int:
    include = find_include()
    if include is None or not (shutil.which("cc") and shutil.which("c++")):
        raise RuntimeError("cuda.h, cc and c++ are needed; install the CUDA toolkit and a compiler")
    if arguments.input:
        q, k, v, _ = salekit.load_qkv(arguments.input)
    else:
        q, k, v = (salekit.load_sample()[name] for name in "qkv")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "export"
        report = export.export(folder, export.Target(arch, q.shape[3], q.dtype.name))
        print(f"exported {len(report['kernels'])} kernels for {arch}, head_dim {q.shape[3]}, {q.dtype.name}")
        if shutil.which("cmake"):
            program = build_with_cmake(folder, folder / "build", driver)
        else:
            program = build(folder, folder / "build", include, [driver])
        failed = 0
        for name, options in CASES.items():
            options = {"dense_below": 0, **options}
            rows = q[:, -options.pop("chunk", q.shape[1]) :]
            if name == "thresholds in an array":
                options["thresholds"] = (options["thresholds"] * rows.shape[2])[: rows.shape[2]]
            given = Path(temporary) / "input.bin"
            write_input(given, rows, k, v)
            words = [*program_options(**options), "--repeat", str(arguments.repeat)]
            got, text = run_program(program, folder, given, words)
            bad = differing(got, run_python(rows, k, v, options))
            failed += bool(bad)
            verdict = f"differs from Python in {', '.join(bad)}" if bad else "the bits of Python"
            print(f"{name}: {verdict}; {text.strip()}")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", help="a file with q, k and v (.safetensors or .npz); default: the built-in sample")
    parser.add_argument("--keep", type=Path, help="export and build into this new folder, and keep it")
    parser.add_argument("--repeat", type=int, default=20, help="calls that are timed; the least is printed")
    arguments = parser.parse_args()
    try:
        return run(arguments, jit.device_arch(), find_driver())
    except (salekit.GpuError, OSError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 3
    except (salekit.SalekitError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
