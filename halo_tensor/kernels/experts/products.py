"""Grouped products: the first backend that does not decline serves each.

A backend is a module with two functions, as for dense products (:mod:`halo_tensor.kernels.matmul.backends`).
``why_not(request)`` returns the reason to decline, or None. ``plan(request)`` returns a
:class:`~halo_tensor.kernels.launch.Planned`, or None after a warning if it could not be prepared.
"""

from functools import lru_cache

import torch

from halo_tensor.fences.fast_paths import GLUON
from halo_tensor.kernels.device import check_device
from halo_tensor.kernels.experts import triton_products
from halo_tensor.kernels.experts.request import GroupedRequest
from halo_tensor.kernels.launch import Planned
from halo_tensor.kernels.matmul.backends import Backend
from halo_tensor.kernels.matmul.plan import finish, fits_epilogue, unfinished
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference.ops import LONGEST_SUM

#: The first backend that does not decline serves a product. The last one declines none.
BACKENDS = (
    Backend("gluon", GLUON.load("halo_tensor.kernels.experts.sm90")),
    Backend("triton", triton_products),
)


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: torch.Tensor | None,
) -> torch.Tensor:
    """Return what :func:`halo_tensor.reference.experts.grouped_mm` defines."""
    (rows, k), (experts, n, _) = a.shape, b.shape
    if column_rotation is not None and not fits_epilogue(column_rotation):
        assert bias is None and weight is None, "products that undo a rotation are gradients, which have neither"
        y = grouped_mm(a, b, tiles, starts, a_scale, b_scale, None, None, None, unfinished(dtype), None)
        return finish(y, None, column_rotation, (rows, n), gain, None, dtype)
    out = a.new_empty((rows, n), dtype=dtype)
    if rows == 0:
        return out
    if k > LONGEST_SUM:
        raise ValueError(f"experts of {k} features need sums of integers that int32 cannot hold: convert their layer in fp8")
    planned = plan(
        a.device, a.dtype, False, b_scale is not None, None if bias is None else bias.dtype, weight is not None,
        gain is not None, column_rotation, dtype,
    )  # fmt: skip
    numbers = (rows, experts, tiles.shape[0], rows, n, k, a.stride(0), b.stride(1))
    planned(numbers, a, b, out, tiles, starts, a_scale, b_scale, bias, weight, gain)
    return out


def grouped_grad(
    a_t: torch.Tensor,
    b_t: torch.Tensor,
    starts: torch.Tensor,
    a_scale: torch.Tensor,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: torch.Tensor | None,
) -> torch.Tensor:
    """Return what :func:`halo_tensor.reference.experts.grouped_grad` defines."""
    (m, k), n, experts = a_t.shape, b_t.shape[0], starts.shape[0] - 2
    if column_rotation is not None and not fits_epilogue(column_rotation):
        g = grouped_grad(a_t, b_t, starts, a_scale, None, unfinished(dtype), None)
        return finish(g.view(experts * m, n), None, column_rotation, (experts * m, n), gain, None, dtype).view(experts, m, n)
    out = a_t.new_empty((experts, m, n), dtype=dtype)
    planned = plan(a_t.device, a_t.dtype, True, False, None, False, gain is not None, column_rotation, dtype)
    numbers = (k, experts, 0, m, n, k, a_t.stride(0), b_t.stride(0))
    planned(numbers, a_t, b_t, out, None, starts, a_scale, None, None, None, gain)
    return out


@lru_cache(maxsize=4096)
def plan(
    device: torch.device,
    code: torch.dtype,
    along_tokens: bool,
    scaled: bool,
    bias: torch.dtype | None,
    weighted: bool,
    gain: bool,
    rotation: Rotation | None,
    dtype: torch.dtype,
) -> Planned:
    """Return the launches of the products that a :class:`~halo_tensor.kernels.experts.request.GroupedRequest` of these
    arguments describes.

    A call takes (rows, experts, tiles, m, n, k, row strides of a and of b), then a, b, out, tiles, starts, a_scale, b_scale,
    bias, weight and gain.
    """
    check_device((INT8 if code == torch.int8 else FP8_E4M3,), device)
    request = GroupedRequest(device, code, along_tokens, scaled, bias, weighted, gain, rotation, dtype)
    willing = (backend for backend in BACKENDS if backend.why_not(request) is None)
    return next(made for backend in willing if (made := backend.plan(request)) is not None)
