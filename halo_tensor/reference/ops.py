"""Every op of the library in plain PyTorch: the definition that kernels are tested against, and what a CPU runs.

Rotations are passed as concrete :class:`~halo_tensor.recipe.Rotation` objects (their block is a number). A rotated
dimension that its block does not divide is padded with zero rows, which no product notices.
"""

from functools import reduce, wraps
from operator import add

import torch
import torch.nn.functional as F

from halo_tensor.fences.pytorch import multiply_integers
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference.codes import lift, round_to
from halo_tensor.reference.hadamard import factors, hadamard_factor, norm, rotation_signs, signed_hadamard

#: Lifted scales below this are replaced by it, so that an all-zero row divides by something: 2⁻¹²⁶, the smallest normal
#: float32.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
#: What folded scales are multiplied with, so that the product with them underflows no sooner than a product of the matrices:
#: a scale is its row's largest magnitude divided by 127 (int8) or a like number.
FOLD_LIFT = 128.0
#: By how much one of two scales is made smaller and the other larger, for their products with a sum of codes not to overflow
#: in between.
SHIFT = 128.0
BLOCK = 32  # the edge of a block of scale="block"
#: As many products of 8-bit integers an int32 holds the sum of: 127² · 2¹⁷ < 2³¹.
LONGEST_SUM = 2**17


def padded(width: int, rotation: Rotation | None) -> int:
    """``width`` rounded up to whole blocks of the rotation."""
    return width if rotation is None else -(-width // rotation.edge) * rotation.edge


def rotated(width: int, rotation: Rotation | None) -> int:
    """How wide a dimension is once rotated: padded, or what a rank keeps of that."""
    whole = padded(width, rotation)
    return whole if rotation is None or rotation.rank is None else whole // rotation.edge * rotation.rank


def _without_autocast(function):
    """Autocast would multiply in bfloat16."""

    @wraps(function)
    def run(x, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


@_without_autocast
def rotate_last(x: torch.Tensor, rotation: Rotation, inverse: bool = False) -> torch.Tensor:
    """x R, or x Rᵀ if ``inverse``, along the last dimension. float32 in and out; the last dimension must be whole blocks."""
    edge = rotation.edge
    before, after = (rotation.rank or edge, edge) if inverse else (edge, rotation.rank or edge)
    a, b = factors(edge) or (edge, 1)
    blocks = x.reshape(-1, before)
    if a == 1:
        matrix = signed_hadamard(rotation, x.device)
        blocks = blocks @ (matrix.t() if inverse else matrix)
    else:  # H = H_a ⊗ H_b, a block being an a×b matrix
        d = rotation_signs(rotation, x.device)
        h_a, h_b = hadamard_factor(a, x.device), hadamard_factor(b, x.device)
        if inverse:
            h_a, h_b = h_a.t(), h_b.t()
        else:
            blocks = blocks * d
        blocks = (h_a.t() @ (blocks.reshape(-1, b) @ h_b).view(-1, a, b)).reshape(-1, edge)
        blocks = blocks * d if inverse else blocks
    return blocks.mul_(norm(rotation)).view(*x.shape[:-1], x.shape[-1] // before * after)


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None) -> torch.Tensor:
    """Rᵀ_left x R_right of a matrix, in float32, zero-padded to whole blocks."""
    x = x.to(torch.float32)
    rows, columns = padded(x.shape[0], left), padded(x.shape[1], right)
    if (rows, columns) != tuple(x.shape):
        x = F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))
    x = rotate_last(x, right) if right else x
    return rotate_last(x.t(), left).t() if left else x


def unrotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape: tuple[int, int]) -> torch.Tensor:
    """R_left x Rᵀ_right without the padding, of the given ``shape``, in float32: the inverse of :func:`rotate`, or with a rank
    the way back of a projection."""
    x = x.to(torch.float32)
    x = rotate_last(x, right, inverse=True) if right else x
    x = rotate_last(x.t(), left, inverse=True).t() if left else x
    return x[: shape[0], : shape[1]]


