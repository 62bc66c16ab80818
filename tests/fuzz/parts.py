"""What the text of a program calls: settled networks, inputs in every layout, hooks and other touches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.inspect.modules import is_norm

__all__ = [
    "drawn", "float_counter", "halve_gradient", "halve_input", "halve_output", "look", "mask_of", "no_weight_grad",
    "parametrize_weight", "scaled", "settled", "wrap_forward", "zero_weight",
]  # fmt: skip


def settled(kind: type[nn.Module], seed: int) -> nn.Module:
    """The network with random parameters and statistics, as if it had been trained for a while."""
    torch.manual_seed(seed)
    net = kind()
    for module in net.modules():
        if not is_norm(module):
            continue
        with torch.no_grad():
            if module.weight is not None:
                module.weight.copy_(torch.randn(module.weight.shape).abs() + 0.3)
                module.weight[::2].neg_()
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape))
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape) * 0.5)
                module.running_var.copy_(torch.rand(module.running_var.shape) + 0.4)
                module.num_batches_tracked.fill_(3)
    return net


def drawn(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values of a shape, with memory in the given order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    return arranged(x, layout)


def arranged(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every second element of a larger tensor along each axis
        large = x.new_zeros([2 * size for size in x.shape])
        view = large[tuple(slice(None, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":  # one value along the last axis, without memory of its own
        return x[..., :1].expand(x.shape)
    return x


def scaled(x: Tensor, scale: float) -> Tensor:
    """x·scale in memory of its own, with the strides of x."""
    memory = x.new_zeros(1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)))
    copy = memory.as_strided(x.shape, x.stride())
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())
    copy[once] = x[once] * scale
    return copy.detach()


def mask_of(x: Tensor) -> Tensor:
    """A mask for a batch normalization of x: two real positions of three, the same in each call."""
    positions = torch.arange(x[:, 0].numel()).view(x[:, 0].shape)
    return positions % 3 != 1


def halve_output(module, args, out):
    return out * 0.5


def halve_input(module, args):
    return (args[0] * 0.5, *args[1:])


def look(module, args, out):
    return None


def halve_gradient(module, grad_input, grad_output):
    return tuple(None if g is None else g * 0.5 for g in grad_input)


def wrap_forward(module: nn.Module) -> None:
    """An instance's own forward around the old one, as accelerate and profilers put it there."""
    old = type(module).forward
    module.forward = lambda *args, **kwargs: old(module, *args, **kwargs) * 2  # type: ignore[method-assign]  # the point


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrize_weight(module: nn.Module) -> None:
    if module._parameters.get("weight") is not None:
        parametrize.register_parametrization(module, "weight", Twice())


def no_weight_grad(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        parameter.requires_grad_(name != "weight")


def zero_weight(module: nn.Module) -> None:
    """One channel of a normalization whose γ is zero."""
    if is_norm(module) and module._parameters.get("weight") is not None:
        with torch.no_grad():
            module.weight[0] = 0.0


def float_counter(module: nn.Module) -> None:
    """What `net.type(torch.float64)` makes of the counter."""
    if getattr(module, "num_batches_tracked", None) is not None and is_norm(module):
        module.num_batches_tracked = module.num_batches_tracked.to(torch.float32)
