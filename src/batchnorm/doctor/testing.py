"""A test kit for rules that other packages bring by the entry-point group ``batchnorm.rules``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .examine import diagnose
from .repair import repair
from .rules import find_rule

__all__ = ["check_rule"]

Call = Callable[[], dict[str, Any]]


def check_rule(code: str, *, faulty: Call, healthy: Call) -> None:
    """Check a rule as this package's own are checked.

    The seeded fault is found, with numbers, a fix and what would make it a false alarm; the healthy twin is not; the
    model comes back bit for bit; and where the rule has a repair, the repair removes the finding.

    Args:
        code: the rule's code.
        faulty, healthy: make the arguments of `diagnose`, ``{"model": …, "batches": …}``, anew at each call.

    Raises:
        AssertionError: says what the rule does not do.
        UserError: no such rule, or the arguments are no right ones.
    """
    rule = find_rule(code)
    call = faulty()
    before = copy.deepcopy(call["model"].state_dict())
    found = [finding for finding in diagnose(**call).findings if finding.code == rule.code]
    assert found, f"{rule.code} does not find the seeded fault"
    for finding in found:
        assert finding.evidence, f"{rule.code} gives no numbers"
        assert finding.fix, f"{rule.code} names no fix"
        assert finding.false_alarm, f"{rule.code} does not say when it is a false alarm"
    after = call["model"].state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), f"{rule.code} changes the model"
    assert rule.code not in diagnose(**healthy()).codes, f"{rule.code} blames the healthy model"
    if rule.repair is not None:
        assert rule.code not in repair(**faulty()).diagnosis.codes, f"the repair of {rule.code} leaves its finding"
