"""examples/onnxruntime_attention: graphs cut at their attentions, on the CPU with the twin and on a GPU."""

import sys
from pathlib import Path

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is part of the checkout, not of the package

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import salekit  # noqa: E402
from examples.onnxruntime_attention import __main__ as program  # noqa: E402
from examples.onnxruntime_attention import check, model, sessions  # noqa: E402
from examples.onnxruntime_attention.split import Site, shape_of, split  # noqa: E402
from salekit.errors import ArgumentError, GpuError  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 64
SMALL = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
DENSE = {"thresholds": 0.0, "dense_below": 0}
SPARSE = {"thresholds": 0.02, "dense_below": 0}


def both(form="ops", layers=1, seqlen=333, batch=1, cuda=False, dtype="float16", wait=True):
    """(the model, the whole model on ONNX Runtime, the cut one), with the same ids in their buffers."""
    device, sizes = sessions.Device(cuda, wait), {"batch": batch, "seqlen": seqlen}
    graph = model.build(layers, form=form, dtype=dtype, **SMALL)
    whole = sessions.Whole(graph, sizes, device)
    cut = sessions.SplitModel(graph, model.sites(layers), DIM, sizes, device)
    for buffers in (whole.buffers, cut.buffers):
        device.write(buffers["ids"], model.token_ids(batch, seqlen))
    return graph, whole, cut


def weight(graph, name):
    return next(numpy_helper.to_array(x) for x in graph.graph.initializer if x.name == name)


def oracle(q, k, v):
    """Causal attention in float64: [batch, seqlen, heads, head_dim]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(DIM)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=3, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", p / p.sum(axis=3, keepdims=True), v)


def check_equality(graph, whole, cut):
    """At tau 0, against float64, against ONNX Runtime's nodes on the same memory, and from end to end."""
    device = cut.device
    for buffer in cut.buffers.values():
        if buffer.dtype != np.int64:
            device.write(buffer, np.full(buffer.shape, np.nan, buffer.dtype))
    whole.run()
    cut.run(**DENSE)
    device.synchronize()
    want, got = device.read(whole.buffers["hidden"]), device.read(cut.buffers["hidden"])
    for index, view in enumerate(cut.views):
        q, k, v, out = (device.read(view[role]) for role in ("q", "k", "v", "out"))
        tolerance = check.attention_tolerance(q, k, v)
        theirs = device.read(cut.attention_by_runtime(index)).reshape(out.shape)
        assert (check.attention_errors(out, oracle(q, k, v)) <= tolerance).all()
        assert (check.attention_errors(out, theirs) <= tolerance).all()
        for wrong in (np.roll(out, 1, axis=2), np.roll(out, 64, axis=1)):  # another head, other rows
            assert (check.attention_errors(wrong, theirs) > tolerance).any()
    if len(cut.views) == 1:
        tolerance = check.layer_tolerance(q, k, v, out, weight(graph, "layer.0.o.weight"), want)
        assert (check.row_errors(got, want) <= tolerance).all()
    else:
        # Worst cases of several layers multiply; this is what roundings that know nothing of each other may add up to.
        assert check.relative_error(got, want) <= 2.0**-8
    return want


def check_memory(cut):
    """What one writes, the other reads, at the same address."""
    device = cut.device
    cut.run(**SPARSE)
    device.synchronize()
    for index, site in enumerate(cut.sites):
        before, after = cut.parts[index], cut.parts[index + 1]
        written = dict(zip(before.outputs, before.binding.get_outputs(), strict=True))
        for role in ("q", "k", "v"):
            name = getattr(site, role)
            assert written[name].data_ptr() == sessions.address(cut.views[index][role])
            assert written[name].data_ptr() == sessions.address(cut.buffers[name])
            assert (written[name].device_name().lower() == "cpu") == (device.type == "cpu")
        out = cut.buffers[site.out]
        assert sessions.address(cut.views[index]["out"]) == sessions.address(out)
        assert any(held is out for held in after._held) and site.out in after.inputs
        returned = cut.attend(index, **SPARSE)
        assert returned is cut.views[index]["out"]
    # The last part reads that memory, not a copy made when it was bound.
    last, site = cut.parts[-1], cut.sites[-1]
    first = device.read(cut.buffers["hidden"])
    device.write(cut.buffers[site.out], np.zeros(cut.buffers[site.out].shape, cut.buffers[site.out].dtype))
    last.run()
    device.synchronize()
    residual = next(name for name in last.inputs if name.startswith("x."))
    assert np.array_equal(device.read(cut.buffers["hidden"]), device.read(cut.buffers[residual]))
    assert not np.array_equal(device.read(cut.buffers["hidden"]), first)


