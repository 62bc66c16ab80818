"""How a layer keeps its statistics where one update a call is not what is wanted.

Domains (a set of statistics each), accumulation (one update for the union of k micro-batches), skipped batches
(counted), renormalisation under checkpointing (the second forward must see what the first saw).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .functional import batch_norm_with_moments, move_buffers, on_axis, recomputing, runs_where_we_are_not
from .moments import Moments, merge
from .ops import fused

if TYPE_CHECKING:
    from .layers import _Layer

# Of how many calls before a backward a renormalised layer can still tell, under checkpointing, what each saw.
_CALLS_REMEMBERED = 16
_COMPILED_INSIDE = (
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


class Seen(NamedTuple):
    """What a renormalised call saw: the mean of its batch, by which it is known again, and the buffers before it."""

    mean: Tensor
    memory: Memory


def kept_forward(
    layer: _Layer, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int | Tensor | None
) -> Tensor:
    """The layer's call, every keyword considered."""
    if layer.feature_axis != 1:
        return on_axis(
            lambda moved, residual, mask: kept_second_axis(layer, moved, residual, mask, domain),
            layer.feature_axis, input, residual, mask,
        )  # fmt: skip
    return kept_second_axis(layer, input, residual, mask, domain)


def kept_second_axis(
    layer: _Layer, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int | Tensor | None
) -> Tensor:
    chosen = layer.domain if domain is None else domain
    if not isinstance(chosen, Tensor):
        return _one_domain(layer, input, residual, mask, _checked(layer, int(chosen)))
    if chosen.dim() == 0:
        return _one_domain(layer, input, residual, mask, _checked(layer, int(chosen)))
    return _by_sample(layer, input, residual, mask, chosen)


def _checked(layer: _Layer, domain: int) -> int:
    if not 0 <= domain < (layer.domains or 1):
        raise ValueError(
            f"domain {domain} is not one of the layer's {layer.domains or 1} (0 to {(layer.domains or 1) - 1})"
        )
    return domain


def _by_sample(layer: _Layer, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: Tensor) -> Tensor:
    """Each sample with the statistics of its domain: sorted by domain, normalised apart, brought back in order.

    With a process group every domain is visited, present here or not: all ranks must meet in each collective.
    """
    if domain.shape != input.shape[:1] or domain.is_floating_point() or domain.dtype == torch.bool:
        raise ValueError(f"domain must be an int or one integer a sample ({input.size(0)},), got {tuple(domain.shape)}")
    if domain.numel():
        _checked(layer, int(domain.min()))
        _checked(layer, int(domain.max()))
    order = domain.argsort(stable=True)
    sizes = torch.bincount(domain, minlength=layer.domains or 1).tolist()
    _check_sizes(layer, input, sizes)
    pieces, start = [], 0
    for number, size in enumerate(sizes):
        index = order[start : start + size]
        start += size
        if not size and layer.process_group is None:
            continue
        part = mask if mask is None or mask.dim() < input.dim() - 1 or mask.size(0) == 1 else mask[index]
        pieces.append(_one_domain(layer, input[index], None if residual is None else residual[index], part, number))
    return torch.cat(pieces)[order.argsort()] if pieces else _one_domain(layer, input, residual, mask, 0)


def _check_sizes(layer: _Layer, input: Tensor, sizes: list[int]) -> None:
    """Refuse a lone value before any domain's statistics have moved."""
    alone = input.numel() == input.size(0) * input.size(1) and layer.process_group is None
    if alone and layer.uses_batch_statistics() and 1 in sizes:
        raise ValueError(
            f"Expected more than 1 value per channel when training: domain {sizes.index(1)} has a single sample in "
            f"this batch of {input.size(0)}; draw at least two of each domain"
        )


def _one_domain(layer: _Layer, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int) -> Tensor:
    memory = layer.memory(domain)
    training = layer.uses_batch_statistics()
    keep = layer.track_running_stats or not layer.training or layer.frozen
    again = training and recomputing()
    before = memory
    if layer.renorm is not None and training:
        before = _recalled(layer, input, mask, domain) if again else _copied(memory)
    out, moments = batch_norm_with_moments(
        input,
        before.running_mean if keep else None,
        before.running_var if keep else None,
        memory.weight,
        memory.bias,
        training,
        layer.eps,
        activation=layer.activation,
        residual=residual,
        mask=mask,
        ghost_batch_size=layer.ghost_batch_size,
        renorm=layer.renorm if training else None,
        process_group=layer.process_group,
        negative_slope=layer.negative_slope,
        num_batches_tracked=before.num_batches_tracked,
    )
    if moments is not None and keep and memory.running_mean is not None and not again:
        if layer.renorm is not None and not runs_where_we_are_not():
            _note(layer, domain, Seen(moments[0], before))
        _remember(layer, memory, moments, domain)
    return out


