"""What follows a batch normalization in a graph: an addition, an activation, in any of the ways models write them."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..inspect.operators import Effect, effect_of, node_operator

__all__ = ["Chain", "arguments_of", "is_batch_norm", "match", "may_move", "value"]

_PLAIN = ("relu", "relu6", "silu", "hardswish", "sigmoid", "tanh")


class Chain(NamedTuple):
    """Nodes that become one: the normalization first, the node whose value it takes last."""

    nodes: list[fx.Node]
    residual: fx.Node | None
    activation: str
    negative_slope: float
    view: fx.Node | None = None  # stands between the two nodes of the chain, and then after both


def value(node: Any) -> Any:
    """The tensor that the tracer ran the node with, without data."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def _name(node: fx.Node) -> str:
    """The operator, in place or not: `torch.relu_`, `F.relu` and `x.relu()` are all "relu"."""
    return node_operator(node).rstrip("_")


def is_batch_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A batch normalization's arguments by the names of `functional.batch_norm`."""
    names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    if node.target is torch.batch_norm:
        names = ["input", "weight", "bias", "running_mean", "running_var", *names[5:]]
    given = dict(zip(names, node.args, strict=False)) | {k: v for k, v in node.kwargs.items() if k in names}
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    return defaults | given


def match(norm: fx.Node) -> Chain:
    """The longest chain that begins with this normalization; the node itself, if nothing fits."""
    nodes, residual = [norm], None
    add = _only_user(norm)
    if add is not None and (residual := _residual(add, norm)) is not None:
        nodes.append(add)
    activation, slope, more = _activation(nodes[-1])
    if not activation and add is not None and effect_of(_name(add)) is Effect.CARRY and add.args[0] is norm:
        # By elements it makes no difference which comes first, the activation or the view.
        activation, slope, more = _activation(add)
        return Chain([norm, *more], None, activation, slope, add if activation else None)
    return Chain([*nodes, *more], residual, activation, slope)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(add: fx.Node, norm: fx.Node) -> fx.Node | None:
    """The other operand of an addition to the normalization's result, if both have the same form."""
    if _name(add) != "add" or len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1 or "out" in add.kwargs:
        return None
    first, second = add.args
    other = second if first is norm else first
    a, b = value(norm), value(other)
    if other is norm or not isinstance(other, fx.Node) or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    if first is not norm and _writes(add):
        return None  # it changes the other tensor, which someone may still read
    return other if a.shape == b.shape and a.dtype == b.dtype and a.device == b.device else None


def _activation(node: fx.Node) -> tuple[str, float, list[fx.Node]]:
    """The activation that alone reads the node: its name, its slope, and its nodes."""
    user = _only_user(node)
    if user is not None and user.args[:1] == (node,):
        name, slope = _named(user)
        return name, slope, [user] if name else []
    return _written_out(node)


def _named(user: fx.Node) -> tuple[str, float]:
    name = _name(user)
    if name in _PLAIN and not {"out", "approximate"} & user.kwargs.keys():
        return name, 0.01
    if name == "leaky_relu":
        slope = user.args[1] if len(user.args) > 1 else user.kwargs.get("negative_slope", 0.01)
        return (name, float(slope)) if isinstance(slope, (int, float)) else ("", 0.01)
    if name == "hardtanh":
        low = user.args[1] if len(user.args) > 1 else user.kwargs.get("min_val", -1.0)
        high = user.args[2] if len(user.args) > 2 else user.kwargs.get("max_val", 1.0)
        return ("relu6", 0.01) if (low, high) == (0, 6) else ("", 0.01)
    if name == "threshold" and user.args[1:] == (0, 0):
        return "relu", 0.01
    # At its bounds clamp hands the gradient on and ReLU does not: the two are one only where no gradient is wanted.
    return (_clamped(user, name), 0.01) if name.startswith("clamp") and _without_gradient(user.graph) else ("", 0.01)


