"""`freeze`, training, `unfreeze`, training: by hand and by the tool."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.inspect.modules import is_norm

from ..compare import Make, Snapshot, agree, quiet, reference, tool, torchs_refusals, train
from ..layers import Scope
from ..program import TOUCHES, Case
from ..strategies import programs

__all__ = ["CASES", "check"]

SCOPE = Scope(touches=tuple(TOUCHES))
_CAN_FUSE = "fused" in inspect.signature(batchnorm.freeze).parameters
_FUSED = st.sampled_from([(), (("fused", True),)]) if _CAN_FUSE else st.just(())
_CONVERTED = st.sampled_from([(), (("converted", True),)])
CASES = st.builds(
    lambda program, fused, converted: Case("freeze", program, None, (*fused, *converted)),
    programs(SCOPE), _FUSED, _CONVERTED,
)  # fmt: skip


def check(make: Make, *, converted: bool = False, **options: Any) -> None:
    def run(model: nn.Module, x: Any, hold: Callable[..., Any] = _hold, release: Callable[..., Any] = _release) -> Any:
        modes = {module: module.training for module in model.modules()}
        held = hold(model)
        model.train()  # undoes what `.eval()` did, and not what was frozen
        trace = train(model, x)
        release(model, held)
        for module, mode in modes.items():
            module.train(mode) if not list(module.children()) else setattr(module, "training", mode)
        return trace | train(model, x, 1, first=2)

    want = reference(make, run)
    model, x = make()
    if converted:
        with tool(model):
            model = batchnorm.convert(model)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
    before = Snapshot(model)
    with tool(model):
        batchnorm.freeze(model, **options)
    with tool():
        batchnorm.unfreeze(model)
    before.check(model, "unfreeze")
    with torchs_refusals(make, run), quiet():
        found = run(
            model, x, lambda model: batchnorm.freeze(model, **options), lambda model, _: batchnorm.unfreeze(model)
        )
    agree(found, make, run, want, x.dtype)


def _hold(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    held = []
    for norm in [module for module in model.modules() if is_norm(module)]:
        norm.train = lambda mode=True, norm=norm: nn.Module.train(norm, False)
        norm.train()
        for parameter in norm.parameters():
            held.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
    return held


def _release(model: nn.Module, held: list[tuple[nn.Parameter, bool]]) -> None:
    for norm in [module for module in model.modules() if is_norm(module)]:
        norm.__dict__.pop("train", None)
        norm.train()
    for parameter, required in reversed(held):
        parameter.requires_grad_(required)