def _copied(memory: Memory) -> Memory:
    mean, var, tracked = (None if t is None else t.detach().clone() for t in memory[:3])
    return Memory(mean, var, tracked, memory.weight, memory.bias)


def _note(layer: _Layer, domain: int, seen: Seen) -> None:
    """Keep what a renormalised call saw. A compiled graph must return it, lest it read the moved buffers again."""
    if torch.compiler.is_compiling():
        layer._before[domain] = deque([seen], maxlen=_CALLS_REMEMBERED)  # a growing one would compile anew each call
    else:
        layer._before.setdefault(domain, deque(maxlen=_CALLS_REMEMBERED)).append(seen)


def _recalled(layer: _Layer, input: Tensor, mask: Tensor | None, domain: int) -> Memory:
    """The buffers that the first forward of this batch was renormalised against, whatever has moved them since.

    Several calls may lie between a forward and its backward, and backwards come in any order: the batch is known
    again by its mean.
    """
    seen = layer._before.get(domain)
    if not seen:
        return _copied(layer.memory(domain))
    with torch.no_grad():
        _, moments = batch_norm_with_moments(
            input, None, None, None, None, True, layer.eps,
            mask=mask, ghost_batch_size=layer.ghost_batch_size, process_group=layer.process_group,
        )  # fmt: skip
    assert moments is not None  # a training call on a batch that was normalised once
    distances = [
        (call.mean - moments[0]).nan_to_num().abs().sum() if call.mean.shape == moments[0].shape else torch.inf
        for call in reversed(seen)
    ]
    return seen[-1 - distances.index(min(distances))].memory


def _remember(layer: _Layer, memory: Memory, moments: Moments, domain: int) -> None:
    """Move the buffers by these moments: now, or with those of the micro-batches to come."""
    if layer.accumulation_steps > 1:
        if runs_where_we_are_not():
            raise NotImplementedError(
                "accumulation_steps in training under vmap, forward mode or export: the micro-batches wait in Python; "
                "use accumulation_steps=1 there, or eval()"
            )
        pending = layer._pending.setdefault(domain, [])
        pending.append(moments)
        if len(pending) < layer.accumulation_steps:
            return
        mean, var, count = (torch.cat(rows) for rows in zip(*pending, strict=True))
        pending.clear()
        # slices stay slices; whole micro-batches become the one batch of their union
        moments = (mean, var, count) if layer.ghost_batch_size else merge(mean, var, count)
    running_mean, running_var, tracked = memory.running_mean, memory.running_var, memory.num_batches_tracked
    mean, var, count = moments
    kept_here = layer.renorm is not None or layer.accumulation_steps > 1
    refusal = _COMPILED_INSIDE if kept_here else ""
    if layer.nonfinite != "skip":
        move_buffers(running_mean, running_var, tracked, mean, var, count, layer.momentum, False, refusal)
        return
    skipped = layer.get_buffer("num_batches_skipped")
    finite = fused.all_finite(*fused.pooled(mean, var, count)[:2], running_mean)
    if layer.momentum is None and tracked is not None:  # the average is over the batches that took part
        took_part = tracked - skipped
        move_buffers(running_mean, running_var, took_part, mean, var, count, None, True, refusal)
        tracked.add_(1)
    else:
        move_buffers(running_mean, running_var, tracked, mean, var, count, layer.momentum, True, refusal)
    skipped.add_(~finite)


@contextmanager
def use_domain(model: nn.Module, domain: int) -> Iterator[nn.Module]:
    """Every layer of `model` that has domains takes this one inside the block.

    For layers that are called by a container, which cannot hand the `domain` argument on.

    Raises:
        ValueError: no layer has domains, or one has no such domain.
    """
    layers = [module for module in model.modules() if getattr(module, "domains", None)]
    if not layers:
        raise ValueError("use_domain: no layer of this model has domains: build or convert it with domains=")
    for layer in layers:
        _checked(layer, domain)  # type: ignore[arg-type]  # told by its attribute, so that subclasses count
    before = [layer.domain for layer in layers]
    try:
        for layer in layers:
            layer.domain = domain  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.domain = old
