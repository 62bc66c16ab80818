"""`convert(save_memory=True)` against `convert`: the same bits, whatever the network does with the outputs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.rebuild import release_saved

from ..compare import Discard, Make, Mismatch, Trace, quiet, tool, train
from ..layers import Scope
from ..program import TOUCHES, Case
from ..strategies import programs

__all__ = ["CASES", "check"]

SCOPE = Scope(touches=tuple(TOUCHES), dtypes=("float32", "float32", "float64", "bfloat16"))


@st.composite
def _cases(draw: Any) -> Case:
    program = draw(programs(SCOPE))
    fuses = draw(st.integers(0, 3)) != 3
    return Case("save_memory", program, arguments=(("fuse_sequential", fuses),))


CASES = _cases()


def check(make: Make, **options: Any) -> None:
    try:
        want = _run(make, **options)
    except Exception as error:
        raise Discard(f"{type(error).__name__}: {error}") from error
    found = _run(make, save_memory=True, **options)
    if set(found) != set(want):
        raise Mismatch(f"results differ: {sorted(set(found) ^ set(want))}")
    for name, value in want.items():
        if not torch.equal(found[name].nan_to_num(), value.nan_to_num()):
            raise Mismatch(f"{name} is not the same, bit for bit")


def _run(make: Make, **options: Any) -> Trace:
    model: nn.Module
    model, x = make()
    with tool(model):
        model = batchnorm.convert(model, **options)
    # small networks often have nothing after their last normalization: what it gave is released here all the same
    model.register_forward_hook(lambda module, given, result: release_saved(result))
    with quiet():
        return train(model, x, 3)
