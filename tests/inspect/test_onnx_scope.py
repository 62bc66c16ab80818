"""Which values of an ONNX file are constants, and why others are not; folded with them, held against float64."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.inspect.onnx_scope import scopes_of
from batchnorm.model_tools import fold_onnx
from tests.onnx_nets import RNG, check, model_of, norm, save, tensor

node = helper.make_node


def renamed(held, name):
    copied = onnx.TensorProto()
    copied.CopyFrom(held)
    copied.name = name
    return copied


def sparse(name, dense):
    flat = dense.ravel()
    places = np.flatnonzero(flat)
    values = numpy_helper.from_array(flat[places], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places, f"{name}_at"), list(dense.shape))


def held_as(form, held):
    """Nodes, initializers and sparse initializers that make the same tensor."""
    array, name = numpy_helper.to_array(held), held.name
    turned = renamed(numpy_helper.from_array(np.ascontiguousarray(array.T)), f"{name}.t")
    back = list(range(array.ndim))[::-1]
    if form == "identity":
        return [node("Identity", [f"{name}.i"], [name])], [renamed(held, f"{name}.i")], []
    if form == "identities":
        ways = [node("Identity", [f"{name}.i"], [f"{name}.j"]), node("Identity", [f"{name}.j"], [name])]
        return ways, [renamed(held, f"{name}.i")], []
    if form == "constant":
        return [node("Constant", [], [name], value=held)], [], []
    if form == "floats" and array.ndim == 1:
        return [node("Constant", [], [name], value_floats=array.tolist())], [], []
    if form == "transpose":
        return [node("Transpose", [f"{name}.t"], [name], perm=back)], [turned], []
    if form == "cast":
        wide = renamed(numpy_helper.from_array(array.astype(np.float64)), f"{name}.d")
        return [node("Cast", [f"{name}.d"], [name], to=TensorProto.FLOAT)], [wide], []
    if form == "cast-like":
        wide = renamed(numpy_helper.from_array(array.astype(np.float64)), f"{name}.d")
        return [node("CastLike", [f"{name}.d", "x"], [name])], [wide], []
    if form == "sparse":
        return [], [], [sparse(name, array)]
    if form == "sparse-constant":
        return [node("Constant", [], [name], sparse_value=sparse(name, array))], [], []
    return [], [held], []


FORMS = ["identity", "identities", "constant", "floats", "transpose", "cast", "cast-like", "sparse-constant"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["before", "after"])
def test_constants_in_every_form(tmp_path, form, kind):
    first, weights = norm("bn", "c" if kind == "before" else "x", 4)
    made = [held_as(form, held) for held in (*weights, tensor("w", 4, 4, 3), tensor("b", 4))]
    conv = node("Conv", ["x" if kind == "before" else "bn.out", "w", "b"], ["c"], name="conv")
    nodes = [n for ways, _, _ in made for n in ways] + ([conv, first] if kind == "before" else [first, conv])
    initial = [held for _, dense, _ in made for held in dense]
    model = model_of(nodes, initial, [2, 4, 7], ["bn.out" if kind == "before" else "c"])
    onnx.save(model, str(tmp_path / "n.onnx"))
    if "sparse" in form or form in ("cast", "cast-like"):  # the float64 copy of the model has no such weights
        report = fold_onnx(tmp_path / "n.onnx", tmp_path / "folded.onnx")
        assert [entry.into for entry in report.entries] == ["conv"], str(report)
        assert report.verified
    else:
        check(tmp_path / "n.onnx", tmp_path, (2, 4, 7), {"bn": "conv"})
    folded = onnx.load(str(tmp_path / "folded.onnx")).graph
    assert [n.op_type for n in folded.node] == ["Conv"]  # what made the old weights went with them
    assert len(folded.initializer) == 2


def test_sparse_initializers():
    dense = np.where(RNG.random((3, 4)) > 0.5, RNG.standard_normal((3, 4)), 0).astype(np.float32)
    model = model_of([node("Relu", ["x"], ["y"])], [], [2], ["y"])
    model.graph.sparse_initializer.append(sparse("flat", dense))
    places = numpy_helper.from_array(np.argwhere(dense), "at")
    values = numpy_helper.from_array(dense[dense != 0], "pairs")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 4]))
    scope = scopes_of(model)[0]
    for name in ("flat", "pairs"):
        np.testing.assert_array_equal(scope.constant(name).array, dense)


def test_initializers_read_by_several_nodes_and_branches_stay(tmp_path):
    """The weight and the statistics are read again, and inside a branch."""
    first, weights = norm("bn", "c", 4)
    made = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    branch = helper.make_graph([node("Conv", ["x", "w"], ["b"], name="inner")], "branch", [], made)
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv"), first, node("Reshape", ["bn.mean", "column"], ["m"]),
        node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        node("If", ["yes"], ["i"], name="if", then_branch=branch, else_branch=branch),
        node("Add", ["bn.out", "i"], ["s"]), node("Add", ["s", "m"], ["y"]),
    ]  # fmt: skip
    held = [*weights, tensor("w", 4, 4, 1), numpy_helper.from_array(np.array([4, 1]), "column")]
    path = save(tmp_path / "n.onnx", nodes, held, [2, 4, 3], ["y"])
    check(path, tmp_path, (2, 4, 3), {"bn": "conv"})
    names = {t.name for t in onnx.load(str(tmp_path / "folded.onnx")).graph.initializer}
    assert {"w", "bn.mean", "column"} < names
    assert len(names) == 5


def quantized(name):
    zero = numpy_helper.from_array(np.int8(0), f"{name}.zero")
    held = numpy_helper.from_array(RNG.integers(-9, 9, (4, 4, 3)).astype(np.int8), f"{name}.q")
    scale = numpy_helper.from_array(np.float32(0.1), f"{name}.scale")
    return [node("DequantizeLinear", [f"{name}.q", scale.name, zero.name], [name], name="dq")], [held, scale, zero]


def test_quantized_weights_stay_with_the_reason(tmp_path):
    first, weights = norm("bn", "c", 4)
    nodes, held = quantized("w")
    path = save(
        tmp_path / "n.onnx", [*nodes, node("Conv", ["x", "w"], ["c"], name="conv"), first], [*weights, *held],
        [2, 4, 7], ["bn.out"],
    )  # fmt: skip
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert "conv computes its weight: w is quantized (dq), fold before quantizing" in report.stayed[0].reason


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node("Relu", ["w.r"], ["w"], name="act"), "w is computed by the Relu act"),
        (node("Identity", ["x"], ["w"]), "x is an input of the graph"),
        (node("Reshape", ["w.r", "bad"], ["w"], name="r"), "r cannot be computed"),
        (node("Add", ["w.r", "x"], ["w"]), "x is an input of the graph"),
    ],
)
def test_what_is_no_constant_says_why(made, reason):
    held = [tensor("w.r", 4, 4, 1), numpy_helper.from_array(np.array([7, 7]), "bad")]
    model = model_of([made, node("Conv", ["x", "w"], ["c"], name="conv")], held, [2, 4, 3], ["c"])
    constant = scopes_of(model)[0].constant("w")
    assert constant.array is None
    assert reason in constant.reason
    assert "\n" not in constant.reason


def test_a_broken_tensor_is_a_reason():
    broken = tensor("w", 4, 4, 1)
    broken.raw_data = broken.raw_data[:5]
    scope = scopes_of(model_of([node("Conv", ["x", "w"], ["c"])], [broken], [2, 4, 3], ["c"]))[0]
    assert "w cannot be read" in scope.constant("w").reason
