"""The product of quantised operands: R_left (diag(s_a) A Bᵀ diag(s_b)) Rᵀ_right diag(gain) + bias.

Both operands are read K-major, which is the only order that 8-bit tensor cores take. Scales, the undoing of rotations, the
gain, the bias and the cast happen on the accumulator, before anything is written. The first of
:data:`halo_tensor.kernels.matmul.backends.BACKENDS` that does not decline serves a product.
"""

from functools import lru_cache, reduce
from operator import add

import torch

from halo_tensor.kernels.device import check_device, is_hopper
from halo_tensor.kernels.launch import Planned, Variant, cdiv
from halo_tensor.kernels.matmul import cublas
from halo_tensor.kernels.matmul.backends import BACKENDS
from halo_tensor.kernels.matmul.request import Request, SizeClass, multiprocessors, size_class
from halo_tensor.kernels.quantize.plan import dense
from halo_tensor.kernels.rotate import transposed, unrotate
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.ops import LONGEST_SUM


def fits_epilogue(rotation: Rotation | None) -> bool:
    """Whether a rotation can be undone on an output tile."""
    return rotation is not None and rotation.rank is None and rotation.edge in (16, 32, 64, 128)


def scaled_mm(
    a: torch.Tensor,
    b_t: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    left: Rotation | None,
    right: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`halo_tensor.reference.ops.scaled_mm`; scales are numbers or vectors."""
    if a.dtype == torch.int8 and a.shape[1] > LONGEST_SUM:
        parts = zip(a.split(LONGEST_SUM, 1), b_t.split(LONGEST_SUM, 1), strict=True)
        y = reduce(add, (scaled_mm(*part, a_scale, b_scale, None, left, right, shape, torch.float32, gain) for part in parts))
        return (y if bias is None else y.add_(bias)).to(dtype)
    in_right = right if fits_epilogue(right) and b_t.shape[0] == shape[1] else None
    in_left = left if fits_epilogue(left) and _left_in_epilogue(a, b_t, shape[0], dtype) else None
    if in_left == left and in_right == right:
        return _product(a, b_t, a_scale, b_scale, gain, bias, in_left, in_right, shape[0], dtype)
    # What the epilogue cannot undo is undone in a pass of its own. The bias follows, and where that pass rotates columns, the
    # gain.
    rows = shape[0] if in_left else a.shape[0]
    in_gain, gain = (gain, None) if in_right == right else (None, gain)
    # Still rotated, or before the gain, a result may be outside of float16's range.
    wide = torch.float32 if dtype == torch.float16 else dtype
    y = _product(a, b_t, a_scale, b_scale, in_gain, None, in_left, in_right, rows, wide)
    y = unrotate(y, None if in_left else left, None if in_right else right, shape, wide)
    y = y if gain is None else y.mul_(gain)
    y = y if bias is None else y.add_(bias)
    return y if wide == dtype else y.to(dtype)


def _left_in_epilogue(a: torch.Tensor, b_t: torch.Tensor, rows: int, dtype: torch.dtype) -> bool:
    """Whether an epilogue undoes a rotation on the left. It does so without spilled registers only on SM 9.0, for floating
    codes and tiles of 128×256; elsewhere a pass of its own is faster, but for float32, which only PyTorch rotates."""
    if a.device.type != "cuda" or dtype == torch.float32:
        return True
    return (
        is_hopper(a.device)
        and a.dtype != torch.int8
        and cdiv(rows, 128) * cdiv(b_t.shape[0], 256) >= multiprocessors(a.device)
    )


def _product(a, b_t, a_scale, b_scale, gain, bias, left, right, rows: int, dtype: torch.dtype) -> torch.Tensor:
    a, b_t = _readable(a), _readable(b_t)
    a_scale, b_scale, gain, bias = dense(a_scale), dense(b_scale), dense(gain), dense(bias)
    out = a.new_empty((rows, b_t.shape[0]), dtype=dtype)
    if a.shape[1] == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    n, bias_dtype = b_t.shape[0], None if bias is None else bias.dtype
    planned = plan(
        a.device, a.dtype, b_t.dtype, n, _kind(a_scale), _kind(b_scale), gain is not None, bias_dtype, left, right, dtype
    )
    planned((*a.shape, rows, a.stride(0), b_t.stride(0)), a, b_t, out, a_scale, b_scale, gain, bias)
    return out


@lru_cache(maxsize=4096)
def plan(
    device: torch.device,
    a: torch.dtype,
    b: torch.dtype,
    n: int,
    a_scale: int,
    b_scale: int,
    gain: bool,
    bias: torch.dtype | None,
    left: Rotation | None,
    right: Rotation | None,
    dtype: torch.dtype,
) -> Planned:
    """The products that a :class:`~halo_tensor.kernels.matmul.request.Request` of these arguments describes.

    Takes (m, k, rows, row strides of a and of b_t), then a, b_t, out, a_scale, b_scale, gain and bias.
    """
    check_device((INT8 if a == torch.int8 else FP8_E4M3,), device)

    def request(size: SizeClass) -> Request:
        return Request(device, a, b, n, a_scale, b_scale, gain, bias, left, right, dtype, size)

    def prepare(size: SizeClass) -> Variant:
        asked = request(size)
        willing = (backend for backend in BACKENDS if backend.why_not(asked) is None)
        return next(variant for backend in willing if (variant := backend.plan(asked)) is not None)

    def classify(m: int, k: int, rows: int, stride_a: int, stride_b: int) -> SizeClass:
        size = size_class(m, n, multiprocessors(device))
        ideal = size._replace(vendor=cublas.is_faster(m, n, k, stride_a, stride_b))
        return ideal if ideal.vendor and cublas.why_not(request(ideal)) is None else size

    return Planned(prepare, classify)


def _kind(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else 1 + scale.ndim


def _readable(codes: torch.Tensor) -> torch.Tensor:
    """``codes`` as a descriptor can read them: contiguous rows that begin at multiples of 16 bytes. 8-bit tensor cores take
    their operands in no other order, so a transposed view is transposed in memory first."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    if codes.stride(0) == 1:  # the transpose of a row-major matrix
        return transposed(codes.t())
    return codes.new_empty_strided(codes.shape, (aligned(codes.shape[1]), 1)).copy_(codes)