@pytest.mark.parametrize("form", model.OPSETS)
def test_tau_zero_is_the_whole_graph(form):
    check_equality(*both(form))


@pytest.mark.parametrize("shape", [{"seqlen": 1}, {"seqlen": 65, "batch": 3}, {"layers": 3, "seqlen": 130}])
def test_other_shapes(shape):
    if shape["seqlen"] == 1:  # every row sees its own value alone
        graph, whole, cut = both(**shape)
        whole.run()
        cut.run(**DENSE)
        v = np.repeat(cut.views[0]["v"], HEADS // KV_HEADS, axis=2)
        assert np.array_equal(cut.views[0]["out"], v)
        assert check.relative_error(cut.buffers["hidden"], whole.buffers["hidden"]) <= 2.0**-9
    else:
        check_equality(*both(**shape))


@pytest.mark.parametrize("layers", [1, 2])
def test_nothing_is_copied(layers):
    check_memory(both(layers=layers, seqlen=200)[2])


def test_error_and_density_at_a_tau():
    graph, whole, cut = both(seqlen=700)
    whole.run()
    found = []
    for tau in (0.0, 0.002, 0.02, np.inf):
        (mask,) = cut.run(thresholds=tau, dense_below=0, return_masks=True)
        found.append((mask.density().mean(), check.relative_error(cut.buffers["hidden"], whole.buffers["hidden"])))
    densities, errors = zip(*found)
    assert densities[0] == 1 and errors[0] <= 2.0**-9
    assert list(densities) == sorted(set(densities), reverse=True)
    assert list(errors) == sorted(set(errors)) and errors[2] <= 0.1


def test_runs_do_not_depend_on_earlier_ones():
    _, _, cut = both(seqlen=300)
    cut.run(**SPARSE)
    first = cut.buffers["hidden"].copy()
    ids = cut.buffers["ids"].copy()
    cut.buffers["ids"][:] = ids[:, ::-1]
    cut.run(**SPARSE)
    assert not np.array_equal(cut.buffers["hidden"], first)
    cut.buffers["ids"][:] = ids
    cut.run(**SPARSE)
    assert np.array_equal(cut.buffers["hidden"], first)


def small_qkv():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((1, 150, heads, DIM)).astype(np.float16) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.skipif(not hasattr(onnxruntime.OrtValue, "__dlpack__"), reason="this OrtValue has no DLPack")
def test_ortvalues_are_arrays():
    """As q, k and v, and as out: that is the memory that an OrtValue was made from."""
    arrays = small_qkv()
    out = np.full(arrays[0].shape, np.nan, np.float16)
    *values, target = [onnxruntime.OrtValue.ortvalue_from_numpy(x) for x in (*arrays, out)]
    salekit.sparse_attention(*values, out=out, **SPARSE)
    assert target.data_ptr() == out.ctypes.data
    assert np.array_equal(target.numpy(), salekit.sparse_attention(*arrays, **SPARSE))
    out[...] = np.nan
    assert salekit.sparse_attention(*values, out=target, **SPARSE) is target
    assert np.array_equal(out, salekit.sparse_attention(*arrays, **SPARSE))


# --- the cut -------------------------------------------------------------------------------------------------------
SIZES = {"batch": 1, "seqlen": 96}


@pytest.mark.parametrize("form", model.OPSETS)
def test_parts(form):
    graph = model.build(2, form=form, **SMALL)
    pieces = split(graph, model.sites(2), SIZES)
    names = [({x.name for x in part.graph.input}, {x.name for x in part.graph.output}) for part in pieces.parts]
    assert names == [
        ({"ids"}, {"layer.0.q", "layer.0.k", "layer.0.v", "x.0"}),
        ({"layer.0.attended", "x.0"}, {"layer.1.q", "layer.1.k", "layer.1.v", "x.1"}),
        ({"layer.1.attended", "x.1"}, {"hidden"}),
    ]
    left = [node.op_type for part in pieces.parts for node in part.graph.node]
    assert not {"Softmax", "Attention", "GroupQueryAttention", "Transpose"} & set(left)
    inside = sum(len(piece.graph.node) for piece in (*pieces.parts, *pieces.attentions))
    assert inside == len(graph.graph.node)  # each node once
    for part in (*pieces.parts, *pieces.attentions):
        onnx.checker.check_model(part)
        assert part.opset_import == graph.opset_import
        assert all(shape_of(x)[:2] == (1, 96) for x in (*part.graph.input, *part.graph.output))
    assert graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param == "seqlen"  # the model itself is as it was


def small_graph(nodes, inputs=(), outputs=("y",)):
    """A model of nodes (operator, inputs, output) on x and inputs, float32 [1, seqlen, 64]."""
    made = [helper.make_node(kind, list(reads), [name], name) for kind, reads, name in nodes]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "seqlen", 64]) for name in ("x", *inputs)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "seqlen", 64]) for name in outputs]
    return helper.make_model(helper.make_graph(made, "g", value, ends), opset_imports=[helper.make_opsetid("", 17)])


