"""`repair`: repairs a model, measures whether its answers are better for it, and says what it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import UserError
from ..model_tools.freeze import is_frozen
from ..model_tools.recalibrate import Recalibration, recalibrate
from .change import Change, RepairContext
from .diagnosis import Diagnosis
from .evidence.comparison import Comparison
from .evidence.input_batches import MOST_BATCHES, as_batch
from .examine import diagnose
from .rules import find_rule

__all__ = ["RepairReport", "repair"]

# Smallest distance of the answers that counts where no targets are known, in standard deviations.
_EFFECT = 0.1


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        changes: every value that was changed.
        left: for the code of each fault that stays, why it stays.
        before: number of findings by code before the repair.
        symptom_before: how good the answers were; None where nothing was measured.
        diagnosis: the examination after the repair.
    """

    changes: list[Change]
    left: dict[str, str]
    before: Counter[str]
    diagnosis: Diagnosis
    symptom_before: Comparison | None = None

    @property
    def after(self) -> Counter[str]:
        """Number of findings by code after the repair."""
        return _count(self.diagnosis)

    @property
    def verified(self) -> bool | None:
        """The measured answers with running statistics are better, or as good where nothing was wrong with them; None
        where they were not measured."""
        return _as_good(self.symptom_before, self.diagnosis.symptom)

    @property
    def exit_code(self) -> int:
        """That of the diagnosis after the repair; and never 0 where something was changed but not seen to help."""
        if self.diagnosis.exit_code or not self.changes:
            return self.diagnosis.exit_code
        return {True: 0, False: 1, None: 3}[self.verified]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "left": self.left,
            "before": dict(self.before),
            "after": dict(self.after),
            "symptom_before": self.symptom_before.as_dict() if self.symptom_before else None,
            "verified": self.verified,
            "exit_code": self.exit_code,
        }

    def summary(self) -> list[str]:
        """Return the lines that say what was repaired and whether it helped."""
        lines = [f"not mended: {code}: {reason}" for code, reason in self.left.items()]
        lines += [
            f"{code}: {self.before.get(code, 0)} findings before, {self.after.get(code, 0)} after"
            for code in sorted(self.before | self.after)
        ]
        if self.symptom_before is not None:
            lines.append(f"before: {self.symptom_before}")
        if self.changes:
            said = {True: "the answers are better, or as good as before", False: "the answers are NOT better"}
            verdict = "not measured, pass batches with targets" if self.verified is None else said[self.verified]
            lines.append(f"verified: {verdict}")
        return lines


def repair(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    unsafe: bool = True,
    **options: Any,
) -> RepairReport:
    """Examine the model, repair it in place, and examine it again.

    A repair is safe where the model trains on as before: where only what evaluation computes is corrected. Which rules
    have a repair, and what it does, stands in the rule's file. A recalibration that does not help is undone.

    Args:
        model, batches, optimizer, options: as `diagnose` takes them.
        unsafe: make the repairs too that change how the model trains on (momentum, freezing).

    Returns:
        A `RepairReport`.

    Raises:
        UserError: as `diagnose`.
    """
    # Two examinations and a recalibration read the batches. An iterator can be read once, so it is kept.
    given = list(islice(batches, MOST_BATCHES)) if isinstance(batches, Iterator) else batches
    before = diagnose(model, given, optimizer=optimizer, **options)
    context = RepairContext(model, optimizer)
    frozen = _frozen_found(context, before)
    changes, left = _repair_each(context, before, unsafe)
    done = None
    if context.recalibrate_for:
        try:
            done = _recalibrate(model, given, frozen)
        except UserError as error:
            left |= dict.fromkeys(sorted(context.recalibrate_for), str(error))
    for wait in context.afterwards:
        wait()
    after = diagnose(model, given, optimizer=optimizer, **options)
    if done is not None and _as_good(before.symptom, after.symptom) is False:
        done.undo()
        left |= dict.fromkeys(sorted(context.recalibrate_for), "recalibration made no answer better, and was undone")
        after, done = diagnose(model, given, optimizer=optimizer, **options), None
    changes += _of_recalibration(done, min(context.recalibrate_for)) if done is not None else []
    return RepairReport(changes, left, _count(before), after, before.symptom)


def _repair_each(context: RepairContext, before: Diagnosis, unsafe: bool) -> tuple[list[Change], dict[str, str]]:
    changes: list[Change] = []
    left: dict[str, str] = {}
    for finding in before.findings:
        rule = find_rule(finding.code)
        if rule.repair is None:
            left[finding.code] = f"in the code, not in the values: {finding.fix}"
        elif rule.unsafe and not unsafe:
            left[finding.code] = f"an unsafe repair, which changes how the model trains: {finding.fix}"
        else:
            changes += rule.repair(context, finding)
    return changes, left


def _count(diagnosis: Diagnosis) -> Counter[str]:
    return Counter(finding.code for finding in diagnosis.findings)


def _frozen_found(context: RepairContext, before: Diagnosis) -> bool:
    """Return whether frozen layers are among what is found, so that a recalibration has to reach them."""
    found = [context.module(finding.module) for finding in before.findings if finding.severity == "error"]
    return any(
        module is context.model
        or (module is not None and (is_frozen(module) or (context.model.training and not module.training)))
        for module in found
    )


def _as_good(before: Comparison | None, after: Comparison | None) -> bool | None:
    """Return whether running statistics answer better than before, or as well where no gap was; None: not measured."""
    if before is None or after is None:
        return None
    if not before.judged or not after.judged:
        return after.effect <= max(_EFFECT, min(before.effect, 1.0) / 2)
    better = -1.0 if after.scale == "squared error" else 1.0
    unit = 1.0 if after.scale == "accuracy" else max(abs(before.batch), 1e-12)
    gained = better * (after.running - before.running) / unit
    if before.running != before.running:  # NaN
        return after.running == after.running and not after.fails
    return not after.fails and gained >= (0.0 if before.fails else -(before.high - before.low) / 2)


def _recalibrate(model: nn.Module, batches: Any, frozen: bool) -> Recalibration:
    if batches is None:
        raise UserError("recalibration needs batches")
    return recalibrate(
        model,
        batches,
        forward=lambda module, raw: as_batch(raw, module).call(module),
        process_group=None,
        frozen=frozen,
    )


def _of_recalibration(done: Recalibration, code: str) -> list[Change]:
    return [
        Change(code, name, "running statistics", f"mean off by {shift.mean_rms:.3g} σ", f"of {done.samples} samples")
        for name, shift in done.layers.items()
    ]
