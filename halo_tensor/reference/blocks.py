"""Integers of 8, 6 or 4 bits in rotated blocks of 128 elements, as which activations are saved between layers; and masks of
one bit an element.

A block is 128 elements that lie next to each other in memory. It is rotated by D·H, random signs and a Hadamard matrix, and
divided by its scale, its largest magnitude over the largest code. The scale is a bfloat16, rounded up, so that no code
saturates. Decompressing multiplies codes with ± a power of two, which float32 does exactly.
"""

import torch

from halo_tensor.recipe import Rotation
from halo_tensor.reference.hadamard import power, signed_hadamard

#: Elements of a block.
BLOCK = 128
ROTATION = Rotation(BLOCK, seed=0)
#: The smallest scale, so that a block of zeros is not divided by zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
#: Rotating twice with the constants of the rotation multiplies by the inverse of this.
UNDO = 1.0 / (BLOCK * power(BLOCK) ** 2)


def largest(bits: int) -> int:
    """Return the largest code of ``bits`` bits."""
    return 2 ** (bits - 1) - 1


def bits_of(codes: torch.Tensor) -> int:
    """Return the bits of an element of compressed ``codes``."""
    return codes.shape[1] * 8 // BLOCK


def compress(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of ``x`` and their scales.

    Args:
        x: contiguous, of any shape and floating dtype. The last block is filled with zeros.
        bits: 8, 6 or 4.

    Returns:
        int8 [blocks, 16·bits]: whole codes; or two or four codes in one or three bytes, element j of each half or quarter of a
        block with element j of the others. And bfloat16 scales [blocks]; NaN or Inf in a block makes its scale NaN or Inf.
    """
    flat = x.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    with torch.autocast(x.device.type, enabled=False):
        y = blocks @ signed_hadamard(ROTATION, x.device)
    scale = _rounded_up((y.abs().amax(1) if y.numel() else y.new_empty(0)) * (1.0 / largest(bits)))
    codes = (y * (1.0 / scale.float())[:, None]).round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.int8)
    return _packed(codes, bits), scale


def decompress(codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of ``shape`` and ``dtype`` that :func:`compress` made ``codes`` and ``scale`` of, but for rounding."""
    whole = _unpacked(codes, bits_of(codes)).float()
    with torch.autocast(codes.device.type, enabled=False):
        y = whole @ signed_hadamard(ROTATION, codes.device).t()
    y = y * (scale.float() * UNDO)[:, None]
    return y.reshape(-1)[: shape.numel()].view(shape).to(dtype)


def _rounded_up(amax: torch.Tensor) -> torch.Tensor:
    """Return positive float32 numbers as bfloat16, rounded up."""
    finite = amax.clamp_min(SMALLEST_SCALE)
    rounded = ((finite.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return torch.where(amax.isnan(), amax, rounded).to(torch.bfloat16)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    if bits == 4:
        low, high = codes.chunk(2, 1)
        return (low & 15) | (high << 4)
    a, b, c, d = (part.to(torch.int32) & 63 for part in codes.chunk(4, 1))
    word = a | b << 6 | c << 12 | d << 18
    return torch.cat([(word >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], 1).view(torch.int8)


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    if bits == 4:
        return torch.cat([codes << 4 >> 4, codes >> 4], 1)
    a, b, c = (part.to(torch.int32) & 255 for part in codes.chunk(3, 1))
    word = a | b << 8 | c << 16
    return torch.cat([(word << 26 - shift >> 26).to(torch.int8) for shift in (0, 6, 12, 18)], 1)


def pack_mask(x: torch.Tensor) -> torch.Tensor:
    """Return which elements of ``x`` are not ≤ 0, one bit each. NaN counts as not ≤ 0, as the backward of ReLU counts it.

    Args:
        x: contiguous, of any shape, bool or floating.

    Returns:
        uint8 [⌈elements / 8⌉]. Bit i of byte j is element 8j + i. The bits behind the last element are zero.
    """
    set_bits = x.reshape(-1) if x.dtype == torch.bool else ~(x.reshape(-1) <= 0)
    rows = torch.nn.functional.pad(set_bits.to(torch.uint8), (0, -x.numel() % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return the bits that :func:`pack_mask` made of a tensor of ``shape``, as ones and zeros of ``dtype``."""
    ones = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return ones.view(-1)[: shape.numel()].view(shape).to(dtype)
