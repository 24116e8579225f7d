"""What other libraries hold on a GPU: their memory in and out, on their streams. Plans of shapes. Threads and GPUs."""

from __future__ import annotations

import gc
import os
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from fake_dlpack import BFLOAT16, FLOAT16, IS_COPIED, READ_ONLY, Interface, Producer

import salekit
from salekit import arrays as arrays_module
from salekit.errors import ArgumentError, DtypeError

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
SPARSE = {"thresholds": 0.2, "dense_below": 0}
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or other tests find no memory
SPIN_CYCLES = 100_000_000


def make(seqlen_q=700, heads=4, kv_heads=2, head_dim=128, batch=1, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((seqlen_q, heads), (seqlen_q, kv_heads), (seqlen_q, kv_heads))
    return [rng.standard_normal((batch, s, h, head_dim), np.float32).astype(dtype) for s, h in sizes]


def on_gpu(host, device=0):
    with cp.cuda.Device(device):
        return [cp.asarray(x) for x in host]


def bits(array):
    with array.device:
        return array.get().tobytes()


def spin():
    """Keep the current stream busy for a while."""
    code = 'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }'
    cp.RawKernel(code, "spin")((1,), (1,), (np.int64(SPIN_CYCLES),))


def producer(array, dtype=BFLOAT16, flags=None, strides=None):
    strides = strides or tuple(stride // array.itemsize for stride in array.strides)
    return Producer(array.data.ptr, array.shape, dtype, strides, (2, array.data.device_id), flags)


def interface(array, stream=None, read_only=False):
    return Interface(array.data.ptr, array.shape, array.dtype.str, array.strides, stream, read_only)


# --- made by hand ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [None, 0, READ_ONLY])
@pytest.mark.parametrize("dtype, code", [(BF16, BFLOAT16), (FP16, FLOAT16)])
def test_dlpack(flags, dtype, code):
    given = on_gpu(make(dtype=dtype))
    want = bits(salekit.sparse_attention(*given, **SPARSE))
    producers = [producer(x, code, flags) for x in given]
    assert arrays_module.import_array("q", producers[0], 0).data.ptr == given[0].data.ptr
    assert bits(salekit.sparse_attention(*producers, **SPARSE)) == want
    out = cp.empty_like(given[0])
    wrapped = producer(out, code, flags)
    if flags == READ_ONLY:
        with pytest.raises(ArgumentError, match="out: is read-only"):
            salekit.sparse_attention(*given, out=wrapped, **SPARSE)
    else:
        assert salekit.sparse_attention(*producers, out=wrapped, **SPARSE) is wrapped
        assert bits(out) == want
    gc.collect()
    assert [x.released for x in (*producers, wrapped)] == [len(x.streams) for x in (*producers, wrapped)]


def test_dlpack_is_asked_for_the_stream_of_the_call():
    given = on_gpu(make())
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    as_torch = SimpleNamespace(cuda_stream=stream.ptr)
    for argument, want in ((stream, stream.ptr), (stream.ptr, stream.ptr), (as_torch, stream.ptr), (None, 1), (2, 2)):
        producers = [producer(x) for x in given]
        salekit.sparse_attention(*producers, stream=argument, **SPARSE)
        assert [x.streams for x in producers] == [[want]] * 3
    with stream:
        last = producer(given[0])
        salekit.sparse_attention(last, *given[1:], **SPARSE)
    assert last.streams == [stream.ptr]
    cp.cuda.Device().synchronize()


def test_what_cannot_be_shared():
    q, k, v = on_gpu(make())
    out = cp.empty_like(q)
    for bad, error, match in (
        ({"q": producer(q, flags=IS_COPIED)}, DtypeError, "q: cannot import Producer without a copy"),
        ({"k": producer(k, (2, 32))}, DtypeError, "k: got dtype float32"),
        ({"out": interface(out, read_only=True)}, ArgumentError, "out: is read-only"),
        ({"v": Producer(v.data.ptr, v.shape, device=(2, 0), strides=None, byte_offset=2)}, ArgumentError,
         "v: got an address that is 2 past"),
    ):
        with pytest.raises(error, match=match):
            salekit.sparse_attention(**{"q": q, "k": k, "v": v, "out": out, **bad}, **SPARSE)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("is_late", [True, False])
def test_interfaces_and_their_streams(dtype, is_late):
    """Inputs arrive late on the producer's stream: a call that did not wait for it would see zeros."""
    host = make(dtype=dtype)
    sources = on_gpu(host)
    want = bits(salekit.sparse_attention(*sources, **SPARSE))
    given = [cp.zeros(x.shape, x.dtype) for x in host]
    stream, other = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    cp.cuda.Device().synchronize()
    with other:
        if is_late:
            spin()
        for target, source in zip(given, sources):
            target.data.copy_from_device_async(source.data, source.nbytes, other)
    if not is_late:
        other.synchronize()
    wrapped = [interface(x, other.ptr if is_late else None) for x in given]
    out = salekit.sparse_attention(*wrapped, stream=stream, **SPARSE)
    stream.synchronize()
    assert out.dtype == dtype and bits(out) == want


# --- libraries ---------------------------------------------------------------------------------------------------
def test_numba():
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba has no GPU: pip install numba-cuda")
    host = make(dtype=FP16)
    want = bits(salekit.sparse_attention(*on_gpu(host), **SPARSE))
    stream = cuda.stream()
    given = [cuda.to_device(x, stream=stream) for x in host]
    out = cuda.device_array(host[0].shape, np.float16, stream=stream)
    assert arrays_module.import_array("q", given[0], 0).data.ptr == given[0].__cuda_array_interface__["data"][0]
    argument = stream if hasattr(stream, "__cuda_stream__") else int(stream.handle.value)
    assert salekit.sparse_attention(*given, out=out, stream=argument, **SPARSE) is out
    got = out.copy_to_host(stream=stream)
    stream.synchronize()
    assert got.tobytes() == want
    result = cuda.as_cuda_array(salekit.sparse_attention(*given, **SPARSE))
    assert result.copy_to_host().tobytes() == want


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_cuda_core(dtype):
    core = pytest.importorskip("cuda.core")
    utils = pytest.importorskip("cuda.core.utils")
    if not hasattr(core, "Device") or not hasattr(utils.StridedMemoryView, "__dlpack__"):
        pytest.skip("this cuda.core is too old: its StridedMemoryView has no DLPack")
    given = on_gpu(make(dtype=dtype))
    want = bits(salekit.sparse_attention(*given, **SPARSE))
    device = core.Device(0)
    device.set_current()
    stream = device.create_stream()
    cp.cuda.Device().synchronize()
    views = [utils.StridedMemoryView.from_any_interface(x, stream_ptr=-1) for x in given]
    assert arrays_module.import_array("q", views[0], 0).data.ptr == given[0].data.ptr
    prepared = salekit.plan(*(x.shape for x in views), dtype=dtype, device=0, dense_below=0)
    workspace = device.allocate(prepared.workspace_bytes, stream=stream)
    out = cp.empty_like(given[0])
    cp.cuda.Device().synchronize()
    prepared.run(*views, thresholds=0.2, out=out, stream=stream, workspace=workspace)
    stream.sync()
    assert bits(out) == want


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {error}")
    host = make(dtype=dtype)
    want = bits(salekit.sparse_attention(*on_gpu(host), **SPARSE))
    given = [jax.device_put(x, device) for x in host]
    assert arrays_module.import_array("q", given[0], 0).data.ptr == given[0].unsafe_buffer_pointer()
    out = salekit.sparse_attention(*given, **SPARSE)
    assert bits(out) == want
    back = jax.dlpack.from_dlpack(out)
    assert back.unsafe_buffer_pointer() == out.data.ptr and np.asarray(back).tobytes() == want
    with pytest.raises(ArgumentError, match="out: is a JAX array, which is immutable"):
        salekit.sparse_attention(*given, out=back, **SPARSE)
    changed = jax.jit(lambda x: 2 * x)(given[0])  # not finished yet, perhaps: DLPack waits for it on the call's stream
    doubled = on_gpu([(2 * host[0].astype(np.float32)).astype(dtype)])[0]
    assert bits(salekit.sparse_attention(changed, *given[1:], **SPARSE)) == (
        bits(salekit.sparse_attention(doubled, *given[1:], **SPARSE))
    )


@pytest.mark.parametrize("dtype, kind", [(BF16, 16), (FP16, 10)])  # TensorProto.BFLOAT16, FLOAT16
def test_ort_value(dtype, kind):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("ONNX Runtime has no GPU: pip install onnxruntime-gpu")
    if not hasattr(ort.OrtValue, "__dlpack__"):
        pytest.skip("this ONNX Runtime's OrtValue has no DLPack")
    host = make(dtype=dtype)
    given = on_gpu(host)
    want = bits(salekit.sparse_attention(*given, **SPARSE))
    values = [ort.OrtValue.from_dlpack(x) for x in given]
    assert values[0].data_ptr() == given[0].data.ptr and values[0].element_type() == kind
    out = ort.OrtValue.from_dlpack(cp.empty_like(given[0]))
    assert salekit.sparse_attention(*values, out=out, **SPARSE) is out
    array = arrays_module.import_array("q", out, 0)
    assert array.data.ptr == out.data_ptr() and bits(array) == want
    if dtype == FP16:
        owned = [ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0) for x in host]
        assert bits(salekit.sparse_attention(*owned, **SPARSE)) == want


# --- plans of shapes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_plan_of_shapes(layout):
    given = on_gpu([np.ascontiguousarray(x.transpose(0, 2, 1, 3)) if layout == "bhsd" else x for x in make(batch=2)])
    options = {"layout": layout, "dense_below": 0, "estimator": "int8"}
    gc.collect()
    before = cp.get_default_memory_pool().used_bytes()
    prepared = salekit.plan(*(x.shape for x in given), dtype="bfloat16", device=0, **options)
    of_arrays = salekit.plan(*given, **options)
    assert prepared.plan == of_arrays.plan
    assert prepared.workspace_bytes == of_arrays.workspace_bytes > 0
    assert cp.get_default_memory_pool().used_bytes() == before
    want = bits(salekit.sparse_attention(*given, thresholds=0.2, **options))
    out, workspace = cp.empty_like(given[0]), cp.empty(prepared.workspace_bytes, np.uint8)
    assert bits(prepared.run(*given, thresholds=0.2)) == want
    prepared.run(*given, thresholds=0.2, out=out, workspace=workspace)
    assert bits(out) == want
    with pytest.raises(ArgumentError, match="q: is on host memory; wants cuda:0"):
        prepared.run(*(x.get() for x in given))


@pytest.mark.parametrize("seqlen_q", [1, 700])
def test_strides_of_one_element_do_not_count(seqlen_q):
    """PyTorch's DLPack says 1 for the stride of an axis of one element."""
    q, k, v = on_gpu(make())
    q = q[:, :seqlen_q].copy() if seqlen_q == 1 else q
    want = bits(salekit.sparse_attention(q, k, v, **SPARSE))
    odd = producer(q, strides=(1, 1 if seqlen_q == 1 else 512, 128, 1))
    prepared = salekit.plan(q.shape, k.shape, v.shape, dtype="bfloat16", device=0, dense_below=0)
    for arguments in ((q, k, v), (odd, producer(k, strides=(1, 256, 128, 1)), v)):
        assert bits(prepared.run(*arguments, thresholds=0.2)) == want
        assert bits(salekit.sparse_attention(*arguments, **SPARSE)) == want


def test_plan_of_empty_shapes_and_of_no_such_device():
    shapes = ((2, 0, 4, 64), (2, 5, 2, 64), (2, 5, 2, 64))
    prepared = salekit.plan(*shapes, dtype="float16", device=0)
    out, lse = prepared.run(*(cp.zeros(shape, np.float16) for shape in shapes), return_lse=True)
    assert (out.shape, lse.shape, prepared.workspace_bytes) == (shapes[0], (2, 4, 0), 0)
    count = cp.cuda.runtime.getDeviceCount()
    for device in (count, -1):
        with pytest.raises(ArgumentError, match=f"device: got {device}; wants 0 to {count - 1}"):
            salekit.plan(*shapes, dtype="float16", device=device)


# --- threads and GPUs --------------------------------------------------------------------------------------------
def run_threads(work, num_threads):
    problems, start = [], threading.Barrier(num_threads)

    def guarded(index):
        try:
            start.wait()
            work(index)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("with_workspace", [True, False])
def test_threads_share_a_plan(with_workspace):
    """Each thread with a stream and arrays of its own; they record the plan's programs."""
    num_threads, scale = 6, 0.0917 + with_workspace / 1000  # a scale of this test alone
    given = [on_gpu(make(seed=seed)) for seed in range(num_threads)]
    options = {"dense_below": 0, "softmax_scale": scale}
    prepared = salekit.plan(*(x.shape for x in given[0]), dtype="bfloat16", device=0, **options)
    size = prepared.workspace_bytes if with_workspace else 0
    spaces = [cp.empty(size, np.uint8) if with_workspace else None for _ in given]
    streams = [cp.cuda.Stream(non_blocking=True) for _ in given]
    results = [[] for _ in given]
    cp.cuda.Device().synchronize()

    def work(index):
        for turn in range(20):
            result, lse = prepared.run(
                *given[index], thresholds=0.1 * (1 + turn % 3), return_lse=True, stream=streams[index],
                workspace=spaces[index],
            )
            streams[index].synchronize()
            results[index].append((bits(result), bits(lse)))

    run_threads(work, num_threads)
    for x, got in zip(given, results):
        for third in range(3):
            want = salekit.sparse_attention(*x, thresholds=0.1 * (1 + third), return_lse=True, **options)
            assert set(got[third::3]) == {(bits(want[0]), bits(want[1]))}


@pytest.fixture
def two_gpus():
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")


def test_two_gpus_at_once(two_gpus):
    """Two threads a GPU, whose current device stays the first: calls go where q is."""
    host = [make(seed=seed) for seed in range(4)]
    want = [bits(salekit.sparse_attention(*on_gpu(x), **SPARSE)) for x in host]
    given = [on_gpu(x, seed % 2) for seed, x in enumerate(host)]
    shapes = [x.shape for x in host[0]]
    plans = [salekit.plan(*shapes, dtype="bfloat16", device=device, dense_below=0) for device in range(2)]
    assert plans[0].workspace_bytes == plans[1].workspace_bytes
    for device in range(2):
        cp.cuda.Device(device).synchronize()

    def work(index):
        device = index % 2
        for turn in range(20):
            result = plans[device].run(*given[index], thresholds=0.2)
            other = salekit.sparse_attention(*given[index], **SPARSE)
            assert cp.cuda.runtime.getDevice() == 0
            assert result.data.device_id == other.data.device_id == device
            assert bits(result) == bits(other) == want[index]

    run_threads(work, 4)


def test_one_thread_and_two_gpus(two_gpus):
    host = make()
    first, second = on_gpu(host, 0), on_gpu(host, 1)
    cp.cuda.Device(0).use()  # JAX leaves its last one current
    want = bits(salekit.sparse_attention(*first, **SPARSE))
    for given, device in ((second, 1), (first, 0), (second, 1)):
        result = salekit.sparse_attention(*given, **SPARSE)
        assert result.data.device_id == device and bits(result) == want
    with cp.cuda.Device(1):
        stream = cp.cuda.Stream(non_blocking=True)
        cp.cuda.Device(1).synchronize()
    result = salekit.sparse_attention(*second, stream=stream, **SPARSE)
    stream.synchronize()
    assert bits(result) == want and cp.cuda.runtime.getDevice() == 0
    with cp.cuda.Device(1):
        out = cp.empty_like(second[0])
    for match, arguments, options in (
        ("k: is on cuda:1; wants cuda:0", (first[0], second[1], first[2]), {}),
        ("out: is on cuda:1; wants cuda:0", first, {"out": out}),
        ("stream: belongs to cuda:1; wants one of cuda:0", first, {"stream": stream}),
    ):
        with pytest.raises(ArgumentError, match=match):
            salekit.sparse_attention(*arguments, **options, **SPARSE)
    prepared = salekit.plan(*(x.shape for x in host), dtype="bfloat16", device=1)
    with pytest.raises(ArgumentError, match="q: is on cuda:0; wants cuda:1"):
        prepared.run(*first)
