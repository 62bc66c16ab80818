"""`fold`: the same answer with fewer layers, and every trap refused with its reason."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import fold, freeze, insert

from .nets import Attention, PreActivation, Residual

KINDS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def trained(model: nn.Module) -> nn.Module:
    """Every statistic and affine away from its initial value, in eval and float64."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval().double()


def check(model: nn.Module, x: Tensor, stayed: dict[str, str] | None = None) -> nn.Module:
    """Folds, and holds the result against the model on another input; `stayed` gives a part of each reason."""
    before = copy.deepcopy(model.state_dict())
    folded, report = fold(model, (x,))
    assert {entry.norm for entry in report.stayed} == set(stayed or {}), report
    for entry in report.stayed:
        assert (stayed or {})[entry.norm] in entry.reason, report
    assert report.difference < 1e-12
    other = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    torch.testing.assert_close(folded(other), model(other), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What hung on the old parameters could be neither copied nor trained.
    assert all(tensor.is_leaf for tensor in (*folded.parameters(), *folded.buffers()))
    kept = [name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)]
    assert kept == [entry.norm for entry in report.stayed if not entry.norm.startswith("F.")]
    return folded


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
def test_convolutions_before_and_after(dims, groups, affine):
    conv, _, norm = KINDS[dims]
    x = torch.randn(2, 4, *[8, 6, 5][:dims]).double()
    for bias, mode in itertools.product((True, False), ("zeros", "reflect")):
        options = {"groups": groups, "bias": bias, "padding_mode": mode}
        before = [conv(4, 8, 3, padding=2, dilation=2, **options), norm(8, affine=affine), nn.ReLU()]
        after = [norm(8, affine=affine), conv(8, 4, 3, padding="same", **options)]
        check(trained(nn.Sequential(*before, *after)), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions(dims, groups, bias):
    _, transposed, norm = KINDS[dims]
    layer = transposed(4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    check(trained(nn.Sequential(layer, norm(8))), torch.randn(2, 4, *[5] * dims).double())


def test_a_transposed_convolution_after_is_exact_only_without_shift():
    x = torch.randn(2, 4, 5, 5).double()
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)))
    check(model, x, {"0": "another share"})
    model[0].running_mean.zero_()
    model[0].bias.data.zero_()
    check(model, x)


def test_a_dead_channel_before_zero_padding_stays():
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)))
    model[0].weight.data[1] = 0
    x = torch.randn(2, 4, 5, 5).double()
    check(model, x, {"0": "γ = 0"})
    model[0].bias.data[1] = model[0].running_mean[1] = 0
    check(model, x)


def test_linear_layers_chains_and_both_orders():
    layers = [nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2)]
    folded = check(trained(nn.Sequential(*layers)), torch.randn(2, 4).double())
    assert [type(m) for m in folded] == [nn.Identity, nn.Linear, nn.Identity, nn.Identity, nn.Linear]


def test_sequences_reached_through_views():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
            self.other, self.last = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            h = self.linear(x)
            h = self.norm(h.flatten(0, 1)).reshape_as(h)
            return self.last(self.other(h).transpose(1, 2))

    check(trained(Net()), torch.randn(2, 7, 4).double())


def test_a_feature_axis_of_its_own_and_domains():
    norm = batchnorm.BatchNorm1d(5, feature_axis=-1)
    check(trained(nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 5))), torch.randn(2, 5, 4).double())
    model = trained(nn.Sequential(nn.Linear(4, 5), batchnorm.BatchNorm1d(5, domains=2)))
    check(model, torch.randn(2, 4).double(), {"1": "domain"})


def test_the_wrong_axis_is_seen_though_the_sizes_agree():
    model = trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    check(model, torch.randn(2, 5, 4).double(), {"1": "another axis"})


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_our_activation_and_residual_stay(activation):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = batchnorm.BatchNormAct2d(3, activation)
            self.second = batchnorm.BatchNormAct2d(3, None)

        def forward(self, x):
            return self.second(self.conv2(self.norm(self.conv(x), x)), x)

    check(trained(Net()), torch.randn(2, 3, 4, 4).double())


@pytest.mark.parametrize(
    ("model", "shape"), [(Residual(), (4, 3, 8, 8)), (Attention(), (4, 5, 8))], ids=["residual", "attention"]
)
def test_what_insert_put_in_can_be_folded(model, shape):
    x = torch.randn(shape)
    check(trained(insert(model, x)), x.double())


def test_frozen_layers_fold():
    check(freeze(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))), torch.randn(2, 3, 5, 5).double())


class Block(nn.Module):
    """conv → norm, and whatever `extra` does with them."""

    def __init__(self, extra) -> None:
        super().__init__()
        self.conv, self.norm, self.spare = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.extra = extra

    def forward(self, x):
        return self.extra(self, x)


