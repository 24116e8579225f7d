"""Checks of arrays, options, thresholds and files: every message names the argument, what it got and what it wants."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from salekit import arrays, call_checks
from salekit.data_files import load_qkv, load_sample
from salekit.errors import ArgumentError, DtypeError, FileFormatError, SalekitError
from salekit.thresholds import as_thresholds, load_thresholds


def make(seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=64, batch=2, dtype=np.float16):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim)).astype(dtype)
    k, v = (rng.standard_normal((batch, seqlen_k, kv_heads, head_dim)).astype(dtype) for _ in range(2))
    return q, k, v


Q, K, V = make()


class HostDlpack:
    """A producer that is not NumPy, such as a CPU tensor of another framework."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return (1, 0)


# --- tensors ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("q, k, v, error, words", [
    (Q[0], K, V, ArgumentError, ["q", "3 axes", "4 axes"]),
    (Q, K[..., None], V, ArgumentError, ["k", "5 axes", "4 axes"]),
    (Q.tolist(), K, V, DtypeError, ["q", "list", "NumPy"]),
    (None, K, V, DtypeError, ["q", "NoneType"]),
    (Q.astype(np.float32), K, V, DtypeError, ["q", "float32", "float16"]),
    (Q.astype(">f2"), K, V, DtypeError, ["q", ">f2", "float16"]),
    (Q, K.astype(ml_dtypes.bfloat16), V, DtypeError, ["k", "bfloat16", "float16"]),
    (Q, K, V.astype(np.int16), DtypeError, ["v", "int16"]),
    (Q, K[:1], V, ArgumentError, ["k", "batch 1", "2"]),
    (Q, K, V[:, :6], ArgumentError, ["v", "seqlen 6", "7"]),
    (Q, K, V[:, :, :1], ArgumentError, ["v", "num_kv_heads 1", "2"]),
    (Q[:, :, :3], K, V, ArgumentError, ["k", "2 heads", "3"]),
    (Q, K[:, :, :0], V[:, :, :0], ArgumentError, ["k", "0 heads"]),
    (Q[..., :32], K[..., :32], V[..., :32], ArgumentError, ["q", "head_dim 32", "64, 96, 128, 192, 256"]),
    (Q, np.concatenate([K, K], 3), V, ArgumentError, ["k", "head_dim 128", "64"]),
    (np.concatenate([Q, Q], 3)[..., ::2], K, V, ArgumentError, ["q", "2 elements", "1"]),
    (Q, K, V.swapaxes(2, 3).copy().swapaxes(2, 3), ArgumentError, ["v", "last axis"]),
])
def test_bad_tensor(q, k, v, error, words):
    with pytest.raises(error) as caught:
        call_checks.as_arrays(q, k, v)
    message = str(caught.value)
    assert message.startswith(words[0] + ":") and all(word in message for word in words), message
    assert isinstance(caught.value, SalekitError) and isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize("layout", ["hsbd", None, 3, ["bshd"]])
def test_bad_layout(layout):
    with pytest.raises(ArgumentError, match="layout: got"):
        call_checks.as_arrays(Q, K, V, layout)


def test_layouts_are_views():
    q, k, v = call_checks.as_arrays(*(x.transpose(0, 2, 1, 3) for x in (Q, K, V)), layout="bhsd")
    for got, want in zip((q, k, v), (Q, K, V)):
        assert got.shape == want.shape and np.shares_memory(got, want)


def test_broadcast_and_reversed_inputs_are_fine():
    shared = np.broadcast_to(K[:, :1], K.shape)
    q, k, _ = call_checks.as_arrays(Q[:, ::-1], shared, shared)
    assert k.strides[1] == 0 and q.strides[1] < 0


def test_host_dlpack():
    q, _, _ = call_checks.as_arrays(HostDlpack(Q), HostDlpack(K), V)
    assert isinstance(q, np.ndarray) and np.shares_memory(q, Q)
    with pytest.raises(DtypeError, match="k: cannot import HostDlpack.*bfloat16"):
        call_checks.as_arrays(Q, HostDlpack(K.astype(ml_dtypes.bfloat16)), V)


