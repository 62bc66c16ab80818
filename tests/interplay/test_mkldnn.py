"""oneDNN's layout (torch.utils.mkldnn), whose converter goes by the type."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.mkldnn import to_mkldnn

import batchnorm

from .nets import KINDS, our_block, stir, torchs_block


def network(block) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), block(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_to_mkldnn(kind):
    """Every layer of ours becomes what torch's becomes, inside a converted Sequential and inside a composite too."""
    theirs = stir(network(torchs_block)).eval()
    if kind == "convert":
        ours = batchnorm.convert(copy.deepcopy(theirs))
    else:
        ours = network(our_block).eval()
        ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 6, 6)
    reference = theirs(x)  # before torch's converter changes the containers in place
    converted, expected = (to_mkldnn(model) for model in (ours, theirs))
    norms = [[m for m in model.modules() if "BatchNorm" in type(m).__name__] for model in (converted, expected)]
    assert not any(isinstance(m, batchnorm.BatchNorm2d) for m in norms[0])
    found = converted(x.to_mkldnn())
    assert found.layout is torch._mkldnn
    torch.testing.assert_close(found.to_dense(), expected(x.to_mkldnn()).to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.to_dense(), reference, rtol=1e-4, atol=1e-4)
