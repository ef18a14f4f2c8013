"""Save activations in rotated blocks of integers: ``compress`` and ``decompress``; masks in bits: ``pack_mask`` and
``unpack_mask``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import fake, op
from halo_tensor.reference import blocks as reference


@op("compress")
def compress(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return :func:`halo_tensor.reference.blocks.compress` of a contiguous ``x``."""
    if runs_kernels(x.device):
        from halo_tensor.kernels.quantize import blocks

        return blocks.compress(x, bits)
    return reference.compress(x, bits)


@fake("compress")
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    count = (x.numel() + reference.BLOCK - 1) // reference.BLOCK
    codes = x.new_empty([count, reference.BLOCK * bits // 8], dtype=torch.int8)
    return codes, x.new_empty([count], dtype=torch.bfloat16)


@op("decompress")
def decompress(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return :func:`halo_tensor.reference.blocks.decompress` of ``codes`` and ``scales``, contiguous."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.quantize import blocks

        return blocks.decompress(codes, scales, tuple(shape), dtype)
    return reference.decompress(codes, scales, torch.Size(shape), dtype)


@fake("decompress")
def _(codes: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@op("pack_mask")
def pack_mask(x: Tensor) -> Tensor:
    """Return :func:`halo_tensor.reference.blocks.pack_mask` of a contiguous ``x``."""
    if runs_kernels(x.device):
        from halo_tensor.kernels.quantize import masks

        return masks.pack_mask(x)
    return reference.pack_mask(x)


@fake("pack_mask")
def _(x: Tensor) -> Tensor:
    return x.new_empty([(x.numel() + 7) // 8], dtype=torch.uint8)


@op("unpack_mask")
def unpack_mask(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return :func:`halo_tensor.reference.blocks.unpack_mask` of ``bits``, contiguous."""
    if runs_kernels(bits.device):
        from halo_tensor.kernels.quantize import masks

        return masks.unpack_mask(bits, tuple(shape), dtype)
    return reference.unpack_mask(bits, torch.Size(shape), dtype)


@fake("unpack_mask")
def _(bits: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return bits.new_empty(shape, dtype=dtype)
