"""A converted `nn.Sequential`: pairs in one operator by its own call, whatever happens to its children afterwards."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import convert, revert
from tests.test_norm_act import operators


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh()
    ).double()
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.running_mean)
    return model


X = torch.randn(4, 3, 8, 8, dtype=torch.float64)


def unchanged(model, original, x=X):
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), original.train(training)(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), original.state_dict())


def test_pairs_run_as_one_operator():
    original, model = net(), convert(net())
    assert operators(model, X) == ["silu", "tanh"]
    unchanged(convert(net()), original)


CHANGES = {
    "activation replaced": (lambda m: m.__setitem__(2, nn.GELU()), ["", "tanh"]),
    "normalization replaced": (lambda m: m.__setitem__(1, nn.Identity()), ["tanh"]),
    "something between": (lambda m: m.insert(2, nn.Dropout(0.0)), ["", "tanh"]),
    "appended": (lambda m: m.append(nn.ReLU()), ["silu", "tanh"]),
    "removed": (lambda m: m.pop(2), ["", "tanh"]),
    "hook": (lambda m: m[1].register_forward_hook(lambda *_: None) and None, ["", "tanh"]),
    "a hook that changes": (
        lambda m: m[1].register_forward_hook(lambda mod, args, out: 2 * out) and None,
        ["", "tanh"],
    ),
    "pruned": (lambda m: prune.l1_unstructured(m[1], "weight", 0.5), ["", "tanh"]),
    "re-typed": (lambda m: setattr(m[2], "__class__", nn.Sigmoid), ["sigmoid", "tanh"]),
    "wrapped": (lambda m: setattr(m[1], "forward", partial(m[1].forward)), ["", "tanh"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_children_is_respected(change):
    do, wanted = CHANGES[change]
    original, model = net(), convert(net())
    do(original)
    do(model)
    unchanged(model, original)
    assert operators(model.train(), X) == wanted


def test_slices_and_concatenation():
    original, model = net(), convert(net())
    unchanged(model[:3], original[:3])
    unchanged(model[:2], original[:2])
    unchanged(model[:3] + model[3:], original[:3] + original[3:])
    assert operators(model[:3].train(), X) == ["silu"]


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_call(change):
    model = change(convert(net()))
    assert operators(model, X) == ["silu", "tanh"]
    assert type(model) is type(convert(net()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(X), copy.deepcopy(model)(X))
    assert type(revert(model)) is nn.Sequential


class Block(nn.Sequential):
    """As torchvision's Conv2dNormActivation: a Sequential with arguments of its own."""

    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.out_channels = channels


def test_subclasses_of_sequential_keep_their_class():
    model = convert(nn.ModuleList([Block(3)]))[0]
    assert isinstance(model, Block)
    assert type(model).__name__ == "Block"
    assert model.out_channels == 3
    assert operators(model, torch.randn(2, 3, 4, 4)) == ["relu"]
    assert type(revert(model)) is Block


def test_an_attribute_of_any_name_is_no_reason_to_refuse():
    model = nn.Sequential(net())
    model._c, model[0].inplace, model[0].options = object(), "mine", "mine"
    convert(model)
    assert (model[0].inplace, model[0].options) == ("mine", "mine")
    unchanged(model, nn.Sequential(net()))


def test_fuse_sequential_false_leaves_the_class():
    model = convert(net(), fuse_sequential=False)
    assert type(model) is nn.Sequential
    assert operators(model, X) == ["", ""]


def test_a_wrapped_forward_is_left_alone_and_named():
    model, original = net(), net()
    model[1].forward = partial(model[1].forward)
    model[4].compile(backend="eager")
    with pytest.warns(UserWarning, match=r"left alone: 1 \(its forward was replaced or compiled\), 4 \("):
        convert(model)
    assert type(model[1]) is type(model[4]) is nn.BatchNorm2d
    unchanged(model, original)
    whole = net()
    whole.forward = partial(whole.forward)
    convert(whole)
    assert type(whole) is nn.Sequential
    unchanged(whole, net())


def test_scripting_says_to_revert_first():
    model = convert(nn.ModuleDict({"body": net()}))
    for part in (model, model["body"], model["body"][1], batchnorm.BatchNormAct2d(3)):
        with pytest.raises(UserError, match=r"script batchnorm\.revert\(model\)") as caught:
            torch.jit.script(part)
        assert "\n" not in str(caught.value)
    scripted = torch.jit.script(revert(model)["body"].eval())
    torch.testing.assert_close(scripted(X), net().eval()(X))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_and_exported(training):
    torch._dynamo.reset()
    original, model = net().train(training), convert(net()).train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), copy.deepcopy(original)(X))
    program = torch.export.export(copy.deepcopy(model), (X,))
    torch.testing.assert_close(program.module()(X), copy.deepcopy(original)(X))
    stacks = [node.meta.get("nn_module_stack", {}) for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert [list(stack.values())[-1][0].removeprefix("L['self'].") for stack in stacks] == ["1", "4"]


def test_revert_gives_back_a_composite_as_a_sequential_with_the_same_keys():
    model = nn.ModuleDict({"a": batchnorm.BatchNormAct2d(3, "leaky_relu", negative_slope=0.3)}).eval()
    keys, x = list(model.state_dict()), torch.randn(2, 3, 4, 4)
    want = model["a"](x)
    revert(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model["a"]] == [nn.BatchNorm2d, nn.LeakyReLU]
    torch.testing.assert_close(model["a"](x), want)
    root = batchnorm.BatchNormAct2d(3)
    assert type(revert(root)[0]) is nn.BatchNorm2d


def test_revert_keeps_a_composites_hooks_and_what_a_user_put_on_it():
    model = nn.Sequential(batchnorm.BatchNormAct2d(3, "silu"))
    handle = model[0].register_forward_hook(lambda module, args, out: out * 0.5)
    model[0].note = "mine"
    x = torch.randn(2, 3, 4, 4)
    want = model(x)
    revert(model)
    torch.testing.assert_close(model(x), want)
    assert model[0].note == "mine"
    assert not hasattr(model[0], "inplace")
    handle.remove()
    torch.testing.assert_close(model(x), want * 2)
