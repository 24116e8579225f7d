"""Programs, workspaces and plans without a GPU: launches are recorded and linked for real, a fake driver takes them."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

import salekit  # noqa: E402
from salekit import arrays, attention_plan, call_checks, graphs, jit, pipeline, programs, tensor_map, workspaces  # noqa: E402
from salekit.errors import ArgumentError, GpuError  # noqa: E402
from salekit.programs import Parameter, Program, Recorder  # noqa: E402

FP16 = np.dtype(np.float16)
STREAM = 0x5000
Q, K, V, OUT, LSE, WORDS, TAUS, WORKSPACE = (0x7F00_0000_0000 + (i << 34) for i in range(8))  # 16 GiB each


def gpu_array(address, shape, dtype=FP16, strides=None):
    """A CuPy array at an address that is only looked at."""
    memory = cupy.cuda.UnownedMemory(address, 1 << 33, None, 0)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


class FakeGpu:
    """Collects what a program launches: (name, grid, block, shared bytes, arguments as bytes) or a fill."""

    handles = itertools.count(1)
    functions: dict = {}
    make_graph = None

    def __init__(self):
        self.calls = []

    def launch(self, function, gx, gy, gz, bx, by, bz, shared_bytes, stream, params, extra):
        name, sizes = self.functions[function]
        pointers = (ctypes.c_uint64 * len(sizes)).from_address(params)
        args = tuple(ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes))
        assert stream == STREAM and extra == 0
        self.calls.append((name, (gx, gy, gz), (bx, by, bz), shared_bytes, args))

    def fill(self, address, value, num_bytes, stream):
        assert stream == STREAM
        self.calls.append(("memset", address, value, num_bytes))

    def graph(self, program, stream):
        return self.make_graph and self.make_graph(program)

    def replay(self, executable, stream):
        assert stream == STREAM
        self.calls += executable

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def size_of(arg):
    if isinstance(arg, programs.Deferred):
        return arg.num_bytes
    if isinstance(arg, Parameter):
        return 4 * arg.count
    return arg.nbytes if isinstance(arg, (np.generic, np.ndarray)) else 8


def note(name, args, grid=(1,), block=(32,), shared_bytes=0):
    handle = next(FakeGpu.handles)
    FakeGpu.functions[handle] = (name, [size_of(arg) for arg in args])
    programs.active().launch(SimpleNamespace(ptr=handle), grid, block, shared_bytes, args)


def pointer(data):
    return int.from_bytes(data, "little")


@pytest.fixture
def fake(monkeypatch):
    """No GPU, but a plan of one can be made, recorded, linked and submitted."""
    gpu = FakeGpu()
    monkeypatch.setattr(programs, "Gpu", lambda: gpu)
    monkeypatch.setattr(jit, "device_arch", lambda: "sm_90a")
    monkeypatch.setattr(jit, "multiprocessors", lambda: 132)

    def get_kernel(spec, arch=None):
        return lambda grid, block, args: note(spec.expression, args, grid, block, 1000)

    for module in (jit, pipeline):
        monkeypatch.setattr(module, "get_kernel", get_kernel)

    def encode(target, dtype, rank, address, *rest):
        assert target.value % 64 == 0 and len(rest) == 8
        ctypes.memmove(target.value, np.array([address.value] * 16, np.uint64).tobytes(), 128)
        return 0

    def replace(target, address):
        assert ctypes.string_at(target + 8, 8) == ctypes.string_at(target + 120, 8) != bytes(8)
        ctypes.memmove(target, np.array([address], np.uint64).tobytes(), 8)
        return 0

    monkeypatch.setattr(tensor_map, "_driver", {"EncodeTiled": encode, "ReplaceAddress": replace}.get)
    return gpu


def inputs(seqlen=2000, heads=4, kv_heads=2, head_dim=128, base=0):
    return [
        gpu_array(address + base, (1, seqlen, count, head_dim))
        for address, count in ((Q, heads), (K, kv_heads), (V, kv_heads))
    ]


# --- programs ----------------------------------------------------------------------------------------------------
def test_arguments_are_linked():
    gpu = FakeGpu()
    record = np.array([(3, 4)], np.dtype([("a", "<i4"), ("b", "<i8")]))
    with Recorder(0) as recorder:
        x = recorder.array((4, 8, 2, 64), FP16, (8192, 128, 64 * 1024, 2))
        temporary = arrays.empty((100,), np.float32)
        result = arrays.empty((10, 10), np.float32)
        note("first", (x, temporary, np.int32(7), record, np.float64(0.5), np.bool_(True)), (3, 2), (64, 2), 99)
        note(
            "second", (arrays.tensor_view(x[1:]), temporary[10:], result, np.uint64(0), np.uint64(x.data.ptr + 6)), (5,)
        )
    program = Program(recorder, [x, result])
    assert program.workspace_bytes == 512
    for base in (0, 1 << 20):
        program.link(WORKSPACE + base, Q + base, OUT)
        program.submit(gpu, STREAM)
        first, second = gpu.take()
        assert first[:4] == ("first", (3, 2, 1), (64, 2, 1), 99)
        assert [pointer(x) for x in first[4][:2]] == [Q + base, WORKSPACE + base]
        assert first[4][2:] == (np.int32(7).tobytes(), record.tobytes(), np.float64(0.5).tobytes(), b"\x01")
        assert second[:3] == ("second", (5, 1, 1), (32, 1, 1))
        view = np.frombuffer(second[4][0], arrays.TENSOR_VIEW)[0]
        assert tuple(view) == (Q + base + 8192, 4096, 64, 32 * 1024)
        assert [pointer(x) for x in second[4][1:]] == [WORKSPACE + base + 40, OUT, 0, Q + base + 6]


def test_views_before_the_start():
    gpu = FakeGpu()
    with Recorder(0) as recorder:
        x = recorder.array((8, 16), FP16)[::-1]
        note("kernel", (x, x[:, 3:]), (7,), (64,))
    program = Program(recorder, [recorder_start(recorder)])
    program.link(0, Q)
    program.submit(gpu, STREAM)
    ((name, grid, block, _, args),) = gpu.take()
    assert (grid, block) == ((7, 1, 1), (64, 1, 1))
    assert [pointer(a) for a in args] == [Q + 7 * 32, Q + 7 * 32 + 6]


def recorder_start(recorder):
    return SimpleNamespace(data=SimpleNamespace(ptr=recorder.symbols[0].address))


def test_parameters_and_fills():
    gpu = FakeGpu()
    with Recorder(0) as recorder:
        counters = arrays.zeros((6,), np.int32)
        scalar = programs.ScalarParameter()
        assert isinstance(scalar, float) and programs.float32(2.0) == np.float32(2)
        note("kernel", (programs.float32(scalar), counters, Parameter(3)))
        arrays.zeros((0,), np.int32)
    program = Program(recorder, [])
    for value in (0.25, np.inf):
        program.link(WORKSPACE)
        program.write_values(np.array([value, value, 2, 3], np.float32))
        program.submit(gpu, STREAM)
        fill, (_, _, _, _, args) = gpu.take()
        assert fill == ("memset", WORKSPACE, 0, 24)
        assert args[0] == np.float32(value).tobytes() and pointer(args[1]) == WORKSPACE
        assert args[2] == np.array([value, 2, 3], np.float32).tobytes()


def test_a_graph_follows_the_arguments():
    class Graph:
        """Holds the bytes of the arguments at each operation's last update."""

        def __init__(self, program):
            self.versions, self.updates = list(program.versions), []
            self.executable = self.launches(program)

        def launches(self, program):
            gpu = FakeGpu()
            for function, arguments in program._calls_on(gpu, STREAM):
                function(*arguments)
            return gpu.calls

        def update(self, program):
            launches = self.launches(program)
            for index, version in enumerate(program.versions):
                if self.versions[index] != version:
                    self.executable[index], self.versions[index] = launches[index], version
                    self.updates.append(index)

    gpu = FakeGpu()
    gpu.make_graph = Graph
    with Recorder(0) as recorder:
        x, y = recorder.array((8,), FP16), recorder.array((8,), FP16)
        counters = arrays.zeros((6,), np.int32)
        note("first", (x, counters))
        note("second", (x, y, programs.ScalarParameter()))
        note("third", (counters, y))
    program = Program(recorder, [x, y])
    for base, other, value, updates in (
        (WORKSPACE, Q, 0.5, []),
        (WORKSPACE, Q, 0.5, []),
        (WORKSPACE, K, 0.5, [1, 2]),
        (WORKSPACE, K, 0.25, [2]),
        (WORKSPACE + 512, K, 0.25, [0, 1, 3]),
        (WORKSPACE, Q, 0.5, [0, 1, 2, 3]),
    ):
        program.link(base, other, V)
        program.write_values(value)
        program.submit(gpu, STREAM)
        replayed = gpu.take()
        graph = program._graphs[STREAM]
        assert graph.updates == updates
        graph.updates = []
        program.submit(gpu, STREAM, is_captured=True)  # the launches themselves
        assert (
            gpu.take()
            == replayed
            == [
                ("memset", base, 0, 24),
                ("first", (1, 1, 1), (32, 1, 1), 0, (as_bytes(other), as_bytes(base))),
                ("second", (1, 1, 1), (32, 1, 1), 0, (as_bytes(other), as_bytes(V), np.float32(value).tobytes())),
                ("third", (1, 1, 1), (32, 1, 1), 0, (as_bytes(base), as_bytes(V))),
            ]
        )


