"""Pack masks to one bit an element, and unpack them, by one kernel each. :mod:`halo_tensor.reference.blocks` defines the bits.

Both kernels are limited by memory.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv

#: Bytes of a mask that a program writes or reads.
ROWS = 1024


@triton.jit(do_not_specialize=["COUNT"])
def pack_mask_kernel(x, bits, COUNT, ROWS: tl.constexpr):
    """Write a bit for each of COUNT elements of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 8)
    index = row[:, None] * 8 + column[None, :]
    exists = index < COUNT
    tile = tl.load(x + index, mask=exists, other=0).to(tl.float32)
    is_set = (tl.where(tile <= 0.0, 0, 1) << column[None, :]) * exists.to(tl.int32)
    tl.store(bits + row, tl.sum(is_set, 1).to(tl.uint8), mask=row * 8 < COUNT)


@triton.jit(do_not_specialize=["COUNT"])
def unpack_mask_kernel(bits, x, COUNT, ROWS: tl.constexpr):
    """Do the inverse of :func:`pack_mask_kernel`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 8)
    index = row[:, None] * 8 + column[None, :]
    byte = tl.load(bits + row, mask=row * 8 < COUNT, other=0).to(tl.int32)
    ones = (byte[:, None] >> column[None, :] & 1).to(tl.float32)  # Triton's interpreter does not convert integers to bfloat16
    tl.store(x + index, ones.to(x.dtype.element_ty), mask=index < COUNT)


def pack_mask(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a contiguous ``x``, as :func:`halo_tensor.reference.blocks.pack_mask` does."""
    x = x if x.is_contiguous() else x.contiguous()
    bits = x.new_empty((cdiv(x.numel(), 8),), dtype=torch.uint8)
    _plan(pack_mask_kernel)((x.numel(),), _readable(x), bits)
    return bits


def unpack_mask(bits: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Do the inverse of :func:`pack_mask`, as :func:`halo_tensor.reference.blocks.unpack_mask` does."""
    return unpack_mask_into(bits, bits.new_empty(shape, dtype=dtype))


def unpack_mask_into(bits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Write the ones and zeros to the memory of ``x``, which has no gaps, and return ``x``."""
    bits = bits if bits.is_contiguous() else bits.contiguous()
    _plan(unpack_mask_kernel)((x.numel(),), bits, _readable(x))
    return x


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or the bytes of bools."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


@lru_cache
def _plan(kernel: triton.JITFunction) -> Planned:
    """Return the launch of a kernel for any number of elements."""

    def prepare(_: None) -> Variant:
        launch = Launch(kernel, {"ROWS": ROWS, "num_warps": 4})
        return Variant(launch, lambda count: ((cdiv(count, 8 * ROWS),), (count,)), ())

    return Planned(prepare)
