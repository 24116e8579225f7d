"""Memory that runs out and forks, without a GPU: what the errors say, what is freed, what a child may do.

tests/test_gpu_resources.py has the same on a GPU that is really full.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from test_host_programs import TAUS, fake, gpu_array, inputs  # noqa: E402, F401

import salekit  # noqa: E402
from salekit import arrays, attention_plan, forks, jit, memory, merge, sequences, workspaces  # noqa: E402
from salekit.errors import DriverError, GpuError, OutOfMemoryError, SalekitError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CupysError = cupy.cuda.memory.OutOfMemoryError


@pytest.fixture
def device(monkeypatch):
    """A GPU of 80,000,000,000 bytes, 5,000,000 of them free."""
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (5_000_000, 80_000_000_000))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 3)
    pool = SimpleNamespace(free_bytes=lambda: 700, free_all_blocks=lambda: given_back.append(True))
    given_back: list[bool] = []
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    return given_back


def error_of_cuda(kind, status):
    """As CuPy raises them; their constructor asks the driver for a text, which is not here."""
    error = type(kind, (RuntimeError,), {})("CUDA's text")
    error.status = status
    return error


# --- the errors --------------------------------------------------------------------------------------------------
def test_what_says_that_memory_is_short():
    assert memory.is_short(CupysError(5, 6)) and memory.is_short(MemoryError())
    assert all(memory.is_short(error_of_cuda(kind, 2)) for kind in ("CUDADriverError", "CUDARuntimeError"))
    assert memory.is_short(DriverError("the update of a CUDA graph", 2))
    for other in (DriverError("it", 700), error_of_cuda("CUDADriverError", 700), ValueError(), RuntimeError()):
        assert not memory.is_short(other)
    assert not memory.is_short(OutOfMemoryError("said"))


def test_a_drivers_error_goes_to_another_process():
    error = pickle.loads(pickle.dumps(DriverError("the update of a CUDA graph", 2)))
    assert (str(error), error.status) == ("the update of a CUDA graph failed with CUDA error 2", 2)


def test_what_the_driver_has_no_room_for(device):
    """CuPy's pool gives back what it keeps, which the driver can use then; nobody knows how much it wanted."""
    def run():
        attempts.append(len(device))
        if len(attempts) < 2:
            return "done"
        raise DriverError("the update of a CUDA graph", 2)

    attempts: list[int] = []
    assert memory.once_more(run, 10**9, "a call", "Do less") == "done" and attempts == [1]
    said = "^out of memory on cuda:3: the driver has none to launch a call; .* free"
    with pytest.raises(OutOfMemoryError, match=said):
        memory.once_more(run, 10**9, "a call", "Do less")


def test_a_gpu_that_has_no_room_for_a_context(monkeypatch):
    class Device:
        def __init__(self, device):
            pass

        def __enter__(self):
            raise errors[-1]

        def __exit__(self, *_):
            pass

        @property
        def compute_capability(self):
            raise errors[-1]

    errors = [error_of_cuda("CUDARuntimeError", 2)]
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    for use in (jit._arch_of_device, lambda device: arrays._switch(device, None).__enter__()):
        with pytest.raises(OutOfMemoryError, match="out of memory on cuda:3: .* CUDA_VISIBLE_DEVICES"):
            use(3)
    errors.append(error_of_cuda("CUDARuntimeError", 700))
    with pytest.raises(RuntimeError, match="CUDA's text"):
        jit._arch_of_device(3)


def test_the_error_names_the_bytes_and_what_to_change(device):
    error = memory.explained(CupysError(1_234_567_890, 99), 7, "a call", "Do less")
    assert isinstance(error, SalekitError) and isinstance(error, MemoryError)
    assert str(error) == (
        "out of memory on cuda:3: wants 1,234,567,890 bytes, for a call; 5,000,000 of 80,000,000,000 are free, and 700 "
        "in CuPy's pool. Do less"
    )
    assert (error.wanted_bytes, error.free_bytes) == (1_234_567_890, 5_000_000)
    limited = str(memory.explained(CupysError(10, 2_000, 2_005), 7, "a call", "Do less"))
    assert "CuPy's pool is limited to 2,005, of which 2,000 are in use" in limited
    assert "wants 7 bytes" in str(memory.explained(MemoryError(), 7, "a call", "Do less"))  # of another allocator


