"""Rotate and quantise a matrix: ``rotate_quantize``, and in place ``rotate_quantize_`` and ``requantize_``."""

import torch
from torch import Tensor

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Format, Rotation, Scales
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned, code_dtype
from halo_tensor.reference.noise import uniform
from halo_tensor.reference.packing import pack_rows


def rotate_quantize(
    x: Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales | str,
    *,
    fold_rows: Tensor | None = None,
    fold_columns: Tensor | None = None,
    rows: bool = True,
    columns: bool = False,
    rounding: str = "nearest",
    gain: Tensor | None = None,
    flat: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the codes and scales of Rᵀ_row x R_column: :func:`halo_tensor.reference.ops.rotate_quantize`, in chosen layouts.

    Args:
        x: matrix [r, c], of any floating dtype and strides.
        row_rotation, column_rotation: rotations of its two dimensions; r' and c' are their sizes afterwards.
        format: number format of the codes.
        granularity: the layout of the scales, or its name. Only the reference computes scales of blocks.
        fold_rows, fold_columns: float32 [r'] and [c'], which multiply the rotated matrix before it is scaled.
        rows, columns: whether to return the codes, and whether to return their transpose.
        rounding: "nearest" or "stochastic", by a seed that is drawn from torch's generator of x's device.
        gain: float32 [c], powers of two that multiply the columns of x before they are rotated.
        flat: whether to return the transposed codes as their memory, a vector: see :func:`lies_flat`.

    Returns:
        Codes [r', c'] or None; their transpose [c', r'] or None; float32 scales. On a GPU, rows of codes begin at multiples of
        16 bytes. On a CPU the transpose is a view of row-major memory, since products there read either order equally fast.
    """
    granularity = Scales.of(granularity)
    seed = draw_seed(x.device) if rounding == "stochastic" else None
    codes, codes_t, scales = _rotate_quantize(
        x, row_rotation, column_rotation, format, granularity, fold_rows, fold_columns, rows, columns, seed, gain, flat
    )
    return codes if rows else None, codes_t if columns else None, scales


def draw_seed(device: torch.device) -> Tensor:
    """Return int64 [1], with which an op rounds stochastically: one number of torch's generator of the device, without a
    synchronisation. A CUDA graph draws anew in every replay."""
    return torch.randint(2**63 - 1, (1,), device=device)


@op("rotate_quantize")
def _rotate_quantize(
    x: Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    fold_rows: Tensor | None,
    fold_columns: Tensor | None,
    rows: bool,
    columns: bool,
    seed: Tensor | None,
    gain: Tensor | None,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do :func:`rotate_quantize`, with empty matrices instead of None.

    Args:
        seed: int64 [1], with which codes are rounded stochastically (:mod:`halo_tensor.reference.noise`).
    """
    rotations = row_rotation, column_rotation
    if runs_kernels(x.device) and not granularity.is_blocked:
        from halo_tensor.kernels.quantize import plan

        codes, codes_t, scales = plan.rotate_quantize(
            x, *rotations, format, granularity.name, fold_rows, fold_columns, rows, columns, None, seed, gain
        )
        dtype = code_dtype(format)
        codes, codes_t = (scales.new_empty(0, dtype=dtype) if c is None else c for c in (codes, codes_t))
        return codes, flattened(codes_t) if flat and columns else codes_t, scales
    noise = seed
    if seed is not None:
        noise = uniform(seed, reference.rotated(x.shape[0], row_rotation), reference.rotated(x.shape[1], column_rotation))
    codes, scales = reference.rotate_quantize(x, *rotations, format, granularity, fold_rows, fold_columns, noise, gain)
    codes, nothing = codes.contiguous(), codes.new_empty(0)
    if runs_kernels(x.device):
        codes_t = codes.t().contiguous() if columns else nothing
    else:
        codes_t = (codes.clone() if rows else codes).t() if columns else nothing  # outputs of an op may not share memory
    return codes if rows else nothing, flattened(codes_t) if flat and columns else codes_t, scales


@fake("rotate_quantize")
def _(
    x: Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    rows: bool,
    columns: bool,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r, c = reference.rotated(x.shape[0], row_rotation), reference.rotated(x.shape[1], column_rotation)
    pad = not granularity.is_blocked
    nothing = x.new_empty([0], dtype=code_dtype(format))
    return (
        empty_codes(x, r, c, format, pad=pad) if rows else nothing,
        empty_transpose(x, c, r, format, flat, pad) if columns else nothing,
        x.new_empty(granularity.shape(r, c), dtype=torch.float32),
    )


def empty_codes(x: Tensor, rows: int, columns: int, format: Format, pad: bool = True) -> Tensor:
    """Return an empty matrix of codes [rows, columns], with the strides that ops give to codes of x.

    Args:
        pad: whether kernels begin rows at multiples of 16 bytes.
    """
    dtype = code_dtype(format)
    if not runs_kernels(x.device):
        return x.new_empty([rows, columns], dtype=dtype)
    return x.new_empty_strided([rows, columns], [aligned(columns) if pad else columns, 1], dtype=dtype)


def empty_transpose(x: Tensor, rows: int, columns: int, format: Format, flat: bool, pad: bool = True) -> Tensor:
    """Return an empty matrix [rows, columns] with the strides that ops give to transposed codes of x, or its memory if
    ``flat``."""
    dtype = code_dtype(format)
    if flat:
        return x.new_empty([(rows - 1) * aligned(columns) + columns], dtype=dtype)
    if not runs_kernels(x.device):
        return x.new_empty([columns, rows], dtype=dtype).t()
    return empty_codes(x, rows, columns, format, pad)


def lies_flat(x: Tensor) -> bool:
    """Whether ops should return transposed codes of ``x`` [r, c] as their memory, a vector.

    On a GPU that memory has c' rows of r' codes, padded to multiples of 16. If r is a symbol, a compiler that sees the matrix
    asks whether it is dense, hence whether r' is a multiple of 16, and makes one graph for each answer. A vector is dense, so
    one graph serves every number of tokens.
    """
    return isinstance(x.shape[0], torch.SymInt) and runs_kernels(x.device)


def flattened(codes: Tensor) -> Tensor:
    """Return the memory of a matrix [r, c] whose rows are padded to multiples of 16."""
    rows, columns = codes.shape
    size, stride = (rows - 1) * aligned(columns) + columns, (aligned(columns), 1)
    if codes.stride() == stride:
        return codes.as_strided((size,), (1,))
    memory = codes.new_empty(size)
    memory.as_strided((rows, columns), stride).copy_(codes)
    return memory


def unflattened(memory: Tensor, rows: int) -> Tensor:
    """Return the matrix [rows, c] that was :func:`flattened`. Its size determines c."""
    stride = -(-memory.shape[0] // 16) // rows * 16
    return memory.as_strided((rows, memory.shape[0] - (rows - 1) * stride), (stride, 1))


@op("rotate_quantize_", mutates=("codes", "scales"))
def rotate_quantize_(
    x: Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    codes: Tensor,
    scales: Tensor,
    gain: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Quantise x again, in place of the codes and the scales that :func:`rotate_quantize` gave for such a matrix.

    Args:
        codes: row-major codes, or if ``transposed`` the transposed ones.
    """
    if runs_kernels(x.device) and not granularity.is_blocked:
        from halo_tensor.kernels.quantize import plan

        rows, into = not transposed, (codes, scales)
        plan.rotate_quantize(
            x, row_rotation, column_rotation, format, granularity.name, None, None, rows, transposed, into, gain=gain
        )
        return
    new_codes, new_scales = reference.rotate_quantize(x, row_rotation, column_rotation, format, granularity, gain=gain)
    codes.copy_(new_codes.t() if transposed else new_codes)
    scales.copy_(new_scales)


@op("requantize_", mutates=("codes", "scales"))
def requantize_(
    xs: list[Tensor],
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales,
    codes: list[Tensor],
    scales: list[Tensor],
    gains: list[Tensor],
    transposed: bool = False,
) -> None:
    """Do :func:`rotate_quantize_` for many matrices of any shapes on one device. It is not for compiled code.

    Args:
        xs, codes, scales: the matrices, and what to overwrite, in the same order. Codes of fp6 may all be packed, uint8.
        gains: one for each matrix, or an empty list.
        transposed: whether the codes are transposed ones, which have no gains.
    """
    if xs and runs_kernels(xs[0].device) and not granularity.is_blocked:
        from halo_tensor.kernels.quantize import many

        if transposed:
            many.requantize_transposed_(xs, row_rotation, column_rotation, format, granularity.name, codes, scales)
            return
        many.requantize_(xs, row_rotation, column_rotation, format, granularity.name, codes, scales, gains)
        return
    for i, (x, code, scale) in enumerate(zip(xs, codes, scales, strict=True)):
        gain = gains[i] if gains else None
        new_codes, new_scales = reference.rotate_quantize(x, row_rotation, column_rotation, format, granularity, gain=gain)
        new_codes = new_codes.t() if transposed else new_codes
        code.copy_(pack_rows(new_codes, format) if code.dtype is torch.uint8 else new_codes)
        scale.copy_(new_scales)
