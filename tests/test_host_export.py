"""The exported C host side without a GPU: it launches what the Python stages launch, argument byte for argument byte.

The C sources are compiled with the system's compiler against fake_cuda/, a driver that hands every launch, fill and
tensor map to this test; the stages are recorded (salekit/programs.py). Symbols of the recording are matched to the
addresses that C computed, and what C put where must not overlap while it is in use.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

cupy = pytest.importorskip("cupy")

from salekit.cli.main import cli  # noqa: E402

from salekit import attention, export, jit, pipeline, programs  # noqa: E402
from salekit.errors import ArgumentError, FileFormatError  # noqa: E402
from salekit.options import plan_of_views
from salekit.plans import BLOCKS, ESTIMATORS, LOW_BIT_ARCHS, LOW_BIT_HEAD_DIMS, QUERY_STRIDES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests" / "fake_cuda"
ARCHS = {"sm_90a": (9, 0), "sm_80": (8, 0), "sm_87": (8, 7), "sm_89": (8, 9), "sm_120a": (12, 0)}
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TARGETS = [export.Target(*each) for each in itertools.product(ARCHS, (64, 96, 128, 192, 256), DTYPES)]
ONLY_INT8 = export.Target("sm_90a", 128, "float16", ("int8",), ((128, 32),))
Q, K, V, OUT, LSE, MASK, TAUS, WORKSPACE = (0x1000_0000_0000 + (i << 44) for i in range(8))
STREAM = 0x5000
ERROR_BYTES = 512
OK, ARGUMENT, GPU, FILE, MISSING, CUDA, MEMORY = range(7)


def compiler() -> list[str] | None:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]


pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler (cc, gcc, clang, or pip install ziglang)")


# --- the C side --------------------------------------------------------------------------------------------------
class Tensor(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_uint64), *((f"stride_{x}", ctypes.c_int64) for x in ("batch", "row", "head"))]


class Problem(ctypes.Structure):
    _fields_ = [
        *((x, ctypes.c_int) for x in ("batch", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "causal")),
        ("softmax_scale", ctypes.c_double),
        *((x, ctypes.c_int) for x in ("estimator", "attend", "block_q", "block_k", "query_stride", "full_rows")),
        *((x, ctypes.c_int) for x in ("sink", "local", "dense_below")),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        *((x, Tensor) for x in ("q", "k", "v", "out")),
        ("threshold", ctypes.c_float),
        *((x, ctypes.c_uint64) for x in ("thresholds", "lse", "mask", "workspace")),
        ("workspace_bytes", ctypes.c_size_t),
    ]


class LaunchRecord(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("num_arguments", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("argument_bytes", ctypes.POINTER(ctypes.c_size_t)),
        ("fill_address", ctypes.c_uint64),
        ("fill_bytes", ctypes.c_size_t),
    ]


VISITOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(LaunchRecord))
LAUNCH_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)
FILL_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p)
ENCODE_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
    *(ctypes.POINTER(x) for x in (ctypes.c_uint64,) * 2 + (ctypes.c_uint32,) * 2 + (ctypes.c_int,)),
)


@lru_cache(maxsize=None)
def fake_kernels(target: export.Target) -> list[export.Exported]:
    """An export's kernels uncompiled: the symbol is the C++ name, shared memory a number of the kernel's own."""
    found = []
    for index, spec in enumerate(target.specs()):
        shared = 1000 * (index + 30) if spec.storage else 0
        info = jit.KernelInfo(32, 16, shared, 0, 0, 0, (), 0.0)
        found.append(export.Exported(spec, f"cubins/{index}.cubin", jit.Compiled(None, spec.expression, info, b"")))
    return found


@lru_cache(maxsize=None)
def shared_bytes(target: export.Target) -> dict[str, int]:
    return {x.spec.expression: x.compiled.info.dynamic_shared_bytes for x in fake_kernels(target)}


def run_compiler(*arguments) -> None:
    command = [*compiler(), "-Wall", "-Wextra", "-Werror", "-O1", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What an export looks like, with empty cubins."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "cubins").mkdir()
    for index in range(100):
        (folder / "cubins" / f"{index}.cubin").touch()
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The host side, the fake driver and the tables of many exports, as one library."""
    build = tmp_path_factory.mktemp("build")
    for target in (*TARGETS, ONLY_INT8):
        for suffix, write in (("h", export.header), ("c", export.table)):
            tag, text = target.tag, write(target, fake_kernels(target))
            if target is ONLY_INT8:
                text = text.replace(tag, "only").replace(tag.upper(), "ONLY")
                tag = "only"
            (build / f"salekit_{tag}.{suffix}").write_text(text)
    host = jit.source_root() / "host"
    includes = (f"-I{FAKE}", f"-I{host}", f"-I{build}")
    sources = (host / "salekit.c", FAKE / "fake_cuda.c", *sorted(build.glob("*.c")))
    run_compiler("-std=c11", "-shared", "-fPIC", *includes, *sources, "-o", build / "host.so")
    library = ctypes.CDLL(str(build / "host.so"))
    library.salekit_workspace_bytes.restype = library.salekit_mask_words.restype = ctypes.c_size_t
    return library


def table(library, tag: str) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(library, f"salekit_{tag}")))


@dataclass
class Launched:
    """A launch, or with ``name`` None a fill of ``num_bytes`` at the address in ``args``."""

    name: str | None
    args: list[bytes]
    grid: tuple = ()
    block: tuple = ()
    shared_bytes: int = 0
    num_bytes: int = 0