QKV = [("Neg", ["x"], "q"), ("Abs", ["x"], "k"), ("Exp", ["x"], "v")]
INSIDE = [("Add", ["q", "k"], "s"), ("Mul", ["s", "v"], "out")]
SITE = Site("q", "k", "v", "out")


def test_what_crosses_twice_and_what_is_an_output():
    """A tensor of part 0 that parts 1 and 2 read; outputs of the model before, at and after a cut."""
    again = [("Add", ["out", "x"], "q2"), ("Mul", ["out", "q"], "k2"), ("Neg", ["out"], "v2"),
             ("Add", ["q2", "k2"], "s2"), ("Mul", ["s2", "v2"], "out2"), ("Add", ["out2", "q"], "y")]
    graph = small_graph(QKV + INSIDE + again, outputs=("y", "k", "out", "q2"))
    sites = [SITE, Site("q2", "k2", "v2", "out2")]
    parts = split(graph, sites, SIZES).parts
    names = [({x.name for x in part.graph.input}, {x.name for x in part.graph.output}) for part in parts]
    assert names == [
        ({"x"}, {"q", "k", "v"}), ({"out", "x", "q"}, {"q2", "k2", "v2"}), ({"out2", "q"}, {"y"})
    ]
    with pytest.raises(ArgumentError, match="'q2' of attention 0 depends on attention 1; wants the order"):
        split(graph, sites[::-1], SIZES)
    with pytest.raises(ArgumentError, match="two attentions have the same out"):
        split(graph, [SITE, SITE], SIZES)


