"""Every op of the library in plain PyTorch: the definition that kernels are tested against, and what a CPU runs.

Rotations are :class:`~halo_tensor.recipe.Rotation` objects whose block is a number. A rotated dimension that its block does
not divide is padded with zeros, which change no product.
"""

from collections.abc import Callable
from functools import reduce, wraps
from operator import add
from typing import Any

import torch
import torch.nn.functional as F

from halo_tensor.fences.pytorch import multiply_integers
from halo_tensor.recipe import AXES, COLUMN, E8M0, FLOAT32, FP8_E4M3, ROW, UNIT, Format, Rotation, Scales
from halo_tensor.reference.codes import lift, round_to
from halo_tensor.reference.hadamard import factors, hadamard_factor, norm, rotation_signs, signed_hadamard

#: The smallest lifted scale: 2⁻¹²⁶, the smallest normal float32, so that a group of zeros is not divided by zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
#: The smallest E4M3 scale on the first of two levels, the smallest subnormal: a group that is small beside the matrix keeps
#: some of its codes.
SMALLEST_E4M3 = 2.0**-9
#: The factor of folded scales. A folded scale is its row's largest magnitude divided by 127 (int8) or a similar number. With
#: this factor the product with it underflows no sooner than a product of the matrices.
FOLD_LIFT = 128.0
#: One of two scales is divided by this and the other multiplied, so that no intermediate product with a sum of codes
#: overflows.
SHIFT = 128.0
#: How many products of 8-bit integers an int32 can sum: 127² · 2¹⁷ < 2³¹.
LONGEST_SUM = 2**17


def padded(width: int, rotation: Rotation | None) -> int:
    """Return ``width`` rounded up to whole blocks of the rotation."""
    return width if rotation is None else -(-width // rotation.edge) * rotation.edge


def rotated(width: int, rotation: Rotation | None) -> int:
    """Return the width of a dimension after its rotation: padded, or the part of that which a rank keeps."""
    whole = padded(width, rotation)
    return whole if rotation is None or rotation.rank is None else whole // rotation.edge * rotation.rank


def _without_autocast(function: Callable) -> Callable:
    """Run a function without autocast, which would multiply in bfloat16."""

    @wraps(function)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


@_without_autocast
def rotate_last(x: torch.Tensor, rotation: Rotation, inverse: bool = False) -> torch.Tensor:
    """Return x R, or x Rᵀ if ``inverse``, along the last dimension, which must be whole blocks. float32 in and out."""
    edge = rotation.edge
    before, after = (rotation.rank or edge, edge) if inverse else (edge, rotation.rank or edge)
    a, b = factors(edge) or (edge, 1)
    blocks = x.reshape(-1, before)
    if a == 1:
        matrix = signed_hadamard(rotation, x.device)
        blocks = blocks @ (matrix.t() if inverse else matrix)
    else:  # H = H_a ⊗ H_b, of blocks seen as a×b matrices
        d = rotation_signs(rotation, x.device)
        h_a, h_b = hadamard_factor(a, x.device), hadamard_factor(b, x.device)
        if inverse:
            h_a, h_b = h_a.t(), h_b.t()
        else:
            blocks = blocks * d
        blocks = (h_a.t() @ (blocks.reshape(-1, b) @ h_b).view(-1, a, b)).reshape(-1, edge)
        blocks = blocks * d if inverse else blocks
    return blocks.mul_(norm(rotation)).view(*x.shape[:-1], x.shape[-1] // before * after)


def rotate(x: torch.Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None) -> torch.Tensor:
    """Return Rᵀ_rows x R_columns of a matrix, in float32, zero-padded to whole blocks.

    Args:
        x: [r, c], floating.
        row_rotation, column_rotation: the rotations of its rows and of its columns.
    """
    x = x.to(torch.float32)
    rows, columns = padded(x.shape[0], row_rotation), padded(x.shape[1], column_rotation)
    if (rows, columns) != tuple(x.shape):
        x = F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))
    x = rotate_last(x, column_rotation) if column_rotation else x
    return rotate_last(x.t(), row_rotation).t() if row_rotation else x


