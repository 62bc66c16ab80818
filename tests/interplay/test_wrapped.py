"""A `forward` that a tool replaced on the instance (accelerate's hooks, dispatchers), and `Module.compile`."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import batchnorm

from .nets import KINDS, Small, assert_same_calls, images, left_by, pair, stir


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Dynamo's own, where the input of a compiled part is computed
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def wrap(module: nn.Module, log: list) -> None:
    """As accelerate's `add_hook_to_module`: the old forward is kept, the new one is bound by `functools.partial`."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        log.append(type(module).__name__)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def test_a_wrapped_norm_is_left_alone_and_named():
    theirs = stir(Small().double())
    ours, log = copy.deepcopy(theirs), []
    wrap(ours.stem[1], log)
    kept = ours.stem[1]
    with pytest.warns(UserWarning, match=r"left alone: stem\.1 \(its forward was replaced or compiled\)"):
        batchnorm.convert(ours)
    assert ours.stem[1] is kept
    assert isinstance(ours.norm, batchnorm.BatchNorm2d)
    assert_same_calls(ours, theirs)
    assert log == ["BatchNorm2d"] * 2


def test_a_wrapped_norms_buffers_stay_in_eval():
    """The wrapper is bound to the module it was made of, so that one's mode must be the model's."""
    model = Small().double()
    wrap(model.norm, [])
    with pytest.warns(UserWarning, match="left alone"):
        batchnorm.convert(model)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    model(images())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_after_the_change(kind):
    """A wrapper put around a norm, an activation or a Sequential of a converted model is called each time."""
    theirs, ours = pair(kind)
    logs = []
    for model in (ours, theirs):
        logs.append([])
        for name in ("stem.1", "block.1.act", "norm", "head"):
            wrap(model.get_submodule(name), logs[-1])
    assert_same_calls(ours, theirs)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8


def test_a_wrapped_sequential_keeps_its_class():
    """Its wrapper is bound to nn.Sequential's own forward; the layers inside are ours."""
    theirs = stir(Small().double())
    ours, log = copy.deepcopy(theirs), []
    wrap(ours.stem, log)
    wrap(ours, log)
    batchnorm.convert(ours)
    assert type(ours.stem) is nn.Sequential
    assert isinstance(ours.stem[1], batchnorm.BatchNorm2d)
    assert_same_calls(ours, theirs)
    assert log == ["Small", "Sequential"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_revert_under_a_wrapper_of_the_whole(kind):
    theirs, ours = pair(kind)
    log = []
    wrap(ours, log)
    batchnorm.revert(ours)
    assert_same_calls(ours, theirs)
    assert log == ["Small"] * 2


@looks_at_grad
def test_a_compiled_norm_is_left_alone_and_named():
    theirs = stir(Small().double())
    ours = copy.deepcopy(theirs)
    ours.norm.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"left alone: norm \(its forward was replaced or compiled\)"):
        batchnorm.convert(ours)
    assert type(ours.norm) is nn.BatchNorm2d
    ours.eval()
    before = copy.deepcopy(ours.state_dict())
    left_by(ours, images())
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    assert_same_calls(ours, theirs)


@looks_at_grad
def test_a_compiled_sequential_keeps_its_class():
    theirs = stir(Small().double())
    ours = copy.deepcopy(theirs)
    ours.stem.compile(backend="eager")
    batchnorm.convert(ours)
    assert type(ours.stem) is nn.Sequential
    assert_same_calls(ours, theirs)


@looks_at_grad
@pytest.mark.parametrize(
    ("kind", "part"),
    [("convert", ""), ("convert", "stem"), ("convert", "block.1"), ("convert", "norm"), ("composite", ""),
     ("composite", "block.1")],
)  # fmt: skip
def test_compile_after_the_change(kind, part):
    theirs, ours = pair(kind)
    ours.get_submodule(part).compile(backend="aot_eager", fullgraph=True)
    assert_same_calls(ours, theirs, modes=(True, False, True))


def test_compiled_before_convert_as_a_whole():
    """The compiled call of the whole model sees the new layers, since it is made anew when they change."""
    theirs = stir(Small().double())
    ours = copy.deepcopy(theirs)
    ours.compile(backend="eager")
    assert_same_calls(ours, theirs)
    batchnorm.convert(ours)
    assert_same_calls(ours, theirs)
    batchnorm.revert(ours)
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("part", ["norm", "stem", "block.1"])
@pytest.mark.parametrize("kind", KINDS)
def test_revert_leaves_alone_what_was_wrapped_after_the_change(kind, part):
    """The wrapper is bound to the module of ours, whose mode and class have to go on being the model's."""
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        wrap(model.get_submodule(part), [])
    held = type(ours.get_submodule(part))
    if held in (nn.Sequential, nn.BatchNorm2d):  # torch's own, which revert has nothing to do with
        batchnorm.revert(ours)
    else:
        with pytest.warns(UserWarning, match=rf"revert: left alone: {part} \(its forward was replaced or compiled\)"):
            batchnorm.revert(ours)
    assert type(ours.get_submodule(part)) is held
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        assert_same_calls(ours, theirs)
