"""Rounding in the Triton kernels: the scale of a largest magnitude, and codes of float32, to nearest or stochastically."""

import triton
import triton.language as tl

from halo_tensor.kernels.device import INTERPRETED

#: 2⁻¹²⁶, see reference.ops.SMALLEST_SCALE.
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)
#: See reference.ops.FOLD_LIFT.
FOLD_LIFT = tl.constexpr(128.0)
#: 1.5·2²³: adding it to a float32 of magnitude below 2²² rounds that to an integer, ties to even, in the low mantissa bits.
ROUNDER = tl.constexpr(12582912.0)
#: 1.5·2¹⁵: adding it rounds a float32 of magnitude below 2¹⁴ to a multiple of 2⁻⁸ likewise.
FINE_ROUNDER = tl.constexpr(49152.0)


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


if INTERPRETED:

    @triton.jit
    def _fine_rounder(bits, byte):
        """Return the bits of FINE_ROUNDER, whose last eight are 0, with a byte of ``bits`` in their place."""
        return ((bits >> (8 * byte)) & 0xFF) | 0x47400000

    @triton.jit
    def _second_byte(bits):
        return (bits >> 8).to(tl.int8)

else:  # Each is one instruction, the second one for two numbers. ptxas takes three, and two for each.

    @triton.jit
    def _fine_rounder(bits, byte):
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x47400000, $2;", "=r,r,r", [bits, byte | 0x7650], dtype=tl.uint32, is_pure=True, pack=1
        )

    @triton.jit
    def _second_byte(bits):
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; prmt.b32 both, $1, $2, 0x0051; cvt.u16.u32 $0, both; }",
            "=h,r,r", [bits], dtype=tl.int8, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def noise_streams(seed, rows):
    """Return what :func:`noise` needs of some rows of the matrix that is rounded."""
    key = tl.load(seed)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return _mix(_mix(rows.to(tl.uint32) ^ _mix(low ^ 0x9E3779B9)) ^ high)


@triton.jit
def noise(streams, first, columns):
    """Return :func:`halo_tensor.reference.noise.uniform` of elements, plus FINE_ROUNDER.

    streams: of their rows, [rows, 1]; or [1, rows], if a tile has the rows of the matrix as its columns.
    first, columns: the columns are their sum, [1, columns] or [columns, 1], and ``first`` is a multiple of 4. The compiler
        sees that four elements share a hash if ``columns`` is an arange.
    """
    bits = _mix(streams + tl.cast(first, tl.uint32) * 0x9E3779B9 + (columns & -4).to(tl.uint32) * 0x9E3779B9)
    return _fine_rounder(bits, (columns & 3).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def round_by(noise, y, CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr):
    """Return codes like :func:`round_to_code`, rounded up or down so that the mean is exact. ``noise`` is of :func:`noise`."""
    if MAX > 0:
        y = tl.clamp(y, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    if MANTISSA >= 0:
        exponent = (y.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.maximum(exponent, 127 + MIN_EXPONENT) - MANTISSA
        y = y * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    bits = (y + noise).to(tl.int32, bitcast=True)  # whose last eight are the fraction of the sum
    if MANTISSA == -1:
        return _second_byte(bits)
    y = (bits & -256).to(tl.float32, bitcast=True) - FINE_ROUNDER
    if MANTISSA >= 0:
        y = y * (exponent << 23).to(tl.float32, bitcast=True)
    return y.to(CODE)
