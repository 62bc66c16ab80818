"""Moments pooled with their counts, over batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Gather", "Pool", "gather_over"]

Gather = Callable[[Tensor], list[Tensor]]


class Pool:
    """count, mean and M2 = Σ(x − mean)² of C channels in float64, merged as Chan, Golub and LeVeque do (1983)."""

    def __init__(self, features: int) -> None:
        self.count = 0.0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.m2 = torch.zeros(features, dtype=torch.float64)

    def add(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Takes in every value of an input (N, C, *), or those where `mask` (the input's shape without the channel
        axis, or with size 1 there) is True."""
        if mask is not None:
            mask = mask.squeeze(1) if mask.dim() == input.dim() else mask
            last = input.movedim(1, -1)
            input = last[mask.expand(last.shape[:-1])]
        if input.numel() == 0:
            return
        mean, var, count = torch.ops.batchnorm.stats(input, None, 0)
        values = count.item()
        self._merge(values, mean.flatten().cpu(), var.flatten().cpu() * values)

    def _merge(self, count: float, mean: Tensor, m2: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def over_ranks(self, gather: Gather) -> Pool:
        """One pool of all ranks' data, the same on each: they are merged in the order of the ranks."""
        packed = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.mean, self.m2])
        pooled = Pool(self.mean.numel())
        for row in gather(packed):
            pooled._merge(row[0].item(), *row[1:].chunk(2))
        return pooled


def gather_over(process_group: Any) -> Gather:
    """A function that gives every rank all ranks' tensors; of one rank where nothing is distributed.

    Raises:
        UserError: neither None nor "world" nor a process group.
    """
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    if process_group is None or (process_group == "world" and not ready):
        return lambda tensor: [tensor]
    if isinstance(process_group, str) and process_group != "world":
        raise UserError(f"process_group is {process_group!r}; give None, 'world' or a torch.distributed group")
    group = None if process_group == "world" else process_group
    if "nccl" in distributed.get_backend(group):
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")

    def gather(tensor: Tensor) -> list[Tensor]:
        mine = tensor.to(device)
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, mine, group=group)
        return [theirs.to(tensor.device) for theirs in everyone]

    return gather
