"""Ceilings: bounds of work, the cache, what is known of GPUs that are not here; occupancy by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from salekit import ceilings, jit, occupancy, work
from salekit.ceilings import KNOWN, Ceilings, load_or_measure
from salekit.errors import ArgumentError
from salekit.jit import KernelInfo, KernelSpec
from salekit.plans import SUPPORTED_ARCHS, Plan
from salekit.work import Work

ROOT = Path(__file__).resolve().parent.parent
UNITS = ["bf16", "s8"]
SOME = Ceilings("GPU", "sm_90a", 2e12, {"bf16": 5e14, "s8": 1e15}, "a test", "today")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def work_of(read=0, written=0, **operations):
    return Work("attend", KernelSpec("any"), "", 128, read, written, operations)


def test_the_slower_of_products_and_memory_bounds():
    assert SOME.seconds(work_of(bf16=5 * 10**14, read=10)) == (1.0, "bf16")
    assert SOME.seconds(work_of(bf16=5, read=10**12, written=10**12)) == (1.0, "memory")
    assert SOME.seconds(work_of(read=2 * 10**12)) == (1.0, "memory")
    seconds, bound = SOME.seconds(work_of(bf16=5 * 10**14, s8=10**15))  # take turns on the same tensor cores
    assert (seconds, bound) == (2.0, "bf16 + s8")
    with pytest.raises(ArgumentError, match="s4"):
        SOME.seconds(work_of(s4=1))


def test_measured_once_for_each_gpu_driver_and_kernel(cache):
    calls = []

    def measure():
        calls.append(1)
        return replace(SOME, bytes_per_s=1e12 * len(calls))

    first = load_or_measure(["GPU", "580", "hash"], UNITS, measure)
    assert load_or_measure(["GPU", "580", "hash"], UNITS, measure) == first and len(calls) == 1
    for other in (["GPU 2", "580", "hash"], ["GPU", "581", "hash"], ["GPU", "580", "other"]):
        load_or_measure(other, UNITS, measure)
    assert len(calls) == 4
    again = load_or_measure(["GPU", "580", "hash"], UNITS, measure, remeasure=True)
    assert len(calls) == 5 and again.bytes_per_s == 5e12
    assert load_or_measure(["GPU", "580", "hash"], UNITS, measure) == again and len(calls) == 5
    assert not [path for path in cache.iterdir() if path.name.startswith(".new-")]


@pytest.mark.parametrize(
    "damage",
    (
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace("500000000000000.0", "-1"),
        lambda text: text.replace("500000000000000.0", "NaN"),
        lambda text: text.replace("500000000000000.0", '"fast"'),
        lambda text: text.replace("bytes_per_s", "bytes"),
        lambda text: text.replace('"s8"', '"s9"'),
        lambda text: text.replace('"GPU"', "null"),
    ),
)
def test_a_damaged_cache_is_measured_again(cache, damage):
    calls = []

    def measure():
        calls.append(1)
        return SOME

    load_or_measure(["GPU"], UNITS, measure)
    [path] = cache.glob("ceilings-*.json")
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert load_or_measure(["GPU"], UNITS, measure) == SOME and len(calls) == 2
    assert load_or_measure(["GPU"], UNITS, measure) == SOME and len(calls) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALEKIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert load_or_measure(["GPU"], UNITS, lambda: SOME) == SOME


def test_known_figures_are_those_of_the_documentation():
    """No figure that was not measured: each stands in docs/kernels.md or in the design's tables."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    h100 = KNOWN["h100"]
    rates = {unit: rate / 1e12 for unit, rate in h100.operations_per_s.items()}
    assert f"bf16 matrix product {rates['bf16']:.0f} TFLOPS" in text and rates["fp16"] == rates["bf16"]
    assert f"`wgmma` s8 {rates['s8']:.0f} TOPS" in text and f"and {rates['s8-2:4']:.0f} (n 256)" in re.sub(
        r"\s+", " ", text
    )
    assert f"device-to-device copy {h100.bytes_per_s / 1e12:.1f} TB/s" in text
    assert "H100" in h100.source and h100.date


@pytest.mark.parametrize("arch", SUPPORTED_ARCHS)
def test_every_unit_of_an_architecture_is_measured(arch):
    plan = Plan(1, 4096, 4096, 4, 2, 128, "bfloat16", 1.0, arch=arch)
    specs = ceilings.kernel_specs(plan)
    assert len(set(specs)) == len(specs) == len(ceilings._products(arch))
    used = set()
    attends = ("exact", "int8-fp8") if arch == "sm_90a" else ("exact",)
    for estimator in ("int4", "int8", "int8-sp24"):
        for attend in attends:
            for dtype in ("bfloat16", "float16"):
                wanted = plan.replace(estimator=estimator, attend=attend, dtype=dtype)
                for one in work.sparse_work(wanted, 10**6):
                    used |= set(one.operations)
    assert used == set(ceilings._products(arch))