def test_heads_before_rows():
    """Tensors [batch, heads, seqlen, head_dim], as graphs have them that transpose before attention."""
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"]))
        nodes.append(helper.make_node("Reshape", [f"{name}0", f"shape_{name}"], [f"{name}1"]))
        nodes.append(helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=1))
    nodes.append(helper.make_node("Transpose", ["out"], ["rows"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["rows", "packed"], ["y"]))
    rng, width = np.random.default_rng(0), HEADS * DIM
    weights = [helper.make_tensor("packed", TensorProto.INT64, [3], [0, 0, width])]
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        matrix = (rng.standard_normal((width, heads * DIM)) / np.sqrt(width)).astype(np.float16)
        weights.append(numpy_helper.from_array(matrix, f"w{name}"))
        weights.append(helper.make_tensor(f"shape_{name}", TensorProto.INT64, [4], [0, 0, heads, DIM]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2, "seqlen", width]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    graph = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=model.IR_VERSION)
    device, sizes = sessions.Device(False), {"seqlen": 150}
    whole = sessions.Whole(graph, sizes, device)
    cut = sessions.SplitModel(graph, [Site("q", "k", "v", "out", "bhsd")], DIM, sizes, device)
    values = rng.standard_normal((2, 150, width)).astype(np.float16)
    for part in (whole, cut):
        device.write(part.buffers["x"], values)
    whole.run()
    cut.run(**DENSE)
    assert cut.buffers["q"].shape == (2, HEADS, 150, DIM) and cut.views[0]["q"].shape == (2, 150, HEADS, DIM)
    assert all(np.shares_memory(cut.views[0][role], cut.buffers[role]) for role in ("q", "k", "v", "out"))
    # y is attention's result with its axes moved: no more than its rounding and that of its inputs.
    tolerance = check.attention_tolerance(*(cut.views[0][role] for role in "qkv"), same_inputs=False)
    got, want = (x.buffers["y"].reshape(2, 150, HEADS, DIM) for x in (cut, whole))
    assert (check.attention_errors(got, want) <= tolerance).all() and got.std() > 0.01
    with pytest.raises(ArgumentError, match="site.layout: got 'sbhd'; wants one of 'bshd', 'bhsd'"):
        sessions.SplitModel(graph, [Site("q", "k", "v", "out", "sbhd")], DIM, sizes, device)


def test_a_graph_without_the_attention():
    graph = model.build(1, **SMALL)
    site = model.sites(2)[1]
    with pytest.raises(ArgumentError, match="site.q: got 'layer.1.q', which no node of the graph computes"):
        split(graph, [site], SIZES)
    with pytest.raises(ArgumentError, match="site.out: got 'ids', which no node"):
        split(graph, [Site("layer.0.q", "layer.0.k", "layer.0.v", "ids")], SIZES)
    with pytest.raises(ArgumentError, match="sites: got none"):
        split(graph, [], SIZES)
    with pytest.raises(ArgumentError, match="the graph also reads 'ids'"):
        split(graph, [Site("layer.0.q", "layer.0.k", "layer.0.v", "layer.0.normed")], SIZES)


def test_attentions_that_are_more_than_q_k_and_v():
    masked = [("Add", ["q", "k"], "r"), ("Add", ["r", "mask"], "s"), ("Mul", ["s", "v"], "out"), ("Neg", ["out"], "y")]
    with pytest.raises(ArgumentError, match="between k, q, v and 'out' the graph also reads 'mask'"):
        split(small_graph(QKV + masked, inputs=("mask",)), [SITE], SIZES)
    less = [("Add", ["q", "v"], "out"), ("Add", ["out", "k"], "y")]
    with pytest.raises(ArgumentError, match="'out' does not depend on k"):
        split(small_graph(QKV + less), [SITE], SIZES)


def test_unknown_sizes():
    graph = model.build(1, **SMALL)
    with pytest.raises(ArgumentError, match="sizes: 'ids' has an axis 'seqlen'; wants a number"):
        split(graph, model.sites(1), {"batch": 1})
    with pytest.raises(ArgumentError, match="'layer.0.q' has shape \\(1, 96, 256\\); wants .* with head_dim 96"):
        sessions.SplitModel(graph, model.sites(1), 96, SIZES, sessions.Device(False))


def test_subgraphs():
    branch = helper.make_graph([helper.make_node("Neg", ["out"], ["z"])], "b", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, "seqlen", 64])])
    graph = small_graph(QKV + INSIDE + [("Neg", ["out"], "y")])
    graph.graph.node.append(helper.make_node("If", ["x"], ["w"], "choice", then_branch=branch, else_branch=branch))
    with pytest.raises(ArgumentError, match="node 'choice' \\(If\\) has a subgraph"):
        split(graph, [SITE], SIZES)


def test_another_opset():
    """Cuts do not depend on it, and what ONNX Runtime refuses is an error of one line."""
    graph = model.build(1, **SMALL)
    graph.opset_import[0].version = 999
    with pytest.raises(ArgumentError, match="model: ONNX Runtime does not take it: .*[Oo]pset"):
        sessions.Whole(graph, SIZES, sessions.Device(False))
    graph = small_graph(QKV + INSIDE + [("Neg", ["out"], "y")])
    for opset in (11, 13, 17, 21):
        graph.opset_import[0].version = opset
        assert [part.opset_import[0].version for part in split(graph, [SITE], SIZES).parts] == [opset] * 2


def test_bfloat16_on_the_cpu():
    with pytest.raises(ArgumentError, match="ONNX Runtime does not take it"):
        both(dtype="bfloat16")


