"""What other libraries hand over: their own memory or an error that names the argument. Plans of shapes. Threads."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from fake_dlpack import BFLOAT16, CUDA, FLOAT16, IS_COPIED, READ_ONLY, UINT16, Interface, Producer

import salekit
from salekit import arrays, dlpack
from salekit.errors import ArgumentError, DtypeError, GpuError

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
SPARSE = {"thresholds": 0.2, "dense_below": 0}
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or other tests find no memory on a GPU
HAS_DLPACK_1 = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


def make(seqlen_q=300, seqlen_k=None, heads=4, kv_heads=2, head_dim=64, batch=1, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((seqlen_q, heads), (seqlen_k or seqlen_q, kv_heads), (seqlen_k or seqlen_q, kv_heads))
    return [rng.standard_normal((batch, s, h, head_dim), np.float32).astype(dtype) for s, h in sizes]


def aligned(shape, dtype=BF16):
    """Memory as JAX wants it on a CPU, or it copies."""
    size = int(np.prod(shape)) * 2
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


# --- DLPack made by hand -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [None, 0, READ_ONLY])
@pytest.mark.parametrize("dtype, code", [(BF16, BFLOAT16), (FP16, FLOAT16)])
def test_host_memory_comes_in_without_a_copy(flags, dtype, code):
    if flags == READ_ONLY and not HAS_DLPACK_1:
        pytest.skip("NumPy before 2.1 has no read-only DLPack")
    given = make(dtype=dtype)
    want = salekit.sparse_attention(*given, **SPARSE)
    producers = [Producer.of(x, dtype=code, flags=flags) for x in given]
    for x, producer in zip(given, producers):
        array = arrays.import_array("q", producer, None)
        assert array.dtype == dtype and array.shape == x.shape and array.strides == x.strides
        assert array.ctypes.data == x.ctypes.data and np.shares_memory(array, x)
        assert producer.released == 0
        view = array[:, 1:]
        del array
        gc.collect()
        assert producer.released == 0  # a view keeps it
        del view
        gc.collect()
        assert producer.released == 1
    assert salekit.sparse_attention(*producers, **SPARSE).tobytes() == want.tobytes()
    gc.collect()
    assert [producer.released for producer in producers] == [len(producer.streams) for producer in producers]


def test_strides_offsets_and_reversed_axes():
    whole = make(batch=2)[0]
    for part in (whole[1:, 3:40:2], whole[:, ::-1], whole[:, :0], whole[:, :1], whole.transpose(0, 2, 1, 3)):
        got = arrays.import_array("q", Producer.of(part), None)
        assert got.shape == part.shape and got.tobytes() == part.tobytes()
        assert not part.size or np.shares_memory(got, part)
    late = Producer(whole.ctypes.data, (300, 4, 64), byte_offset=whole[0].nbytes)
    assert arrays.import_array("q", late, None).tobytes() == whole[1].tobytes()


@pytest.mark.parametrize("flags", [None, 0])
def test_out_is_written_in_place(flags):
    given = make()
    want = salekit.sparse_attention(*given, **SPARSE)
    memory = np.full_like(given[0], 7)
    out = Producer.of(memory, flags=flags)
    assert salekit.sparse_attention(*given, out=out, **SPARSE) is out
    assert memory.tobytes() == want.tobytes()
    assert salekit.plan(*given, dense_below=0).run(*given, thresholds=0.2, out=out) is out


@pytest.mark.skipif(not HAS_DLPACK_1, reason="NumPy before 2.1 does not ask for DLPack 1.0")
def test_out_that_must_not_be_written():
    given = make()
    memory = np.full_like(given[0], 7)
    for flags, error, match in (
        (READ_ONLY, ArgumentError, "out: is read-only"),
        (IS_COPIED, DtypeError, "out: cannot import Producer without a copy: __dlpack__ made a copy"),
    ):
        with pytest.raises(error, match=match):
            salekit.sparse_attention(*given, out=Producer.of(memory, flags=flags))
    assert (memory == 7).all()


def test_gpu_memory_is_labelled_for_cupy():
    cupy = pytest.importorskip("cupy")

    def capsule(x):
        return x.__dlpack__(stream=1, max_version=(1, 0))

    for code, want in ((BFLOAT16, BF16), (FLOAT16, FP16), (UINT16, np.dtype(np.uint16))):
        for flags in (None, 0, READ_ONLY):
            producer = Producer(1 << 40, (2, 5, 4, 64), code, (2560, 512, 64, 1), CUDA, flags)
            array, is_read_only = dlpack.import_dlpack(producer, lambda x: cupy.from_dlpack(capsule(x)))
            assert (array.dtype, array.shape, array.data.ptr) == (want, (2, 5, 4, 64), 1 << 40)
            assert array.strides == (5120, 1024, 128, 2) and is_read_only == (flags == READ_ONLY)
            assert producer.streams == [1] and producer.released == 0
            del array
            gc.collect()
            assert producer.released == 1


def test_as_dlpack():
    for x in make(batch=2)[0][1:, ::3], make(dtype=FP16)[0]:
        exported = salekit.as_dlpack(x)
        assert (exported is x) == (x.dtype == FP16)
        back = arrays.import_array("q", exported, None)
        assert back.dtype == x.dtype and back.strides == x.strides and np.shares_memory(back, x)
        assert exported.__dlpack_device__() == (1, 0)
    frozen = make()[0]
    frozen.flags.writeable = False
    with pytest.raises((ArgumentError, DtypeError), match="out: "):
        salekit.sparse_attention(*make(), out=salekit.as_dlpack(frozen))
    marker = object()
    assert salekit.as_dlpack(marker) is marker


# --- libraries ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    given = make(dtype=dtype)
    want = salekit.sparse_attention(*given, **SPARSE)
    cpu = jax.devices("cpu")[0]
    put = [jax.device_put(x, cpu) for x in given]
    for x in put:
        assert arrays.import_array("q", x, None).ctypes.data == x.unsafe_buffer_pointer()
    assert salekit.sparse_attention(*put, **SPARSE).tobytes() == want.tobytes()
    assert salekit.plan(*(x.shape for x in put), dtype=dtype, dense_below=0).run(*put, thresholds=0.2).tobytes() == (
        want.tobytes()
    )
    assert salekit.plan(*put, dense_below=0).run(*given, thresholds=0.2).tobytes() == want.tobytes()
    taus = jax.device_put(np.full(4, 0.2, np.float32), cpu)
    assert salekit.sparse_attention(*put, thresholds=taus, dense_below=0).tobytes() == want.tobytes()
    with pytest.raises(ArgumentError, match="out: is a JAX array, which is immutable"):
        salekit.sparse_attention(*put, out=jax.device_put(np.zeros_like(want), cpu))

    out = aligned(want.shape, dtype)
    salekit.sparse_attention(*given, out=out, **SPARSE)
    back = jax.dlpack.from_dlpack(salekit.as_dlpack(out))
    assert back.dtype == dtype and back.unsafe_buffer_pointer() == out.ctypes.data
    assert np.asarray(back).tobytes() == want.tobytes()


def test_jax_arrays_without_data():
    jax = pytest.importorskip("jax")
    q, k, v = make()
    gone = jax.device_put(k, jax.devices("cpu")[0])
    gone.delete()
    with pytest.raises(DtypeError, match="k: is a JAX array that was deleted"):
        salekit.sparse_attention(q, gone, v)
    with pytest.raises(DtypeError, match="v: got ShapeDtypeStruct; wants"):
        salekit.sparse_attention(q, k, jax.ShapeDtypeStruct(v.shape, v.dtype))
    with pytest.raises(DtypeError, match="k: is traced by JAX.* salekit.jax has .*, nothing else"):
        jax.jit(lambda x: salekit.sparse_attention(q, x, v))(k)
    with pytest.raises(DtypeError, match="q: is traced by JAX"):
        jax.eval_shape(lambda x: salekit.sparse_attention(x, k, v), q)


def test_jax_array_on_two_devices():
    pytest.importorskip("jax")
    code = """if True:
        import jax, numpy as np, salekit
        from jax.sharding import NamedSharding, PartitionSpec
        q = np.ones((1, 40, 2, 64), np.float16)
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("heads",))
        for spec in (PartitionSpec(None, None, "heads"), PartitionSpec()):
            try:
                salekit.sparse_attention(q, jax.device_put(q, NamedSharding(mesh, spec)), q)
            except salekit.DtypeError as error:
                print(error)
        salekit.sparse_attention(q, jax.device_put(q, jax.devices("cpu")[1]), q)
        """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("k: is a JAX array on several devices") for line in lines)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_ort_value(dtype):
    ort = pytest.importorskip("onnxruntime")
    if not hasattr(ort.OrtValue, "__dlpack__"):
        pytest.skip("this ONNX Runtime's OrtValue has no DLPack")

    def value(x):
        if dtype == FP16:
            return ort.OrtValue.ortvalue_from_numpy(x)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), 16)  # TensorProto.BFLOAT16

    given = make(dtype=dtype)
    want = salekit.sparse_attention(*given, **SPARSE)
    values, out = [value(x) for x in given], value(np.zeros_like(want))
    assert arrays.import_array("q", values[0], None).ctypes.data == values[0].data_ptr()
    assert salekit.sparse_attention(*values, out=out, **SPARSE) is out
    assert arrays.import_array("q", out, None).tobytes() == want.tobytes()
    assert salekit.plan(*values, dense_below=0).run(*values, thresholds=0.2).tobytes() == want.tobytes()
    assert out.data_type() == ("tensor(bfloat16)" if dtype == BF16 else "tensor(float16)")
    back = ort.OrtValue.from_dlpack(salekit.as_dlpack(want))
    assert back.data_ptr() == want.ctypes.data and back.data_type() == out.data_type()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_strided_memory_view(dtype):
    utils = pytest.importorskip("cuda.core.utils")
    if not hasattr(utils.StridedMemoryView, "__dlpack__"):
        pytest.skip("this cuda.core's StridedMemoryView has no DLPack")
    given = make(dtype=dtype)
    given[0] = given[0][:, 1::2]
    want = salekit.sparse_attention(*given)
    views = [utils.StridedMemoryView.from_any_interface(salekit.as_dlpack(x), stream_ptr=-1) for x in given]
    array = arrays.import_array("q", views[0], None)
    assert np.shares_memory(array, given[0]) and array.strides == given[0].strides and array.dtype == dtype
    assert salekit.sparse_attention(*views).tobytes() == want.tobytes()
    memory = np.zeros_like(want)
    out = utils.StridedMemoryView.from_any_interface(salekit.as_dlpack(memory), stream_ptr=-1)
    assert salekit.sparse_attention(*views, out=out) is out and memory.tobytes() == want.tobytes()
    memory.flags.writeable = False
    frozen = utils.StridedMemoryView.from_any_interface(salekit.as_dlpack(memory), stream_ptr=-1)
    with pytest.raises(ArgumentError, match="out: is read-only"):
        salekit.sparse_attention(*views, out=frozen)


# --- what stands for an array ------------------------------------------------------------------------------------
class Raises:
    """As a tensor that needs a gradient, or a lazy one: DLPack is there and refuses."""

    def __init__(self, where):
        self.where = where

    def __dlpack_device__(self):
        if self.where == "device":
            raise RuntimeError("no device yet")
        return (1, 0)

    def __dlpack__(self, **_):
        if self.where == "capsule":
            raise BufferError("requires a gradient")
        return "a string"


class FakeTensor(Raises):
    pass


class Meta(Raises):
    is_meta = True


class Mock:
    """A symbolic proxy: has every attribute, and none is what it should be."""

    def __getattr__(self, name):
        return Mock()

    def __call__(self, *_, **__):
        return Mock()


class Wrapper:
    """Exports a NumPy array by NumPy's own DLPack."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        if not self.array.flags.c_contiguous:
            raise BufferError("no strides")
        return self.array.__dlpack__(**options)


