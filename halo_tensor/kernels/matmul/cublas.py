"""cuBLAS's product of fp8 codes with row and column scales, for the products that it is faster at."""

from functools import lru_cache
from typing import Any

import torch

from halo_tensor.fences.fast_paths import CUBLAS
from halo_tensor.kernels.device import is_hopper
from halo_tensor.kernels.matmul.request import Request


class VendorProduct:
    """The product, called like a :class:`~halo_tensor.kernels.launch.Launch`. ``ones`` stand for scales that are absent.

    By a private name, since the public one, ``torch.nn.functional.scaled_mm``, cannot write to a given ``out``.
    """

    constants: dict[str, Any] = {}  # noqa: RUF012 as a launch has them

    def __init__(self, a_scaled: bool, b_scaled: bool):
        self.a_scaled, self.b_scaled = a_scaled, b_scaled

    def __call__(self, a, b_t, out, a_scale, b_scale, gain, bias, a_ones, b_ones) -> None:
        a_scale, b_scale = a_scale if self.a_scaled else a_ones, b_scale if self.b_scaled else b_ones
        if not isinstance(a, torch.Tensor):
            return a.record(self, (a, b_t, out, a_scale, b_scale, out, out, a_scale, b_scale))
        scales = {"scale_a": a_scale.unsqueeze(1), "scale_b": b_scale.unsqueeze(0)}
        torch._scaled_mm(a, b_t.t(), **scales, out_dtype=out.dtype, use_fast_accum=True, out=out)

    def source(self) -> str:
        return "halo_tensor.kernels.matmul.cublas.VendorProduct(True, True)"


def why_not(request: Request) -> str | None:
    """Why cuBLAS cannot serve the product, or is not the faster one, if so.

    It is 3 to 15 % faster where the contraction is short. But choosing its kernel takes the CPU 25 µs more than a launch of
    ours, every time, which smaller products do not gain (docs/notes/products.md).
    """
    m, n, k = request.size
    if not is_hopper(request.device) or request.a.dtype != torch.float8_e4m3fn or request.b_t.dtype != torch.float8_e4m3fn:
        return "it is for e4m3 codes on SM 9.0"
    if request.left or request.right or request.gain or request.bias is not None or 1 in (request.a_scale, request.b_scale):
        return "it multiplies with vectors of scales, and does nothing else"
    if request.dtype != torch.bfloat16 or n % 16 or k % 16 or request.a.stride != (k, 1) or request.b_t.stride != (k, 1):
        return "it takes contiguous rows of multiples of 16 codes, and gives bfloat16"
    if m * n * k < 2 * 10**10 or not 1024 <= k <= 8192:
        return "it is not faster for this size"
    return None if _multiplies(request.device) else "it failed, and a warning said so"


def plan(request: Request) -> tuple[VendorProduct, tuple]:
    (m, n, _), a_scaled, b_scaled = request.size, request.a_scale > 0, request.b_scale > 0
    ones = None if a_scaled else _ones(m, request.device), None if b_scaled else _ones(n, request.device)
    return VendorProduct(a_scaled, b_scaled), ones


@lru_cache
def _multiplies(device: torch.device) -> bool:
    """Whether cuBLAS multiplies a small pair as :class:`VendorProduct` asks it to."""

    def multiply() -> bool:
        a, b_t = (torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device) for _ in range(2))
        ones, out = _ones(16, device), a.new_empty((16, 16), dtype=torch.bfloat16)
        VendorProduct(True, True)(a, b_t, out, ones, ones, None, None, None, None)
        return True

    return CUBLAS.attempt(multiply) is not None


@lru_cache
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float32, device=device)
