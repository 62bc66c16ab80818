"""Shapes where onnx alone infers none: below opset 13 it follows no computation of a shape."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from batchnorm.inspect.onnx_shapes import infer
from tests.onnx_nets import model_of, tensor

node = helper.make_node


def viewed(opset):
    """x.view(x.size(0), -1) twice, as the exporter writes it."""
    nodes = []
    for number, source in enumerate(["x", "f0"]):
        nodes += [
            node("Shape", [source], [f"s{number}"]), node("Gather", [f"s{number}", "zero"], [f"n{number}"], axis=0),
            node("Concat", [f"n{number}", f"rest{number}"], [f"to{number}"], axis=0),
            node("Reshape", [source, f"to{number}"], [f"f{number}"]),
        ]  # fmt: skip
    nodes.append(node("MatMul", ["f1", "w"], ["y"]))
    held = [("zero", [0]), ("rest0", [-1]), ("rest1", [2, -1])]
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in held]
    return model_of(nodes, [*constants, tensor("w", 6, 5000)], ["n", 4, 3], ["y"], opset=opset)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("batch", [None, 7])
def test_computed_shapes(opset, batch):
    model = viewed(opset)
    before = model.SerializeToString()
    (known,) = infer(model, {"x": (batch, 4, 3)} if batch else {})
    n = batch or 2
    assert known.shapes["f0"] == (n, 12)
    assert known.shapes["f1"] == (n, 2, 6)
    assert known.shapes["y"] == (n, 2, 5000)
    assert known.types["y"] == onnx.TensorProto.FLOAT
    assert model.SerializeToString() == before


def test_a_part_of_a_shape():
    nodes = [
        node("Shape", ["x"], ["s"], start=1, end=3), node("Concat", ["minus", "s"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, [numpy_helper.from_array(np.array([-1]), "minus")], ["n", 4, 3, 1], ["y"], rank=3)
    assert infer(model, {})[0].shapes["y"] == (2, 4, 3)


def test_where_nothing_can_be_inferred_nothing_is_known():
    model = model_of([node("Conv", ["x", "w"], ["y"])], [tensor("w", 4, 4)], [2, 4, 3], ["y"])
    assert "y" not in infer(model, {})[0].shapes