class FakeDriver:
    """The driver's functions that build and update graphs; handles are small numbers."""

    def __init__(self, error_in=None, status=700):
        self.log, self.handles, self.error_in, self.status = [], itertools.count(100), error_in, status

    def __call__(self, name):
        def function(*args):
            handle = next(self.handles)
            if name in ("cuGraphCreate", "cuCtxGetCurrent", "cuGraphInstantiateWithFlags") or "Add" in name:
                args[0]._obj.value = handle
            self.log.append((name, handle, args))
            return self.status if name == self.error_in else 0

        return function

    def take(self, part):
        found = [(name, handle, args) for name, handle, args in self.log if part in name]
        self.log = []
        return found


def small_program():
    with Recorder(0) as recorder:
        x = recorder.array((8,), FP16)
        counters = arrays.zeros((6,), np.int32)
        note("first", (x, counters), (2, 3), (64,), 77)
        note("second", (counters, np.int32(5)))
    program = Program(recorder, [x])
    program.link(WORKSPACE, Q)
    return program


def test_launch_graph(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(graphs, "_function", driver)
    program = small_program()
    graph = graphs.LaunchGraph(program)
    added = driver.take("Add")
    assert [name for name, _, _ in added] == ["cuGraphAddMemsetNode", *["cuGraphAddKernelNode_v2"] * 2]
    nodes = [handle for _, handle, _ in added]
    assert added[0][2][2] is None and [args[2]._obj.value for _, _, args in added[1:]] == nodes[:2]
    memset, first = added[0][2][4]._obj, added[1][2][4]._obj
    assert (memset.address, memset.value, memset.element_bytes, memset.width, memset.height) == (WORKSPACE, 0, 1, 24, 1)
    assert (list(first.grid), list(first.block), first.shared_bytes) == ([2, 3, 1], [64, 1, 1], 77)
    assert (first.function, first.params) == (program.operations[1].function, program.operations[1].params)

    program.link(WORKSPACE, K)
    graph.update(program)
    ((name, _, args),) = driver.take("Set")
    assert name == "cuGraphExecKernelNodeSetParams_v2" and args[:2] == (graph.executable, nodes[1])
    program.link(WORKSPACE + 512, K)
    graph.update(program)
    updates = driver.take("Set")
    assert [args[1] for _, _, args in updates] == nodes and len(updates[0][2]) == 4
    assert graph._updates[0][1].address == WORKSPACE + 512
    graph.update(program)
    assert driver.take("Set") == [] and graph.versions == program.versions
    del graph
    gc.collect()
    assert len(driver.take("Destroy")) == 2


def test_a_graph_that_finds_no_memory_is_tried_again(monkeypatch):
    """It is not given up, as where the driver has none: the call fails, and the next one makes it."""
    driver = FakeDriver("cuGraphInstantiateWithFlags", 2)
    monkeypatch.setattr(graphs, "_function", driver)
    gpu, program = FakeGpu(), small_program()
    replays = []
    gpu.graph = lambda program, stream: programs.Gpu.graph(gpu, program, stream)
    gpu.replay = lambda *launch: replays.append(launch)
    with pytest.raises(GpuError, match="cuGraphInstantiateWithFlags failed with CUDA error 2"):
        program.submit(gpu, STREAM)
    driver.error_in = None
    for _ in range(2):
        program.submit(gpu, STREAM)
    assert replays == [(program._graphs[STREAM].executable, STREAM)] * 2
    del program
    gc.collect()


@pytest.mark.parametrize("function", ["cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags"])
def test_without_graphs_kernels_are_launched(function, monkeypatch):
    monkeypatch.setattr(graphs, "_function", FakeDriver(function))
    with pytest.raises(GpuError, match=f"{function} failed with CUDA error 700"):
        graphs.LaunchGraph(small_program())
    assert programs.Gpu.graph(None, small_program(), STREAM) is None
    gpu = FakeGpu()
    program = small_program()
    for _ in range(2):
        program.submit(gpu, STREAM)
        assert [name for name, *_ in gpu.take()] == ["memset", "first", "second"]


def as_bytes(address):
    return address.to_bytes(8, "little")


def test_workspace_is_shared_by_what_is_not_in_use_together():
    with Recorder(0) as recorder:
        sizes = (1000, 5000, 3000, 700, 5000, 1, 512)
        x = [arrays.empty((size,), np.uint8) for size in sizes]
        for step in ((0, 1), (1, 2), (2, 3), (3, 4), (0, 5), (6,)):
            note("kernel", tuple(x[i] for i in step))
        arrays.empty((10**9,), np.uint8)  # never used
    program = Program(recorder, [])
    used = recorder.symbols[:-1]
    ends = [symbol.offset + symbol.num_bytes for symbol in used]
    assert max(ends) <= program.workspace_bytes <= 1024 + 5120 + 3072 + 1024 < sum(sizes)
    for a, b in itertools.combinations(range(len(used)), 2):
        one, two = used[a], used[b]
        if one.first <= two.last and two.first <= one.last:
            assert ends[a] <= two.offset or ends[b] <= one.offset
    assert all(symbol.offset % 512 == 0 for symbol in used)


def test_what_a_program_refuses():
    real = gpu_array(Q, (1, 8, 1, 64))
    for args, error, match in (
        ((real,), RuntimeError, "arrays.empty or arrays.zeros did not make"),
        ((3,), TypeError, "argument of int"),
        ((np.zeros(2, np.int32),), TypeError, "argument of ndarray"),
    ):
        with pytest.raises(error, match=match):
            with Recorder(0) as recorder:
                programs.active().launch(SimpleNamespace(ptr=1), (1,), (1,), 0, args)
            Program(recorder, [])
    with Recorder(0):
        for function in (arrays.tensor_view, lambda x: tensor_map.tensor_map(x, 32)):
            with pytest.raises(RuntimeError, match="did not make"):
                function(real)
        with pytest.raises(RuntimeError, match="already"):
            Recorder(0).__enter__()
        assert programs.active() is not None
    with pytest.raises(RuntimeError, match="more than"):
        with Recorder(0) as recorder:
            for _ in range(300):
                arrays.empty((1,))
    assert programs.active() is None
    assert arrays.tensor_view(real)["pointer"] == Q


def test_recording_is_this_thread_s_alone():
    seen = []
    with Recorder(0):
        thread = threading.Thread(target=lambda: seen.append(programs.active()))
        thread.start()
        thread.join()
    assert seen == [None]


# --- recently used, workspaces -----------------------------------------------------------------------------------
def test_recently_used():
    entries = workspaces.RecentlyUsed(3)
    for key in "abc":
        assert entries.add(key, key.upper()) == key.upper()
    assert entries.get("a") == "A" and entries.get("x") is None
    assert entries.add("a", "other") == "A"
    entries.add("d", "D")
    assert [entries.get(key) for key in "abcd"] == ["A", None, "C", "D"] and len(entries) == 3
    entries.clear()
    assert len(entries) == 0 and entries.values() == []


def test_workspace_reserves():
    made = []

    def allocate(num_bytes):
        made.append(num_bytes)
        if num_bytes > 1000:
            raise MemoryError
        return SimpleNamespace(data=SimpleNamespace(ptr=len(made) << 20))

    workspace = workspaces.Workspace()
    assert [workspace.reserve(n, allocate) for n in (10, 5, 10, 100, 20)] == [1 << 20] * 3 + [2 << 20] * 2
    assert made == [10, 100]
    with pytest.raises(MemoryError):
        workspace.reserve(2000, allocate)
    assert workspace.reserve(5, allocate) == 4 << 20  # the old memory is gone: it was given up first
    workspace.clear()
    assert workspace.reserve(5, allocate) == 5 << 20


def test_workspace_of_a_stream():
    salekit.clear_workspaces()
    of_stream = workspaces.of_stream
    assert of_stream(0, 0) is of_stream(0, 1) is not of_stream(1, 0)
    assert of_stream(0, STREAM) is of_stream(0, STREAM) is not of_stream(1, STREAM)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.extend((of_stream(0, 2), of_stream(0, STREAM))))
    thread.start()
    thread.join()
    assert elsewhere[0] is not of_stream(0, 2) is of_stream(0, 2)  # cudaStreamPerThread is another one in each thread
    assert elsewhere[1] is of_stream(0, STREAM)
    kept = of_stream(0, STREAM)
    for stream in range(100, 100 + workspaces.MAX_WORKSPACES):
        of_stream(0, stream)
    assert of_stream(0, STREAM) is not kept
    salekit.clear_workspaces()
    assert len(workspaces._workspaces) == 0
    assert not workspaces.is_capturing(0) and not workspaces.is_capturing(1)


