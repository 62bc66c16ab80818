"""`fold` where a normalization or a layer is called several times, or the channels lie elsewhere in the next layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import diagnose, fold

from .nets import scripted
from .test_fold import Block, check, trained

SEVERAL = {
    "f(a) - f(b)": (lambda m, x: m.norm(m.conv(x)) - m.norm(m.conv(x.flip(0))), "conv"),
    "recurrent": (lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())), "conv"),
    "one norm after two layers": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.spare(x)), "conv, spare"),
    "one result normalized twice": (lambda m, x: m.norm(h := m.conv(x)) * m.norm(h), "conv"),
    "two layers read it": (lambda m, x: m.conv(y := m.norm(x.relu())) + m.spare(y), "conv, spare"),
    "f(a) - f(b), norm first": (lambda m, x: m.conv(m.norm(x.relu())) - m.conv(m.norm(x.tanh())), "conv"),
}


@pytest.mark.parametrize("calls", SEVERAL)
def test_every_call_makes_the_same_pair(calls):
    forward, into = SEVERAL[calls]
    model, x = trained(Block(forward)), torch.randn(2, 3, 4, 4).double()
    check(model, x)
    assert fold(model, (x,)).report.entries[0].into == into
    (finding,) = diagnose(model, [x], select=["BN402"]).findings
    assert (finding.module, finding.evidence["layer"]) == ("norm", into)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_siamese_call_in_an_exported_program(decomposed):
    model, x = trained(Block(SEVERAL["f(a) - f(b)"][0])), torch.randn(2, 3, 4, 4).double()
    program = torch.export.export(model, (x,))
    folded, report = fold(program.run_decompositions() if decomposed else program, (x,))
    assert [entry.into for entry in report.entries] == ["conv"]
    torch.testing.assert_close(folded(-x), model(-x))


def test_one_norm_into_layers_of_which_one_cannot_stays():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.plain, self.up = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(3, 2, 1)

        def forward(self, x):
            y = self.norm(x)
            return self.plain(y) + self.up(y)

    check(trained(Net()), torch.randn(2, 3, 4, 4).double(), {"norm": "another share"})


class Then(nn.Module):
    """norm, then `way`, which calls `last`."""

    def __init__(self, way, last: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.norm, self.last, self.way = nn.BatchNorm2d(channels), last, way

    def forward(self, x):
        return self.way(self, self.norm(x.relu()))


SPREAD = {
    "flatten": (lambda m, h: m.last(h.flatten(1)), nn.Linear(80, 3)),
    "view": (lambda m, h: m.last(h.view(h.size(0), -1)), nn.Linear(80, 3)),
    "channels last": (lambda m, h: m.last(h.permute(0, 2, 3, 1).reshape(h.size(0), -1)), nn.Linear(80, 3)),
    "a linear map on pixels": (lambda m, h: m.last(h.movedim(1, -1)), nn.Linear(4, 3)),
    "rows apart": (lambda m, h: m.last(h.transpose(1, 2).flatten(2)), nn.Linear(20, 3)),
    "shuffled, grouped, padded": (
        lambda m, h: m.last(h.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
    ),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", SPREAD)
def test_channels_that_lie_elsewhere_in_the_layer_after(way, memory_format):
    model = trained(Then(*SPREAD[way]))
    if way == "view":
        memory_format = torch.contiguous_format  # a view needs it
    check(model, torch.randn(2, 4, 4, 5).double().to(memory_format=memory_format))


STAYS = {
    "another axis": (lambda m, h: m.last(h), nn.Linear(5, 3), "channels are not those"),
    "samples mixed": (lambda m, h: m.last(h.reshape(-1, 40)), nn.Linear(40, 3), "channels are not those"),
    "padded between": (lambda m, h: m.last(F.pad(h, (1, 0)).flatten(1)), nn.Linear(96, 3), "no layer reads"),
    "also read": (lambda m, h: m.last(h.flatten(1)) + h.sum(), nn.Linear(80, 3), "also read by sum"),
    "in two ways": (
        lambda m, h: m.last(h.flatten(1)) + m.last(h.movedim(1, -1).flatten(1)),
        nn.Linear(80, 3),
        "in other places",
    ),
}


@pytest.mark.parametrize("way", STAYS)
def test_channels_that_a_layer_after_cannot_tell(way):
    forward, last, reason = STAYS[way]
    check(trained(Then(forward, last)), torch.randn(2, 4, 4, 5).double(), {"norm": reason})


class Holds(nn.Module):
    """A normalization that its forward calls or not."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(3), calls

    def forward(self, x):
        return self.norm(x) if self.calls else x


def by_a_closure() -> nn.Module:
    block = Holds(True)
    block.forward = lambda x: Holds.forward(block, x)
    return block


def by_a_hook() -> nn.Module:
    block = Holds(False)
    block.register_forward_pre_hook(lambda _, args: (block.norm(args[0]),))
    return block


@pytest.mark.parametrize("hold", [by_a_closure, by_a_hook])
@pytest.mark.parametrize("mode", [True, False])
def test_a_function_that_goes_on_calling_the_users_model(hold, mode):
    """`copy.deepcopy` copies a function as it is, with the modules that it holds on to."""
    model = trained(nn.Sequential(hold(), nn.Linear(3, 3), nn.BatchNorm1d(3)))
    x = torch.randn(4, 3, dtype=torch.float64)
    norm = model[0].norm.train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, report = fold(model, (x,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert norm.training is mode
    assert not norm._forward_pre_hooks
    assert "goes on calling" in next(entry.reason for entry in report.stayed if entry.norm == "0.norm")
    assert [entry.norm for entry in report.folded] == ["2"]
    norm.eval()
    torch.testing.assert_close(folded(-x), model(-x))


def test_normalizations_in_torchscript_are_named():
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), scripted(nn.BatchNorm2d(3).eval())))
    _, report = fold(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),))
    assert {entry.norm: entry.reason for entry in report.stayed}["2"] == "it is a TorchScript module"
    assert [entry.into for entry in report.folded] == ["0"]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("way", ["replaced", "wrapped"])
def test_a_layer_whose_own_forward_was_replaced_stays(which, way):
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    old = model[which].forward
    model[which].forward = (lambda x: old(x) * 2) if way == "replaced" else functools.partial(old)
    folded, report = fold(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),))
    stayed = [entry for entry in report.stayed if entry.norm == "1"]
    assert len(stayed) == 1
    assert "forward of its own" in stayed[0].reason or "goes on calling" in stayed[0].reason
    assert not diagnose(model, [torch.randn(2, 3, 4, 4).double()], select=["BN402"]).findings
    assert type(folded[1]) is nn.BatchNorm2d
