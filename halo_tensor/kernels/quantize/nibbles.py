"""Pack INT4 codes in half a byte each, and unpack them, by one kernel each.

:mod:`halo_tensor.reference.nibbles` defines the layout. Both kernels are limited by memory: a program reads and writes a tile,
by vectors of 16 bytes where widths and strides are multiples of 16.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.reference.codes import aligned

#: Rows of a tile, and bytes of each that hold two codes.
ROWS, PAIRS = 32, 128


@triton.jit
def _tile(M, K, BYTES, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the rows of a program's tile, its columns of codes and of bytes, and which of either exist."""
    tiles = tl.cdiv(BYTES, PAIRS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % tiles * PAIRS
    column, byte = first * 2 + tl.arange(0, 2 * PAIRS), first + tl.arange(0, PAIRS)
    inside = (row < M)[:, None]
    return row, column, byte, inside & (column < K)[None, :], inside & (byte < BYTES)[None, :]


@triton.jit(do_not_specialize=["M"])
def pack_nibbles_kernel(
    codes, packed, M, K, BYTES, stride_codes, stride_packed, ROWS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Pack codes [M, K] to rows of BYTES bytes."""
    row, column, byte, is_code, is_byte = _tile(M, K, BYTES, ROWS, PAIRS)
    code = tl.load(codes + row[:, None] * stride_codes + column[None, :], mask=is_code, other=0)
    low, high = tl.split(tl.reshape(code, (ROWS, PAIRS, 2)))
    pair = (low & 15 | high << 4).to(tl.uint8, bitcast=True)
    tl.store(packed + row[:, None] * stride_packed + byte[None, :], pair, mask=is_byte)


@triton.jit(do_not_specialize=["M"])
def unpack_nibbles_kernel(
    packed, codes, M, K, BYTES, stride_packed, stride_codes, ROWS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Do the inverse of :func:`pack_nibbles_kernel`."""
    row, column, byte, is_code, is_byte = _tile(M, K, BYTES, ROWS, PAIRS)
    pair = tl.load(packed + row[:, None] * stride_packed + byte[None, :], mask=is_byte, other=0).to(tl.int32)
    # A shift of a 32-bit integer takes one instruction. A shift of a byte takes several.
    code = tl.reshape(tl.join(pair << 28 >> 28, pair << 24 >> 28), (ROWS, 2 * PAIRS)).to(tl.int8)
    tl.store(codes + row[:, None] * stride_codes + column[None, :], code, mask=is_code)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return packed codes, as :func:`halo_tensor.reference.nibbles.pack_nibbles` does."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    rows, columns = codes.shape
    packed = codes.new_empty((rows, cdiv(columns, 2)), dtype=torch.uint8)
    _plan(pack_nibbles_kernel, codes.device)((rows, columns, codes.stride(0), packed.stride(0)), codes, packed)
    return packed


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Return unpacked codes, as :func:`halo_tensor.reference.nibbles.unpack_nibbles` does."""
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    rows = packed.shape[0]
    codes = packed.new_empty_strided((rows, columns), (aligned(columns), 1), dtype=torch.int8)
    _plan(unpack_nibbles_kernel, packed.device)((rows, columns, packed.stride(0), codes.stride(0)), packed, codes)
    return codes


@lru_cache
def _plan(kernel: triton.JITFunction, device: torch.device) -> Planned:
    """Return the launch of either kernel. A call takes (rows, columns of codes, the stride of rows to read and of those to
    write), the matrix to read, and the one to write."""
    launch = Launch(kernel, {"ROWS": ROWS, "PAIRS": PAIRS, "num_warps": 4})

    def sizes(rows: int, columns: int, *strides: int) -> tuple:
        width = cdiv(columns, 2)
        return (cdiv(rows, ROWS) * cdiv(width, PAIRS),), (rows, columns, width, *strides)

    return Planned(lambda _: Variant(launch, sizes))
