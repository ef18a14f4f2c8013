"""What all launches of quantisers share: the layout of codes, the constants of a format, and dense vectors."""

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from halo_tensor.kernels.device import rounds_to_fp8
from halo_tensor.recipe import FP8_E4M3, FP8_E5M2, Format
from halo_tensor.reference.codes import aligned, code_dtype, lift


def code_matrix(like: torch.Tensor, rows: int, columns: int, format: Format) -> torch.Tensor:
    """Return an uninitialised matrix of codes [rows, columns] on the device of ``like``.

    Rows begin at multiples of 16 bytes for every width, because TMA and vector loads need that.
    """
    return like.new_empty_strided((rows, columns), (aligned(columns), 1), dtype=code_dtype(format))


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """Return a vector of scales, folds, gains or biases with contiguous elements, because kernels take no stride for it."""
    return vector if vector is None or vector.ndim == 0 or vector.stride(0) == 1 else vector.contiguous()


@lru_cache
def format_options(format: Format, device: torch.device, saturate: bool = False, noisy: bool = False) -> dict[str, Any]:
    """Return the constants that a kernel rounds by, see :func:`halo_tensor.kernels.quantize.rounding.round_to_code`.

    Args:
        saturate: whether values may exceed the format's largest number, as in a bare cast without a scale.
        noisy: whether the kernel rounds stochastically.
    """
    native = format in (FP8_E4M3, FP8_E5M2) and rounds_to_fp8(device) and not noisy
    code_lift = 1.0 if saturate or noisy else lift(format)  # a bare cast has no scale to lift; noise is added to whole codes
    return {
        "CODE": tl.int8 if format.uniform else tl.float8e5 if format is FP8_E5M2 else tl.float8e4nv,
        "MANTISSA": -1 if format.uniform else -2 if native else format.mantissa_bits,
        "MIN_EXPONENT": format.min_exponent,
        "MAX": format.max if saturate else 0.0,
        "INVERSE_MAX": code_lift / format.max,
        "STEP": 1.0 / code_lift,
        "enable_fp_fusion": False,  # a fused multiply-add would round y·(1/s) and the code in one step, unlike the reference
    }