class Host:
    """A loaded context of the C side, and what it launched last."""

    def __init__(self, library, tag: str, folder: Path, arch: str, multiprocessors: int = 132):
        self.library, self.launched, self.maps, self.sizes = library, [], [], {}
        capability = ARCHS[arch]
        for name, value in (("major", capability[0]), ("minor", capability[1]), ("multiprocessors", multiprocessors)):
            ctypes.c_int.in_dll(library, f"fake_{name}").value = value
        self.export = table(library, tag)
        self.context = ctypes.c_void_p()
        status, text = self.check(library.salekit_load, ctypes.byref(self.context), self.export, bytes(folder))
        assert status == OK, text
        self._hooks = (LAUNCH_HOOK(self._launch), FILL_HOOK(self._fill), ENCODE_HOOK(self._encode))
        for name, hook in zip(("launch", "fill", "encode"), self._hooks):
            ctypes.c_void_p.in_dll(library, f"fake_{name}").value = ctypes.cast(hook, ctypes.c_void_p).value

    def close(self) -> None:
        self.library.salekit_free(self.context)
        for name in ("launch", "fill", "encode"):
            ctypes.c_void_p.in_dll(self.library, f"fake_{name}").value = None

    @staticmethod
    def check(function, *arguments) -> tuple[int, str]:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        return function(*arguments, error), error.value.decode()

    def _launch(self, function, grid, block, num_shared, stream, params) -> int:
        assert stream == STREAM
        name = ctypes.string_at(function).decode()
        args = [ctypes.string_at(params[i], size) for i, size in enumerate(self.sizes[name])]
        self.launched.append(Launched(name, args, tuple(grid[:3]), tuple(block[:3]), num_shared))
        return 0

    def _fill(self, address, value, num_bytes, stream) -> int:
        assert value == 0 and stream == STREAM
        self.launched.append(Launched(None, [address.to_bytes(8, "little")], num_bytes=num_bytes))
        return 0

    def _encode(self, target, dtype, rank, address, sizes, strides, box, steps, modes) -> int:
        self.maps.append((address, [dtype, rank, sizes[:4], strides[:3], box[:4], steps[:4], *modes[:4]]))
        ctypes.memset(target, 0, 128)
        ctypes.memmove(target, len(self.maps).to_bytes(8, "little"), 8)
        return 0

    def map_of(self, argument: bytes) -> tuple:
        return self.maps[int.from_bytes(argument[:8], "little") - 1]

    def workspace_bytes(self, call: Call) -> int:
        return self.library.salekit_workspace_bytes(self.export, ctypes.byref(call.problem))

    def run(self, call: Call, sizes: dict | None = None) -> tuple[int, str, list[Launched]]:
        """sizes: by kernel, those of its arguments."""
        self.launched, self.maps, self.sizes = [], [], sizes or {}
        function = self.library.salekit_sparse_attention
        status, text = self.check(function, self.context, ctypes.byref(call), ctypes.c_void_p(STREAM))
        return status, text, self.launched

    def visit(self, call: Call) -> tuple[int, str, list[Launched]]:
        found = []

        def visit(_, record):
            record = record.contents
            name = ctypes.string_at(record.function).decode() if record.function else None
            args = [
                ctypes.string_at(record.arguments[i], record.argument_bytes[i]) for i in range(record.num_arguments)
            ] or [record.fill_address.to_bytes(8, "little")]
            found.append(Launched(name, args, tuple(record.grid), (record.threads, 1, 1), 0, record.fill_bytes))
            return 0

        visitor = VISITOR(visit)
        self.maps = []
        function = self.library.salekit_visit_launches
        status, text = self.check(function, self.context, ctypes.byref(call), visitor, None)
        return status, text, found


# --- the Python side -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A call. gaps: elements between rows, heads and batches, beyond what they need; kind: of thresholds."""

    seqlen_q: int = 1000
    seqlen_k: int = 1000
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    layout: str = "bshd"
    gaps: tuple[int, int, int] = (0, 0, 0)
    broadcast: str = ""  # k or v with a head stride of 0
    kind: str = "scalar"
    tau: float = 0.008
    return_lse: bool = False
    return_mask: bool = False
    causal: bool = True
    softmax_scale: float | None = None
    estimator: str = "auto"
    attend: str = "exact"
    block: tuple[int, int] = (128, 32)
    query_stride: int = 1
    full_rows: int = 1024
    sink: int = 32
    local: int = 128
    dense_below: int = 0

    def strides(self, name: str, head_dim: int) -> tuple[int, int, int]:
        """Of batch, row and head, in elements."""
        rows = self.seqlen_q if name in ("q", "out") else self.seqlen_k
        heads = self.heads if name in ("q", "out") else self.kv_heads
        row_gap, head_gap, batch_gap = self.gaps
        if self.layout == "bshd":
            head = head_dim + head_gap
            row = heads * head + row_gap
            batch = rows * row + batch_gap
        else:
            row = head_dim + row_gap
            head = rows * row + head_gap
            batch = heads * head + batch_gap
        return batch, row, 0 if name in self.broadcast else head

    @property
    def options(self) -> dict:
        names = ["causal", "softmax_scale", "estimator", "attend", "block", "query_stride", "full_rows", "sink"]
        return {name: getattr(self, name) for name in (*names, "local", "dense_below")}


