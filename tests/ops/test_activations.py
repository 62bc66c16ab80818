"""The three tables of activations have the same words: tensors (ops), module types (pairs), device code (triton)."""

import inspect
import re

import pytest

from batchnorm import pairs
from batchnorm.ops import ACTIVATIONS

WORDS = {"", *ACTIVATIONS}


def test_every_activation_has_a_module_type():
    assert set(pairs.MODULES.values()) == WORDS
    assert len(pairs.MODULES) == len(WORDS)


@pytest.mark.parametrize("function", ["activate", "activation_backward"])
def test_every_activation_has_device_code(function):
    pytest.importorskip("triton", reason="the kernels are written in Triton, which has wheels for Linux only")
    from batchnorm.ops.triton import activations

    source = inspect.getsource(getattr(activations, function).fn)
    branches = re.findall(r'ACTIVATION == "(\w*)"', source)
    assert set(branches) == WORDS
    assert len(branches) == len(WORDS)
