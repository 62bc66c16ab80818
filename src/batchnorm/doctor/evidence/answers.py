"""What a model answers with one kind of statistics, and how good each sample's answer is where targets are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError, quote_error
from ...inspect.nests import tensors_in

__all__ = ["Answers", "Metric"]

# (output, target) → one value a sample, or one a batch; larger is better.
Metric = Callable[[Any, Any], Any]

# Number of evenly spaced values of one answer that are compared.
_SAMPLED = 4096


@dataclass
class Answers:
    """Answers, batch by batch.

    Attributes:
        values: evenly spaced values of each answer, float64.
        classes: of each batch of class scores, the best class of each sample.
        scores: of each batch with a target, how good each sample's answer is.
        scale: "accuracy" (share of right answers), "squared error" or "metric"; "answers" where no target is known.
    """

    metric: Metric | None = None
    values: list[Tensor] = field(default_factory=list)
    classes: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    scale: str = "answers"

    def add(self, output: Any, target: Any) -> None:
        """Add the answer to one batch."""
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        self.values.append(_sample(tensors))
        logits = _logits(output, tensors)
        if logits is not None and logits.dim() > 1 and logits.size(1) > 1:
            self.classes.append(logits.detach().argmax(1).flatten(1 if logits.dim() > 2 else 0).cpu())
        found = _by_metric(self.metric, output, target) if self.metric else _by_target(logits, target)
        if found is not None:
            self.scale, scores = found
            self.scores.append(scores.detach().double().cpu())

    @classmethod
    def pooled(cls, parts: Iterable[Answers]) -> Answers:
        """The answers of several batches as one."""
        whole = cls()
        for part in parts:
            whole.values += part.values
            whole.classes += part.classes
            whole.scores += part.scores
            whole.scale = part.scale if part.scores else whole.scale
        return whole


def _sample(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    return flat[:: max(1, flat.numel() // _SAMPLED)].cpu()


def _logits(output: Any, tensors: list[Tensor]) -> Tensor | None:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return tensors[0] if tensors else None


def _by_metric(metric: Metric, output: Any, target: Any) -> tuple[str, Tensor]:
    try:
        value = torch.as_tensor(metric(output, target), dtype=torch.float64).reshape(-1)
    except Exception as error:
        raise UserError(
            f"the metric raises ({quote_error(error)}), diagnose(metric=…), pass (output, target) → one number a sample"
        ) from error
    return "metric", value


def _by_target(scores: Tensor | None, target: Any) -> tuple[str, Tensor] | None:
    """Judge class scores by labels, one logit by 0 or 1, and anything else of the target's shape by squares."""
    if scores is None or not isinstance(target, Tensor) or not target.numel() or not scores.dim():
        return None
    labels = _labels(scores, target)
    if labels is not None:
        return "accuracy", _each((scores.argmax(1) == labels).double())
    if scores.dim() > 2 and not target.is_floating_point() and target.shape == scores.shape[:-1]:
        return "accuracy", _each((scores.argmax(-1) == target).double())  # tokens: the classes lie on the last axis
    if scores.numel() != target.numel() or scores.size(0) != target.size(0):
        return None
    scores, target = scores.double().reshape(target.shape), target.double()
    if bool(((target == 0) | (target == 1)).all()):
        threshold = 0.5 if bool(((scores >= 0) & (scores <= 1)).all()) else 0.0
        return "accuracy", _each(((scores > threshold) == target.bool()).double())
    return "squared error", _each((scores - target).square())


def _labels(scores: Tensor, target: Tensor) -> Tensor | None:
    if scores.dim() < 2 or scores.size(1) < 2 or target.is_complex():
        return None
    if target.is_floating_point():
        # One-hot or smoothed labels
        ones = target.shape == scores.shape and bool((target >= 0).all())
        return target.argmax(1) if ones and torch.allclose(target.sum(1), torch.ones_like(target.sum(1))) else None
    fits = tuple(target.shape) == (scores.size(0), *scores.shape[2:])
    return target if fits and target.dtype != torch.bool else None


def _each(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.dim() > 1 else values
