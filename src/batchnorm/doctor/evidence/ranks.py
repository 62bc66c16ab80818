"""Compares the running statistics of all ranks by collectives on tensors. Nothing is pickled."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...statistics.pool import Gather, gather_over
from .normalizations import Layer

__all__ = ["Ranks", "compare_ranks", "is_distributed", "world_size"]


def is_distributed() -> bool:
    """Return whether `torch.distributed` has a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 where nothing is distributed."""
    return dist.get_world_size() if is_distributed() else 1


@dataclass(frozen=True)
class Ranks:
    """How much the buffers of the ranks differ.

    Attributes:
        size: number of ranks.
        same_layers: all ranks have the same layers of the same widths.
        spread: by the id of the layer, the largest mean shift in σ and the largest |log2| variance ratio.
        broadcast: DistributedDataParallel sends the buffers of rank 0 to all ranks.
    """

    size: int
    same_layers: bool
    spread: dict[int, tuple[float, float]]
    broadcast: bool


def compare_ranks(model: nn.Module, layers: list[Layer], process_group: Any) -> Ranks:
    """Gather and compare the buffers of all ranks. The call is collective: each rank of the group has to make it."""
    gather = gather_over(process_group)
    tracked = [layer for layer in layers if layer.tracks]
    names = ";".join(f"{layer.name}:{layer.num_features}" for layer in tracked).encode()
    signs = gather(torch.tensor([len(tracked), zlib.crc32(names)], dtype=torch.int64))
    broadcast = any(
        isinstance(m, nn.parallel.DistributedDataParallel) and getattr(m, "broadcast_buffers", False)
        for m in model.modules()
    )
    same_layers = all(torch.equal(signs[0], other) for other in signs)
    spread = {id(layer): _spread(layer, gather) for layer in tracked} if same_layers else {}
    return Ranks(len(signs), same_layers, spread, broadcast)


def _spread(layer: Layer, gather: Gather) -> tuple[float, float]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    gathered = gather(torch.stack([layer.running_mean.detach(), layer.running_var.detach()]).double())
    # Every rank compares with rank 0, so that all come to the same result.
    shifts, ratios = zip(*(_difference(gathered[0], other, layer.eps) for other in gathered), strict=True)
    return max(shifts), max(ratios)


def _difference(a: Tensor, b: Tensor, eps: float) -> tuple[float, float]:
    shift = (a[0] - b[0]).abs() / (a[1].abs() + eps).sqrt()
    ratio = ((b[1] + eps) / (a[1] + eps)).log2().abs()
    return _largest(shift), _largest(ratio)


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(float("inf")).max()) if values.numel() else 0.0
