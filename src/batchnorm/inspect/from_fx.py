"""The graph without any data: `torch.fx` on the model, or, where it cannot follow, on each part that it can."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from typing import Any

from torch import fx, nn

from .graph import GraphNode, ModelGraph
from .modules import is_layer, is_norm
from .operators import Effect, effect_of
from .untouched import untouched

__all__ = ["graph_of_trace"]


def graph_of_trace(model: nn.Module) -> ModelGraph:
    """Trace the model symbolically, and leave it as it was.

    A part that cannot be traced contributes nothing of its own; its children are tried one by one. What only a run
    shows is not known: shapes, and so whether a normalization takes the channels of the layer before it for its own.
    """
    reader = _TraceReader(model)
    # A forward may print, or keep what it sees in an attribute; neither is to be noticed.
    with untouched(model), contextlib.redirect_stdout(io.StringIO()):
        reader.trace(model, "")
    return ModelGraph(tuple(reader.nodes), tuple(dict.fromkeys(reader.functional_norms)))


class _TraceReader:
    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[GraphNode] = []
        self.functional_norms: list[str] = []
        self.holders = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)

    def trace(self, module: nn.Module, prefix: str) -> None:
        if is_layer(module) or is_norm(module) or not any(True for _ in module.children()):
            return
        try:
            traced = fx.Tracer().trace(module)
        except Exception:  # a forward may do anything with a proxy
            for name, child in module.named_children():
                self.trace(child, f"{prefix}{name}.")
        else:
            self._read(traced, module, prefix)

    def _read(self, traced: fx.Graph, root: nn.Module, prefix: str) -> None:
        made: dict[fx.Node, GraphNode] = {}
        for node in traced.nodes:
            if node.op == "output":
                self._note_output(node, made)
                continue
            new = self._node(node, root, prefix)
            new.link([made[n] for n in node.all_input_nodes if n in made])
            first = node.args[0] if node.args else None
            source = made.get(first) if isinstance(first, fx.Node) else None
            if new.is_call and source is not None and source.is_call:
                new.source, new.aligned = source, True
            for read in new.inputs:
                read.readers.append(new.name)
            made[node] = new
            self.nodes.append(new)

    def _node(self, node: fx.Node, root: nn.Module, prefix: str) -> GraphNode:
        if node.op == "call_module":
            module: Any = root.get_submodule(str(node.target))
            layer, norm = is_layer(module), is_norm(module)
            effect = Effect.LAYER if layer else Effect.NORM if norm else effect_of(type(module).__name__.lower())
            new = GraphNode(f"{prefix}{node.target}", effect, module, is_call=layer or norm)
            new.parameters_shared = layer and any(self.holders[p] > 1 for p in module.parameters(False))
            return new
        operator = str(getattr(node.target, "__name__", node.target))
        new = GraphNode(operator, effect_of(operator) if node.op != "placeholder" else Effect.OTHER)
        if new.effect is Effect.NORM:
            self.functional_norms.append(prefix.rstrip("."))
        return new

    def _note_output(self, node: fx.Node, made: dict[fx.Node, GraphNode]) -> None:
        for read in (made[n] for n in node.all_input_nodes if n in made):
            read.is_output = read.reaches_output = True
            read.readers.append("the model's output")
