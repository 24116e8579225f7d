"""What a GPU can do at most: bytes a second of a copy, operations a second of each kind of tensor core product.

Measured once a GPU, driver and kernels, and kept in the cache folder; for GPUs that are not here, what was measured on
one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Mapping

import numpy as np

from . import jit, timing
from .errors import ArgumentError
from .jit import KernelSpec
from .plans import NATIVE_INT4_ARCHS, Plan
from .private_files import make_private, read_private
from .work import BF16, E4M3, FP16, S4, S8, SPARSE_S8, UNITS, Work

SCHEMA = 1
_TARGET_MS = 4.0  # of a launch that is timed: long enough to reach the clocks of a call
_FIRST_ROUNDS = 256
_CHECKSUM = np.uint32


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_s: read and written; operations_per_s: of each unit of ``work.UNITS`` that the GPU has (s8-2:4 as if
    nothing were pruned); source, date: where the figures come from and when they were taken."""

    gpu: str
    arch: str
    bytes_per_s: float
    operations_per_s: Mapping[str, float]
    source: str
    date: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def seconds(self, work: Work) -> tuple[float, str]:
        """(the least time that work takes, what bounds it): "memory" or its units, "s8 + e4m3".

        Products of several kinds take turns on the same tensor cores. Raises ArgumentError for a unit that is not here.
        """
        missing = [unit for unit in work.operations if unit not in self.operations_per_s]
        if missing:
            raise ArgumentError(f"ceilings: none of {missing[0]} is known for {self.gpu}")
        products = sum(count / self.operations_per_s[unit] for unit, count in work.operations.items())
        memory = work.num_bytes / self.bytes_per_s
        return (products, " + ".join(work.operations)) if products > memory else (memory, "memory")


_H100_SOURCE = (
    "measured on an NVIDIA H100 80GB HBM3 (132 SMs, 700 W, driver 580): bf16 a matrix product at the power cap, also "
    "taken for fp16; s8, s8-2:4 and e4m3 wgmma on operands in shared memory; memory a device-to-device copy"
)
# GPUs that can be predicted for. No figure that was not measured.
KNOWN: dict[str, Ceilings] = {
    "h100": Ceilings(
        "h100",
        "sm_90a",
        3.0e12,
        {BF16: 777e12, FP16: 777e12, S8: 1895e12, SPARSE_S8: 3363e12, E4M3: 1821e12},
        _H100_SOURCE,
        "2026-11-24",
    )
}


# --- products that are measured --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Measured:
    """A kernel, the threads of its CTAs, CTAs a multiprocessor, and operations of a CTA in each round."""

    spec: KernelSpec
    threads: int
    blocks: int
    operations: int


# The products of measure_products_sm90.cu and measure_products.cu: kind, columns (wgmma alone) and depth of one.
_WGMMA_KINDS = {
    BF16: ("HalfProducts<BFloat16>", 128, 16),
    FP16: ("HalfProducts<Half>", 128, 16),
    S8: ("Int8Products", 128, 32),
    SPARSE_S8: ("SparseInt8Products", 128, 64),
    E4M3: ("E4m3Products", 136, 32),
}
_MMA_KINDS = {
    BF16: ("HalfProducts<BFloat16>", 16),
    FP16: ("HalfProducts<Half>", 16),
    S8: ("Int8Products", 32),
    S4: ("Int4Products", 64),
}
_WARPGROUPS, _PRODUCTS = 2, 16  # MEASURE_WARPGROUPS, MEASURE_PRODUCTS of measure_products_sm90.cu
_WARPS, _CHAINS = 8, 8  # of a CTA, and MEASURE_CHAINS, of measure_products.cu


