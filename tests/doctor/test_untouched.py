"""What is examined comes back bit for bit, also where the examination fails."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import diagnose
from batchnorm.errors import UserError
from tests.doctor.nets import NETS, batches_for


def everything(model, optimizer):
    """Return everything that must not change, by value."""
    return {
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "tensors": [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        # NPY002 forbids numpy's global generator, but the forwards of users draw from it
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
    }


def assert_same(before, after):
    flat_before, spec = torch.utils._pytree.tree_flatten(before)
    flat_after, spec_after = torch.utils._pytree.tree_flatten(after)
    assert spec == spec_after
    for a, b in zip(flat_before, flat_after, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        else:
            np.testing.assert_equal(a, b)


class Noisy(nn.Module):
    """A model whose forward changes attributes, lists, buffers, random generators and its input."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.body, self.seen, self.calls, self.fails_at = NETS["mlp"].make(), [], 0, fails_at
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen.append(x)
        self.steps += 1
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002  # as above
        if self.calls == self.fails_at:
            raise RuntimeError("as asked")
        return self.body(x.mul_(1.5))


def setting(model):
    batches = batches_for(NETS["mlp"], 36, 32)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    model(batches[0][0].clone()).square().mean().backward()
    optimizer.step()
    model.body[1].eval() if isinstance(model, Noisy) else None
    model.register_forward_hook(lambda module, args, output: None)
    return batches, optimizer


def step_of(model, optimizer, fails=False):
    def step(batch):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        if fails:
            raise RuntimeError("as asked")

    return step


@pytest.mark.parametrize("training", [True, False])
def test_after_an_examination(training):
    model = Noisy().train(training)
    batches, optimizer = setting(model)
    inputs = [x.clone() for x, _ in batches]
    before = everything(model, optimizer)
    diagnose(model, batches, optimizer=optimizer, step=step_of(model, optimizer), steps=10)
    assert_same(before, everything(model, optimizer))
    assert all(torch.equal(a, b) for a, (b, _) in zip(inputs, batches, strict=True))


@pytest.mark.parametrize("fails_at", [2, 10, 40, 70])
def test_after_a_forward_that_fails(fails_at):
    model = Noisy(fails_at)
    batches, optimizer = setting(model)
    model.body[1].running_mean += 4
    before = everything(model.eval(), optimizer)
    with pytest.raises(UserError, match="as asked"):
        diagnose(model, batches, optimizer=optimizer, select="BN202")
    assert_same(before, everything(model, optimizer))


def test_after_a_step_that_fails():
    model = Noisy()
    batches, optimizer = setting(model)
    before = everything(model, optimizer)
    with pytest.raises(UserError, match="training step"):
        diagnose(model, batches, step=step_of(model, optimizer, fails=True))
    assert_same(before, everything(model, optimizer))


def test_an_optimizer_that_was_not_named_comes_back_too():
    model = NETS["mlp"].make()
    optimizer = torch.optim.Adam(model.parameters())
    before = everything(model, optimizer)
    diagnose(model, batches_for(NETS["mlp"], 4, 32), step=step_of(model, optimizer))
    assert_same(before, everything(model, optimizer))


def test_values_that_only_bits_tell_apart_come_back():
    model = nn.BatchNorm1d(4)
    model.running_mean[:] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    before = model.running_mean.clone()
    diagnose(model.eval(), [torch.randn(64, 4)])
    assert torch.equal(before.view(torch.uint8), model.running_mean.view(torch.uint8))


def test_a_graph_that_waits_for_backward_still_can():
    model = NETS["cnn"].make().eval()
    batches = batches_for(NETS["cnn"], 36, 32)
    loss = model(batches[0][0]).square().mean()
    diagnose(model, batches)
    loss.backward()


@pytest.mark.parametrize("name", ["cnn", "mlp", "functional"])
@pytest.mark.parametrize("with_step", [True, False])
def test_at_most_three_forwards_a_batch(name, with_step):
    """The statistics are moved and mlp has dropout before a normalization, so that every pass runs."""
    model = NETS[name].make()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("mean"):
            buffer += 4
    model = nn.Sequential(nn.Dropout(0.5), model).eval()
    calls = []
    batches = batches_for(NETS[name], 32, 32)
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    diagnosis = diagnose(model, batches, step=step_of(model, optimizer) if with_step else None)
    assert {"BN202", "BN105"} <= diagnosis.codes
    assert len(batches) < len(calls) <= 3 * len(batches)


def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    diagnosis = diagnose(model, [torch.randn(32, 5)])
    assert "BN101" in diagnosis.codes
    assert isinstance(model[1], nn.LazyBatchNorm1d)
    assert model[0].has_uninitialized_params()
