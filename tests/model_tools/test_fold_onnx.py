"""`fold_onnx`: a file in, a file out, the same outputs in onnxruntime; and exports of converted and folded models."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from batchnorm.errors import UserError
from batchnorm.model_tools import convert, fold, fold_onnx
from tests.onnx_nets import RNG, check, norm, save, tensor

from .test_fold import trained


def run(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})


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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_after(tmp_path, groups, dims, bias):
    node, weights = norm("bn", "x", 4)
    kernel, size = [3, 2, 1][:dims], [7, 6, 5][:dims]
    conv = helper.make_node(
        "Conv", ["bn.out", "w", "b"][: 2 + bias], ["y"], name="conv", group=groups, dilations=[2] * dims
    )
    weights += [tensor("w", 6, 4 // groups, *kernel), *([tensor("b", 6)] if bias else [])]
    path = save(tmp_path / "n.onnx", [node, conv], weights, [2, 4, *size], ["y"])
    assert "the layer after" in check(path, tmp_path, (2, 4, *size), {"bn": "conv"}).folded[0].reason


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [(3,), (2, 3), ()])
def test_a_gemm_after(tmp_path, transposed, bias):
    node, weights = norm("bn", "x", 5)
    gemm = helper.make_node("Gemm", ["bn.out", "w", "b"], ["y"], name="fc", transB=transposed, alpha=0.5, beta=2.0)
    weights += [tensor("w", *((3, 5) if transposed else (5, 3))), tensor("b", *bias)]
    check(save(tmp_path / "n.onnx", [node, gemm], weights, [2, 5], ["y"]), tmp_path, (2, 5), {"bn": "fc"})


def shiftless(name: str, channels: int) -> list[onnx.TensorProto]:
    zeros = np.zeros(channels, np.float32)
    parts = [numpy_helper.from_array(zeros, f"{name}.{part}") for part in ("shift", "mean")]
    return [tensor(f"{name}.scale", channels), tensor(f"{name}.var", channels, positive=True), *parts]


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("Conv", {"pads": [1, 0, 0, 0]}, "pads with zeros"),
        ("Conv", {"auto_pad": "SAME_UPPER"}, "pads with zeros"),
        ("ConvTranspose", {"group": 2}, "another share of the shift"),
    ],
)
@pytest.mark.parametrize("shift", [True, False])
def test_layers_after_that_take_a_scale_only(tmp_path, kind, attributes, reason, shift):
    node, weights = norm("bn", "x", 4)
    layer = helper.make_node(kind, ["bn.out", "w"], ["y"], name="layer", **attributes)
    weights = [*(weights if shift else shiftless("bn", 4)), tensor("w", 4, 4, 3, 3)]
    path = save(tmp_path / "n.onnx", [node, layer], weights, [2, 4, 6, 6], ["y"])
    report = check(path, tmp_path, (2, 4, 6, 6), {"bn": None if shift else "layer"})
    assert not shift or reason in report.stayed[0].reason


def test_chains_fold_in_both_directions_and_constants_are_weights(tmp_path):
    (one, a), (two, b), (three, c) = norm("one", "x", 4), norm("two", "one.out", 4), norm("three", "c", 5)
    nodes = [
        one, two, helper.make_node("Constant", [], ["w"], value=tensor("", 5, 4, 3, 3)),
        helper.make_node("Conv", ["two.out", "w"], ["c"], name="conv"), three,
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*a, *b, *c], [2, 4, 5, 5], ["three.out"])
    check(path, tmp_path, (2, 4, 5, 5), {"one": "conv", "two": "conv", "three": "conv"})


@pytest.mark.parametrize(
    ("outputs", "extra", "reason"),
    [
        (["y", "bn.out"], [], "also read elsewhere"),
        (["z"], [helper.make_node("Add", ["y", "bn.out"], ["z"])], "also read by z"),
    ],
)
def test_a_normalization_that_others_read_stays_before_its_layer(tmp_path, outputs, extra, reason):
    node, weights = norm("bn", "x", 4)
    nodes = [node, helper.make_node("Conv", ["bn.out", "w"], ["y"], name="conv"), *extra]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], outputs)
    assert reason in check(path, tmp_path, (2, 4, 3, 3), {"bn": None}).stayed[0].reason


def test_what_a_branch_reads_of_the_graph_around_it_stays(tmp_path):
    (outer, weights), (inner, more) = norm("outer", "c", 4), norm("inner", "c", 4)
    value = [helper.make_tensor_value_info("inner.out", TensorProto.FLOAT, None)]
    branch = helper.make_graph([inner], "branch", [], value)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), outer,
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["i"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["outer.out", "i"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, *more, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["y"])
    target = tmp_path / "folded.onnx"
    reasons = {entry.norm: entry.reason for entry in fold_onnx(path, target).stayed}
    assert "also read by if" in reasons["outer"]
    assert "does not read a layer's result" in reasons["inner"]
    x = RNG.standard_normal((2, 4, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(target, x)[0], run(path, x)[0])


@pytest.mark.parametrize(
    ("outputs", "extra", "reason"),
    [
        (["bn.out", "c"], [], "also read elsewhere"),
        (["y"], [helper.make_node("Add", ["bn.out", "c"], ["y"])], "also read by y"),
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
    with pytest.raises(UserError, match="cannot be written"):
        fold_onnx(path, tmp_path / "nowhere" / "out.onnx")


class Deployed(nn.Module):
    """Both orders, groups, a padding with the shift, activations in and beside a Sequential, a residual."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
        up = [nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4), nn.BatchNorm2d(8, affine=False), nn.Hardswish()]
        self.body = nn.Sequential(*first, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU6(), *up)
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.2), nn.Linear(6, 2))

    def forward(self, x):
        x = self.body(x)
        x = torch.relu_(self.norm(self.conv(x)).add_(x))
        return self.head(x.mean((2, 3)))


def folded_entirely(model):
    folded, report = fold(model, torch.randn(2, 3, 8, 8))
    assert not report.stayed, report
    return folded


@pytest.mark.parametrize("change", [convert, folded_entirely])
def test_exports_of_converted_and_folded_models_run_with_the_same_outputs(tmp_path, change):
    model, x = trained(Deployed()).float(), torch.randn(3, 3, 8, 8)
    other = torch.randn(5, 3, 8, 8)
    expected = [model(batch).detach() for batch in (x, other)]
    changed = change(model)
    program = torch.export.export(changed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batchnorm" in name for name in used)  # it runs where this package is not
    assert ("aten.batch_norm.default" in used) == (change is convert)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.onnx.export(program, (), str(tmp_path / "model.onnx"), input_names=["x"], dynamo=True, verbose=False)
    for batch, wanted in zip((x, other), expected, strict=True):
        torch.testing.assert_close(loaded(batch), wanted, rtol=1e-4, atol=1e-5)
        found = run(tmp_path / "model.onnx", batch.numpy())[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
