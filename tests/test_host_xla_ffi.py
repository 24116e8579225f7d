"""XLA's call frames: the structures against the header, and handlers against frames made here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import salekit
from salekit import xla_attention, xla_ffi
from salekit.errors import ArgumentError

STRUCTURES = {
    "XLA_FFI_Api_Version": xla_ffi.ApiVersion,
    "XLA_FFI_Api": xla_ffi.Api,
    "XLA_FFI_Args": xla_ffi.Args,
    "XLA_FFI_Rets": xla_ffi.Rets,
    "XLA_FFI_Attrs": xla_ffi.Attrs,
    "XLA_FFI_CallFrame": xla_ffi.CallFrame,
    "XLA_FFI_Buffer": xla_ffi.Buffer,
    "XLA_FFI_Error_Create_Args": xla_ffi.ErrorCreateArgs,
    "XLA_FFI_Error_GetDetails_Args": xla_ffi.ErrorGetDetailsArgs,
    "XLA_FFI_Error_Destroy_Args": xla_ffi.ErrorDestroyArgs,
    "XLA_FFI_Stream_Get_Args": xla_ffi.StreamGetArgs,
    "XLA_FFI_InternalExtension": xla_ffi.InternalExtension,
    "XLA_FFI_Metadata": xla_ffi.Metadata,
    "XLA_FFI_Metadata_Extension": xla_ffi.MetadataExtension,
    "XLA_FFI_ByteSpan": xla_ffi.ByteSpan,
}
CONSTANTS = {
    "XLA_FFI_Extension_Metadata": xla_ffi._METADATA_EXTENSION,
    "XLA_FFI_ExecutionStage_EXECUTE": xla_ffi._EXECUTE,
    "XLA_FFI_AttrType_STRING": xla_ffi._STRING,
    "XLA_FFI_Error_Code_INVALID_ARGUMENT": xla_ffi.INVALID_ARGUMENT,
    "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED": xla_ffi.RESOURCE_EXHAUSTED,
    "XLA_FFI_Error_Code_FAILED_PRECONDITION": xla_ffi.FAILED_PRECONDITION,
    "XLA_FFI_Error_Code_INTERNAL": xla_ffi.INTERNAL,
}
OLDER_NAMES = {
    "XLA_FFI_Error_GetDetails": "XLA_FFI_Error_GetMessage",
    "XLA_FFI_InternalExtension": "XLA_FFI_Extension_Base",
}
DTYPE_NAMES = {"F16": np.float16, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "U32": np.uint32}


def test_structures_are_those_of_the_header(tmp_path):
    ffi = pytest.importorskip("jax.ffi", reason="needs JAX 0.5 or newer, which brings the header")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    header = (Path(ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    is_older = "XLA_FFI_Error_GetDetails" not in header

    def named(text):
        for newer, older in OLDER_NAMES.items():
            text = re.sub(rf"\b{newer}(_Args)?\b", rf"{older}\1", text) if is_older else text
        return text

    fields = [(name, field[0]) for name, structure in STRUCTURES.items() for field in structure._fields_]
    missing = {("XLA_FFI_Error_GetDetails_Args", "errc")} if is_older else set()
    fields = [field for field in fields if field not in missing]
    expressions = {f"{name}.{field}": named(f"offsetof({name}, {field})") for name, field in fields}
    expressions.update({name: name for name in CONSTANTS})
    expressions.update({f"XLA_FFI_DataType_{name}": f"XLA_FFI_DataType_{name}" for name in DTYPE_NAMES})
    lines = "\n".join(f'printf("{name} %zu\\n", (size_t)({text}));' for name, text in expressions.items())
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdbool.h>\n"
        "typedef struct XLA_FFI_Api_Version XLA_FFI_Api_Version; typedef struct XLA_FFI_Buffer XLA_FFI_Buffer;\n"
        f'#include "xla/ffi/api/c_api.h"\nint main(void) {{\n{lines}\nreturn 0;\n}}\n'
    )
    program = tmp_path / "offsets"
    subprocess.run([compiler, "-w", "-I", ffi.include_dir(), str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in (line.split() for line in printed.splitlines())}
    want = {f"{name}.{field}": getattr(STRUCTURES[name], field).offset for name, field in fields}
    want.update(CONSTANTS)
    for code, dtype in xla_ffi.DTYPES.items():
        name, = (name for name, each in DTYPE_NAMES.items() if np.dtype(each) == dtype)
        want[f"XLA_FFI_DataType_{name}"] = code
    assert found == want and len(found) > 60


# --- an XLA of our own ---------------------------------------------------------------------------------------------
class FakeXla:
    """An XLA_FFI_Api whose errors are numbers of ``errors``, and frames for it. stream: what calls run on, or None.

    None is ever freed: an XLA lasts as long as the process, and xla_ffi counts on that.
    """

    _all: list["FakeXla"] = []

    def __init__(self, version=(0, 1), stream=None):
        self.errors: dict[int, tuple[int, bytes]] = {}
        self.destroyed: list[int] = []
        self.stream = stream
        self._keep: list = []
        self._all.append(self)
        functions = {
            "XLA_FFI_Error_Create": self._create,
            "XLA_FFI_Error_GetDetails": self._get_details,
            "XLA_FFI_Error_Destroy": self._destroy,
            "XLA_FFI_Stream_Get": self._stream_get,
        }
        self.api = xla_ffi.Api(struct_size=ctypes.sizeof(xla_ffi.Api))
        self.api.api_version.major_version, self.api.api_version.minor_version = version
        for name, function in functions.items():
            pointer = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(function)
            self._keep.append(pointer)
            setattr(self.api, name, ctypes.cast(pointer, ctypes.c_void_p).value)

    def _create(self, address):
        args = xla_ffi.ErrorCreateArgs.from_address(address)
        assert args.struct_size == ctypes.sizeof(xla_ffi.ErrorCreateArgs)
        handle = 1000 + len(self.errors)
        self.errors[handle] = (args.errc, args.message)
        return handle

    def _get_details(self, address):
        args = xla_ffi.ErrorGetDetailsArgs.from_address(address)
        self._keep.append(self.errors[args.error][1])
        args.message = self._keep[-1]

    def _destroy(self, address):
        self.destroyed.append(xla_ffi.ErrorDestroyArgs.from_address(address).error)

    def _stream_get(self, address):
        args = xla_ffi.StreamGetArgs.from_address(address)
        assert args.ctx == 77
        if self.stream is None:
            self.errors[5] = (12, b"there is no stream")
            return 5
        args.stream = self.stream

    def frame(self, operands=(), results=(), attributes=(), stage=3):
        """An XLA_FFI_CallFrame. operands, results: (dtype code, shape, address); attributes: name to bytes, or a
        number, which is an attribute of another type."""
        frame = xla_ffi.CallFrame(struct_size=ctypes.sizeof(xla_ffi.CallFrame), ctx=77, stage=stage)
        frame.api = ctypes.addressof(self.api)
        for part, name, buffers in ((frame.args, "args", operands), (frame.rets, "rets", results)):
            part.size = len(buffers)
            setattr(part, name, self._pointers([self._buffer(*buffer) for buffer in buffers]))
        items = sorted(dict(attributes).items())
        frame.attrs.size = len(items)
        kinds = (ctypes.c_int * max(1, len(items)))(*(4 if isinstance(x, bytes) else 3 for _, x in items))
        self._keep.append(kinds)
        frame.attrs.types = ctypes.addressof(kinds)
        frame.attrs.names = self._pointers([self._span(name) for name, _ in items])
        frame.attrs.attrs = self._pointers([self._span(x) if isinstance(x, bytes) else 8 for _, x in items])
        self._keep.append(frame)
        return frame

    def _pointers(self, structures):
        addresses = [x if isinstance(x, int) else ctypes.addressof(x) for x in structures]
        self._keep += [structures, (ctypes.c_void_p * max(1, len(addresses)))(*addresses)]
        return ctypes.addressof(self._keep[-1])

    def _buffer(self, dtype, shape, address):
        dims = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        self._keep.append(dims)
        raw = (ctypes.c_uint8 * ctypes.sizeof(xla_ffi.Buffer))(*[0xAB] * ctypes.sizeof(xla_ffi.Buffer))  # as padding
        buffer = xla_ffi.Buffer.from_buffer(raw)
        buffer.dtype, buffer.data, buffer.rank, buffer.dims = dtype, address, len(shape), ctypes.addressof(dims)
        return buffer

    def _span(self, text):
        self._keep.append(ctypes.create_string_buffer(text + b"beyond"))  # spans need not end in a zero
        return xla_ffi.ByteSpan(ctypes.addressof(self._keep[-1]), len(text))

    def metadata_query(self, struct_size=ctypes.sizeof(xla_ffi.Metadata), with_api=True):
        metadata = xla_ffi.Metadata(struct_size=struct_size, traits=99)
        base = xla_ffi.InternalExtension(ctypes.sizeof(xla_ffi.MetadataExtension), xla_ffi._METADATA_EXTENSION, None)
        extension = xla_ffi.MetadataExtension(base, ctypes.addressof(metadata))
        frame = xla_ffi.CallFrame(struct_size=ctypes.sizeof(xla_ffi.CallFrame))
        frame.extension_start = ctypes.addressof(extension)
        frame.api = ctypes.addressof(self.api) if with_api else None
        self._keep += [metadata, extension]
        return frame, metadata


def handler_of(execute):
    return xla_ffi.make_handler(execute, lambda error: (3, f"{type(error).__name__}: {error}"))


def test_a_call_is_read():
    xla, calls = FakeXla(stream=4242), []
    frame = xla.frame(
        operands=[(16, (1, 2, 3, 4), 4096), (11, (), 8192)],
        results=[(8, (7,), 12288)],
        attributes={b"config": b"{}", b"other": 3},
    )
    assert handler_of(calls.append)(ctypes.addressof(frame)) is None
    call, = calls
    assert call.operands == ((16, 1, 2, 3, 4), (11,)) and call.results == ((8, 7),)
    assert call.addresses == [4096, 8192, 12288] and call.attributes == {b"config": b"{}"}
    assert call.stream() == 4242


def test_a_call_without_anything():
    calls = []
    frame = FakeXla().frame()
    assert handler_of(calls.append)(ctypes.addressof(frame)) is None
    assert (calls[0].operands, calls[0].results, calls[0].addresses, calls[0].attributes) == ((), (), [], {})


@pytest.mark.parametrize("error", [ArgumentError("q: is bad"), KeyboardInterrupt(), ValueError("zero \0 inside, ü")])
def test_an_exception_becomes_an_error(error):
    def fail(call):
        raise error

    xla = FakeXla()
    handle = handler_of(fail)(ctypes.addressof(xla.frame()))
    code, message = xla.errors[handle]
    assert code == 3 and message.decode() == f"{type(error).__name__}: {error}".replace("\0", " ")


def test_no_stream():
    xla = FakeXla(stream=None)
    handle = handler_of(lambda call: call.stream())(ctypes.addressof(xla.frame()))
    assert xla.errors[handle] == (3, b"FfiError: there is no stream") and xla.destroyed == [5]


def test_another_stage():
    xla = FakeXla()
    handle = handler_of(lambda call: None)(ctypes.addressof(xla.frame(stage=1)))
    assert b"stage 1" in xla.errors[handle][1]


def test_a_smaller_frame():
    xla = FakeXla()
    frame = xla.frame()
    frame.struct_size = 64
    handle = handler_of(lambda call: None)(ctypes.addressof(frame))
    assert b"the call frame has 64 bytes; wants 168" in xla.errors[handle][1]


@pytest.mark.parametrize("version, want", [((0, 1), (0, 1)), ((0, 3), (0, 3)), ((0, 9), xla_ffi.API_VERSION)])
def test_metadata(version, want):
    frame, metadata = FakeXla(version).metadata_query()
    assert handler_of(None)(ctypes.addressof(frame)) is None
    assert (metadata.api_version.major_version, metadata.api_version.minor_version) == want
    assert metadata.traits == 0 and metadata.api_version.struct_size == ctypes.sizeof(xla_ffi.ApiVersion)


def test_metadata_without_an_api():
    frame, metadata = FakeXla().metadata_query(with_api=False)  # as JAX before 0.9 asks
    assert handler_of(None)(ctypes.addressof(frame)) is None
    assert (metadata.api_version.major_version, metadata.api_version.minor_version) == (0, 1)


@pytest.mark.parametrize("version, size, match", [((1, 0), ctypes.sizeof(xla_ffi.Metadata), b"FFI 1.0"),
                                                  ((0, 1), 16, b"smaller")])
def test_metadata_of_an_unknown_xla(version, size, match):
    xla = FakeXla(version)
    frame, metadata = xla.metadata_query(size)
    handle = handler_of(None)(ctypes.addressof(frame))
    assert match in xla.errors[handle][1] and metadata.traits == 99


def test_a_refusal_without_an_api():
    frame, metadata = FakeXla().metadata_query(struct_size=16, with_api=False)
    assert handler_of(None)(ctypes.addressof(frame)) is None  # nobody to tell: the version that is missing says it
    assert metadata.api_version.minor_version == 0


# --- what attention does with a call -------------------------------------------------------------------------------
def make(batch=1, seqlen=70, heads=2, kv_heads=1, dtype=ml_dtypes.bfloat16):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, seqlen, n, 64)).astype(dtype) for n in (heads, kv_heads, kv_heads)]


def buffers(*arrays):
    codes = {dtype: code for code, dtype in xla_ffi.DTYPES.items()}
    return [(codes[x.dtype], x.shape, x.ctypes.data) for x in arrays]


def config(**values):
    return {b"config": xla_attention.Config(**values).encode().encode()}


@pytest.mark.parametrize("values", [
    {"thresholds": 0.008}, {"thresholds": None, "return_mask": True}, {"thresholds": float("inf"), "layout": "bhsd"},
    {"thresholds": 0.0, "options": {"block": (64, 32), "softmax_scale": 0.1, "causal": False, "sink": np.int64(3)}},
    {"thresholds": None, "has_sinks": True, "options": {"softcap": 30.0, "window_size": (7, -1)}},
])
def test_config_goes_through_json(values):
    config = xla_attention.Config(**values)
    assert xla_attention.Config.decode(config.encode()) == config


def test_the_twin_runs_on_the_buffers():
    q, k, v = make()
    out = np.full_like(q, 7)
    lse, words = np.full((1, 2, 70), np.nan, np.float32), np.full((1, 2, 1, 1), 99, np.uint32)
    taus = np.array([0.3, np.nan], np.float32)  # NaN is a dense head, as on a GPU
    attributes = config(thresholds=None, return_lse=True, return_mask=True, options={"dense_below": 0})
    xla = FakeXla()
    frame = xla.frame(buffers(q, k, v, taus), buffers(out, lse, words), attributes)
    assert xla_attention.handlers()["cpu"](ctypes.addressof(frame)) is None, xla.errors
    want = salekit.sparse_attention(
        q, k, v, thresholds=[0.3, 0.0], dense_below=0, return_lse=True, return_mask=True
    )
    assert out.tobytes() == want[0].tobytes() and (lse == want[1]).all() and (words == want[2].words).all()


def test_the_twin_takes_sink_logits():
    """After thresholds, or alone; NaN is not looked at, as on a GPU, and makes NaN of its head."""
    q, k, v = make()
    taus = np.array([0.3, 0.1], np.float32)
    options = {"dense_below": 0, "softcap": 4.0, "window_size": (40, 0)}
    for thresholds, operands in ((None, (taus,)), (0.3, ())):
        for sinks in (np.array([1.5, -np.inf], np.float32), np.array([1.5, np.nan], np.float32)):
            out, lse = np.full_like(q, 7), np.zeros((1, 2, 70), np.float32)
            attributes = config(thresholds=thresholds, return_lse=True, options=options, has_sinks=True)
            xla = FakeXla()
            frame = xla.frame(buffers(q, k, v, *operands, sinks), buffers(out, lse), attributes)
            assert xla_attention.handlers()["cpu"](ctypes.addressof(frame)) is None, xla.errors
            tau = taus if thresholds is None else thresholds
            want = salekit.sparse_attention(
                q, k, v, thresholds=tau, sink_logits=np.nan_to_num(sinks, nan=0), return_lse=True, **options
            )
            heads = np.flatnonzero(~np.isnan(sinks))
            assert (out[:, :, heads] == want[0][:, :, heads]).all() and (lse[:, heads] == want[1][:, heads]).all()
            rest = np.flatnonzero(np.isnan(sinks))
            assert np.isnan(out[:, :, rest].astype(np.float32)).all() and np.isnan(lse[:, rest]).all()


@pytest.mark.parametrize("attributes, results, match", [
    ({}, 1, b"ArgumentError: config: got b'{}'"),
    ({b"config": b"nonsense"}, 1, b"ArgumentError: config: got b'nonsense'"),
    (config(thresholds=0.1, schema=9), 1, b"schema 9; wants 1"),
    (config(thresholds=0.1, return_lse=True), 1, b"got (3, 1) operands and results; wants (3, 2)"),
    (config(thresholds=0.1, return_lse=True), 2, b"ArgumentError: result: got"),
    (config(thresholds=0.1, options={"block": (1, 1)}), 1, b"ArgumentError: block: got (1, 1)"),
    (config(thresholds=0.1, has_sinks=True), 1, b"got (3, 1) operands and results; wants (4, 1)"),
])
def test_bad_calls(attributes, results, match):
    q, k, v = make()
    outs = [np.full_like(q, 7), np.zeros((1, 2, 71), np.float32)][:results]
    xla = FakeXla()
    frame = xla.frame(buffers(q, k, v), buffers(*outs), attributes)
    code, message = xla.errors[xla_attention.handlers()["cpu"](ctypes.addressof(frame))]
    assert code == xla_ffi.INVALID_ARGUMENT and match in message


def test_a_buffer_of_another_dtype():
    q, k, v = make()
    xla = FakeXla()
    frame = xla.frame([*buffers(q, k), (2, v.shape, v.ctypes.data)], buffers(np.empty_like(q)), config(thresholds=0.1))
    code, message = xla.errors[xla_attention.handlers()["cpu"](ctypes.addressof(frame))]
    assert code == xla_ffi.INVALID_ARGUMENT and b"data type 2; wants float16" in message


def test_what_a_gpu_call_passes_on(monkeypatch):
    """Everything of a call on a GPU but its launches: arrays at XLA's addresses, its stream, plans made once."""
    cupy = pytest.importorskip("cupy")
    from contextlib import nullcontext
    from types import SimpleNamespace

    runs, checked, plans, streams = [], [], [], []

    class Plan:
        plan = SimpleNamespace(batch=1, num_heads=2, seqlen_q=70, words_shape=(1, 2, 1, 1))

        def _check(self, *args, workspace, sink_logits, lse_out, words_out):
            checked.append(args)
            return (*args, workspace, sink_logits, lse_out, words_out)

        def _execute(self, arguments):
            runs.append(arguments)

    def plan_of(q, k, v, layout, options):
        plans.append((layout, options))
        return Plan()

    runtime = SimpleNamespace(pointerGetAttributes=lambda address: SimpleNamespace(device=0))
    fake = SimpleNamespace(ndarray=cupy.ndarray, cuda=SimpleNamespace(
        runtime=runtime, UnownedMemory=cupy.cuda.UnownedMemory, MemoryPointer=cupy.cuda.MemoryPointer,
        Device=lambda device: nullcontext(),
    ))
    monkeypatch.setattr(xla_attention.arrays, "import_cupy", lambda: fake)
    monkeypatch.setattr(xla_attention, "_stream", lambda *stream: nullcontext(streams.append(stream)))
    monkeypatch.setattr(xla_attention, "plan_of", plan_of)
    for cache in ("_plans", "_arrays", "_prepared"):
        monkeypatch.setattr(xla_attention, cache, xla_attention.workspaces.RecentlyUsed(16))
    base = 0x7F0000000000
    shapes = [(16, (1, 70, 2, 64)), (16, (1, 70, 1, 64)), (16, (1, 70, 1, 64)), (11, (2,)), (11, (2,))]
    operands = [(code, shape, base + 65536 * i) for i, (code, shape) in enumerate(shapes)]
    results = [(16, (1, 70, 2, 64), base + 65536 * 5), (11, (1, 2, 70), base + 65536 * 6),
               (8, (1, 2, 1, 1), base + 65536 * 7)]
    kind = dict(return_lse=True, return_mask=True, options={"dense_below": 0}, has_sinks=True)
    attributes = config(thresholds=None, **kind)
    xla = FakeXla(stream=4242)
    frame = xla.frame(operands, results, attributes)
    for _ in range(3):  # the same buffers, as in a loop
        assert xla_attention.handlers()["CUDA"](ctypes.addressof(frame)) is None, xla.errors
    assert plans == [("bshd", {"dense_below": 0})] and streams == [(0, 4242)] * 3
    assert len(runs) == 3 and len(checked) == 1
    q, k, v, thresholds, return_lse, return_mask, out, workspace, sinks, lse, words = runs[0]
    assert (return_lse, return_mask, workspace) == (True, True, None)
    for got, (code, shape, address) in zip((q, k, v, thresholds, sinks, out, lse, words), operands + results):
        assert (got.dtype, got.shape, got.data.ptr) == (xla_ffi.DTYPES[code], shape, address)
        assert got.flags.c_contiguous
    assert all(a is b for a, b in zip(runs[0], runs[2]) if isinstance(a, cupy.ndarray))  # made once

    # A buffer elsewhere is another array, also where all the others stay; the plan is the same.
    moved = [(*results[0][:2], base + 65536 * 9), *results[1:]]
    for where in (moved, results, moved):
        frame = xla.frame(operands, where, attributes)
        assert xla_attention.handlers()["CUDA"](ctypes.addressof(frame)) is None, xla.errors
        assert runs[-1][6].data.ptr == where[0][2] and runs[-1][0] is q and len(plans) == 1
    assert runs[-1][6] is runs[-3][6] and runs[-2][6] is out

    frame = xla.frame([*operands[:3], operands[4]], results, config(thresholds=0.25, **kind))
    assert xla_attention.handlers()["CUDA"](ctypes.addressof(frame)) is None, xla.errors
    assert runs[-1][3] == 0.25 and runs[-1][8].data.ptr == operands[4][2]

    frame = xla.frame(operands, [results[0], (11, (1, 2, 71), base), results[2]], attributes)
    code, message = xla.errors[xla_attention.handlers()["CUDA"](ctypes.addressof(frame))]
    assert code == xla_ffi.INVALID_ARGUMENT and b"result: got shape (1, 2, 71); wants (1, 2, 70)" in message
    xla.stream = None
    frame = xla.frame(operands, results, attributes)
    code, message = xla.errors[xla_attention.handlers()["CUDA"](ctypes.addressof(frame))]
    assert code == xla_ffi.INTERNAL and b"there is no stream" in message


