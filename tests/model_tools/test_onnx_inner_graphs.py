"""Branches, loops and local functions fold as graphs of their own."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.model_tools import fold_onnx
from tests.onnx_nets import RNG, model_of, norm, run, save, tensor

node = helper.make_node


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


@pytest.mark.parametrize("ir", [3, 10])
def test_branches_fold_with_the_weights_of_the_graph_around_them(tmp_path, ir):
    """Both branches use the same names, which are not the same values."""
    first, weights = norm("bn", "c", 4)
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 3, 3])]

    def branch(name, activation):
        nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), first, node(activation, ["bn.out"], ["y"])]
        return helper.make_graph(nodes, name, [], made)

    yes = node("Cast", ["sum"], ["yes"], to=TensorProto.BOOL)
    total = node("ReduceMax", ["sign"], ["sum"], keepdims=0)
    ways = node("If", ["yes"], ["out"], name="if", then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg"))
    nodes = [node("Relu", ["x"], ["sign"]), total, yes, ways]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["out"], opset=11, ir=ir)
    onnx.checker.check_model(str(path), full_check=True)
    target = tmp_path / "folded.onnx"
    report = fold_onnx(path, target)
    assert [(entry.norm, entry.into) for entry in report.entries] == [("bn", "conv"), ("bn", "conv")]
    onnx.checker.check_model(str(target), full_check=True)
    assert len(onnx.load(str(target)).graph.initializer) == 4
    for x in (RNG.standard_normal((2, 4, 3, 3)), -np.ones((2, 4, 3, 3))):
        x = x.astype(np.float32)
        np.testing.assert_allclose(run(target, x=x)[0], run(path, x=x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_functions_fold_where_their_weights_are_inside(tmp_path, inside):
    first, weights = norm("bn", "c", 4)
    held = [*weights, tensor("w", 4, 4, 1, 1)]
    constants = [node("Constant", [], [t.name], value=t) for t in held]
    body = [node("Conv", ["a", "w"], ["c"], name="conv"), first]
    names = [] if inside else [t.name for t in held]
    function = helper.make_function(
        "local", "block", ["a", *names], ["bn.out"], [*(constants if inside else []), *body],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    call = node("block", ["x", *names], ["y"], domain="local", name="call")
    model = model_of([call], [] if inside else held, [2, 4, 3, 3], ["y"], functions=[function])
    model.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(model, str(tmp_path / "n.onnx"))
    report = fold_onnx(tmp_path / "n.onnx", tmp_path / "folded.onnx")
    assert [entry.into for entry in report.entries] == ["conv" if inside else None]
    assert inside or "bn.scale is an input of the function block" in report.stayed[0].reason
    onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)
    x = RNG.standard_normal((2, 4, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(
        run(tmp_path / "folded.onnx", x=x)[0], run(tmp_path / "n.onnx", x=x)[0], rtol=1e-4, atol=1e-4
    )


def test_a_loops_body_folds_with_the_weights_around_it(tmp_path):
    first, weights = norm("bn", "c", 4)
    shape, flag = [2, 4, 3, 3], TensorProto.BOOL
    body = helper.make_graph(
        [
            node("Identity", ["on"], ["on.out"]), node("Conv", ["h", "w"], ["c"], name="conv"), first,
            node("Tanh", ["bn.out"], ["h.out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("on", flag, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("on.out", flag, []),
            helper.make_tensor_value_info("h.out", TensorProto.FLOAT, shape),
        ],
    )  # fmt: skip
    held = [*weights, tensor("w", 4, 4, 1, 1), constant("n", np.int64(3)), constant("yes", np.array(True))]
    loop = node("Loop", ["n", "yes", "x"], ["y"], name="loop", body=body)
    path, target = save(tmp_path / "n.onnx", [loop], held, shape, ["y"]), tmp_path / "folded.onnx"
    assert [entry.into for entry in fold_onnx(path, target).entries] == ["conv"]
    onnx.checker.check_model(str(target), full_check=True)
    x = RNG.standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(run(target, x=x)[0], run(path, x=x)[0], rtol=1e-4, atol=1e-5)