TRAPS = {
    "conv called twice": (lambda m, x: m.norm(m.conv(x)) + m.conv(x), "conv is called more than once"),
    "one call is read twice": (lambda m, x: m.norm(h := m.conv(x)) + m.norm(m.conv(-x)) + h, "also read by add"),
    "norm of something else": (lambda m, x: m.norm(m.conv(x)) + m.norm(x), "does not read a layer"),
    "a copy is written": (lambda m, x: (h := m.conv(x), c := h.clone(), y := m.norm(h), y + c.add_(1))[3], "add_"),
    "result read twice": (lambda m, x: (h := m.conv(x), m.norm(h) + h)[1], "also read by add"),
    "result returned": (lambda m, x: torch.cat([h := m.conv(x), m.norm(h)]), "also read by cat"),
    "norm called twice": (lambda m, x: m.norm(m.norm(m.conv(x))), "called more than once"),
    "weight read elsewhere": (lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight), "shares its weight"),
    "activation between": (lambda m, x: m.norm(m.conv(x).relu_()), "does not read a layer"),
    "result is residual too": (lambda m, x: m.spare(m.norm(h := m.conv(x)) + h), "also read by add"),
    "a view is written": (lambda m, x: (h := m.conv(x), h.view(-1).mul_(2), m.norm(h))[2], "read"),
    "written after": (lambda m, x: (h := m.conv(x), y := m.norm(h), h.zero_(), y)[3], "also read by zero_"),
    "channels elsewhere": (lambda m, x: m.norm(m.conv(x[..., :3]).transpose(1, 3)), "another axis"),
    "weight changed before": (lambda m, x: m.norm(F.conv2d(x, m.conv.weight * 2)), "does not read a layer"),
    "cast between": (lambda m, x: m.norm(m.conv(x).float().double()), "does not read a layer"),
    "padded between": (lambda m, x: m.norm(F.pad(m.conv(x), (1, 1))), "does not read a layer"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    extra, reason = TRAPS[trap]
    check(trained(Block(extra)), torch.randn(2, 3, 4, 4).double(), {"norm": reason})


BETWEEN = {
    "nothing": lambda m, x: m.norm(m.conv(x)),
    "dropout in eval": lambda m, x: m.norm(F.dropout(m.conv(x), 0.5, m.training)),
    "a conversion to what it is": lambda m, x: m.norm(m.conv(x).to(x.dtype)),
    "the channels away and back": lambda m, x: m.norm(m.conv(x).transpose(1, 3).transpose(1, 3)),
    "a shape asked for": lambda m, x: (h := m.conv(x), m.norm(h.flatten(2).unsqueeze(-1)).view_as(h))[1],
    "checkpointing": lambda m, x: checkpoint(lambda t: m.norm(m.conv(t)), x, use_reentrant=False),
    "slices": lambda m, x: m.norm(m.conv(x)[:, :, 1:, ::2]),
    "copies": lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).clone()),
    "copies after": lambda m, x: m.conv(m.norm(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).clone()),
    "modules": lambda m, x: m.spare(nn.Dropout(0.5).eval()(m.norm(nn.Identity()(m.conv(x))))),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_pairs_are_found_through_what_changes_no_value(between):
    check(trained(Block(BETWEEN[between])), torch.randn(2, 3, 4, 4).double())


