"""Tools that fold a batch normalization into the convolution before it."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm

from .nets import KINDS, assert_same, images, left_by, pair, stir

eager_mode = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")  # its own


def assert_same_eval(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-10) -> None:
    x = images(dtype=next(theirs.parameters()).dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_fuse_conv_bn_eval(kind):
    """As in torchvision-era scripts: whatever isinstance calls a BatchNorm2d is folded and becomes an Identity."""
    theirs, ours = (model.eval() for model in pair(kind))
    original, folded = copy.deepcopy(theirs), 0
    for parent in list(ours.modules()):
        children = list(parent.named_children())
        for (before, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(conv, norm))
                setattr(parent, name, nn.Identity())
                folded += 1
            if isinstance(conv, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                setattr(parent, before, fuse_linear_bn_eval(conv, norm))
                setattr(parent, name, nn.Identity())
                folded += 1
    assert folded == 3
    assert_same_eval(ours, original)
    assert_same_eval(batchnorm.revert(ours), original)


def mmcvs_fuse_conv_bn():
    """From its file: the package itself would import OpenCV."""
    found = importlib.util.find_spec("mmcv")
    if found is None:
        pytest.skip("mmcv is not installed")
    path = Path(found.submodule_search_locations[0]) / "cnn" / "utils" / "fuse_conv_bn.py"
    spec = importlib.util.spec_from_file_location("mmcv_fuse_conv_bn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fuse_conv_bn


@pytest.mark.parametrize("kind", KINDS)
def test_mmcvs(kind):
    fuse_conv_bn = mmcvs_fuse_conv_bn()
    theirs, ours = pair(kind)
    original = copy.deepcopy(theirs)
    ours, theirs = fuse_conv_bn(ours.eval()), fuse_conv_bn(theirs.eval())
    identities = [sum(isinstance(m, nn.Identity) for m in model.modules()) for model in (ours, theirs)]
    assert identities == [2, 2]  # a norm in a block of its own has no convolution before it there
    assert_same_eval(ours, original)
    ours.train()  # nothing of ours is left before the activation, which still runs
    assert ours.stem(images()).min() == 0


GROUPS = [["0", "1"], ["0", "1", "2"]]


def conv_norm_act() -> nn.Sequential:
    return stir(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def fused_alike(fuse, group: list[str], training: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours fused, torch's fused, and torch's as it was; both have become the same modules."""
    theirs = conv_norm_act().double().train(training)
    ours, fused = fuse(batchnorm.convert(copy.deepcopy(theirs)), group), fuse(theirs, group)
    assert [type(m) for m in ours] == [type(m) for m in fused]
    return ours, fused, theirs


@eager_mode
@pytest.mark.parametrize("group", GROUPS, ids=len)
def test_eager_fuse_modules(group):
    ours, _, theirs = fused_alike(fuse_modules, group, training=False)
    assert_same_eval(ours, theirs)


@eager_mode
@pytest.mark.parametrize("group", GROUPS, ids=len)
def test_eager_fuse_modules_for_qat(group):
    """The fused module still holds the norm, which goes on training."""
    ours, fused, _ = fused_alike(fuse_modules_qat, group, training=True)
    x = images()
    for training in (True, True, False):
        assert_same(left_by(ours.train(training), x), left_by(fused.train(training), x))


@eager_mode
@pytest.mark.parametrize("kind", KINDS)
def test_eager_fuse_modules_by_name(kind):
    """Names inside a network, and a composite's children, which have names too."""
    theirs, ours = pair(kind)
    names = [["stem.0", "stem.1", "stem.2"], ["block.0", "block.1.norm", "block.1.act"], ["head.1", "head.2"]]
    ours, fused = fuse_modules(ours.eval(), names), fuse_modules(theirs.eval(), names)
    assert_same_eval(ours, fused)
    assert_same_eval(ours, theirs)


@eager_mode
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_eager_fuse_modules_of_every_dimension(norm):
    dims = int(norm.__name__[-2])
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](2, 3, 1)
    theirs = stir(nn.Sequential(conv, norm(3))).double().eval()
    ours = fuse_modules(batchnorm.convert(copy.deepcopy(theirs)), ["0", "1"])
    x = torch.randn(2, 2, *[4] * dims).double()
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours[1], nn.Identity)
