"""Rounding in the Triton kernels: the scale of a largest magnitude, and codes of float32, to nearest or stochastically."""

import triton
import triton.language as tl

#: 2⁻¹²⁶, see reference.ops.SMALLEST_SCALE.
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)
#: See reference.ops.FOLD_LIFT.
FOLD_LIFT = tl.constexpr(128.0)
#: 1.5·2²³: adding it to a float32 of magnitude below 2²² rounds that to an integer, ties to even, in the low mantissa bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_from(amax, INVERSE_MAX: tl.constexpr):
    """Return the scale of codes with the largest value 1 / INVERSE_MAX. If INVERSE_MAX is lifted, so is the scale. A NaN in
    ``amax`` gives NaN."""
    return maximum(amax * INVERSE_MAX, tl.full(amax.shape, SMALLEST_SCALE, tl.float32))


@triton.jit
def unlifted(scale, STEP: tl.constexpr, FOLD: tl.constexpr):
    """Return the scale to store for a lifted ``scale``. FOLD: whether the matrix was multiplied with a lifted fold."""
    UNLIFT: tl.constexpr = STEP / FOLD_LIFT if FOLD else STEP
    return scale * UNLIFT if UNLIFT != 1.0 else scale


@triton.jit
def round_to_code(
    y, CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, STEP: tl.constexpr
):
    """Return codes of float32 numbers, rounded to nearest even.

    A NaN gives NaN. In an integer format it gives any code, since its scale is NaN. MANTISSA is −1 for integers and −2 for
    formats that the hardware converts to. MAX above 0 is where codes saturate. STEP is the value in ``y`` that gives the
    integer 1, a power of two; it is 1 for other formats.
    """
    if MAX > 0:  # for a bare cast; scaled values are in range
        y = tl.clamp(y, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    if MANTISSA == -1:
        return (y + ROUNDER * STEP).to(tl.int32, bitcast=True).to(CODE)
    if MANTISSA >= 0:
        y = _on_grid(y, MANTISSA, MIN_EXPONENT)
    return y.to(CODE)


@triton.jit
def _on_grid(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Return float32 numbers rounded to a grid that is coarser than fp8's: to the quantum of their exponent."""
    exponent = (y.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, 127 + MIN_EXPONENT) - MANTISSA
    rounder = (((exponent + 23) << 23) | (1 << 22)).to(tl.float32, bitcast=True)  # 1.5·2²³ quanta
    return (y + rounder) - rounder


@triton.jit
def packed_words(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the codes of six bits of float32 numbers [ROWS, WIDTH], rounded to nearest even, in their packed storage.

    Each sixteen of them are three int32 words, of which the first, second and third [ROWS, WIDTH / 16] are returned. No code
    is ever an fp8 value here: Triton 3.6 miscompiles those that are used twice.
    """
    y = _on_grid(y, MANTISSA, MIN_EXPONENT)
    whole = y.to(tl.int32, bitcast=True)
    magnitude = whole & 0x7FFFFFFF
    normal = (magnitude >> (23 - MANTISSA)) - ((126 + MIN_EXPONENT) << MANTISSA)
    subnormal = (tl.abs(y) * 2.0 ** (MANTISSA - MIN_EXPONENT)).to(tl.int32)
    bits = tl.where((magnitude >> 23) >= 127 + MIN_EXPONENT, normal, subnormal)
    bits = tl.minimum(bits, 31) | (((whole >> 31) & 1) << 5)  # NaN, which the scale has too, stays within its bits
    field = tl.arange(0, 4)[None, None, :]
    four = tl.sum(tl.reshape(bits, (ROWS, WIDTH // 4, 4)) << (6 * field), axis=2)  # 24 bits each
    four = tl.reshape(four, (ROWS, WIDTH // 16, 4))
    low = tl.sum(tl.where(field < 2, four << (24 * (field & 1)), 0), axis=2)
    middle = tl.sum(tl.where(field == 1, four >> 8, tl.where(field == 2, four << 16, 0)), axis=2)
    high = tl.sum(tl.where(field == 2, four >> 16, tl.where(field == 3, four << 8, 0)), axis=2)
    return low, middle, high


@triton.jit
def noise(seed, rows, tile, T: tl.constexpr, WIDTH: tl.constexpr):
    """Return [T, WIDTH] uniform numbers in [0, 1), different ones for every row and tile. Philox gives four at a time."""
    quad = tl.arange(0, WIDTH // 4)[None, :] + tl.zeros((T, 1), tl.int32)
    row = rows[:, None] + tl.zeros((1, WIDTH // 4), tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), quad, row, quad * 0 + tile, quad * 0)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (T, WIDTH))
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2⁻²⁴


@triton.jit
def round_by(noise, y, CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr):
    """Return codes like :func:`round_to_code`, rounded up or down so that the mean is exact."""
    y = tl.clamp(y, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    quantum = tl.full(y.shape, 1.0, tl.float32)
    inverse = quantum
    if MANTISSA >= 0:
        exponent = (y.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.maximum(exponent, 127 + MIN_EXPONENT) - MANTISSA
        quantum = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # The noise may round the largest number up by a whole step, so round_to_code has to saturate again.
    return round_to_code(tl.floor(y * inverse + noise) * quantum, CODE, -1 if MANTISSA == -1 else -2, MIN_EXPONENT, MAX, 1.0)
