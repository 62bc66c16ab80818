"""Healthy networks, in which neither a warning nor an error may be found."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.model_tools import convert, freeze, recalibrate
from tests.doctor.faults import Call, Checkpointed, data, norms, steps, taught, trained
from tests.doctor.nets import CLASSES, NETS, Net, TwoHeads, batches_for, train

Healthy = tuple[str, Callable[[], Call]]


def healthy() -> Iterator[Healthy]:
    """Yield (name, call). Each call makes a new model."""
    for name, net in NETS.items():
        yield f"{name}, new", lambda net=net: {"model": net.make(), "batches": data(net)}
        yield f"{name}, new, no data", lambda net=net: {"model": net.make()}
        yield f"{name}, new, an example", lambda net=net: {"model": net.make(), "example_input": example(net)}
        for count in (5, 20):
            yield f"{name}, {count} steps", lambda net=net, n=count: {"model": trained(net, n), "batches": data(net)}
        yield f"{name}, trained, evaluated", lambda net=net: _evaluated(net)
        yield f"{name}, trained, batches of 16", lambda net=net: _batches_of(net, 26 if len(net.shape) == 1 else 16)
        yield f"{name}, recalibrated", lambda net=net: _recalibrated(net)
        yield f"{name}, converted", lambda net=net: {"model": convert(net.make()), "batches": data(net, 8)}
        yield f"{name}, frozen", lambda net=net: _frozen(net)
        yield f"{name}, steps watched", lambda net=net: _watched(net)
    yield from _special()


def example(net: Net) -> Tensor:
    return torch.zeros(1, *net.shape)


def _evaluated(net: Net) -> Call:
    """Train with a learning rate that falls, so that the statistics can settle."""
    model = trained(net, 150)
    train(model, batches_for(net, 36, 32, seed=1), 60, lr=0.001)
    return {"model": model.eval(), "batches": data(net)}


def _batches_of(net: Net, size: int) -> Call:
    return {"model": trained(net, 30), "batches": data(net, 20, size), "steps": 1000}


def _recalibrated(net: Net) -> Call:
    model = trained(net, 10).eval()
    if norms(model):
        recalibrate(model, [x for x, _ in batches_for(net, 36, 32, seed=3)])
    else:
        model.train()
    return {"model": model, "batches": data(net)}


def _frozen(net: Net) -> Call:
    return {"model": freeze(trained(net, 60)), "batches": data(net)}


def _watched(net: Net) -> Call:
    model = net.make()
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return {"model": model, "batches": data(net, 6), "step": step, "optimizer": optimizer, "steps": 500}


def _special() -> Iterator[Healthy]:
    yield "two inputs, a dict", _two_heads
    yield "an adversarial pair", _adversarial
    yield "two views a step", _two_views
    yield "a teacher in eval()", _taught
    yield "data normalized without parameters", _data_normalized
    for reentrant in (False, True):
        yield f"our layers checkpointed, reentrant {reentrant}", lambda r=reentrant: _checkpointed(r)
    yield "frozen, trained, evaluated", _frozen_backbone_evaluated
    yield "no batch normalization", lambda: {"model": nn.Linear(20, CLASSES), "batches": data(NETS["mlp"])}
    yield "pooled to 1×1", _pooled
    yield "no affine", lambda: {"model": _plain(nn.BatchNorm1d(16, affine=False)), "batches": data(NETS["mlp"])}
    yield "no statistics", lambda: {"model": _plain(_untracked()), "batches": data(NETS["mlp"])}
    yield "cumulative average", lambda: _short_run(nn.BatchNorm1d(16, momentum=None))
    yield "bias of β held", _held_bias
    yield "a loader that drops the last", lambda: _loader(True)
    yield "sorted batches, evaluated", _sorted_evaluated
    yield "heavy tails", _heavy_tails
    yield "masked layer", _masked
    yield "a wrapper around an evaluated model", _wrapped
    yield "lazy layers", lambda: {"model": _lazy(), "batches": data(NETS["mlp"])}
    yield "weight decay in its own groups", _groups


def _two_heads() -> Call:
    batches = [{"left": torch.randn(32, 8), "right": torch.randn(32, 6), "label": torch.zeros(32)} for _ in range(32)]
    return {"model": TwoHeads(), "batches": batches}


def _adversarial() -> Call:
    net = NETS["discriminator"]
    model, other = net.make(), nn.Linear(8, 3 * 12 * 12)
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4) for m in (model, other)]

    def step(batch: tuple[Tensor, Tensor]) -> None:
        fake = other(torch.randn(32, 8)).view(32, *net.shape)
        optimizers[0].zero_grad()
        F.softplus(-model(batch[0])).mean().backward()
        F.softplus(model(fake.detach())).mean().backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        F.softplus(-model(fake)).mean().backward()
        optimizers[1].step()

    return {"model": model, "batches": data(net, 4), "step": step, "optimizer": optimizers[0]}


def _two_views() -> Call:
    model = NETS["cnn"].make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        (model(batch[0]) - model(batch[0].flip(-1))).square().mean().backward()
        optimizer.step()

    return {"model": model, "batches": data(NETS["cnn"], 4), "step": step, "optimizer": optimizer}


def _taught() -> Call:
    call = taught(NETS["cnn"], "no_grad")
    inspect.getclosurevars(call["step"]).nonlocals["teacher"].eval()
    return call


def _data_normalized() -> Call:
    """No gradient reaches the result of the first layer, because nothing before it learns."""
    model = nn.Sequential(nn.BatchNorm1d(20, affine=False), nn.Linear(20, CLASSES))
    return steps(model) | {"batches": data(NETS["mlp"], 4)}


def _checkpointed(reentrant: bool) -> Call:
    """Reentrant checkpointing runs the first forward without gradients."""
    return steps(Checkpointed(NETS["our mlp"].make(), reentrant)) | {"batches": data(NETS["mlp"], 4)}


def _frozen_backbone_evaluated() -> Call:
    """Its statistics are not the data's, and the layers after it have learned from them."""
    call = _evaluated(NETS["frozen backbone"])
    return call | {"model": freeze(call["model"])}


