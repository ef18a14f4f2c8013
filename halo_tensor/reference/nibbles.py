"""INT4 codes in half a byte each: code 2i of a row in the low four bits of byte i, code 2i + 1 in the high ones.

The functions consist of pointwise ops, as those of :mod:`halo_tensor.reference.packing` do.
"""

import torch
from torch.nn.functional import pad

from halo_tensor.recipe import INT4, Format
from halo_tensor.reference.codes import aligned


def can_pack(format: Format | None) -> bool:
    """Whether codes of X in this format are saved in half a byte each."""
    return format == INT4


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return ``codes`` [r, c] (int8, −8 to 7) as uint8 [r, ⌈c/2⌉], contiguous. Zero follows the last code if c is odd."""
    rows, columns = codes.shape
    packed = codes.new_empty((rows, (columns + 1) // 2), dtype=torch.uint8)
    whole = pad(codes, (0, columns % 2))
    packed.view(torch.int8).copy_(whole[:, ::2] & 15 | whole[:, 1::2] << 4)
    return packed


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the codes int8 [r, columns] that :func:`pack_nibbles` packed. Rows begin at multiples of 16 bytes."""
    codes = packed.new_empty_strided((packed.shape[0], columns), (aligned(columns), 1), dtype=torch.int8)
    byte = packed.view(torch.int8)
    pairs = torch.stack((((byte & 15) ^ 8) - 8, byte >> 4), 2)
    return codes.copy_(pairs.flatten(1)[:, :columns])