class CsrMatrix:
    shape, dtype = (300, 64), FP16


@pytest.mark.parametrize("x, match", [
    (np.ma.masked_array(make()[0]), "is a masked array; wants a plain one"),
    (FakeTensor("device"), "is a FakeTensor.*has no data"),
    (Meta("device"), "is a tensor on the device 'meta' and has no data"),
    (Raises("device"), "cannot import Raises without a copy: no device yet"),
    (Raises("capsule"), "cannot import Raises without a copy: requires a gradient$"),
    (Wrapper(make()[0][:, ::-1]), "cannot import Wrapper without a copy: no strides$"),
    (Wrapper(make()[0]), "cannot import Wrapper without a copy: .*; NumPy's DLPack has no bfloat16: pass"),
    (Raises("text"), "cannot import Raises without a copy: __dlpack__ gave 'a string'"),
    (Mock(), "cannot import Mock without a copy"),
    (CsrMatrix(), "got CsrMatrix; wants a NumPy or CuPy array"),
    (Producer(256, (1, 300, 4, 64), (2, 32)), "got dtype float32"),
    (Producer(256, (1, 300, 4, 64), (10, 8)), "cannot import Producer without a copy"),  # float8
])
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_the_error_names_the_argument(x, match, name):
    call = dict(zip(("q", "k", "v", "out"), (*make(), None)))
    with pytest.raises(DtypeError, match=f"^{name}: {match}"):
        salekit.sparse_attention(**{**call, name: x})


