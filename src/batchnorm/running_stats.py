"""What a layer remembers between its calls beside its buffers, where one update a call is not what is wanted.

Moments of micro-batches that wait for their union (accumulation), by domain; and what renormalized calls saw, for
activation checkpointing, whose second forward must be held against the same buffers as the first.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import Moments, merge
from .options import Options

__all__ = ["COMPILED_INSIDE_CHECKPOINT", "Memory", "RunningStats", "SeenCall"]

# Of how many calls before a backward a renormalized layer can still tell, under checkpointing, what each saw.
_CALLS_REMEMBERED = 16
COMPILED_INSIDE_CHECKPOINT = (
    "a compiled layer with renorm or accumulation_steps cannot tell that checkpointing runs it again: "
    "compile the function that calls checkpoint, not what is inside"
)


class Memory(NamedTuple):
    """One domain's buffers, in the order of the update operator, and its affine parameters."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def copy(self) -> Memory:
        """The buffers as they are now, whatever moves them later."""
        mean, var, tracked = (None if t is None else t.detach().clone() for t in self[:3])
        return Memory(mean, var, tracked, self.weight, self.bias)


class SeenCall(NamedTuple):
    """What a renormalized call saw: the mean of its batch, by which it is known again, and the buffers before it."""

    mean: Tensor
    memory: Memory


class RunningStats:
    """A layer's own; it decides when and by what the buffers move, and moves none itself."""

    def __init__(self) -> None:
        self.pending: dict[int, list[Moments]] = {}
        self.seen: dict[int, deque[SeenCall]] = {}

    def clear(self) -> None:
        """Forget both: what waited belongs to statistics that were replaced."""
        self.pending.clear()
        self.seen.clear()

    def copy(self) -> RunningStats:
        """For a copy of the layer: what waits goes along; what calls saw serves a backward of their own layer."""
        new = RunningStats()
        new.pending = {domain: list(waiting) for domain, waiting in self.pending.items()}
        return new

    def collect(self, domain: int, moments: Moments, options: Options) -> Moments | None:
        """The moments by which the buffers move now; None while micro-batches wait for others."""
        if options.accumulation_steps == 1:
            return moments
        waiting = self.pending.setdefault(domain, [])
        waiting.append(moments)
        if len(waiting) < options.accumulation_steps:
            return None
        mean, var, count = (torch.cat(rows) for rows in zip(*waiting, strict=True))
        waiting.clear()
        # slices stay slices; whole micro-batches become the one batch of their union
        return (mean, var, count) if options.ghost_batch_size else merge(mean, var, count)

    def note(self, domain: int, seen: SeenCall) -> None:
        """Keep what a renormalized call saw.

        A compiled graph must return it, since it would otherwise read the buffers again after they moved.
        """
        if torch.compiler.is_compiling():
            self.seen[domain] = deque([seen], maxlen=_CALLS_REMEMBERED)  # a growing one would compile anew each call
        else:
            self.seen.setdefault(domain, deque(maxlen=_CALLS_REMEMBERED)).append(seen)

    def recall(self, domain: int, mean: Tensor) -> Memory | None:
        """The buffers that the first forward of this batch was held against, whatever has moved them since.

        Several calls may lie between a forward and its backward, and backwards come in any order: the batch is known
        again by its mean.
        """
        seen = self.seen.get(domain)
        if not seen:
            return None
        distances = [
            (call.mean - mean).nan_to_num().abs().sum() if call.mean.shape == mean.shape else torch.inf
            for call in reversed(seen)
        ]
        return seen[-1 - distances.index(min(distances))].memory
