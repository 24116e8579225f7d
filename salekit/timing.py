"""Timing: CUDA events around a call, L2 flushed before each sample, a stop rule, and the machine it was measured on."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

MIN_FLUSH_BYTES = 256 * 2**20  # past any L2, and long enough (some 0.1 ms) to hide the launch of what follows
SPREAD_GOAL = 0.01  # stop sampling once the middle half of the samples lies within this share of the median

# Dense tensor rates of the data sheets, in 1e12 operations a second, at boost clock: (int4, int8, 16-bit with float32
# accumulation). None: the instruction is emulated. The first name that the GPU's name contains counts.
CHIP_RATES = (
    ("H100 PCIe", (None, 1513.0, 756.0)),
    ("H100 NVL", (None, 1671.0, 835.0)),
    ("H100", (None, 1979.0, 989.0)),
    ("H200", (None, 1979.0, 989.0)),
    ("GH200", (None, 1979.0, 989.0)),
    ("A100", (1248.0, 624.0, 312.0)),
    ("RTX 4090", (1321.2, 660.6, 165.2)),
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call. spread: interquartile range over the median (0 with a single sample)."""

    median_ms: float
    min_ms: float
    max_ms: float
    spread: float
    samples: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> "Timing":
        median = statistics.median(samples_ms)
        return cls(median, min(samples_ms), max(samples_ms), _spread(samples_ms), len(samples_ms))

    def as_json(self) -> dict[str, Any]:
        return {name: round(getattr(self, name), 5) for name in ("median_ms", "min_ms", "max_ms", "spread")} | {
            "samples": self.samples
        }


