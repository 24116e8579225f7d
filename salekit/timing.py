"""Timing: CUDA events around a call, L2 flushed before each sample, a stop rule, and the machine it was measured on."""

from __future__ import annotations

import math
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Hashable, Mapping

MIN_FLUSH_BYTES = 256 * 2**20  # past any L2
LEAD_MS = 2.0  # how long flushing keeps the GPU busy, so that the host has launched what is timed before it starts
SPREAD_GOAL = 0.01  # stop sampling once the middle half of the samples lies within this share of the median
SLOW_CALL_MS = 2000.0  # the first call of a candidate that takes longer is a sample, too: warming up is lost in it

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


@dataclass(frozen=True)
class Sample:
    """One timed call: the GPU's milliseconds, the host's until the call returned, and when it began and ended, by
    ``time.time()``."""

    ms: float
    host_ms: float
    start: float
    end: float


@dataclass
class Candidate:
    """One of several functions that are timed in turn: its samples, and what it raised, if it did."""

    name: Hashable
    call: Callable[[], Any]
    samples: list[Sample] = field(default_factory=list)
    error: Exception | None = None
    last_ms: float = 0.0  # of the warm-up, before there are samples


def time_in_turn(
    functions: Mapping[Hashable, Callable[[], Any]],
    *,
    check: Callable[[Hashable, Any], None] = lambda name, result: None,
    min_rounds: int = 5,
    max_rounds: int = 30,
    max_seconds: float = 10.0,
    slow_rounds: int = 2,
    sampler: Callable[[Callable[[], Any]], tuple[Sample, Any]] | None = None,
) -> dict[Hashable, Candidate]:
    """Time several functions on the GPU in rounds, so that all of them see the same clocks, power and temperature.

    A round calls each function once, L2 flushed before, beginning with another one each time, and every other round
    backwards, so that no function always follows the same one. First every function is called once to compile and to
    warm up, and ``check(name, result)`` may raise to refuse its result; one that raises has ``error`` set and is left
    out. A first call over SLOW_CALL_MS counts as a sample.
    Rounds end when every spread meets SPREAD_GOAL after ``min_rounds``, at ``max_rounds``, or when ``max_seconds`` are
    spent; all take part in ``slow_rounds`` at least, and a function that takes a tenth of ``max_seconds`` a call in no
    more than that.
    sampler: runs a call and returns (Sample, result); the GPU's events by default.
    """
    take = sampler or event_sampler()
    candidates = {name: Candidate(name, call) for name, call in functions.items()}
    for candidate in candidates.values():
        _first_call(candidate, take, check)
    active = [candidate for candidate in candidates.values() if candidate.error is None]
    slow_ms = max_seconds * 1e3 / 10
    started = time.perf_counter()
    for round_index in range(max_rounds):
        late = time.perf_counter() - started > max_seconds
        if round_index >= slow_rounds and late:
            break
        if round_index >= min_rounds and all(_spread([x.ms for x in c.samples]) <= SPREAD_GOAL for c in active):
            break
        for candidate in rotated(active, round_index):
            is_due = candidate.last_ms < slow_ms or len(candidate.samples) < slow_rounds
            if candidate.error is None and is_due:
                _sample(candidate, take)
    return candidates


def rotated(items: list, turn: int) -> list:
    """The items beginning with another one each turn, and backwards every other turn."""
    step = -1 if turn % 2 else 1
    return [items[(turn + step * index) % len(items)] for index in range(len(items))]


def _first_call(candidate: Candidate, take: Callable, check: Callable[[Hashable, Any], None]) -> None:
    try:
        sample, result = take(candidate.call)
        check(candidate.name, result)
    except Exception as error:  # a missing wheel, an unsupported shape and too little memory all differ by library
        candidate.error = error.with_traceback(None)  # whose frames would keep arrays alive
        return
    candidate.last_ms = sample.ms
    if sample.ms > SLOW_CALL_MS and sample.host_ms < sample.ms / 2:  # the host compiled nothing meanwhile
        candidate.samples.append(sample)


def _sample(candidate: Candidate, take: Callable) -> None:
    try:
        sample, _ = take(candidate.call)
    except Exception as error:  # too little memory may show late
        candidate.error = error.with_traceback(None)
        return
    candidate.last_ms = sample.ms
    candidate.samples.append(sample)


def event_sampler() -> Callable[[Callable[[], Any]], tuple[Sample, Any]]:
    """A function that flushes the L2, runs a call between two events on CuPy's current stream, and returns
    (Sample, what the call returned).

    The GPU is still flushing when the call launches its kernels: what is timed is the GPU's work, not the launch,
    unless the host takes longer than LEAD_MS.
    """
    import cupy

    flush = l2_flush()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()

    def take(call: Callable[[], Any]) -> tuple[Sample, Any]:
        flush()
        begun, ticks = time.time(), time.perf_counter()
        start.record()
        result = call()  # kept until the end, so that freeing it is not timed
        end.record()
        host_ms = (time.perf_counter() - ticks) * 1e3
        end.synchronize()
        return Sample(cupy.cuda.get_elapsed_time(start, end), host_ms, begun, time.time()), result

    return take


def _host_sample(function: Callable[[], Any]) -> Callable[[], float]:
    def sample() -> float:
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e3

    return sample


def _gpu_sample(function: Callable[[], Any]) -> Callable[[], float]:
    take = event_sampler()
    return lambda: take(function)[0].ms


