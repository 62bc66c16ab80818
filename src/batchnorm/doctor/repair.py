"""`repair`: repairs what is safe to repair in a model, and says what it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import UserError
from ..model_tools.recalibrate import recalibrate
from .change import Change, RepairContext
from .diagnosis import Diagnosis
from .evidence.input_batches import MOST_BATCHES, as_batch
from .examine import diagnose
from .rules import find_rule

__all__ = ["RepairReport", "repair"]


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        changes: every value that was changed.
        left: for the code of each fault that stays, why it stays.
        before: number of findings by code before the repair.
        diagnosis: the examination after the repair.
    """

    changes: list[Change]
    left: dict[str, str]
    before: Counter[str]
    diagnosis: Diagnosis

    @property
    def after(self) -> Counter[str]:
        """Number of findings by code after the repair."""
        return _count(self.diagnosis)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "changes": [vars(change) for change in self.changes],
            "left": self.left,
            "before": dict(self.before),
            "after": dict(self.after),
        }


def repair(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> RepairReport:
    """Examine the model, repair in place what is safe, and examine it again.

    A repair is safe where the function that training computes stays, or where evaluation then computes the same as
    training. Which rules have one, and what it does, stands in the rule's file.

    Args:
        model, batches, optimizer, options: as `diagnose` takes them.

    Returns:
        A `RepairReport`.

    Raises:
        UserError: as `diagnose`.
    """
    # Two examinations and a recalibration read the batches. An iterator can be read once, so it is kept.
    given = list(islice(batches, MOST_BATCHES)) if isinstance(batches, Iterator) else batches
    before = diagnose(model, given, optimizer=optimizer, **options)
    context = RepairContext(model, optimizer)
    changes: list[Change] = []
    left: dict[str, str] = {}
    for finding in before.findings:
        repair_one = find_rule(finding.code).repair
        if repair_one is not None:
            changes += repair_one(context, finding)
        else:
            left[finding.code] = f"in the code, not in the values: {finding.fix}"
    if context.recalibrate_for:
        try:
            changes += _recalibrate(model, given, min(context.recalibrate_for))
        except UserError as error:
            left |= dict.fromkeys(sorted(context.recalibrate_for), str(error))
    return RepairReport(changes, left, _count(before), diagnose(model, given, optimizer=optimizer, **options))


def _count(diagnosis: Diagnosis) -> Counter[str]:
    return Counter(finding.code for finding in diagnosis.findings)


def _recalibrate(model: nn.Module, batches: Any, code: str) -> list[Change]:
    if batches is None:
        raise UserError("recalibration needs batches")
    done = recalibrate(
        model, batches, forward=lambda module, raw: as_batch(raw, module).call(module), process_group=None
    )
    return [
        Change(code, name, "running statistics", f"mean off by {shift.mean_rms:.3g} σ", f"of {done.samples} samples")
        for name, shift in done.layers.items()
    ]
