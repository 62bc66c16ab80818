"""Compares what the model answers with batch, running and recalibrated statistics: the symptom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answers import Answers

__all__ = ["GAP", "Comparison", "compare"]

# Ten points of accuracy, or a tenth of any other measure: a gap that no examination may pass over.
GAP = 0.1
# Standard errors of a 99 % interval.
_SIGMAS = 2.576
_LARGE_EFFECT = 0.5


@dataclass(frozen=True)
class Comparison:
    """How good the answers are with each kind of statistics.

    Attributes:
        scale: "accuracy", "squared error", "metric" or, where there are no targets, "answers" (mean squared distance).
        batch, running, recalibrated: the values on that scale.
        gap: how much worse running statistics are than the batches': in accuracy, or as a share of the batches' value.
        low, high: the 99 % interval of the gap, from the differences sample by sample.
        recovered: share of the gap between running and batch statistics that recalibration closes.
        effect: distance between running and recalibrated answers, relative to the spread of the latter.
        disagreement: share of samples for which running and recalibrated statistics name different classes.
        samples: number of compared samples.
        judged: there were targets.
    """

    scale: str
    batch: float
    running: float
    recalibrated: float
    recovered: float
    effect: float
    samples: int
    gap: float = 0.0
    low: float = 0.0
    high: float = 0.0
    disagreement: float | None = None

    @property
    def judged(self) -> bool:
        return self.scale != "answers"

    @property
    def costs(self) -> bool:
        """By the targets, running statistics do worse than chance explains."""
        return self.judged and self.low > 0 and self.gap > (0.02 if self.scale == "accuracy" else GAP)

    @property
    def fails(self) -> bool:
        """The gap is one of ten points, and more than chance."""
        return self.judged and self.gap >= GAP and self.low > 0

    @property
    def undecided(self) -> bool:
        """There are targets, and too few samples to tell a gap of ten points from chance."""
        return self.judged and self.high >= GAP and not self.fails

    @property
    def apart(self) -> bool:
        """There are no targets, and the answers differ so much that only targets could tell what it costs."""
        return not self.judged and self.effect > _LARGE_EFFECT and (self.disagreement or 1.0) >= GAP

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        numbers = {key: value for key, value in vars(self).items() if value is not None}
        text = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in numbers.items()}
        return text | ({} if self.judged else dict.fromkeys(("gap", "low", "high")))

    def __str__(self) -> str:
        if not self.judged:
            agree = "" if self.disagreement is None else f", {self.disagreement:.1%} of the classes differ"
            return (
                f"answers by running statistics are {self.effect:.2g} standard deviations from recalibrated ones{agree}"
                f" (n = {self.samples}, no targets)"
            )
        shown = "{:.3f}".format if self.scale == "accuracy" else "{:.3g}".format
        by = ", ".join(f"{name} {shown(getattr(self, name))}" for name in ("batch", "running", "recalibrated"))
        return (
            f"{self.scale} by statistics: {by} (n = {self.samples}; the gap is {self.gap:.3f}, 99 % interval "
            f"{self.low:.3f} to {self.high:.3f})"
        )


def compare(batch: Answers, running: Answers, recalibrated: Answers, samples: int) -> Comparison | None:
    """Return the comparison; None where the answers hold nothing that can be compared."""
    pairs = [(b, r, c) for b, r, c in zip(batch.values, running.values, recalibrated.values, strict=True)]
    pairs = [(b, r, c) for b, r, c in pairs if b.shape == r.shape == c.shape and b.numel()]
    if not pairs:
        return None
    b, r, c = (torch.cat([pair[i] for pair in pairs]) for i in range(3))
    effect, differ = _effect(r, c), _disagreement(running, recalibrated)
    three = (batch.scores, running.scores, recalibrated.scores)
    if all(three) and len({sum(t.numel() for t in scores) for scores in three}) == 1:
        by_batch, by_running, again = (torch.cat(scores) for scores in three)
        return _judged(batch.scale, by_batch, by_running, again, effect, differ)
    run, recal = float((r - b).square().mean()), float((c - b).square().mean())
    recovered = 1 - recal / run if run > 0 else 0.0
    if run != run:  # NaN with running statistics only
        recovered = 1.0 if recal == recal else 0.0
    return Comparison("answers", 0.0, run, recal, recovered, effect, samples, disagreement=differ)


def _judged(
    scale: str, batch: Tensor, running: Tensor, recalibrated: Tensor, effect: float, differ: float | None
) -> Comparison:
    better = -1.0 if scale == "squared error" else 1.0
    unit = 1.0 if scale == "accuracy" else max(float(batch.abs().mean()), 1e-12)
    gap, low, high = _interval(better * (batch - running) / unit)
    first, second, third = (float(scores.mean()) for scores in (batch, running, recalibrated))
    lost = better * (first - second)
    recovered = better * (third - second) / lost if lost else 0.0
    if second != second:  # NaN
        gap, low, high = math.inf, math.inf, math.inf
        recovered = 1.0 if third == third else 0.0
    return Comparison(scale, first, second, third, recovered, effect, len(batch), gap, low, high, differ)


def _interval(differences: Tensor) -> tuple[float, float, float]:
    """Return the mean and its 99 % interval.

    Two samples more, with one difference of 1 between them, keep the interval from closing where none was seen.
    """
    n, total, squares = len(differences), float(differences.sum()), float(differences.square().sum())
    mean = total / (n + 2)
    error = math.sqrt(max(0.0, (squares + 1) / (n + 2) - mean**2) / (n + 2))
    return total / max(1, n), mean - _SIGMAS * error, mean + _SIGMAS * error


def _effect(running: Tensor, recalibrated: Tensor) -> float:
    spread = float(recalibrated.std()) if recalibrated.numel() > 1 else 0.0
    effect = float((running - recalibrated).square().mean().sqrt()) / max(spread, 1e-12)
    return effect if effect == effect else math.inf


def _disagreement(running: Answers, recalibrated: Answers) -> float | None:
    pairs = list(zip(running.classes, recalibrated.classes, strict=False))
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    return float(torch.cat([(a != b).double().flatten() for a, b in pairs]).mean())