def record(case: Case, target: export.Target, monkeypatch, multiprocessors: int = 132):
    """(recorder, port addresses by symbol, plan) of the stages for this call."""
    shared = shared_bytes(target)

    def get_kernel(spec, arch=None):
        def launch(grid, block, args):
            grid, block = (x if isinstance(x, tuple) else (x,) for x in (grid, block))
            programs.active().launch(SimpleNamespace(ptr=spec), grid, block, shared[spec.expression], args)

        return launch

    monkeypatch.setattr(jit, "device_arch", lambda: target.arch)
    monkeypatch.setattr(jit, "multiprocessors", lambda: multiprocessors)
    for module in (jit, pipeline):
        monkeypatch.setattr(module, "get_kernel", get_kernel)
    dtype, head_dim = DTYPES[target.dtype], target.head_dim
    with programs.Recorder(0) as recorder:
        views = []
        for name in ("q", "k", "v", "out"):
            rows, heads = (
                (case.seqlen_q, case.heads) if name in ("q", "out") else (case.seqlen_k, case.kv_heads)
            )
            strides = (*(2 * x for x in case.strides(name, head_dim)), 2)
            views.append(recorder.array((case.batch, rows, heads, head_dim), dtype, strides))
        ports = dict(enumerate((Q, K, V, OUT)))
        plan = plan_of_views(*views[:2], **case.options)
        thresholds = case.tau
        if case.kind == "device":
            ports[len(recorder.symbols)] = TAUS
            thresholds = recorder.array((case.heads,), np.float32)
        elif case.kind == "scalar" and not plan.is_dense:
            thresholds = programs.ScalarParameter()
        lse, mask = pipeline.run_stages(*views, thresholds, plan, case.return_lse, case.return_mask)
        for array, address in ((lse, LSE), (mask.words if case.return_mask else None, MASK)):
            if array is not None:
                ports[symbol_of(array.data.ptr)] = address
    return recorder, ports, plan


def symbol_of(address: int) -> int:
    return (address - programs._FIRST_SYMBOL) >> programs._SYMBOL_SHIFT


def size_of(arg) -> int:
    if isinstance(arg, programs.Deferred):
        return arg.num_bytes
    if isinstance(arg, programs.Parameter):
        return 4 * arg.count
    return arg.nbytes if isinstance(arg, (np.generic, np.ndarray)) else 8


def call_of(case: Case, head_dim: int) -> Call:
    call = Call()
    sizes = (case.batch, case.seqlen_q, case.seqlen_k, case.heads, case.kv_heads, int(case.causal))
    estimator, attend = ("auto", *ESTIMATORS).index(case.estimator), ("exact", "int8-fp8").index(case.attend)
    call.problem = Problem(
        *sizes, case.softmax_scale or 0, estimator, attend, *case.block, case.query_stride, case.full_rows,
        case.sink, case.local, case.dense_below,
    )
    for name, address in (("q", Q), ("k", K), ("v", V), ("out", OUT)):
        setattr(call, name, Tensor(address, *case.strides(name, head_dim)))
    call.threshold = case.tau if case.kind != "device" else math.nan
    call.thresholds = TAUS if case.kind == "device" else 0
    call.lse, call.mask = LSE * case.return_lse, MASK * case.return_mask
    call.workspace = WORKSPACE
    return call


class Matching:
    """Which address C gave to each symbol of the recording."""

    def __init__(self, recorder, ports: dict):
        self.symbols, self.bases = recorder.symbols, dict(ports)

    def match(self, symbolic: int, address: int, operation: int, where: str) -> None:
        index = symbol_of(symbolic)
        symbol = self.symbols[index]
        base = self.bases.setdefault(index, address - (symbolic - symbol.address))
        assert address - base == symbolic - symbol.address, where
        symbol.first = operation if symbol.first < 0 else symbol.first
        symbol.last = operation

    def check_workspace(self, ports: dict, num_bytes: int) -> None:
        """Memory of the workspace is inside it, aligned, and apart from all that is in use at the same time."""
        own = [(self.symbols[index], base) for index, base in self.bases.items() if index not in ports]
        for symbol, base in own:
            assert WORKSPACE <= base and base + symbol.num_bytes <= WORKSPACE + num_bytes and base % 256 == 0
        for (a, base_a), (b, base_b) in itertools.combinations(own, 2):
            if a.first <= b.last and b.first <= a.last:
                assert base_a + a.num_bytes <= base_b or base_b + b.num_bytes <= base_a


def compare(case: Case, host: Host, target: export.Target, monkeypatch, multiprocessors: int = 132) -> list[str]:
    """The names of what was launched, the same by both."""
    recorder, ports, plan = record(case, target, monkeypatch, multiprocessors)
    call = call_of(case, target.head_dim)
    call.workspace_bytes = host.workspace_bytes(call)
    sizes = {x.function.expression: [size_of(arg) for arg in x.args] for x in recorder.noted if x.function}
    status, text, launched = host.run(call, sizes)
    assert status == OK, text
    assert [x.name for x in launched] == [x.function and x.function.expression for x in recorder.noted]
    assert host.library.salekit_mask_words(ctypes.byref(call.problem)) == math.prod(plan.words_shape)
    matching = Matching(recorder, ports)
    for operation, (want, got) in enumerate(zip(recorder.noted, launched)):
        if want.function is None:
            assert got.num_bytes == want.num_bytes
        else:
            assert (got.grid, got.block, got.shared_bytes) == (want.grid, want.block, want.shared_bytes), got.name
        for position, (arg, data) in enumerate(zip(want.args, got.args)):
            where = f"{got.name}: argument {position}"
            if isinstance(arg, programs.Deferred):
                address, description = host.map_of(data)
                encoder = arg._encoder
                matching.match(arg.address, address, operation, where)
                flat = [list(x) if isinstance(x, ctypes.Array) else x.value for x in (*encoder._head, *encoder._tail)]
                assert description == flat, where
            elif isinstance(arg, programs.Parameter):
                assert data == np.float32(case.tau).tobytes(), where
            else:
                compare_bytes(programs._argument_bytes(arg), data, matching, operation, where)
    matching.check_workspace(ports, call.workspace_bytes)

    if not plan.is_dense and case.tau > 0 and not case.broadcast:  # C reserves for any threshold, stride and result
        arrays_of_ports = [SimpleNamespace(data=SimpleNamespace(ptr=recorder.symbols[i].address)) for i in ports]
        needed = programs.Program(recorder, arrays_of_ports).workspace_bytes
        assert call.workspace_bytes <= 1.25 * needed + 4 * math.prod(plan.words_shape) + 16384

    status, text, visited = host.visit(call)
    assert status == OK, text
    assert [x.name for x in visited] == [x.name for x in launched]
    for a, b in zip(visited, launched):
        assert a.num_bytes == b.num_bytes and (a.name is None or (a.grid, a.block) == (b.grid, b.block))
        assert [len(x) == 128 or x for x in a.args] == [len(x) == 128 or x for x in b.args]
    return [x.name for x in launched]