def test_use_of_given_memory():
    used = []
    for is_captured in (False, True):
        workspaces.use(0, STREAM, is_captured, 0, None, used.append)
        workspaces.use(0, STREAM, is_captured, 100, gpu_array(WORKSPACE, (100,)), used.append)
    assert used == [0, WORKSPACE] * 2 and len(workspaces._workspaces) == 0


# --- plans -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("estimator", ["int4", "int8", "int8-sp24"])
@pytest.mark.parametrize("block", [(64, 32), (128, 32), (128, 128)])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_whole_call_is_recorded(fake, monkeypatch, estimator, block, layout):
    q, k, v = inputs()
    options = {"estimator": estimator, "block": block, "dense_below": 0}
    prepared = attention_plan.AttentionPlan(q, k, v, layout, options)
    program = prepared._program((None, "scalar", True, True))
    addresses = (Q, K, V, OUT, LSE, WORDS)
    for base in (0, 4096):
        program.link(WORKSPACE + base, *(x + base for x in addresses))
        program.write_values(0.125 + base)
        program.submit(fake, STREAM)
        calls = [call for call in fake.take() if len(call) == 5]  # without a fill: the counter of attend_sm90
        names = [name.split("<")[0] for name, *_ in calls]
        assert names[0] == "reduce_channels" and names[-1].startswith("attend_") and "row_limits" in names
        assert ("coarsen_mask" in names) == (block[1] > 32)
        used = set()
        for name, grid, block_threads, shared_bytes, args in calls:
            assert shared_bytes == 1000 and min(*grid, *block_threads) > 0
            for arg in args:
                word = pointer(arg[:8]) if len(arg) in (8, 32, 128) else 0
                assert word >> 48 != 0x7FF5, name
                if word >> 40 == 0x7F:
                    assert word >= Q + base
                    used.add(min((Q, K, V, OUT, LSE, WORDS, WORKSPACE), key=lambda a: (word < a, word - a)))
        assert used == {*addresses, WORKSPACE}
        limits = next(args for name, _, _, _, args in calls if name.startswith("row_limits"))
        assert limits[5] == np.float32(0.125 + base).tobytes()
    assert prepared.plan.block_q == block[0]
    without = prepared._program((None, "scalar", False, False))
    words = np.prod(prepared.plan.words_shape) * 4
    assert 0 <= without.workspace_bytes - program.workspace_bytes <= words + 512
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: nullcontext())
    for kind in ("scalar", "host", "device"):
        assert prepared._program((None, kind, True, False)).workspace_bytes <= prepared.workspace_bytes