@pytest.mark.parametrize("make", [arrays.empty, arrays.zeros])
def test_arrays_of_stages(device, monkeypatch, make):
    def fail(shape, dtype):
        raise CupysError(24, 0)

    monkeypatch.setattr(cupy, make.__name__, fail)
    with pytest.raises(OutOfMemoryError, match=r"wants 24 bytes, for an array of shape .2, 3.; .*fewer heads") as error:
        make((2, 3))
    assert error.value.__context__ is None  # which would keep the frames of the attempt


def test_other_allocations(device, monkeypatch):
    def fail(*_):
        raise CupysError(24, 0)

    monkeypatch.setattr(cupy, "ndarray", fail)
    with pytest.raises(OutOfMemoryError):
        merge._empty((2, 3), np.float32, 0)


@pytest.mark.parametrize("loads, said", [(2, None), (3, "wants 5 bytes, for a kernel's code")])
def test_a_kernel_that_does_not_fit(device, monkeypatch, loads, said):
    """CuPy's pool gives back what it holds, once. A module that was not loaded is never used again."""
    class Full(cupy.cuda.driver.CUDADriverError):
        status = 2

        def __init__(self):
            RuntimeError.__init__(self, "CUDA_ERROR_OUT_OF_MEMORY")

    Full.__name__ = "CUDADriverError"

    class Module:
        def __init__(self):
            events.append("module")

        def load(self, cubin):
            assert cubin == b"cubin"
            if events.count("module") < loads:
                raise Full()

        def get_function(self, name):
            return SimpleNamespace(ptr=77)

    events = []
    pool = SimpleNamespace(free_bytes=lambda: 700, free_all_blocks=lambda: events.append("room"))
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    monkeypatch.setattr(cupy.cuda.function, "Module", Module)
    monkeypatch.setattr(cupy.cuda.driver, "funcSetAttribute", lambda *args: events.append(args))
    compiled = jit.Compiled(None, "name", jit.KernelInfo(1, 0, 100_000, 0, 0, 0, (), 0.0), b"cubin")
    if said is None:
        assert jit.Kernel(compiled).handle == 77
        assert events == ["module", "room", "module", (77, 8, 100_000)]
    else:
        with pytest.raises(OutOfMemoryError, match=said):
            jit.Kernel(compiled)
        assert events == ["module", "room", "module"]


# --- one more attempt --------------------------------------------------------------------------------------------
class Big:
    """What an attempt has allocated."""


@pytest.fixture
def attempts(fake, device, monkeypatch):  # noqa: F811
    """Calls that fail as often as it says; each attempt must find what those before it had allocated gone."""
    state = {"failures": 0, "alive": [], "kept": []}
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(workspaces, "clear_workspaces", lambda: state["kept"].append(len(state["alive"])))

    def attempt(*_):
        assert [x for x in state["alive"] if x() is not None] == []
        big = Big()
        state["alive"].append(weakref.ref(big))
        if len(state["alive"]) <= state["failures"]:
            raise state.get("error") or CupysError(10**9, 0)
        return "out", "lse", "mask"

    monkeypatch.setattr(attention_plan.AttentionPlan, "_submit", attempt)
    return state


def call():
    q, k, v = inputs()
    prepared = attention_plan.AttentionPlan(q, k, v, "bshd", {"dense_below": 0})
    return prepared._run(q, k, v, 0.1, True, True, None, None)


def test_a_second_attempt_has_the_memory_of_the_first(attempts):
    gc.disable()  # nothing may be left to a collection
    try:
        attempts["failures"] = 1
        assert call() == ("out", "lse", "mask") and attempts["kept"] == [1]
    finally:
        gc.enable()


def test_two_attempts_are_all(attempts):
    gc.disable()
    try:
        attempts["failures"] = 2
        with pytest.raises(OutOfMemoryError) as error:
            call()
        assert len(attempts["alive"]) == 2 and all(x() is None for x in attempts["alive"])  # while the error is kept
    finally:
        gc.enable()
    text = str(error.value)
    assert text.startswith("out of memory on cuda:0: wants 1,000,000,000 bytes, for a call that takes ")
    results = 2000 * 4 * 128 * 2 + 4 * 2000 * 4 + 4 * 4 * 16 * 2
    assert f"bytes of workspace and {results:,} of results; 5,000,000 of 80,000,000,000 are free" in text
    assert "fewer rows of q" in text and "out= and workspace=" in text and "\n" not in text


@pytest.mark.parametrize("error", [ValueError("other"), error_of_cuda("CUDADriverError", 700)])
def test_other_errors_are_not_tried_again(attempts, error):
    attempts.update(failures=1, error=error)
    with pytest.raises(type(error)):
        call()
    assert len(attempts["alive"]) == 1 and attempts["kept"] == []