def compare_bytes(want: bytes, got: bytes, matching: Matching, operation: int, where: str) -> None:
    assert len(want) == len(got), where
    for start in range(0, len(want), 8):
        a, b = want[start : start + 8], got[start : start + 8]
        word = int.from_bytes(a, "little")
        if len(a) == 8 and word >> programs._TAG_SHIFT == programs._TAG:
            matching.match(word, int.from_bytes(b, "little"), operation, where)
        else:
            assert a == b, where


@pytest.fixture(params=TARGETS, ids=lambda target: target.tag)
def target(request):
    return request.param


@pytest.fixture
def host(library, folder, target):
    host = Host(library, target.tag, folder, target.arch)
    yield host
    host.close()


CASES = [
    *(
        Case(2000, 2000, estimator=estimator, block=block, query_stride=stride, return_mask=stride == 2)
        for estimator, block, stride in itertools.product(ESTIMATORS, BLOCKS, QUERY_STRIDES)
    ),
    Case(),
    Case(dense_below=8192),
    Case(dense_below=8192, return_lse=True, return_mask=True, block=(64, 128)),
    Case(tau=0.0, kind="dense", return_lse=True, return_mask=True),
    Case(tau=math.inf),
    Case(kind="device", return_lse=True),
    Case(1, 1),
    Case(1, 5000, heads=12, kv_heads=1),
    Case(513, 4097, batch=3, estimator="int4", return_lse=True, return_mask=True),
    Case(513, 4097, batch=2, estimator="int8-sp24", query_stride=4, full_rows=0),
    Case(700, 300, causal=False, full_rows=100, query_stride=2),
    Case(700, 300, query_stride=2, full_rows=10**9),
    Case(3000, 3000, heads=9, kv_heads=3, layout="bhsd", gaps=(8, 16, 24)),
    Case(129, 33, heads=5, kv_heads=5, gaps=(64, 0, 8), batch=2, return_lse=True),
    Case(300, 300, heads=8, kv_heads=2, broadcast="k"),
    Case(300, 300, heads=8, kv_heads=2, broadcast="v", layout="bhsd"),
    Case(300, 300, heads=3, kv_heads=3, broadcast="k", block=(64, 32)),
    Case(5000, 5000, sink=0, local=0),
    Case(5000, 5000, sink=33),
    Case(5000, 5000, local=193, heads=7, kv_heads=1, query_stride=2),
    Case(5000, 5003, local=250),
    Case(5000, 5003, local=300),
    Case(5000, 5003, local=321),
    Case(5000, 5000, local=2**31 - 1, sink=2**31 - 1),
    Case(4000, 4000, causal=False, sink=17, local=64),
    Case(4000, 4000, softmax_scale=0.3, estimator="int4"),
    Case(2000, 2000, heads=66, kv_heads=1),
    Case(66 * 128, 66 * 128, heads=2, kv_heads=1),  # as many work items as multiprocessors
    Case(2**18, 2**18, heads=6, kv_heads=2, return_lse=True),
    Case(2**19 + 5, 2**19 + 5, heads=4, kv_heads=2, batch=2, estimator="int8-sp24", block=(64, 64), return_mask=True),
    Case(401_408, 401_408, heads=4, kv_heads=1),  # head_dim 128: a segment's start is halfway between two grains
    Case(200_001, 400_003, heads=4, kv_heads=1, causal=False, estimator="int4"),
    Case(100_000, 1_000_001, heads=4, kv_heads=1, estimator="int8-sp24", query_stride=2),
    Case(300_000, 290_000, heads=4, kv_heads=1, block=(128, 128)),
    Case(2**20, 2**20, heads=1, kv_heads=1, kind="device"),
]

def has_low_bits(target: export.Target) -> bool:
    return target.arch in LOW_BIT_ARCHS and target.head_dim in LOW_BIT_HEAD_DIMS


LOW_BIT_CASES = [
    Case(2000, 2000, attend="int8-fp8"),
    Case(2000, 2000, attend="int8-fp8", block=(64, 128), return_lse=True, return_mask=True),
    Case(1, 600, attend="int8-fp8", dense_below=8192, return_lse=True, return_mask=True),
    Case(700, 300, attend="int8-fp8", causal=False, layout="bhsd", gaps=(8, 16, 24), batch=2, estimator="int4"),
    Case(300, 300, attend="int8-fp8", broadcast="kv", return_lse=True),
    Case(2**18, 2**18, heads=6, kv_heads=2, attend="int8-fp8", estimator="int8-sp24", query_stride=2),
]