def unrotate(
    x: torch.Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None, shape: tuple[int, int]
) -> torch.Tensor:
    """Return R_rows x Rᵀ_columns of the given ``shape``, without the padding, in float32.

    This is the inverse of :func:`rotate`, or its transpose if a rotation has a rank.
    """
    x = x.to(torch.float32)
    x = rotate_last(x, column_rotation, inverse=True) if column_rotation else x
    x = rotate_last(x.t(), row_rotation, inverse=True).t() if row_rotation else x
    return x[: shape[0], : shape[1]]


def _largest(x: torch.Tensor, granularity: Scales) -> torch.Tensor:
    """Return the largest magnitude of each group of elements that share a scale, [granularity.shape]."""
    if x.numel() == 0:
        return x.new_zeros(granularity.shape(*x.shape))
    magnitude, reduced = x.abs(), []
    for dim in (1, 0):
        length = granularity.length(AXES[dim])
        if length is None:
            reduced.append(dim)
        elif length > 1:
            missing = -x.shape[dim] % length
            magnitude = F.pad(magnitude, (0, missing) if dim == 1 else (0, 0, 0, missing))
            magnitude = magnitude.unflatten(dim, (-1, length)).amax(dim + 1)
    return magnitude.amax(reduced) if reduced else magnitude


def _scales(largest: torch.Tensor, granularity: Scales, format: Format, code_lift: float) -> torch.Tensor:
    """Return the scale of each group, multiplied with ``code_lift``: its largest magnitude divided by the format's largest
    value, rounded to the layout's number format. A NaN or Inf gives one.

    E8M0 is rounded up to a power of two, so that no code saturates: "RCEIL" of torchao, and the rule of arXiv 2506.08027 and
    of cuBLAS (docs.nvidia.com/cuda/cublas, 1D block scaling). The rule of OCP Microscaling Formats 1.0 (section 6.3) rounds
    down. E4M3 on the first of two levels is rounded to nearest, as in arXiv 2509.25149, appendix C.
    """
    if granularity.dtype == FLOAT32:
        # A product with a reciprocal, rounded once: kernels do the same to the bit.
        return (largest * (code_lift / format.max)).clamp_min(SMALLEST_SCALE)
    ideal = largest / format.max
    scale = _round_up(ideal) if granularity.dtype == E8M0 else _round_to_e4m3(ideal, granularity.two_levels)
    return torch.where(largest.isfinite(), scale, torch.nan) * code_lift