@pytest.mark.parametrize("call, name", [
    (lambda q, x: salekit.sparse_attention(q, q, q, thresholds=x), "thresholds"),
    (lambda q, x: salekit.merge_attention_states(q, x, q, x), "lse_a"),
    (lambda q, x: salekit.merge_attention_states(x, q, q, q), "out_a"),
    (lambda q, x: salekit.key_statistics(x), "k"),
    (lambda q, x: salekit.sparse_attention_varlen(q[0], q[0], q[0], x, x, 300, 300), "cu_seqlens_q"),
    (lambda q, x: salekit.plan(q, x, q), "k"),
])
def test_the_error_names_the_argument_of_other_calls(call, name):
    q = make()[0]
    for x in (np.ma.masked_array(q), FakeTensor("device"), Raises("device"), Raises("capsule")):
        with pytest.raises(DtypeError, match=f"^{name}: "):
            call(q, x)


def test_an_interface_with_a_mask():
    pytest.importorskip("cupy")
    x = Interface(256, (1, 5, 4, 64), "<f2", mask=Interface(256, (1, 5, 4, 64), "|b1"))
    with pytest.raises(DtypeError, match="k: has a mask"):
        arrays.as_array("k", x, 0)


@pytest.mark.parametrize("stream", [-1, True, 1.5, "0", object(), b"\0"])
def test_bad_streams(stream):
    pytest.importorskip("cupy")
    with pytest.raises(ArgumentError, match="^stream: got .*; wants a cudaStream_t as int.* __cuda_stream__"):
        arrays._as_stream(stream, 0)


