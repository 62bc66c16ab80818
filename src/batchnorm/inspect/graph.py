"""The graph that every front end makes: calls of layers and normalizations, and the operators between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .modules import channel_axis, is_layer
from .operators import Effect, keeps_place

__all__ = ["ELSEWHERE", "KEPT", "OUTPUT", "Geometry", "GraphNode", "ModelGraph"]


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@dataclass(eq=False)
class GraphNode:
    """One call of a layer, a normalization or a dropout, or one operator between them."""

    name: str  # the module's dotted name, or the operator's
    effect: Effect
    module: nn.Module | None = None  # None: an operator, or a layer that is called as a function
    inputs: list[GraphNode] = field(default_factory=list)  # whose values it was computed from, each once
    users: list[GraphNode] = field(default_factory=list)
    input: Geometry | None = None  # of the first tensor that the call was given
    output: Geometry | None = None
    source: GraphNode | None = None  # the call whose result is the first tensor, itself or a view of it, unchanged
    aligned: bool = False  # the channels of the source's result are those of the input
    spread: tuple[int, ...] = ()  # where they are others: the source's channel in each channel of the input
    readers: list[GraphNode] = field(default_factory=list)  # what reads the very result; an operator has no module
    is_output: bool = False  # the model returns this very result
    reaches_output: bool = False  # the model returns, or something holds afterwards, what the value as it is is part of
    parameters_shared: bool = False  # something outside the layer reads its weight or bias
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the model's, by name, that a function's call was given
    axis: int | None = None  # of the channels, in a function's call
    feature_axis: int | None = None  # the axis of a normalization's input that holds the features of a layer before it
    p: float = 0.0  # of a dropout
    by_batch: bool = False  # a normalization's call as a function asks for the statistics of the batch
    is_call: bool = False  # a layer or normalization that a fold can change: of a module, or of a file's node
    stays: str = ""  # why it cannot be changed, where the front end knows
    stays_before: str = ""  # why a layer cannot take in what comes after it

    @property
    def identity(self) -> Any:
        """The same for all calls of one module. A name is not: an operator may bear a module's."""
        return self.module or self

    def link(self, inputs: list[GraphNode]) -> None:
        """Make these the nodes whose values it reads."""
        for node in inputs:
            if node is not self and node not in self.inputs:
                self.inputs.append(node)
                node.users.append(self)

    def channel_axis(self, dims: int) -> int | None:
        """The axis of the call's input or result of `dims` dimensions that it takes for the channels."""
        if self.module is not None:
            return channel_axis(self.module, dims)
        return None if self.axis is None or not -dims <= self.axis < dims else self.axis % dims

    @property
    def bias(self) -> Tensor | None:
        """A layer's bias: its module's, or the vector among the model's tensors that a function's call was given."""
        if self.module is not None:
            return getattr(self.module, "bias", None)
        return next((tensor for tensor in self.tensors.values() if tensor.dim() == 1), None)

    def first_norms(self) -> list[GraphNode]:
        """The normalizations that the value reaches without passing another one."""
        return [node for node, _ in self.ahead(until=(Effect.NORM,)) if node.effect is Effect.NORM]

    def ahead(self, *, until: tuple[Effect, ...]) -> Iterator[tuple[GraphNode, bool]]:
        """Yield every node that the value reaches, and whether only linear steps lie between.

        A node whose effect is in `until` is yielded and not passed.
        """
        reached: dict[GraphNode, bool] = {}
        waiting = [(user, True) for user in self.users]
        while waiting:
            node, linear = waiting.pop()
            if node in reached and (reached[node] or not linear):
                continue
            reached[node] = linear
            if node.effect not in until:
                onward = linear and keeps_place(node.effect)
                waiting += [(user, onward) for user in node.users]
        yield from reached.items()


# Readers that are no nodes of a graph.
ELSEWHERE = GraphNode("elsewhere", Effect.OTHER)
KEPT = GraphNode("kept", Effect.OTHER)  # comes after the forward: something holds the result then
OUTPUT = GraphNode("the model's output", Effect.OTHER)


@dataclass(frozen=True)
class ModelGraph:
    """`nodes` in the order in which they ran; `functional_norms` names the modules that call `F.batch_norm`;
    `value_reads` says where Python, or the shape of a result, came to know values that another input would change,
    `draws_in_python` whether the forward drew random numbers of Python or NumPy, and `undecided` why the graph may be
    another one for other values."""

    nodes: tuple[GraphNode, ...]
    functional_norms: tuple[str, ...]
    value_reads: tuple[str, ...] = ()
    draws_in_python: bool = False
    undecided: str = ""

    @property
    def calls(self) -> list[GraphNode]:
        """The calls of layers and normalizations that a fold can change, in order."""
        return [node for node in self.nodes if node.is_call]

    def calls_of(self, module: nn.Module) -> list[GraphNode]:
        return [node for node in self.nodes if node.module is module]

    def of_effect(self, effect: Effect) -> list[GraphNode]:
        return [node for node in self.nodes if node.effect is effect]

    def directly_normalized(self) -> Iterator[tuple[GraphNode, GraphNode]]:
        """Yield (layer, normalization) where, in every call of the layer, normalizations of its own channels and
        nothing else read its very result."""
        norms = [node for node in self.of_effect(Effect.NORM) if node.source is not None and node.aligned]
        calls: dict[Any, list[GraphNode]] = {}
        for node in self.of_effect(Effect.LAYER):
            weight = next((name for name, tensor in node.tensors.items() if tensor.dim() > 1), None)
            if node.module is not None or weight is not None:
                calls.setdefault(node.module or weight, []).append(node)
        for group in calls.values():
            found = [[norm for norm in norms if norm.source is call] for call in group]
            if all(after and set(call.readers) == set(after) for call, after in zip(group, found, strict=True)):
                yield group[0], found[0][0]

    def output_layers(self) -> set[nn.Module]:
        """Layers whose result the model returns: as it is, or by a way without any layer.

        A layer that feeds other layers too, and reaches the output only beside a skip connection or by being held when
        the forward is over, is a hidden one.
        """
        found = set()
        for call in self._layer_calls():
            ahead = list(call.ahead(until=(Effect.LAYER,)))
            feeds_layer = any(node.effect is Effect.LAYER for node, _ in ahead)
            stops = [node for node, _ in ahead if node.effect is not Effect.LAYER]
            reaches_output = call.reaches_output or any(node.reaches_output for node in stops)
            if call.is_output or (reaches_output and not feeds_layer):
                found.add(call.module)
        return found  # type: ignore[return-value]  # _layer_calls yields calls of modules alone

    def normalized_layers(self) -> list[nn.Module]:
        """Layers, in the order of their calls, whose result meets a normalization before an activation or a layer."""
        found: dict[nn.Module, None] = {}
        for call in self._layer_calls():
            ahead = call.ahead(until=(Effect.LAYER,))
            if call.module is not None and any(node.effect is Effect.NORM and linear for node, linear in ahead):
                found[call.module] = None
        return list(found)

    def _layer_calls(self) -> list[GraphNode]:
        return [node for node in self.nodes if node.module is not None and is_layer(node.module)]
