"""ONNX graphs as data: what `torch.onnx` never writes, and other exporters do."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from hypothesis import strategies as st

__all__ = ["Graph", "Node", "build", "graphs"]

# IR version and opset: below 4 an initializer has to be an input of the graph too.
_VERSIONS = [(8, 17), (3, 7), (3, 8), (4, 9), (6, 11), (7, 13), (8, 15), (10, 20)]


@dataclass(frozen=True)
class Node:
    """Value i + 1 of a graph: an operator on values, then on parameters of these shapes."""

    op: str
    reads: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    via: str = "initializer"  # or "constant": nodes; "identity": behind an Identity; "shared": the last node's like it
    named: bool = True


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    version: tuple[int, int] = (8, 17)
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        nodes = "".join(f"fold_onnx.{node!r}, " for node in self.nodes)
        rest = f"{self.shape}, {self.outputs}, {self.version}, {self.dtype!r}, {self.seed}"
        return f"Graph(({nodes}), {rest})"

    def features(self) -> set[str]:
        found = {node.op for node in self.nodes} | {node.via for node in self.nodes}
        found |= {f"{node.op} {name}" for node in self.nodes for name, _ in node.attributes}
        return found | {f"opset {self.version[1]}", self.dtype}


def build(graph: Graph) -> Any:
    """The graph as an ONNX model."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    generator = np.random.default_rng(graph.seed)
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}[graph.dtype]
    nodes, initializers, inputs = [], [], [helper.make_tensor_value_info("x", kind, graph.shape)]
    values, parameters = ["x"], {}
    for number, node in enumerate(graph.nodes):
        names = []
        for place, shape in enumerate(node.parameters):
            shared = parameters.get((node.op, place, shape))
            if node.via == "shared" and shared:
                names.append(shared)
                continue
            array = generator.standard_normal(shape)
            if node.op == "BatchNormalization" and place == 3:
                array = np.abs(array) + 0.5
            name = f"p{number}.{place}"
            tensor = numpy_helper.from_array(array.astype(graph.dtype), name)
            if node.via == "constant":
                nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            else:
                initializers.append(tensor)
                if graph.version[0] < 4:
                    inputs.append(helper.make_tensor_value_info(name, kind, shape))
                if node.via == "identity":
                    nodes.append(helper.make_node("Identity", [name], [f"{name}.same"]))
                    name = f"{name}.same"
            parameters[node.op, place, shape] = name
            names.append(name)
        title = f"n{number}" if node.named else ""
        given = [values[i] for i in node.reads] + names
        nodes.append(helper.make_node(node.op, given, [f"v{number}"], name=title, **dict(node.attributes)))
        values.append(f"v{number}")
    results = [helper.make_tensor_value_info(values[i], kind, None) for i in graph.outputs]
    made = helper.make_graph(nodes, "fuzz", inputs, results, initializers)
    ir, opset = graph.version
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    return shape_inference.infer_shapes(model, check_type=True, strict_mode=True)  # an output says its shape