def test_plan_of_examples():
    given = make()
    want = salekit.sparse_attention(*given, **SPARSE)
    for examples in (list(map(Producer.of, given)), list(map(salekit.as_dlpack, given))):
        for mixed in (examples, [given[0], *examples[1:]]):
            prepared = salekit.plan(*mixed, dense_below=0)
            for arguments in (mixed, given):
                assert prepared.run(*arguments, thresholds=0.2).tobytes() == want.tobytes()
    with pytest.raises(ArgumentError, match="^k: is on cuda:0; wants host memory"):
        salekit.plan(given[0], Producer(256, given[1].shape, device=CUDA), given[2])


def test_stages_name_arrays_of_other_libraries():
    """And take none of them, wherever they are."""
    q, k, v = make()
    plan = salekit.make_plan(q, k, v, dense_below=0, estimator="int8")
    quantized = salekit.quantize(q, k, plan)
    m, l = salekit.anchor_statistics(q, k, quantized.k_mean, plan)
    limits = salekit.row_limits(m, l, quantized, 0.2, plan)
    mask = salekit.estimate(quantized, limits, plan)
    scores = salekit.block_scores(quantized, m, l, plan)
    sinks = np.zeros(4, np.float32)
    calls = (
        (salekit.quantize, dict(q=q, k=k, plan=plan)),
        (salekit.anchor_statistics, dict(q=q, k=k, k_mean=quantized.k_mean, plan=plan, sink_logits=sinks)),
        (salekit.row_limits, dict(m=m, l=l, quantized=quantized, thresholds=sinks + 1, plan=plan)),
        (salekit.estimate, dict(quantized=quantized, limits=limits, plan=plan)),
        (salekit.attend, dict(q=q, k=k, v=v, mask=mask, plan=plan, out=np.empty_like(q), sink_logits=sinks)),
        (salekit.block_scores, dict(quantized=quantized, m=m, l=l, plan=plan)),
        (salekit.mask_from_scores, dict(scores=scores, thresholds=0.2, plan=plan)),
    )
    foreign = Producer.of(q), Interface(256, q.shape, "<f2")
    for stage, arguments in calls:
        stage(**arguments)
        assert pickle.loads(pickle.dumps(stage)) is stage
        for name in (name for name, x in arguments.items() if isinstance(x, np.ndarray)):
            for x in foreign:
                with pytest.raises(ArgumentError, match=f"^{name}: got {type(x).__name__}; a stage wants NumPy or"):
                    stage(**{**arguments, name: x})
        with pytest.raises(ArgumentError, match=f"^{next(iter(arguments))}: got Producer"):
            stage(foreign[0], *tuple(arguments.values())[1:])
    taus = np.full(4, 0.2, np.float32)
    given = Producer.of(taus, dtype=(2, 32))
    assert salekit.mask_from_scores(scores, given, plan) == salekit.mask_from_scores(scores, 0.2, plan)


