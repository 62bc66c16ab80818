"""Modules for the functions of a graph: what `torch.export` wrote as operators on parameters becomes layers again."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..inspect.operators import node_operator

__all__ = ["lift"]

_CONVS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: dict[str, Any] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_PRODUCTS = ("addmm", "mm")
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def lift(gm: fx.GraphModule) -> None:
    """Replace each convolution, linear map and evaluating batch normalization on the graph's own parameters by a
    module that stands where these parameters stood, so that names and sharing stay what they were."""
    lifted: dict[str, tuple[Any, ...]] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = _arguments(node)
        owner = _owner(arguments)
        if not owner or any(read.args[1] != 0 for read in _reads(node)):
            continue
        settings = (node.target, *[value for name, value in arguments.items() if name != "input"])
        if owner not in lifted:
            module = _module(gm, node, arguments)
            if module is None:
                continue
            gm.set_submodule(owner, module)
            lifted[owner] = settings
        if lifted[owner] == settings:  # else another operation on the same parameters: it stays, and is seen to share
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(owner, (arguments["input"],))
            new.meta = dict(node.meta) | {"val": _result(node)}
            for read in _reads(node):
                read.replace_all_uses_with(new)
                gm.graph.erase_node(read)
            if not isinstance(node.meta["val"], tuple | list):
                node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    for node in reversed(gm.graph.nodes):
        if (node.op == "get_attr" or node_operator(node) == "permute") and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def _result(node: fx.Node) -> Any:
    """What the node gives: of a decomposed normalization, which gives its statistics too, the normalized tensor."""
    value = node.meta.get("val")
    return value[0] if isinstance(value, tuple | list) else value


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes that read one of several results, where there are several and something reads them."""
    several = isinstance(node.meta.get("val"), tuple | list)
    reads = [user for user in node.users if user.target is operator.getitem] if several else []
    for unread in [read for read in reads if not read.users]:
        node.graph.erase_node(unread)
    return [read for read in reads if read in node.users]


def _arguments(node: fx.Node) -> dict[str, Any]:
    if node_operator(node) in _PRODUCTS:
        return _arguments_of_product(node)
    target: Any = node.target
    given = dict(zip([a.name for a in target._schema.arguments], node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    named = {name: _path(value) for name, value in (defaults | given).items() if name != "input"}
    return {"input": given.get("input"), **named}


def _arguments_of_product(node: fx.Node) -> dict[str, Any]:
    """A decomposed linear map multiplies by its weight turned over, and the bias comes first; {} for other products."""
    *bias, given, turned = node.args
    over = isinstance(turned, fx.Node) and node_operator(turned) == "permute" and turned.args[1] == [1, 0]
    if not over or node.kwargs:
        return {}
    weight = turned.args[0]  # type: ignore[union-attr]  # over says that it is a node
    return {"input": given, "weight": _path(weight), "bias": _path(bias[0]) if bias else None}


def _path(value: Any) -> Any:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else value


def _owner(arguments: dict[str, Any]) -> str:
    """The module whose parameters these are, by name; empty where they are not one module's own."""
    held = [arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    paths = [path for path in held if path is not None]
    if not paths or not all(isinstance(path, str) for path in paths):
        return ""
    owners = {path.rpartition(".")[0] for path in paths}
    names = {path.rpartition(".")[2] for path in paths}
    return owners.pop() if len(owners) == 1 and names <= {"weight", "bias", "running_mean", "running_var"} else ""


def _module(gm: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> nn.Module | None:
    """The module that does what the node does, with the very tensors; None for every other operator."""
    held = {name: _tensor(gm, a.get(name)) for name in ("weight", "bias", "running_mean", "running_var")}
    with torch.device("meta"):  # the tensors are put in below
        module = _empty(node, a, held)
    if module is None:
        return None
    for name, tensor in held.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        elif tensor is not None:
            module.register_buffer(name, tensor)
    module.train(False)
    return module


def _empty(node: fx.Node, a: dict[str, Any], held: dict[str, Any]) -> Any:
    weight, bias = held["weight"], held["bias"] is not None
    op = node_operator(node)
    evaluating = op == "_native_batch_norm_legit_no_training" or (op == "batch_norm" and not a["training"])
    if evaluating and held["running_mean"] is not None:
        kind = _NORMS.get(_result(node).dim())
        module = kind and kind(held["running_mean"].numel(), a["eps"], affine=False)
        if module is not None:
            module.num_batches_tracked = None
        return module
    if weight is None:
        return None
    if op in _PRODUCTS and bias and held["bias"].shape != weight.shape[:1]:
        return None
    if op == "linear" or op in _PRODUCTS:
        return nn.Linear(weight.shape[1], weight.shape[0], bias)
    kernel, groups = tuple(weight.shape[2:]), a.get("groups")
    if op == "convolution":
        op = f"conv{'_transpose' if a['transposed'] else ''}{len(kernel)}d"
    if op in _CONVS:
        form = (a["stride"], a["padding"], a["dilation"], groups, bias)
        return _CONVS[op](weight.shape[1] * groups, weight.shape[0], kernel, *map(_tuple, form))
    if op in _TRANSPOSED:
        opened = (a["stride"], a["padding"], a["output_padding"], groups, bias, a["dilation"])
        return _TRANSPOSED[op](weight.shape[0], weight.shape[1] * groups, kernel, *map(_tuple, opened))
    return None


def _tensor(gm: fx.GraphModule, path: str | None) -> Tensor | None:
    if path is None:
        return None
    holder, _, name = path.rpartition(".")
    tensor: Tensor = getattr(gm.get_submodule(holder), name)
    return tensor


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
