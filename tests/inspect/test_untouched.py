"""The cheap form for a loop: modes and buffers come back, whatever happens inside, and nothing else is looked at.

What the thorough forms put back is held by tests/doctor/test_untouched.py.
"""

import pytest
import torch
from torch import nn

from batchnorm.inspect.untouched import modes_and_buffers_kept


def make_net():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    net[2].eval()
    net.register_buffer("calls", torch.zeros(()))
    return net


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_buffers_come_back(fails):
    net, x = make_net(), torch.randn(8, 4)
    modes = [module.training for module in net.modules()]
    buffers = [buffer.clone() for buffer in net.buffers()]
    versions = [buffer._version for buffer in net.buffers()]
    state = torch.get_rng_state()
    try:
        with modes_and_buffers_kept(net):
            net.train()
            assert not net(x).requires_grad
            net.calls += 1
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert torch.is_grad_enabled()
    assert not torch.equal(torch.get_rng_state(), state)  # the dropout's draw: the generators are not kept

    moved = [buffer._version for buffer in net.buffers()]
    assert moved != versions
    with modes_and_buffers_kept(net):
        net.eval()(x)
    assert [buffer._version for buffer in net.buffers()] == moved, "what nothing changed is not written to"
