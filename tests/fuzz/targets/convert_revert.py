"""`convert`, some training, `revert`, some more: everything as if nobody had been there."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.inspect.modules import is_norm

from .. import parts
from ..compare import Discard, Make, Mismatch, agree, quiet, reference, tool, torchs_refusals, train
from ..layers import Scope
from ..program import TOUCHES, Case, Touch
from ..strategies import programs

__all__ = ["CASES", "check"]

SCOPE = Scope(touches=tuple(TOUCHES))
# What may happen to a converted model before it is reverted.
_LATER = ("wrapped", "hook", "pre-hook", "looking hook", "parametrized", "no grad", "eval", "train")
_CAN_SAVE = "save_memory" in inspect.signature(batchnorm.convert).parameters


@st.composite
def _cases(draw: Any) -> Case:
    program = draw(programs(SCOPE))
    given: dict[str, Any] = {}
    if draw(st.booleans()):
        given["inplace"] = draw(st.booleans())
    elif draw(st.integers(0, 3)) == 3:
        given["fuse_sequential"] = False
    if _CAN_SAVE and draw(st.integers(0, 2)) == 2:
        given["save_memory"] = True
    # an instance's forward is bound to the instance; torch's layers take no mask
    if not any(touch.kind == "wrapped" for touch in program.touches):
        given["copied"] = draw(st.booleans())
    if not program.root and program.paths() and draw(st.integers(0, 3)) == 3:
        path = draw(st.sampled_from([path for path, _ in program.paths()]))
        given["later"] = (draw(st.sampled_from(_LATER)), path)
    masks = any("mask" in step.expression for step in program.steps)
    ours = any(made.kind.startswith("batchnorm.") for _, made in program.paths())
    given["reverts"] = not (masks or (ours and draw(st.booleans())))
    return Case("convert_revert", program, arguments=tuple(sorted(given.items())))


CASES = _cases()


def check(
    make: Make, *, copied: bool = False, reverts: bool = True, later: tuple[str, str] | None = None, **options: Any
) -> None:
    def run(model: nn.Module, x: Any, back: Any = lambda model: model) -> Any:
        trace = train(model, x)
        if later is not None:
            exec(str(Touch(*later)), {"net": model, "parts": parts})
        model = back(model)
        trace |= train(model, x, 1, first=2)
        return trace | train(model.eval(), x, 1, first=3)

    want = reference(make, run)
    model, x = make()
    facts, kinds = _facts(model), [type(module) for module in model.modules()]
    plain = not any(kind.__module__.startswith("batchnorm") for kind in kinds)
    with tool(model):
        converted = batchnorm.convert(model, **options)
    _same(facts, _facts(converted), "convert")
    if copied:
        with quiet():
            converted = copy.deepcopy(converted)

    def back(model: nn.Module) -> nn.Module:
        if not reverts:
            return model
        before = _facts(model)
        with tool(model):
            reverted = batchnorm.revert(model)
        _same(before, _facts(reverted), "revert")
        now = [type(module) for module in reverted.modules()]
        if plain and now != kinds and later is None:
            raise Mismatch(f"after revert the classes are {now}, and were {kinds}")
        return reverted

    # An operator of ours keeps its input, torch's ReLU its output: revert brings torch's restriction back.
    with torchs_refusals(make, run, always=reverts and not plain), quiet():
        found = run(converted, x, back)
    if reverts and not plain and 1 in x.shape[2:]:
        raise Discard("what revert returned has torch's fault: see compare.exact_batch_norm")
    agree(found, make, run, want, x.dtype)


def _facts(model: nn.Module) -> dict[str, Any]:
    """What stays the same under another class: names, tensors (by identity), modes and hooks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": list(modules),
        "tensors": {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "keys": list(model.state_dict()),
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [len(module.__dict__[f"_{kind}_hooks"]) for kind in ("forward", "forward_pre", "backward")]
            for name, module in modules.items()
        },
        "shared": [name for name, m in modules.items() if is_norm(m) and list(modules.values()).count(m) > 1],
    }


def _same(before: dict[str, Any], now: dict[str, Any], after: str) -> None:
    for what, value in before.items():
        if now[what] != value:
            raise Mismatch(f"after {after} the {what} are {now[what]}, and were {value}")
