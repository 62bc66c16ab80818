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
    samples, channels, per_slice, strips, chunks, tiles,
    LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """This program's slice (row), strip, channels, its lines [first, last) and how many tiles they fill.

    Neighboring programs are neighbors in memory. The last slice may be short: whole strips of it have no line.
    """
    program = tl.program_id(0)
    tile = program % tiles
    rest = program // tiles
    strip = rest % strips
    row = rest // strips
    if LAST:
        channel = tile * BI + tl.arange(0, BI)
    else:
        channel = tile + tl.arange(0, 1)
    lines = tl.minimum(per_slice, samples - row * per_slice)
    begin = tl.minimum(strip * chunks * BN, lines)
    first = row * per_slice + begin
    last = first + tl.minimum(chunks * BN, lines - begin)  # a difference: near 2³¹ a sum would overflow
    return row.to(tl.int64), strip, channel, channel < channels, first, last, tl.cdiv(last - first, BN)


@triton.jit
def place(n, channel, units, vectors, magic, bits, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the lines `n`; 64-bit where the tensor is WIDE, of 2³¹ elements or more.

    A line is the channels of one position, or UNIT adjacent positions of one channel. UNIT divides where each begins,
    which tells the compiler how many elements it may move at once. A sample is n / vectors, by multiplication.
    """
    if LAST:
        begin = (n.to(tl.int64) if WIDE else n) * units * UNIT
        at = begin[:, None] + channel[None, :]
    else:
        sample = tl.umulhi((2 * n).to(tl.uint32), magic.to(tl.uint32, bitcast=True)).to(tl.int32) >> bits
        first = ((sample.to(tl.int64) if WIDE else sample) * units + channel) * vectors
        begin = (first + (n - sample * vectors)) * UNIT
        at = begin[:, None] + tl.arange(0, UNIT)[None, :]
    return at


@triton.jit
def inside(n, last, known, LAST: tl.constexpr, EVEN: tl.constexpr):
    """Which elements of the tile exist; None where all do."""
    exists = None
    if not EVEN:
        if LAST:
            exists = (n < last)[:, None] & known[None, :]
        else:
            exists = (n < last)[:, None]
    return exists


@triton.jit
def read(pointer, at, exists, COMPUTE: tl.constexpr):
    if exists is None:
        values = tl.load(pointer + at)
    else:
        values = tl.load(pointer + at, mask=exists, other=0.0)
    return values.to(COMPUTE)


@triton.jit
def write(pointer, at, values, exists):
    if exists is None:
        tl.store(pointer + at, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def only(chosen, values):
    """The values that are chosen, 0 for the others; all of them where `chosen` is None."""
    if chosen is not None:
        values = tl.where(chosen, values, 0.0)
    return values


@triton.jit
def real_positions(mask, n, last, exists, LAST: tl.constexpr, BI: tl.constexpr):
    """Which elements of the tile the mask keeps; all that exist where there is no mask."""
    real = exists
    if mask is not None:
        if LAST:
            real = exists & (tl.load(mask + n, mask=n < last, other=0) != 0)[:, None]
        else:
            flat = n[:, None] * BI + tl.arange(0, BI)[None, :]
            real = exists & (tl.load(mask + flat, mask=exists, other=0) != 0)
    return real


@triton.jit
def counted(mask, n, last, real, LAST: tl.constexpr, BI: tl.constexpr):
    """How many real values each channel has in the tile: one float64 for all its channels.

    It needs a reduction over the tile only where a mask meets positions innermost.
    """
    if mask is None:
        count = tl.sum((n < last).to(tl.int32), 0)
        if not LAST:
            count = count * BI
    elif LAST:
        count = tl.sum(((tl.load(mask + n, mask=n < last, other=0) != 0) & (n < last)).to(tl.int32), 0)
    else:
        count = tl.sum(tl.sum(real.to(tl.int32), 0), 0)
    return count.to(tl.float64)


@triton.jit
def total(values, LAST: tl.constexpr):
    """Sum over a tile, one value a channel: a tree in an order the shape alone fixes."""
    if LAST:
        summed = tl.sum(values, 0)
    else:
        summed = tl.sum(tl.sum(values, 1), 0, keep_dims=True)
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
def rounded_mean(divided, count, lines, COMPUTE: tl.constexpr):
    """The mean as a COMPUTE number, from the sum of `count` values that were each divided by `lines`.

    In float64 and by a division: a float32 product would be fused with the subtraction of x − mean, as one that was
    never rounded, and x would be taken from another number than the one that is later added back.
    """
    return (divided.to(tl.float64) / (tl.maximum(count, 1.0) / lines)).to(COMPUTE)


@triton.jit
def moments(x, real, count, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr):
    """Mean and M2 of a tile's `count` real values in float64, one a channel, by two passes over its registers.

    The first pass finds a shift near the mean; the second sums d = x − shift and d², scaled by a power of two so that
    no square overflows or vanishes. Then mean = shift + Σd/n and M2 = Σd² − (Σd)²/n, in which little cancels.
    """
    inverse = 1.0 / tl.maximum(count, 1.0)
    # divided before it is summed: the sum of a tile near float32's largest value must not overflow
    shift = rounded_mean(total(only(real, x) * (1.0 / (BN * BI)), LAST), count, BN * BI, x.dtype)
    d = only(real, x - shift[None, :])
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


PLANES = tl.constexpr(5)  # coefficients of one channel: high, scale, shift, along, across


@triton.jit
def store_coefficients(
    coefficients, row, channels, channel, known, mean, var, weight, bias, sum_dy, sum_xmu, count, EPS: tl.constexpr
):
    """What a pass over the elements needs of each channel, rounded once and for all its programs."""
    COMPUTE: tl.constexpr = coefficients.dtype.element_ty
    high, low = split(mean, COMPUTE)
    invstd, scale = scales(var, weight, channel, known, EPS)
    to = coefficients + row * PLANES * channels + channel
    tl.store(to, high, mask=known)
    tl.store(to + channels, scale.to(COMPUTE), mask=known)
    tl.store(to + 2 * channels, shifts(bias, low, scale, channel, known, COMPUTE), mask=known)
    if sum_dy is not None:
        along, across = slope_terms(sum_dy, sum_xmu, invstd, low, count, COMPUTE)
        tl.store(to + 3 * channels, along, mask=known)
        tl.store(to + 4 * channels, across, mask=known)


@triton.jit
def coefficient(coefficients, plane: tl.constexpr, row, channels, channel, known):
    return tl.load(coefficients + (row * PLANES + plane) * channels + channel, mask=known, other=0.0)


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
        z += read(residual, at, exists, x.dtype)
    return d, z


@triton.jit
def incoming(
    grad_output, input, residual, at, exists, high, scale, shift,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """d = x − high and dz of a tile, z computed anew."""
    x = read(input, at, exists, COMPUTE)
    grad = read(grad_output, at, exists, COMPUTE)
    d, z = argument(x, high, scale, shift, residual, at, exists)
    return d, through(grad, z, ACTIVATION, SLOPE)


@triton.jit
def holes(d, real):
    """Masked positions that are not finite: they give nothing and receive nothing, by selection (0·NaN is NaN)."""
    return (real == 0) & ~(tl.abs(d) < float("inf"))


@triton.jit
def products_of(d, grad, exists, unit, offset):
    """dz and dz·x̂ of a tile, to be summed; x̂ = d·unit − offset."""
    return only(exists, grad), only(exists, grad * (d * unit[None, :] - offset[None, :]))


@triton.jit
def slope_terms(sum_dy, sum_xmu, invstd, low, count, COMPUTE: tl.constexpr):
    """What x's own part in the moments takes from dz, as a constant and a multiple of d.

    Σdz/n + (x − mean)·invstd²·Σdz·(x − mean)/n, with x − mean = d − low.
    """
    n = tl.maximum(count, 1.0)
    across = sum_xmu / n * invstd * invstd
    return (sum_dy / n - low * across).to(COMPUTE), across.to(COMPUTE)


@triton.jit
def store_gradients(grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across):
    """Write dx and dz, each where there is a tensor for it; `along` None: the moments do not depend on x."""
    if grad_input is not None:
        dx = grad
        if along is not None:
            dx = grad - along[None, :] - d * across[None, :]
            if empty is not None:
                dx = tl.where(real, dx, grad)
        dx = dx * scale[None, :]
        if empty is not None:
            dx = tl.where(empty, 0.0, dx)
        write(grad_input, at, dx, exists)
    if grad_residual is not None:
        write(grad_residual, at, grad, exists)
