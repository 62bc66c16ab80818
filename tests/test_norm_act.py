"""BatchNormAct: one operator while nobody looks between its children, and the children in turn otherwise."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from batchnorm.options import NAMES
from batchnorm.pairs import MODULES
from tests.oracle import ACTIVATION, close, truth


class Operators(TorchDispatchMode):
    """The batch normalizations that run, each with the activation inside its operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("batchnorm::") and "forward" in name:
            self.seen.append(next(a for a in args if isinstance(a, str)))
        return func(*args, **(kwargs or {}))


def operators(layer, *arguments):
    with Operators() as log:
        layer(*arguments)
    return log.seen


def stirred(**keywords):
    layer = BatchNormAct2d(3, "silu", dtype=torch.float64, **keywords)
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
        nn.init.normal_(tensor)
    return layer


def step(layer, x, residual, g):
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    out = layer(*leaves)
    grads = torch.autograd.grad(out, [*leaves, *layer.parameters()], g)
    return [out.detach(), *grads, *(b.clone() for b in layer.buffers())]


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OwnForward(BatchNorm2d):
    def forward(self, input, mask=None, domain=None):
        return super().forward(input, mask, domain)


LOOKS = {
    "hook on norm": lambda m: m.norm.register_forward_hook(lambda *_: None),
    "pre-hook on norm": lambda m: m.norm.register_forward_pre_hook(lambda *_: None),
    "backward hook on norm": lambda m: m.norm.register_full_backward_hook(lambda *_: None),
    "hook on act": lambda m: m.act.register_forward_hook(lambda *_: None),
    "wrapped norm": lambda m: setattr(m.norm, "forward", m.norm.forward),
    "wrapped act": lambda m: setattr(m.act, "forward", m.act.forward),
    "compiled norm": lambda m: m.norm.compile(backend="eager"),
    "subclass": lambda m: setattr(m.norm, "__class__", OwnForward),
    "parametrized": lambda m: parametrize.register_parametrization(m.norm, "weight", nn.Identity()),
    "pruned": lambda m: prune.identity(m.norm, "weight"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("training", [True, False])
def test_who_looks_between_finds_the_children_and_the_values_stay(look, training):
    torch._dynamo.reset()
    layer = stirred().train(training)
    watched = copy.deepcopy(layer)
    LOOKS[look](watched)
    x, residual, g = (torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3))
    found, want = (step(m, x, residual, g) for m in (watched, layer))
    for a, b in zip(found[:3], want[:3], strict=True):  # pruning and parametrization reorder the parameters
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    if training and look != "compiled norm":
        assert operators(layer, x, residual) == ["silu"]
        assert operators(watched, x, residual) == [""]


def test_hooks_for_all_modules_see_the_children():
    layer, seen = stirred(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    layer(torch.randn(4, 3, 5, 5, dtype=torch.float64))
    handle.remove()
    assert seen == ["BatchNorm2d", "SiLU", "BatchNormAct2d"]


def test_replaced_children_are_called():
    layer, x, residual = stirred().eval(), *(torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(2))
    normalized = layer.norm(x)
    layer.act = nn.GELU()
    torch.testing.assert_close(layer(x, residual), nn.functional.gelu(normalized + residual))
    layer.norm = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm)
    torch.testing.assert_close(layer(x, residual), nn.functional.gelu(normalized + residual))
    layer.norm = nn.Identity()
    torch.testing.assert_close(layer(x), nn.functional.gelu(x))


@pytest.mark.parametrize("activation", list(ACTIVATION))
@pytest.mark.parametrize(("kind", "shape"), [(BatchNormAct1d, (6, 3)), (BatchNormAct3d, (4, 3, 2, 3, 2))])
def test_every_activation_is_its_module_s(kind, shape, activation):
    layer, x, r, g = kind(3, activation or None), *(torch.randn(shape) for _ in range(3))
    assert type(layer.act) is {word: module for module, word in MODULES.items()}[activation]
    want = truth(x, grad_output=g, residual=r, activation=activation)
    leaf = x.clone().requires_grad_()
    out = layer(leaf, r)
    out.backward(g)
    close(out, want.out, torch.float32)
    close(leaf.grad, want.grads["input"], torch.float32, 8)


def test_a_relu6_with_another_bound_is_not_taken_for_one():
    layer = BatchNormAct2d(3, "relu6").eval()
    layer.act.max_val = 1.0
    assert layer(torch.full((2, 3, 2, 2), 9.0)).max() == 1.0


def test_mask_domain_and_options_reach_the_norm():
    layer = BatchNormAct1d(3, None, domains=2, momentum=1.0)
    x, mask = torch.randn(8, 3), torch.tensor([True] * 5 + [False] * 3)
    layer(x, None, mask, 1)
    torch.testing.assert_close(layer.norm.memory(1).running_mean, x[:5].mean(0))
    assert layer.norm.num_batches_tracked == 0


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(change):
    layer, x = stirred(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(change(layer)(x), copy.deepcopy(layer)(x))
    assert list(layer.state_dict()) == [f"norm.{name}" for name in nn.BatchNorm2d(3).state_dict()]


SIX = [BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d]


@pytest.mark.parametrize("kind", SIX)
def test_signatures_and_help_name_every_keyword(kind):
    parameters = inspect.signature(kind).parameters
    assert set(NAMES) <= set(parameters)
    assert all(name in kind.__doc__ for name in [*parameters][1:])
    for heading in (".. math::", "Shape and dtype:", "Args:", "Returns:", "Raises:", "Source:"):
        assert heading in kind.__doc__