def test_unknown_and_mixed_devices():
    class Elsewhere(HostDlpack):
        device = (10, 0)

        def __dlpack_device__(self):
            return self.device

    with pytest.raises(ArgumentError, match="q: is on a device of DLPack type 10"):
        call_checks.as_arrays(Elsewhere(Q), K, V)
    Elsewhere.device = (2, 1)
    with pytest.raises(ArgumentError, match="v: is on cuda:1; wants host memory"):
        call_checks.as_arrays(Q, K, Elsewhere(V))
    with pytest.raises(ArgumentError, match="thresholds: is on cuda:1; wants host memory"):
        as_thresholds(Elsewhere(np.ones(4, np.float32)), 4, Q)


def test_gpu_strides():
    def fake(strides, pointer=256, shape=(2, 5, 4, 64)):
        return SimpleNamespace(shape=shape, strides=strides, size=int(np.prod(shape)), dtype=np.dtype(np.float16),
                               data=SimpleNamespace(ptr=pointer))

    good = (2560, 512, 128, 2)
    call_checks._check_strides("q", fake(good))
    call_checks._check_strides("q", fake((0, 512, 0, 2)))
    call_checks._check_strides("q", fake((7, 512, 128, 2), shape=(1, 5, 4, 64)))  # one entry's stride is never used
    for bad in (fake(good, pointer=258), fake((2560, 520, 128, 2))):
        with pytest.raises(ArgumentError, match="q: .*16-byte aligned.*multiples of 8 elements"):
            call_checks._check_strides("q", bad)
    record = arrays.tensor_view(fake(good))
    assert record.shape == (1,) and record.nbytes == 32 and record[0].tolist() == (256, 1280, 256, 64)


# --- options ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option, value", [
    ("estimator", "int5"), ("estimator", 8), ("estimator", None), ("attend", "fp8"), ("attend", 8),
    ("block", (32, 32)), ("block", (64, 16)), ("block", 64), ("block", (64,)), ("block", "64x32"),
    ("block", (64.0, 32)),
    ("query_stride", 3), ("query_stride", 0), ("query_stride", 1.0), ("query_stride", True), ("full_rows", -1),
    ("full_rows", 1.5), ("sink", -32), ("local", "128"), ("dense_below", None), ("causal", 1), ("causal", "yes"),
    ("softmax_scale", 0), ("softmax_scale", -1.0), ("softmax_scale", float("nan")), ("softmax_scale", float("inf")),
    ("softmax_scale", 1e-60), ("softmax_scale", "1"), ("softmax_scale", True),
])
def test_bad_option(option, value):
    with pytest.raises(ArgumentError) as caught:
        call_checks.make_plan(Q, K, V, **{option: value})
    message = str(caught.value)
    assert message.startswith(f"{option}: ") and "wants" in message and repr(value).strip("'") in message


@pytest.mark.parametrize("value", [2.0, 3, -1, True, None, "2", 2**70, np.True_, np.float32(4)])
def test_query_strides_that_are_none(value):
    with pytest.raises(ArgumentError, match="^query_stride: got .*; wants one of 1, 2, 4$"):
        call_checks.make_plan(Q, K, V, query_stride=value)
    assert call_checks.make_plan(Q, K, V, query_stride=np.int8(2)).query_stride == 2


def test_plan():
    options = dict(block=[64, np.int64(128)], sink=np.int32(64), full_rows=2**70, softmax_scale=2)
    plan = call_checks.make_plan(Q, K, V, **options)
    assert (plan.batch, plan.seqlen_q, plan.seqlen_k, plan.num_heads, plan.num_kv_heads) == (2, 5, 7, 4, 2)
    assert (plan.head_dim, plan.dtype, plan.arch, plan.estimator) == (64, "float16", None, "int8")
    assert (plan.block_q, plan.block_k, plan.sink, plan.softmax_scale) == (64, 128, 64, 2.0)
    assert plan.shape_record["full_rows"][0] >= plan.seqlen_q
    assert call_checks.make_plan(*make(dtype=ml_dtypes.bfloat16)).dtype == "bfloat16"
    swapped = [x.transpose(0, 2, 1, 3) for x in (Q, K, V)]
    assert call_checks.make_plan(*swapped, layout="bhsd") == call_checks.make_plan(Q, K, V)


def overlapping(row_bytes):
    """Like Q, with rows so many bytes apart: each holds the end of the row before, or not."""
    memory = np.zeros(4 * Q.size, np.float16)
    return np.lib.stride_tricks.as_strided(memory, Q.shape, (2 * Q.size, row_bytes, 128, 2))