def test_where_lse_and_mask_go(monkeypatch):
    """AttentionPlan writes them where it is told to; the addresses a program is linked with, without a GPU."""
    cupy = pytest.importorskip("cupy")
    import threading
    from types import SimpleNamespace

    from salekit import attention_plan
    from salekit.plans import Plan

    def array(code, shape, address):
        return xla_attention._array(0, (code, *shape), address)

    linked = []
    program = SimpleNamespace(
        workspace_bytes=0, write_values=lambda *values: None, submit=lambda *args: None,
        link=lambda *addresses: linked.append(addresses),
    )
    prepared = attention_plan.AttentionPlan.__new__(attention_plan.AttentionPlan)
    prepared.plan, prepared.layout = Plan(1, 70, 70, 2, 1, 64, "bfloat16", 0.125, dense_below=0), "bshd"
    prepared._device, prepared._gpu, prepared._lock = 0, None, threading.Lock()
    prepared._programs = SimpleNamespace(get=lambda key: program)
    monkeypatch.setattr(attention_plan.programs, "bind_context", lambda device: None)
    monkeypatch.setattr(attention_plan.workspaces, "is_capturing", lambda stream: False)
    base = 0x7E0000000000
    shapes = [(16, (1, 70, 2, 64)), (16, (1, 70, 1, 64)), (16, (1, 70, 1, 64)), (16, (1, 70, 2, 64)), (11, (2,)),
              (11, (1, 2, 70)), (8, (1, 2, 1, 1))]
    q, k, v, out, taus, lse, words = (array(*shape, base + 32768 * i) for i, shape in enumerate(shapes))
    prepared._reaches = [attention_plan.arrays.reach(x.shape, x.strides, 2) for x in (q, k, v)]
    stream = SimpleNamespace(ptr=5)
    fake = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream, memory=cupy.cuda.memory))
    monkeypatch.setattr(attention_plan.arrays, "import_cupy", lambda: fake)  # has nothing that allocates
    result = prepared._execute(prepared._check(q, k, v, taus, True, True, out, None, lse_out=lse, words_out=words))
    assert result[0] is out and result[1] is lse and result[2].words is words
    assert linked == [(0, *(base + 32768 * i for i in range(7)))]
    prepared._execute(prepared._check(q, k, v, 0.25, False, True, out, None, words_out=words))
    assert linked[1] == (0, *(base + 32768 * i for i in (0, 1, 2, 3, 6)))


# --- without JAX ---------------------------------------------------------------------------------------------------
def test_without_jax():
    code = (
        "import sys, salekit\n"
        "assert 'jax' not in sys.modules\n"
        "sys.modules['jax'] = None\n"
        "try:\n"
        "    import salekit.jax\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    root = Path(salekit.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert "salekit.jax needs JAX 0.5 or newer: pip install 'salekit[jax]'" in done.stdout, done.stderr