def test_what_calls_with_other_thresholds_launch(fake):
    q, k, v = inputs(heads=600, kv_heads=1, head_dim=64)
    prepared = attention_plan.AttentionPlan(q, k, v, "bshd", {"dense_below": 0})
    taus = np.arange(600, dtype=np.float32)

    program = prepared._program((None, "host", False, False))
    program.link(WORKSPACE, Q, K, V, OUT)
    program.write_values(taus)
    program.submit(fake, STREAM)
    stores = [call[-1] for call in fake.take() if call[0].startswith("store_floats")]
    start = pointer(stores[0][0])
    got = np.zeros(600, np.float32)
    for target, values, count in stores:
        count, first = pointer(count), (pointer(target) - start) // 4
        got[first : first + count] = np.frombuffer(values, np.float32)[:count]
    assert len(stores) == 3 and (got == taus).all()

    program = prepared._program((None, "device", False, False))
    program.link(WORKSPACE, Q, K, V, OUT, TAUS)
    program.submit(fake, STREAM)
    limits = next(call[-1] for call in fake.take() if call[0].startswith("row_limits"))
    assert pointer(limits[4]) == TAUS and not program.parameters

    for thresholds, addresses in (("host", ()), ("device", (TAUS,)), ("dense", ())):
        program = prepared._program((None, thresholds, False, False, "host"))
        program.link(WORKSPACE, Q, K, V, OUT, *addresses)
        program.write_values(taus)
        for sinks in (taus - 7, taus + 1):
            program.write_values(sinks, 1)
            program.submit(fake, STREAM)
            calls = fake.take()
            stores = [call[-1] for call in calls if call[0].startswith("store_floats")]
            stored = {pointer(target): np.frombuffer(values, np.float32) for target, values, _ in stores}
            users = [call for call in calls if call[0].startswith(("anchor_statistics<", "attend_sm"))]
            at = {pointer(call[-1][-1 if call[0].startswith("attend") else -2]) for call in users}
            assert len(users) == (1 if thresholds == "dense" else 2) and len(at) == 1
            assert (np.concatenate([stored[min(at) + 1024 * i] for i in range(3)])[:600] == sinks).all()
        program = prepared._program((None, thresholds, False, False, "device"))
        program.link(WORKSPACE, Q, K, V, OUT, *addresses, TAUS + 4096)
        program.submit(fake, STREAM)
        attends = [call[-1] for call in fake.take() if call[0].startswith("attend_sm")]
        assert [pointer(args[-1]) for args in attends] == [TAUS + 4096]

    program = prepared._program((None, "dense", False, True))
    assert program.workspace_bytes == 512  # the counter of attend_sm90
    program.link(WORKSPACE, Q, K, V, OUT, WORDS)
    program.submit(fake, STREAM)
    fill, attend, visible = fake.take()
    assert fill == ("memset", WORKSPACE, 0, 4) and attend[0].startswith("attend_")
    assert visible[0] == "fill_visible" and pointer(visible[4][0]) == WORDS