def _round_up(scale: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that is at least ``scale``, and at least 2⁻¹²⁶."""
    scale = scale.clamp_min(SMALLEST_SCALE)
    mantissa, _ = torch.frexp(scale)  # in [½, 1)
    return torch.where(mantissa == 0.5, scale, scale / mantissa)


def _round_to_e4m3(scale: torch.Tensor, two_levels: bool) -> torch.Tensor:
    """Return ``scale`` rounded to E4M3; or, with two levels, to the product of an E4M3 number and one float32, which makes the
    largest of the E4M3 numbers 448."""
    second = scale.new_ones(())
    if two_levels and scale.numel():
        second = (scale.amax() / FP8_E4M3.max).clamp_min(SMALLEST_SCALE / SMALLEST_E4M3)
    return round_to(scale / second, FP8_E4M3).to(torch.float32).clamp_min(SMALLEST_E4M3) * second


def folds_across(granularity: Scales | str, fold_rows: torch.Tensor | None, fold_columns: torch.Tensor | None) -> bool:
    """Whether folds lie along rows where scales lie along columns, and the other way round, as recipes ask for."""
    granularity = Scales.of(granularity)
    return (fold_rows is None or granularity == COLUMN) and (fold_columns is None or granularity == ROW)


def rotate_quantize(
    x: torch.Tensor,
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: Scales | str,
    fold_rows: torch.Tensor | None = None,
    fold_columns: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of a matrix: Rᵀ_rows x R_columns, times the folded scales, ≈ codes · scale.

    Args:
        x: [r, c], any floating dtype and strides.
        row_rotation, column_rotation: the rotations of its rows and columns; r', c' are r, c :func:`rotated`.
        format: the number format of the codes.
        granularity: the layout of the scales, or its name.
        fold_rows, fold_columns: float32 [r'] and [c'] that multiply the rotated matrix before it is scaled.
        noise: float32 [r', c'], uniform in [0, 1), for stochastic rounding.
        gain: float32 [c], multiplies the columns of x before they are rotated. It must be powers of two: kernels round the
            product to the dtype of x.

    Returns:
        codes [r', c'] of ``code_dtype(format)`` and float32 scales [``granularity.shape(r', c')``]: the largest magnitude of
        each group divided by ``format.max``, each a value of the layout's number format (with two levels, the product of
        both). A group of zeros has codes 0. A group with a NaN or Inf has a NaN or Inf scale, so that every product with it
        shows one.
    """
    granularity = Scales.of(granularity)
    y = rotate(x if gain is None else x.to(torch.float32) * gain, row_rotation, column_rotation)
    # Lifts are powers of two, so that they change no rounding.
    fold_lift = FOLD_LIFT if folds_across(granularity, fold_rows, fold_columns) else 1.0
    unlift = 1.0
    if fold_rows is not None:
        y, unlift = y * (fold_rows * fold_lift).unsqueeze(1), 1.0 / fold_lift
    if fold_columns is not None:
        y, unlift = y * (fold_columns * fold_lift), 1.0 / fold_lift
    if granularity == UNIT:
        return round_to(y, format, noise), y.new_ones(())
    code_lift = lift(format) if noise is None else 1.0
    s = _scales(_largest(y, granularity), granularity, format, code_lift)
    y = y * granularity.spread(1.0 / s, *y.shape)
    y = y if code_lift == 1 else y.mul_(code_lift)
    return round_to(y, format, noise), s * (unlift / code_lift)


def dequantize(codes: torch.Tensor, scale: torch.Tensor | None, granularity: Scales | str) -> torch.Tensor:
    """Return codes · scale, in float32, of scales laid out as ``granularity`` says; None is a scale of 1."""
    y = codes.to(torch.float32)
    return y if scale is None else y * Scales.of(granularity).spread(scale, *y.shape)


def multiply_codes(a: torch.Tensor, b_t: torch.Tensor) -> torch.Tensor:
    """Return a b_tᵀ of two matrices of codes, in float32. Integers are summed exactly, in int32, up to LONGEST_SUM products;
    those sums, and all products of floats, are summed in float32."""
    if a.dtype != torch.int8:
        return a.to(torch.float32) @ b_t.to(torch.float32).t()
    return reduce(add, map(_multiply_integers, a.split(LONGEST_SUM, 1), b_t.split(LONGEST_SUM, 1)))


def _multiply_integers(a: torch.Tensor, b_t: torch.Tensor) -> torch.Tensor:
    # torch 2.13's _int_mm on CPU refuses empty operands, and returns garbage for dimensions of 1 in some layouts. With
    # k < 1024 float32 is exact as well, and with m or n = 1 speed is no concern.
    if min(a.shape[0], b_t.shape[0], a.shape[1]) > 1:
        return multiply_integers(a, b_t.t()).to(torch.float32)
    return (a.to(torch.float64) @ b_t.to(torch.float64).t()).to(torch.float32)


@_without_autocast
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
    """Return R_rows (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_columns diag(gain) + bias.

    Args:
        a: codes [m', k'].
        b_t: codes [n', k'], the right operand transposed. Tensor cores read both operands contiguous along k'.
        a_scale: float32 [] or [m'], or [m', k'], a scale for each element, if scales vary along k'; None is 1.
        b_scale: float32 [], [n'] or [n', k'] likewise. Either both operands or none have a scale for each element.
        bias: [n], added last.
        row_rotation, column_rotation: the rotations to undo on the result's rows and columns.
        shape: (m, n), the result's shape.
        dtype: the result's dtype.
        gain: float32 [n].
    """
    if a_scale is not None and b_scale is not None and a_scale.ndim == 2:
        y = (a.to(torch.float32) * a_scale) @ (b_t.to(torch.float32) * b_scale).t()
    else:
        y = multiply_codes(a, b_t)
        shift = 1.0 if a_scale is None or b_scale is None else SHIFT
        if a_scale is not None:
            a_scale = a_scale * (1.0 / shift)
            y = y * (a_scale.unsqueeze(1) if a_scale.ndim else a_scale)
        if b_scale is not None:
            y = y * (b_scale * shift)
    y = unrotate(y, row_rotation, column_rotation, shape)
    if gain is not None:
        y = y * gain
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)
