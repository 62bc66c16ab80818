"""The shapes and types of an ONNX file's values, by onnx's own inference, for inputs of given shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from .onnx_scope import OnnxScope, attribute_of, is_standard, scopes_of

__all__ = ["Inferred", "infer"]

_SMALL = 1024  # elements: shapes and axes, which the inference reads, are smaller, and weights are larger
_TAKE_A_SHAPE = ("ConstantOfShape", "Expand", "Reshape")


class Inferred(NamedTuple):
    """What is known of one graph's values: shapes where all of it is known, and ONNX's numbers of the types."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]


def infer(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> list[Inferred]:
    """What is known of each graph of the model, in the order of `scopes_of`.

    onnx does not follow every computation of a shape, and before opset 13 hardly any. Where an input's shape is known,
    its `Shape` node is a constant, and so may be what a `Reshape` takes; then onnx infers again.

    Args:
        model: an ONNX model; it is left as it is.
        inputs: shapes by the names of inputs; an axis without a fixed size is 2 in the others.
    """
    from onnx import shape_inference

    outline = type(model)()
    outline.CopyFrom(model)
    for tensor in outline.graph.initializer:
        if prod(tensor.dims) > _SMALL:  # the inference takes at most 2 GB
            tensor.ClearField("raw_data")
    for value in outline.graph.input:
        _fix(value, inputs.get(value.name))
    while True:
        try:
            outline = shape_inference.infer_shapes(outline, data_prop=True)
        except Exception:  # an operator that it does not know, or types that contradict: nothing more is known
            return [Inferred({}, {}) for _ in scopes_of(model)]
        scopes = scopes_of(outline)
        found = [_read(scope) for scope in scopes]
        if not [scope for scope, known in zip(scopes, found, strict=True) if _settle(scope, known)]:
            return found


def _fix(value: Any, shape: tuple[int, ...] | None) -> None:
    dims = value.type.tensor_type.shape.dim
    for number, dim in enumerate(dims):
        if shape is not None and len(shape) == len(dims):
            dim.dim_value = shape[number]
        elif not dim.dim_value:
            dim.dim_value = 2


def _read(scope: OnnxScope) -> Inferred:
    found = Inferred({}, {})
    if not scope.is_graph:
        return found
    for value in (*scope.body.input, *scope.body.value_info, *scope.body.output):
        if not value.type.HasField("tensor_type"):
            continue
        kind = value.type.tensor_type
        found.types[value.name] = kind.elem_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found.shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found


def _settle(scope: OnnxScope, known: Inferred) -> bool:
    """Make constants of the shapes that are known; return whether any was new."""
    import numpy as np
    from onnx import helper, numpy_helper

    settled = False
    for node in scope.body.node:
        shape = known.shapes.get(node.input[0]) if is_standard(node, "Shape") else None
        if shape is not None and not any(attribute.ref_attr_name for attribute in node.attribute):
            part = slice(attribute_of(node, "start", 0), attribute_of(node, "end", None))
            tensor = numpy_helper.from_array(np.array(shape[part], np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=tensor))
            settled = True
    for node in [node for node in scope.body.node if is_standard(node, *_TAKE_A_SHAPE) and scope.is_graph]:
        slot = len(node.input) - 1
        if node.output[0] in known.shapes or slot < 0 or node.input[slot] in scope.initializers():
            continue
        array = scope.constant(node.input[slot]).array
        if array is not None:
            name = f"{node.output[0]}.its_shape"
            scope.body.initializer.append(numpy_helper.from_array(array, name))
            node.input[slot] = name
            settled = True
    return settled