def test_rows_that_just_do_not_overlap():
    call_checks.check_out(overlapping(512), Q, "bshd")
    call_checks.check_out(np.empty((4, 5, 2, 64), np.float16).transpose(2, 1, 0, 3), Q, "bshd")
    call_checks.check_out(np.empty((2, 4, 5, 64), np.float16), Q, "bhsd")


@pytest.mark.parametrize("out, error, match", [
    (np.empty((2, 5, 4, 63), np.float16), ArgumentError, r"out: got shape \(2, 5, 4, 63\); wants \(2, 5, 4, 64\)"),
    (np.empty(Q.shape, np.float32), DtypeError, "out: got dtype float32"),
    (np.empty(Q.shape, ml_dtypes.bfloat16), DtypeError, "out: got dtype bfloat16; wants float16"),
    (np.broadcast_to(Q[:1], Q.shape), ArgumentError, "out: has a zero or negative stride"),
    (overlapping(256), ArgumentError, "out: has a stride of 128 elements, the axes inside it take 256"),
    (overlapping(510), ArgumentError, "out: has a stride of 255 elements, the axes inside it take 256"),
    (np.empty((2, 5, 4, 128), np.float16)[..., ::2], ArgumentError, "out: the last axis"),
    ("out", DtypeError, "out: got str"),
])
def test_bad_out(out, error, match):
    with pytest.raises(error, match=match):
        call_checks.check_call(Q, K, V, layout="bshd", out=out)


def test_out_beside_its_inputs():
    """Interleaved with them in one buffer: heads, rows, or one after the other."""
    whole = np.zeros((2, 6, 12, 64), np.float16)
    q, k, v, out = (whole[:, :, heads] for heads in (slice(4), slice(4, 6), slice(6, 8), slice(8, 12)))
    call_checks.check_call(q, k, v, layout="bshd", out=out)
    call_checks.check_call(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)), layout="bhsd", out=out.transpose(0, 2, 1, 3))
    apart, rows = np.zeros((4, 2, 5, 4, 64), np.float16), np.zeros((2, 20, 4, 64), np.float16)
    call_checks.check_call(*apart[:3], layout="bshd", out=apart[3])
    call_checks.check_call(*(rows[:, i::4] for i in range(3)), layout="bshd", out=rows[:, 3::4])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_that_shares_memory(name):
    inputs = {other: np.zeros((2, 6, 4, 64), np.float16) for other in "qkv"}
    whole = np.zeros((2, 24, 4, 64), np.float16)
    for mine, out in (
        (whole[:, :6], whole[:, :6]),
        (whole[:, :6], whole[:, 5:11]),
        (whole[:, 5::-1], whole[:, :6]),
        (whole[:, 0:12:2], whole[:, 0:18:3]),
        (np.broadcast_to(whole[:1, :1], (2, 6, 4, 64)), whole[:, :6]),
    ):
        inputs[name] = mine
        with pytest.raises(ArgumentError, match=f"^out: shares memory with {name}; wants memory of its own"):
            call_checks.check_call(*inputs.values(), layout="bshd", out=out)


def test_views_that_are_hard_to_tell_apart(monkeypatch):
    """What is not certain is not refused."""
    memory = np.zeros(10**6, np.float16)
    a, b = (np.lib.stride_tricks.as_strided(memory[start:], (3, 99, 8, 32), strides)
            for start, strides in ((0, (246914, 6274, 66, 2)), (33, (123456, 6208, 130, 2))))
    monkeypatch.setattr(arrays, "_MAX_WORK", 1)
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(a, b, max_work=1)
    assert not arrays.have_common_bytes(a, b)