def test_out_with_strides(fake):
    q, k, v = inputs()
    prepared = attention_plan.AttentionPlan(q, k, v, "bshd", {})
    strides = (10**6, 2048, 512, 2)
    program = prepared._program(((FP16, q.shape, strides), "dense", False, False))
    program.link(0, Q, K, V, OUT)
    program.submit(fake, STREAM)
    (call,) = fake.take()
    views = [np.frombuffer(arg, arrays.TENSOR_VIEW)[0] for arg in call[4] if len(arg) == 32]
    assert (OUT, 500_000, 1024, 256) in [tuple(map(int, view)) for view in views]


def test_forgotten_parameter_is_found(fake, monkeypatch):
    prepared = attention_plan.AttentionPlan(*inputs(), "bshd", {"dense_below": 0})
    monkeypatch.setattr(programs, "float32", np.float32)
    with pytest.raises(RuntimeError, match="do not take the thresholds"):
        prepared._program((None, "scalar", False, False))


def test_keys(fake):
    q, k, v = inputs()
    base = {"causal": True, "block": (128, 32), "query_stride": 1, "softmax_scale": None}
    key = attention_plan._key(q, k, v, "bshd", base)
    assert key == attention_plan._key(*inputs(base=4096), "bshd", dict(base))
    hash(key)
    for change in (
        {"causal": 1},
        {"causal": np.True_},
        {"query_stride": 1.0},
        {"query_stride": True},
        {"block": (128.0, 32)},
        {"softmax_scale": 0.1},
        {"block": (64, 32)},
    ):
        assert attention_plan._key(q, k, v, "bshd", {**base, **change}) != key
    assert attention_plan._key(q, k, v, "bhsd", base) != key
    assert attention_plan._key(q, k, inputs(seqlen=1999)[2], "bshd", base) != key
    wide = gpu_array(V, (1, 2000, 2, 128), FP16, (10**6, 1024, 256, 2))
    assert attention_plan._key(q, k, wide, "bshd", base) != key
    assert attention_plan._key(q, k, v.view(np.dtype(np.int16)), "bshd", base) != key


