"""What every kernel does to its tiles: find them, load them, sum them, and the affine step's coefficients.

Moments are float64 in memory. Inside a tile arithmetic is COMPUTE (float32; float64 for float64 input). A mean is
high + low: `high` is subtracted from x, which rounds little or nothing where they are close, and what `low` adds to a
result goes into that result's constant, so that a mean of 1e6 costs nothing. Coefficients are formed in float64 before
they are rounded, so that neither 1e18² nor 1e-30² is ever a float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import through


@triton.jit
def locate(
    samples, channels, positions, per_slice, strips, chunks, inner_tiles,
    LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """This program's slice (row), part, channels, innermost indices, and its samples [first, last).

    `base` is the offset of the channel inside a sample. Neighbouring programs are neighbours in memory.
    """
    program = tl.program_id(0)
    tile = program % inner_tiles
    rest = program // inner_tiles
    inner = tile * BI + tl.arange(0, BI)
    if LAST:
        channel = inner
        live = inner < channels
        known = live
        base = tile.to(tl.int64) * 0
        strip = rest % strips
        row = rest // strips
        part = strip
    else:
        group = rest % channels
        rest = rest // channels
        channel = group + tl.arange(0, 1)
        live = inner < positions
        known = channel < channels
        base = group.to(tl.int64) * positions
        strip = rest % strips
        row = rest // strips
        part = strip * inner_tiles + tile
    row = row.to(tl.int64)
    first = row * per_slice + strip.to(tl.int64) * chunks * BN
    last = tl.minimum(tl.minimum(first + chunks * BN, (row + 1) * per_slice), samples)
    return row, part, channel, known, inner, live, base, first, last


@triton.jit
def place(n, last, inner, live, base, stride):
    """Offsets of the tile whose samples are `n` (int64: tensors may exceed 2³¹ elements), and which of it exist."""
    return n[:, None] * stride + (base + inner)[None, :], (n < last)[:, None] & live[None, :]


@triton.jit
def real_positions(mask, n, last, inner, exists, positions, LAST: tl.constexpr):
    """Which elements of the tile the mask keeps; all that exist where there is no mask."""
    real = exists
    if mask is not None:
        if LAST:
            real = exists & (tl.load(mask + n, mask=n < last, other=0) != 0)[:, None]
        else:
            real = exists & (tl.load(mask + n[:, None] * positions + inner[None, :], mask=exists, other=0) != 0)
    return real


@triton.jit
def counted(mask, n, last, live, real, LAST: tl.constexpr):
    """How many real values each channel has in the tile: one float64 for all its channels.

    It needs a reduction over the tile only where a mask meets positions innermost.
    """
    if mask is None:
        samples = tl.sum((n < last).to(tl.int32), 0)
        count = samples if LAST else samples * tl.sum(live.to(tl.int32), 0)
    elif LAST:
        count = tl.sum(((tl.load(mask + n, mask=n < last, other=0) != 0) & (n < last)).to(tl.int32), 0)
    else:
        count = tl.sum(tl.sum(real.to(tl.int32), 0), 0)
    return count.to(tl.float64)


@triton.jit
def total(values, LAST: tl.constexpr):
    """Sum over a tile, one value a channel: a tree in an order the shape alone fixes."""
    summed = tl.sum(values, 0)
    if not LAST:
        summed = tl.sum(summed, 0, keep_dims=True)
    return summed


@triton.jit
def largest(values, LAST: tl.constexpr):
    top = tl.max(values, 0)
    if not LAST:
        top = tl.max(top, 0, keep_dims=True)
    return top


@triton.jit
def powers(top):
    """A power of two p with top·p in [1, 2), as far as float32 has one, and 1/p."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def moments(x, real, count, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr):
    """Mean and M2 of a tile's `count` real values in float64, one a channel, by two passes over its registers.

    The first pass finds a shift near the mean; the second sums d = x − shift and d², scaled by a power of two so that
    no square overflows or vanishes. Then mean = shift + Σd/n and M2 = Σd² − (Σd)²/n, in which little cancels.
    """
    inverse = 1.0 / tl.maximum(count, 1.0)
    # divided before it is summed: the sum of a tile near float32's largest value must not overflow
    shift = total(tl.where(real, x, 0.0) * (1.0 / (BN * BI)), LAST) * (BN * BI * inverse).to(x.dtype)
    d = tl.where(real, x - shift[None, :], 0.0)
    unit = tl.full(shift.shape, 1.0, x.dtype)
    if x.dtype == tl.float32:
        power, unit = powers(largest(tl.abs(d), LAST))
        d = d * power[None, :]
    unit = unit.to(tl.float64)
    along = total(d, LAST).to(tl.float64)
    second = total(d * d, LAST).to(tl.float64) - along * along * inverse
    second = tl.where(second < 0, 0.0, second) * unit * unit
    shift = shift.to(tl.float64)
    return tl.where(tl.abs(shift) < float("inf"), shift + along * inverse * unit, shift), second


