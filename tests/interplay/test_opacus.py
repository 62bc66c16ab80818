"""Opacus: its validator and its fixer go by the exact type, in tables."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import batchnorm

from .nets import KINDS, Small, images, our_block, pair


@pytest.fixture
def validator(monkeypatch):
    """With the tables as Opacus has them when it was just imported, whatever other tests made before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at its import
        found = pytest.importorskip("opacus.validators").ModuleValidator
    for table in (found.VALIDATORS, found.FIXERS):
        for kind in [kind for kind in table if kind.__module__.startswith("batchnorm")]:
            monkeypatch.delitem(table, kind)
    return found


NAMES = {"stem.1", "block.1.norm", "norm", "head.2"}


@pytest.mark.parametrize("kind", KINDS)
def test_validate_finds_every_norm(validator, kind):
    theirs, ours = pair(kind)
    found, expected = (validator.validate(model.train(), strict=False) for model in (ours, theirs))
    assert len(expected) == len(NAMES)
    assert len(found) == len(expected)
    assert not validator.is_valid(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_fix_puts_a_group_norm_in_every_place(validator, kind):
    theirs, ours = pair(kind, torch.float32)
    fixed = validator.fix(ours)
    assert {name for name, m in fixed.named_modules() if isinstance(m, nn.GroupNorm)} == NAMES
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fixed.modules())
    assert validator.is_valid(fixed)
    reference = validator.fix(theirs)
    reference.load_state_dict(fixed.state_dict())
    x = images(dtype=torch.float32)
    torch.testing.assert_close(fixed(x), reference(x))


def test_layers_made_here_are_found_too(validator):
    """Nothing was converted, and Opacus was imported after batchnorm but before the layers were made."""
    model = Small(our_block)
    model.norm = batchnorm.BatchNorm2d(4)
    assert {"BatchNorm" in str(error) for error in validator.validate(model, strict=False)} == {True}
    assert len(validator.validate(model, strict=False)) == len(NAMES)


def test_revert_first(validator):
    _, ours = pair("convert")
    assert len(validator.validate(batchnorm.revert(ours), strict=False)) == len(NAMES)
