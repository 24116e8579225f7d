"""Launches one by one and NVTX ranges without a GPU: a fake driver takes them, fake events tell the time."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from salekit import arrays, jit, launches, nvtx, pipeline, programs, skipped_mass, tensor_map  # noqa: E402
from salekit.plans import Plan  # noqa: E402
from salekit.programs import Program, Recorder  # noqa: E402

STREAM = 0x5000


class FakeGpu:
    """A driver with a clock: each kernel takes as many milliseconds as its number among those of a call."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def launch(self, function, *arguments):
        self.log.append(function)
        self.now += 1.0

    def fill(self, *arguments):
        self.log.append("fill")
        self.now += 0.5

    def graph(self, program, stream):
        return SimpleNamespace(versions=list(program.versions), executable="graph")

    def replay(self, executable, stream):
        self.log.append(executable)


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    handles: dict = {}
    loaded: dict = {}

    def get_kernel(spec, arch=None):
        handle = handles.setdefault(spec, 1000 + len(handles))
        info = SimpleNamespace(registers=32, static_shared_bytes=0, dynamic_shared_bytes=0)
        loaded[handle] = (spec, SimpleNamespace(info=info, blocks_per_multiprocessor=lambda threads: 2048 // threads))
        return lambda grid, block, args: programs.active().launch(
            SimpleNamespace(ptr=handle), grid if isinstance(grid, tuple) else (grid,), block, 0, args
        )

    class Event:
        def record(self, stream=None):
            self.at = gpu.now
            gpu.now += 0.01

        def synchronize(self):
            pass

    class Stream:
        ptr = STREAM

        def synchronize(self):
            gpu.log.append("wait")

    for module in (jit, pipeline):
        monkeypatch.setattr(module, "get_kernel", get_kernel)
    monkeypatch.setattr(jit, "multiprocessors", lambda: 132)
    monkeypatch.setattr(jit, "loaded_kernels", lambda: loaded)
    monkeypatch.setattr(programs, "Gpu", lambda: gpu)
    monkeypatch.setattr(programs, "bind_context", lambda device: None)
    monkeypatch.setattr(tensor_map, "_driver", lambda name: lambda *arguments: 0)
    monkeypatch.setattr(cupy.cuda, "Event", Event)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda start, end: end.at - start.at)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", Stream)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy, "empty", lambda size, dtype: SimpleNamespace(data=SimpleNamespace(ptr=0x7F0000000000)))
    monkeypatch.setattr(launches, "l2_flush", lambda: lambda: gpu.log.append("flush"))
    return gpu


def inputs(plan):
    def array(address, rows, heads):
        memory = cupy.cuda.UnownedMemory(address << 34, 1 << 33, None, 0)
        shape = (plan.batch, rows, heads, plan.head_dim)
        return cupy.ndarray(shape, np.float16, cupy.cuda.MemoryPointer(memory, 0))

    return (
        array(1, plan.seqlen_q, plan.num_heads),
        array(2, plan.seqlen_k, plan.num_kv_heads),
        array(3, plan.seqlen_k, plan.num_kv_heads),
    )


def make_plan(seqlen=2048, heads=32, **options):
    return Plan(1, seqlen, seqlen, heads, 8, 128, "float16", 0.1, arch="sm_90a", dense_below=0, **options)


def test_launches_of_a_call(gpu):
    plan = make_plan()
    call = launches.launch_sparse(*inputs(plan), 0.008, plan)
    names = [(one.stage, one.spec.source if one.spec else "fill") for one in call.launches]
    assert names == [
        ("quantize", "reduce_channels"),
        ("quantize", "finish_channels"),
        ("quantize", "quantize_int8"),
        ("quantize", "quantize_int8"),
        ("anchors", "anchor_statistics_sm90"),
        ("anchors", "row_limits"),
        ("estimate", "estimate_int8_sm90"),
        ("attend", "fill"),
        ("attend", "attend_sm90"),
    ]
    last = call.launches[-1]
    assert (last.threads, last.grid, last.blocks_per_multiprocessor) == (384, (132, 1, 1), 5)
    assert call.launches[-2].fill_bytes == 4
    [counter, dense] = launches.launch_dense(*inputs(plan), plan).launches
    assert (counter.stage, dense.stage, dense.spec.source) == ("dense", "dense", "attend_sm90")


def test_each_launch_is_timed_after_a_flush_and_in_order(gpu):
    plan = make_plan()
    call = launches.launch_sparse(*inputs(plan), 0.008, plan)
    gpu.log.clear()
    timings = call.time_each()
    assert [round(timing.median_ms, 6) for timing in timings] == [1.01] * 7 + [0.51, 1.01]
    assert {timing.samples for timing in timings} == {5} and max(timing.spread for timing in timings) < 1e-9
    work = [entry for entry in gpu.log if entry not in ("flush", "wait")]
    assert len(work) == 6 * 9 and all(work[i] == work[i % 9] for i in range(len(work)))  # warm-up and five samples
    of_samples = gpu.log[9:]
    assert of_samples[0:18:2] == ["flush"] * 9 and "flush" not in of_samples[1:18:2] and of_samples[18] == "wait"


def test_a_trace_is_of_one_call_behind_others(gpu):
    plan = make_plan()
    call = launches.launch_sparse(*inputs(plan), 0.008, plan)
    gpu.log.clear()
    trace = call.trace()
    assert "flush" not in gpu.log
    assert len(trace.launches) == 9
    for (start, end), (later, _) in zip(trace.launches, trace.launches[1:]):
        assert 0 < start < end <= later
    ends = [end - start for start, end in trace.launches]
    assert ends == pytest.approx([1010.0] * 7 + [510.0, 1010.0])
    assert [span.name for span in trace.stages] == ["quantize", "anchors", "estimate", "attend"]
    times = [
        trace.whole.start_us,
        *itertools.chain(*((s.start_us, s.end_us) for s in trace.stages)),
        trace.whole.end_us,
    ]
    assert times == sorted(times)


def test_pools_in_turns_are_a_launch_of_each_kernel(gpu, monkeypatch):
    monkeypatch.setattr(skipped_mass, "POOL_BYTES", 5 << 20)
    plan = make_plan(4096, skipped="pool")
    turns = len(skipped_mass.turns(plan, 128))
    assert turns >= 3
    call = launches.launch_sparse(*inputs(plan), 0.008, plan)
    names = [(one.stage, one.spec.source) for one in call.launches[-5:]]
    assert names == [
        ("attend", "attend_sm90"),
        ("pool", "mean_queries"),
        ("pool", "measure_keys"),
        ("pool", "pool_skipped_sm90"),
        ("pool", "attend_pools"),
    ]
    rows, steps = len(call.launches), len(call.launches) + 2 * (turns - 1)
    gpu.log.clear()
    timings = call.time_each()
    assert [round(timing.median_ms, 6) for timing in timings[-5:]] == [1.01, 1.01, 1.01, *2 * [round(1.01 * turns, 6)]]
    assert len(timings) == rows and {timing.samples for timing in timings} == {5}
    launched = [entry for entry in gpu.log if entry not in ("flush", "wait")]
    assert len(launched) == 6 * steps and gpu.log.count("flush") == 5 * steps
    pool, attending = launched[steps - 2 : steps]
    assert launched[steps - 2 * turns : steps] == turns * [pool, attending] and pool != attending  # one after the other
    trace = call.trace()
    assert trace.order == [*range(rows - 2), *turns * [rows - 2, rows - 1]] and len(trace.launches) == steps
    assert [span.name for span in trace.stages] == ["quantize", "anchors", "estimate", "attend", "pool"]
    times = [time for launch in trace.launches for time in launch]
    assert times == sorted(times)
    # Neither joins what another stage, or another kernel, launched.
    assert len(launches.launch_dense(*inputs(plan), plan).launches) == 2


# --- NVTX ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def ranges(monkeypatch):
    """What NVTX is told, if it is on."""
    log: list = []

    def functions():
        return (lambda name: log.append(("push", name)), lambda: log.append(("pop",))) if nvtx.is_on() else None

    monkeypatch.delenv("SALEKIT_NVTX", raising=False)
    monkeypatch.setattr(nvtx, "functions", functions)
    return log


def record(gpu):
    with Recorder(0) as recorder:
        x = recorder.array((8,), np.float32)
        for stage, handle in (("first", 1), ("first", 2), ("second", 3), ("", 4)):
            with programs.stage(stage):
                recorder.launch(SimpleNamespace(ptr=handle), (1,), (32,), 0, (x,))
    program = Program(recorder, [x])
    program.link(0, 0x7F0000000000)
    return program


def test_without_nvtx_a_program_is_a_graph_and_says_nothing(gpu, ranges):
    assert not nvtx.is_on()
    program = record(gpu)
    program.submit(gpu, STREAM)
    assert gpu.log == ["graph"] and not ranges
    program.submit(gpu, STREAM, is_captured=True)
    assert gpu.log[1:] == [1, 2, 3, 4] and not ranges
    with programs.stage("outside"):
        assert not ranges


@pytest.mark.parametrize("value, is_on", (("1", True), ("0", False), ("", False)))
def test_the_environment_decides(gpu, ranges, monkeypatch, value, is_on):
    monkeypatch.setenv("SALEKIT_NVTX", value)
    assert nvtx.is_on() == is_on


@pytest.mark.parametrize("by_variable", (True, False))
def test_with_nvtx_stages_are_ranges_around_their_launches(gpu, ranges, monkeypatch, by_variable):
    gpu.log = ranges  # one list for all
    if by_variable:
        monkeypatch.setenv("SALEKIT_NVTX", "1")
        program = record(gpu)
    else:
        with nvtx.switched_on():
            program = record(gpu)
        assert not nvtx.is_on()
    want = [("push", "first"), 1, 2, ("pop",), ("push", "second"), 3, ("pop",), ("push", "salekit"), 4, ("pop",)]
    for captured in (False, True):
        ranges.clear()
        program.submit(gpu, STREAM, is_captured=captured)
        assert ranges == want


def test_a_range_ends_when_its_stage_fails(gpu, ranges):
    with nvtx.switched_on(), pytest.raises(ZeroDivisionError), programs.stage("stage"):
        1 / 0
    assert ranges == [("push", "stage"), ("pop",)]
    with pytest.raises(ZeroDivisionError), Recorder(0) as recorder:
        try:
            with programs.stage("stage"):
                1 / 0
        finally:
            assert recorder.stage == ""


def test_stages_that_run_by_themselves_are_ranges(ranges):
    """On the twin, too: the stages are the same lines."""
    import salekit

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 100, heads, 64)).astype(np.float16) for heads in (2, 1, 1))
    with nvtx.switched_on():
        salekit.sparse_attention(q, k, v, dense_below=0)
    names = [entry[1] for entry in ranges if entry[0] == "push"]
    assert names == ["quantize", "anchors", "estimate", "attend"] and ranges.count(("pop",)) == 4
    assert arrays.is_cuda(q) is False


def test_cupys_ranges_can_be_pushed(monkeypatch):
    """CuPy's own functions take these arguments; they do nothing where no profiler listens."""
    monkeypatch.setenv("SALEKIT_NVTX", "1")
    push, pop = nvtx.functions()
    push("stage")
    pop()
