"""`fuse`: the compiled model trains and answers as the model does."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import batchnorm

from ..compare import Discard, Make, agree, quiet, reference, train
from ..layers import Scope
from ..program import Case
from ..strategies import programs

__all__ = ["CASES", "check"]

SCOPE = Scope(touches=("eval", "train", "hook", "parametrized", "no grad", "zero weight"), longest=5)
CASES = st.builds(lambda program: Case("fuse", program), programs(SCOPE))


def check(make: Make) -> None:
    want = reference(make, train)
    model, x = make()
    try:
        with quiet():
            torch._dynamo.reset()
            found = train(batchnorm.fuse(model), x)
        agree(_named(found), make, train, want, x.dtype)
    except Exception:
        _discard_what_torch_cannot(make, want)
        raise


def _named(trace: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The compiled module holds the model under a name of its own."""
    return {name.replace("_orig_mod.", ""): value for name, value in trace.items()}


def _discard_what_torch_cannot(make: Make, want: dict[str, torch.Tensor]) -> None:
    """Where torch.compile alone fails or differs, the fault is not in what is fused."""
    model, x = make()
    try:
        with quiet():
            torch._dynamo.reset()
            found = train(torch.compile(model, backend="eager"), x)
        agree(_named(found), make, train, want, x.dtype)
    except Exception as error:
        raise Discard(f"torch.compile alone: {error}") from error