def test_remembered_plans(fake):
    attention_plan._plans.clear()
    q, k, v = inputs()
    first = attention_plan.plan_of(q, k, v, "bshd", {"block": (128, 32)})
    assert attention_plan.plan_of(*inputs(base=256), "bshd", {"block": (128, 32)}) is first
    listed = attention_plan.plan_of(q, k, v, "bshd", {"block": [128, 32]})
    assert attention_plan.plan_of(q, k, v, "bshd", {"block": [128, 32]}) is listed
    assert len(attention_plan._plans) == 2
    for bad in ({"block": [128.0, 32]}, {"causal": 1}, {"block": 3}, {"block": None}):
        with pytest.raises(ArgumentError):
            attention_plan.plan_of(q, k, v, "bshd", bad)
    assert len(attention_plan._plans) == 2
    attention_plan._plans.clear()


def test_a_plan_takes_what_it_was_made_for(fake):
    q, k, v = inputs()
    prepared = attention_plan.AttentionPlan(q, k, v, "bshd", {})
    prepared._check_kind(*inputs(base=1 << 20))
    with pytest.raises(ArgumentError, match=r"q: got dtype float16, shape \(1, 1999, 4, 128\).* this plan is for"):
        prepared._check_kind(inputs(seqlen=1999)[0], k, v)
    with pytest.raises(ArgumentError, match="v: got seqlen 1999"):
        prepared._check_kind(q, k, inputs(seqlen=1999)[2])


