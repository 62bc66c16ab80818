"""The activations in a kernel: value and derivative of each name in ops/activations.py. NaN gives NaN, as in PyTorch.

The name is a compile-time constant, so the choice takes no time in the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    """Compute tanh(z) = 2σ(2z) − 1.

    Near zero digits would cancel. For |z| < ¼ a series up to z⁹ is used, whose next term is below 2⁻²⁴·z.
    """
    result = 2 * tl.sigmoid(2 * z) - 1
    if z.dtype == tl.float32:
        q = z * z
        series = z * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
        result = tl.where(tl.abs(z) < 0.25, series, result)
    return result


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Compute activation(z). The empty name is the identity."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "hardswish":
        z = z * (tl.minimum(tl.maximum(z + 3, 0.0), 6.0) / 6)
    elif ACTIVATION == "sigmoid":
        z = tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    else:
        tl.static_assert(ACTIVATION == "")
    return z


@triton.jit
def activation_backward(grad, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Compute grad·activation′(z). At a kink the derivative is PyTorch's, for example 0 for ReLU at z = 0."""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, grad * 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((z <= 0) | (z >= 6), grad * 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * SLOPE)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        grad = grad * (s * (1 + z * (1 - s)))
    elif ACTIVATION == "hardswish":
        grad = tl.where(z <= -3, grad * 0.0, tl.where(z >= 3, grad, grad * (z / 3 + 0.5)))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        grad = grad * (s * (1 - s))
    elif ACTIVATION == "tanh":
        s = tl.sigmoid(2 * z)
        grad = grad * (4 * s * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "")
    return grad
