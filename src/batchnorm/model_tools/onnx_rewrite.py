"""The change of an ONNX graph that a fold is: new weights, one node fewer, and the names that follow from it."""

from __future__ import annotations

from typing import Any

from ..inspect.onnx_layers import FIRST_WITH_BROADCAST, OnnxLayer
from ..inspect.onnx_scope import CONSTANT_OPS, OnnxScope, attribute_of, is_standard, scopes_of

__all__ = ["Leftovers", "fold_after", "fold_before", "pass_by"]


def fold_before(layer: OnnxLayer, norm: Any, s: Any, t: Any) -> None:
    """Make the layer compute s·layer(x) + t, per channel of its result, and take the normalization out.

    What gives the layer's result on to the normalization stays; the last value on that way gets the name of the
    normalization's result.
    """
    weight, bias = _parts(layer)
    ones = [1] * (weight.ndim - 2)
    _set(layer, weight * s.reshape(*weight.shape[:2], *ones), bias.reshape(-1) * s + t)
    nodes = layer.scope.body.node
    read, result = norm.input[0], norm.output[0]
    _keep(nodes, lambda node: node is not norm)
    for node in nodes:
        _rename(node.output, read, result)
        _rename(node.input, read, result)  # what is left reads the shape alone


def fold_after(layer: OnnxLayer, s: Any, t: Any) -> None:
    """Make the layer compute layer(s·x + t), per channel of its input."""
    weight, bias = _parts(layer)
    form = (weight.shape[0], 1, weight.shape[2], *[1] * (weight.ndim - 3))
    moved = (weight * t.reshape(form)).reshape(weight.shape[0] * weight.shape[1], -1).sum(1)
    _set(layer, weight * s.reshape(form), bias + moved)


def pass_by(norm: Any, scope: OnnxScope) -> None:
    """Take out a normalization that the layers after it have taken in."""
    nodes = scope.body.node
    _keep(nodes, lambda node: node is not norm)
    for node in nodes:
        _rename(node.input, norm.output[0], norm.input[0])


def _rename(names: Any, old: str, new: str) -> None:
    for number, name in enumerate(names):
        if name == old:
            names[number] = new


def _parts(layer: OnnxLayer) -> tuple[Any, Any]:
    """The weight as (groups, out/groups, in/groups, *kernel) and all of the bias, with a Gemm's alpha and beta in them.

    Both in float64.
    """
    import numpy as np

    weight = layer.weight.array.astype("float64")
    bias = np.zeros(1) if layer.bias is None else layer.bias.array.astype("float64")
    if layer.kind in ("Gemm", "MatMul"):
        weight = (weight if attribute_of(layer.node, "transB", 0) else weight.T)[None]
        weight, bias = weight * attribute_of(layer.node, "alpha", 1.0), bias * attribute_of(layer.node, "beta", 1.0)
    else:
        weight = weight.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        weight = weight.swapaxes(1, 2) if layer.kind == "ConvTranspose" else weight
    return weight, sum(layer.added, bias)


def _set(layer: OnnxLayer, weight: Any, bias: Any) -> None:
    node, data_type = layer.node, layer.weight.data_type
    had_bias = layer.bias is not None or layer.adds
    if layer.kind in ("Gemm", "MatMul"):
        weight = weight[0] if attribute_of(node, "transB", 0) else weight[0].T
        for attribute in [a for a in node.attribute if a.name in ("alpha", "beta")]:
            node.attribute.remove(attribute)  # they are in the values now
    else:
        weight = weight.swapaxes(1, 2) if layer.kind == "ConvTranspose" else weight
        weight = weight.reshape(-1, *weight.shape[2:])
    result = layer.result
    names = [layer.scope.add_constant(f"{result}.folded_weight", weight, data_type)]
    if had_bias or bias.any():
        names.append(layer.scope.add_constant(f"{result}.folded_bias", bias, data_type))
    _keep(layer.scope.body.node, lambda other: not any(other is addition for addition in layer.adds))
    node.output[0] = result
    del node.input[1:]
    node.input.extend(names[:1] if layer.kind == "MatMul" else names)
    if layer.kind == "MatMul" and len(names) > 1:
        _add_behind(layer, names[1])
    elif layer.kind == "Gemm" and layer.scope.opset < FIRST_WITH_BROADCAST:
        _broadcast(node)
    layer.adds, layer.added = [], []


def _add_behind(layer: OnnxLayer, bias: str) -> None:
    """A MatMul has no bias, so an Add node gets it, and the name of the result."""
    from onnx import helper

    result = layer.node.output[0]
    scopes = list(layer.scope.root.tree())
    product = _free(f"{result}.product", {name for scope in scopes for name in scope.names()})
    # a layer gets a second one where it takes a normalization from either side
    title = _free(f"{layer.title}.bias", {node.name for scope in scopes for node in scope.body.node})
    layer.node.output[0] = product
    add = helper.make_node("Add", [product, bias], [result], name=title)
    if layer.scope.opset < FIRST_WITH_BROADCAST:
        _broadcast(add)
    nodes = layer.scope.body.node
    nodes.insert(next(i for i, node in enumerate(nodes) if node is layer.node) + 1, add)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _broadcast(node: Any) -> None:
    from onnx import helper

    for attribute in [a for a in node.attribute if a.name == "broadcast"]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute("broadcast", 1))


class Leftovers:
    """What a fold leaves that nobody reads: initializers, the nodes that make constants, notes on values."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.unread = self._unread()  # before any fold: not ours to take out

    def remove(self) -> None:
        while found := self._unread() - self.unread:
            for number, scope in enumerate(scopes_of(self.model)):
                self._remove_from(scope, {name for n, name in found if n == number})
        for scope in scopes_of(self.model):
            _drop_notes(scope)

    def _unread(self) -> set[tuple[int, str]]:
        found = set()
        for number, scope in enumerate(scopes_of(self.model)):
            read = {name for name, reads in scope.readers().items() if reads} | scope.outputs
            made = [node.output[0] for node in scope.body.node if is_standard(node, *CONSTANT_OPS)]
            ours = {name for name in (*scope.initializers(), *made) if not scope.overridable(name)}
            found |= {(number, name) for name in ours - read}
        return found

    def _remove_from(self, scope: OnnxScope, names: set[str]) -> None:
        _keep(scope.body.node, lambda node: not names.intersection(node.output))
        if scope.is_graph:
            _keep(scope.body.initializer, lambda tensor: tensor.name not in names)
            _keep(scope.body.sparse_initializer, lambda tensor: tensor.values.name not in names)
            _keep(scope.body.input, lambda value: value.name not in names)


def _drop_notes(scope: OnnxScope) -> None:
    known = scope.names()
    if hasattr(scope.body, "value_info"):
        _keep(scope.body.value_info, lambda value: value.name in known)
    if hasattr(scope.body, "quantization_annotation"):
        _keep(scope.body.quantization_annotation, lambda note: note.tensor_name in known)


def _keep(items: Any, wanted: Any) -> None:
    for number in [number for number, item in enumerate(items) if not wanted(item)][::-1]:
        del items[number]  # `remove` compares contents