@pytest.mark.parametrize("failures", [1, 2])
def test_packed_sequences(device, monkeypatch, failures):
    tried = []

    def attempt(*_):
        tried.append(0)
        if len(tried) <= failures:
            raise CupysError(77, 0)
        return "out", "lse"

    monkeypatch.setattr(sequences, "_run_gpu", attempt)
    if failures == 1:
        assert sequences.run_gpu(*[None] * 6) == ("out", "lse")
    else:
        with pytest.raises(OutOfMemoryError, match="wants 77 bytes, for packed sequences.*fewer sequences"):
            sequences.run_gpu(*[None] * 6)
    assert len(tried) == 2


def test_workspaces_after_a_failure():
    """The lock is free, nothing is kept, and the next call gets its memory."""
    salekit.clear_workspaces()

    def fail(num_bytes):
        raise CupysError(num_bytes, 0)

    piece = workspaces.Workspace()
    with pytest.raises(CupysError), piece.lock:
        piece.reserve(100, fail)
    assert not piece.lock.locked() and piece._memory is None and piece._num_bytes == 0
    assert piece.reserve(100, lambda n: gpu_array(TAUS, (n,), "u1")) == TAUS


# --- the twin ----------------------------------------------------------------------------------------------------
def test_the_twin_keeps_nothing():
    """Python's and NumPy's memory after 100 calls of several shapes is that after 10."""
    def make(seqlen, heads):
        rng = np.random.default_rng(seqlen)
        return [rng.standard_normal((1, seqlen, h, 64)).astype(np.float16) for h in (heads, 1, 1)]

    shapes = [make(*x) for x in ((65, 1), (130, 2), (200, 1), (64, 4), (33, 3))]
    tracemalloc.start()
    try:
        sizes = []
        for turn in range(100):
            salekit.sparse_attention(*shapes[turn % 5], dense_below=0, return_mask=turn % 2 == 0)
            if turn in (9, 99):
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] <= 20_000


