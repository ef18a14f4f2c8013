"""Pack masks to one bit an element, and unpack them, by one kernel each; a ReLU and its gradient on such masks.
:mod:`halo_tensor.reference.blocks` defines the bits.

All kernels are limited by memory. RAGGED says whether the last byte is not full: a mask of elements would forbid vectors.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv

#: Bytes of a mask that a program writes or reads.
ROWS = 1024


@triton.jit(do_not_specialize=["COUNT"])
def pack_mask_kernel(x, bits, COUNT, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Write a bit for each of COUNT elements of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile, _, _ = _load_tile(x, row, COUNT, RAGGED)
    _store_bits(bits, row, tile, COUNT)


@triton.jit
def _load_tile(x, row, COUNT, RAGGED: tl.constexpr):
    """Return 8 elements of x for each byte of a mask, zeros behind the last one; where they are, and whether they exist."""
    index = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists = index < COUNT if RAGGED else (row * 8 < COUNT)[:, None]
    return tl.load(x + index, mask=exists, other=0), index, exists


@triton.jit
def _store_bits(bits, row, tile, COUNT):
    is_set = tl.where(tile.to(tl.float32) <= 0.0, 0, 1) << tl.arange(0, 8)[None, :]
    tl.store(bits + row, tl.sum(is_set, 1).to(tl.uint8), mask=row * 8 < COUNT)


@triton.jit
def _load_bits(bits, row, COUNT):
    """Return a tile of zeros and ones."""
    byte = tl.load(bits + row, mask=row * 8 < COUNT, other=0).to(tl.int32)
    return byte[:, None] >> tl.arange(0, 8)[None, :] & 1


@triton.jit(do_not_specialize=["COUNT"])
def relu_kernel(x, y, bits, COUNT, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Write the larger of x and 0 to y, NaN where x is NaN, and a bit for each of COUNT elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile, index, exists = _load_tile(x, row, COUNT, RAGGED)
    tl.store(y + index, tl.where(tile.to(tl.float32) <= 0.0, 0.0, tile), mask=exists)
    _store_bits(bits, row, tile, COUNT)


@triton.jit(do_not_specialize=["COUNT"])
def masked_kernel(e, bits, x, COUNT, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Write COUNT elements of e to x, and zeros where a bit is not set."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile, index, exists = _load_tile(e, row, COUNT, RAGGED)
    tl.store(x + index, tl.where(_load_bits(bits, row, COUNT) == 0, 0.0, tile), mask=exists)


@triton.jit(do_not_specialize=["COUNT"])
def unpack_mask_kernel(bits, x, COUNT, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Do the inverse of :func:`pack_mask_kernel`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists = index < COUNT if RAGGED else (row * 8 < COUNT)[:, None]
    ones = _load_bits(bits, row, COUNT).to(tl.float32)  # Triton's interpreter does not convert integers to bfloat16
    tl.store(x + index, ones.to(x.dtype.element_ty), mask=exists)


def pack_mask(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a contiguous ``x``, as :func:`halo_tensor.reference.blocks.pack_mask` does."""
    x = x if x.is_contiguous() else x.contiguous()
    bits = x.new_empty((cdiv(x.numel(), 8),), dtype=torch.uint8)
    _plan(pack_mask_kernel, x.dtype, x.device)((x.numel(),), _readable(x), bits)
    return bits


def unpack_mask(bits: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Do the inverse of :func:`pack_mask`, as :func:`halo_tensor.reference.blocks.unpack_mask` does."""
    return unpack_mask_into(bits, bits.new_empty(shape, dtype=dtype))


def unpack_mask_into(bits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Write the ones and zeros to the memory of ``x``, which has no gaps, and return ``x``."""
    bits = bits if bits.is_contiguous() else bits.contiguous()
    _plan(unpack_mask_kernel, x.dtype, x.device)((x.numel(),), bits, _readable(x))
    return x


def relu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the larger of 0 and each element of ``x``, with the strides of ``x``, which has no gaps, and its mask in bits."""
    y = x.new_empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype)
    bits = x.new_empty((cdiv(x.numel(), 8),), dtype=torch.uint8)
    _plan(relu_kernel, x.dtype, x.device)((x.numel(),), x, y, bits)
    return y, bits


def masked(e: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return ``e``, with zeros where a bit is not set. ``e`` lies in memory as the tensor whose mask it is."""
    x = e.new_empty_strided(tuple(e.shape), e.stride(), dtype=e.dtype)
    _plan(masked_kernel, e.dtype, e.device)((e.numel(),), e, bits, x)
    return x


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or the bytes of bools."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


@lru_cache
def _plan(kernel: triton.JITFunction, dtype: torch.dtype, device: torch.device) -> Planned:
    """Return the launch of a kernel for any number of elements of ``dtype``."""

    def prepare(ragged: bool) -> Variant:
        launch = Launch(kernel, {"ROWS": ROWS, "RAGGED": ragged, "num_warps": 4})
        return Variant(launch, lambda count: ((cdiv(count, 8 * ROWS),), (count,)), ())

    return Planned(prepare, lambda count: count % 8 != 0)