def test_every_launch_is_the_stages(host, target, monkeypatch):
    launched = set()
    for case in CASES + LOW_BIT_CASES * has_low_bits(target):
        launched.update(compare(case, host, target, monkeypatch))
    exported = {x.spec.expression for x in fake_kernels(target)}
    assert launched - {None} == exported, "kernels that are exported and never launched here, or the other way round"


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(host, target, monkeypatch, seed):
    rng = np.random.default_rng([seed, TARGETS.index(target)])

    def pick(*values):
        return values[rng.integers(len(values))]

    for _ in range(40):
        kv_heads = int(rng.integers(1, 5))
        limit = pick(100, 1000, 20_000, 600_000)
        case = Case(
            int(rng.integers(1, limit)),
            int(rng.integers(1, limit)),
            kv_heads * int(rng.integers(1, 9)),
            kv_heads,
            int(rng.integers(1, 4)),
            pick("bshd", "bhsd"),
            tuple(8 * int(x) for x in rng.integers(0, 3, 3)),
            pick("", "", "", "k", "v"),
            pick("scalar", "device"),
            float(rng.random()) + 1e-6,
            bool(rng.integers(2)),
            bool(rng.integers(2)),
            bool(rng.integers(2)),
            pick(None, 0.25),
            pick("auto", *ESTIMATORS),
            "exact" if not has_low_bits(target) else pick("exact", "exact", "int8-fp8"),
            BLOCKS[rng.integers(len(BLOCKS))],
            pick(*QUERY_STRIDES),
            int(rng.integers(0, 3000)),
            int(rng.integers(0, 100)),
            int(rng.integers(0, 600)),
            pick(0, 0, 8192),
        )
        compare(case, host, target, monkeypatch)


def test_grids_follow_the_multiprocessors(library, folder, monkeypatch):
    target = TARGETS[0]
    for multiprocessors in (1, 60, 200):
        host = Host(library, target.tag, folder, target.arch, multiprocessors)
        for case in (Case(), Case(2**18, 2**18, heads=6), Case(dense_below=8192)):
            compare(case, host, target, monkeypatch, multiprocessors)
        host.close()


def test_defaults_are_pythons(library):
    problem = Problem()
    library.salekit_defaults(ctypes.byref(problem))
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(attention.sparse_attention).parameters.items()
    }
    assert [problem.block_q, problem.block_k] == list(defaults["block"])
    assert ("auto", *ESTIMATORS)[problem.estimator] == defaults["estimator"]
    assert ("exact", "int8-fp8")[problem.attend] == defaults["attend"]
    assert problem.softmax_scale == 0 and defaults["softmax_scale"] is None
    for name in ("causal", "query_stride", "full_rows", "sink", "local", "dense_below"):
        assert getattr(problem, name) == defaults[name], name


# --- what is refused ---------------------------------------------------------------------------------------------
@pytest.fixture
def hopper(library, folder):
    host = Host(library, "sm_90a_d128_bf16", folder, "sm_90a")
    yield host
    host.close()


@pytest.mark.parametrize(
    "changes, match",
    (
        ({"problem.batch": -1}, "batch: got -1"),
        ({"problem.batch": 65536}, "batch: got 65536; wants at most 65535"),
        ({"problem.seqlen_q": 2**30 + 1}, "seqlen_q: got"),
        ({"problem.seqlen_k": -5}, "seqlen_k: got -5"),
        ({"problem.num_heads": 0}, "num_kv_heads: got 2 for 0 heads"),
        ({"problem.num_kv_heads": 3}, "num_kv_heads: got 3 for 4 heads"),
        ({"problem.num_kv_heads": 0}, "num_kv_heads: got 0"),
        ({"problem.causal": 2}, "causal: got 2"),
        ({"problem.softmax_scale": math.nan}, "softmax_scale: got nan"),
        ({"problem.softmax_scale": -1.0}, "softmax_scale: got -1"),
        ({"problem.softmax_scale": 1e-40}, "softmax_scale: got"),
        ({"problem.estimator": 4}, "estimator: got 4"),
        ({"problem.estimator": -1}, "estimator: got -1"),
        ({"problem.attend": 2}, "attend: got 2"),
        ({"problem.block_q": 32}, "block_q, block_k: got 32, 32"),
        ({"problem.block_k": 256}, "block_q, block_k: got 128, 256"),
        ({"problem.query_stride": 3}, "query_stride: got 3"),
        ({"problem.full_rows": -1}, "full_rows: got -1"),
        ({"problem.sink": -1}, "sink: got -1"),
        ({"problem.local": -2}, "local: got -2"),
        ({"problem.dense_below": -2}, "dense_below: got -2"),
        ({"problem.batch": 60000, "problem.num_heads": 60000, "problem.num_kv_heads": 60000}, "a grid would have"),
        ({"q.pointer": 0}, "q: got the address 0x0"),
        ({"k.pointer": K + 8}, "k: got the address 0x"),
        ({"v.stride_row": 4}, "v: got a stride of 4 elements; wants multiples of 8"),
        ({"out.stride_head": 0}, "out: got a stride of 0; wants memory of its own"),
        ({"out.stride_row": -128}, "out: got a stride of -128"),
        ({"threshold": -0.5}, "threshold: got -0.5"),
        ({"threshold": math.nan}, "threshold: got nan"),
        ({"thresholds": TAUS + 2}, "thresholds, lse, mask: want addresses"),
        ({"lse": LSE + 1}, "thresholds, lse, mask: want addresses"),
        ({"workspace": 0}, "workspace: got the address 0x0"),
        ({"workspace": WORKSPACE + 64}, "workspace: got the address 0x"),
        ({"workspace_bytes": 100}, "workspace_bytes: got 100; wants at least"),
    ),
)
def test_bad_calls_launch_nothing(hopper, changes, match):
    call = call_of(Case(), 128)
    call.workspace_bytes = hopper.workspace_bytes(call)
    for path, value in changes.items():
        *parents, name = path.split(".")
        setattr(getattr(call, parents[0]) if parents else call, name, value)
    status, text, launched = hopper.run(call)
    assert status == ARGUMENT and match in text and not launched
    assert hopper.visit(call)[0] == ARGUMENT
    if "problem" in next(iter(changes)):
        assert hopper.workspace_bytes(call) == 0
        assert hopper.library.salekit_mask_words(ctypes.byref(call.problem)) == 0


