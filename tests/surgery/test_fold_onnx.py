"""`fold_onnx`: a file in, a file out, the same outputs in onnxruntime; and exports of converted and folded models."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from batchnorm.errors import UserError
from batchnorm.surgery import convert, fold, fold_onnx

from .nets import PreActivation
from .test_fold import trained

RNG = np.random.default_rng(0)


def tensor(name: str, *shape: int, positive: bool = False) -> onnx.TensorProto:
    values = RNG.standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(np.abs(values) + 0.5 if positive else values, name)


def norm(name: str, source: str, channels: int, **attributes) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    names = [f"{name}.{part}" for part in ("scale", "shift", "mean", "var")]
    node = helper.make_node("BatchNormalization", [source, *names], [f"{name}.out"], name=name, **attributes)
    return node, [tensor(n, channels, positive=n.endswith("var")) for n in names]


def save(path, nodes, initializers, shape, outputs):
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs],
        initializers,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    return path


def run(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def check(path, tmp_path, shape, expected: dict[str, str | None]):
    target = tmp_path / "folded.onnx"
    report = fold_onnx(path, target)
    assert {entry.norm: entry.into for entry in report.entries} == expected
    x = RNG.standard_normal(shape).astype(np.float32)
    for ours, theirs in zip(run(target, x), run(path, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    kept = [node.name for node in onnx.load(str(target)).graph.node if node.op_type == "BatchNormalization"]
    assert kept == [name for name, into in expected.items() if into is None]
    return report


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_both_ways(tmp_path, groups, bias):
    first, weights = norm("first", "c", 8, epsilon=1e-2)
    second, more = norm("second", "t", 4)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"][: 2 + bias], ["c"], name="conv", group=groups), first,
        helper.make_node("ConvTranspose", ["first.out", "w2", "b2"][: 2 + bias], ["t"], name="up", group=groups),
        second,
    ]  # fmt: skip
    extra = [tensor("b", 8), tensor("b2", 4)] if bias else []
    weights += [tensor("w", 8, 4 // groups, 3, 3), tensor("w2", 8, 4 // groups, 3, 3), *more, *extra]
    path = save(tmp_path / "net.onnx", nodes, weights, [2, 4, 7, 7], ["second.out"])
    check(path, tmp_path, (2, 4, 7, 7), {"first": "conv", "second": "up"})


def test_a_gemm_whose_bias_differs_along_the_batch_stays(tmp_path):
    node, weights = norm("bn", "g", 3)
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["g"], name="fc")
    path = save(tmp_path / "n.onnx", [gemm, node], [*weights, tensor("w", 5, 3), tensor("b", 2, 3)], [2, 5], ["bn.out"])
    assert "along the batch" in check(path, tmp_path, (2, 5), {"bn": None}).stayed[0].reason


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(tmp_path, transposed):
    node, weights = norm("bn", "g", 3)
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["g"], name="fc", transB=transposed, alpha=0.5, beta=2.0)
    weights += [tensor("w", *((3, 5) if transposed else (5, 3))), tensor("b", 1, 3)]
    check(save(tmp_path / "n.onnx", [gemm, node], weights, [2, 5], ["bn.out"]), tmp_path, (2, 5), {"bn": "fc"})


def test_shared_initializers_stay_what_they_were_for_the_others(tmp_path):
    node, weights = norm("bn", "c", 4)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), node,
        helper.make_node("Conv", ["x", "w"], ["d"], name="other"),
        helper.make_node("Add", ["bn.out", "d"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["y"])
    check(path, tmp_path, (2, 4, 3, 3), {"bn": "conv"})


@pytest.mark.parametrize(
    ("outputs", "extra", "reason"),
    [
        (["bn.out", "c"], [], "also read elsewhere"),
        (["y"], [helper.make_node("Add", ["bn.out", "c"], ["y"])], "also read elsewhere"),
    ],
)
def test_results_that_others_read_stay(tmp_path, outputs, extra, reason):
    node, weights = norm("bn", "c", 4)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), node, *extra]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], outputs)
    assert reason in check(path, tmp_path, (2, 4, 3, 3), {"bn": None}).stayed[0].reason


def test_training_mode_stays(tmp_path):
    node, weights = norm("bn", "c", 4, training_mode=1)
    node.output.extend(["m", "v"])
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), node]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["bn.out"])
    assert "training mode" in check(path, tmp_path, (2, 4, 3, 3), {"bn": None}).stayed[0].reason


def test_bad_files_and_inputs_are_one_sentence_and_write_nothing(tmp_path):
    junk, target = tmp_path / "junk.onnx", tmp_path / "out.onnx"
    junk.write_bytes(b"no model")
    with pytest.raises(UserError, match="is no ONNX model"):
        fold_onnx(junk, target)
    with pytest.raises(UserError, match="does not exist"):
        fold_onnx(tmp_path / "missing.onnx", target)
    node, weights = norm("bn", "x", 4)
    path = save(tmp_path / "n.onnx", [node], weights, [2, 4], ["bn.out"])
    for inputs in ((np.zeros((2, 5), np.float32),), {"z": np.zeros((2, 4), np.float32)}, (1, 2)):
        with pytest.raises(UserError, match="fold_onnx"):
            fold_onnx(path, target, inputs)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "change", [convert, lambda m: fold(m, torch.randn(2, 3, 8, 8)).model], ids=["converted", "folded"]
)
def test_exports_of_converted_and_folded_models_run_with_the_same_outputs(tmp_path, change):
    model, x = trained(PreActivation()).float(), torch.randn(2, 3, 8, 8)
    expected = model(x).detach()
    changed, path = change(model), tmp_path / "model.onnx"
    program = torch.export.export(changed, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    torch.onnx.export(changed, (x,), str(path), input_names=["x"], dynamo=True, verbose=False)
    np.testing.assert_allclose(run(path, x.numpy())[0], expected.numpy(), rtol=1e-4, atol=1e-5)
