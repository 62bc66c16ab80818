"""`fold`: the folded copy computes the same, also on inputs that it was not verified on."""

from __future__ import annotations

import re
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.inspect.modules import is_norm

from ..compare import Make, Mismatch, Snapshot, agree, quiet, reference, tool, train
from ..layers import Scope
from ..program import TOUCHES, Case
from ..strategies import programs

__all__ = ["CASES", "check"]

SCOPE = Scope(training=False, touches=tuple(kind for kind in TOUCHES if kind != "backward hook"))
CASES = st.builds(
    lambda program, converted: Case("fold", program, None, converted),
    programs(SCOPE),
    st.sampled_from([(), (("converted", True),)]),
)


def check(make: Make, *, converted: bool = False) -> None:
    want = reference(make, _answers)
    model, x = make()
    if converted:
        with tool(model):
            model = batchnorm.convert(model)
    before = Snapshot(model)
    with tool(model):
        folded, report = batchnorm.fold(model, (x,))
    before.check(model, "fold")
    stayed = {name for name, module in folded.named_modules() if is_norm(module)}
    said = {entry.norm for entry in report.stayed if "F.batch_norm" not in entry.norm}
    if said != stayed:
        raise Mismatch(f"the report says that {said} stayed, and the model holds {stayed}")
    if any(not entry.reason for entry in report.entries):
        raise Mismatch("the report gives no reason")
    for entry in report.stayed:
        off = re.search(r"changed an output by (\S+),", entry.reason)
        if off and float(off[1]) > 1e-2:  # more than rounding: on other inputs nobody would have noticed
            raise Mismatch(f"only the example showed that this fold is wrong: {entry.reason}")
    with quiet():
        found = _answers(folded, x)
    agree(found, make, _answers, want, x.dtype)


def _answers(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    wanted = ("output", "stored", "gradient input")
    return {n: t for n, t in train(model, x, update=False).items() if n[2:].startswith(wanted)}