# --- the command ---------------------------------------------------------------------------------------------------
def command(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        program.main(list(arguments))
    return (done.value.code or 0, *capsys.readouterr())


def test_command(capsys):
    given = ["--device", "cpu", "--seqlen", "300", "--heads", "4", "--runs", "1"]
    code, out, err = command(capsys, *given, "--tau", "0.02")
    assert code == 0, out + err
    assert "the NumPy twin: times say nothing of a GPU" in out
    rows = [line for line in out.splitlines() if " salekit at tau" in line]
    rows = {line[:38].strip(): [float(x) for x in line[38:].split()] for line in rows}
    zero, some = rows["cut, salekit at tau 0"], rows["cut, salekit at tau 0.02"]
    assert zero[1] <= 2.0**-9 and zero[2] == 1 and zero[1] < some[1] <= 0.1 and some[2] < 1
    assert out.count(": ok") == 2 and "FAILED" not in out
    code, out, _ = command(capsys, *given, "--layers", "2", "--graph", "gqa")
    assert code == 0 and "part 2: reads layer.1.attended, x.1; writes hidden" in out and out.count(": ok") == 2


def test_a_wrong_result_fails(capsys, monkeypatch):
    right = sessions.salekit.sparse_attention

    def wrong(q, k, v, *, out, **options):
        found = right(q, k, v, out=out, **options)
        out[:, :, 0] = out[:, :, 1]
        return found

    monkeypatch.setattr(sessions.salekit, "sparse_attention", wrong)
    code, out, _ = command(capsys, "--device", "cpu", "--seqlen", "300", "--heads", "4", "--runs", "1")
    assert code == program.ACCURACY_FAILED and "FAILED" in out


def test_command_errors(capsys):
    assert "--graph" in command(capsys, "--help")[1]
    code, out, err = command(capsys, "--device", "cpu", "--seqlen", "0")
    assert code == 1 and "got 0 and 5; wants at least 1" in err
    code, _, err = command(capsys, "--device", "cpu", "--heads", "3")
    assert code == 1 and "kv_heads: got 2 for 3 heads" in err
    for tau in ("-1", "nan"):
        code, out, err = command(capsys, "--device", "cpu", "--tau", tau)
        assert (code, out) == (1, "")  # before anything is built
        assert err == f"onnxruntime_attention: error: --tau: got {tau}; wants a number >= 0 or inf\n"
    if not program.has_cuda():
        code, _, err = command(capsys, "--device", "cuda")
        assert code == 3
        with pytest.raises(GpuError):
            sessions.Device(True)


# --- on a GPU ------------------------------------------------------------------------------------------------------
@pytest.fixture
def cuda():
    if not program.has_cuda():
        pytest.skip("needs onnxruntime-gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("form", model.OPSETS)
def test_tau_zero_on_a_gpu(cuda, form):
    check_equality(*both(form, cuda=True, seqlen=1001))
    check_equality(*both(form, cuda=True, seqlen=260, layers=2))


@pytest.mark.gpu
def test_nothing_is_copied_on_a_gpu(cuda):
    cut = both(cuda=True, seqlen=1500, layers=2)[2]
    check_memory(cut)
    for part in cut.parts:
        assert sessions.operators_on_cpu(part.session) in (None, [])
        options = part.session.get_provider_options()["CUDAExecutionProvider"]
        assert options["user_compute_stream"] == str(cut.device.stream.ptr)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(onnxruntime.OrtValue, "__dlpack__"), reason="this OrtValue has no DLPack")
def test_ortvalues_on_a_gpu(cuda):
    cupy, arrays = sessions.import_cupy(), small_qkv()
    sessions.Device(True)  # loads CUDA's libraries
    *values, out = [onnxruntime.OrtValue.ortvalue_from_numpy(x, "cuda", 0) for x in (*arrays, arrays[0])]
    assert salekit.sparse_attention(*values, out=out, **SPARSE) is out
    cupy.cuda.Device().synchronize()
    want = salekit.sparse_attention(*map(cupy.asarray, arrays), **SPARSE)
    assert np.array_equal(out.numpy(), want.get())


@pytest.mark.gpu
def test_one_stream_orders_everything(cuda):
    """Runs on other ids each are queued before the first is done; each result is that of a run alone."""
    _, _, cut = both("gqa", cuda=True, seqlen=4000, layers=2, wait=False)
    device, given = cut.device, [model.token_ids(1, 4000, seed) for seed in range(4)]
    want = []
    for ids in given:
        device.write(cut.buffers["ids"], ids)
        cut.run(**SPARSE)
        device.synchronize()
        want.append(device.read(cut.buffers["hidden"]))
    assert not np.array_equal(want[0], want[1])
    with device.stream:
        on_gpu = [sessions.import_cupy().asarray(ids) for ids in given]
        got = []
        for ids in on_gpu:
            cut.buffers["ids"].data.copy_from_device_async(ids.data, ids.nbytes, device.stream)
            cut.run(**SPARSE)
            got.append(cut.buffers["hidden"].copy())
    device.synchronize()
    for mine, theirs in zip(got, want):
        assert np.array_equal(device.read(mine), theirs)


@pytest.mark.gpu
def test_command_on_a_gpu(cuda, capsys):
    for form in model.OPSETS:
        code, out, err = command(capsys, "--device", "cuda", "--seqlen", "2048", "--runs", "2", "--graph", form)
        assert code == 0, out + err
        assert "CUDA, salekit on the same stream" in out and out.count(": ok") == 2
