"""Every attribute and opset of BatchNormalization is done, or named as the reason to stay."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.inspect.from_onnx import readers_of
from batchnorm.inspect.operators import Effect
from batchnorm.model_tools import fold_onnx
from tests.onnx_nets import check, model_of, norm, save, tensor

node = helper.make_node


def reading(nodes, held, shape=(2, 4, 3, 3), outputs=("bn.out",), **options):
    """(reason to stay, (s, t)) of the one normalization; None where it need not stay."""
    (reader,) = readers_of(model_of(nodes, held, list(shape), list(outputs), **options), {})
    (call,) = reader.read().of_effect(Effect.NORM)
    return call.stays, None if call.stays else reader.scale_and_shift(reader.nodes_of[call])


OLD = [(1, {"consumed_inputs": [0, 0, 0, 1, 1]}), (6, {})]


@pytest.mark.parametrize(
    ("opset", "attributes", "reason"),
    [
        *[(opset, more | {"is_test": 1}, "") for opset, more in OLD],
        *[(opset, more | {"is_test": 1, "spatial": 1, "momentum": 0.1}, "") for opset, more in OLD],
        *[(opset, more, "in training mode") for opset, more in OLD],
        *[(opset, more | {"is_test": 0}, "in training mode") for opset, more in OLD],
        (7, {"spatial": 1}, ""), (8, {"epsilon": 0.5}, ""), (9, {"momentum": 0.0}, ""), (13, {}, ""),
        (14, {"training_mode": 0}, ""), (15, {}, ""), (22, {"training_mode": 1}, "in training mode"),
        (14, {"training_mode": 1}, "in training mode"),
    ],
)  # fmt: skip
def test_attributes_by_opset(opset, attributes, reason):
    first, weights = norm("bn", "x", 4, **attributes)
    stays, numbers = reading([first], weights, opset=opset)
    assert stays.startswith(reason)
    assert bool(stays) == bool(reason)
    if not reason:
        scale, shift, mean, var = (numpy_helper.to_array(t).astype(np.float64) for t in weights)
        s = scale / np.sqrt(var + np.float32(attributes.get("epsilon", 1e-5)))
        np.testing.assert_allclose(numbers[0], s, rtol=1e-14)
        np.testing.assert_allclose(numbers[1], shift - mean * s, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("opset", [7, 9])
def test_old_training_mode_is_said_by_more_outputs(opset):
    first, weights = norm("bn", "x", 4)
    first.output.extend(["m", "", "", ""])
    assert reading([first], weights, opset=opset)[0].startswith("in training mode")
    del first.output[1:]
    first.output.extend(["", "", ""])
    assert not reading([first], weights, opset=opset)[0]


def test_statistics_as_outputs_are_named():
    first, weights = norm("bn", "x", 4)
    first.output.extend(["m"])
    assert "statistics as outputs" in reading([first], weights, opset=15)[0]


@pytest.mark.parametrize(
    ("shape", "reason"), [((4, 3, 3), "spatial=0: its statistics differ by position"), ((4,), ""), ((4, 1, 1), "")]
)
def test_statistics_by_position(shape, reason):
    first, weights = norm("bn", "x", *shape, spatial=0)
    assert reading([first], weights, opset=7)[0] == reason


def changed(weights, number, array):
    weights[number] = numpy_helper.from_array(array, weights[number].name)
    return weights


@pytest.mark.parametrize(
    ("number", "array", "reason"),
    [
        (3, np.full(4, -1, np.float32), "scale or shift is not finite"),
        (2, np.array([1, np.nan, 0, 0], np.float32), "scale or shift is not finite"),
        (1, np.zeros(5, np.float32), "its parameters have the shapes (4,), (5,)"),
        (0, np.zeros((), np.float32), "its parameters have the shapes ()"),
        (0, np.zeros((2, 2), np.float32), "its parameters have the shapes (2, 2)"),
        (3, np.zeros(4, np.int64), "its var is of int64"),
    ],
)
def test_parameters_that_do_not_fit(number, array, reason):
    first, weights = norm("bn", "x", 4)
    assert reason in reading([first], changed(weights, number, array))[0]


def test_parameters_that_are_missing_or_computed():
    first, weights = norm("bn", "x", 4)
    del first.input[4]
    assert reading([first], weights)[0] == "it has 4 inputs instead of 5"
    first.input.append("v")
    made = node("Abs", ["bn.var"], ["v"], name="abs")
    assert reading([made, first], weights)[0].endswith("as its var, v is computed by the Abs abs")


def test_an_operator_of_that_name_from_elsewhere_is_none():
    first, weights = norm("bn", "x", 4)
    first.domain = "far.away"
    (reader,) = readers_of(model_of([first], weights, [2, 4], ["bn.out"]), {})
    assert not reader.read().of_effect(Effect.NORM)


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_mixed_types_of_opset_15(epsilon):
    first, weights = norm("bn", "x", 4, **({"epsilon": epsilon} if epsilon else {}))
    double = [numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float64), t.name) for t in weights[2:]]
    stays, (s, _) = reading([first], [*weights[:2], *double], opset=15)
    assert not stays
    scale, var = numpy_helper.to_array(weights[0]), numpy_helper.to_array(double[1])
    np.testing.assert_allclose(s, scale / np.sqrt(var + np.float32(epsilon or 1e-5)), rtol=1e-14)


@pytest.mark.parametrize(
    ("layer", "held", "shape", "reason"),
    [
        (node("Conv", ["x", "w"], ["c"], name="l"), tensor("w", 4, 4, 1), (2, 4, 3), ""),
        (node("MatMul", ["x", "w"], ["c"], name="l"), tensor("w", 2, 4, 4), (2, 4, 4), "weight of the shape (2, 4, 4)"),
        (node("MatMul", ["w", "x"], ["c"], name="l"), tensor("w", 4, 4), (4, 4), "does not read a layer's result"),
        (node("Gemm", ["x", "w"], ["c"], name="l", transA=1), tensor("w", 2, 4), (2, 5), ""),
    ],
)
def test_layers(tmp_path, layer, held, shape, reason):
    first, weights = norm("bn", "c", 4)
    path = save(tmp_path / "n.onnx", [layer, first], [*weights, held], list(shape), ["bn.out"])
    report = check(path, tmp_path, shape, {"bn": None if reason else "l"})
    assert not reason or reason in report.stayed[0].reason


def test_a_dropout_that_may_drop_is_in_the_way(tmp_path):
    first, weights = norm("bn", "d", 4)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), node("Dropout", ["c", "", "yes"], ["d"]), first]
    held = [*weights, tensor("w", 4, 4, 1), numpy_helper.from_array(np.array(True), "yes")]
    path = save(tmp_path / "n.onnx", nodes, held, [2, 4, 3], ["bn.out"])
    assert [entry.into for entry in fold_onnx(path, tmp_path / "folded.onnx").entries] == [None]


def test_a_real_cast_is_in_the_way(tmp_path):
    first, weights = norm("bn", "f", 4)
    nodes = [
        node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), node("Conv", ["h", "w"], ["c"], name="conv"),
        node("Cast", ["c"], ["f"], to=TensorProto.FLOAT), first,
    ]  # fmt: skip
    held = [*weights, tensor("w", 4, 4, 1, dtype=np.float16)]
    path = save(tmp_path / "n.onnx", nodes, held, [2, 4, 3], ["bn.out"])
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert "does not read a layer's result" in report.stayed[0].reason


def test_unknown_shapes_are_the_reason(tmp_path):
    """An operator that nobody knows ends what can be inferred."""
    first, weights = norm("bn", "f", 4)
    nodes = [
        node("Strange", ["x"], ["s"], domain="far.away"), node("MatMul", ["s", "w"], ["f"], name="fc"), first,
    ]  # fmt: skip
    model = model_of(nodes, [*weights, tensor("w", 4, 4)], [2, 4], ["bn.out"])
    model.opset_import.append(helper.make_opsetid("far.away", 1))
    onnx.save(model, str(tmp_path / "n.onnx"))
    report = fold_onnx(tmp_path / "n.onnx", tmp_path / "folded.onnx")
    assert "the shapes between fc and bn are not known" in report.stayed[0].reason
    assert not report.verified
