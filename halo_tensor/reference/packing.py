"""fp6 codes in ¾ of a byte each, as frozen weights and FSDP's shards hold them.

The functions consist of pointwise ops, which a compiler fuses into one kernel. Forward unpacks rows and backward columns, in
two expressions, so that a compiled graph repeats the unpacking in backward and saves the packed bytes only.
"""

import torch

from halo_tensor.recipe import FP8_E4M3, Format
from halo_tensor.reference import codes as formats


def can_pack(codes: torch.Tensor, format: Format | None) -> bool:
    """Whether rows of these codes can be packed, and begin at multiples of 16 bytes after they were unpacked."""
    return format is not None and format.bits == 6 and codes.shape[1] % 16 == 0


def pack_rows(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Return fp6 ``codes`` [r, c] (float8_e4m3fn) as uint8 [r, c·3/4]: four codes in three bytes, little-endian."""
    return formats.pack(codes, format).view(codes.shape[0], -1)


def unpack_rows(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the codes [r, c] from the bytes that :func:`pack_rows` returned."""
    return _unpack(packed.view(packed.shape[0], -1, 3), 2, format).view(packed.shape[0], -1)


def unpack_columns(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the transposed codes [c, r], contiguous."""
    columns = packed.view(packed.shape[0], -1, 3).permute(1, 2, 0)
    return _unpack(columns, 1, format).contiguous().view(-1, packed.shape[0])


def _unpack(bytes: torch.Tensor, dim: int, format: Format) -> torch.Tensor:
    """Return codes in groups of 4 along ``dim``, from bytes in groups of 3."""
    low, middle, high = bytes.to(torch.int32).split(1, dim)
    shifts = torch.arange(0, 24, 6, dtype=torch.int32, device=bytes.device)
    bits = (low | middle << 8 | high << 16) >> shifts.view([-1 if d == dim else 1 for d in range(3)])
    # In the fields of e4m3, the same sign, exponent and mantissa are the same value times a power of two. This holds for zero
    # and subnormal numbers too.
    magnitude = (bits & 31) << (FP8_E4M3.mantissa_bits - format.mantissa_bits)
    code = ((bits & 32) << 2 | magnitude).to(torch.uint8).view(torch.float8_e4m3fn)
    factor = 2.0 ** (format.min_exponent - FP8_E4M3.min_exponent)
    return (code.to(torch.float32) * factor).to(torch.float8_e4m3fn)