@triton.jit
def merged(count, mean, second, count_b, mean_b, second_b):
    """Chan's merge of two (count, mean, M2), in float64; an empty side changes nothing."""
    both = count + count_b
    inverse = 1.0 / tl.maximum(both, 1.0)
    apart = mean_b - mean
    second = second + second_b + apart * apart * (count * count_b * inverse)
    return both, mean * (count * inverse) + mean_b * (count_b * inverse), second


@triton.jit
def split(mean, COMPUTE: tl.constexpr):
    """A float64 mean as its COMPUTE part and the float64 rest."""
    high = mean.to(COMPUTE)
    return high, mean - high.to(tl.float64)


@triton.jit
def rounded(value, to: tl.constexpr):
    """A float64 value in a result's dtype, by way of float32: not every target converts float64 to bfloat16."""
    if to == tl.float64:
        result = value
    else:
        result = value.to(tl.float32).to(to)
    return result


@triton.jit
def scales(var, weight, channel, known, EPS: tl.constexpr):
    """invstd and weight·invstd in float64."""
    invstd = 1.0 / tl.sqrt(var + EPS)
    scale = invstd
    if weight is not None:
        scale = invstd * tl.load(weight + channel, mask=known, other=0.0).to(tl.float64)
    return invstd, scale


@triton.jit
def shifts(bias, low, scale, channel, known, COMPUTE: tl.constexpr):
    """The constant of z: bias − low·scale."""
    shift = -low * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=known, other=0.0).to(tl.float64)
    return shift.to(COMPUTE)


@triton.jit
def given(mean, var, row, channels, channel, known):
    """Moments from memory, of any floating dtype, as float64."""
    at = row * channels + channel
    return (
        tl.load(mean + at, mask=known, other=0.0).to(tl.float64),
        tl.load(var + at, mask=known, other=1.0).to(tl.float64),
    )


@triton.jit
def argument(x, high, scale, shift, residual, at, exists):
    """d = x − high, and z = d·scale + shift + residual."""
    d = x - high[None, :]
    z = d * scale[None, :] + shift[None, :]
    if residual is not None:
        z += tl.load(residual + at, mask=exists, other=0.0).to(x.dtype)
    return d, z


@triton.jit
def incoming(
    grad_output, input, residual, mask, at, exists, n, last, inner, positions, high, scale, shift,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, COMPUTE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """d = x − high and dz of a tile, z computed anew; which elements are real, and which of the others are holes.

    A hole is masked and not finite: it gives nothing and receives nothing, by selection (0·NaN is NaN).
    """
    x = tl.load(input + at, mask=exists, other=0.0).to(COMPUTE)
    grad = tl.load(grad_output + at, mask=exists, other=0.0).to(COMPUTE)
    d, z = argument(x, high, scale, shift, residual, at, exists)
    grad = through(grad, z, ACTIVATION, SLOPE)
    real = real_positions(mask, n, last, inner, exists, positions, LAST)
    empty = (real == 0) & ~(tl.abs(d) < float("inf"))
    if mask is not None:
        grad = tl.where(empty, 0.0, grad)
        d = tl.where(empty, 0.0, d)
    return d, grad, real, empty


@triton.jit
def sums_of(d, grad, exists, unit, offset, LAST: tl.constexpr):
    """Σ dz and Σ dz·x̂ of a tile in float64, one a channel; x̂ = d·unit − offset."""
    along = total(tl.where(exists, grad, 0.0), LAST)
    across = total(tl.where(exists, grad * (d * unit[None, :] - offset[None, :]), 0.0), LAST)
    return along.to(tl.float64), across.to(tl.float64)


@triton.jit
def slope_terms(sum_dy, sum_xmu, invstd, low, count, COMPUTE: tl.constexpr):
    """What x's own part in the moments takes from dz, as a constant and a multiple of d.

    Σdz/n + (x − mean)·invstd²·Σdz·(x − mean)/n, with x − mean = d − low.
    """
    n = tl.maximum(count, 1.0)
    across = sum_xmu / n * invstd * invstd
    return (sum_dy / n - low * across).to(COMPUTE), across.to(COMPUTE)


@triton.jit
def store_gradients(
    grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across, MASKED: tl.constexpr
):
    """Write dx and dz, each where there is a tensor for it; `along` None: the moments do not depend on x."""
    if grad_input is not None:
        dx = grad
        if along is not None:
            dx = grad - along[None, :] - d * across[None, :]
            if MASKED:
                dx = tl.where(real, dx, grad)
        dx = dx * scale[None, :]
        if MASKED:
            dx = tl.where(empty, 0.0, dx)
        tl.store(grad_input + at, dx.to(grad_input.dtype.element_ty), mask=exists)
    if grad_residual is not None:
        tl.store(grad_residual + at, grad.to(grad_residual.dtype.element_ty), mask=exists)