def _products(arch: str) -> dict[str, _Measured]:
    if arch == "sm_90a":
        return {
            unit: _Measured(
                KernelSpec("measure_products_sm90", (kind,), "MeasureStorage"),
                128 * _WARPGROUPS,
                1,
                _WARPGROUPS * _PRODUCTS * 2 * 64 * columns * depth,
            )
            for unit, (kind, columns, depth) in _WGMMA_KINDS.items()
        }
    return {
        unit: _Measured(KernelSpec("measure_products", (kind,)), 32 * _WARPS, 2, _WARPS * _CHAINS * 2 * 16 * 8 * depth)
        for unit, (kind, depth) in _MMA_KINDS.items()
        if unit != S4 or arch in NATIVE_INT4_ARCHS
    }


def kernel_specs(plan: Plan) -> list[KernelSpec]:
    """The kernels that measure ceilings on the plan's architecture."""
    return [measured.spec for measured in _products(plan.arch or jit.device_arch()).values()]


def measure(info: Mapping[str, Any]) -> Ceilings:
    """Measure CuPy's current device, some two seconds. info: of ``timing.gpu_info``."""
    arch = jit.device_arch()
    rates = {unit: _rate(measured) for unit, measured in _products(arch).items()}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Ceilings(info["name"], arch, timing.copy_bandwidth(), rates, "measured on this GPU", now)


def _rate(measured: _Measured) -> float:
    """Operations a second of a kernel that multiplies for _TARGET_MS."""
    import cupy

    kernel = jit.get_kernel(measured.spec)
    num_blocks = measured.blocks * jit.multiprocessors()
    checksums = cupy.empty((num_blocks, measured.threads), _CHECKSUM)

    def launch(rounds: int) -> None:
        kernel((num_blocks,), (measured.threads,), (checksums, np.int32(rounds)))

    options: dict[str, Any] = dict(cuda=True, max_seconds=0.5)
    few = timing.time_call(lambda: launch(_FIRST_ROUNDS), **options, min_samples=2, max_samples=2)
    rounds = max(1, round(_FIRST_ROUNDS * _TARGET_MS / few.median_ms))
    timed = timing.time_call(lambda: launch(rounds), **options)
    return measured.operations * num_blocks * rounds / (timed.median_ms * 1e-3)


# --- kept from run to run --------------------------------------------------------------------------------------------
def of_this_gpu(remeasure: bool = False, note: Callable[[str], None] = lambda text: None) -> Ceilings:
    """Of CuPy's current device: what the cache has of it, else measured and kept there. note: told when it measures.

    Raises GpuError without a GPU.
    """
    arch = jit.device_arch()
    info = timing.gpu_info()
    hashes = [jit.cache_key(measured.spec, arch) for measured in _products(arch).values()]
    identity = [info["name"], str(info["driver"] or info["driver_cuda"]), *hashes]
    return load_or_measure(identity, list(_products(arch)), lambda: measure(info), remeasure, note)


def load_or_measure(
    identity: list[str],
    units: list[str],
    measure: Callable[[], Ceilings],
    remeasure: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Ceilings:
    """The ceilings of a GPU that is ``identity`` and has these units, from the cache folder if they are there."""
    key = hashlib.sha256(json.dumps([SCHEMA, *identity]).encode()).hexdigest()[:24]
    folder = jit.private_cache_dir()
    path = folder and folder / f"ceilings-{key}.json"
    if path and not remeasure:
        found = _load(path, units)
        if found is not None:
            return found
    note("measuring what this GPU can do at most (kept for the next time)")
    measured = measure()
    try:
        if path:
            make_private(path.parent)
            jit.write_file(path, json.dumps(measured.as_json()).encode())
    except OSError:  # read-only or full: work without it
        pass
    return measured


def _load(path: Any, units: list[str]) -> Ceilings | None:
    """What :func:`load_or_measure` wrote, or None when that is missing or damaged."""
    try:
        found = Ceilings(**json.loads(read_private(path)))
        rates = [found.bytes_per_s, *(found.operations_per_s[unit] for unit in units)]
        texts = (found.gpu, found.arch, found.source, found.date)
        is_sound = (
            all(math.isfinite(rate) and rate > 0 for rate in rates)
            and set(found.operations_per_s) <= set(UNITS)
            and all(isinstance(text, str) for text in texts)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if is_sound else None