def test_out_that_shares_memory(fake):
    """Found by addresses, extents and strides; an out between the rows, or the heads, of others is fine."""
    prepared = attention_plan.AttentionPlan(*inputs(), "bshd", {})
    nbytes, row = 2000 * 4 * 128 * 2, 4 * 128 * 2

    def check(prepared, given, out):
        return prepared._check(*given, 0.0, False, False, out, None)

    for given, name in zip(inputs(), "qkv"):
        for away in (0, 16, -16, row, given.nbytes - 16, 16 - nbytes):
            with pytest.raises(ArgumentError, match=f"^out: shares memory with {name}; wants memory of its own"):
                check(prepared, inputs(), gpu_array(given.data.ptr + away, (1, 2000, 4, 128)))
        for away in (given.nbytes, -nbytes):
            check(prepared, inputs(), gpu_array(given.data.ptr + away, (1, 2000, 4, 128)))
    strides = (2000 * 16 * 256, 16 * 256, 256, 2)  # 16 heads a row
    sizes = ((0, 4), (4, 2), (6, 2))
    fused = [gpu_array(Q + first * 256, (1, 2000, heads, 128), FP16, strides) for first, heads in sizes]
    wide = attention_plan.AttentionPlan(*fused, "bshd", {})
    for first in (-4, 8, 12):
        check(wide, fused, gpu_array(Q + first * 256, (1, 2000, 4, 128), FP16, strides))
    for first, name in ((-3, "q"), (3, "q"), (5, "k"), (7, "v"), (13, "q")):
        with pytest.raises(ArgumentError, match=f"^out: shares memory with {name}"):
            check(wide, fused, gpu_array(Q + first * 256, (1, 2000, 4, 128), FP16, strides))
    backwards = [x[:, ::-1] for x in inputs()]
    turned = attention_plan.AttentionPlan(*backwards, "bshd", {})
    with pytest.raises(ArgumentError, match="^out: shares memory with k"):
        check(turned, backwards, gpu_array(K, (1, 2000, 4, 128)))


