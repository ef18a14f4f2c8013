"""The product of fp8 codes with row and column scales by cuBLAS, where it is faster than our kernels."""

from functools import lru_cache
from typing import Any

import torch
from triton import next_power_of_2

from halo_tensor.fences.fast_paths import CUBLAS
from halo_tensor.kernels.device import is_hopper
from halo_tensor.kernels.launch import Variant
from halo_tensor.kernels.matmul.request import Request


class VendorProduct:
    """The product of two scaled operands, in the form that compiled graphs call.

    It calls the private ``torch._scaled_mm`` (tested with torch 2.13), because the public function
    ``torch.nn.functional.scaled_mm`` has no ``out``.
    """

    # The attributes that a launch has.
    constants: dict[str, Any] = {}  # noqa: RUF012
    module = __name__

    def __call__(self, a: Any, b_t: Any, out: Any, a_scale: Any, b_scale: Any) -> None:
        if not isinstance(a, torch.Tensor):  # a stand-in for one, in a graph that is being compiled
            return a.record(self, (a, b_t, out, a_scale, b_scale))
        scales = {"scale_a": a_scale.unsqueeze(1), "scale_b": b_scale.unsqueeze(0)}
        torch._scaled_mm(a, b_t.t(), **scales, out_dtype=out.dtype, use_fast_accum=True, out=out)

    def source(self) -> str:
        """Return the expression that makes this object in generated code."""
        return "halo_tensor.kernels.matmul.cublas.VendorProduct()"


class _WithOnes:
    """The product, called like a :class:`~halo_tensor.kernels.launch.Launch`. Ones stand for scales that are not given."""

    def __init__(self, request: Request):
        self.a_scaled, self.b_scaled, self.multiply = request.a_scale > 0, request.b_scale > 0, VendorProduct()

    def sizes(self, m: int, n: int) -> tuple[int, int]:
        """Return what a call takes instead of a launch's sizes: the shape of the result."""
        return m, n

    def __call__(
        self, sizes: tuple[int, int], a: Any, b_t: Any, out: Any, a_scale: Any, b_scale: Any, gain: Any, bias: Any
    ) -> None:
        m, n = sizes
        a_scale = a_scale if self.a_scaled else _ones(m, a.device)
        b_scale = b_scale if self.b_scaled else _ones(n, a.device)
        self.multiply(a, b_t, out, a_scale, b_scale)


def is_faster(m: int, n: int, k: int, stride_a: int, stride_b: int) -> bool:
    """Whether cuBLAS accepts operands of this size and is faster with them.

    It is 3 to 15 % faster where the contraction is short. But in every call it takes the CPU 25 µs longer to choose its kernel
    than to launch ours, and smaller products do not save that much on the GPU (docs/notes/products.md).
    """
    return k % 16 == 0 and stride_a == stride_b == k and 1024 <= k <= 8192 and m * n * k >= 2 * 10**10


def why_not(request: Request) -> str | None:
    """Return the reason to decline: cuBLAS cannot serve the product, or is not faster. None if it is."""
    if not is_hopper(request.device) or request.a != torch.float8_e4m3fn or request.b != torch.float8_e4m3fn:
        return "it is for e4m3 codes on SM 9.0"
    rotated = request.row_rotation or request.column_rotation
    if rotated or request.gain or request.bias is not None or 1 in (request.a_scale, request.b_scale):
        return "it multiplies with vectors of scales, and does nothing else"
    if request.dtype != torch.bfloat16 or request.n % 16:
        return "it gives bfloat16, in rows of multiples of 16"
    if not request.size.vendor:
        return "it takes contiguous rows of multiples of 16 codes, or is not faster for this size"
    return None if _multiplies(request.device) else "it failed, and a warning said so"


def plan(request: Request) -> Variant:
    """Return the launch of a product."""
    return Variant(_WithOnes(request), lambda m, k, rows, stride_a, stride_b: (m, request.n))


@lru_cache
def _multiplies(device: torch.device) -> bool:
    """Whether :class:`VendorProduct` works on the device, by a small product."""

    def multiply() -> bool:
        a, b_t = (torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device) for _ in range(2))
        ones, out = _ones(16, device), a.new_empty((16, 16), dtype=torch.bfloat16)
        VendorProduct()(a, b_t, out, ones, ones)
        return True

    return CUBLAS.attempt(multiply) is not None


def _ones(n: int, device: torch.device) -> torch.Tensor:
    """Return [n] ones, as a view of cached ones that serve many numbers of tokens."""
    return _cached_ones(next_power_of_2(n), device)[:n]


@lru_cache
def _cached_ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float32, device=device)
