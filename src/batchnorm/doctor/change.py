"""What a rule's repair is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .diagnosis import Finding

__all__ = ["Change", "RepairContext", "request_recalibration"]


@dataclass(frozen=True)
class Change:
    """One value that was changed.

    Attributes:
        code, module, what, before, after: which rule changed what.
        statement: the line of code that does the same, with {} for the module; "" where a state_dict holds the change.
        safe: the model trains on as before. Only what evaluation computes is corrected.
    """

    code: str
    module: str
    what: str
    before: str
    after: str
    statement: str = ""
    safe: bool = True


@dataclass
class RepairContext:
    """What a repair may change.

    Attributes:
        model, optimizer: the user's own.
        recalibrate_for: the codes whose repair is a recalibration.
        afterwards: what has to wait until the recalibration is done.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    recalibrate_for: set[str] = field(default_factory=set)
    afterwards: list[Callable[[], Any]] = field(default_factory=list)

    def module(self, name: str) -> Any:
        """Return the module of this name, or None: a functional call has no module."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None


def request_recalibration(context: RepairContext, finding: Finding) -> list[Change]:
    """Repair by recalibration. It runs once, after the other repairs, because it measures the model that they leave."""
    context.recalibrate_for.add(finding.code)
    return []