def test_errors_need_no_room(hopper):
    call = call_of(Case(batch=-1), 128)
    assert hopper.library.salekit_sparse_attention(hopper.context, ctypes.byref(call), None, None) == ARGUMENT
    for context, given, name in ((None, ctypes.byref(call), b"context"), (hopper.context, None, b"call")):
        text = ctypes.create_string_buffer(512)
        assert hopper.library.salekit_sparse_attention(context, given, None, text) == ARGUMENT
        assert text.value.startswith(name + b": got NULL; wants ")


def test_low_bits_want_hopper(library, folder):
    host = Host(library, "sm_80_d128_bf16", folder, "sm_80")
    call = call_of(Case(attend="int8-fp8"), 128)
    status, text, launched = host.run(call)
    assert status == ARGUMENT and "these kernels are for sm_80, 128" in text and not launched
    host.close()


def test_kernels_that_are_not_there(library, folder):
    host = Host(library, "only", folder, "sm_90a")
    for case, name in (
        (Case(estimator="int4"), "quantize_int4_q"),
        (Case(estimator="int8-sp24"), "quantize_int8_sparse"),
        (Case(block=(64, 32)), "estimate_int8_sm90<@H, 64, false>"),
        (Case(block=(128, 64)), "coarsen_mask<2>"),
    ):
        call = call_of(case, 128)
        call.workspace_bytes = host.workspace_bytes(call)
        status, text, launched = host.run(call)
        assert status == MISSING and name in text and "export" in text and not launched
    host.close()


def test_only_its_gpus_load(library, folder):
    context = ctypes.c_void_p(1)
    modules = ctypes.c_int.in_dll(library, "fake_modules")
    before = modules.value

    def load(tag, major, minor, where=folder):
        for name, value in (("major", major), ("minor", minor)):
            ctypes.c_int.in_dll(library, f"fake_{name}").value = value
        return Host.check(library.salekit_load, ctypes.byref(context), table(library, tag), bytes(where))

    for tag, capability, good in (
        ("sm_90a_d128_bf16", (9, 0), True),
        ("sm_90a_d128_bf16", (8, 9), False),
        ("sm_90a_d128_bf16", (10, 0), False),
        ("sm_80_d128_bf16", (8, 0), True),
        ("sm_80_d128_bf16", (8, 6), True),
        ("sm_87_d128_bf16", (8, 7), True),
        ("sm_87_d128_bf16", (8, 9), False),
        ("sm_80_d128_bf16", (8, 7), False),  # of Jetson's: other GPUs' code is not for it
        ("sm_89_d128_bf16", (8, 6), False),
        ("sm_80_d128_bf16", (9, 0), False),
        ("sm_120a_d128_bf16", (12, 1), False),
    ):
        status, text = load(tag, *capability)
        assert status == (OK if good else GPU) and bool(context.value) == good
        assert good or f"capability {capability[0]}.{capability[1]}" in text
        library.salekit_free(context)
    status, text = load("sm_90a_d128_bf16", 9, 0, folder / "elsewhere")
    assert status == FILE and "elsewhere/cubins/0.cubin: cannot be loaded: CUDA_ERROR_FILE_NOT_FOUND" in text
    has_context = ctypes.c_int.in_dll(library, "fake_has_context")
    has_context.value = 0
    status, text = load("sm_90a_d128_bf16", 9, 0)
    has_context.value = 1
    assert status == GPU and "no CUDA context" in text and not context.value
    library.salekit_free(None)
    assert modules.value == before


def test_the_drivers_errors_end_a_call(hopper):
    call = call_of(Case(2000, 2000), 128)
    call.workspace_bytes = hopper.workspace_bytes(call)
    refuse = LAUNCH_HOOK(lambda *_: 1)
    ctypes.c_void_p.in_dll(hopper.library, "fake_launch").value = ctypes.cast(refuse, ctypes.c_void_p).value
    status, text, launched = hopper.run(call)
    assert status == CUDA and "reduce_channels<128, BFloat16> failed with CUDA_ERROR_INVALID_VALUE (1)" in text
    assert not launched


