"""Pack and unpack fp6 codes by one kernel each, for code that no compiler fuses.

:mod:`halo_tensor.reference.packing` defines the layout. The kernels compute with integers only, because Triton 3.6 miscompiles
fp8 values that are used twice (docs/notes/quantisers.md).
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from halo_tensor.kernels.device import check_device
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.recipe import FP8_E4M3, Format

#: Groups per program. A group is four codes, in three bytes.
GROUPS = 1024


@triton.jit
def pack_kernel(
    codes, packed, COUNT, WIDTH, stride_codes, stride_packed,
    GROUPS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Pack COUNT groups of four codes, as bytes of e4m3, to three bytes each. LOWEST is the exponent field in e4m3 of fp6's
    smallest normal number. A row has WIDTH groups; rows of both matrices have strides."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    field = tl.arange(0, 4)
    inside = group < COUNT
    row, column = (group // WIDTH).to(tl.int64), group % WIDTH
    at = codes + (row * stride_codes + column * 4)[:, None] + field[None, :]
    byte = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
    magnitude = byte & 127
    exponent = magnitude >> 3
    subnormal = ((8 | magnitude & 7) >> (3 - MANTISSA)) >> tl.maximum(LOWEST - exponent, 0)
    bits = tl.where(exponent >= LOWEST, (magnitude >> (3 - MANTISSA)) - ((LOWEST - 1) << MANTISSA), subnormal)
    bits = tl.where(magnitude == 0, 0, bits) | (byte >> 7) << 5
    word = tl.sum(bits << (field * 6)[None, :], axis=1)
    for i in tl.static_range(3):
        tl.store(packed + row * stride_packed + column * 3 + i, (word >> (8 * i)).to(tl.uint8), mask=inside)


@triton.jit
def unpack_kernel(
    packed, codes, COUNT, WIDTH, stride_packed, stride_codes,
    GROUPS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Do the inverse of :func:`pack_kernel`."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    field = tl.arange(0, 4)
    inside = group < COUNT
    row, column = (group // WIDTH).to(tl.int64), group % WIDTH
    word = tl.zeros((GROUPS,), tl.int32)
    for i in tl.static_range(3):
        byte_at = packed + row * stride_packed + column * 3 + i
        word |= tl.load(byte_at, mask=inside, other=0).to(tl.int32) << (8 * i)
    bits = (word[:, None] >> (field * 6)[None, :]) & 63
    magnitude = bits & 31
    exponent = magnitude >> MANTISSA
    mantissa = magnitude & ((1 << MANTISSA) - 1)
    # In units of fp6's smallest number a code is an integer. Float32's exponent and mantissa of this integer are the code's.
    whole = tl.where(exponent > 0, (mantissa | (1 << MANTISSA)) << tl.maximum(exponent - 1, 0), mantissa)
    byte = (whole.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - ((127 - LOWEST + MANTISSA) << 3)
    byte = tl.where(whole > 0, byte, 0) | (bits >> 5) << 7
    at = codes + (row * stride_codes + column * 4)[:, None] + field[None, :]
    tl.store(at, byte.to(tl.uint8), mask=inside[:, None])


def pack_rows_(codes: torch.Tensor, format: Format, packed: torch.Tensor) -> None:
    """Write packed codes to ``packed``, as :func:`halo_tensor.ops.pack_rows_` does."""
    codes, target = codes.view(torch.uint8), packed if packed.stride(1) == 1 else packed.contiguous()
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    _plan(pack_kernel, format, codes.device)((*codes.shape, codes.stride(0), target.stride(0)), codes, target)
    if target is not packed:
        packed.copy_(target)


def unpack_rows(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """Return unpacked codes, as :func:`halo_tensor.reference.packing.unpack_rows` does."""
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    codes = packed.new_empty((packed.shape[0], packed.shape[1] // 3 * 4), dtype=torch.float8_e4m3fn)
    numbers = *codes.shape, packed.stride(0), codes.stride(0)
    _plan(unpack_kernel, format, codes.device)(numbers, packed, codes.view(torch.uint8))
    return codes


@lru_cache
def _plan(kernel: Any, format: Format, device: torch.device) -> Planned:
    """Return the launch of either kernel. A call takes (rows, columns of codes, the stride of rows to read and of those to
    write), the bytes to read, and the bytes to write."""
    check_device((format,), device)
    constants = {"GROUPS": GROUPS, "MANTISSA": format.mantissa_bits, "LOWEST": format.min_exponent - FP8_E4M3.min_exponent + 1}
    launch = Launch(kernel, constants)

    def sizes(rows: int, columns: int, *strides: int) -> tuple:
        groups = rows * columns // 4
        return (cdiv(groups, GROUPS),), (groups, columns // 4, *strides)

    return Planned(lambda _: Variant(launch, sizes))
