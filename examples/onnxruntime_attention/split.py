"""Cuts an ONNX graph at its attentions: the parts before, between and after them, each a model of its own."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, shape_inference
from onnx.utils import Extractor

from salekit.errors import ArgumentError

READ_SHAPES = ("Shape", "Size")  # operators that do not look at what is in their input


@dataclass(frozen=True)
class Site:
    """The names of an attention's tensors, each [batch, seqlen, heads * head_dim] or with four axes in ``layout``.

    layout: "bshd", [batch, seqlen, heads, head_dim], or "bhsd", with the middle axes swapped.
    What lies between q, k and v on one side and out on the other is what salekit takes the place of.
    """

    q: str
    k: str
    v: str
    out: str
    layout: str = "bshd"


@dataclass(frozen=True)
class Split:
    """A model in pieces. Attention i runs after part i and before part i + 1; a part without outputs is None.

    attentions: what the parts leave out, from q, k and v to out, as models.
    """

    parts: list[ModelProto | None]
    attentions: list[ModelProto]


def split(model: ModelProto, sites: list[Site], sizes: dict[str, int]) -> Split:
    """The parts of a model around the attentions at ``sites``, given in the order in which they run.

    sizes: a number for each name among the axes of the model's inputs, so that all shapes are known.

    A tensor that one part computes and a later one reads (a residual, say) is an output of the one and an input of the
    other, under its name in the model. What depends on weights and shapes of inputs alone is computed in each part
    that reads it. Raises ArgumentError when a name is not computed by the graph, when an attention reads more than its
    q, k and v or not all of them, when the order is wrong, and when a node has a subgraph.
    """
    if not sites:
        raise ArgumentError("sites: got none; wants the tensors of at least one attention")
    model = fix_sizes(model, sizes)
    graph = _Graph(model.graph)
    outs = {site.out: index + 1 for index, site in enumerate(sites)}
    if len(outs) < len(sites):
        raise ArgumentError("sites: two attentions have the same out; wants each once")
    for site in sites:
        graph.check(site, outs)
    model = _with_shapes(model, sites)
    ends = [x.name for x in model.graph.output] + [name for site in sites for name in (site.q, site.k, site.v)]
    nodes, _ = graph.walk(ends, set(outs))
    part_of = graph.parts(nodes, outs)
    for index, site in enumerate(sites):
        for name in (site.q, site.k, site.v):
            if part_of[name] is not None and part_of[name] > index:
                raise ArgumentError(
                    f"sites: {name!r} of attention {index} depends on attention {part_of[name] - 1}; wants the order "
                    "in which they run"
                )
    # What a part has to hand over: to a later part, to an attention, to the caller.
    crossing = {
        name for node in nodes for name in node.input
        if part_of.get(name) is not None and name not in outs and name not in graph.inputs
        and part_of[name] != part_of[node.output[0]]
    }
    handed = [name for name in dict.fromkeys([*ends, *sorted(crossing)]) if name not in outs]
    extractor = Extractor(model)
    parts = []
    for part in range(len(sites) + 1):
        outputs = [name for name in handed if (part_of[name] or 0) == part]
        before = {name for name in crossing if part_of[name] < part}
        parts.append(_extract(extractor, graph, outputs, {*outs, *before}))
    attentions = [_extract(extractor, graph, [site.out], {site.q, site.k, site.v}) for site in sites]
    return Split(parts, attentions)


def shape_of(value: ValueInfoProto) -> tuple[int, ...]:
    """The shape of an input or output of a part. Raises ArgumentError when a size is not known."""
    dims = value.type.tensor_type.shape.dim
    if not value.type.tensor_type.HasField("shape") or any(not dim.HasField("dim_value") for dim in dims):
        raise ArgumentError(f"model: shape inference does not find the shape of {value.name!r}, which is at a cut")
    return tuple(dim.dim_value for dim in dims)


def fix_sizes(model: ModelProto, sizes: dict[str, int]) -> ModelProto:
    """A copy whose axes have numbers instead of names. Raises ArgumentError when an axis of an input has none."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for value in fixed.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                raise ArgumentError(f"sizes: {value.name!r} has an axis {dim.dim_param!r}; wants a number for it")
    return fixed


def _with_shapes(model: ModelProto, sites: list[Site]) -> ModelProto:
    """The model with the shapes of all its tensors. Where inference gets lost in an attention, out is shaped as q."""
    known = shape_inference.infer_shapes(model, data_prop=True)
    for site in sites:
        types = {x.name: x.type for x in (*known.graph.value_info, *known.graph.output)}
        given = [x.name for x in (*model.graph.value_info, *model.graph.output)]
        if site.q in types and site.out not in given:
            model.graph.value_info.append(ValueInfoProto(name=site.out, type=types[site.q]))
            known = shape_inference.infer_shapes(model, data_prop=True)
    return known


class _Graph:
    def __init__(self, graph: GraphProto):
        for node in graph.node:
            if any(x.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for x in node.attribute):
                raise ArgumentError(f"model: node {node.name!r} ({node.op_type}) has a subgraph; wants a graph without")
        self.nodes = list(graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.inputs = {x.name for x in graph.input} - {x.name for x in graph.initializer}

    def walk(self, names: list[str], stops: set[str]) -> tuple[list[NodeProto], set[str]]:
        """(the nodes that names need, in the graph's order; the stops and inputs of the graph that those read)."""
        found, read, left = set(), set(), list(names)
        while left:
            name = left.pop()
            if name in stops or name in self.inputs:
                read.add(name)
            elif name in self.producers and id(self.producers[name]) not in found:
                found.add(id(self.producers[name]))
                left += self.producers[name].input
        return [node for node in self.nodes if id(node) in found], read

    def check(self, site: Site, outs: dict[str, int]) -> None:
        """That the attention is a function of its q, k and v, and of nothing else but weights and lengths."""
        for role in ("q", "k", "v", "out"):
            if getattr(site, role) not in self.producers:
                raise ArgumentError(f"site.{role}: got {getattr(site, role)!r}, which no node of the graph computes")
        wanted, seen, left = {site.q, site.k, site.v}, set(), [site.out]
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.inputs or (name in outs and name != site.out):
                raise ArgumentError(
                    f"site: between {', '.join(sorted(wanted))} and {site.out!r} the graph also reads {name!r}; wants "
                    "an attention of q, k and v alone"
                )
            node = self.producers.get(name)
            if name not in wanted and node is not None and node.op_type not in READ_SHAPES:
                left += node.input
        if not wanted <= seen:
            raise ArgumentError(f"site: {site.out!r} does not depend on {', '.join(sorted(wanted - seen))}")

    def parts(self, nodes: list[NodeProto], outs: dict[str, int]) -> dict[str, int | None]:
        """The part that computes each tensor: after the last attention that it depends on. None: any part may."""
        part_of: dict[str, int | None] = {**{name: 0 for name in self.inputs}, **outs}
        for node in nodes:
            known = [part_of.get(name) for name in node.input]
            if node.op_type in READ_SHAPES and node.input[0] in self.inputs:
                known = []
            part = max((part for part in known if part is not None), default=None)
            part_of |= {name: part for name in node.output if name not in outs}
        return part_of


def _extract(extractor: Extractor, graph: _Graph, outputs: list[str], stops: set[str]) -> ModelProto | None:
    nodes, read = graph.walk(outputs, stops)
    if not nodes:
        return None
    try:
        return extractor.extract_model(sorted(read), outputs)
    except ValueError as error:  # names what has no type
        raise ArgumentError(f"model: shape inference does not reach a tensor at a cut: {error}") from error
