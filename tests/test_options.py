"""The options: one place for names, defaults and refusals, and what is derived from it."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormAct2d, Renorm, convert
from batchnorm.errors import KeywordError, UserError
from batchnorm.functional import batch_norm, batch_norm_pure
from batchnorm.options import CALL_OPTIONS, DEFAULTS, NAMES, Options

VALUES = {
    "ghost_batch_size": 2, "renorm": Renorm(), "process_group": "world", "nonfinite": "skip", "feature_axis": -1,
    "accumulation_steps": 2, "domains": 2, "domain_affine": True,
}  # fmt: skip


def test_every_option_is_tried_here():
    assert set(VALUES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_a_keyword_an_attribute_and_shown(name):
    more = {"domains": 2} if name == "domain_affine" else {}
    layer = BatchNorm1d(4, **{name: VALUES[name]}, **more)
    assert getattr(layer, name) == VALUES[name]
    assert f"{name}={VALUES[name]}" in repr(layer)
    assert getattr(BatchNormAct2d(4, **{name: VALUES[name]}, **more).norm, name) == VALUES[name]
    other = BatchNorm1d(4, **more)
    setattr(other, name, VALUES[name])
    assert other.options == layer.options
    assert getattr(convert(nn.BatchNorm1d(4), **{name: VALUES[name]}, **more), name) == VALUES[name]


@pytest.mark.parametrize("function", [BatchNorm2d, BatchNormAct2d, convert, batch_norm, batch_norm_pure])
def test_signatures_come_from_the_options(function):
    names = CALL_OPTIONS if function in (batch_norm, batch_norm_pure) else NAMES
    parameters = inspect.signature(function).parameters
    for option in dataclasses.fields(Options):
        if option.name in names:
            assert parameters[option.name].default == option.default


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"ghost_batch_size": 0}, "ghost_batch_size must be"),
        ({"ghost_batch_size": 2.0}, "ghost_batch_size must be"),
        ({"renorm": 3}, "renorm must be None or batchnorm.Renorm"),
        ({"process_group": 3}, "process_group must be"),
        ({"nonfinite": "drop"}, "nonfinite must be"),
        ({"feature_axis": 0}, "feature_axis"),
        ({"feature_axis": "last"}, "feature_axis"),
        ({"accumulation_steps": 0}, "accumulation_steps must be"),
        ({"domains": 1}, "domains must be"),
        ({"domain_affine": True}, "needs domains="),
        ({"domain_affine": True, "domains": 2, "affine": False}, "needs domains= and affine=True"),
        ({"renorm": Renorm(), "track_running_stats": False}, "track_running_stats=True"),
        ({"accumulation_steps": 2, "track_running_stats": False}, "track_running_stats=True"),
    ],
)
@pytest.mark.parametrize("kind", [BatchNorm2d, BatchNormAct2d])
def test_refused_at_construction_in_one_line(kind, keywords, words):
    with pytest.raises(ValueError, match=words) as caught:
        kind(4, **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["activation", "negative_slope", "residual", "inplace"])
@pytest.mark.parametrize("kind", [TypeError, ValueError, UserError, KeywordError])
def test_what_belongs_to_the_composite_is_refused_by_its_name(name, kind):
    with pytest.raises(kind, match=rf"^BatchNorm2d takes no {name}: .*batchnorm\.BatchNormAct2d"):
        BatchNorm2d(4, **{name: "relu"})


@pytest.mark.parametrize("make", [BatchNorm2d, BatchNormAct2d])
def test_unknown_keywords(make):
    with pytest.raises(KeywordError, match=f"^{make.__name__} has no keyword ghost; it takes ghost_batch_size"):
        make(4, ghost=2)
    with pytest.raises(KeywordError, match=r"^batch_norm has no keyword domains"):
        batch_norm(torch.randn(4, 3), None, None, training=True, domains=2)


def test_a_layer_that_was_never_constructed_has_the_defaults():
    layer = nn.BatchNorm2d(3)
    layer.__class__ = BatchNorm2d
    assert layer.options is DEFAULTS
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    layer.ghost_batch_size = 1
    assert layer(torch.randn(2, 3, 4, 4)).mean((2, 3)).abs().max() < 1e-5


def test_the_package_exports_what_the_contract_names():
    for dims in (1, 2, 3):
        assert issubclass(getattr(batchnorm, f"BatchNorm{dims}d"), getattr(nn, f"BatchNorm{dims}d"))
        composite = getattr(batchnorm, f"BatchNormAct{dims}d")
        assert not issubclass(composite, nn.modules.batchnorm._BatchNorm)
