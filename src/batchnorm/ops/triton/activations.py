"""The activations inside a kernel: value and derivative of each name in ops/activations.py, NaN kept as PyTorch does.

The name is known when the kernel is compiled, so no element pays for the choice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    """2σ(2z) − 1; near zero, where that cancels, the odd series up to z⁹ (next term below 2⁻²⁴ of z for |z| < ¼)."""
    whole = 2 * tl.sigmoid(2 * z) - 1
    if z.dtype == tl.float32:
        q = z * z
        series = z * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
        whole = tl.where(tl.abs(z) < 0.25, series, whole)
    return whole


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """activation(z); the empty name is the identity."""
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
def through(grad, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """grad · activation′(z); at a kink the derivative is PyTorch's (0 at a ReLU's zero)."""
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
