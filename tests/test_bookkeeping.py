"""Domains, accumulation, skipped batches, frozen layers, checkpointing, the pure form, any feature axis."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm1d, BatchNormAct1d, BatchNormAct2d, use_domain
from batchnorm.functional import Buffers, batch_norm, batch_norm_pure
from tests.oracle import close, truth


def test_each_domain_keeps_its_own_statistics():
    layer = BatchNorm1d(3, domains=2, momentum=1.0)
    first, second = torch.randn(8, 3) + 5, torch.randn(8, 3) * 4
    layer(first, domain=0)
    layer(second, domain=1)
    torch.testing.assert_close(layer.running_mean, first.mean(0))
    torch.testing.assert_close(layer.memory(1).running_mean, second.mean(0))
    torch.testing.assert_close(layer.memory(1).running_var, second.var(0))
    assert layer.num_batches_tracked == layer.memory(1).num_batches_tracked == 1
    layer.eval()
    want = truth(first, layer.weight, layer.bias, moments=layer.memory(1)[:2]).out
    close(layer(first, domain=1), want, torch.float32)


@pytest.mark.parametrize("affine", [False, True])
def test_one_domain_a_sample_is_one_batch_a_domain(affine):
    mixed = BatchNormAct2d(3, "relu", domains=3, domain_affine=affine)
    if affine:
        nn.init.normal_(mixed.norm.domain_weight)
    apart = copy.deepcopy(mixed)
    x, g = torch.randn(9, 3, 2, 2), torch.randn(9, 3, 2, 2)
    residual = torch.randn_like(x)
    domain = torch.tensor([0, 2, 2, 0, 1, 1, 0, 2, 1])
    leaf = x.clone().requires_grad_()
    out = mixed(leaf, residual, domain=domain)
    out.backward(g)
    for number in range(3):
        chosen = domain == number
        part = x[chosen].clone().requires_grad_()
        want = apart(part, residual[chosen], domain=number)
        want.backward(g[chosen])
        torch.testing.assert_close(out[chosen], want)
        torch.testing.assert_close(leaf.grad[chosen], part.grad)
    for (name, a), b in zip(mixed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(mixed.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_use_domain_reaches_layers_in_containers():
    net = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, domains=2), nn.ReLU())
    with use_domain(net, 1):
        net(torch.randn(8, 4))
    assert net[1].num_batches_tracked == 0
    assert net[1].memory(1).num_batches_tracked == 1
    assert net[1].domain == 0
    with pytest.raises(ValueError, match="domain 2 is not one"), use_domain(net, 2):
        pass
    with pytest.raises(ValueError, match="no layer of this model has domains"), use_domain(nn.Linear(1, 1), 0):
        pass


def test_a_checkpoint_without_domains_starts_all_of_them():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(8, 3) + 2)
    layer = BatchNorm1d(3, domains=2)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer.memory(1).running_mean, plain.running_mean)
    again = BatchNorm1d(3, domains=2)
    again.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("domain", [2, -1, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1]), torch.rand(4)])
def test_a_domain_that_is_none(domain):
    with pytest.raises(ValueError, match="domain"):
        BatchNorm1d(3, domains=2)(torch.randn(4, 3), domain=domain)
    with pytest.raises(ValueError, match="domain"):
        BatchNorm1d(3, domains=1)


def test_accumulation_moves_the_buffers_as_the_union_would():
    parts = [torch.randn(n, 3) * n + n for n in (4, 7, 2)]
    layer, union = BatchNorm1d(3, accumulation_steps=3), BatchNorm1d(3)
    for part in parts[:2]:
        layer(part)
    assert layer.num_batches_tracked == 0
    layer(parts[2])
    union(torch.cat(parts))
    torch.testing.assert_close(layer.state_dict(), union.state_dict())
    layer(parts[0])
    assert layer.num_batches_tracked == 1


def test_accumulation_of_ghost_batches():
    parts = [torch.randn(4, 3) for _ in range(2)]
    layer, union = BatchNorm1d(3, accumulation_steps=2, ghost_batch_size=2), BatchNorm1d(3, ghost_batch_size=2)
    for part in parts:
        layer(part)
    union(torch.cat(parts))
    torch.testing.assert_close(layer.state_dict(), union.state_dict())


def test_skip_leaves_the_buffers_and_counts():
    layer, plain = BatchNorm1d(3, nonfinite="skip"), BatchNorm1d(3)
    good, bad = torch.randn(8, 3), torch.randn(8, 3)
    bad[2, 1] = float("inf")
    layer(good)
    plain(good)
    layer(bad)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 2
    assert layer.num_batches_skipped == 1
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain(bad)
    assert not plain.running_mean.isfinite().all()  # "propagate", torch's behavior
    with pytest.raises(ValueError, match="nonfinite"):
        BatchNorm1d(3, nonfinite="ignore")


def test_amps_skipped_step_does_not_poison_the_buffers():
    """The scaler skips the optimizer's step for an overflow; the statistics moved already. pytorch#90342."""
    net = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, nonfinite="skip"), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(8, 4)
    x[0, 0] = float("inf")
    scaler.scale(net(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, value in net.state_dict().items():
        if name != "1.num_batches_tracked":
            assert torch.equal(value, before[name]), name
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"ghost_batch_size": 4}, {"accumulation_steps": 2}, {"nonfinite": "skip"}])
def test_checkpointing_counts_a_batch_once(use_reentrant, keywords):
    layer, again = BatchNorm1d(3, **keywords), BatchNorm1d(3, **keywords)
    for _ in range(2):
        x = torch.randn(8, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        again(x)
    torch.testing.assert_close(layer.state_dict(), again.state_dict())


def test_frozen_survives_train_and_keeps_the_gradient():
    layer = BatchNorm1d(3)
    layer(torch.randn(8, 3) + 1)
    layer.frozen = True
    before = copy.deepcopy(layer.state_dict())
    x, g = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    want = truth(x, layer.weight, layer.bias, grad_output=g, moments=(layer.running_mean, layer.running_var))
    out = layer.train()(x)
    out.backward(g)
    close(out, want.out, torch.float32)
    close(x.grad, want.grads["input"], torch.float32)
    torch.testing.assert_close(layer.state_dict(), before)
    assert layer(torch.randn(1, 3)).shape == (1, 3)


def buffers(*lead):
    return Buffers(torch.zeros(*lead, 3), torch.ones(*lead, 3), torch.zeros(lead, dtype=torch.long))


@pytest.mark.parametrize("keywords", [{}, {"ghost_batch_size": 3}, {"renorm": batchnorm.Renorm(1.5, 0.2)}])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_pure_form_returns_what_the_other_writes(keywords, momentum):
    x = torch.randn(6, 3)
    given = buffers()
    out, new = batch_norm_pure(x, given, momentum=momentum, **keywords)
    mean, var, tracked = buffers()
    want = batch_norm(x, mean, var, None, None, True, momentum, num_batches_tracked=tracked, **keywords)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(tuple(new), (mean, var, tracked))
    assert given.num_batches_tracked == 0
    assert torch.equal(given.running_mean, torch.zeros(3))


def test_the_pure_form_under_vmap_and_jacrev():
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    given = Buffers(*(t.double() if t.is_floating_point() else t for t in buffers(4)))
    outs, news = vmap(batch_norm_pure)(x, given)
    for member in range(4):
        out, new = batch_norm_pure(x[member], Buffers(*(t[member] for t in given)))
        torch.testing.assert_close(outs[member], out)
        torch.testing.assert_close(tuple(t[member] for t in news), tuple(new))
    one = Buffers(*(t[0] for t in given))
    jacobian = jacrev(lambda x: batch_norm_pure(x, one, activation="silu")[0])(x[0])
    numeric = torch.autograd.functional.jacobian(lambda x: batch_norm_pure(x, one, activation="silu")[0], x[0])
    torch.testing.assert_close(jacobian, numeric)


def test_functional_call_moves_the_buffers_it_is_given():
    layer = BatchNorm1d(3)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    functional_call(layer, state, (torch.randn(8, 3),))
    assert layer.num_batches_tracked == 0
    assert state["num_batches_tracked"] == 1


@pytest.mark.parametrize("keywords", [{}, {"ghost_batch_size": 2}, {"domains": 2}, {"accumulation_steps": 2}])
def test_channels_last_axis_of_sequences(keywords):
    by_axis, transposed = (BatchNormAct1d(5, None, feature_axis=axis, **keywords) for axis in (-1, 1))
    x, residual = torch.randn(4, 7, 5), torch.randn(4, 7, 5)
    mask = torch.rand(4, 7) < 0.6
    a = by_axis(x, residual, mask)
    b = transposed(x.transpose(1, 2), residual.transpose(1, 2), mask).transpose(1, 2)
    assert a.is_contiguous()
    assert torch.equal(a, b)
    assert torch.equal(by_axis.eval()(x, mask=mask.unsqueeze(-1)), transposed.eval()(x.transpose(1, 2)).transpose(1, 2))
    with pytest.raises(ValueError, match="feature_axis"):
        BatchNorm1d(5, feature_axis=0)
    with pytest.raises(ValueError, match="feature_axis"):
        batch_norm(torch.randn(4, 3), None, None, training=True, feature_axis=2)


def test_configure_is_all_or_nothing():
    layer = BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="track_running_stats"):
        layer.configure(nonfinite="skip", accumulation_steps=2)
    assert layer.nonfinite == "propagate"
    with pytest.raises(TypeError, match="has no keyword momentun"):
        layer.configure(momentun=0.1)
