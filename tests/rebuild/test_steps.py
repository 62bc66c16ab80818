"""Activations and casts after a normalization, in a forward of the model's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .nets import Calls, Own, X, both, gradients, same, watch

ACTIVATIONS = {
    "relu": F.relu, "relu in place": lambda z: F.relu(z, inplace=True), "silu": F.silu, "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"), "elu": lambda z: F.elu(z, 0.7), "selu": F.selu,
    "celu": lambda z: F.celu(z, 0.6), "elu in place": lambda z: F.elu(z, 0.7, inplace=True), "mish": F.mish,
    "softplus": lambda z: F.softplus(z, 2.0, 10.0), "hardtanh": lambda z: F.hardtanh(z, -0.5, 0.7), "relu6": F.relu6,
    "relu6 in place": lambda z: F.relu6(z, inplace=True), "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "tanh in place": torch.tanh_,
    "leaky": lambda z: F.leaky_relu(z, 0.3), "leaky in place": lambda z: F.leaky_relu(z, 0.3, inplace=True),
    "cast": lambda z: z.float() if z.dtype == torch.float64 else z,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_own_forward_releases_the_activation_s_input_and_output(name):
    act = ACTIVATIONS[name]
    kept = []

    def watching(z):
        kept.append(watch(z))
        y = act(z)
        kept.append(watch(y))
        return y

    plain, saving = both(Own(act))
    same(gradients(saving, X), gradients(plain, X))
    saving.act = watching
    out = saving(X)
    with Calls() as calls:
        out.sum().backward()
    assert not any(one.alive for one in kept)
    assert calls.rebuilt == 1  # of z, for all that were told by it


def test_autocast_rebuilds_the_cast_copy():
    """The normalization's output is float32 here, and each convolution keeps a bfloat16 copy of it."""
    kept = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(x)
            kept.append(watch(y))
            return self.last(self.conv(y).float())

    plain, saving = both(Net())

    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    same(gradients(saving, X, call), gradients(plain, X, call))
    kept.clear()
    out = call(saving, X)
    copied = out.grad_fn.next_functions[0][0].next_functions[0][0]
    assert copied.name() == "ConvolutionBackward0"
    assert copied._raw_saved_input.unpack_hook is not None
    assert copied._saved_input.dtype == torch.bfloat16
    assert not kept[0].alive


def test_a_cast_to_another_layout():
    results = []
    for model in both(Own(lambda z: z.to(torch.float64, memory_format=torch.channels_last))):
        model.conv2.double()
        model.bn2.double()
        results.append(gradients(model, X))
        out = model(X)
        saved = out.grad_fn.next_functions[0][0]._raw_saved_input
        assert (saved.unpack_hook is not None) == model.bn1.save_memory
    same(*results)
