"""Files that torch's two exporters write, at old and new opsets, fold entirely; onnxruntime gives the same numbers."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from batchnorm.model_tools import fold_onnx

from .test_fold import trained
from .zoo import build


class Everything(nn.Module):
    """A view by computed sizes, a normalization before a linear layer, a linear layer on tokens, no bias, no affine."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
            nn.ConvTranspose1d(8, 8, 3, groups=2), nn.BatchNorm1d(8), nn.Hardtanh(), nn.BatchNorm1d(8),
        )  # fmt: skip
        self.fc, self.norm = nn.Linear(8 * 18, 6), nn.BatchNorm1d(6)
        self.last, self.end = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
        self.tokens, self.of_tokens, self.drop = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout()

    def forward(self, x, y):
        h = self.body(x)
        h = self.norm(self.fc(h.view(h.size(0), -1)))
        tokens = self.of_tokens(self.tokens(y).transpose(1, 2)).transpose(1, 2)
        return self.end(self.last(self.drop(torch.relu(h)))), tokens


def export(model, inputs, path, dynamo, opset, optimize):
    names = ["x", "y"][: len(inputs)]
    if dynamo:
        batch = torch.export.Dim("batch")
        more = {"optimize": optimize, "dynamic_shapes": tuple({0: batch} for _ in inputs), "verbose": False}
    else:
        more = {"do_constant_folding": optimize, "dynamic_axes": {name: {0: "batch"} for name in names}}
        more["training"] = torch.onnx.TrainingMode.PRESERVE  # else the exporter folds by itself
    torch.onnx.export(model, inputs, str(path), input_names=names, opset_version=opset, dynamo=dynamo, **more)


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(["x", "y"], inputs, strict=False)))


def check(model, inputs, tmp_path, *how):
    path, target = tmp_path / "n.onnx", tmp_path / "folded.onnx"
    export(model, tuple(torch.from_numpy(x[:2]) for x in inputs), path, *how)
    report = fold_onnx(path, target)
    assert not report.stayed, str(report)
    assert report.verified
    onnx.checker.check_model(str(target), full_check=True)
    assert all(node.op_type != "BatchNormalization" for node in onnx.load(str(target)).graph.node)
    wanted = model.double()(*(torch.from_numpy(x).double() for x in inputs))
    for ours, exact in zip(run(target, inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        exact = exact.detach().numpy()
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    return report


@pytest.mark.filterwarnings("ignore")  # both exporters warn at length of what they will stop doing
@pytest.mark.parametrize(
    "how",
    [
        (False, 9, False), (False, 11, True), (False, 13, False), (False, 17, True), (False, 20, False),
        (True, 18, True), (True, 20, False), (True, None, False),
    ],
)  # fmt: skip
def test_every_opset(tmp_path, how):
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal(shape).astype(np.float32) for shape in ((3, 3, 16), (3, 9, 5))]
    report = check(trained(Everything()).float(), inputs, tmp_path, *how)
    assert len(report.folded) == (2 if how == (True, 18, True) else 6)  # this exporter folds some by itself


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


@pytest.mark.filterwarnings("ignore")  # see above
@pytest.mark.parametrize("name", ["resnet-bottleneck", "mobilenet-v2"])
@pytest.mark.parametrize("how", [(False, 13, False), (True, 20, False)])
def test_networks(tmp_path, name, how):
    model, x = build(name)
    check(trained(Logits(model)).float(), [x.float().numpy()], tmp_path, *how)