def test_out_is_refused_where_elements_are_shared():
    """Random views of one buffer, padded in every axis, against the sets of their elements."""
    rng, memory, kinds = np.random.default_rng(3), np.zeros(60_000, np.float16), set()
    for _ in range(300):
        views = []
        for _ in range(2):
            batch, rows, heads = rng.integers(1, (4, 30, 4))
            head = 64 + 8 * rng.integers(0, 4)
            row = heads * head + 8 * rng.integers(0, 5)
            each = rows * row + 8 * rng.integers(0, 900)
            start = 8 * rng.integers(0, (memory.size - batch * each) // 8)
            at = start + each * np.arange(batch)[:, None, None, None] + row * np.arange(rows)[:, None, None]
            at = at + head * np.arange(heads)[:, None] + np.arange(64)
            shape, strides = (batch, rows, heads, 64), (2 * each, 2 * row, 2 * head, 2)
            views.append((np.lib.stride_tricks.as_strided(memory[start:], shape, strides), set(at.ravel().tolist())))
        (a, of_a), (b, of_b) = views
        first, last = zip(arrays.span(a), arrays.span(b))
        kinds.add(kind := (max(first) < min(last), bool(of_a & of_b)))
        assert arrays.have_common_bytes(a, b) == kind[1]
    assert kinds == {(False, False), (True, False), (True, True)}


def test_read_only_out():
    out = np.empty_like(Q)
    out.flags.writeable = False
    with pytest.raises(ArgumentError, match="out: is read-only"):
        call_checks.check_call(Q, K, V, layout="bshd", out=out)


def test_stream_on_host():
    with pytest.raises(ArgumentError, match="stream: q is in host memory"):
        with arrays.on_stream(Q, 0):
            pass


# --- thresholds ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, 0.008, np.float32(0.5), float("inf"), np.array(0.25)])
def test_scalar_threshold(value):
    got = as_thresholds(value, 4, Q)
    assert type(got) is float and got == float(value)


@pytest.mark.parametrize("value", [[0, 1, 2, np.inf], (1, 2, 3, 4), np.arange(8.0)[::2], np.ones(4, ml_dtypes.bfloat16),
                                   HostDlpack(np.ones(4, np.float32))])
def test_threshold_array(value):
    got = as_thresholds(value, 4, Q)
    assert got.dtype == np.float32 and got.shape == (4,) and got.flags.c_contiguous


@pytest.mark.parametrize("value, error, match", [
    (-1, ArgumentError, "got -1"),
    (float("nan"), ArgumentError, "got nan"),
    ([0.1, 0.2, np.nan, 0.3], ArgumentError, "got nan for head 2"),
    ([0.1, -0.2, 0.2, 0.3], ArgumentError, "got -0.2 for head 1"),
    ([0.1, 0.2], ArgumentError, r"got shape \(2,\); wants a scalar or \[num_heads\] = \(4,\)"),
    (np.ones((1, 4)), ArgumentError, r"got shape \(1, 4\)"),
    ([[1], [2, 3]], ArgumentError, "ragged"),
    (["a", "b", "c", "d"], DtypeError, "got dtype"),
    (np.ones(4, bool), DtypeError, "got dtype bool"),
    (True, DtypeError, "got bool; wants a number, or one a head in a list"),
    (1j, DtypeError, "got complex; wants a number"),
    ("0.1", DtypeError, "got str; wants a number"),
])
def test_bad_thresholds(value, error, match):
    with pytest.raises(error, match="thresholds: .*" + match):
        as_thresholds(value, 4, Q)


def test_load_thresholds(tmp_path):
    path = tmp_path / "tau.json"
    for content in ({"schema": 1, "thresholds": [0.008, 0, float("inf")], "model": "m"}, [0.008, 0, float("inf")]):
        path.write_text(json.dumps(content))
        got = load_thresholds(path)
        assert got.dtype == np.float32 and got.tolist() == [np.float32(0.008), 0, np.inf]


@pytest.mark.parametrize("content", [
    "", "{", "[0.1", "3", "null", "[]", "{}", '{"schema": 2, "thresholds": [1]}', '{"schema": 1}', "[NaN]", "[-1]",
    "[true]", '["1"]', "[[1]]", "[null]", '{"schema": 1, "thresholds": 0.1}', "[" * 100_000, "[1" + "0" * 400 + "]",
    "\x00\x01",
])
def test_bad_threshold_file(tmp_path, content):
    path = tmp_path / "tau.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match="tau.json: "):
        load_thresholds(str(path))


def test_missing_and_binary_threshold_file(tmp_path):
    with pytest.raises(FileFormatError, match="missing.json: cannot be read"):
        load_thresholds(tmp_path / "missing.json")
    with pytest.raises(FileFormatError):
        load_thresholds(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00[1]")
    with pytest.raises(FileFormatError, match="is not JSON"):
        load_thresholds(tmp_path / "x.json")


# --- files -----------------------------------------------------------------------------------------------------
def save_safetensors(path, tensors, metadata=None):
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)


def test_sample():
    sample = load_sample()
    assert list(sample) == ["q", "k", "v"]
    assert sample["q"].shape == (1, 4096, 2, 128) and sample["k"].shape == sample["v"].shape == (1, 4096, 1, 128)
    assert all(x.dtype == ml_dtypes.bfloat16 and np.isfinite(x.astype(np.float32)).all() for x in sample.values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", None])
def test_load_qkv(tmp_path, dtype, suffix, layout):
    q, k, v = make(dtype=dtype)
    stored = {name: np.ascontiguousarray(x.transpose(0, 2, 1, 3) if layout == "bhsd" else x)
              for name, x in zip("qkv", (q, k, v))}
    metadata = {"model": "m", **({"layout": layout} if layout else {})}
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **stored, __meta__=np.array(json.dumps(metadata)))
    else:
        save_safetensors(path, stored, metadata)
    got_q, got_k, got_v, got = load_qkv(path)
    for a, b in zip((got_q, got_k, got_v), (q, k, v)):
        assert a.dtype == b.dtype and a.shape == b.shape and (a.view(np.uint16) == b.view(np.uint16)).all()
    assert got == {"model": "m", "layout": "bshd"}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_load_qkv_of_a_layer(tmp_path, suffix):
    arrays = {
        f"model.layers.{layer}.{name}": x + np.float16(layer) for layer in (3, 12) for name, x in zip("qkv", (Q, K, V))
    }
    path = tmp_path / f"x{suffix}"
    np.savez(path, **arrays) if suffix == ".npz" else save_safetensors(path, arrays, {})
    for layer in (3, "12"):
        *got, _ = load_qkv(path, layer)
        assert all((a == b + np.float16(layer)).all() for a, b in zip(got, (Q, K, V)))
    with pytest.raises(FileFormatError, match="holds layers, 3, 12; wants the one to load, as layer= or --layer"):
        load_qkv(path)
    for layer in (7, "03", "x"):
        with pytest.raises(FileFormatError, match=f"has no layer {layer}; holds 3, 12"):
            load_qkv(path, layer)


def test_npz_without_metadata(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", q=Q, k=K, v=V)
    assert load_qkv(tmp_path / "x.npz")[3] == {"layout": "bshd"}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, q=Q, k=K, v=V)
    else:
        save_safetensors(path, {"q": Q, "k": K, "v": V})
    data = path.read_bytes()
    for length in (0, 4, 8, 20, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="x" + suffix):
            load_qkv(path)
    rng = np.random.default_rng(1)
    for _ in range(200):  # a flipped byte is an error or harmless, never a traceback of another kind
        damaged = bytearray(data)
        damaged[rng.integers(min(len(data), 600))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_qkv(path)
        except FileFormatError:
            pass


def test_wrong_files(tmp_path):
    def bad(name, match):
        with pytest.raises(FileFormatError, match=match):
            load_qkv(tmp_path / name)

    bad("missing.safetensors", "cannot be read")
    bad("x.txt", "suffix '.txt'; wants .safetensors or .npz")
    np.savez(tmp_path / "a.npz", q=Q, k=K)
    bad("a.npz", "has no tensor 'v'")
    np.savez(tmp_path / "b.npz", q=np.array([object()]), k=K, v=V)
    bad("b.npz", "b.npz")  # a pickle
    np.savez(tmp_path / "c.npz", q=Q.astype(np.float32), k=K, v=V)
    bad("c.npz", "q: got dtype float32")
    np.savez(tmp_path / "d.npz", q=Q, k=K, v=V, __meta__=np.array('{"layout": "sbhd"}'))
    bad("d.npz", "layout 'sbhd'")
    for number, meta in enumerate(("[1]", "{", '{"layout": ["bshd"]}')):
        np.savez(tmp_path / f"m{number}.npz", q=Q, k=K, v=V, __meta__=np.array(meta))
        bad(f"m{number}.npz", f"m{number}.npz")
    np.save(tmp_path / "e.npy", Q)
    (tmp_path / "e.npz").write_bytes((tmp_path / "e.npy").read_bytes())
    bad("e.npz", "not an npz archive")
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("q", "text")
    bad("f.npz", "f.npz")
    save_safetensors(tmp_path / "a.safetensors", {"q": Q, "v": V})
    bad("a.safetensors", "has no tensor 'k'")
    save_safetensors(tmp_path / "b.safetensors", {"q": Q, "k": K[:, :3], "v": V})
    bad("b.safetensors", "v: got seqlen 7; wants 3")
    save_safetensors(tmp_path / "c.safetensors", {"q": Q.astype(np.float32), "k": K, "v": V})
    bad("c.safetensors", "q: got dtype F32; wants F16 or BF16")
