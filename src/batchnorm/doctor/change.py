"""What a rule's repair is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .diagnosis import Finding

__all__ = ["Change", "RepairContext", "request_recalibration"]


@dataclass(frozen=True)
class Change:
    """One value that was changed."""

    code: str
    module: str
    what: str
    before: str
    after: str


@dataclass
class RepairContext:
    """What a repair may change. `recalibrate_for` holds the codes whose repair is a recalibration."""

    model: nn.Module
    optimizer: Optimizer | None = None
    recalibrate_for: set[str] = field(default_factory=set)

    def module(self, name: str) -> Any:
        """Return the module of this name, or None: a functional call has no module."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None


def request_recalibration(context: RepairContext, finding: Finding) -> list[Change]:
    """Repair by recalibration. It runs once, after all other repairs, because it measures the model that they leave."""
    context.recalibrate_for.add(finding.code)
    return []