@pytest.mark.parametrize("layout", ("bshd", "bhsd"))
@pytest.mark.parametrize("seqlen_q", (1, 77))
def test_a_call_without_keys(hopper, layout, seqlen_q):
    case = Case(seqlen_q, 0, batch=2, layout=layout, gaps=(8, 0, 16))
    batch, row, head = case.strides("out", 128)
    memory = np.full(2 * batch, 0x7F7F, np.uint16)
    lse = np.full(2 * case.heads * seqlen_q, 7, np.float32)
    start = -memory.ctypes.data % 16 // 2
    call = call_of(case, 128)
    call.out.pointer = memory[start:].ctypes.data
    call.lse, call.mask = lse.ctypes.data, MASK
    status, text, launched = hopper.run(call)
    assert status == OK and not launched and hopper.workspace_bytes(call) == 0
    out = np.lib.stride_tricks.as_strided(memory[start:], (2, seqlen_q, 4, 128), (2 * batch, 2 * row, 2 * head, 2))
    assert not out.any() and (memory == 0x7F7F).sum() == memory.size - out.size and np.isneginf(lse).all()


@pytest.mark.parametrize("changes", ({"seqlen_q": 0}, {"batch": 0}, {"seqlen_q": 0, "seqlen_k": 0}))
def test_a_call_without_rows(hopper, changes):
    call = call_of(Case(**changes, return_lse=True, return_mask=True), 128)
    for name in ("q", "out"):
        getattr(call, name).pointer = 0
    status, text, launched = hopper.run(call)
    assert (status, launched) == (OK, []), text


# --- the export itself -------------------------------------------------------------------------------------------
def compile_nothing(folder):
    """What replaces ``jit.compile_kernel``: a kernel's cubin is its name."""

    def compile_kernel(spec, arch, cache=True):
        path = folder / f"{abs(hash(spec))}.fake"
        info = jit.KernelInfo(32, 16, 0, 0, 0, 0, (), 0.0)
        return jit.Compiled(path, spec.expression, info, spec.expression.encode())

    return compile_kernel


@pytest.fixture
def uncompiled(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "compile_kernel", compile_nothing(tmp_path))


def run_cli(*arguments):
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_what_export_writes(uncompiled, tmp_path):
    folder = tmp_path / "out"
    result = run_cli("--arch", "sm_90a", "--head-dim", 64, "--dtype", "fp16", "-o", folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "salekit_sm_90a_d64_fp16.json").read_text())
    assert (report["arch"], report["head_dim"], report["dtype"]) == ("sm_90a", 64, "float16")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(report["files"])
    for kernel in report["kernels"]:
        assert (folder / kernel["file"]).read_bytes() == kernel["name"].encode()
    assert report["records"]["salekit_shape"]["fields"][:2] == [["batch", "int32", 0], ["seqlen_q", "int32", 4]]
    header = (folder / "salekit_sm_90a_d64_fp16.h").read_text()
    for source in {kernel["name"].partition("<")[0] for kernel in report["kernels"]}:
        assert f"\n// {source}(" in header
    assert not [path for path in folder.iterdir() if path.is_file() and "@TAG@" in path.read_text()]


def test_only_a_new_folder_is_written_to(uncompiled, tmp_path):
    folder = tmp_path / "out"
    arguments = ("--arch", "sm_80", "-o", folder)
    assert run_cli(*arguments, "--estimator", "int4", "--block", "64x32").exit_code == 0
    first = {path for path in folder.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)])
    assert isinstance(result.exception, ArgumentError) and "--force" in str(result.exception)
    assert {path for path in folder.rglob("*") if path.is_file()} == first
    (folder / "notes.txt").write_text("mine")
    assert run_cli(*arguments, "--estimator", "int8", "--dtype", "fp16", "--force").exit_code == 0
    names = {path.name for path in folder.rglob("*")}
    assert "notes.txt" in names and "salekit_sm_80_d128_bf16.h" not in names
    assert not [name for name in names if "int4" in name] and "salekit_sm_80_d128_fp16.h" in names
    (folder / "salekit_sm_80_d128_fp16.json").write_text('{"kind": "salekit-export", "files": ["../else"]}')
    result = run_cli(*arguments, "--force")
    assert isinstance(result.exception, FileFormatError) and "outside" in str(result.exception)
    (tmp_path / "file").touch()
    assert run_cli("--arch", "sm_80", "-o", tmp_path / "file").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    (
        (),
        ("--arch", "sm_70"),
        ("--arch", "sm_80", "--head-dim", "100"),
        ("--arch", "sm_80", "--dtype", "float32"),
        ("--arch", "sm_80", "--block", "32x32"),
        ("--arch", "sm_80", "--estimator", "auto"),
    ),
)
def test_usage_errors(arguments, tmp_path):
    assert run_cli(*arguments, "-o", tmp_path / "out").exit_code == 2 and not (tmp_path / "out").exists()


def test_targets_are_checked():
    good = {"arch": "sm_80", "head_dim": 64, "dtype": "float16"}
    changes = {"arch": "sm_70", "head_dim": 63, "dtype": "float32", "estimators": (), "blocks": ((1, 1),)}
    for name, bad in changes.items():
        with pytest.raises(ArgumentError, match=name):
            export.Target(**{**good, name: bad})


SHAPE_NAMES = export.SHAPE_RECORD.names