def source(name):
    return (jit.source_root() / "kernels" / f"{name}.cu").read_text()


def constant(text, name):
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


def test_operations_are_those_of_the_kernels():
    text = source("measure_products_sm90")
    assert constant(text, "MEASURE_WARPGROUPS") == ceilings._WARPGROUPS
    assert constant(text, "MEASURE_PRODUCTS") == ceilings._PRODUCTS
    wgmma = {
        "HalfProducts<BFloat16>": r"wgmma_m64k(16)_ss<Element, 64>",
        "HalfProducts<Half>": r"wgmma_m64k(16)_ss<Element, 64>",
        "Int8Products": r"wgmma_m64n(128)k(32)_s8",
        "SparseInt8Products": r"wgmma_sp_m64n(128)k(64)_s8",
        "E4m3Products": r"wgmma_m64(k32)_rs_e4m3",
    }
    for kind, columns, depth in ceilings._WGMMA_KINDS.values():
        body = text[text.index(f"struct {kind.split('<')[0]} ") :]
        found = re.search(wgmma[kind], body[: body.index("\n};")])
        assert found
        if kind == "E4m3Products":  # 68 sums a lane are 136 columns
            assert "float sums[68]" in body[: body.index("\n};")] and (columns, depth) == (136, 32)
        elif kind.startswith("HalfProducts"):  # 64 sums a lane
            assert (columns, depth) == (128, int(found[1]))
        else:
            assert (columns, depth) == tuple(map(int, found.groups()))
    text = source("measure_products")
    assert constant(text, "MEASURE_THREADS") == 32 * ceilings._WARPS
    assert constant(text, "MEASURE_CHAINS") == ceilings._CHAINS
    for kind, depth in ceilings._MMA_KINDS.values():
        body = text[text.index(f"struct {kind.split('<')[0]} ") :]
        assert re.search(rf"mma_m16n8k{depth}\D", body[: body.index("\n};")])
    # 64 x 128 x 32 products of a multiplication and an addition, sixteen in each of two warpgroups
    assert ceilings._products("sm_90a")["s8"].operations == 2 * 16 * 64 * 128 * 32 * 2
    assert ceilings._products("sm_80")["s8"].operations == 8 * 8 * 16 * 8 * 32 * 2


def info(registers=32, static=0, dynamic=0):
    return KernelInfo(registers, static, dynamic, 0, 0, 0, (), 0.0)


@pytest.mark.parametrize(
    "arch, registers, shared, threads, blocks",
    (
        # As NVIDIA's occupancy calculator has them: by threads, by registers, by shared memory, by blocks.
        ("sm_90a", 32, 0, 1024, 2),
        ("sm_90a", 168, 132 * 1024, 384, 1),
        ("sm_90a", 255, 0, 256, 1),
        ("sm_90a", 128, 0, 256, 2),
        ("sm_90a", 40, 0, 512, 3),
        ("sm_90a", 48, 0, 256, 5),
        ("sm_90a", 64, 32 * 1024, 256, 4),
        ("sm_90a", 16, 0, 32, 32),
        ("sm_80", 32, 40 * 1024, 128, 4),
        ("sm_86", 32, 0, 1024, 1),
        ("sm_86", 16, 0, 32, 16),
        ("sm_89", 64, 48 * 1024, 128, 2),
    ),
)
def test_occupancy(arch, registers, shared, threads, blocks):
    assert occupancy.blocks_per_multiprocessor(info(registers, 0, shared), threads, arch) == blocks
    assert (
        occupancy.blocks_per_multiprocessor(info(registers, min(shared, 1024), max(0, shared - 1024)), threads, arch)
        == blocks
    )
    share = occupancy.occupancy(blocks, threads, arch)
    assert 0 < share <= 1 and math.isclose(share, blocks * threads / occupancy.MULTIPROCESSORS[arch].threads)


def test_every_architecture_has_its_limits():
    assert set(occupancy.MULTIPROCESSORS) == set(SUPPORTED_ARCHS)


def test_what_is_kept_is_json(cache):
    load_or_measure(["GPU"], UNITS, lambda: SOME)
    [path] = cache.glob("ceilings-*.json")
    assert Ceilings(**json.loads(path.read_text())) == SOME
