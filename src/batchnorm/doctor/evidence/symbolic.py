"""The graph without any data: torch.fx on the whole model, or, where it cannot follow, on each part that it can."""

from __future__ import annotations

import contextlib
import inspect
import io
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from ...inspect.untouched import preserved
from .model_graph import Graph, Node, kind_of_module
from .normalizations import Layer

__all__ = ["trace_graph"]

_LAYER_CALLS = {
    "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "conv_transpose1d": "conv", "conv_transpose2d": "conv",
    "conv_transpose3d": "conv", "linear": "linear", "batch_norm": "batch_norm", "dropout": "dropout",
    "dropout1d": "dropout", "dropout2d": "dropout", "dropout3d": "dropout", "alpha_dropout": "dropout",
    "feature_alpha_dropout": "dropout",
}  # fmt: skip


def trace_graph(model: nn.Module, layers: list[Layer]) -> Graph:
    """Trace the model symbolically and leave it as it was. Parts that cannot be traced make the graph incomplete."""
    by_module = {id(layer.module): layer for layer in layers}
    graph = Graph()
    # A forward may print, or keep what it sees in an attribute; neither is to be noticed.
    with preserved(model), contextlib.redirect_stdout(io.StringIO()):
        graph.complete = _trace(model, "", by_module, graph)
    return graph


def _trace(module: nn.Module, prefix: str, layers: dict[int, Layer], graph: Graph) -> bool:
    if id(module) in layers or kind_of_module(module) or not any(True for _ in module.children()):
        return True
    try:
        traced = fx.Tracer().trace(module)
    except Exception:  # a forward may do anything with a proxy
        complete = False
        for name, child in module.named_children():
            _trace(child, f"{prefix}{name}.", layers, graph)
    else:
        _convert(traced, module, prefix, layers, graph)
        complete = True
    return complete


def _convert(traced: fx.Graph, root: nn.Module, prefix: str, layers: dict[int, Layer], graph: Graph) -> None:
    made: dict[fx.Node, Node] = {}
    for node in traced.nodes:
        inputs = [made[n] for n in node.all_input_nodes if n in made]
        if node.op == "output":
            for source in inputs:
                source.is_output = True
            continue
        new = Node("other", f"{prefix}{node.target}" if node.op == "call_module" else prefix.rstrip("."), inputs)
        if node.op == "call_module":
            _describe_module(new, root.get_submodule(str(node.target)), layers)
        elif node.op == "call_function":
            _describe_call(new, node)
        if new.kind in ("conv", "linear") and node.op == "call_function":
            new.inputs = new.inputs[:1]
        new.link()
        made[node] = new
        graph.nodes.append(new)


def _describe_module(new: Node, module: nn.Module, layers: dict[int, Layer]) -> None:
    new.owner = module
    layer = layers.get(id(module))
    kind = kind_of_module(module)
    if layer is not None:
        new.kind, new.owner, new.name = "batch_norm", layer, layer.name
    elif kind is not None:
        new.kind, new.bias = kind, module.bias
    elif isinstance(module, _DropoutNd):
        new.kind, new.p = "dropout", module.p


def _describe_call(new: Node, node: fx.Node) -> None:
    name = getattr(node.target, "__name__", "")
    new.kind = _LAYER_CALLS.get(name, "other")
    if new.kind == "other":
        return
    new.name = f"{new.name}.{name}" if new.name else name
    new.owner = node
    if new.kind == "batch_norm":
        new.owner = _functional_layer(new.name, _arguments(F.batch_norm, node))
    if new.kind == "dropout":
        bound = _arguments(F.dropout, node)
        p, training = bound.get("p", 0.5), bound.get("training", True)
        new.p = p if isinstance(p, (int, float)) and training is not False else 0.0


def _functional_layer(name: str, given: dict[str, Any]) -> Layer:
    """Of a functional call a trace knows the settings but no tensors."""
    training = given.get("training", False) is not False
    return Layer(name, None, "functional", 1e-5, None, None, None, None, None, training=training, frozen=not training)


def _arguments(function: Any, node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(function).bind_partial(*node.args, **node.kwargs)
    return dict(bound.arguments)
