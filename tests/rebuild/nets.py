"""Networks whose outputs are rebuilt, beside the same without it, and what a run of one leaves."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import convert


class Calls(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def rebuilt(self):
        return self.names.count("batchnorm::apply")


class Own(nn.Module):
    """A forward of its own, which activates by functions."""

    def __init__(self, act, channels=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x):
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


class Kept(NamedTuple):
    """A call's output, and whether its memory is still there."""

    storage: StorageWeakRef

    @property
    def alive(self):
        return not self.storage.expired()


def watch(tensor):
    return Kept(StorageWeakRef(tensor.untyped_storage()))


def settled(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def both(model, **options):
    """The converted model without and with rebuilt outputs."""
    model = settled(model)
    return convert(copy.deepcopy(model), **options), convert(model, save_memory=True, **options)


def gradients(model, x, call=None):
    """All that a training step gives: the output, gradients for a random grad_output, the buffers."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x) if call is None else call(model, x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    held = [p.grad for p in model.parameters()]
    return [out.detach(), x.grad, *held, *(b.clone() for b in model.buffers())]


def same(found, want):
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


X = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def chain(*acts, channels=4):
    layers, before = [], 3
    for act in acts:
        layers += [nn.Conv2d(before, channels, 3), nn.BatchNorm2d(channels), act]
        before = channels
    return nn.Sequential(*layers, nn.Conv2d(channels, 2, 1))


def outputs_of(model, kind):
    """What each module of a type gave, without holding it."""
    kept = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, given, out: kept.append(watch(out)))
    return kept
