"""Functions that the kernels share: locate a tile, load and store it, sum it, and compute its coefficients.

Moments are float64 in memory. The elements of a tile have the type COMPUTE: float64 for float64 input, else float32. A
mean is the sum of `high`, its COMPUTE part, and `low`, the difference. Kernels subtract `high` from x.
This rounds little or nothing where the two are close, so a mean of 1e6 loses no accuracy. `low` is part of the
coefficients. Coefficients are computed in float64 and rounded at the end, because the square of 1e18 or of 1e-30 is not
a float32.

Names: `n` are the rows of a tile; `end_row` is the end of the rows of the chunk; `in_bounds` are the elements of the
tile that the tensor has, None for all; `channel_mask` are the channels that the tensor has; NHWC means channels_last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activation_backward


@triton.jit
def locate(
    rows, channels, slice_rows, chunks, tiles, channel_blocks,
    NHWC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the program's slice, chunk, channels and channel mask, its rows [first_row, end_row) and their tiles.

    Adjacent programs read adjacent memory. The last slice may have fewer rows, and then some chunks have none.
    """
    program = tl.program_id(0)
    channel_block = program % channel_blocks
    quotient = program // channel_blocks
    chunk = quotient % chunks
    slice_index = quotient // chunks
    if NHWC:
        channel = channel_block * WIDTH + tl.arange(0, WIDTH)
    else:
        channel = channel_block + tl.arange(0, 1)
    own_rows = tl.minimum(slice_rows, rows - slice_index * slice_rows)
    begin = tl.minimum(chunk * tiles * ROWS, own_rows)
    first_row = slice_index * slice_rows + begin
    end_row = first_row + tl.minimum(tiles * ROWS, own_rows - begin)  # a difference, because a sum near 2³¹ overflows
    slice_index = slice_index.to(tl.int64)
    channel_mask = channel < channels
    tiles = tl.cdiv(end_row - first_row, ROWS)
    return slice_index, chunk, channel, channel_mask, first_row, end_row, tiles


@triton.jit
def row_offsets(
    n, channel, pixel_vectors, map_vectors, magic, bits, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr
):
    """Compute the offsets of a tile's elements. They have 64 bits for a LARGE tensor, of 2³¹ elements or more.

    A row is the channels of one pixel, or one vector: VECTOR adjacent pixels of one channel. The offset of each row is
    a multiple of VECTOR, which tells the compiler how many elements one access may have. The sample is
    n // map_vectors, which is computed by a multiplication because a division is slower.
    """
    if NHWC:
        begin = (n.to(tl.int64) if LARGE else n) * pixel_vectors * VECTOR
        offsets = begin[:, None] + channel[None, :]
    else:
        sample = tl.umulhi((2 * n).to(tl.uint32), magic.to(tl.uint32, bitcast=True)).to(tl.int32) >> bits
        begin_map = ((sample.to(tl.int64) if LARGE else sample) * pixel_vectors + channel) * map_vectors
        begin = (begin_map + (n - sample * map_vectors)) * VECTOR
        offsets = begin[:, None] + tl.arange(0, VECTOR)[None, :]
    return offsets


@triton.jit
def bounds_mask(n, end_row, channel_mask, NHWC: tl.constexpr, FULL: tl.constexpr):
    """Return which elements of the tile the tensor has; None if the tile is FULL."""
    in_bounds = None
    if not FULL:
        if NHWC:
            in_bounds = (n < end_row)[:, None] & channel_mask[None, :]
        else:
            in_bounds = (n < end_row)[:, None]
    return in_bounds


@triton.jit
def read(pointer, offsets, in_bounds, COMPUTE: tl.constexpr):
    """Load a tile and convert it to COMPUTE."""
    if in_bounds is None:
        values = tl.load(pointer + offsets)
    else:
        values = tl.load(pointer + offsets, mask=in_bounds, other=0.0)
    return values.to(COMPUTE)


@triton.jit
def write(pointer, offsets, values, in_bounds):
    """Convert a tile to the tensor's dtype and store it."""
    if in_bounds is None:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=in_bounds)