def _spread(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One value per 32×32 block, repeated to every element of a matrix of ``shape``."""
    return blocks.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def _amax(x: torch.Tensor, scale: str) -> torch.Tensor:
    magnitude = x.abs()
    if scale == "block":
        rows, columns = x.shape
        magnitude = F.pad(magnitude, (0, -columns % BLOCK, 0, -rows % BLOCK))
        return magnitude.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    dims = {"tensor": (0, 1), "row": (1,), "column": (0,)}[scale]
    if x.numel() == 0:
        return x.new_zeros([x.shape[i] for i in (0, 1) if i not in dims])
    return magnitude.amax(dims)


def _along(scale: torch.Tensor, kind: str, shape: torch.Size) -> torch.Tensor:
    """A scale shaped to broadcast over the codes."""
    if kind == "block":
        return _spread(scale, shape)
    return scale.unsqueeze(1) if kind == "row" else scale


def folds_across(scale: str, fold_rows: torch.Tensor | None, fold_columns: torch.Tensor | None) -> bool:
    """Whether folds lie along rows where scales lie along columns, and the other way round, which is what recipes ask for."""
    return (fold_rows is None or scale == "column") and (fold_columns is None or scale == "row")


def rotate_quantize(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    scale: str,
    fold_rows: torch.Tensor | None = None,
    fold_columns: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix: Rᵀ_left x R_right, times the folded scales, ≈ codes · scale.

    Args:
        x: [r, c], any floating dtype and strides.
        scale: "row" (scales [r']), "column" ([c']), "tensor" ([]), "block" ([⌈r'/32⌉, ⌈c'/32⌉]) or "unit" (all ones, []),
            where r', c' are r, c :func:`rotated`.
        fold_rows, fold_columns: float32 [r'] and [c'] that multiply the rotated matrix before it is scaled.
        noise: float32 [r', c'], uniform in [0, 1), for stochastic rounding.
        gain: float32 [c], multiplies the columns of x before they are rotated: powers of two, else kernels round the product
            to the dtype of x.

    Returns:
        codes [r', c'] of ``code_dtype(format)`` and float32 scales: amax/format.max. An all-zero group has codes 0; a
        group with a NaN or Inf has a NaN or Inf scale, so that every product with it shows one.
    """
    y = rotate(x if gain is None else x.to(torch.float32) * gain, left, right)
    # Everything is lifted by powers of two, so that nothing is rounded differently than without.
    fold_lift = FOLD_LIFT if folds_across(scale, fold_rows, fold_columns) else 1.0
    unlift = 1.0
    if fold_rows is not None:
        y, unlift = y * (fold_rows * fold_lift).unsqueeze(1), 1.0 / fold_lift
    if fold_columns is not None:
        y, unlift = y * (fold_columns * fold_lift), 1.0 / fold_lift
    if scale == "unit":
        return round_to(y, format, noise), y.new_ones(())
    # The scale is a product and its reciprocal a division, both rounded once: kernels do the same to the bit.
    code_lift = lift(format) if noise is None else 1.0
    s = (_amax(y, scale) * (code_lift / format.max)).clamp_min(SMALLEST_SCALE)
    y = y * _along(1.0 / s, scale, y.shape)
    y = y if code_lift == 1 else y.mul_(code_lift)
    return round_to(y, format, noise), s * (unlift / code_lift)


def dequantize(codes: torch.Tensor, scale: torch.Tensor | None, kind: str) -> torch.Tensor:
    """codes · scale, in float32. ``kind`` says along what the scale lies, as in :func:`rotate_quantize`."""
    y = codes.to(torch.float32)
    return y if scale is None else y * _along(scale, kind, y.shape)


def multiply_codes(a: torch.Tensor, b_t: torch.Tensor) -> torch.Tensor:
    """a b_tᵀ of two matrices of codes, as float32: integers are accumulated exactly, in int32 (of LONGEST_SUM products; such
    sums in float32), and floats in float32."""
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
    left: Rotation | None,
    right: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """R_left (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_right diag(gain) + bias, as a matrix of ``shape`` and ``dtype``.

    Args:
        a: codes [m', k']; b_t: codes [n', k'], the right operand transposed. Both are K-major, what tensor cores read.
        a_scale: float32 [], [m'] or (block scales) [⌈m'/32⌉, ⌈k'/32⌉]; b_scale likewise over b_t; None is 1.
        gain: float32 [n]; bias: [n], added last. left, right: the rotations to undo on the result's rows and columns.
    """
    if a_scale is not None and a_scale.ndim == 2:  # block scales vary along the contraction
        y = dequantize(a, a_scale, "block") @ dequantize(b_t, b_scale, "block").t()
    else:
        y = multiply_codes(a, b_t)
        shift = 1.0 if a_scale is None or b_scale is None else SHIFT
        if a_scale is not None:
            a_scale = a_scale * (1.0 / shift)
            y = y * (a_scale.unsqueeze(1) if a_scale.ndim else a_scale)
        if b_scale is not None:
            y = y * (b_scale * shift)
    y = unrotate(y, left, right, shape)
    if gain is not None:
        y = y * gain
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype)
