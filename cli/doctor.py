"""salekit doctor: what this machine can run, and exactly what to install when something is missing."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import click

from salekit import __version__

from . import options, render

GPU_SUITE = Path(__file__).resolve().parent.parent / "bench" / "results" / "gpu-suite.json"


@click.command("doctor")
@options.as_json
def doctor(as_json: bool) -> None:
    """Driver, GPU, CuPy, NVRTC, cache, and which kernels will be used and why."""
    findings = examine()
    if as_json:
        render.print_json({"schema": 1, "kind": "salekit-doctor", **findings})
        return
    render.table(
        "", ["what", "found"], [[key.replace("_", " "), value] for key, value in findings.items() if key != "advice"]
    )
    for line in findings["advice"]:
        render.text(line)


def examine() -> dict:
    """Everything that ``salekit doctor`` says; never raises."""
    advice: list[str] = []
    found: dict = {"salekit": __version__, "python": platform.python_version(), "numpy": _version("numpy")}
    found["driver"] = _driver(advice)
    found["cupy"] = _cupy(advice)
    found["nvrtc"] = _nvrtc(advice) if found["cupy"] else None
    found["gpu"], arch = _gpu(advice, found["driver"]) if found["cupy"] else (None, None)
    found["cache"] = _cache(advice)
    found["estimate"], found["attend"] = _kernels(arch)
    found["gpu_suite"] = gpu_suite_state()
    if arch is None:
        advice.append("Without a GPU everything runs on the NumPy twin: the same API and masks, small sizes.")
    found["advice"] = advice
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver(advice: list[str]) -> str | None:
    from salekit import jit

    try:
        import ctypes

        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        version = ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(version))
        return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    except OSError:
        advice.append(f"No NVIDIA driver was found; for a GPU {jit.DRIVER_HINT}.")
        return None


def _cupy(advice: list[str]) -> str | None:
    try:
        import cupy

        return cupy.__version__
    except Exception as error:
        advice.append(
            f'CuPy cannot be imported ({type(error).__name__}); for a GPU: pip install "salekit[cuda12]" '
            '(or "salekit[cuda13]" with a CUDA 13 driver)'
        )
        return None


def _nvrtc(advice: list[str]) -> str | None:
    from salekit import jit
    from salekit.errors import SalekitError

    try:
        version = ".".join(map(str, jit.nvrtc_version()))
        jit.check_compiler()
        return version
    except SalekitError as error:
        advice.append(str(error))
        return None


def _gpu(advice: list[str], driver: str | None) -> tuple[str | None, str | None]:
    from salekit import jit
    from salekit.errors import SalekitError

    try:
        arch = jit.device_arch()
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        name = properties["name"].decode()
        return (
            f"{name}, {properties['multiProcessorCount']} SMs, {properties['totalGlobalMem'] / 2**30:.0f} GiB, {arch}",
            arch,
        )
    except SalekitError as error:
        if driver is not None:  # else that is why, and is said
            advice.append(str(error))
        return None, None


def _cache(advice: list[str]) -> str:
    """The folder, what is in it, and why it is not used or not added to."""
    from salekit import jit
    from salekit.errors import ArgumentError
    from salekit.private_files import why_not_private
    from salekit.written_files import why_not_made

    try:
        jit.cache_bound()
    except ArgumentError as error:
        advice.append(f"{error}; until then nothing can be compiled")
    folder = jit.cache_dir()
    if folder is None:
        return jit.NO_CACHE_DIR
    if problem := why_not_private(folder):
        return f"{folder}: NOT USED, for {problem}"
    try:
        files = [path.stat().st_size for path in folder.iterdir()]
        held = f"{len(files)} files, {sum(files) / 2**20:.1f} MiB"
    except FileNotFoundError:
        held = "empty"
    except OSError as error:
        return f"{folder}: CANNOT BE READ: {error.strerror}"
    problem = why_not_made(folder)
    return f"{folder} ({held})" + (f": CANNOT BE WRITTEN: {problem}" if problem else "")


def _kernels(arch: str | None) -> tuple[str, str]:
    from salekit.plans import resolve_estimator

    if arch is None:
        return "NumPy twin (no GPU)", "NumPy twin (no GPU)"
    auto = resolve_estimator("auto", arch)
    if arch == "sm_90a":
        return (
            f"{auto}: estimate_int8_sm90 (wgmma s8, 2:4 sparse for int8-sp24); int4 runs in bytes, estimate_int4_sm90",
            "attend_sm90 (wgmma)",
        )
    why = "native s4 tensor cores" if auto == "int4" else "s8 tensor cores; s4 is only emulated here"
    return f"{auto}: estimate_sm80 ({why})", "attend_sm80 (mma.sync)"


def gpu_suite_state() -> str:
    """Whether the recorded run of the GPU tests is of today's kernels."""
    from salekit import jit

    try:
        record = json.loads(GPU_SUITE.read_text())
    except OSError:
        return "no record here (it is kept in a checkout, in bench/results)"
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return "the record in bench/results is damaged"
    state = (
        "of these kernels"
        if record.get("cuda_src_hash") == jit.sources_hash()
        else "STALE: the kernels have changed since"
    )
    return f"{record.get('passed')} passed on {record.get('gpu')}, {record.get('date')}, {state}"