def test_check_workspace():
    good = gpu_array(WORKSPACE, (1024,), np.uint8)
    assert call_checks.check_workspace(good, 0, 1024) is good
    for bad, match in (
        (good[:1000], "got 1000 bytes; wants at least 1024"),
        (gpu_array(WORKSPACE + 8, (1024,), np.uint8), "an address 8 past"),
        (gpu_array(WORKSPACE, (2048,), np.uint8)[::2], "not contiguous"),
        (np.zeros(2000, np.uint8), "is on host memory"),
    ):
        with pytest.raises(ArgumentError, match=match):
            call_checks.check_workspace(bad, 0, 1024)


# --- the same objects on the twin --------------------------------------------------------------------------------
def test_plan_on_the_twin():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 300, h, 64)).astype(np.float16) for h in (2, 1, 1))
    prepared = salekit.plan(q, k, v, dense_below=0, block=(64, 32))
    assert isinstance(prepared, salekit.AttentionPlan) and prepared.workspace_bytes == 0
    options = {"thresholds": 0.2, "return_lse": True, "return_mask": True}
    got = prepared.run(q, k, v, **options)
    want = salekit.sparse_attention(q, k, v, dense_below=0, block=(64, 32), **options)
    assert got[0].tobytes() == want[0].tobytes() and got[1].tobytes() == want[1].tobytes()
    assert (got[2].words == want[2].words).all()
    with pytest.raises(ArgumentError, match="q: got .* this plan is for"):
        prepared.run(q[:, :200], k, v)
    with pytest.raises(ArgumentError, match="stream: "):
        prepared.run(q, k, v, stream=0)
