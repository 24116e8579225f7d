"""Occupancy: how many blocks of a kernel a multiprocessor holds at once, by what it is made of. Needs no GPU.

CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; registers are given to warps in units of
256, shared memory to blocks in units of 128 bytes, 1 KiB of which the system keeps for itself in each block.
"""

from __future__ import annotations

from dataclasses import dataclass

from .jit import KernelInfo
from .plans import ceil_div

REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256
SHARED_UNIT = 128
SYSTEM_SHARED_BYTES = 1024
WARP_GROUPS = 4  # a multiprocessor's four parts, each with a quarter of the registers


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds at most."""

    threads: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": Multiprocessor(1536, 16, 100 * 1024),
    "sm_87": Multiprocessor(1536, 16, 164 * 1024),
    "sm_89": Multiprocessor(1536, 24, 100 * 1024),
    "sm_90a": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100a": Multiprocessor(2048, 32, 228 * 1024),
    "sm_103a": Multiprocessor(2048, 32, 228 * 1024),
    "sm_120a": Multiprocessor(1536, 24, 100 * 1024),
    "sm_121a": Multiprocessor(1536, 24, 100 * 1024),
}


def blocks_per_multiprocessor(info: KernelInfo, threads: int, arch: str) -> int:
    """Blocks of that many threads at once."""
    limits = MULTIPROCESSORS[arch]
    warps = ceil_div(threads, 32)
    registers_a_warp = ceil_div(info.registers * 32, REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // WARP_GROUPS // registers_a_warp * WARP_GROUPS
    shared = ceil_div(info.static_shared_bytes + info.dynamic_shared_bytes + SYSTEM_SHARED_BYTES, SHARED_UNIT)
    return min(
        limits.blocks,
        limits.threads // (32 * warps),
        warps_by_registers // warps,
        limits.shared_bytes // (shared * SHARED_UNIT),
    )


def occupancy(blocks: int, threads: int, arch: str) -> float:
    """Share of a multiprocessor's warps that ``blocks`` blocks of that many threads are."""
    return blocks * ceil_div(threads, 32) * 32 / MULTIPROCESSORS[arch].threads