def _pooled() -> Call:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    return {"model": model, "batches": data(NETS["cnn"])}


def _plain(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16, bias=False), norm, nn.ReLU(), nn.Linear(16, CLASSES))


def _untracked() -> nn.Module:
    return nn.BatchNorm1d(16, track_running_stats=False)


def _short_run(norm: nn.Module) -> Call:
    model = train(_plain(norm), batches_for(NETS["mlp"], 36, 32), 30, lr=0.001)
    return {"model": model.eval(), "batches": data(NETS["mlp"]), "steps": 30}


def _held_bias() -> Call:
    model = _plain(nn.BatchNorm1d(16))
    model[1].bias.requires_grad_(False)
    return {"model": model, "batches": data(NETS["mlp"])}


def _loader(drop: bool) -> Call:
    samples = TensorDataset(torch.randn(65, 20))
    return {"model": NETS["mlp"].make(), "loader": DataLoader(samples, batch_size=32, drop_last=drop)}


def _sorted_evaluated() -> Call:
    call = _evaluated(NETS["cnn"])
    x, y = (torch.cat(parts) for parts in zip(*call["batches"], strict=True))
    order = y.argsort()
    return call | {"batches": list(zip(x[order].split(32), y[order].split(32), strict=True))}


def _heavy_tails() -> Call:
    model = train(_plain(nn.BatchNorm1d(16)), batches_for(NETS["mlp"], 36, 32), 100, lr=0.002)
    tailed = [(x * torch.rand(32, 1).rsqrt().clamp(max=5), y) for x, y in data(NETS["mlp"])]
    for x, _ in tailed * 3:
        model(x)
    return {"model": model.eval(), "batches": tailed}


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.out = batchnorm.BatchNorm1d(8), nn.Conv1d(8, CLASSES, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.bn(x, mask=mask))


def _masked() -> Call:
    mask = torch.arange(12) < torch.randint(2, 12, (32, 1))
    batches = [{"x": (3 + torch.randn(32, 8, 12)) * mask[:, None], "mask": mask} for _ in range(8)]
    return {"model": _Masked(), "batches": batches, "mask": "mask"}


def _wrapped() -> Call:
    call = _evaluated(NETS["cnn"])
    return call | {"model": nn.Sequential(nn.Identity(), call["model"])}


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(16, bias=False), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES))


def _groups() -> Call:
    model = copy.deepcopy(NETS["residual"].make())
    groups: list[Any] = batchnorm.model_tools.param_groups(model, 0.01)
    return {"model": model, "optimizer": torch.optim.SGD(groups, 0.1), "batches": data(NETS["residual"], 4)}
