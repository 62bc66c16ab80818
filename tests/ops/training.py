"""Arguments of a training call, for the tests that hold it in Python and in C++."""

import torch

from batchnorm.ops import Form, extension
from tests.oracle import truth

COMPILED = extension.autograd_module(torch.__version__)
NAMES = ("input", "weight", "bias", "residual")


class Problem:
    """Arguments of one call, (8, 3, 5) in float64 unless told, and fresh buffers."""

    def __init__(self, activation="relu", residual=True, mask=False, affine=True, slice_size=0, dtype=torch.float64):
        def random(*size):
            return torch.randn(size, dtype=dtype)

        self.input = (random(8, 3, 5) * 2 + 1).requires_grad_()
        self.weight = random(3).requires_grad_() if affine else None
        self.bias = random(3).requires_grad_() if affine else None
        self.residual = random(8, 3, 5).requires_grad_() if residual else None
        self.mask = torch.rand(8, 5) < 0.7 if mask else None
        self.buffers = (torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(0))
        self.momentum = 0.1
        self.form = Form(1e-5, activation, 0.2, slice_size)
        self.grad_output = random(8, 3, 5)

    def leaves(self):
        return [getattr(self, name) for name in NAMES]

    def out(self, call, *leaves):
        return call(*(leaves or self.leaves()), self.mask, *self.buffers, self.momentum, False, *self.form)

    def truth(self):
        return truth(
            self.input, self.weight, self.bias, residual=self.residual, mask=self.mask, grad_output=self.grad_output,
            activation=self.form.activation, negative_slope=0.2, slice_size=self.form.slice_size,
        )  # fmt: skip


def grads_of(p, call, wanted=NAMES, **keywords):
    found = torch.autograd.grad(p.out(call), [getattr(p, name) for name in wanted], p.grad_output, **keywords)
    return dict(zip(wanted, found, strict=True))
