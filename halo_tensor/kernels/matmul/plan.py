"""The product of quantised operands: R_row (diag(s_a) A Bᵀ diag(s_b)) Rᵀ_column diag(gain) + bias.

Both operands are read K-major, the only order that 8-bit tensor cores accept. The kernel scales the accumulator, undoes
rotations, multiplies by the gain, adds the bias and casts before it writes the result. The first of
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
from halo_tensor.kernels.quantize.codes import dense
from halo_tensor.kernels.rotate import transposed, unrotate
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference.codes import aligned
from halo_tensor.reference.ops import LONGEST_SUM


def fits_epilogue(rotation: Rotation | None) -> bool:
    """Whether a kernel can undo a rotation on an output tile."""
    return rotation is not None and rotation.rank is None and rotation.edge in (16, 32, 64, 128)


def scaled_mm(
    a: torch.Tensor,
    b_t: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what :func:`halo_tensor.reference.ops.scaled_mm` defines, for scales that are numbers or vectors."""
    if a.dtype == torch.int8 and a.shape[1] > LONGEST_SUM:
        parts = zip(a.split(LONGEST_SUM, 1), b_t.split(LONGEST_SUM, 1), strict=True)
        rotations = row_rotation, column_rotation
        y = reduce(add, (scaled_mm(*p, a_scale, b_scale, None, *rotations, shape, torch.float32, gain) for p in parts))
        return (y if bias is None else y.add_(bias)).to(dtype)
    columns_fit = fits_epilogue(column_rotation) and b_t.shape[0] == shape[1]
    rows_fit = fits_epilogue(row_rotation) and _undoes_rows_in_epilogue(a, b_t, shape[0], dtype)
    in_columns, in_rows = column_rotation if columns_fit else None, row_rotation if rows_fit else None
    if in_rows == row_rotation and in_columns == column_rotation:
        return _product(a, b_t, a_scale, b_scale, gain, bias, in_rows, in_columns, shape[0], dtype)
    # A pass of its own undoes what the epilogue cannot. The bias is added after it, and so is the gain multiplied in if that
    # pass rotates columns.
    rows = shape[0] if in_rows else a.shape[0]
    in_gain, gain = (gain, None) if in_columns == column_rotation else (None, gain)
    y = _product(a, b_t, a_scale, b_scale, in_gain, None, in_rows, in_columns, rows, unfinished(dtype))
    rest = None if in_rows else row_rotation, None if in_columns else column_rotation
    return finish(y, *rest, shape, gain, bias, dtype)


def unfinished(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a product before :func:`finish`: without its un-rotation or its gain, a result of ``dtype`` may be
    outside of float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def finish(
    y: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    shape: tuple[int, int],
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Undo rotations of a product in a pass of its own, multiply the gain in and add the bias.

    Args:
        y: the product, of the dtype that :func:`unfinished` gives. It is overwritten.
        shape, dtype: of the result.
    """
    y = unrotate(y, row_rotation, column_rotation, shape, y.dtype)
    y = y if gain is None else y.mul_(gain)
    y = y if bias is None else y.add_(bias)
    return y if y.dtype == dtype else y.to(dtype)


def _undoes_rows_in_epilogue(a: torch.Tensor, b_t: torch.Tensor, rows: int, dtype: torch.dtype) -> bool:
    """Whether an epilogue should undo a rotation of rows.

    It does so without spilled registers only on SM 9.0, for floating codes and tiles of 128×256. Elsewhere a pass of its own
    is faster, except for float32, which only PyTorch rotates.
    """
    if a.device.type != "cuda" or dtype == torch.float32:
        return True
    return (
        is_hopper(a.device)
        and a.dtype != torch.int8
        and cdiv(rows, 128) * cdiv(b_t.shape[0], 256) >= multiprocessors(a.device)
    )


def _product(
    a: torch.Tensor,
    b_t: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the product by one launch, whose epilogue undoes both rotations."""
    a, b_t = _readable(a), _readable(b_t)
    a_scale, b_scale, gain, bias = dense(a_scale), dense(b_scale), dense(gain), dense(bias)
    out = a.new_empty((rows, b_t.shape[0]), dtype=dtype)
    if a.shape[1] == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    kinds = _kind(a_scale), _kind(b_scale), gain is not None, None if bias is None else bias.dtype
    planned = plan(a.device, a.dtype, b_t.dtype, b_t.shape[0], *kinds, row_rotation, column_rotation, dtype)
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
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
) -> Planned:
    """Return the launches of the products that a :class:`~halo_tensor.kernels.matmul.request.Request` of these arguments
    describes.

    A call takes (m, k, rows, row strides of a and of b_t), then a, b_t, out, a_scale, b_scale, gain and bias.
    """
    check_device((INT8 if a == torch.int8 else FP8_E4M3,), device)

    def request(size: SizeClass) -> Request:
        return Request(device, a, b, n, a_scale, b_scale, gain, bias, row_rotation, column_rotation, dtype, size)

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
    """Return the kind of a scale, as :class:`~halo_tensor.kernels.matmul.request.Request` has it."""
    return 0 if scale is None else 1 + scale.ndim


def _readable(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as a descriptor can read them, with contiguous rows that begin at multiples of 16 bytes.

    8-bit tensor cores accept no other order, so the elements of a transposed view are transposed in memory.
    """
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    if codes.stride(0) == 1:  # the transpose of a row-major matrix
        return transposed(codes.t())
    return codes.new_empty_strided(codes.shape, (aligned(codes.shape[1]), 1)).copy_(codes)
