"""What is computed from what: the same small graph, whether it was observed in a run or traced without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["CONVOLUTIONS", "Graph", "Node", "kind_of_module"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(eq=False)
class Node:
    """One operation. `kind`: conv, linear, batch_norm, dropout or other; `owner`: the module or layer behind it."""

    kind: str
    name: str
    inputs: list[Node] = field(default_factory=list)
    owner: Any = None
    users: list[Node] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    feature_axis: int | None = None  # where the layer that made it put the features; None = not known
    p: float = 0.0  # of a dropout
    bias: Any = None  # of a conv or linear: its bias parameter
    is_output: bool = False

    def link(self) -> None:
        for node in self.inputs:
            node.users.append(self)


@dataclass
class Graph:
    """`complete`: all of one forward; else only those parts of the model that could be traced."""

    nodes: list[Node] = field(default_factory=list)
    complete: bool = True

    def of_kind(self, *kinds: str) -> list[Node]:
        return [node for node in self.nodes if node.kind in kinds]

    def directly_normalized(self) -> Iterator[tuple[Node, Node]]:
        """Yield (conv or linear, the batch norm right behind it) where nobody else reads the first one's result,
        in any of its calls."""
        by_owner: dict[int, list[Node]] = {}
        for node in self.of_kind("conv", "linear"):
            by_owner.setdefault(id(node.owner), []).append(node)
        for calls in by_owner.values():
            readers = [user for node in calls for user in node.users]
            escapes = any(node.is_output or not node.users for node in calls)
            if not escapes and all(reader.kind == "batch_norm" for reader in readers):
                yield calls[0], readers[0]

    def first_norms_after(self, start: Node) -> list[Node]:
        """Return the batch norms that `start` reaches without passing another one."""
        found, seen, ahead = [], {id(start)}, list(start.users)
        while ahead:
            node = ahead.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.kind == "batch_norm":
                found.append(node)
            else:
                ahead += node.users
        return found


def kind_of_module(module: nn.Module) -> str | None:
    """conv or linear for a module whose bias a normalization may make redundant."""
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) else None
