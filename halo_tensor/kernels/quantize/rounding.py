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
    if MANTISSA >= 0:  # a grid coarser than fp8's: round to the quantum of the exponent
        exponent = (y.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.maximum(exponent, 127 + MIN_EXPONENT) - MANTISSA
        rounder = (((exponent + 23) << 23) | (1 << 22)).to(tl.float32, bitcast=True)  # 1.5·2²³ quanta
        y = (y + rounder) - rounder
    return y.to(CODE)


@triton.jit
def packed_words(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the codes of six bits of float32 numbers [ROWS, WIDTH], rounded to nearest even, in their packed storage.

    Each sixteen of them are three int32 words, of which the first, second and third [ROWS, WIDTH / 16] are returned. No code
    is ever an fp8 value here: Triton 3.6 miscompiles those that are used twice.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    SMALL: tl.constexpr = 2.0 ** (SHIFT + MIN_EXPONENT)  # adding it rounds to the quantum of subnormal numbers
    whole = y.to(tl.int32, bitcast=True)
    magnitude = whole & 0x7FFFFFFF
    normal = ((magnitude + ((magnitude >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)) >> SHIFT) - (
        (126 + MIN_EXPONENT) << MANTISSA
    )
    subnormal = (tl.abs(y) + SMALL).to(tl.int32, bitcast=True) - ((127 + SHIFT + MIN_EXPONENT) << 23)
    bits = tl.where(magnitude < ((127 + MIN_EXPONENT) << 23), subnormal, normal)
    bits = tl.minimum(bits, 31)  # NaN, which the scale has too, stays within its bits
    bits = tl.where(bits == 0, 0, bits | ((whole >> 26) & 32))  # the sign, but of zero none, as in round_to_code
    a, b, c, d = _every_fourth(bits.to(tl.uint8), ROWS, WIDTH)
    four = a.to(tl.int32) | b.to(tl.int32) << 6 | c.to(tl.int32) << 12 | d.to(tl.int32) << 18  # 24 bits
    a, b, c, d = _every_fourth(four, ROWS, WIDTH // 4)
    return a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8


@triton.jit
def _every_fourth(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns 0, 4, 8, …, then 1, 5, …, then 2, 6, … and 3, 7, … of a matrix [ROWS, WIDTH]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 4, 2, 2)))  # columns 0 and 2, columns 1 and 3
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _mix(x):
    """Return the hash of uint32 numbers of :mod:`halo_tensor.reference.noise`."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def noise(seed, rows, columns, SWAPPED: tl.constexpr):
    """Return :func:`halo_tensor.reference.noise.uniform` of the elements at some rows and columns of a matrix.

    SWAPPED: whether rows and columns are those of its transpose.
    """
    key = tl.load(seed)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    of_rows = _mix(rows.to(tl.uint32) ^ (high if SWAPPED else low))
    of_columns = _mix(columns.to(tl.uint32) ^ (low if SWAPPED else high))
    if SWAPPED:
        of_rows = _mix(of_rows ^ 0x9E3779B9)
    else:
        of_columns = _mix(of_columns ^ 0x9E3779B9)
    bits = _mix(of_rows[:, None] ^ of_columns[None, :])
    # The bits of a number in [1, 2), which cost less than a conversion.
    return ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def round_by(noise, y, CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr):
    """Return codes like :func:`round_to_code`, rounded up or down so that the mean is exact."""
    if MANTISSA != -1:  # of integers, only those that are rounded can be out of range
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
