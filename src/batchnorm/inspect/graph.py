"""The graph that every front end makes: calls of layers and normalizations, and the operators between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from .modules import is_layer
from .operators import Effect, keeps_place

__all__ = ["ELSEWHERE", "Geometry", "GraphNode", "ModelGraph"]

ELSEWHERE = "elsewhere"  # a reader that has no name


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def same_axis(self, axis: int, other: Geometry, other_axis: int) -> bool:
        """Whether two views of all of one storage have the same elements along these axes."""
        size, theirs = self.shape[axis], other.shape[other_axis]
        strides = size == 1 or self.stride[axis] == other.stride[other_axis]
        whole = prod(self.shape) == prod(other.shape) and self.offset == other.offset
        return size == theirs and strides and whole


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
    readers: list[str] = field(default_factory=list)  # what reads the very result: names of modules or operators
    is_output: bool = False  # the model returns this very result
    reaches_output: bool = False  # the model returns something that the node's value, as it is, is part of
    parameters_shared: bool = False  # something outside the layer reads its weight or bias
    is_call: bool = False  # a layer or normalization that a fold can change: of a module, or of a file's node
    stays: str = ""  # why it cannot be changed, where the front end knows
    stays_before: str = ""  # why a layer cannot take in what comes after it

    def link(self, inputs: list[GraphNode]) -> None:
        """Make these the nodes whose values it reads."""
        for node in inputs:
            if node is not self and node not in self.inputs:
                self.inputs.append(node)
                node.users.append(self)

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


@dataclass(frozen=True)
class ModelGraph:
    """`nodes` in the order in which they ran; `functional_norms` names the modules that call `F.batch_norm`."""

    nodes: tuple[GraphNode, ...]
    functional_norms: tuple[str, ...]
    output: Any = field(repr=False, default=None)

    @property
    def calls(self) -> list[GraphNode]:
        """The calls of layers and normalizations that a fold can change, in order."""
        return [node for node in self.nodes if node.is_call]

    def calls_of(self, module: nn.Module) -> list[GraphNode]:
        return [node for node in self.nodes if node.module is module]

    def output_layers(self) -> set[nn.Module]:
        """Layers whose result the model returns: as it is, or by a way without any layer.

        A layer that reaches the output only beside a skip connection, and feeds other layers too, is a hidden one.
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
