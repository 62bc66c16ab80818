"""Exported programs and ONNX files."""

import sys
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import diagnose
from batchnorm.errors import UserError


def net(kind=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))


def program(model, **options):
    return torch.export.export(model, (torch.randn(4, 3, 8, 8),), **options)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_in_training_mode(kind, decomposed):
    exported = program(net(kind).train())
    if decomposed:
        exported = exported.run_decompositions()
    diagnosis = diagnose(exported)
    assert [(f.code, f.severity, f.module) for f in diagnosis.findings] == [("BN401", "error", "1")]
    assert "BN202" in diagnosis.not_examined


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_in_evaluation(decomposed):
    exported = program(net().eval())
    if decomposed:
        exported = exported.run_decompositions()
    assert [(f.code, f.severity) for f in diagnose(exported).findings] == [("BN402", "info")]


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_instance_normalization_is_none(decomposed):
    exported = program(net(nn.InstanceNorm2d).eval())
    if decomposed:
        exported = exported.run_decompositions()
    assert diagnose(exported).findings == ()


def test_no_statistics_are_batch_statistics():
    model = net()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    assert diagnose(program(model.eval())).codes == {"BN401"}


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_keeps_no_statistics_is_told_so(decomposed):
    model = net()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    exported = program(model.eval())
    (finding,) = diagnose(exported.run_decompositions() if decomposed else exported).findings
    assert "keeps no running statistics" in finding.message
    assert "track_running_stats" in finding.fix
    (finding,) = diagnose(program(net().train())).findings
    assert "keeps no" not in finding.message
    assert "model.eval()" in finding.fix


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_keeps_no_statistics_in_an_onnx_file(tmp_path, dynamo):
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="an extra: pip install 'batchnorm[onnx]'")
    model = net()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters warn of torch's own deprecations
        path = tmp_path / "model.onnx"
        torch.onnx.export(model.eval(), (torch.randn(4, 3, 8, 8),), str(path), dynamo=dynamo, verbose=False)
    (finding,) = [finding for finding in diagnose(path).findings if finding.code == "BN401"]
    assert "keeps no running statistics" in finding.message


def test_broken_buffers_in_a_program():
    model = net().eval()
    model[1].running_var[2] = float("nan")
    assert "BN107" in diagnose(program(model)).codes


def test_a_file(tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(program(net().train()), path)
    assert diagnose(path).codes == diagnose(str(path)).codes == {"BN401"}


@pytest.mark.parametrize("name", ["a.pt2", "a.onnx"])
def test_files_that_are_none(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        diagnose(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00\x01 no model")
    with pytest.raises(UserError, match=name):
        diagnose(tmp_path / name)
    with pytest.raises(UserError, match="neither"):
        diagnose(tmp_path / "a.bin")


def onnx_file(path, training=0, opset=15, var=1.0):
    onnx = pytest.importorskip("onnx", reason="an extra: pip install 'batchnorm[onnx]'")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    value = helper.make_tensor_value_info
    vectors = {"scale": torch.ones(8), "bias": torch.zeros(8), "mean": torch.zeros(8), "var": torch.full((8,), var)}
    weights = [numpy_helper.from_array(torch.randn(8, 3, 3, 3).numpy(), "w")]
    weights += [numpy_helper.from_array(v.numpy(), n) for n, v in vectors.items()]
    outputs = ["y", "new_mean", "new_var"] if training else ["y"]
    attributes = {"training_mode": training} if opset >= 14 else {}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", *vectors], outputs, name="bn", **attributes),
    ]
    shapes = value("x", 1, [4, 3, 8, 8]), value("y", 1, [4, 8, 6, 6])
    graph = helper.make_graph(nodes, "g", [shapes[0]], [shapes[1]], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), str(path))
    return path


@pytest.mark.parametrize("opset", [9, 15])
def test_onnx(tmp_path, opset):
    trained = diagnose(onnx_file(tmp_path / "t.onnx", training=1, opset=opset))
    assert [(f.code, f.module) for f in trained.findings] == [("BN401", "bn")]
    assert diagnose(onnx_file(tmp_path / "e.onnx", opset=opset)).codes == {"BN402"}
    assert "BN107" in diagnose(onnx_file(tmp_path / "n.onnx", var=-1.0)).codes


def test_onnx_that_is_not_installed(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'batchnorm\[onnx\]'"):
        diagnose(path)