# --- plans of shapes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", np.float16, BF16])
def test_plan_of_shapes(layout, dtype):
    given = make(300, 410, batch=2, dtype=BF16 if dtype in ("bfloat16", BF16) else FP16)
    if layout == "bhsd":
        given = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in given]
    shapes = [x.shape for x in given]
    options = {"dense_below": 0, "layout": layout, "estimator": "int4"}
    prepared = salekit.plan(shapes[0], list(shapes[1]), tuple(np.array(shapes[2])), dtype=dtype, **options)
    of_arrays = salekit.plan(*given, **options)
    assert prepared.plan == of_arrays.plan and prepared.workspace_bytes == of_arrays.workspace_bytes
    want = salekit.sparse_attention(*given, thresholds=0.2, **options)
    assert prepared.run(*given, thresholds=0.2).tobytes() == want.tobytes()
    with pytest.raises(ArgumentError, match="k: got .*this plan is for"):
        prepared.run(given[0], np.concatenate([given[1]] * 2, 3)[..., :64], given[2])


def test_plan_of_shapes_takes_no_memory():
    shapes = ((1, 2**20, 64, 128), (1, 2**20, 8, 128), (1, 2**20, 8, 128))
    prepared = salekit.plan(*shapes, dtype="bfloat16", query_stride=2)
    assert (prepared.plan.seqlen_q, prepared.plan.num_kv_heads, prepared.plan.arch) == (2**20, 8, None)
    assert not prepared.plan.is_dense


def test_strides_of_one_element_do_not_count():
    given = make(1, 60)
    want = salekit.dense_attention(*given)
    odd = [np.lib.stride_tricks.as_strided(x, x.shape, (2, *x.strides[1:])) for x in given]
    odd[0] = np.lib.stride_tricks.as_strided(given[0], given[0].shape, (2, 6, *given[0].strides[2:]))
    prepared = salekit.plan(*(x.shape for x in given), dtype="bfloat16")
    assert prepared.run(*odd).tobytes() == want.tobytes()
    assert salekit.plan(*odd).run(*given).tobytes() == want.tobytes()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_plan_of_empty_shapes(lengths):
    q, k, v = make(*lengths, dtype=FP16) if lengths[1] else [x[:, :n] for x, n in zip(make(5, dtype=FP16), lengths * 2)]
    k, v = k[:, : lengths[1]], v[:, : lengths[1]]
    prepared = salekit.plan(q.shape, k.shape, v.shape, dtype="float16")
    out, lse = prepared.run(q, k, v, return_lse=True)
    assert prepared.workspace_bytes == 0 and out.shape == q.shape and not out.any() and np.isneginf(lse).all()


