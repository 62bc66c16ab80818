"""The graph without any data: `torch.fx` on the model, or, where it cannot follow, on each part that it can."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from collections import Counter
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from .functions import describe, effect_of_function
from .graph import KEPT, OUTPUT, GraphNode, ModelGraph
from .modules import is_dropout, is_layer, is_norm
from .operators import Effect, effect_of, node_operator
from .untouched import untouched

__all__ = ["graph_of_trace"]

_CHANNELED = (Effect.LAYER, Effect.NORM)


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


class _Tracer(fx.Tracer):
    """Knows which values something holds when the forward is over: an attribute, a list, a closure."""

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[tuple[fx.Node, Any]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self._proxies.append((node, weakref.ref(made)))
        return made

    def kept(self) -> set[fx.Node]:
        gc.collect()  # what only a circle of references holds cannot be read again
        return {node for node, proxy in self._proxies if proxy() is not None}


class _TraceReader:
    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[GraphNode] = []
        self.functional_norms: list[str] = []
        self.holders = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)

    def trace(self, module: nn.Module, prefix: str) -> None:
        atomic = not any(True for _ in module.children()) and fx.Tracer().is_leaf_module(module, prefix)
        if is_layer(module) or is_norm(module) or atomic:
            return
        tracer = _Tracer()
        try:
            traced = tracer.trace(module)
        except Exception:  # a forward may do anything with a proxy
            for name, child in module.named_children():
                self.trace(child, f"{prefix}{name}.")
        else:
            self._read(traced, module, prefix, tracer.kept())

    def _read(self, traced: fx.Graph, root: nn.Module, prefix: str, kept: set[fx.Node]) -> None:
        made: dict[fx.Node, GraphNode] = {}
        for node in traced.nodes:
            if node.op == "output":
                self._note_output(node, made)
                continue
            new = self._node(node, root, prefix)
            new.link([made[n] for n in node.all_input_nodes if n in made])
            first = node.args[0] if node.args else None
            source = made.get(first) if isinstance(first, fx.Node) else None
            if source is not None and new.effect in _CHANNELED and source.effect in _CHANNELED:
                new.source, new.aligned = source, True
            for read in new.inputs:
                read.readers.append(new)
            made[node] = new
            self.nodes.append(new)
        for node in kept & made.keys():
            made[node].reaches_output = True
            made[node].readers.append(KEPT)

    def _node(self, node: fx.Node, root: nn.Module, prefix: str) -> GraphNode:
        if node.op == "call_module":
            module: Any = root.get_submodule(str(node.target))
            layer, norm = is_layer(module), is_norm(module)
            effect = Effect.LAYER if layer else Effect.NORM if norm else effect_of(type(module).__name__.lower())
            effect = Effect.DROPOUT if is_dropout(module) else effect
            new = GraphNode(f"{prefix}{node.target}", effect, module, is_call=layer or norm)
            new.parameters_shared = layer and any(self.holders[p] > 1 for p in module.parameters(False))
            new.p = module.p if is_dropout(module) else 0.0
            return new
        if node.op == "call_function" and effect_of_function(node.target) is not Effect.OTHER:
            return self._function(node, root, prefix)
        operator = node_operator(node)
        return GraphNode(operator or str(node.target), effect_of(operator))

    def _function(self, node: fx.Node, root: nn.Module, prefix: str) -> GraphNode:
        """A layer, a normalization or a dropout that is called as a function."""
        new = GraphNode(f"{prefix}{getattr(node.target, '__name__', '')}", effect_of_function(node.target))
        given = describe(new, node.args, node.kwargs)
        if given.get("training") is False:
            new.p = 0.0
        if new.effect is Effect.NORM:
            self.functional_norms.append(prefix.rstrip("."))
        held = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        values = {f"{prefix}{name}": attrgetter(name)(root) for name in held}
        new.tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return new

    def _note_output(self, node: fx.Node, made: dict[fx.Node, GraphNode]) -> None:
        for read in (made[n] for n in node.all_input_nodes if n in made):
            read.is_output = read.reaches_output = True
            read.readers.append(OUTPUT)
