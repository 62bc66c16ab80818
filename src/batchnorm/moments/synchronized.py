"""Synchronized statistics: one collective in the forward, one in the backward, on any backend."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .merged import merge

ProcessGroupLike = Any  # "world", a group's name, or a torch.distributed.ProcessGroup


def check_group(process_group: ProcessGroupLike) -> None:
    """Refuse what can never be a group; whether it exists is known when it is used."""
    if process_group is None or isinstance(process_group, str):
        return
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this process is not a member of the group; build the layer without it here")
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group must be None, 'world' or a torch.distributed group, got {type(process_group).__name__}"
        )


class Group(NamedTuple):
    """What a compiled graph can carry of a process group."""

    name: str
    ranks: int


def resolve(process_group: ProcessGroupLike) -> Group | None:
    """The group to synchronize over; None where statistics stay local.

    'world' without an initialized torch.distributed is this process alone, as with torch's SyncBatchNorm.
    """
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group == "world":
            return None
        raise RuntimeError(f"process_group {process_group!r}: torch.distributed is not initialized")
    if process_group == "world":
        process_group = c10d._get_default_group()
    elif isinstance(process_group, str):
        process_group = torch._C._distributed_c10d._resolve_process_group(cast(Any, process_group))
    ranks = process_group.size()
    return None if ranks == 1 else Group(process_group.group_name, ranks)


def synchronize(mean: Tensor, var: Tensor, count: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of the joined batch, ranks with an empty batch included: one all-gather of 2C+1 doubles.

    Gathered and merged rather than summed: a sum of squares over ranks would cancel where the mean is large, and every
    rank merges the same rows in the same order, so that all hold the same bits.
    """
    packed = torch.cat([mean, var, count.unsqueeze(1)], 1)
    everywhere = torch.ops._c10d_functional.all_gather_into_tensor(packed, group.ranks, group.name)
    rows = torch.ops._c10d_functional.wait_tensor(everywhere)
    channels = mean.size(1)
    return merge(rows[:, :channels], rows[:, channels : 2 * channels], rows[:, 2 * channels])


def share_slices(mean: Tensor, var: Tensor, count: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """One row that moves the buffers as the slices of all ranks together would; ranks may have different numbers.

    The buffers take Σnμ/Σn and Σnσ²/Σ(n−1) over slices: sums, so one all-reduce of 2C+2 doubles. The row returned has
    n values and the biased variance that the unbiased one belongs to.
    """
    n = count.unsqueeze(1)
    freedom = (count - 1).clamp(min=0).sum()
    packed = torch.cat([(n * mean).sum(0), (n * var).sum(0), count.sum().view(1), freedom.view(1)])
    sums = _all_reduce(packed, group)
    total, freedom = sums[-2], sums[-1]
    channels = mean.size(1)
    unbiased = sums[channels:-2] / freedom.clamp(min=1)
    biased = unbiased * (total - 1).clamp(min=0) / total.clamp(min=1)
    counted = total * (freedom > 0)  # one value a slice, everywhere: no variance to move the buffers by
    return (sums[:channels] / total.clamp(min=1)).unsqueeze(0), biased.unsqueeze(0), counted.view(1)


def synchronize_adjoint(sum_dy: Tensor, sum_dy_xmu: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Both sums over all ranks: one all-reduce of 2C doubles."""
    reduced = _all_reduce(torch.cat([sum_dy, sum_dy_xmu], 1), group)
    return reduced[:, : sum_dy.size(1)], reduced[:, sum_dy.size(1) :]


def _all_reduce(packed: Tensor, group: Group) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(packed, "sum", group.name))