Q, K, V = make()


@pytest.mark.parametrize("args, options, error, match", [
    ((Q.shape, K.shape, V.shape), {}, DtypeError, "dtype: got None; wants 'float16' or 'bfloat16'"),
    ((Q.shape, K.shape, V.shape), {"dtype": "float32"}, DtypeError, "dtype: got 'float32'"),
    ((Q.shape, K.shape, V.shape), {"dtype": "bf16"}, DtypeError, "dtype: got 'bf16'"),
    ((Q.shape, K.shape, V.shape), {"dtype": object()}, DtypeError, "dtype: got <object"),
    ((Q.shape, K, V), {"dtype": "bfloat16"}, ArgumentError, "k: got ndarray; wants a shape"),
    ((Q, K, V.shape), {}, ArgumentError, "q: got ndarray; wants a shape"),
    ((Q, K, V), {"dtype": "bfloat16"}, ArgumentError, "dtype: got 'bfloat16'; wants None"),
    ((Q, K, V), {"device": 0}, ArgumentError, "device: got 0; wants None"),
    ((Q.tolist(), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, r"q: got \[\[.*; wants an array or a shape"),
    (((1, -3, 4, 64), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, r"q: got \(1, -3, 4, 64\); wants"),
    (((1, 3.0, 4, 64), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, "q: got .*integers >= 0"),
    (((1, True, 4, 64), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, "q: got .*integers >= 0"),
    (((), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, "q: got 0 axes"),
    ((Q.shape[1:], K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, "q: got 3 axes"),
    ((Q.shape, (1, 300, 3, 64), V.shape), {"dtype": "bfloat16"}, ArgumentError, "v: got num_kv_heads 2; wants 3"),
    (((1, 2**31, 4, 64), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, "q: got seqlen 2147483648"),
    (((2**70, 1, 4, 64), K.shape, V.shape), {"dtype": "bfloat16"}, ArgumentError, r"q: got shape .*2\*\*60"),
    ((Q.shape, K.shape, V.shape), {"dtype": "bfloat16", "device": "cuda"}, ArgumentError, "device: got 'cuda'"),
    ((Q.shape, K.shape, V.shape), {"dtype": "bfloat16", "device": True}, ArgumentError, "device: got True"),
    ((Q.shape, K.shape, V.shape), {"dtype": "bfloat16", "device": 10**6}, (ArgumentError, GpuError),
     "device: got 1000000|CuPy is needed"),
    ((Q.shape, K.shape, V.shape), {"dtype": "bfloat16", "block": (1, 2)}, ArgumentError, "block: got"),
])
def test_bad_shapes(args, options, error, match):
    with pytest.raises(error, match=match):
        salekit.plan(*args, **options)


# --- threads -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_shared", [True, False])
def test_threads_run_plans(is_shared):
    """One plan in all threads, or several; each thread with arrays and thresholds of its own."""
    num_threads, turns = 8, 6
    given = [make(150 + 40 * (0 if is_shared else seed % 3), seed=seed) for seed in range(num_threads)]
    made = {x[0].shape: salekit.plan(*(y.shape for y in x), dtype="bfloat16", dense_below=0) for x in given}
    taus = [0.05 * (1 + seed) for seed in range(num_threads)]
    wanted = [
        [x.tobytes() for x in salekit.sparse_attention(*x, thresholds=tau, dense_below=0, return_lse=True)]
        for x, tau in zip(given, taus)
    ]
    outs = [np.zeros_like(x[0]) for x in given]
    start, problems = threading.Barrier(num_threads), []

    def work(index):
        try:
            start.wait()
            for turn in range(turns):
                which = (index + turn) % num_threads
                prepared, out = made[given[which][0].shape], None
                if which == index:
                    out = outs[index]
                result, lse = prepared.run(*given[which], thresholds=taus[which], return_lse=True, out=out)
                assert [result.tobytes(), lse.tobytes()] == wanted[which]
                with pytest.raises(ArgumentError, match="q: got"):
                    prepared.run(given[which][0][:, :20], *given[which][1:])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert [out.tobytes() for out in outs] == [want[0] for want in wanted]
