"""What `batch_norm` refuses, before anything is computed or written: PyTorch's exception types, clearer words."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import ACTIVATIONS
from .options import check_ghost_batch_size

ONE_VALUE = "Expected more than 1 value per channel when training"
ONE_VALUE_ADVICE = (
    "a single value has no variance; use a larger batch, drop_last=True in the loader, or eval() with running "
    "statistics"
)
_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float64, *_HALF)


def check_input(input: Tensor, training: bool, eps: float, ghost_batch_size: int | None, synchronized: bool) -> None:
    """The input's layout, dtype, dimensions and number of values a channel, and eps."""
    check_not_nested(input)
    if input.layout is not torch.strided:
        raise NotImplementedError(f'"batch_norm" not implemented for {input.layout}, use input.to_dense()')
    if input.dtype not in _FLOATING:
        first = (
            "run batchnorm.revert(model) before it is quantized: quantization knows torch's own layers"
            if input.is_quantized
            else "convert the input first"
        )
        raise NotImplementedError(f'"batch_norm" not implemented for {input.dtype}, {first}')
    size = input.shape
    if len(size) < 2:
        # as torch's, which looks at the size of the first axis in training alone
        raise (IndexError if training and not size else RuntimeError)(
            f"batch_norm: expected an input of shape (N, C, *), got {tuple(size)}"
        )
    if eps < 0.0 or (training and eps == 0.0):
        kind = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {kind}, but got {eps}")
    if not training:
        return
    samples = size[0]
    if ghost_batch_size is not None:
        check_ghost_batch_size(ghost_batch_size)
        samples = min(samples, ghost_batch_size)
    # other ranks may hold the values that this one lacks
    if samples == 1 and not synchronized and input.numel() == size[0] * size[1] != 0:
        raise ValueError(f"{ONE_VALUE}, got input size {size}: {ONE_VALUE_ADVICE}")


def check_tensor(input: object) -> None:
    """Torch's error for what is no tensor."""
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' (position 1) must be Tensor, not {torch.typename(input)}")


def check_not_nested(input: object) -> None:
    """A nested tensor has no number of positions that all its samples share."""
    if getattr(input, "is_nested", False):
        raise NotImplementedError(
            '"batch_norm" not implemented for nested tensors, pad it with torch.nested.to_padded_tensor and give the '
            "valid positions as mask"
        )


def check_shared_count(count: Tensor) -> None:
    """The number of values a channel of all ranks together; on a GPU it is not looked at, which would wait for it."""
    if count.device.type == "cpu" and not torch.compiler.is_compiling() and bool((count == 1).any()):
        raise ValueError(f"{ONE_VALUE}, got one in all ranks together: {ONE_VALUE_ADVICE}")


def check_vectors(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Every given per-channel vector: C elements, a dtype that goes with the input's, its device."""
    size, dtype, device = input.shape[1:2], input.dtype, input.device
    half = dtype in _HALF
    for place, vector in enumerate((running_mean, running_var, weight, bias)):
        if vector is None or (vector.shape == size and vector.dtype is dtype and vector.device == device):
            continue
        if vector.shape != size or not (half and vector.dtype is torch.float32) or vector.device != device:
            _refuse_vector(input, ("running_mean", "running_var", "weight", "bias")[place], vector)


def _refuse_vector(input: Tensor, name: str, vector: Tensor) -> None:
    channels, dtype = input.size(1), input.dtype
    if vector.numel() != channels or vector.dim() != 1:
        raise RuntimeError(
            f"{name} should contain {channels} elements not {vector.numel()}: "
            f"the channel axis of the input {tuple(input.shape)} is axis 1"
        )
    if vector.device != input.device:
        raise RuntimeError(
            f"batch_norm: expected all tensors on one device: the input is on {input.device}, {name} on {vector.device}"
        )
    raise RuntimeError(
        f"batch_norm: an input of {dtype} takes {name} of {dtype}"
        f"{' or torch.float32' if dtype in _HALF else ''}, got {vector.dtype}"
    )


def check_buffers(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    """Both buffers or neither; both in evaluation; no gradient through them; none that overlaps itself."""
    if running_mean is None or running_var is None:
        if not training:
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{missing} must be defined in evaluation mode")
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        return
    for buffer in (running_mean, running_var):
        if buffer.requires_grad:
            raise RuntimeError("batch_norm is not differentiable with respect to running_mean and running_var")
        if training and buffer.stride() == (0,) and buffer.numel() > 1:
            raise RuntimeError(
                "running_mean and running_var are written in training, but more than one element of a buffer refers "
                "to a single memory location: clone() it first"
            )


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    """The residual is added to the result: the same shape, dtype and device."""
    if residual is None:
        return
    if residual.shape != input.shape:
        raise ValueError(
            f"residual of shape {tuple(residual.shape)} does not fit the input of shape {tuple(input.shape)}: "
            "they must be the same"
        )
    if residual.dtype != input.dtype or residual.device != input.device:
        raise RuntimeError(
            f"residual must have the input's dtype and device ({input.dtype}, {input.device}), "
            f"got {residual.dtype}, {residual.device}"
        )


def check_momentum(
    momentum: float | None, training: bool, running_mean: Tensor | None, num_batches_tracked: Tensor | None
) -> None:
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over num_batches_tracked: give that counter, or a momentum")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
