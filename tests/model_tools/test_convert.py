"""`convert` and `revert`: the same tensors, the same numbers, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import convert, revert
from batchnorm.model_tools.freeze import is_frozen, unfreeze

from .nets import PreActivation, Residual, Unregistered

ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.Sigmoid(), nn.Tanh()]


def sequential(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    act = activation or nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act, nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5, affine=False),
        nn.Tanh(), nn.Linear(5, 2),
    ).double()  # fmt: skip


def steps(model: nn.Module, example: torch.Tensor, count: int = 3) -> list[torch.Tensor]:
    """Everything that training leaves behind: outputs, gradients, parameters and buffers."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    left = []
    for _ in range(count):
        optimizer.zero_grad()
        y = model(torch.randn(example.shape, generator=generator, dtype=example.dtype))
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
        left += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return left + [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        *((sequential(act), torch.randn(6, 3, 8, 8).double()) for act in ACTIVATIONS),
        (PreActivation().double(), torch.randn(6, 3, 8, 8).double()),
        (Residual().double().eval(), torch.randn(6, 3, 8, 8).double()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_training_goes_on_as_it_would_have(model, example):
    original = copy.deepcopy(model)
    converted = convert(model)
    assert converted is model
    for ours, theirs in zip(steps(converted, example), steps(original, example), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    reverted = revert(converted)
    assert repr(reverted) == repr(original)
    for ours, theirs in zip(steps(reverted, example), steps(original, example), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_tensors_are_the_same_objects_and_keys_stay():
    model = sequential()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for change in (convert, revert):
        change(model)
        assert list(model.state_dict()) == [*copy.deepcopy(sequential()).state_dict()]
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(b is buffers[name] for name, b in model.named_buffers())


def test_a_sequential_keeps_its_children_and_runs_pairs_by_its_call():
    model = sequential(nn.LeakyReLU(0.3))
    children = list(model)
    convert(model)
    assert [type(m).__name__ for m in model] == [type(m).__name__ for m in children]
    assert all(now is before for now, before in zip(model, children, strict=True) if "Norm" not in type(now).__name__)
    assert isinstance(model, nn.Sequential)
    assert type(model).__name__ == "Sequential"
    assert operators(model) == ["leaky_relu", "tanh"]
    assert type(revert(model)) is nn.Sequential
    assert all(now is before for now, before in zip(model, children, strict=True) if "Norm" not in type(now).__name__)


def operators(model: nn.Module) -> list[str]:
    """The activations inside the operators that a training call runs."""
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.batchnorm.forward_update_running_.default:
                seen.append(args[11])
            return func(*args, **(kwargs or {}))

    with Log():
        model(torch.randn(6, 3, 8, 8).double())
    return seen


def test_activations_stay_where_a_hook_looks_on_or_the_layer_stands_elsewhere():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.block = nn.Sequential(self.norm, nn.ReLU())

        def forward(self, x):
            return self.block(x), self.norm(x)

    model, x, seen = Both(), torch.randn(5, 4), []
    original = copy.deepcopy(model)
    hooked = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    handle = hooked[0].register_forward_hook(lambda m, args, out: seen.append(out.min().item()))
    convert(nn.ModuleList([model, hooked]))
    for ours, theirs in zip(model(x), original(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    hooked(x)
    assert seen[0] < 0
    handle.remove()
    hooked(x)
    assert len(seen) == 1


class Own(nn.Sequential):
    def forward(self, x):
        return self[1](x) + self[0](x)


def test_a_sequential_with_a_forward_of_its_own_keeps_its_activations():
    model, x = Own(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(5, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(convert(model)(x), expected)


def test_shared_modes_flags_and_devices():
    shared = nn.BatchNorm1d(4).eval()
    shared.weight.requires_grad_(False)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "meta": nn.BatchNorm3d(2, device="meta")})
    convert(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], batchnorm.BatchNorm1d)
    assert not model["a"].training
    assert not model["a"].weight.requires_grad
    assert model["meta"].running_mean.is_meta


def test_a_root_is_returned_anew_with_the_same_tensors():
    root = nn.BatchNorm2d(3, eps=1e-3, momentum=None).half()
    new = convert(root)
    assert type(new) is batchnorm.BatchNorm2d
    assert new.weight is root.weight
    assert new.running_var is root.running_var
    assert (new.eps, new.momentum, new.weight.dtype) == (1e-3, None, torch.float16)
    assert type(revert(new)) is nn.BatchNorm2d


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_copy_and_save(change):
    model, x = convert(sequential()), torch.randn(6, 3, 8, 8).double()
    other = change(model)
    torch.testing.assert_close(other(x), model(x))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    sequential().load_state_dict(torch.load(file, weights_only=True))
    assert type(revert(other)[2]) is nn.ReLU


def test_lazy_layers_become_lazy_layers_of_ours():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    convert(model)
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    assert nn.parameter.is_lazy(model[1].weight)
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    assert type(model[1]) is batchnorm.BatchNorm2d
    assert y.min() == 0
    lazy = revert(convert(nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU())))
    assert type(lazy[0]) is nn.LazyBatchNorm1d
    assert type(lazy[1]) is nn.ReLU


class Foreign(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: γ, β and the statistics are buffers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-4
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_other_libraries_layers_are_left_alone_and_named():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Foreign(3)))
    with pytest.warns(UserWarning, match=r"left alone.*1\.0 \(.*Foreign\)"):
        convert(model)
    assert type(model[1][0]) is Foreign
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(revert(model)[1][0]) is Foreign


def test_torchvisions_frozen_layer_becomes_a_frozen_one_of_ours():
    original, x = FrozenBatchNorm2d(3), torch.randn(2, 3, 4, 4)
    model = convert(nn.Sequential(original, nn.ReLU()))
    assert isinstance(model[0], batchnorm.BatchNorm2d)
    assert is_frozen(model[0])
    assert not list(model.parameters())
    assert model.state_dict().keys() == {f"0.{key}" for key in original.state_dict()}
    torch.testing.assert_close(model.train()(x), original(x).relu())
    torch.testing.assert_close(copy.deepcopy(model)(x), original(x).relu())
    assert revert(model)[0] is original


class CountedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """As detectron2's converter makes them: the counter of the layer before is handed on."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("num_batches_tracked", torch.tensor(7))


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, CountedFrozenBatchNorm2d])
@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_converted_frozen_layer_takes_an_ordinary_checkpoint(kind, thawed, assign):
    """Also after a copy, another conversion and `unfreeze`; and the way back hands on what was loaded."""
    ordinary, x = nn.Sequential(nn.BatchNorm2d(3, eps=1e-4)).double().eval(), torch.randn(2, 3, 4, 4).double()
    ordinary[0].running_mean.normal_()
    model = copy.deepcopy(convert(nn.Sequential(kind(3)))).double()
    convert(model, nonfinite="skip")
    convert(model, nonfinite="propagate")
    if thawed:
        unfreeze(model)
    keys = list(model.state_dict())
    model.load_state_dict(ordinary.state_dict(), assign=assign)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model.eval()(x), ordinary(x))
    assert type(revert(model)[0]) is kind
    torch.testing.assert_close(model(x), ordinary(x))


def test_a_counter_of_a_frozen_layer_stays():
    model = convert(nn.Sequential(CountedFrozenBatchNorm2d(3)))
    assert is_frozen(model[0])
    model.train()(torch.randn(2, 3, 4, 4))
    assert model.state_dict()["0.num_batches_tracked"] == 7


class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):
    """As in transformers: ε stands in the forward."""

    def __init__(self, features: int, factor: float = 1.0) -> None:
        super().__init__(features)
        del self.eps
        self.factor = factor

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 3e-4).rsqrt()
        return x * scale * self.factor + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)


def test_frozen_layers_that_hide_their_eps_are_asked_for_it():
    original, x = DetrFrozenBatchNorm2d(3), torch.randn(2, 3, 4, 4)
    model = convert(nn.Sequential(original))
    assert is_frozen(model[0])
    assert model[0].eps == 3e-4
    torch.testing.assert_close(model(x), original(x))
    assert revert(model)[0] is original


def test_a_frozen_layer_that_does_more_is_left_alone_and_named():
    model = nn.Sequential(DetrFrozenBatchNorm2d(3, factor=2.0))
    with pytest.warns(UserWarning, match=r"left alone.*0 \(.*DetrFrozenBatchNorm2d\)"):
        convert(model)
    assert type(model[0]) is DetrFrozenBatchNorm2d


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_part_in_torchscript_is_left_alone_and_named():
    """Its tables are no dicts of Python's, and its class has no forward to look at."""
    part = torch.jit.trace(nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4))
    model, x = nn.Sequential(part, nn.ReLU()), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=r"left alone: 0 \("):
        assert convert(model) is model
    assert model[0] is part
    torch.testing.assert_close(model(x), part(x).relu())


def test_a_part_that_a_plain_dict_holds_is_left_alone_and_named():
    model = nn.Sequential(Unregistered(), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"left alone: 0.held.1 \(not registered as a submodule\)"):
        convert(model)
    assert type(model[0].held["a"][0][1]) is nn.BatchNorm1d
    assert type(model[1]) is batchnorm.BatchNorm1d


def test_an_activation_of_its_own_becomes_a_sequential():
    model = nn.Sequential(batchnorm.BatchNormAct1d(4, "silu"))
    x = torch.randn(5, 4)
    expected = copy.deepcopy(model)(x)
    revert(model)
    assert [type(m) for m in model[0]] == [nn.BatchNorm1d, nn.SiLU]
    torch.testing.assert_close(model(x), expected)


def test_unknown_keywords_are_refused_before_anything_changes():
    model = sequential()
    with pytest.raises(UserError, match=r"convert takes no activation: .*BatchNormAct2d"):
        convert(model, activation="relu")
    assert type(model[1]) is nn.BatchNorm2d


def test_sync_batch_norm_becomes_one_of_ours_that_runs_anywhere_and_goes_back():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()))
    convert(model)
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    assert model[1].process_group == "world"
    assert model(torch.randn(2, 3, 5)).min() == 0
    assert type(revert(model)[1]) is nn.SyncBatchNorm
    assert model[1].process_group is None


def test_keywords_are_set_on_all_layers_and_torch_cannot_express_them():
    model, x = nn.Sequential(nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3), nn.LazyBatchNorm1d()), torch.randn(6, 3)
    weights = [m.weight for m in model]
    convert(model, ghost_batch_size=3, nonfinite="skip")
    assert [m.ghost_batch_size for m in model] == [3, 3, 3]
    assert all(m.weight is weight for m, weight in zip(model, weights, strict=True))
    expected = torch.cat([nn.functional.batch_norm(part, None, None, training=True) for part in x.split(3)])
    torch.testing.assert_close(model[0](x), expected)
    with pytest.raises(UserError, match=r"revert: 0 has ghost_batch_size=3.*set it to None first"):
        revert(model)
    convert(model, ghost_batch_size=None, nonfinite="propagate")
    assert {type(m) for m in revert(model)} == {nn.BatchNorm1d, nn.LazyBatchNorm1d}
    assert model[0].state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()


def test_a_value_that_one_layer_refuses_changes_none():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="accumulation_steps"):
        convert(model, accumulation_steps=2)
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm1d]
