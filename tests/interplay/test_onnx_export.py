"""torch.onnx: the file of a network of ours is the file of torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .nets import KINDS, images, pair

onnx = pytest.importorskip("onnx", reason="an extra: pip install 'batchnorm[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="an extra: pip install 'batchnorm[onnx]'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["by torch.export", "by TorchScript"])
@pytest.mark.filterwarnings("ignore")  # the exporters' own
@torch.no_grad()
def test_the_file_is_torchs(kind, dynamo, tmp_path):
    """The same operators, none of them ours, and the values that eager evaluation gives."""
    x, operators = images(dtype=torch.float32), []
    for number, model in enumerate(pair(kind, torch.float32)):
        path = tmp_path / f"{number}.onnx"
        torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, verbose=False)
        nodes = onnx.load(path).graph.node
        operators.append(sorted((node.domain, node.op_type) for node in nodes))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-4, atol=1e-4)
    assert operators[1] == operators[0]
