"""Pairs of models with the same tensors: torch's, and ours by `convert` or with `BatchNormAct`."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import batchnorm

KINDS = ["convert", "composite"]
# What every test of torch's quantizers stands under.
ENGINE = "x86"
QUANTIZES = [
    pytest.mark.skipif(ENGINE not in torch.backends.quantized.supported_engines, reason="no x86 quantized kernels"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),  # its own
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),  # torch's defaults' own
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),  # torch's own, once a process
]


def torchs_block(features: int) -> nn.Module:
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(features), act=nn.ReLU()))


def our_block(features: int) -> nn.Module:
    return batchnorm.BatchNormAct2d(features, "relu")


class Small(nn.Module):
    """A stem that `convert` runs as pairs, a block for a composite, a norm outside of any Sequential, and a 1d head."""

    def __init__(self, block=torchs_block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), block(4))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.act = nn.LeakyReLU(0.2)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(4 * 4 * 4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
        )  # fmt: skip

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.head(x + self.act(self.norm(self.conv(x))))


def stir(model: nn.Module) -> nn.Module:
    """Running statistics, γ and β as after some training: none is 0 or 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(3)
    return model


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """(torch's, ours) with equal tensors."""
    theirs = stir(Small()).to(dtype)
    if kind == "convert":
        return theirs, batchnorm.convert(copy.deepcopy(theirs))
    ours = Small(our_block).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def images(count: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, dtype=dtype)


def left_by(model: nn.Module, x: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What one call and its backward leave: output, gradients and state, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype))
    left = {"output": y.detach(), "input.grad": x.grad}
    left |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return left | {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_calls(ours: nn.Module, theirs: nn.Module, modes=(True, False), tolerance: float = 1e-10) -> None:
    """Outputs, gradients and buffers of a call in each mode."""
    for training in modes:
        x = images()
        assert_same(left_by(ours.train(training), x), left_by(theirs.train(training), x), tolerance)