@pytest.mark.parametrize(
    "names, match",
    (
        ((*SHAPE_NAMES, "another"), "salekit_shape"),
        (SHAPE_NAMES[:-1], "salekit_shape is not what the kernels take"),
        ((SHAPE_NAMES[1], SHAPE_NAMES[0], *SHAPE_NAMES[2:]), "salekit_shape is not what the kernels take"),
    ),
)
def test_records_that_differ_do_not_compile(tmp_path, monkeypatch, names, match):
    monkeypatch.setitem(export.RECORDS, "salekit_shape", np.dtype([(name, "<i4") for name in names]))
    (tmp_path / "table.h").write_text(export.header(ONLY_INT8, fake_kernels(ONLY_INT8)))
    source = tmp_path / "table.c"
    source.write_text('#include "table.h"\n')
    with pytest.raises(AssertionError, match=match):
        includes = (f"-I{FAKE}", f"-I{jit.source_root() / 'host'}")
        run_compiler("-std=c11", *includes, "-c", source, "-o", tmp_path / "table.o")


# --- the C++ program ---------------------------------------------------------------------------------------------
def load_example():
    path = ROOT / "examples" / "cpp_driver_api" / "run.py"
    spec = importlib.util.spec_from_file_location("cpp_driver_api", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(the example's functions, its program with the fake driver, the export's folder)."""
    if not (shutil.which("cc") and shutil.which("c++")):
        pytest.skip("no cc and c++")
    example, folder = load_example(), tmp_path_factory.mktemp("program")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "compile_kernel", compile_nothing(folder))
        export.export(folder / "export", export.Target("sm_90a", 64, "float16", ("int8",), ((128, 32),)))
    run_compiler("-std=c11", f"-I{FAKE}", "-c", FAKE / "fake_cuda.c", "-o", folder / "driver.o")
    program = example.build(folder / "export", folder / "build", FAKE, [folder / "driver.o"])
    return example, program, folder / "export"


def small_input(example, path, seqlen_q=300, seqlen_k=400, head_dim=64):
    sizes = ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
    arrays = [np.full((2, rows, heads, head_dim), 0.5, np.float16) for rows, heads in sizes]
    example.write_input(path, *arrays)
    return path


def test_the_program_runs(program, tmp_path):
    example, path, folder = program
    given = small_input(example, tmp_path / "input.bin")
    words = example.program_options(thresholds=[0.1, 0.2, 0.3, 0.4], dense_below=0, query_stride=2)
    for extra in ([], ["--bhsd"], ["--graph", "--repeat", "3"]):
        (out, lse, mask), text = example.run_program(path, folder, given, [*words, *extra])
        assert (len(out), len(lse), len(mask)) == (2 * 300 * 4 * 64 * 2, 2 * 4 * 300 * 4, 2 * 4 * 3 * 4)
        assert set(out + lse + mask) == {0x7F}  # kernels do nothing here: nothing else wrote
        assert text.startswith("batch 2, 300 rows x 400 keys, 4 and 2 heads: 1.000 ms, host ")
    text = example.run_program(path, folder, given, [*words, "--launches"])[1]
    names = [line.partition(":")[0] for line in text.splitlines()[:-1]]
    assert names[0] == "reduce_channels<64, Half>" and names[-1] == "attend_sm90<64, Half, 128, false>"
    assert "grid 24 x 1 x 1, 384 threads" in text
    (out, lse, mask), _ = example.run_program(path, folder, small_input(example, given, 77, 0), words)
    assert not any(out) and np.isneginf(np.frombuffer(lse, np.float32)).all() and mask == b""


@pytest.mark.parametrize(
    "words, match",
    (
        (["--tau"], "usage"),
        (["--nothing", "1"], "usage"),
        (["--block", "abc"], "usage"),
        (["--estimator", "int2"], "--estimator: got int2"),
        (["--attend", "fp8"], "--attend: got fp8"),
        (["--estimator", "int4"], "the call needs quantize_int4_q"),
        (["--taus", "0.1,0.2"], "--taus: wants a number for each head"),
        (["--tau", "-1"], "threshold: got -1"),
        (["--query-stride", "5"], "query_stride: got 5"),
        (["--device", "7"], "cuDeviceGet failed with CUDA_ERROR_INVALID_VALUE"),
    ),
)
def test_bad_options_of_the_program(program, tmp_path, words, match):
    example, path, folder = program
    with pytest.raises(RuntimeError, match=re.escape(match)):
        example.run_program(path, folder, small_input(example, tmp_path / "input.bin"), ["--dense-below", "0", *words])


def test_bad_files_of_the_program(program, tmp_path):
    example, path, folder = program
    given = tmp_path / "input.bin"
    good = small_input(example, given).read_bytes()
    for data, match in (
        (b"", "is no input file"),
        (b"\0" * 64, "is no input file"),
        (good[:-1], "is cut short"),
        (good[:16] + (2**31).to_bytes(4, "little") + good[20:], "has a negative size"),
        (small_input(example, given, head_dim=128).read_bytes(), "has another head_dim"),
    ):
        given.write_bytes(data)
        with pytest.raises(RuntimeError, match=match):
            example.run_program(path, folder, given, [])
    with pytest.raises(RuntimeError, match="cannot be read"):
        example.run_program(path, folder, tmp_path / "missing.bin", [])
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        example.run_program(path, tmp_path, small_input(example, given), [])


def test_the_example_needs_a_gpu():
    from conftest import gpu_problem

    if not gpu_problem():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "examples" / "cpp_driver_api" / "run.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 3 and result.stderr.startswith("run.py: error: ") and not result.stdout


def test_the_drivers_own_header(tmp_path):
    header = next((Path(x) for x in ("/usr/local/cuda/include", "/usr/include") if (Path(x) / "cuda.h").exists()), None)
    if header is None:
        pytest.skip("no cuda.h")
    host = jit.source_root() / "host"
    run_compiler("-std=c11", f"-isystem{header}", "-c", host / "salekit.c", "-o", tmp_path / "salekit.o")
