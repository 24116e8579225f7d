"""What a GPU would launch for packed sequences and given statistics, recorded and linked by a fake driver."""

from __future__ import annotations

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

import test_host_programs as fakes  # noqa: E402
from test_host_programs import OUT, STREAM, WORKSPACE, K, Q, V, fake, gpu_array, pointer  # noqa: E402, F401
from test_host_serving import ESTIMATORS  # noqa: E402

import salekit  # noqa: E402
from salekit import arrays, attention_plan, plans, sequences, workspaces  # noqa: E402
from salekit.errors import ArgumentError, DtypeError  # noqa: E402

SUMS_Q, OF_K, TABLE, TAUS, LSE, STATISTICS, SINKS = (0x7F00_0000_0000 + (i << 34) for i in range(8, 15))
HOST_SINKS = np.array([1.5, -2.0, -np.inf, 0.25], np.float32)


@pytest.fixture
def gpu(fake, monkeypatch):  # noqa: F811
    stream = type("Stream", (), {"ptr": STREAM})
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream)
    monkeypatch.setattr(sequences.programs, "bind_context", lambda device: None)
    monkeypatch.setattr(workspaces, "is_capturing", lambda stream: False)
    monkeypatch.setattr(workspaces, "use", lambda device, stream, captured, size, given, launch: launch(WORKSPACE))
    for cache in (sequences._programs, sequences._checked):
        cache.clear()
    yield fake
    for cache in (sequences._programs, sequences._checked):
        cache.clear()


def checked(
    paged=False, on_host=False, batch=3, longest=(200, 300), debug=False, base=0, sinks=None, dim=128, **options
):
    """A call on the fake GPU: 500 rows of q, 700 keys, or 40 pages of 32."""
    q = gpu_array(Q + base, (500, 4, dim))
    k, v = (gpu_array(at + base, (40, 32, 2, dim) if paged else (700, 2, dim)) for at in (K, V))
    sums_q = np.array([0, 200, 200, 500], np.int32) if on_host else gpu_array(SUMS_Q, (batch + 1,), np.int32)
    of_k = gpu_array(OF_K, (batch + (not paged),), np.int32)
    if on_host:
        of_k = np.array([300, 0, 1] if paged else [0, 300, 300, 301], np.int32)
    table = gpu_array(TABLE, (batch, 12), np.int32, (64, 4)) if paged else None
    pair = (None, of_k) if paged else (of_k, None)
    options = dict(dense_below=0) | options
    return sequences.check_sequences(q, k, v, sums_q, pair[0], *longest, table, pair[1], 0, debug, options, sinks)


def run(gpu, call, thresholds=0.25, statistics=None):
    out = gpu_array(OUT, call.q.shape)
    sequences.run_gpu(call, thresholds, False, out, statistics, 0)
    return gpu.take()


def shape_of(args):
    """The Shape record with lengths among a launch's arguments."""
    (found,) = (arg for arg in args if len(arg) == plans.LENGTHS_RECORD.itemsize == 48)
    return np.frombuffer(found, plans.LENGTHS_RECORD)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("paged", (False, True))
