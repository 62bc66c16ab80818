"""Which domain's statistics a call takes: one for the batch, or one for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["by_sample", "check_domain", "use_domain"]

# (input, residual, mask, domain) -> the result
OneDomain = Callable[[Tensor, Tensor | None, Tensor | None, int], Tensor]


def check_domain(domains: int | None, domain: int) -> int:
    """The domain, if it is one of so many.

    Raises:
        ValueError: it is not.
    """
    count = domains or 1
    if not 0 <= domain < count:
        raise ValueError(f"domain {domain} is not one of the layer's {count} (0 to {count - 1})")
    return domain


def by_sample(
    layer: Any, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: Tensor, one_domain: OneDomain
) -> Tensor:
    """Call `one_domain` on the samples of each domain, and put the results back in the samples' order."""
    domains = layer.options.domains
    if domain.shape != input.shape[:1] or domain.is_floating_point() or domain.dtype == torch.bool:
        raise ValueError(f"domain must be an int or one integer a sample ({input.size(0)},), got {tuple(domain.shape)}")
    if domain.numel():
        check_domain(domains, int(domain.min()))
        check_domain(domains, int(domain.max()))
    synchronized = layer.options.process_group is not None
    order = domain.argsort(stable=True)
    sizes = torch.bincount(domain, minlength=domains or 1).tolist()
    if not synchronized and layer.uses_batch_statistics():
        _check_sizes(input, sizes)
    pieces, start = [], 0
    for number, size in enumerate(sizes):
        index = order[start : start + size]
        start += size
        if not size and not synchronized:
            continue
        part = mask if mask is None or mask.dim() < input.dim() - 1 or mask.size(0) == 1 else mask[index]
        pieces.append(one_domain(input[index], None if residual is None else residual[index], part, number))
    return torch.cat(pieces)[order.argsort()] if pieces else one_domain(input, residual, mask, 0)


def _check_sizes(input: Tensor, sizes: list[int]) -> None:
    """Refuse a lone value before any domain's statistics have moved."""
    if input.numel() == input.size(0) * input.size(1) and 1 in sizes:
        raise ValueError(
            f"Expected more than 1 value per channel when training: domain {sizes.index(1)} has a single sample in "
            f"this batch of {input.size(0)}; draw at least two of each domain"
        )


@contextmanager
def use_domain(model: nn.Module, domain: int) -> Iterator[nn.Module]:
    """Make every layer of `model` that has domains take this one inside the block.

    For layers that are called by a container, which cannot hand the `domain` argument on.

    Args:
        model: any module that holds layers with ``domains``.
        domain: 0 to ``domains`` − 1.

    Raises:
        ValueError: no layer has domains, or one has no such domain.
    """
    layers: list[Any] = [module for module in model.modules() if getattr(module, "domains", None)]
    if not layers:
        raise ValueError("use_domain: no layer of this model has domains: build or convert it with domains=")
    for layer in layers:
        check_domain(layer.domains, domain)
    before = [layer.domain for layer in layers]
    try:
        for layer in layers:
            layer.domain = domain
        yield model
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.domain = old
