"""Synchronized statistics: one collective in the forward and one in the backward, with any backend."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .merged import merge

ProcessGroupLike = Any  # "world", a group's name, or a torch.distributed.ProcessGroup


def check_group(process_group: ProcessGroupLike) -> None:
    """Check that the argument can be a process group. Whether the group exists is checked at its first use.

    Raises:
        ValueError: the argument is no group, or this process is not a member of it.
    """
    if process_group is None or isinstance(process_group, str):
        return
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this process is not a member of the group; build the layer without it here")
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group must be None, 'world' or a torch.distributed group, got {type(process_group).__name__}"
        )


class Group(NamedTuple):
    """A process group as constants that a compiled graph can hold."""

    name: str
    ranks: int


def resolve(process_group: ProcessGroupLike) -> Group | None:
    """Find the group to synchronize over. Returns None where there is one rank only.

    'world' without an initialized torch.distributed means one rank, as for torch.nn.SyncBatchNorm.

    Raises:
        RuntimeError: another group, and torch.distributed is not initialized.
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
    """Compute the moments of the batches of all ranks together, by one all-gather of 2C+1 doubles.

    A rank may have an empty batch. The moments are gathered and merged, not summed, because in a sum of squares digits
    would cancel where the mean is large. Every rank merges the same rows in the same order, so all have the same bits.
    """
    packed = torch.cat([mean, var, count.unsqueeze(1)], 1)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(packed, group.ranks, group.name)
    rows = torch.ops._c10d_functional.wait_tensor(gathered)
    channels = mean.size(1)
    return merge(rows[:, :channels], rows[:, channels : 2 * channels], rows[:, 2 * channels])


def share_slices(mean: Tensor, var: Tensor, count: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one row of moments that updates the buffers as the ghost slices of all ranks together would.

    The buffers need Σnμ/Σn and Σnσ²/Σ(n−1) over slices. These are sums, so one all-reduce of 2C+2 doubles is enough.
    Ranks may have different numbers of slices.

    Returns:
        mean (1, C), biased variance (1, C) and count (1,). The count is 0 where every slice of every rank has a single
        value, because there is no variance then.
    """
    n = count.unsqueeze(1)
    freedom = (count - 1).clamp(min=0).sum()
    packed = torch.cat([(n * mean).sum(0), (n * var).sum(0), count.sum().view(1), freedom.view(1)])
    sums = _all_reduce(packed, group)
    total, freedom = sums[-2], sums[-1]
    channels = mean.size(1)
    unbiased = sums[channels:-2] / freedom.clamp(min=1)
    biased = unbiased * (total - 1).clamp(min=0) / total.clamp(min=1)
    count = total * (freedom > 0)
    return (sums[:channels] / total.clamp(min=1)).unsqueeze(0), biased.unsqueeze(0), count.view(1)


def synchronize_adjoint(sum_dy: Tensor, sum_dy_xmu: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Sum both sums over all ranks, by one all-reduce of 2C doubles."""
    reduced = _all_reduce(torch.cat([sum_dy, sum_dy_xmu], 1), group)
    return reduced[:, : sum_dy.size(1)], reduced[:, sum_dy.size(1) :]


def _all_reduce(packed: Tensor, group: Group) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(packed, "sum", group.name))