def test_a_scripted_model_is_refused():
    model = torch.jit.script(trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
    with pytest.raises(UserError, match="fold: a scripted model"):
        fold(model, (torch.randn(2, 3, 4, 4).double(),))


def test_functions_and_modules_the_example_does_not_reach():
    def both(m: Block, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var)

    model = trained(Block(both))
    check(model, torch.randn(2, 3, 4, 4).double(), {"norm": "does not reach", "F.batch_norm in the model": "function"})


class Foreign(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class ScaledConv(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)


def spoil(kind: str) -> tuple[nn.Module, str]:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    if kind == "weight norm":
        parametrizations.weight_norm(model[0])
        return trained(model), "computes its weight"
    if kind == "own forward":
        model[0] = ScaledConv(3, 3, 1)
        return trained(model), "a forward of its own"
    if kind == "foreign norm":
        model[1] = Foreign(3)
        return trained(model), "may do more"
    if kind == "no statistics":
        model[1] = nn.BatchNorm2d(3, track_running_stats=False)
        return trained(model), "no running statistics"
    if kind == "hook":
        model[0].register_forward_hook(lambda m, args, out: None)
        return trained(model), "hooks"
    if kind == "shared parameter":
        model[0].weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        model.append(nn.Conv2d(3, 3, 1))
        model[2].weight = model[0].weight
        return trained(model), "shares its weight"
    trained(model)[1].train()
    return model, "training mode"


@pytest.mark.parametrize(
    "kind", ["weight norm", "own forward", "foreign norm", "no statistics", "hook", "shared parameter"]
)
def test_layers_that_cannot_be_changed(kind):
    model, reason = spoil(kind)
    check(model, torch.randn(3, 3, 4, 4).double(), {"1": reason})


def test_training_mode_is_an_entry_in_the_report():
    model, reason = spoil("training")
    report = fold(model, torch.randn(3, 3, 4, 4).double()).report
    assert reason in report.stayed[0].reason
    assert "0 of 1 folded" in str(report)
    assert model[1].training


@pytest.mark.parametrize(
    ("forward", "compared"),
    [
        (lambda m, x: m.norm(m.conv(x)).argmax(1), 0),
        (lambda m, x: None if m.norm(m.conv(x)) is None else "no tensor", 0),
        (lambda m, x: m.norm(m.conv(x))[:0], 0),
        (lambda m, x: m.norm(m.conv(x)) * torch.nan, 0),
        (lambda m, x: {"y": m.norm(m.conv(x)), "label": x.argmax(1), "z": [x.sum()]}, 97),
    ],
    ids=["integers", "no tensor", "empty", "NaN", "some"],
)
def test_the_report_says_what_was_compared(forward, compared):
    report = fold(trained(Block(forward)), torch.randn(2, 3, 4, 4).double()).report
    assert len(report.folded) == 1
    assert report.compared == compared
    assert report.verified == bool(compared)
    expected = (
        "97 numbers in 2 outputs differ" if compared else "not verified: the outputs hold no floating-point number"
    )
    assert expected in str(report)
    assert compared or math.isnan(report.difference)


def test_a_fold_that_changes_an_integer_is_taken_back():
    class Asks(Block):
        def forward(self, x):
            return self.norm(self.conv(x)).argmax(1) * 0 + (self.conv.bias is None)

    model = trained(Asks(None))
    model.conv.register_parameter("bias", None)
    report = fold(model, torch.randn(2, 3, 4, 4).double()).report
    assert not report.folded
    assert "more than the tolerance" in report.stayed[0].reason


def test_a_fold_that_breaks_the_tolerance_is_taken_back():
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
            self.b, self.norm_b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            # Asks whether there is a bias: no trace of tensors says so.
            return self.norm_b(self.b(x)) + self.norm_a(self.a(x)) * (1 if self.a.bias is None else 2)

    model, x = trained(Fragile()), torch.randn(2, 3, 4, 4).double()
    folded, report = fold(model, x)
    assert [entry.norm for entry in report.stayed] == ["norm_a"]
    assert "more than the tolerance" in report.stayed[0].reason
    torch.testing.assert_close(folded(x), model(x))


def test_a_fold_beside_one_that_pads_is_taken_back():
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
            self.a, self.norm_a = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm_a(self.a(self.conv(self.norm(x)).relu())) * (1 if self.a.bias is None else 2)

    model, x = trained(Fragile()), torch.randn(2, 3, 4, 4).double()
    folded, report = fold(model, x)
    assert [entry.norm for entry in report.stayed] == ["norm_a"]
    torch.testing.assert_close(folded(x), model(x))


def test_a_pre_activation_net_keeps_what_it_must():
    model = trained(PreActivation())
    check(model, torch.randn(2, 3, 8, 8).double(), {"norm": "does not read", "last_norm": "does not read"})


def test_models_that_do_not_run_are_refused():
    with pytest.raises(UserError, match="fold: Sequential does not run"):
        fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), (torch.randn(2, 4, 4, 4),))


def test_float32_folds_within_its_tolerance_and_runs_exported():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = torch.randn(2, 3, 6, 6)
    folded, report = fold(model.float(), (x,))
    assert 0 < report.difference < 1e-5
    program = torch.export.export(folded, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def exported_nets() -> list[tuple[nn.Module, tuple[int, ...], int]]:
    """Networks, their inputs' shapes, and how many normalizations fold once exported."""
    first = [nn.Conv2d(4, 8, 3, padding="same", groups=2, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()]
    up = [nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(6)]
    last = [nn.Flatten(), nn.Linear(6 * 144, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)]
    shared = nn.Conv2d(3, 3, 1)
    return [
        (nn.Sequential(*first, *up, *last), (3, 4, 5, 5), 3),
        (nn.Sequential(shared, nn.BatchNorm2d(3), nn.ReLU(), shared, nn.BatchNorm2d(3)), (3, 3, 4, 4), 0),
        (PreActivation(), (3, 3, 8, 8), 0),
    ]


@pytest.mark.parametrize(("model", "shape", "count"), exported_nets())
def test_exported_programs(model, shape, count):
    model, x = trained(copy.deepcopy(model)), torch.randn(shape).double()
    program = torch.export.export(model, (x,))
    folded, report = fold(program, (x,))
    assert len(report.folded) == count, report
    assert len(report.entries) == sum(isinstance(m, _BatchNorm) for m in model.modules())
    other = torch.randn_like(x)
    torch.testing.assert_close(folded(other), model(other), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program.module()(other), model(other))