def _spread(samples: list[float]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    median = statistics.median(samples)
    return (high - low) / median if median > 0 else 0.0


def time_call(
    function: Callable[[], Any],
    *,
    cuda: bool,
    warmup: int = 2,
    min_samples: int = 5,
    max_samples: int = 50,
    max_seconds: float = 2.0,
) -> Timing:
    """Median time of ``function``.

    cuda: time on CuPy's current stream with events, the L2 flushed before each sample; else on the host's clock.
    Sampling stops once SPREAD_GOAL is met after ``min_samples``, at ``max_samples``, or when ``max_seconds`` are spent
    (then with at least two samples, one on the host's clock). Warm-up calls compile, allocate and raise the clocks.
    """
    sample = _gpu_sample(function) if cuda else _host_sample(function)
    started = time.perf_counter()
    first = sample()
    for _ in range(warmup - 1):
        if time.perf_counter() - started > max_seconds / 2:
            break
        sample()
    least = 2 if cuda else 1
    if not cuda and first / 1e3 > max_seconds / 2:
        return Timing.of([first])
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < max_samples:
        samples.append(sample())
        if len(samples) >= min_samples and _spread(samples) <= SPREAD_GOAL:
            break
        if len(samples) >= least and time.perf_counter() - started > max_seconds:
            break
    return Timing.of(samples)


def _host_sample(function: Callable[[], Any]) -> Callable[[], float]:
    def sample() -> float:
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e3

    return sample


def _gpu_sample(function: Callable[[], Any]) -> Callable[[], float]:
    import cupy

    flush = l2_flush()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()

    def sample() -> float:
        flush()
        start.record()
        result = function()  # kept until the end, so that freeing it is not timed
        end.record()
        end.synchronize()
        del result
        return cupy.cuda.get_elapsed_time(start, end)

    return sample


def l2_flush() -> Callable[[], None]:
    """A function that queues a memset of a buffer larger than the L2 on CuPy's current stream."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    num_bytes = max(MIN_FLUSH_BYTES, 2 * int(properties.get("l2CacheSize", 0)))
    buffer = cupy.empty(num_bytes, "u1")

    def flush() -> None:
        buffer.data.memset_async(0, num_bytes, cupy.cuda.get_current_stream())

    return flush


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a device-to-device memcpy of up to 1 GiB."""
    import cupy

    free, _ = cupy.cuda.runtime.memGetInfo()
    num_bytes = min(2**30, max(2**20, free // 8))
    source, target = cupy.empty(num_bytes, "u1"), cupy.empty(num_bytes, "u1")
    stream = cupy.cuda.get_current_stream()
    source.data.memset_async(0x5A, num_bytes, stream)
    timing = time_call(
        lambda: target.data.copy_from_device_async(source.data, num_bytes, cupy.cuda.get_current_stream()), cuda=True
    )
    return 2 * num_bytes / (timing.median_ms * 1e-3)


def chip_rates(name: str) -> dict[str, float | None]:
    """Data-sheet rates {"int4", "int8", "half"} in 1e12 operations a second; None where unknown or emulated."""
    for part, rates in CHIP_RATES:
        if part in name:
            return dict(zip(("int4", "int8", "half"), rates))
    return {"int4": None, "int8": None, "half": None}


# --- the machine ---------------------------------------------------------------------------------------------------
_STATIC = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
_LIVE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _query(fields: tuple[str, ...], bus_id: str, *extra: str) -> list[str] | None:
    """nvidia-smi's command line for these fields of one GPU, or None where it is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    return [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", bus_id, *extra]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def gpu_info() -> dict[str, Any]:
    """Name, capability, memory and SMs from the runtime; driver, maximum clocks (MHz) and power limit (W) from
    nvidia-smi, null where that is missing."""
    import cupy

    runtime = cupy.cuda.runtime
    device = runtime.getDevice()
    properties = runtime.getDeviceProperties(device)
    info: dict[str, Any] = {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "sms": properties["multiProcessorCount"],
        "memory_bytes": int(properties["totalGlobalMem"]),
        "l2_bytes": int(properties.get("l2CacheSize", 0)),
        "driver_cuda": runtime.driverGetVersion(),
        "driver": None,
        "max_sm_mhz": None,
        "max_memory_mhz": None,
        "power_limit_w": None,
    }
    command = _query(_STATIC, runtime.deviceGetPCIBusId(device))
    if command:
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            driver, *numbers = (part.strip() for part in text.strip().splitlines()[0].split(","))
            info["driver"] = driver
            info.update(zip(("max_sm_mhz", "max_memory_mhz", "power_limit_w"), map(_number, numbers)))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass
    return info


class ClockSampler:
    """Context manager: nvidia-smi prints clocks, power and temperature every 0.2 s while the body runs.

    ``result`` afterwards: medians {sm_mhz, memory_mhz, power_w, temperature_c, samples}; nulls without nvidia-smi.
    """

    def __enter__(self) -> "ClockSampler":
        import cupy

        runtime = cupy.cuda.runtime
        command = _query(_LIVE, runtime.deviceGetPCIBusId(runtime.getDevice()), "-lms", "200")
        self._process: subprocess.Popen[str] | None = None
        if command:
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                pass
        return self

    def __exit__(self, *_: Any) -> None:
        rows: list[list[float | None]] = []
        if self._process is not None:
            self._process.terminate()
            try:
                text, _stderr = self._process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                text, _stderr = self._process.communicate()
            rows = [[_number(part) for part in line.split(",")] for line in text.splitlines()]
            # The first line falls before the load, the last may be cut.
            rows = [row for row in rows[1:] if len(row) == len(_LIVE)] or [
                row for row in rows if len(row) == len(_LIVE)
            ]
        names = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
        self.result: dict[str, Any] = {}
        for index, name in enumerate(names):
            values = [x for x in (row[index] for row in rows) if x is not None]
            self.result[name] = round(statistics.median(values), 1) if values else None
        self.result["samples"] = len(rows)


def versions() -> dict[str, str | None]:
    """Versions of salekit, Python, NumPy and, where they can be imported, CuPy and NVRTC."""
    import numpy

    from . import __version__

    found: dict[str, str | None] = {
        "salekit": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "cupy": None,
        "nvrtc": None,
    }
    try:
        import cupy

        found["cupy"] = cupy.__version__
        found["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception:  # a missing package, a missing library and a broken one all differ
        pass
    return found


def git_commit() -> str | None:
    """Commit of the checkout that salekit runs from, with "-dirty" when files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def command_line() -> str:
    """The command that runs, program by its file name alone."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
