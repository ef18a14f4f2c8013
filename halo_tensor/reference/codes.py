"""Number formats as tensors: rounding to a grid, the storage that products read, and packed bytes for storage and transport.

Codes are the numbers that a matrix unit multiplies: int8 for integer formats (int4's are −7…7), fp8 for floating formats.
Every fp6 and fp4 value is an e4m3 value, so their codes are held in e4m3 and are multiplied exactly by fp8 units.
"""

import torch

from halo_tensor.recipe import FP8_E4M3, FP8_E5M2, Format

#: 1.5·2¹⁵: adding it rounds a float32 of magnitude below 2¹⁴ to a multiple of 2⁻⁸.
_FINE_ROUNDER = 49152.0
_NATIVE = {FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}


def code_dtype(format: Format) -> torch.dtype:
    """Return the dtype in which a format's codes are held."""
    return torch.int8 if format.uniform else _NATIVE.get(format, torch.float8_e4m3fn)


def lift(format: Format) -> float:
    """Return the power of two that multiplies the scales of ``format`` while codes are computed.

    With it the scale amax · lift / max and its reciprocal are normal float32 for almost every amax; without it the scale of a
    small amax would be too small. It is 1 for floating formats, whose codes keep their precision when they are small.
    """
    return 2.0 ** max(0, int(format.max).bit_length() - 3) if format.uniform else 1.0


def aligned(width: int) -> int:
    """Return the stride of rows of ``width`` codes on a GPU: TMA and vector loads need rows that begin at multiples of 16
    bytes."""
    return (width + 15) // 16 * 16


def round_to(x: torch.Tensor, format: Format, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Return x rounded to the format's codes, saturated at ±max.

    Args:
        x: float32, any shape, already divided by its scale.
        format: the number format.
        noise: uniform in [0, 1), of x's shape, to round up with the probability that keeps the mean; eight bits of it count.
            None to round to nearest, ties to even.

    Returns:
        Codes of ``code_dtype(format)``. NaN stays NaN in a floating format, and becomes 0 in an integer format, whose scale
        must carry it.
    """
    x = x.clamp(-format.max, format.max)  # a copy, so the next steps may be in place
    if format.uniform:
        x = x.round_() if noise is None else _up_or_down(x, noise)
        return x.nan_to_num_(0.0).to(torch.int8)
    if format not in _NATIVE or noise is not None:
        # frexp's exponent is that of a mantissa in [½, 1): one more than IEEE's.
        exponent = (torch.frexp(x).exponent - 1).clamp_min(format.min_exponent)
        quantum = torch.exp2((exponent - format.mantissa_bits).float())
        x = x.div_(quantum)
        x = (x.round_() if noise is None else _up_or_down(x, noise)).mul_(quantum)
    return x.to(code_dtype(format))


def _up_or_down(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round x up with a probability equal to its fraction, else down, in place. The fraction is rounded to a multiple of 2⁻⁸,
    with ties as in kernels, which add 1.5·2¹⁵ to the noise first."""
    steps = torch.floor(noise * 2.0**8) * 2.0**-8
    return x.add_(steps + _FINE_ROUNDER).sub_(_FINE_ROUNDER).floor_()


def to_bits(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the ``format.bits``-bit patterns of ``codes``, as uint8: sign, exponent, mantissa; two's complement for integers.

    Codes must lie on the format's grid. Formats of fewer than 8 bits have no NaN, and one raises no error: keep NaN in the
    scale.
    """
    if format.bits == 8:
        return codes.view(torch.uint8)
    if format.uniform:
        return codes.view(torch.uint8) & (2**format.bits - 1)
    x = codes.float()
    m, low = format.mantissa_bits, format.min_exponent
    exponent = torch.where(x == 0, low - 1, torch.frexp(x).exponent - 1)
    normal = exponent >= low
    step = torch.exp2((exponent.clamp_min(low) - m).float())
    magnitude = (x.abs() / step).to(torch.int32)  # the mantissa with its implicit one, if normal
    magnitude = torch.where(normal, magnitude - 2**m + ((exponent - low + 1) << m), magnitude)
    sign = torch.signbit(x).to(torch.int32) << (format.bits - 1)
    return (sign | magnitude).to(torch.uint8)


def from_bits(bits: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the codes with the given bit patterns (uint8), the inverse of :func:`to_bits`."""
    if format.bits == 8:
        return bits.view(code_dtype(format))
    top = format.bits - 1
    if format.uniform:
        value = bits.to(torch.int16)
        return (value - ((value >> top) << format.bits)).to(torch.int8)
    m = format.mantissa_bits
    magnitude = bits.to(torch.int32) & (2**top - 1)
    exponent, mantissa = magnitude >> m, magnitude & (2**m - 1)
    implicit = (exponent > 0).to(torch.int32) << m
    step = torch.exp2((exponent.clamp_min(1) - 1 + format.min_exponent - m).float())
    value = (mantissa + implicit).float() * step
    return torch.where(bits >> top == 1, -value, value).to(code_dtype(format))


def pack(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Return ``codes`` (any shape) as a flat uint8 tensor of ``bits``/8 bytes per element, little-endian: 4 codes of 6 bits in
    3 bytes, 2 codes of 4 bits in 1, zero-padded to whole groups."""
    bits = to_bits(codes.contiguous(), format).flatten()
    if format.bits == 8:
        return bits
    per_group = 4 if format.bits == 6 else 2
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % per_group)).view(-1, per_group).to(torch.int32)
    word = sum((bits[:, i] << (format.bits * i) for i in range(per_group)), torch.zeros_like(bits[:, 0]))
    n_bytes = format.bits * per_group // 8
    return torch.stack([(word >> (8 * i)) & 0xFF for i in range(n_bytes)], dim=1).to(torch.uint8).flatten()


def unpack(packed: torch.Tensor, format: Format, shape: torch.Size) -> torch.Tensor:
    """Return the codes of ``shape`` from the bytes that :func:`pack` returned."""
    if format.bits == 8:
        return from_bits(packed, format).view(shape)
    per_group = 4 if format.bits == 6 else 2
    n_bytes = format.bits * per_group // 8
    grouped = packed.view(-1, n_bytes).to(torch.int32)
    word = sum((grouped[:, i] << (8 * i) for i in range(n_bytes)), torch.zeros_like(grouped[:, 0]))
    mask = 2**format.bits - 1
    bits = torch.stack([(word >> (format.bits * i)) & mask for i in range(per_group)], dim=1).to(torch.uint8)
    return from_bits(bits.flatten()[: shape.numel()], format).view(shape)
