"""timm without torchvision: what timm imports of it at its own import, put in its place for that long."""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
import types
import warnings

import pytest
from torch import nn


class _Anything(types.ModuleType):
    """A module of which every name can be imported; what it is does not matter, since nothing uses it."""

    __path__ = ()  # a package

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _FrozenBatchNorm2d(nn.Module):
    pass


_Interpolation = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")


def import_timm():
    """The real timm, or a skip where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm")
    names = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils", ".models"]
    names = [f"torchvision{name}" for name in (*names, ".models.feature_extraction")]
    try:
        for name in names:
            sys.modules[name] = module = _Anything(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = _FrozenBatchNorm2d
        sys.modules["torchvision.transforms.functional"].InterpolationMode = _Interpolation
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own, at its import
            import timm
        return timm
    finally:
        for name in names:
            sys.modules.pop(name, None)
