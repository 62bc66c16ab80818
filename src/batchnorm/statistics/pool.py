"""Moments of everything that was added, over batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..moments import merge

__all__ = ["Gather", "Pool", "gather_over"]

Gather = Callable[[Tensor], list[Tensor]]


class Pool:
    """The moments of C channels over all values that were added.

    Attributes:
        count: values per channel.
        mean: (C,), float64.
        var: (C,), float64, biased.

    Args:
        channels: C. It may be left out where something is added before the moments are read.
    """

    def __init__(self, channels: int = 1) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.zeros(channels, dtype=torch.float64)

    @property
    def m2(self) -> Tensor:
        """Return Σ(x − mean)²."""
        return self.var * self.count

    @property
    def unbiased(self) -> Tensor:
        """Return the unbiased variance."""
        return self.m2 / max(1, self.count - 1)

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Add `count` values per channel by their mean (C,) and biased variance (C,)."""
        if not count:
            return
        if self.count:
            counts = torch.tensor([self.count, count], dtype=torch.float64, device=mean.device)
            merged_mean, merged_var, _ = merge(torch.stack([self.mean, mean]), torch.stack([self.var, var]), counts)
            self.mean, self.var = merged_mean[0], merged_var[0]
        else:
            self.mean, self.var = mean, var
        self.count += count

    def add_values(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Add the values of an input (N, C, *).

        Args:
            mask: bool, True at the values to add, of the input's shape without the channel axis or with size 1 there.
        """
        if mask is not None:
            mask = mask.squeeze(1) if mask.dim() == input.dim() else mask
            channels_last = input.movedim(1, -1)
            input = channels_last[mask.expand(channels_last.shape[:-1])]
        if input.numel() == 0:
            return
        mean, var, count = torch.ops.batchnorm.stats(input, None, 0)
        self.add(mean.flatten().cpu(), var.flatten().cpu(), int(count))

    def over_ranks(self, gather: Gather) -> Pool:
        """Return the pool of all ranks' data. All ranks merge in the same order, so all have the same bits."""
        count = torch.tensor([self.count], dtype=torch.float64)
        pool = Pool(self.mean.numel())
        for row in gather(torch.cat([count, self.mean, self.var])):
            mean, var = row[1:].chunk(2)
            pool.add(mean, var, int(row[0]))
        return pool


def gather_over(process_group: Any) -> Gather:
    """Make the function that gives every rank the tensors of all ranks.

    Without torch.distributed there is one rank.

    Raises:
        UserError: `process_group` is neither None nor "world" nor a process group.
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
        local = tensor.to(device)
        gathered = [torch.empty_like(local) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, local, group=group)
        return [rank.to(tensor.device) for rank in gathered]

    return gather