@triton.jit
def select(condition, values):
    """Replace values by 0 where the condition is false. None is a condition that is always true."""
    if condition is not None:
        values = tl.where(condition, values, 0.0)
    return values


@triton.jit
def valid_elements(mask, n, end_row, in_bounds, NHWC: tl.constexpr, WIDTH: tl.constexpr):
    """Return which elements of the tile are valid by the mask; `in_bounds` without a mask."""
    valid = in_bounds
    if mask is not None:
        if NHWC:
            valid = in_bounds & (tl.load(mask + n, mask=n < end_row, other=0) != 0)[:, None]
        else:
            flat = n[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            valid = in_bounds & (tl.load(mask + flat, mask=in_bounds, other=0) != 0)
    return valid


@triton.jit
def count_valid(mask, n, end_row, valid, NHWC: tl.constexpr, WIDTH: tl.constexpr):
    """Count the valid values of a channel in the tile, which are the same number for each channel. A float64.

    It takes a reduction over the tile only for a mask in contiguous memory.
    """
    if mask is None:
        count = tl.sum((n < end_row).to(tl.int32), 0)
        if not NHWC:
            count = count * WIDTH
    elif NHWC:
        count = tl.sum(((tl.load(mask + n, mask=n < end_row, other=0) != 0) & (n < end_row)).to(tl.int32), 0)
    else:
        count = tl.sum(tl.sum(valid.to(tl.int32), 0), 0)
    return count.to(tl.float64)


@triton.jit
def tile_sum(values, NHWC: tl.constexpr):
    """Sum a tile over all but its channels. The order of the sum depends only on the tile's shape."""
    if NHWC:
        summed = tl.sum(values, 0)
    else:
        summed = tl.sum(tl.sum(values, 1), 0, keep_dims=True)
    return summed


@triton.jit
def tile_max(values, NHWC: tl.constexpr):
    """Compute the maximum of a tile over all but its channels."""
    top = tl.max(values, 0)
    if not NHWC:
        top = tl.max(top, 0, keep_dims=True)
    return top


@triton.jit
def power_of_two_scale(top):
    """Compute the power of two p with top·p in [1, 2), as far as float32 has one. Returns p and 1/p."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded_mean(divided, count, divisor, COMPUTE: tl.constexpr):
    """Compute the mean as a COMPUTE number from the sum of `count` values, each of which was divided by `divisor`.

    The last operation is a float64 division, not a float32 product. A product would be fused with the subtraction
    x − mean, which would use the unrounded product, while the rounded one is added back later.
    """
    return (divided.to(tl.float64) / (tl.maximum(count, 1.0) / divisor)).to(COMPUTE)


@triton.jit
def tile_moments(x, valid, count, NHWC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the mean and M2 of a tile's valid values, per channel and in float64, by two passes over the registers.

    The first pass computes a shift near the mean. The second pass sums d = x − shift and d², where d is scaled by a
    power of two, so that no square overflows or underflows. Then mean = shift + Σd/n and M2 = Σd² − (Σd)²/n. Few digits
    cancel, because Σd is small.
    """
    inverse_count = 1.0 / tl.maximum(count, 1.0)
    # the division comes before the sum, because a sum of values near the largest float32 would overflow
    shift = rounded_mean(tile_sum(select(valid, x) * (1.0 / (ROWS * WIDTH)), NHWC), count, ROWS * WIDTH, x.dtype)
    d = select(valid, x - shift[None, :])
    inverse_power = tl.full(shift.shape, 1.0, x.dtype)
    if x.dtype == tl.float32:
        power, inverse_power = power_of_two_scale(tile_max(tl.abs(d), NHWC))
        d = d * power[None, :]
    inverse_power = inverse_power.to(tl.float64)
    sum_d = tile_sum(d, NHWC).to(tl.float64)
    m2 = tile_sum(d * d, NHWC).to(tl.float64) - sum_d * sum_d * inverse_count
    m2 = tl.where(m2 < 0, 0.0, m2) * inverse_power * inverse_power
    shift = shift.to(tl.float64)
    return tl.where(tl.abs(shift) < float("inf"), shift + sum_d * inverse_count * inverse_power, shift), m2


@triton.jit
def merge_moments(count, mean, m2, count_b, mean_b, m2_b):
    """Merge two (count, mean, M2) in float64 by Chan's formula. A part without values changes nothing."""
    total_count = count + count_b
    inverse_count = 1.0 / tl.maximum(total_count, 1.0)
    delta = mean_b - mean
    m2 = m2 + m2_b + delta * delta * (count * count_b * inverse_count)
    return total_count, mean * (count * inverse_count) + mean_b * (count_b * inverse_count), m2


@triton.jit
def split_mean(mean, COMPUTE: tl.constexpr):
    """Split a float64 mean into high, of type COMPUTE, and low = mean − high, a float64."""
    high = mean.to(COMPUTE)
    return high, mean - high.to(tl.float64)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Convert a float64 to another dtype by way of float32, because not every GPU converts float64 to bfloat16."""
    if dtype == tl.float64:
        result = value
    else:
        result = value.to(tl.float32).to(dtype)
    return result


@triton.jit
def invstd_and_scale(var, weight, channel, channel_mask, EPS: tl.constexpr):
    """Compute invstd and scale = weight·invstd in float64."""
    invstd = 1.0 / tl.sqrt(var + EPS)
    scale = invstd
    if weight is not None:
        scale = invstd * tl.load(weight + channel, mask=channel_mask, other=0.0).to(tl.float64)
    return invstd, scale


@triton.jit
def shift_of(bias, low, scale, channel, channel_mask, COMPUTE: tl.constexpr):
    """Compute shift = bias − low·scale, with which z = (x − high)·scale + shift."""
    shift = -low * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float64)
    return shift.to(COMPUTE)


PLANES = tl.constexpr(5)  # coefficients per channel: high, scale, shift, grad_shift, grad_scale


@triton.jit
def store_coefficients(
    coefficients, slice_index, channels, channel, channel_mask,
    mean, var, weight, bias, sum_dy, sum_dy_xmu, count, EPS: tl.constexpr,
):  # fmt: skip
    """Compute the coefficients of each channel for a pass over the elements. Without sums, only those of `apply`."""
    COMPUTE: tl.constexpr = coefficients.dtype.element_ty
    high, low = split_mean(mean, COMPUTE)
    invstd, scale = invstd_and_scale(var, weight, channel, channel_mask, EPS)
    target = coefficients + slice_index * PLANES * channels + channel
    tl.store(target, high, mask=channel_mask)
    tl.store(target + channels, scale.to(COMPUTE), mask=channel_mask)
    tl.store(target + 2 * channels, shift_of(bias, low, scale, channel, channel_mask, COMPUTE), mask=channel_mask)
    if sum_dy is not None:
        grad_shift, grad_scale = grad_coefficients(sum_dy, sum_dy_xmu, invstd, low, count, COMPUTE)
        tl.store(target + 3 * channels, grad_shift, mask=channel_mask)
        tl.store(target + 4 * channels, grad_scale, mask=channel_mask)


@triton.jit
def coefficient(coefficients, plane: tl.constexpr, slice_index, channels, channel, channel_mask):
    """Load one coefficient of each channel, by its index among PLANES."""
    return tl.load(coefficients + (slice_index * PLANES + plane) * channels + channel, mask=channel_mask, other=0.0)


@triton.jit
def load_moments(mean, var, slice_index, channels, channel, channel_mask):
    """Load the mean and var of a slice, which may have any floating-point dtype, as float64."""
    offsets = slice_index * channels + channel
    return (
        tl.load(mean + offsets, mask=channel_mask, other=0.0).to(tl.float64),
        tl.load(var + offsets, mask=channel_mask, other=1.0).to(tl.float64),
    )


@triton.jit
def reduce_coefficients(
    mean, var, weight, bias, slice_index, channels, channel, channel_mask, EPS: tl.constexpr, COMPUTE: tl.constexpr
):
    """Compute what the sums of a backward need of each channel.

    Returns:
        high, low, scale and shift as for `apply`; invstd in float64; and rounded_invstd and xhat_shift, with which
        x̂ = d·rounded_invstd − xhat_shift.
    """
    slice_mean, slice_var = load_moments(mean, var, slice_index, channels, channel, channel_mask)
    high, low = split_mean(slice_mean, COMPUTE)
    invstd, scale = invstd_and_scale(slice_var, weight, channel, channel_mask, EPS)
    rounded_invstd = invstd.to(COMPUTE)
    xhat_shift = (low * invstd).to(COMPUTE)
    shift = shift_of(bias, low, scale, channel, channel_mask, COMPUTE)
    scale = scale.to(COMPUTE)
    return high, low, scale, shift, invstd, rounded_invstd, xhat_shift


@triton.jit
def affine(x, high, scale, shift, residual, offsets, in_bounds):
    """Compute d = x − high, and z = d·scale + shift + residual."""
    d = x - high[None, :]
    z = d * scale[None, :] + shift[None, :]
    if residual is not None:
        z += read(residual, offsets, in_bounds, x.dtype)
    return d, z


@triton.jit
def recompute_dz(
    grad_output, input, residual, offsets, in_bounds, high, scale, shift,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute d = x − high and dz = grad_output·activation′(z) of a tile. z is recomputed."""
    x = read(input, offsets, in_bounds, COMPUTE)
    grad = read(grad_output, offsets, in_bounds, COMPUTE)
    d, z = affine(x, high, scale, shift, residual, offsets, in_bounds)
    return d, activation_backward(grad, z, ACTIVATION, SLOPE)


@triton.jit
def exclude_padding(d, dz, valid):
    """Replace d and dz by 0 in padding that is not finite, so that it adds nothing to a sum and its gradient is 0.

    This is a selection, because 0·NaN is NaN.

    Returns:
        d, dz, and which elements were replaced.
    """
    invalid = (valid == 0) & ~(tl.abs(d) < float("inf"))
    dz = tl.where(invalid, 0.0, dz)
    return tl.where(invalid, 0.0, d), dz, invalid


@triton.jit
def sum_terms(d, dz, in_bounds, rounded_invstd, xhat_shift):
    """Compute dz and dz·x̂ of a tile, 0 out of bounds, with x̂ = d·rounded_invstd − xhat_shift."""
    return select(in_bounds, dz), select(in_bounds, dz * (d * rounded_invstd[None, :] - xhat_shift[None, :]))


@triton.jit
def grad_coefficients(sum_dy, sum_dy_xmu, invstd, low, count, COMPUTE: tl.constexpr):
    """Compute the coefficients of dx = scale·(dz − grad_shift − d·grad_scale).

    grad_scale multiplies d and grad_shift is a constant: together they are
    Σdz/n + (x − mean)·invstd²·Σdz·(x − mean)/n with x − mean = d − low.
    """
    n = tl.maximum(count, 1.0)
    grad_scale = sum_dy_xmu / n * invstd * invstd
    return (sum_dy / n - low * grad_scale).to(COMPUTE), grad_scale.to(COMPUTE)


@triton.jit
def store_gradients(
    grad_input, grad_residual, offsets, in_bounds, d, dz, valid, invalid, scale, grad_shift, grad_scale
):
    """Store dx and dz in the tensors that are given. grad_shift is None where the moments do not depend on x."""
    if grad_input is not None:
        dx = dz
        if grad_shift is not None:
            dx = dz - grad_shift[None, :] - d * grad_scale[None, :]
            if invalid is not None:
                dx = tl.where(valid, dx, dz)
        dx = dx * scale[None, :]
        if invalid is not None:
            dx = tl.where(invalid, 0.0, dx)
        write(grad_input, offsets, dx, in_bounds)
    if grad_residual is not None:
        write(grad_residual, offsets, dz, in_bounds)