def _without_gradient(graph: fx.Graph) -> bool:
    """Whether what is compiled runs without gradients throughout; torch.compile compiles anew for the other mode."""
    return not torch.is_grad_enabled() and not any(n.target is torch._C._set_grad_enabled for n in graph.nodes)


def _clamped(user: fx.Node, name: str) -> str:
    """ "relu" for a clamp to [0, ∞), "relu6" for one to [0, 6]."""
    given = [*user.args[1:], None, None]
    low, high = user.kwargs.get("min", given[0]), user.kwargs.get("max", given[1])
    if name not in ("clamp", "clamp_min") or "out" in user.kwargs or low != 0:
        return ""
    return "relu" if high is None else "relu6" if high == 6 else ""


def _written_out(node: fx.Node) -> tuple[str, float, list[fx.Node]]:
    """x·sigmoid(x), and x·relu6(x + 3)/6 with the division before or after the product."""
    none: tuple[str, float, list[fx.Node]] = "", 0.01, []
    if len(node.users) != 2:
        return none
    product = next((u for u in node.users if _name(u) == "mul" and node in u.args), None)
    gate = next((u for u in node.users if u is not product), None)
    if product is None or gate is None or len(product.args) != 2:
        return none
    other = product.args[1] if product.args[0] is node else product.args[0]
    if not isinstance(other, fx.Node) or len(other.users) != 1:
        return none
    if _name(gate) == "sigmoid" and gate is other:
        return "silu", 0.01, [gate, product]
    inner = _path(gate, other)
    if inner and _is(inner[0], "add", 3) and _named(inner[1])[0] == "relu6":
        if len(inner) == 3 and _is(inner[2], "div", 6):
            return "hardswish", 0.01, [*inner, product]
        divide = _only_user(product)
        if len(inner) == 2 and divide is not None and _is(divide, "div", 6):
            return "hardswish", 0.01, [*inner, product, divide]
    return none


def _path(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """first → … → last through nodes that have one user each; empty if there is no such way of 2 or 3 nodes."""
    path = [first]
    while path[-1] is not last:
        following = _only_user(path[-1])
        if following is None or len(path) == 3:
            return []
        path.append(following)
    return path if len(path) > 1 else []


def _is(node: fx.Node, name: str, constant: float) -> bool:
    return _name(node) == name and node.args[1:] == (constant,) and not node.kwargs


def _writes(node: fx.Node) -> bool:
    """Whether the node may change its first argument."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    name = node_operator(node)
    if name == "setitem" or (name.endswith("_") and not name.endswith("__")):
        return True
    return bool(node.op == "call_function" and _inplace_argument(node))


def _inplace_argument(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]  # a function, by its op
    except (TypeError, ValueError):  # built-in: its in-place form has a name of its own
        return True in node.args[1:]
    return bool(bound.arguments.get("inplace", False))


def may_move(chain: Chain, graph: fx.Graph) -> bool:
    """Whether the normalization may run where the chain ends instead of where it stands.

    Not if something in between writes to its input or uses the statistics that it moves, and not if something after
    the addition writes to the residual, which the backward will need.
    """
    norm, last = chain.nodes[0], chain.nodes[-1]
    reads = arguments_of(norm)
    buffers = {n for n in (reads["running_mean"], reads["running_var"]) if isinstance(n, fx.Node)}
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(norm) + 1 : nodes.index(last)]:
        if node not in chain.nodes and (buffers.intersection(node.all_input_nodes) or _writes_to(node, reads["input"])):
            return False
    if chain.residual is None:
        return True
    after = nodes[nodes.index(chain.nodes[1]) + 1 :]
    return not any(_writes_to(node, chain.residual) for node in after if node not in chain.nodes)


def _writes_to(node: fx.Node, target: fx.Node) -> bool:
    if node.op == "output" or not _writes(node):
        return False
    written = [node.args[0] if node.args else None, node.kwargs.get("out"), node.kwargs.get("input")]
    storages = {_storage(n) for n in written if isinstance(n, fx.Node)}
    return None in storages or _storage(target) in storages


def _storage(node: fx.Node) -> int | None:
    tensor = value(node)
    return tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else None
