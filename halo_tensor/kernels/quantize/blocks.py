"""Compress activations to integers in rotated blocks, and decompress them, by one kernel each.

:mod:`halo_tensor.reference.blocks` defines the codes. Both kernels are limited by memory. A program goes through several tiles
of ROWS blocks, so that the rotation matrix is read once for many.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize.kernels import load_square, product
from halo_tensor.kernels.quantize.rounding import ROUNDER, SMALLEST_SCALE, maximum
from halo_tensor.kernels.rotate import product_dtype
from halo_tensor.reference.blocks import BLOCK, ROTATION, UNDO, bits_of, largest
from halo_tensor.reference.hadamard import block_diagonal, power


class How(NamedTuple):
    """How a program goes through blocks: how many it takes at a time, how often, and Triton's options of a launch."""

    rows: int
    steps: int
    warps: int
    stages: int


#: Fewer elements than LARGE are given to programs of one step each.
COMPRESS, DECOMPRESS, LARGE = How(64, 8, 4, 3), How(64, 8, 4, 3), 2**23


@triton.jit(do_not_specialize=["COUNT"])
def compress_kernel(
    x, codes, scales, matrix, COUNT,
    BITS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, INVERSE_MAX: tl.constexpr,
):  # fmt: skip
    """Compress COUNT elements of x. A program takes STEPS tiles. RAGGED: whether the last block is not full."""
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float32
    column = tl.arange(0, BLOCK)
    rotation = load_square(matrix, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (STEPS * ROWS)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = first + step * ROWS + tl.arange(0, ROWS)
        index = row[:, None] * BLOCK + column[None, :]
        inside = row * BLOCK < COUNT
        # A mask of elements would forbid vectors.
        exists = index < COUNT if RAGGED else inside[:, None]
        tile = tl.load(x + index, mask=exists, other=0.0)
        y = product(tile if WIDE else tile.to(rotation.dtype), rotation).to(tl.float32)
        scale = tl.reduce(tl.abs(y), 1, maximum) * INVERSE_MAX
        is_nan = scale != scale
        finite = tl.where(is_nan | (scale < SMALLEST_SCALE), SMALLEST_SCALE, scale)
        up = ((finite.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
        scale = tl.where(is_nan, scale, up)
        tl.store(scales + row, scale.to(tl.bfloat16), mask=inside)
        code = (y * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None] + ROUNDER).to(tl.int32, bitcast=True)
        _store(codes, row, code, inside, BITS, ROWS, BLOCK)


@triton.jit
def _store(codes, row, code, inside, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile of codes, the low bits of int32 numbers."""
    if BITS == 8:
        part = tl.arange(0, BLOCK)
        tl.store(codes + row[:, None] * BLOCK + part[None, :], code.to(tl.int8), mask=inside[:, None])
    elif BITS == 4:
        low, high = _halves(code & 15, ROWS, BLOCK)
        part = tl.arange(0, BLOCK // 2)
        at = codes + row[:, None] * (BLOCK // 2) + part[None, :]
        tl.store(at, (low | (high << 4)).to(tl.int8), mask=inside[:, None])
    else:
        low, high = _halves(code & 63, ROWS, BLOCK)
        a, b = _halves(low, ROWS, BLOCK // 2)
        c, d = _halves(high, ROWS, BLOCK // 2)
        word = a | (b << 6) | (c << 12) | (d << 18)
        part = tl.arange(0, BLOCK // 4)
        at = codes + row[:, None] * (BLOCK // 4 * 3) + part[None, :]
        for i in tl.static_range(3):
            tl.store(at + i * (BLOCK // 4), (word >> (8 * i)).to(tl.int8), mask=inside[:, None])


@triton.jit
def _halves(code, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(code, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _beside(left, right, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile of WIDTH columns from its halves."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, WIDTH))


@triton.jit
def _load(codes, row, inside, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile of codes."""
    if BITS == 8:
        part = tl.arange(0, BLOCK)
        code = tl.load(codes + row[:, None] * BLOCK + part[None, :], mask=inside[:, None], other=0)
    elif BITS == 4:
        part = tl.arange(0, BLOCK // 2)
        byte = tl.load(codes + row[:, None] * (BLOCK // 2) + part[None, :], mask=inside[:, None], other=0).to(tl.int32)
        code = _beside(byte << 28 >> 28, byte >> 4, ROWS, BLOCK)
    else:
        part = tl.arange(0, BLOCK // 4)
        at = codes + row[:, None] * (BLOCK // 4 * 3) + part[None, :]
        word = tl.zeros((ROWS, BLOCK // 4), tl.int32)
        for i in tl.static_range(3):
            word |= (tl.load(at + i * (BLOCK // 4), mask=inside[:, None], other=0).to(tl.int32) & 255) << (8 * i)
        low = _beside(word << 26 >> 26, word << 20 >> 26, ROWS, BLOCK // 2)
        high = _beside(word << 14 >> 26, word << 8 >> 26, ROWS, BLOCK // 2)
        code = _beside(low, high, ROWS, BLOCK)
    return code


@triton.jit(do_not_specialize=["COUNT"])
def decompress_kernel(
    codes, scales, x, matrix, COUNT,
    BITS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, UNDO: tl.constexpr,
):  # fmt: skip
    """Do the inverse of :func:`compress_kernel`."""
    column = tl.arange(0, BLOCK)
    rotation = load_square(matrix, BLOCK)
    first = tl.program_id(0).to(tl.int64) * (STEPS * ROWS)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row * BLOCK < COUNT
        code = _load(codes, row, inside, BITS, ROWS, BLOCK)
        scale = tl.load(scales + row, mask=inside, other=0.0).to(tl.float32) * UNDO
        y = tl.dot(code.to(rotation.dtype), rotation).to(tl.float32) * scale[:, None]
        index = row[:, None] * BLOCK + column[None, :]
        exists = index < COUNT if RAGGED else inside[:, None]
        tl.store(x + index, y.to(x.dtype.element_ty), mask=exists)


def compress(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of a contiguous ``x``, as :func:`halo_tensor.reference.blocks.compress` does."""
    x = x if x.is_contiguous() else x.contiguous()
    count = x.numel()
    blocks = cdiv(count, BLOCK)
    codes = x.new_empty((blocks, BLOCK * bits // 8), dtype=torch.int8)
    scales = x.new_empty((blocks,), dtype=torch.bfloat16)
    plan_compress(bits, x.dtype, x.device)((count,), x, codes, scales)
    return codes, scales


def decompress(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Do the inverse of :func:`compress`, as :func:`halo_tensor.reference.blocks.decompress` does."""
    return decompress_into(codes, scales, codes.new_empty(shape, dtype=dtype))


def decompress_into(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Write the tensor to the memory of ``x``, which has no gaps, and return ``x``."""
    codes = codes if codes.is_contiguous() else codes.contiguous()
    plan_decompress(bits_of(codes), x.dtype, codes.device)((x.numel(),), codes, scales, x)
    return x


def _planned(kernel: Any, how: How, constants: dict[str, Any], matrix: torch.Tensor) -> Planned:
    """Return the launches of a kernel for any number of elements."""

    def prepare(size: tuple[int, bool]) -> Variant:
        steps, ragged = size
        options = {"ROWS": how.rows, "STEPS": steps, "STAGES": how.stages, "RAGGED": ragged, "num_warps": how.warps}
        launch = Launch(kernel, constants | options | {"BLOCK": BLOCK})
        return Variant(launch, lambda count: ((cdiv(count, steps * how.rows * BLOCK),), (count,)), (matrix,))

    return Planned(prepare, lambda count: (how.steps if count >= LARGE else 1, count % BLOCK != 0))


@lru_cache
def plan_compress(bits: int, dtype: torch.dtype, device: torch.device) -> Planned:
    """Return the launch that compresses a tensor of ``dtype``. A call takes (elements,), the tensor, codes and scales."""
    # Fused multiply-adds would round other codes than the reference does.
    constants = {"BITS": bits, "INVERSE_MAX": 1.0 / largest(bits), "enable_fp_fusion": False}
    matrix = block_diagonal(ROTATION, BLOCK, product_dtype(dtype, device), device, transposed=False)
    return _planned(compress_kernel, COMPRESS, constants, matrix)


@lru_cache
def plan_decompress(bits: int, dtype: torch.dtype, device: torch.device) -> Planned:
    """Return the launch that decompresses to ``dtype``. A call takes (elements,), codes, scales and the tensor to write."""
    # Tensor cores multiply codes as integers. Triton's interpreter multiplies float32.
    whole = device.type == "cuda"
    matrix = block_diagonal(ROTATION, BLOCK, torch.float32, device, transposed=True)
    if whole:
        matrix = (matrix / power(BLOCK)).to(torch.int8)
    undo = UNDO * power(BLOCK) if whole else UNDO
    return _planned(decompress_kernel, DECOMPRESS, {"BITS": bits, "UNDO": undo}, matrix)
