"""What is done to the children of a converted Sequential or a composite is respected; and a model is carried around."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import batchnorm

from .nets import KINDS, assert_same, assert_same_calls, images, left_by, pair

CHILDREN = ["stem.0", "stem.1", "stem.2", "block.1", "block.1.norm", "block.1.act", "norm", "head", "head.2", "head.3"]


def hooked(model: nn.Module, name: str, kind: str, log: list) -> object:
    module = model.get_submodule(name)
    if kind == "pre":
        return module.register_forward_pre_hook(lambda m, args: log.append(args[0].detach().clone()))
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: log.append(out.detach().clone()))
    if kind == "backward pre":
        return module.register_full_backward_pre_hook(lambda m, grads: log.append(grads[0].clone()))
    return module.register_full_backward_hook(lambda m, grad_in, grad_out: log.extend((grad_in[0], grad_out[0])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["pre", "forward", "backward pre", "backward"])
@pytest.mark.parametrize("name", CHILDREN)
def test_hooks_see_what_torchs_own_see(kind, hook, name):
    """In training and eval; and after their removal the model is as before."""
    theirs, ours = pair(kind)
    logs = ([], [])
    handles = [hooked(model, name, hook, log) for model, log in zip((ours, theirs), logs, strict=True)]
    assert_same_calls(ours, theirs)
    assert len(logs[0]) == (4 if hook == "backward" else 2)
    torch.testing.assert_close(*logs, rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.remove()
    assert_same_calls(ours, theirs)
    assert len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stem.1", "stem.2", "block.1.norm", "block.1.act"])
def test_hooks_that_change_what_passes(kind, name):
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        module.register_forward_hook(lambda m, args, out: out + 1)
        module.register_full_backward_hook(lambda m, grad_in, grad_out: (grad_in[0] * 3,))
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_all_modules(kind):
    """torch's global hooks, as profilers and loggers set them."""
    logs = []
    for model in reversed(pair(kind)):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, s=seen: s.append(type(m).__name__)
        )  # fmt: skip
        try:
            model(images())
        finally:
            handle.remove()
        logs.append([name for name in seen if name != "BatchNormAct2d"])
    expected = list(logs[1])
    if kind == "composite":
        expected.remove("Sequential")  # the block's own, which is a composite here
    assert sorted(logs[0]) == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_slices(kind):
    """A slice is a Sequential of the same children, at whatever place it cuts."""
    theirs, ours = pair(kind)
    for part in (slice(0, 2), slice(1, 3), slice(2, 3), slice(None)):
        x = images() if part.start in (0, None) else torch.randn(6, 4, 4, 4, dtype=torch.float64)
        assert isinstance(ours.stem[part], nn.Sequential)
        assert_same(left_by(ours.stem[part], x), left_by(theirs.stem[part], x))
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("stem.2", nn.GELU()),
        ("block.1.act", nn.GELU()),
        ("block.1.act", nn.Identity()),
        ("stem.1", nn.Identity()),
        ("block.1.norm", nn.InstanceNorm2d(4)),
        ("block.1.act", nn.LeakyReLU(-0.5)),
        ("head.3", nn.Sequential(nn.Tanh(), nn.Tanh())),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_modules_in_a_childs_place(kind, name, new):
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        model.set_submodule(name, copy.deepcopy(new))
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_relu_becomes_a_gelu(kind):
    """The recipe that walks over all modules and goes by the type finds each of them."""
    theirs, ours = pair(kind)
    found = []
    for model in (ours, theirs):
        found.append(sorted(name for name, module in model.named_modules() if isinstance(module, nn.ReLU)))
        for name in found[-1]:
            model.set_submodule(name, nn.GELU())
    assert found[0] == found[1] == ["block.1.act", "stem.2"]
    assert_same_calls(ours, theirs)


def test_a_sequential_grows_and_shrinks():
    theirs, ours = pair("convert")
    for model in (ours, theirs):
        model.stem.append(nn.Dropout(0.0))
        model.stem.insert(2, nn.Tanh())
        del model.head[3]
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind, training):
    """Under bfloat16 the norms see bfloat16 with float32 parameters, as torch's do: dtypes are equal, values near."""
    theirs, ours = (model.train(training) for model in pair(kind, torch.float32))
    x, results, dtypes = images(dtype=torch.float32), [], []
    for model in (ours, theirs):
        seen = []
        handles = [
            model.get_submodule(name).register_forward_hook(lambda m, args, out, s=seen: s.append(out.dtype))
            for name in ("stem", "block.1", "norm", "act")
        ]
        with torch.autocast("cpu", torch.bfloat16):
            results.append(left_by(model, x))
        dtypes.append(seen)
        for handle in handles:
            handle.remove()
    assert dtypes[0] == dtypes[1]
    ours_left, theirs_left = results
    assert ours_left.keys() == theirs_left.keys()
    assert {k: v.dtype for k, v in ours_left.items()} == {k: v.dtype for k, v in theirs_left.items()}
    for name, value in theirs_left.items():
        if not name.endswith("num_batches_tracked"):
            scale = max(value.float().abs().max().item(), 0.1)
            error = (ours_left[name].float() - value.float()).abs().max().item()
            assert error < 0.1 * scale, name  # 2⁻⁸ a rounding, through six layers


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded, copy.copy]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", COPIES, ids=["deepcopy", "pickle", "torch.save", "copy"])
def test_copies(kind, change):
    theirs, ours = pair(kind)
    other = change(ours)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert_same_calls(other, theirs)
    assert type(batchnorm.revert(other).stem) is nn.Sequential
    assert_same_calls(other, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_state_travels_both_ways(kind):
    """Checkpoints of one load into the other, with the safe loader too."""
    theirs, ours = pair(kind)
    for source, target in ((ours, theirs), (theirs, ours)):
        left_by(source, images())
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_same(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_moves(kind):
    """`apply`, `to`, `half`, `requires_grad_` and `to_empty` walk the children as in any module."""
    theirs, ours = pair(kind)
    names = []
    ours.apply(lambda m: names.append(type(m).__name__))
    assert len(names) == len(list(theirs.modules()))
    assert {p.dtype for p in ours.bfloat16().parameters()} == {torch.bfloat16}
    assert ours(images(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(p.is_meta for p in ours.to("meta").parameters())
    ours.to_empty(device="cpu").double().load_state_dict(theirs.state_dict())
    assert_same_calls(ours, theirs)
