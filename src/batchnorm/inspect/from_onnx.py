"""The graph of an ONNX file: its Conv, ConvTranspose, Gemm and BatchNormalization nodes, and who reads what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .graph import ELSEWHERE, GraphNode, ModelGraph
from .operators import Effect

__all__ = ["OnnxReader", "attribute_of", "nested_graphs", "title_of", "trains"]

_EFFECTS = {
    "Conv": Effect.LAYER,
    "ConvTranspose": Effect.LAYER,
    "Gemm": Effect.LAYER,
    "BatchNormalization": Effect.NORM,
    "Dropout": Effect.DROPOUT,
}
_DEFAULT_DOMAINS = ("", "ai.onnx")


def title_of(node: Any) -> str:
    """The node's name, or that of its first output."""
    name: str = node.name or node.output[0]
    return name


def attribute_of(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def nested_graphs(model: Any) -> Iterator[tuple[str, Any]]:
    """(where, nodes) of every graph inside the main one: branches, loops and local functions."""
    waiting = [(f"the function {function.name}", function.node) for function in model.functions]
    yield from waiting
    waiting.append(("", model.graph.node))
    while waiting:
        _, nodes = waiting.pop()
        for node in nodes:
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    inner = (f"a branch of {title_of(node)}", graph.node)
                    waiting.append(inner)
                    yield inner


def trains(node: Any, opset: int) -> bool:
    """Whether a BatchNormalization node normalizes by the batch."""
    if opset >= 14:
        return bool(attribute_of(node, "training_mode", 0))
    if opset >= 7:  # before the attribute, more outputs than one said it
        return len([name for name in node.output if name]) > 1
    return not attribute_of(node, "is_test", 0)


class OnnxReader:
    """Reads a model's main graph; `nodes_of` gives the ONNX node behind each node of the graph that `read` returns."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAINS), default=0)
        self.initial = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.initial[node.output[0]] = node.attribute[0].t
        self.outputs = {value.name for value in model.graph.output}
        self.nodes_of: dict[GraphNode, Any] = {}

    def readers(self) -> dict[str, list[Any]]:
        """The nodes that read each value; a branch reads values of the graph around it."""
        found: dict[str, list[Any]] = defaultdict(list)
        for nodes in (self.model.graph.node, *(nodes for _, nodes in nested_graphs(self.model))):
            for node in nodes:
                for name in node.input:
                    found[name].append(node)
        return found

    def read(self) -> ModelGraph:
        """The graph as it stands now."""
        readers = self.readers()
        producer: dict[str, GraphNode] = {}
        nodes: list[GraphNode] = []
        self.nodes_of = {}
        for node in self.model.graph.node:
            made = GraphNode(title_of(node), _EFFECTS.get(node.op_type, Effect.OTHER))
            made.is_call = made.effect in (Effect.LAYER, Effect.NORM)
            made.link([producer[name] for name in node.input if name in producer])
            source = producer.get(node.input[0]) if node.input else None
            if made.is_call and source is not None and source.is_call:
                made.source, made.aligned = source, True  # channels are on axis 1 of all of them
            if made.effect is Effect.NORM:
                made.stays = self._why_norm_stays(node)
            elif made.effect is Effect.LAYER:
                made.stays, made.stays_before = self._why_layer_stays(node), self._why_not_before(node)
            result = node.output[0]
            made.is_output = result in self.outputs
            made.readers = [title_of(reader) for reader in readers[result]]
            if made.is_output or len(made.readers) > 1:
                made.readers.append(ELSEWHERE)  # also where two nodes bear one name
            for name in node.output:
                producer[name] = made
            self.nodes_of[made] = node
            nodes.append(made)
        return ModelGraph(tuple(nodes), ())

    def _why_norm_stays(self, norm: Any) -> str:
        if trains(norm, self.opset) or len([name for name in norm.output if name]) > 1:
            return "in training mode; export the model in eval"
        return "its parameters are computed" if any(name not in self.initial for name in norm.input[1:]) else ""

    def _why_layer_stays(self, layer: Any) -> str:
        title = title_of(layer)
        if any(name and name not in self.initial for name in layer.input[1:]):
            return f"{title} computes its weight"
        if layer.op_type == "Gemm" and attribute_of(layer, "transA", 0):
            return f"{title} reads its input transposed"
        return ""

    def _why_not_before(self, layer: Any) -> str:
        biases = [list(self.initial[name].dims) for name in layer.input[2:] if name in self.initial]
        if any(size != 1 for dims in biases for size in dims[:-1]):
            return f"the bias of {title_of(layer)} differs along the batch"
        return ""
