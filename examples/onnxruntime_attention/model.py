"""A small transformer, written with onnx.helper: ids [batch, seqlen] -> hidden [batch, seqlen, heads * head_dim].

Each layer adds ``attention(LayerNorm(x)) @ Wo`` to x. Attention is plain ONNX operators, as an exporter writes it
(``form="ops"``, opset 17), the operator Attention (``form="operator"``, opset 23), or ONNX Runtime's own
GroupQueryAttention (``form="gqa"``, domain com.microsoft).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, checker, helper

from salekit.errors import ArgumentError

from .split import Site

DTYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
OPSETS = {"ops": 17, "operator": 23, "gqa": 17}
IR_VERSION = 10  # ONNX Runtime 1.19 and newer read it
TOPICS, WORDS = 32, 16  # a token is one of WORDS of a topic
SCORE = 8.0  # about what tokens of one topic score; those of two score about 0


def sites(layers: int) -> list[Site]:
    """Where the attention of each layer is: its q, k, v and result, all [batch, seqlen, heads * head_dim]."""
    return [Site(*(f"layer.{layer}.{name}" for name in ("q", "k", "v", "attended"))) for layer in range(layers)]


def token_ids(batch: int, seqlen: int, seed: int = 0) -> np.ndarray:
    """int64 [batch, seqlen]: passages of 64 to 255 tokens, each of one topic."""
    rng = np.random.default_rng(seed)
    ids = np.empty((batch, seqlen), np.int64)
    for row in ids:
        start = 0
        while start < seqlen:
            end = start + int(rng.integers(64, 256))
            words = rng.integers(0, WORDS, len(row[start:end]))
            row[start:end] = rng.integers(0, TOPICS) * WORDS + words
            start = end
    return ids


def build(
    layers: int = 1, heads: int = 8, kv_heads: int = 2, head_dim: int = 64, dtype: str = "float16", form: str = "ops",
    seed: int = 0,
) -> ModelProto:
    """The model, with weights from a seed. Raises ArgumentError."""
    if form not in OPSETS:
        raise ArgumentError(f"form: got {form!r}; wants one of {', '.join(map(repr, OPSETS))}")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"kv_heads: got {kv_heads} for {heads} heads; wants a positive number that divides them")
    if layers < 1:
        raise ArgumentError(f"layers: got {layers}; wants at least 1")
    graph = _Graph(DTYPES[dtype], NUMPY[dtype], np.random.default_rng(seed))
    width, group = heads * head_dim, heads // kv_heads
    topics = graph.rng.standard_normal((TOPICS, 1, width))
    words = topics + 0.5 * graph.rng.standard_normal((TOPICS, WORDS, width))
    x = graph.add("Gather", [graph.weight("embedding", words.reshape(-1, width)), "ids"], "x.0")
    for layer, site in enumerate(sites(layers)):
        of = f"layer.{layer}."
        norm = [x, graph.weight(of + "gain", np.ones(width)), graph.weight(of + "bias", np.zeros(width))]
        normed = graph.add("LayerNormalization", norm, of + "normed", axis=-1, epsilon=1e-5)
        # q is like k, so tokens of a topic find each other. LayerNorm gives them the length sqrt(width).
        size = np.sqrt(SCORE * np.sqrt(head_dim)) / np.sqrt(head_dim) / np.sqrt(width)
        key = size * graph.rng.standard_normal((width, kv_heads, 1, head_dim))
        query = key + 0.3 * size * graph.rng.standard_normal((width, kv_heads, group, head_dim))
        value = graph.rng.standard_normal((width, kv_heads * head_dim)) / np.sqrt(width)
        for name, matrix in ((site.q, query), (site.k, key), (site.v, value)):
            graph.add("MatMul", [normed, graph.weight(name + ".weight", matrix.reshape(width, -1))], name)
        ATTENTIONS[form](graph, site, of, heads, kv_heads, head_dim)
        output = graph.weight(of + "o.weight", graph.rng.standard_normal((width, width)) / np.sqrt(width))
        added = graph.add("MatMul", [site.out, output], of + "o")
        x = graph.add("Add", [x, added], "hidden" if layer + 1 == layers else f"x.{layer + 1}")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "seqlen"])
    hidden = helper.make_tensor_value_info("hidden", graph.type, ["batch", "seqlen", width])
    opsets = [helper.make_opsetid("", OPSETS[form])]
    if form == "gqa":
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    made = helper.make_model(
        helper.make_graph(graph.nodes, "small transformer", [ids], [hidden], graph.weights, value_info=graph.types),
        opset_imports=opsets,
        ir_version=IR_VERSION,
    )
    checker.check_model(made, full_check=True)
    return made


class _Graph:
    def __init__(self, type: int, numpy_type: np.dtype, rng: np.random.Generator):
        self.type, self.numpy_type, self.rng = type, numpy_type, rng
        self.nodes, self.weights, self.types = [], [], []

    def add(self, operator: str, inputs: list[str], output: str, *others: str, **attributes) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output, *others], output, **attributes))
        return output

    def integer(self, name: str, value: int, kind: int = TensorProto.INT64) -> str:
        self.weights.append(helper.make_tensor(name, kind, [], [value]))
        return name

    def weight(self, name: str, values: np.ndarray) -> str:
        raw = np.ascontiguousarray(values, np.float32).astype(self.numpy_type).tobytes()
        self.weights.append(helper.make_tensor(name, self.type, values.shape, raw, raw=True))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        self.weights.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name


def _attention_operator(graph: _Graph, site: Site, of: str, heads: int, kv_heads: int, head_dim: int) -> None:
    graph.add(
        "Attention", [site.q, site.k, site.v], site.out, q_num_heads=heads, kv_num_heads=kv_heads, is_causal=1
    )


def _group_query_attention(graph: _Graph, site: Site, of: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """It wants the numbers of keys, less one each, and the largest; both from the shape of q."""
    shape = graph.add("Shape", [site.q], of + "shape")
    counts = {}
    for axis, name in enumerate(("batch", "length")):
        counts[name] = graph.add("Gather", [shape, graph.integers(of + name + ".axis", [axis])], of + name, axis=0)
    keys = graph.add("Cast", [counts["length"]], of + "keys", to=TensorProto.INT32)
    one = graph.integer(of + "1", 1, TensorProto.INT32)
    lengths = graph.add("Expand", [graph.add("Sub", [keys, one], of + "last"), counts["batch"]], of + "lengths")
    # Not ``keys`` itself: ONNX Runtime 1.31 takes the value that it infers of a Cast for an int64.
    total = graph.add("Add", [graph.add("ReduceMax", [lengths], of + "longest", keepdims=0), one], of + "total")
    inputs = [site.q, site.k, site.v, "", "", lengths, total]
    graph.add(
        "GroupQueryAttention", inputs, site.out, of + "present_k", of + "present_v",
        domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads,
    )
    # ONNX infers no shapes in ONNX Runtime's domain, so exporters write them down.
    graph.types.append(helper.make_tensor_value_info(site.out, graph.type, ["batch", "seqlen", heads * head_dim]))


def _attention_ops(graph: _Graph, site: Site, of: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Scores of a head are a matrix of their own, its group's beside it: [batch, kv_heads, group, seqlen, seqlen]."""

    def split(name: str, group: int, order: list[int]) -> str:
        shape = graph.integers(f"{name}.shape", [0, 0, kv_heads, group, head_dim])
        return graph.add("Transpose", [graph.add("Reshape", [name, shape], f"{name}.heads")], f"{name}.t", perm=order)

    q, v = split(site.q, heads // kv_heads, [0, 2, 3, 1, 4]), split(site.v, 1, [0, 2, 3, 1, 4])
    k = split(site.k, 1, [0, 2, 3, 4, 1])
    scale = graph.weight(of + "scale", np.array(head_dim**-0.5))
    scores = graph.add("Mul", [graph.add("MatMul", [q, k], of + "products"), scale], of + "scores")
    zero, one = graph.integer(of + "0", 0), graph.integer(of + "1", 1)
    length = graph.add("Gather", [graph.add("Shape", [site.q], of + "shape"), one], of + "length", axis=0)
    places = graph.add("Range", [zero, length, one], of + "places")
    column = graph.add("Unsqueeze", [places, graph.integers(of + "axis", [1])], of + "column")
    visible = graph.add("LessOrEqual", [places, column], of + "visible")
    hidden = graph.weight(of + "hidden", np.array(-np.inf))
    masked = graph.add("Where", [visible, scores, hidden], of + "masked")
    weights = graph.add("Softmax", [masked], of + "weights", axis=-1)
    mixed = graph.add("MatMul", [weights, v], of + "mixed")
    rows = graph.add("Transpose", [mixed], of + "rows", perm=[0, 3, 1, 2, 4])
    graph.add("Reshape", [rows, graph.integers(of + "packed", [0, 0, heads * head_dim])], site.out)


ATTENTIONS = {"ops": _attention_ops, "operator": _attention_operator, "gqa": _group_query_attention}
