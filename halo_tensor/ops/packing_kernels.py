"""fp6 codes packed and unpacked by one kernel each, for code that no compiler fuses: :mod:`halo_tensor.ops.packing` has the
layout."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from halo_tensor.ops.device import check_device
from halo_tensor.ops.launch import Launch
from halo_tensor.recipe import FP8_E4M3, Format

GROUPS = 1024  # of four codes, in three bytes, a program


@triton.jit
def pack_kernel(codes, packed, COUNT, GROUPS: tl.constexpr, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    """COUNT groups of four codes to three bytes."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    field = tl.arange(0, 4)
    inside = group < COUNT
    value = tl.load(codes + group[:, None] * 4 + field[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    byte = (value * FACTOR).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    bits = (byte >> 7) << 5 | (byte & 127) >> SHIFT
    word = tl.sum(bits << (field * 6)[None, :], axis=1)
    for i in tl.static_range(3):
        tl.store(packed + group * 3 + i, (word >> (8 * i)).to(tl.uint8), mask=inside)


@triton.jit
def unpack_kernel(packed, codes, COUNT, GROUPS: tl.constexpr, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    """COUNT groups of three bytes to four codes. Put into the fields of e4m3, sign, exponent and mantissa mean the same value
    but for a power of two."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    field = tl.arange(0, 4)
    inside = group < COUNT
    word = tl.zeros((GROUPS,), tl.int32)
    for i in tl.static_range(3):
        word |= tl.load(packed + group * 3 + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    bits = (word[:, None] >> (field * 6)[None, :]) & 63
    byte = (bits >> 5) << 7 | (bits & 31) << SHIFT
    value = byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) * FACTOR
    tl.store(codes + group[:, None] * 4 + field[None, :], value.to(tl.float8e4nv), mask=inside[:, None])


def pack_rows(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """See :func:`halo_tensor.ops.packing.pack_rows`."""
    codes = codes.contiguous()
    packed = codes.new_empty((codes.shape[0], codes.shape[1] // 4 * 3), dtype=torch.uint8)
    _plan(pack_kernel, codes.numel() // 4, format, codes.device)(codes, packed)
    return packed


def unpack_rows(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """See :func:`halo_tensor.ops.packing.unpack_rows`."""
    packed = packed.contiguous()
    codes = packed.new_empty((packed.shape[0], packed.shape[1] // 3 * 4), dtype=torch.float8_e4m3fn)
    _plan(unpack_kernel, codes.numel() // 4, format, codes.device)(packed, codes)
    return codes


@lru_cache(maxsize=4096)
def _plan(kernel, count: int, format: Format, device: torch.device) -> Launch:
    check_device((format,), device)
    factor = 2.0 ** (format.min_exponent - FP8_E4M3.min_exponent)
    constants = {
        "GROUPS": GROUPS, "SHIFT": FP8_E4M3.mantissa_bits - format.mantissa_bits,
        "FACTOR": factor if kernel is unpack_kernel else 1 / factor,
    }  # fmt: skip
    return Launch(kernel, (triton.cdiv(count, GROUPS),), (count,), constants)