@st.composite
def graphs(draw: Any) -> Graph:
    """Graphs of one to six nodes, shape after shape."""
    dims = draw(st.integers(0, 2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *(draw(st.integers(2, 6)) for _ in range(dims)))
    shapes, nodes = [shape], []
    for _ in range(draw(st.integers(1, 6))):
        newest = len(shapes) - 1
        read = newest - draw(st.sampled_from([0, 0, 0, 0, 1])) % (newest + 1)
        op, parameters, attributes, after, *more = _node(draw, shapes, read)
        via = draw(st.sampled_from(["initializer", "initializer", "initializer", "constant", "identity", "shared"]))
        reads = more[0] if more else (read,)
        nodes.append(Node(op, reads, parameters, attributes, via, draw(st.integers(0, 3)) != 3))
        shapes.append(after)
    outputs = {len(nodes), *([draw(st.integers(1, len(nodes)))] if draw(st.integers(0, 4)) == 4 else [])}
    version = draw(st.sampled_from(_VERSIONS))
    dtype = draw(st.sampled_from(["float32", "float32", "float32", "float16"]))
    return Graph(tuple(nodes), shape, tuple(sorted(outputs)), version, dtype, draw(st.integers(0, 99)))


def _node(draw: Any, shapes: list[tuple[int, ...]], read: int) -> Any:
    shape = shapes[read]
    dims, channels = len(shape) - 2, shape[1]
    sorts = ["norm", "norm", "norm", "layer", "layer", "layer", "simple", "sum", "constant", "reshape"]
    sort = draw(st.sampled_from(sorts))
    if sort == "norm":
        eps = draw(st.sampled_from([(), (("epsilon", 1e-3),), (("epsilon", 0.1), ("momentum", 0.5))]))
        return "BatchNormalization", ((channels,),) * 4, eps, shape
    if sort == "layer":
        return _matmul(draw, shape) if not dims else draw(st.sampled_from([_conv, _conv_transpose]))(draw, shape)
    if sort == "sum":
        others = [i for i, other in enumerate(shapes) if other == shape]
        op = draw(st.sampled_from(["Add", "Mul", "Sub"]))
        return op, (), (), shape, (read, draw(st.sampled_from(others)))
    if sort == "constant":
        vector = draw(st.sampled_from([(1, channels, *(1,) * dims), (1,), (channels, *(1,) * dims)]))
        return draw(st.sampled_from(["Add", "Mul"])), (vector,), (), shape
    if sort == "reshape":
        order = tuple(draw(st.permutations(range(len(shape)))))
        forms = [("Transpose", (), (("perm", order),), tuple(shape[i] for i in order))]
        forms += [("Flatten", (), (("axis", 1),), (shape[0], prod(shape[1:])))]
        return draw(st.sampled_from(forms))
    return draw(st.sampled_from(["Relu", "Identity", "Sigmoid", "Dropout"])), (), (), shape


def _matmul(draw: Any, shape: tuple[int, ...]) -> Any:
    out, inside = draw(st.integers(1, 4)), shape[1]
    if draw(st.booleans()):
        return "MatMul", ((inside, out),), (), (shape[0], out)
    across = draw(st.integers(0, 1))
    bias = draw(st.sampled_from([(out,), (1, out), (1,), (1, 1), (shape[0], out)]))
    attributes = draw(st.sampled_from([(), (("alpha", 0.5),), (("beta", 2.0),), (("alpha", 0.5), ("beta", 0.0))]))
    weight = (out, inside) if across else (inside, out)
    return "Gemm", (weight, bias), (*attributes, *((("transB", 1),) if across else ())), (shape[0], out)


def _conv(draw: Any, shape: tuple[int, ...]) -> Any:
    sizes = shape[2:]
    group = draw(st.sampled_from([1, shape[1]]))
    out = group * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
    pads = tuple(draw(st.integers(0, k - 1)) for k in kernel * 2)
    stride = draw(st.integers(1, 2))
    before, behind = pads[: len(sizes)], pads[len(sizes) :]
    after = tuple((s + a + b - k) // stride + 1 for s, a, b, k in zip(sizes, before, behind, kernel, strict=True))
    attributes: list[tuple[str, Any]] = [("group", group), ("strides", (stride,) * len(sizes))]
    automatic = draw(st.sampled_from(["", "", "", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if automatic:
        attributes.append(("auto_pad", automatic))
        short = [
            (s - k) // stride + 1 if automatic == "VALID" else -(-s // stride)
            for s, k in zip(sizes, kernel, strict=True)
        ]
        after = tuple(short)
    else:
        attributes.append(("pads", pads))
    attributes += [("kernel_shape", kernel)] if draw(st.booleans()) else []
    weight = (out, shape[1] // group, *kernel)
    return "Conv", (weight, (out,))[: 1 + draw(st.booleans())], tuple(attributes), (shape[0], out, *after)


def _conv_transpose(draw: Any, shape: tuple[int, ...]) -> Any:
    sizes = shape[2:]
    group, each = draw(st.sampled_from([1, shape[1]])), draw(st.integers(1, 2))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    extra = draw(st.integers(0, stride - 1))
    after = tuple((s - 1) * stride + kernel + extra for s in sizes)
    attributes = (("group", group), ("strides", (stride,) * len(sizes)), ("output_padding", (extra,) * len(sizes)))
    weight, out = (shape[1], each, *(kernel,) * len(sizes)), group * each
    return "ConvTranspose", (weight, (out,))[: 1 + draw(st.booleans())], attributes, (shape[0], out, *after)