def test_launches_of_packed_sequences(gpu, paged, estimator):
    call = checked(paged, estimator=estimator)
    assert call.plan.has_lengths and call.plan.padded_q == 256
    for base in (0, 1 << 20):
        calls = run(gpu, checked(paged, estimator=estimator, base=base))
        names = [name.split("<")[0] for name, *_ in calls]
        assert names[:4] == ["locate_sequences"] + ["gather_sequences"] * 3 and names[-1] == "scatter_sequences"
        assert any(name.startswith("attend_sm90") for name in names) and "row_limits" in names
        locate, *gathers = calls[:4]
        wanted = (SUMS_Q, 0, OF_K) if paged else (SUMS_Q, OF_K, 0)
        assert tuple(map(pointer, locate[4][:3])) == wanted
        located = pointer(locate[4][3])
        assert [pointer(x) for x in locate[4][4:]] == [3, 500, 32 if paged else 700, 200, 300, 8]
        for (_, grid, _, _, args), at, rows, side in zip(gathers, (Q, K, V), (200, 300, 300), (0, 1, 1)):
            heads = 4 if side == 0 else 2
            assert grid == (-(-rows * heads * 16 // 256), 3, 1)
            source, target = (np.frombuffer(arg, arrays.TENSOR_VIEW)[0] for arg in args[:2])
            assert source["pointer"] == at + base and source["stride_row"] == heads * 128
            assert target["stride_batch"] == rows * heads * 128
            assert [pointer(x) for x in args[2:4]] == [located + 12 * side, located + 12 * (2 + side)]
            has_table = paged and side == 1
            assert pointer(args[4]) == (TABLE if has_table else 0)
            assert pointer(args[5]) == (16 if has_table else 0)
            if has_table:
                assert [pointer(x) for x in args[6:8]] == [32, 40] and source["stride_batch"] == 32 * 2 * 128
        scatter = calls[-1]
        assert np.frombuffer(scatter[4][1], arrays.TENSOR_VIEW)[0]["pointer"] == OUT
        assert [pointer(x) for x in scatter[4][2:6]] == [0, 0, located, located + 24]
        shaped = [args for name, _, _, _, args in calls[4:-1] if any(len(arg) == 48 for arg in args)]
        assert len(shaped) >= 4
        assert plans.SHAPE_RECORD.itemsize not in {len(arg) for *_, args in calls for arg in args}
        for args in shaped:
            record = shape_of(args)
            assert record["lengths"] == located
            assert [record[name] for name in ("batch", "seqlen_q", "seqlen_k")] == [3, 200, 300]
        reduced = [args for name, *_, args in calls if name.startswith("reduce_channels")]
        assert [pointer(args[3]) for args in reduced] == [located + 12, located][: len(reduced)]
    assert len(sequences._programs) == 1


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("on_host", (False, True))
@pytest.mark.parametrize("thresholds", (0.0, 0.25, "list"))
def test_a_workspace_of_the_callers(gpu, monkeypatch, paged, on_host, thresholds):
    """As large as is said before, and where all that lies between the stages is then."""
    thresholds = [0.5, 0.25, 0.125, 1.0] if thresholds == "list" else thresholds
    call, used = checked(paged, on_host, longest=(300, 300)), []

    def use(device, stream, captured, size, given, launch):
        used.append((size, given))
        launch(WORKSPACE if given is None else given.data.ptr)

    monkeypatch.setattr(workspaces, "use", use)
    num_bytes = sequences.workspace_bytes(call, thresholds, False, None, None, 0)
    assert num_bytes > 0 and not gpu.take() and not used
    want = run(gpu, call, thresholds)
    assert used == [(num_bytes, None)] and len(sequences._programs) == 1
    given = gpu_array(WORKSPACE + (1 << 32), (num_bytes,), np.uint8)
    out = gpu_array(OUT, call.q.shape)
    sequences.run_gpu(call, thresholds, False, out, None, 0, given)
    got = gpu.take()
    assert used[1] == (num_bytes, given) and len(got) == len(want)
    located = [np.frombuffer(calls[1][4][1], arrays.TENSOR_VIEW)[0]["pointer"] for calls in (want, got)]
    assert located[1] - located[0] == 1 << 32
    for bad, match in (
        (gpu_array(WORKSPACE, (num_bytes - 1,), np.uint8), f"workspace: got {num_bytes - 1} bytes; wants at least"),
        (gpu_array(WORKSPACE + 16, (num_bytes,), np.uint8), "workspace: got an address 16 past"),
    ):
        with pytest.raises(ArgumentError, match=match):
            sequences.run_gpu(call, thresholds, False, out, None, 0, bad)
    assert not gpu.take()


def test_launches_of_low_bit_attention(gpu):
    calls = run(gpu, checked(attend="int8-fp8", dense_below=300))
    located = pointer(calls[0][4][3])
    reduced = [args for name, *_, args in calls if name.startswith("reduce_channels")]
    assert [pointer(args[3]) for args in reduced] == [located + 4 * 12, located + 12, located + 12]
    (balance,) = (args for name, *_, args in calls if name.startswith("finish_balance"))
    assert [pointer(x) for x in balance[11:]] == [located + 4 * 12, located + 12, 512]
    quantized = [args for name, *_, args in calls if name.startswith("quantize_balanced")]
    assert [pointer(args[9]) for args in quantized] == [located, located + 12]
    assert shape_of(next(args for name, *_, args in calls if name.startswith("attend_int8")))["lengths"] == located


def test_launches_of_a_dense_call(gpu):
    names = [name.split("<")[0] for name, *_ in run(gpu, checked(dense_below=300))]
    assert names == ["locate_sequences", *["gather_sequences"] * 3, "attend_sm90", "scatter_sequences"]
    assert [name.split("<")[0] for name, *_ in run(gpu, checked(), thresholds=0.0)][4:-1] == ["attend_sm90"]


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("thresholds", (0.25, "list"))
def test_lengths_on_the_host_are_parameters(gpu, paged, thresholds):
    thresholds = [0.5, 0.25, 0.125, 1.0] if thresholds == "list" else thresholds
    calls = run(gpu, checked(paged, on_host=True, longest=(300, 300)), thresholds)
    names = [name.split("<")[0] for name, *_ in calls]
    assert names.count("store_floats") == (2 if isinstance(thresholds, list) else 1) and "locate_sequences" not in names
    stored = np.frombuffer(calls[0][4][1], np.int32)[:15].reshape(5, 3)
    first_k = [0, 0, 0] if paged else [0, 300, 300]
    assert stored.tolist() == [[200, 0, 300], [300, 0, 1], [0, 200, 200], first_k, [25, 0, 38]]
    assert pointer(calls[0][4][2]) == 15
    record = shape_of(next(args for name, *_, args in calls if name.startswith("attend")))
    assert record["lengths"] == pointer(calls[0][4][0])
    if isinstance(thresholds, list):
        (stored,) = (args for name, *_, args in calls[1:] if name.startswith("store_floats"))
        assert np.frombuffer(stored[1], np.float32)[:4].tolist() == thresholds
    else:
        (limits,) = (args for name, *_, args in calls if name.startswith("row_limits"))
        assert np.frombuffer(limits[5], np.float32)[0] == 0.25
    # Others at the next call, in the same program.
    call = checked(paged, on_host=True, longest=(300, 300))
    call.cu_seqlens_q[1] = 100
    stored = np.frombuffer(run(gpu, call, thresholds)[0][4][1], np.int32)[:12].reshape(4, 3)
    assert stored[0].tolist() == [100, 100, 300] and len(sequences._programs) == 1


def test_many_sequences(gpu):
    batch = 100  # more than one launch of store_floats takes
    call = checked(batch=batch, longest=(500, 700))
    assert shape_of(run(gpu, call)[-2][4])["batch"] == batch
    sums = [np.linspace(0, n, batch + 1).astype(np.int32) for n in (500, 700)]
    q, k, v = (gpu_array(at, (n, heads, 128)) for at, n, heads in ((Q, 500, 4), (K, 700, 2), (V, 700, 2)))
    call = sequences.check_sequences(q, k, v, *sums, 8, 8, None, None, 0, False, dict(dense_below=0))
    calls = run(gpu, call)
    assert [name.split("<")[0] for name, *_ in calls[:3]] == ["store_floats", "store_floats", "gather_sequences"]
    values = np.concatenate([np.frombuffer(x[4][1], np.int32) for x in calls[:2]])[: 5 * batch].reshape(5, batch)
    assert (values[0] == np.diff(sums[0])).all() and (values[3] == sums[1][:-1]).all()


def test_given_statistics_are_linked(gpu):
    shapes = ((3, 2, 128), (3, 2, 128), (3, 2), (3, 2))
    parts = [gpu_array(STATISTICS + (i << 20), shape, np.float32) for i, shape in enumerate(shapes)]
    statistics = salekit.KeyStatistics(*parts, None, None)
    for estimator, names in (("int8", {"quantize_int8"}), ("int8-sp24", {"quantize_int8", "quantize_int8_sparse"})):
        calls = run(gpu, checked(estimator=estimator), statistics=statistics)
        assert not any(name.startswith(("reduce", "finish")) for name, *_ in calls)
        assert names == {name.split("<")[0] for name, *_ in calls if name.startswith("quantize")}
        (of_k,) = (args for name, *_, args in calls if name == "quantize_int8<128, Half, 3>")
        assert [pointer(x) for x in of_k[2:4]] == [STATISTICS + (2 << 20), STATISTICS]
        (limits,) = (args for name, *_, args in calls if name.startswith("row_limits"))
        assert pointer(limits[3]) == STATISTICS + (3 << 20)
        if "quantize_int8_sparse" in names:
            (of_q,) = (args for name, *_, args in calls if name.startswith("quantize_int8_sparse"))
            assert pointer(of_q[3]) == STATISTICS + (1 << 20)
    with pytest.raises(ArgumentError, match="k_statistics"):
        run(gpu, checked(batch=2), statistics=statistics)


def test_thresholds_and_lse_on_the_gpu_are_linked(gpu):
    call = checked()
    program = sequences._record(call, 0, None, "device", True, False)
    program.link(WORKSPACE, Q, K, V, OUT, SUMS_Q, OF_K, TAUS, LSE)
    program.submit(gpu, STREAM)
    calls = gpu.take()
    (limits,) = (args for name, *_, args in calls if name.startswith("row_limits"))
    assert pointer(limits[4]) == TAUS
    (attend,) = (args for name, *_, args in calls if name.startswith("attend_sm90"))
    padded_lse = pointer(attend[6])
    assert [pointer(x) for x in calls[-1][4][2:4]] == [padded_lse, LSE] and padded_lse >= WORKSPACE
    assert [pointer(x) for x in calls[-1][4][6:]] == [200, 500, 4, 16]


# --- softcap, windows and sink logits ------------------------------------------------------------------------------
FEATURES = (  # options, the flags of kernels' templates, the window as a plan holds it
    (dict(softcap=30.0), plans.SOFTCAP, None),
    (dict(window_size=(100, 0)), plans.WINDOW, (100, -1)),
    (dict(window_size=(100, 7), causal=False), plans.WINDOW, (100, 7)),
    (dict(window_size=(299, 0)), 0, None),  # hides nothing of 300 keys
    (dict(softcap=30.0, window_size=128), plans.SOFTCAP | plans.WINDOW, (127, -1)),
)
LENGTHS_WINDOW_RECORD = np.dtype([*plans.WINDOW_RECORD.descr, ("lengths", "<u8")])


@pytest.mark.parametrize("options, flags, window", FEATURES)
@pytest.mark.parametrize("sinks", (None, "host", "device"))
@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("dim", (128, 192))
def test_score_features_reach_their_kernels(gpu, options, flags, window, sinks, paged, dim):
    given = {None: None, "host": HOST_SINKS, "device": gpu_array(SINKS, (4,), np.float32)}[sinks]
    flags |= plans.SINKS * (sinks is not None)
    calls = run(gpu, checked(paged, sinks=given, dim=dim, estimator="int8", **options))
    located = pointer(calls[0][4][3])
    named = {name.split("<")[0]: (name, args) for name, *_, args in calls}
    record = LENGTHS_WINDOW_RECORD if window else plans.LENGTHS_RECORD
    assert ("anchor_statistics_sm90" in named) == (dim == 128 and flags == 0)
    assert ("estimate_int8_sm90" in named) == (window is None)
    attend = "attend_sm90"
    anchors = "anchor_statistics_sm90" if dim == 128 and flags == 0 else "anchor_statistics"
    estimate = "estimate_int8_sm90" if window is None else "estimate_sm80"
    for source in (anchors, estimate, "row_limits", attend):
        name, args = named[source]
        (shape,) = (np.frombuffer(arg, record)[0] for arg in args if len(arg) == record.itemsize)
        assert shape["lengths"] == located and [shape["seqlen_q"], shape["seqlen_k"]] == [200, 300]
        assert window is None or (shape["window_left"], shape["window_right"]) == window
    for source in (attend, *([anchors] if flags else [])):
        name, args = named[source]
        assert name.endswith(f", {flags}>") == bool(flags)
        at = pointer(args[-1] if source == attend else args[-2])
        if sinks == "device":
            assert at == SINKS
        elif sinks == "host":
            (stored,) = (args for name, *_, args in calls if name.startswith("store_floats"))
            assert np.frombuffer(stored[1], np.float32)[:4].tolist() == HOST_SINKS.tolist()
            assert at == pointer(stored[0])
        else:
            assert at == 0
    if options.get("softcap"):
        shift = pointer(named[anchors][1][-1])
        assert shift >= WORKSPACE and pointer(named["row_limits"][1][-1]) == shift
        for args in (named[attend][1][-3:-1], named["anchor_statistics"][1][-4:-2]):
            assert np.frombuffer(args[0], np.float32)[0] == 30
            assert np.isclose(np.frombuffer(args[1], np.float32)[0], 2 / np.log(2) * dim**-0.5 / 30, rtol=1e-6)


def test_sinks_on_the_host_are_parameters(gpu):
    """Those of each call, in one program, beside lengths and thresholds that are parameters, too."""
    taus = [0.5, 0.25, 0.125, 1.0]
    for sinks in (HOST_SINKS, HOST_SINKS + 1, None):
        for thresholds in (taus, 0.25):
            calls = run(gpu, checked(on_host=True, longest=(300, 300), sinks=sinks), thresholds)
            stored = [np.frombuffer(args[1], np.float32)[:4] for name, *_, args in calls if name[:5] == "store"]
            want = [[200, 0, 300, 300]] + ([taus] if thresholds is taus else []) + ([] if sinks is None else [sinks])
            assert stored[0].view(np.int32).tolist() == want[0]
            assert [x.tolist() for x in stored[1:]] == [list(x) for x in want[1:]]
    assert len(sequences._programs) == 4


def test_sinks_without_keys(gpu, monkeypatch):
    """No sequence has a key: what the host does not know of lse comes from an attention kernel over nothing."""
    launched = []
    monkeypatch.setattr(sequences, "attend_nothing", lambda *args: launched.append(args) or [None])
    sinks = gpu_array(SINKS, (4,), np.float32)
    for paged in (False, True):
        assert not run(gpu, checked(paged, longest=(200, 0), sinks=sinks))
        q, k, v, out, plan, given = launched.pop()
        assert q.shape == out.shape == (1, 500, 4, 128) and k.shape == v.shape == (1, 0, 2, 128) and given is sinks
        sizes = (plan.batch, plan.seqlen_q, plan.seqlen_k, plan.has_lengths, plan.is_empty)
        assert sizes == (1, 500, 0, False, True)


def test_sinks_have_to_be_where_q_is(gpu, monkeypatch):
    here = gpu_array(SINKS, (4,), np.float32)
    assert checked(sinks=here).place_of_sinks == "device" and checked(sinks=[0, 1, 2, 3]).place_of_sinks == "host"
    monkeypatch.setattr(arrays, "place_of", lambda name, x, place=arrays.place_of: 1 if x is here else place(name, x))
    with pytest.raises(ArgumentError, match="sink_logits: is on cuda:1; wants cuda:0 or host memory"):
        checked(sinks=here)
    monkeypatch.undo()
    x, out = np.zeros((5, 4, 64), np.float16), np.full((5, 4, 64), 7, np.float16)
    with pytest.raises(ArgumentError, match="sink_logits: is on cuda:0; wants host memory"):
        salekit.sparse_attention_varlen(x, x, x, [0, 5], [0, 5], 5, 5, sink_logits=here, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("shape, dtype, strides, error, match", (
    ((3,), np.float32, None, ArgumentError, r"sink_logits: got shape \(3,\); wants \(4,\)"),
    ((4,), np.float64, None, DtypeError, "sink_logits: got dtype float64; wants float32 on the GPU"),
    ((4,), np.float32, (8,), ArgumentError, "sink_logits: is not contiguous"),
))
def test_sinks_on_the_gpu_are_checked(gpu, shape, dtype, strides, error, match):
    with pytest.raises(error, match=match):
        checked(sinks=gpu_array(SINKS, shape, dtype, strides))


def test_debug_reads_sinks_on_the_gpu(gpu, monkeypatch):
    values = {SUMS_Q: [0, 200, 200, 400], OF_K: [0, 300, 300, 301], SINKS: [0, np.nan, 0, 0]}
    read = []

    def on_host(x):
        read.append(x.data.ptr)
        return np.array(values[x.data.ptr], np.float32 if x.data.ptr == SINKS else np.int32)

    monkeypatch.setattr(sequences, "_on_host", on_host)
    sinks = gpu_array(SINKS, (4,), np.float32)
    checked(sinks=sinks)
    assert not read
    with pytest.raises(ArgumentError, match="sink_logits: has a NaN or"):
        checked(sinks=sinks, debug=True)
    values[SINKS] = [0, -np.inf, 3, 0]
    checked(sinks=sinks, debug=True)


def test_debug_reads_what_is_on_the_gpu(gpu, monkeypatch):
    """Without it no value on the GPU is looked at; with it the same errors as on the host."""
    values = {SUMS_Q: [0, 300, 200, 500], OF_K: [0, 300, 300, 301]}
    read = []

    def on_host(x):
        if not arrays.is_cuda(x):
            return x
        read.append(x.data.ptr)
        return np.array(values[x.data.ptr], np.int32)

    monkeypatch.setattr(sequences, "_on_host", on_host)
    checked()
    assert not read
    with pytest.raises(ArgumentError, match="cu_seqlens_q: decreases from 300 to 200"):
        checked(debug=True)
    values[SUMS_Q] = [0, 200, 200, 400]
    checked(debug=True)
    values[OF_K] = [0, 301, 301, 302]
    with pytest.raises(ArgumentError, match="max_seqlen_k: got 300; wants at least 301"):
        checked(debug=True)
    values[OF_K], values[TABLE] = [300, 0, 33], np.zeros((3, 12))
    values[TABLE][2, 1], values[TABLE][2, 2] = 40, -1
    with pytest.raises(ArgumentError, match=r"block_table: got page 40 at \[2, 1\]; wants 0 to 39"):
        checked(paged=True, debug=True)
    values[TABLE][2, 1] = 39
    checked(paged=True, debug=True)
    monkeypatch.setenv("SALEKIT_DEBUG", "1")
    assert sequences.is_debugging(None) and not sequences.is_debugging(False)
    monkeypatch.setenv("SALEKIT_DEBUG", "0")
    assert not sequences.is_debugging(None)


def test_lengths_and_pages_have_to_be_where_q_is(gpu):
    q, k = gpu_array(Q, (500, 4, 128)), gpu_array(K, (700, 2, 128))
    sums = gpu_array(SUMS_Q, (4,), np.int32)
    here = [0, 200, 200, 500]

    def check(*lengths, table=None, k=k, seqlens=None):
        return sequences.check_sequences(q, k, k, *lengths, 300, 300, table, seqlens, 0, False, {})

    with pytest.raises(ArgumentError, match="cu_seqlens_k: is on host memory; wants cuda:0, where cu_seqlens_q is"):
        check(sums, here)
    with pytest.raises(ArgumentError, match="cu_seqlens_k: is on cuda:0; wants host memory"):
        check(here, sums)
    pages = gpu_array(K, (40, 32, 2, 128))
    with pytest.raises(ArgumentError, match="block_table: is on host memory"):
        check(sums, None, table=np.zeros((3, 12), np.int32), k=pages, seqlens=gpu_array(OF_K, (3,), np.int32))
    with pytest.raises(ArgumentError, match="q: got an address that is 2 past"):
        sequences.check_sequences(gpu_array(Q + 2, (500, 4, 128)), k, k, sums, sums, 300, 300, None, None, 0, False, {})


def _changes(paged, on_host):
    """Of a call that is right: by name, arguments in place of its own. Some are right as well."""
    q, keys = (500, 4, 128), (40, 32, 2, 128) if paged else (700, 2, 128)
    many, of_k = 4 if not paged else 3, "seqlens_k" if paged else "cu_seqlens_k"
    right = [300, 0, 1] if paged else [0, 300, 300, 301]
    int8 = np.dtype(np.int8)
    changes = [
        dict(q=gpu_array(Q + 2, q)), dict(q=gpu_array(Q + 32, q)), dict(q=gpu_array(Q, (400, 4, 128))),
        dict(q=gpu_array(Q, (500, 6, 128))), dict(q=gpu_array(Q, (500, 3, 128))), dict(q=gpu_array(Q, (500, 4, 64))),
        dict(q=gpu_array(Q, q, np.dtype(np.float32))), dict(q=gpu_array(Q, q, strides=(1024, 258, 2))),
        dict(q=gpu_array(Q, (1, *q))), dict(q=gpu_array(Q, (0, 4, 128))),
        dict(k=gpu_array(K + 8, keys)), dict(k=gpu_array(K, keys, int8)), dict(k=gpu_array(K, (*keys[:-1], 96))),
        dict(v=gpu_array(V, (41, *keys[1:]))), dict(v=gpu_array(V, keys, strides=(*[0] * (len(keys) - 1), 4))),
        dict(k=np.zeros(keys, np.float16)), dict(v=None), dict(cu_seqlens_q=None), {of_k: None},
        {of_k: np.array(right, np.int64)}, {of_k: np.array(right, np.int32)}, {of_k: right},
        {of_k: gpu_array(OF_K, (many,), np.int32)}, {of_k: gpu_array(OF_K, (many,), int8)},
        {of_k: gpu_array(OF_K, (many + 1,), np.int32)}, {of_k: gpu_array(OF_K, (many,), np.int32, (8,))},
        dict(cu_seqlens_q=np.array([0, 200, 500], np.int32)), dict(cu_seqlens_q=np.array([1, 200, 200, 500], np.int32)),
        dict(cu_seqlens_q=np.array([0, 300, 200, 500], np.int32)), dict(cu_seqlens_q=[0, 200, 300, 500]),
        dict(cu_seqlens_q=np.array([0, 200, 200, 501], np.int32)),
        dict(cu_seqlens_q=np.array([0, 2**31 - 1, -(2**31), 500], np.int32)), dict(max_seqlen_q=299),
        dict(max_seqlen_k=True), dict(max_seqlen_k=300.0), dict(max_seqlen_k=np.int64(300)), dict(max_seqlen_k=385),
        dict(causal=1), dict(causal=False), dict(causal=np.True_), dict(block=[128, 32]), dict(block=(64, 32)),
        dict(block=(128.0, 32)), dict(block=128), dict(sink=32.0), dict(window_size=(7, 0)),
        dict(window_size=(7, True)), dict(window_size={7: 0}), dict(skipped="pool"),
        dict(softmax_scale=float("nan")), dict(query_stride=4),
        dict(sink_logits=HOST_SINKS), dict(sink_logits=np.array([0, np.nan, 0, 0])), dict(sink_logits=[1.0]),
        dict(sink_logits=gpu_array(SINKS, (4,), np.float32)), dict(sink_logits=gpu_array(SINKS, (4,), int8)),
        dict(block_table=gpu_array(TABLE, (3, 9), np.int32)), dict(block_table=gpu_array(TABLE, (2, 12), np.int32)),
        dict(block_table=gpu_array(TABLE, (3, 12), int8)), dict(block_table=np.zeros((3, 12), np.int32)), {},
    ]
    if paged:
        changes += [{of_k: np.array(x, np.int32)} for x in ([300, -1, 1], [300, 301, 1], [0, 0, 0])]
    else:
        changes += [{of_k: np.array(x, np.int32)} for x in ([0, 301, 301, 301], [0, 300, 600, 701], [0, 0, 0, 0])]
    return changes


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("on_host", (False, True))
def test_calls_like_one_before_are_checked_alike(gpu, paged, on_host):
    """What a call is or raises does not depend on the calls before it."""
    names = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k block_table seqlens_k".split()
    call = checked(paged, on_host, longest=(300, 300))
    own = {name: getattr(call, name, 300) for name in names}
    own["q"] = gpu_array(Q, (500, 4, 128))
    own["k"], own["v"] = (gpu_array(at, (40, 32, 2, 128) if paged else (700, 2, 128)) for at in (K, V))

    def outcome(change):
        given = {**own, **{name: x for name, x in change.items() if name in own}}
        more = {name: x for name, x in change.items() if name not in own and name != "sink_logits"}
        try:
            found = sequences.check_sequences(
                *given.values(), 0, False, dict(dense_below=0, causal=True) | more, change.get("sink_logits"))
        except (ArgumentError, DtypeError) as error:
            return type(error), str(error)
        arrays_of = [x for x in vars(found).values() if hasattr(x, "shape")]
        places = [x.tolist() if isinstance(x, np.ndarray) else x.data.ptr for x in arrays_of]
        return found.plan, found.is_on_host, [(x.dtype, x.shape, x.strides) for x in arrays_of], places

    wants = []
    for change in _changes(paged, on_host):
        sequences._checked.clear()
        wants.append(outcome(change))
    assert sum(isinstance(want[0], plans.Plan) for want in wants) >= 12
    assert sum(want[0] is ArgumentError for want in wants) >= 12
    sequences._checked.clear()
    for _ in range(3):  # each after all of the others
        for change, want in zip(_changes(paged, on_host), wants):
            assert outcome(change) == want, change
    assert 6 < len(sequences._checked) < 30


def test_planned_calls_take_statistics(gpu):
    q, k, v = fakes.inputs()
    plan = attention_plan.AttentionPlan(q, k, v, "bshd", dict(dense_below=0, estimator="int8"))
    shapes = ((1, 2, 128), (1, 2, 128), (1, 2), (1, 2))
    parts = [gpu_array(STATISTICS + (i << 20), shape, np.float32) for i, shape in enumerate(shapes)]
    statistics = salekit.KeyStatistics(*parts, None, None)
    out = gpu_array(OUT, q.shape)
    plan._run(q, k, v, 0.25, False, False, out, None, k_statistics=statistics)
    names = [name.split("<")[0] for name, *_ in gpu.take()]
    assert not any(name.startswith(("reduce", "finish")) for name in names) and names[-1] == "attend_sm90"
    plan._run(q, k, v, 0.25, False, False, out, None)
    assert any(name.startswith("reduce") for name, *_ in gpu.take())


@pytest.mark.parametrize("paged", (False, True))
def test_packed_out_that_shares_memory(gpu, paged):
    for _ in range(2):  # the second call is one like the first
        call = checked(paged)
        for at, name in ((Q, "q"), (K, "k"), (V, "v")):
            for array in (gpu_array(at + 1024, (500, 4, 128)), gpu_array(at, (500, 4, 128), strides=(2048, 512, 2))):
                with pytest.raises(ArgumentError, match=f"^out: shares memory with {name}; wants"):
                    sequences.check_out(array, call, 0)
        assert sequences.check_out(gpu_array(OUT, (500, 4, 128)), call, 0).shape == call.q.shape


def test_more_sequences_than_a_grid_has(gpu):
    assert checked(longest=(1, 1), batch=65535).plan.batch == 65535
    with pytest.raises(ArgumentError, match="cu_seqlens_q: got 65536 sequences; wants at most 65535"):
        checked(longest=(1, 1), batch=65536)


def test_statistics_of_another_device(gpu):
    """Of a GPU for a call on the host, and the other way round."""
    shapes = ((1, 2, 128), (1, 2, 128), (1, 2), (1, 2), (1,), (1, 2, 4, 128))
    on_gpu = salekit.KeyStatistics(*(gpu_array(STATISTICS + (i << 20), x, np.float32) for i, x in enumerate(shapes)))
    k = np.ones((1, 5, 2, 128), np.float16)
    with pytest.raises(ArgumentError, match="^k_statistics: is on cuda:0; wants host memory, where k is"):
        salekit.sparse_attention(k, k, k, k_statistics=on_gpu)
    on_host = salekit.key_statistics(k)
    q, keys, v = fakes.inputs()
    plan = attention_plan.AttentionPlan(q, keys, v, "bshd", dict(dense_below=0))
    with pytest.raises(ArgumentError, match="^k_statistics: is on host memory; wants cuda:0, where k is"):
        plan._check(q, keys, v, 0.25, False, False, None, None, k_statistics=on_host)
    with pytest.raises(ArgumentError, match="^other: is on cuda:0; wants host memory"):
        on_host.merge(on_gpu)
    with pytest.raises(ArgumentError, match="^parts: is on cuda:0; wants host memory"):
        salekit.KeyStatistics.stack([on_host, on_gpu])


def test_a_batch_beyond_a_grid():
    from salekit.key_statistics import _check_keys as check_keys

    many = 65536
    for shape, match in (((many, 4, 1, 64), "k: got batch 65536 and 1 heads"), ((1, 4, many, 64), "1 and 65536 heads")):
        with pytest.raises(ArgumentError, match=match):
            check_keys(gpu_array(K, shape), 0, "bshd")
