"""Whether all ranks hold the same running statistics: compared by collectives on tensors, nothing is pickled."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import Layer

__all__ = ["Ranks", "compare_ranks"]


class Ranks:
    """`spread`: by the layer's id, the largest mean shift in σ and the largest |log2| variance ratio between this
    rank and any other; `same_layers`: all ranks have the same layers of the same widths."""

    def __init__(self, size: int, same_layers: bool, spread: dict[int, tuple[float, float]], broadcast: bool) -> None:
        self.size, self.same_layers, self.spread, self.broadcast = size, same_layers, spread, broadcast


def compare_ranks(model: nn.Module, layers: list[Layer], process_group: Any) -> Ranks:
    """Gathers the buffers of every rank; each rank of the group has to call it. Same collectives on every rank."""
    group = dist.group.WORLD if process_group == "world" else process_group
    size = dist.get_world_size(group)
    kept = [layer for layer in layers if layer.tracks]
    device = torch.device("cuda") if "nccl" in str(dist.get_backend(group)) else torch.device("cpu")
    shape = ";".join(f"{layer.name}:{layer.num_features}" for layer in kept).encode()
    sign = torch.tensor([len(kept), zlib.crc32(shape)], dtype=torch.int64, device=device)
    signs = [torch.empty_like(sign) for _ in range(size)]
    dist.all_gather(signs, sign, group=group)
    wrapped = any(
        isinstance(m, nn.parallel.DistributedDataParallel) and getattr(m, "broadcast_buffers", False)
        for m in model.modules()
    )
    if not all(torch.equal(sign, other) for other in signs):
        return Ranks(size, False, {}, wrapped)
    spread = {id(layer): _spread(layer, group, size, device) for layer in kept}
    return Ranks(size, True, spread, wrapped)


def _spread(layer: Layer, group: Any, size: int, device: torch.device) -> tuple[float, float]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mine = torch.stack([layer.running_mean.detach(), layer.running_var.detach()]).double().to(device)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    # Against rank 0, so that every rank comes to the same result.
    shifts, ratios = zip(*(_apart(gathered[0], other, layer.eps) for other in gathered), strict=True)
    return max(shifts), max(ratios)


def _apart(a: Tensor, b: Tensor, eps: float) -> tuple[float, float]:
    shift = (a[0] - b[0]).abs() / (a[1].abs() + eps).sqrt()
    ratio = ((b[1] + eps) / (a[1] + eps)).log2().abs()
    found = (float(t.nan_to_num(float("inf")).max()) if t.numel() else 0.0 for t in (shift, ratio))
    return tuple(found)  # type: ignore[return-value]  # two entries, from the tuple above
