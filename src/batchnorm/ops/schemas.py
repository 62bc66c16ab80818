"""The operators' schemas, their fake implementations, and the reference as the kernel of every device.

The reference is registered as CompositeExplicitAutograd. A C++ kernel (CPU) or a Triton kernel (CUDA) that is
registered under the same name replaces it for its device, and callers stay the same. csrc/README.md specifies what a
kernel must do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import fused, reference
from .layout import dense, slice_count

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_FORM = "float eps, str activation, float negative_slope, int slice_size"
_BUFFERS = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
_UPDATE = f"{_BUFFERS}, Tensor mean, Tensor var, Tensor count, float? momentum, bool skip_nonfinite"

SCHEMAS = {
    "stats": "(Tensor input, Tensor? mask, int slice_size) -> (Tensor mean, Tensor var, Tensor count)",
    "apply": f"(Tensor input, Tensor mean, Tensor var, {_AFFINE}, {_FORM}) -> Tensor",
    "backward_reduce": f"(Tensor grad_output, Tensor input, Tensor mean, Tensor var, {_AFFINE}, Tensor? mask, {_FORM})"
    " -> (Tensor sum_dy, Tensor sum_dy_xmu)",
    "backward_elemt": f"(Tensor grad_output, Tensor input, Tensor mean, Tensor var, {_AFFINE}, Tensor? mask,"
    f" Tensor? sum_dy, Tensor? sum_dy_xmu, Tensor? count, {_FORM}, bool need_residual)"
    " -> (Tensor grad_input, Tensor grad_residual)",
    "forward": f"(Tensor input, {_AFFINE}, Tensor? mask, {_FORM})"
    " -> (Tensor out, Tensor mean, Tensor var, Tensor count)",
    "backward": "(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? count,"
    f" {_AFFINE}, Tensor? mask, {_FORM}, bool[4] output_mask)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    "update_running_": f"({_UPDATE}) -> ()",
    "forward_update_running_": f"(Tensor input, {_AFFINE}, Tensor? mask, {_BUFFERS}, float? momentum,"
    f" bool skip_nonfinite, {_FORM}) -> (Tensor out, Tensor mean, Tensor var, Tensor count)",
    "update_running_once_": f"({_UPDATE}, str refusal) -> ()",
    "forward_inplace_": f"(Tensor(d!) input, Tensor? weight, Tensor? bias, {_BUFFERS}, float? momentum,"
    f" bool skip_nonfinite, {_FORM}) -> (Tensor mean, Tensor var, Tensor count)",
    "backward_inplace": "(Tensor grad_output, Tensor out, Tensor mean, Tensor var, Tensor count, Tensor? weight,"
    f" Tensor? bias, {_FORM}, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
}

_LIBRARY = torch.library.Library("batchnorm", "DEF")


def _moments(input: Tensor, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice_count(input.size(0), slice_size)
    mean = input.new_empty((rows, input.size(1)), dtype=torch.float64)
    return mean, torch.empty_like(mean), mean.new_empty(rows)


def _fake_stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _moments(input, slice_size)


def _fake_apply(input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(dense(input))


def _fake_backward_reduce(grad_output: Tensor, input: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    mean, var, _ = _moments(input, cast(int, arguments[-1]))
    return mean, var


def _fake_backward_elemt(grad_output: Tensor, input: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    grad_input = torch.empty_like(dense(input))
    return grad_input, torch.empty_like(grad_input) if arguments[-1] else input.new_empty(0)


def _fake_forward(input: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(input)), *_moments(input, cast(int, arguments[-1]))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *arguments: object,
) -> tuple[Tensor, ...]:
    output_mask = arguments[-1]
    assert isinstance(output_mask, list | tuple)
    like = (dense(input), weight, bias, dense(input))
    return tuple(
        torch.empty_like(t) if wanted and t is not None else input.new_empty(0)
        for t, wanted in zip(like, output_mask, strict=True)
    )


def _fake_forward_inplace_(input: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    return _moments(input, cast(int, arguments[-1]))


def _fake_backward_inplace(
    grad_output: Tensor,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    return _fake_backward(grad_output, out, mean, var, count, weight, bias, [*arguments[-1], False])[:3]


def _fake_update_running_(*_: object) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "stats": (reference.stats, _fake_stats),
    "apply": (reference.apply, _fake_apply),
    "backward_reduce": (reference.backward_reduce, _fake_backward_reduce),
    "backward_elemt": (reference.backward_elemt, _fake_backward_elemt),
    "forward": (fused.forward, _fake_forward),
    "backward": (fused.backward, _fake_backward),
    "update_running_": (fused.update_running_, _fake_update_running_),
    "forward_update_running_": (fused.forward_update_running_, _fake_forward),
    "update_running_once_": (fused.update_running_once_, _fake_update_running_),
    "forward_inplace_": (fused.forward_inplace_, _fake_forward_inplace_),
    "backward_inplace": (fused.backward_inplace, _fake_backward_inplace),
}

_LIBRARY.define("empty_cache() -> int")  # only the compiled kernels implement it, see extension.empty_cache

for _name, _schema in SCHEMAS.items():
    _kernel, _fake = _IMPLEMENTATIONS[_name]
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchnorm::{_name}", _fake, lib=_LIBRARY)
