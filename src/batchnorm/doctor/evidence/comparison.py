"""Compares what the model answers with batch, running and recalibrated statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...inspect.from_run import tensors_in

__all__ = ["Answers", "Comparison", "compare"]

# Number of evenly spaced values of one answer that are compared.
_SAMPLED = 4096


@dataclass
class Answers:
    """The answers with one kind of statistics: sampled values, and how good they are where targets are known."""

    values: list[Tensor] = field(default_factory=list)
    right: float = 0.0
    judged: int = 0
    squared: float = 0.0
    compared: int = 0

    def add(self, output: Any, target: Any) -> None:
        self.values.append(_sample(output))
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        scores = _scores(output, tensors)
        if scores is None or not isinstance(target, Tensor):
            return
        if _are_labels(scores, target):
            self.right += float((scores.argmax(1) == target).sum())
            self.judged += target.numel()
        elif scores.shape == target.shape and target.is_floating_point():
            self.squared += float(F.mse_loss(scores.double(), target.double(), reduction="sum"))
            self.compared += target.numel()

    @classmethod
    def pooled(cls, parts: Iterable[Answers]) -> Answers:
        """The answers of several batches as one."""
        whole = cls()
        for part in parts:
            whole.values += part.values
            for name in ("right", "judged", "squared", "compared"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        return whole

    @property
    def accuracy(self) -> float | None:
        return self.right / self.judged if self.judged else None

    @property
    def squared_error(self) -> float | None:
        return self.squared / self.compared if self.compared else None


@dataclass(frozen=True)
class Comparison:
    """How good the answers are with each kind of statistics.

    Attributes:
        scale: "accuracy", "squared error" or, where there are no targets, "answers" (mean squared distance).
        batch, running, recalibrated: the values on that scale.
        recovered: share of the gap between running and batch statistics that recalibration closes.
        effect: distance between running and recalibrated answers, relative to the spread of the latter.
        samples: number of compared samples.
        judged: there were targets.
        costs: by the targets, running statistics do worse than chance explains.
    """

    scale: str
    batch: float
    running: float
    recalibrated: float
    recovered: float
    effect: float
    samples: int
    judged: bool = False
    costs: bool = False


def compare(batch: Answers, running: Answers, recalibrated: Answers, samples: int) -> Comparison | None:
    """Return the comparison; None where the answers hold nothing that can be compared."""
    pairs = [(b, r, c) for b, r, c in zip(batch.values, running.values, recalibrated.values, strict=True)]
    pairs = [(b, r, c) for b, r, c in pairs if b.shape == r.shape == c.shape and b.numel()]
    if not pairs:
        return None
    b, r, c = (torch.cat([pair[i] for pair in pairs]) for i in range(3))
    spread = float(c.std()) if c.numel() > 1 else 0.0
    effect = float((r - c).square().mean().sqrt()) / max(spread, 1e-12)
    effect = effect if effect == effect else float("inf")
    judged = False
    for name, better in (("accuracy", 1.0), ("squared_error", -1.0)):
        three = tuple(getattr(answers, name) for answers in (batch, running, recalibrated))
        judged = judged or None not in three
        if None not in three and _lost(name, three, samples):
            gap = better * (three[0] - three[1])
            recovered = better * (three[2] - three[1]) / gap
            scale = name.replace("_", " ")
            return Comparison(scale, three[0], three[1], three[2], recovered, effect, samples, True, True)
    run, recal = float((r - b).square().mean()), float((c - b).square().mean())
    recovered = 1 - recal / run if run > 0 else 0.0
    if run != run:  # NaN with running statistics only
        recovered = 1.0 if recal == recal else 0.0
    return Comparison("answers", 0.0, run, recal, recovered, effect, samples, judged)


def _lost(name: str, three: tuple[float, ...], samples: int) -> bool:
    """Return whether running statistics cost more than chance explains.

    The limits are two points and three standard errors of accuracy, or a tenth of the squared error.
    """
    batch, running, _ = three
    if name == "accuracy":
        noise = 3 * (0.5 / max(1, samples)) ** 0.5
        return batch - running > max(0.02, noise * (batch * (1 - batch) * 2) ** 0.5)
    return running > 1.1 * batch


def _sample(output: Any) -> Tensor:
    """Return evenly spaced values of an answer, in float64."""
    tensors = [t.detach().reshape(-1) for t in tensors_in(output) if t.is_floating_point()]
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    flat = torch.cat([t.double() for t in tensors])
    return flat[:: max(1, flat.numel() // _SAMPLED)].cpu()


def _scores(output: Any, tensors: list[Tensor]) -> Tensor | None:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return tensors[0] if tensors else None


def _are_labels(scores: Tensor, target: Tensor) -> bool:
    integers = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
    fits = scores.dim() >= 2 and scores.size(1) > 1 and tuple(target.shape) == (scores.size(0), *scores.shape[2:])
    return integers and fits