def test_the_twin_in_several_threads():
    """Calls of other shapes, estimators and options beside each other: each has the bits that it has alone."""
    def make(seqlen, heads):
        rng = np.random.default_rng(seqlen)
        return [rng.standard_normal((1, seqlen, h, 64)).astype(np.float16) for h in (heads, 2, 2)]

    def call(index):
        tensors, more = tensors_of[index % 3], options[index // 3 % len(options)]
        out, lse, mask = salekit.sparse_attention(*tensors, dense_below=0, return_lse=True, return_mask=True, **more)
        return out.tobytes() + lse.tobytes() + mask.words.tobytes()

    tensors_of = [make(200, 4), make(333, 2), make(500, 2)]
    options = [
        {"estimator": "int8"}, {"estimator": "int4", "thresholds": 0.1}, {"estimator": "int8-sp24", "query_stride": 2},
        {"attend": "int8-fp8"}, {"skipped": "pool"}, {"softcap": 20.0, "window_size": 90, "causal": False},
    ]
    number = len(tensors_of) * len(options)
    alone = [call(index) for index in range(number)]
    start = threading.Barrier(8)

    def work(first):
        start.wait()
        return [(index % number, call(index % number)) for index in range(first, first + 9)]

    with ThreadPoolExecutor(8) as pool:
        found = [pair for of_thread in pool.map(work, range(0, 32, 4)) for pair in of_thread]
    assert {index for index, _ in found} == set(range(number))
    assert all(result == alone[index] for index, result in found)


# --- forks -------------------------------------------------------------------------------------------------------
def run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "2"},
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("is_started", [True, False])
def test_a_forked_child(is_started, tmp_path):
    """CUDA's state is put on; the forks are real. The twin gives the parent's bits in the child, and a kernel compiles
    there although a thread of the parent held the lock."""
    result = run(f"""
        import os, sys, threading
        import cupy, numpy as np
        import salekit
        from salekit import forks, jit
        from salekit.errors import GpuError
        from test_host_programs import inputs
        def current():
            if not {is_started} or os.getpid() != parent:
                raise RuntimeError("not initialised")
            return 0
        parent = os.getpid()
        cupy.cuda.driver.ctxGetCurrent = current
        os.environ["SALEKIT_CACHE_DIR"] = {str(tmp_path / "cache")!r}
        spec = jit.KernelSpec("coarsen_mask", ("2",))
        jit._locks_guard.acquire()
        jit._locks[jit.cache_key(spec, "sm_80")] = threading.Lock()
        jit._locks[jit.cache_key(spec, "sm_80")].acquire()
        rng = np.random.default_rng(0)
        host = [rng.standard_normal((1, 150, 1, 64)).astype(np.float16) for _ in "qkv"]
        want = salekit.sparse_attention(*host, dense_below=0).tobytes()

        def child(is_dead, generation):
            assert forks.is_dead == is_dead
            assert salekit.sparse_attention(*host, dense_below=0).tobytes() == want
            assert jit.compile_kernel(spec, "sm_80").info.registers > 0
            said = set()
            gpu = inputs()
            calls = [
                lambda: salekit.sparse_attention(*gpu),
                lambda: salekit.plan(*gpu),
                lambda: salekit.dense_attention(*gpu),
                lambda: jit.device_arch(),
                lambda: jit.get_kernel(spec),
                lambda: salekit.key_statistics(gpu[1]),
            ]
            for call in calls if is_dead else []:
                try:
                    call()
                    said.add("nothing")
                except GpuError as error:
                    said.add(str(error))
            if is_dead:
                (text,) = said
                assert text.startswith("this process was forked after its parent had started CUDA"), text
                assert "spawn" in text and "\\n" not in text
            if generation:
                return fork(is_dead, generation - 1)

        def fork(is_dead, generation):
            pid = os.fork()
            if pid == 0:
                try:
                    child(is_dead, generation)
                    os._exit(0)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0

        assert not forks.is_dead
        fork({is_started}, 1)  # and a child of the child
        assert not forks.is_dead
        assert salekit.sparse_attention(*host, dense_below=0).tobytes() == want
        print("done")
    """)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_child_of_a_process_without_cuda_or_cupy():
    result = run("""
        import os, sys
        import numpy as np, salekit
        assert "cupy" not in sys.modules
        pid = os.fork()
        if pid == 0:
            x = [np.ones((1, 5, 1, 64), np.float16)] * 3
            ok = (salekit.sparse_attention(*x) == 1).all() and not salekit.forks.is_dead
            os._exit(0 if ok else 1)
        print(os.waitpid(pid, 0)[1])
    """)
    assert result.stdout == "0\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_child_that_is_forked_while_a_kernel_compiles(tmp_path):
    """NVRTC would wait in it for ever: one error there, what the cache holds, and no end of it in its own children. A
    child that is forked afterwards compiles."""
    result = run(f"""
        import os, threading
        from salekit import jit
        from salekit.errors import GpuError
        os.environ["SALEKIT_CACHE_DIR"] = {str(tmp_path / "cache")!r}
        nvrtc, inside, go = jit._nvrtc(), threading.Event(), threading.Event()

        class Slow:
            def __getattr__(self, name):
                return getattr(nvrtc, name)

            def compileProgram(self, *arguments):
                if threading.current_thread() is not threading.main_thread():
                    inside.set()
                    go.wait()
                nvrtc.compileProgram(*arguments)

        jit._nvrtc = Slow
        held, other, third = (jit.KernelSpec("coarsen_mask", (factor,)) for factor in ("2", "4", "8"))
        jit.compile_kernel(held, "sm_80")

        def said():
            assert jit.compile_kernel(held, "sm_80").path is not None
            try:
                jit.compile_kernel(other, "sm_80")
                return ""
            except GpuError as error:
                return str(error)

        def child(generations):
            pid = os.fork()
            if pid == 0:
                text = said()
                is_right = text.startswith("this process was forked while its parent compiled") and "\\n" not in text
                os._exit(0 if is_right and (generations == 1 or child(generations - 1) == 0) else 1)
            return os.waitpid(pid, 0)[1]

        thread = threading.Thread(target=jit.compile_kernel, args=(third, "sm_80"))
        thread.start()
        inside.wait()
        while_compiling = child(2)
        go.set()
        thread.join()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if said() == "" else 1)
        print(while_compiling, os.waitpid(pid, 0)[1])
    """)
    assert result.returncode == 0 and result.stdout == "0 0\n", result.stderr


def test_arrays_of_the_gpu_are_refused_where_cuda_is_dead():
    assert forks.is_dead is False and arrays.import_cupy() is cupy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forks, "is_dead", True)
        with pytest.raises(GpuError, match="forked"):
            arrays.import_cupy()
        assert (salekit.dense_attention(*[np.ones((1, 5, 1, 64), np.float16)] * 3) == 1).all()