def l2_flush() -> Callable[[], None]:
    """A function that queues memsets of a buffer larger than the L2 on CuPy's current stream, LEAD_MS of them."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    num_bytes = max(MIN_FLUSH_BYTES, 2 * int(properties.get("l2CacheSize", 0)))
    buffer = cupy.empty(num_bytes, "u1")
    events = [cupy.cuda.Event() for _ in range(3)]
    for event in events:  # the first memset is a warm-up
        buffer.data.memset_async(0, num_bytes, cupy.cuda.get_current_stream())
        event.record()
    events[-1].synchronize()
    once_ms = cupy.cuda.get_elapsed_time(events[1], events[2])
    repeats = max(1, math.ceil(LEAD_MS / max(once_ms, LEAD_MS / 50)))

    def flush() -> None:
        for _ in range(repeats):
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
_REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # by today's name, by its older one
_LIVE_NAMES = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
POLL_SECONDS = 0.1

# Bits of NVML's nvmlClocksEventReasons that say why clocks are below what was asked for.
THROTTLE_REASONS = {
    0x01: "idle",
    0x02: "application clocks",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
SLOWDOWNS = 0x08 | 0x20 | 0x40 | 0x80  # a sample taken under one of these says nothing about the code


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


@dataclass(frozen=True)
class Reading:
    """What the GPU said at ``time`` (seconds, as ``time.time()``); values in the order of sm_mhz, memory_mhz, power_w,
    temperature_c, None where it did not say; reasons: bits of THROTTLE_REASONS."""

    time: float
    values: tuple[float | None, ...]
    reasons: int


class ClockSampler:
    """Context manager: reads clocks, power, temperature and throttle reasons every 0.1 s while the body runs.

    By NVML where the package ``pynvml`` is installed, else by nvidia-smi. ``result`` afterwards is ``summary()`` of
    everything; without either its values are null.
    """

    def __enter__(self) -> "ClockSampler":
        import cupy

        runtime = cupy.cuda.runtime
        bus_id = runtime.deviceGetPCIBusId(runtime.getDevice())
        self._readings: list[Reading] = []
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        source = _nvml_source(bus_id)
        if source is not None:
            target, arguments = self._poll, (source,)
        else:
            self._process = _start_smi(bus_id)
            target, arguments = self._follow, ()
        self._thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
        self._thread.join(timeout=10)
        if self._process is not None:
            self._process.wait(timeout=10)
        self.result = self.summary()

    def _poll(self, source: Callable[[], Reading]) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._readings.append(source())

    def _follow(self) -> None:
        for line in self._process.stdout if self._process is not None else ():
            reading = parse_reading(line)
            if reading is not None:
                self._readings.append(reading)

    def between(self, start: float, end: float) -> list[Reading]:
        """The readings of a span of time."""
        return [reading for reading in list(self._readings) if start <= reading.time <= end]

    def slowed(self, start: float, end: float) -> bool:
        """Whether a thermal or hardware slowdown was read from just before ``start`` to just after ``end``."""
        margin = 3 * POLL_SECONDS  # nvidia-smi is late now and then
        return any(reading.reasons & SLOWDOWNS for reading in self.between(start - margin, end + margin))

    def summary(self, *spans: tuple[float, float]) -> dict[str, Any]:
        """Medians {sm_mhz, memory_mhz, power_w, temperature_c}, throttle {reason: share of readings}, samples.

        Over the readings of these spans of time; of all of it, but for the first reading before the load, when there
        are none.
        """
        if spans:
            readings = [reading for span in spans for reading in self.between(*span)]
        else:
            readings = self._readings[1:] or self._readings
        found: dict[str, Any] = {}
        for index, name in enumerate(_LIVE_NAMES):
            values = [x for x in (reading.values[index] for reading in readings) if x is not None]
            found[name] = round(statistics.median(values), 1) if values else None
        found["throttle"] = {
            name: round(sum(bool(reading.reasons & bit) for reading in readings) / len(readings), 3)
            for bit, name in THROTTLE_REASONS.items()
            if any(reading.reasons & bit for reading in readings)
        }
        found["samples"] = len(readings)
        return found


def _nvml_source(bus_id: str) -> Callable[[], Reading] | None:
    """A function that reads the GPU through NVML, or None where that cannot be done."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode())

        def read() -> Reading:
            values = (
                float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
                pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            )
            return Reading(time.time(), values, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

        read()
    except Exception:  # no package, no library, no permission: each raises its own
        return None
    return read


def _start_smi(bus_id: str) -> "subprocess.Popen[str] | None":
    """nvidia-smi printing a line every POLL_SECONDS, or None where it cannot be started."""
    reasons = _reasons_field(bus_id)
    fields = ("timestamp", *_LIVE, *([reasons] if reasons else []))
    command = _query(fields, bus_id, "-lms", str(round(POLL_SECONDS * 1e3)))
    if command is None:
        return None
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


@lru_cache(maxsize=None)
def _reasons_field(bus_id: str) -> str | None:
    """The name under which this nvidia-smi gives the throttle reasons."""
    for name in _REASON_FIELDS:
        command = _query((name,), bus_id)
        try:
            if command and subprocess.run(command, capture_output=True, timeout=20).returncode == 0:
                return name
        except (OSError, subprocess.SubprocessError):
            pass
    return None


def parse_reading(line: str) -> Reading | None:
    """A line of nvidia-smi's: timestamp, the values of _LIVE, and, where it is known, the throttle reasons in hex."""
    timestamp, *parts = (part.strip() for part in line.split(","))
    if len(parts) < len(_LIVE):
        return None
    try:
        when = datetime.strptime(timestamp, "%Y/%m/%d %H:%M:%S.%f").timestamp()
        reasons = int(parts[len(_LIVE)], 16) if len(parts) > len(_LIVE) else 0
    except ValueError:
        return None
    return Reading(when, tuple(_number(part) for part in parts[: len(_LIVE)]), reasons)


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
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def command_line() -> str:
    """The command that runs, program by its file name alone."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
