"""What is compared, and what the report says where nothing could be."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.errors import UserError
from batchnorm.model_tools import fold_onnx
from tests.onnx_nets import check, model_of, norm, save, tensor

node = helper.make_node


def pair(tmp_path, *more, outputs=("bn.out",), shape=(2, 4, 3, 3), held=(), **options):
    first, weights = norm("bn", "c", 4)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), first, *more]
    return save(
        tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 3, 3), *held], list(shape), list(outputs), **options
    )


def not_verified(report, reason):
    assert not report.verified
    assert np.isnan(report.difference)
    assert reason in report.not_verified
    assert "not verified" in str(report).splitlines()[0]
    assert "0.0e+00" not in str(report)
    assert [entry.into for entry in report.entries] == ["conv"]


def test_an_operator_that_no_evaluator_has(tmp_path):
    path = pair(tmp_path, node("Strange", ["bn.out"], ["y"], domain="far.away"), outputs=["y"], rank=4)
    model = onnx.load(str(path))
    model.opset_import.append(helper.make_opsetid("far.away", 1))
    onnx.save(model, str(path))
    not_verified(fold_onnx(path, tmp_path / "folded.onnx"), "no evaluator takes the model")


def test_outputs_without_floating_numbers(tmp_path):
    path = pair(tmp_path, node("ArgMax", ["bn.out"], ["y"], axis=1), outputs=["y"])
    model = onnx.load(str(path))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(model, str(path))
    not_verified(fold_onnx(path, tmp_path / "folded.onnx"), "no output of floating numbers")


def test_an_input_that_cannot_be_drawn(tmp_path):
    path = pair(tmp_path)
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, str(path))
    not_verified(fold_onnx(path, tmp_path / "folded.onnx"), "no tensor of a given number of axes")
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)
    assert fold_onnx(path, tmp_path / "folded.onnx", x).verified


def test_no_size_fits(tmp_path):
    path = pair(tmp_path, node("Add", ["bn.out", "k"], ["y"]), outputs=["y"], shape=("n", 4, "h", "w"),
                held=[tensor("k", 5, 4, 17, 19)])  # fmt: skip
    not_verified(fold_onnx(path, tmp_path / "folded.onnx"), "does not run on random inputs")
    with pytest.raises(UserError, match="give example_inputs that fit"):
        fold_onnx(path, tmp_path / "folded.onnx", np.zeros((2, 4, 3, 3), np.float32))
    assert fold_onnx(path, tmp_path / "folded.onnx", np.ones((1, 4, 19, 21), np.float32)).verified


@pytest.mark.parametrize("shape", [("n", 4, "h", "w"), ("n", 4, "s", "s"), (None, 4, None, None)])
def test_sizes_are_tried_where_axes_have_none(tmp_path, shape):
    """A 3×3 kernel and a pooling of 16 need more than the first sizes."""
    more = node("MaxPool", ["bn.out"], ["y"], kernel_shape=[16, 16], name="pool")
    path = pair(tmp_path, more, outputs=["y"], shape=shape)
    assert check(path, tmp_path, (2, 4, 20, 20), {"bn": "conv"}).compared > 100


def test_integers_and_booleans_are_drawn(tmp_path):
    path = pair(tmp_path, node("Gather", ["bn.out", "i"], ["y"], axis=0))
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["k"]))
    onnx.save(model, str(path))
    assert fold_onnx(path, tmp_path / "folded.onnx").verified


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_without_one_of_the_packages(tmp_path, monkeypatch, missing):
    path = pair(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "onnx":
        with pytest.raises(UserError, match="pip install onnx"):
            fold_onnx(path, tmp_path / "folded.onnx")
    else:
        assert fold_onnx(path, tmp_path / "folded.onnx").verified  # onnx's own evaluator


def test_the_coarsest_type_gives_the_tolerance(tmp_path):
    """As converters to half precision leave it: float32 outside, float16 inside."""
    first, weights = norm("bn", "c", 8, dtype=np.float16)
    nodes = [
        node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16), node("Conv", ["h", "w"], ["c"], name="conv"), first,
        node("Cast", ["bn.out"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 8, 8, 3, dtype=np.float16)], [2, 8, 9], ["y"])
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert [entry.into for entry in report.entries] == ["conv"]
    assert 1e-5 < report.difference < 1e-2


def test_defaults_of_inputs_stay_and_are_used(tmp_path):
    """An initializer that is an input is no input that has to be given."""
    first, weights = norm("bn", "c", 4)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), first, node("Mul", ["bn.out", "gain"], ["y"])]
    held = [*weights, tensor("w", 4, 4, 1, 1), numpy_helper.from_array(np.float32(3), "gain")]
    model = model_of(nodes, held, [2, 4, 3, 3], ["y"])
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
    onnx.save(model, str(tmp_path / "n.onnx"))
    check(tmp_path / "n.onnx", tmp_path, (2, 4, 3, 3), {"bn": "conv"})
    assert [value.name for value in onnx.load(str(tmp_path / "folded.onnx")).graph.input] == ["x", "gain"]
