"""A repair is done in place, is reported, and removes its finding. Evaluation computes the same, or is corrected."""

import copy

import torch
from torch import nn

from batchnorm.doctor.repair import repair


def net(**bn):
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, **bn), nn.ReLU(), nn.Linear(16, 3))


def test_a_redundant_bias_moves_into_the_running_mean():
    torch.manual_seed(0)
    model = net()
    for _ in range(60):
        model(torch.randn(64, 8))
    model.eval()
    x, keys = torch.randn(32, 8), list(model.state_dict())
    before = model(x)
    report = repair(model)
    assert report.before["BN101"] == 1
    assert report.after["BN101"] == 0
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == keys
    assert not model[0].bias.any()


def test_momentum():
    model = net(momentum=0.99)
    report = repair(model)
    assert model[1].momentum == 0.01
    assert [(c.code, c.before, c.after) for c in report.changes if c.code == "BN102"] == [("BN102", "0.99", "0.01")]


def test_a_half_frozen_layer_is_frozen():
    model = net()
    model[1].requires_grad_(False)
    assert repair(model).after["BN103"] == 0
    before = model[1].running_mean.clone()
    model.train()(torch.randn(32, 8))
    assert torch.equal(model[1].running_mean, before)


def test_decay_is_taken_off_and_the_optimizer_keeps_its_state():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state[model[1].weight])
    report = repair(model, optimizer=optimizer)
    assert (report.before["BN104"], report.after["BN104"]) == (1, 0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], state["exp_avg"])
    optimizer.step()


def test_statistics_are_recalibrated():
    model = net().eval()
    batches = [(3 + 2 * torch.randn(64, 8), torch.zeros(64)) for _ in range(20)]
    report = repair(model, iter(batches))
    assert report.before["BN106"] == 1
    assert report.after["BN106"] == report.after["BN202"] == 0
    expected = torch.cat([model[0](x) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected.detach(), rtol=1e-4, atol=1e-4)


def test_what_is_left_is_told():
    model = nn.Sequential(nn.Dropout(0.5), net()).eval()
    report = repair(model)
    assert set(report.left) >= {"BN105", "BN106"}
    assert "batches" in report.left["BN106"]
