"""The ops of experts: products of tokens that are grouped by expert, their quantisers, and the copies to and from experts.

:mod:`halo_tensor.reference.experts` defines each of them, and the layout of ``tiles`` and ``starts``. No op waits for the
device to learn the sizes of groups, so CUDA graphs can be captured.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import fake, op
from halo_tensor.recipe import Format, Gate, Rotation
from halo_tensor.reference import experts as reference
from halo_tensor.reference import ops as dense_reference
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.experts import TILE


@op("group_tiles")
def group_tiles(offs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cut the groups of ``rows`` rows, which end at ``offs`` (int32 [experts]), into tiles.

    Returns:
        ``tiles``, int32 [tile_count, 4], and ``starts``, int32 [experts + 2].
    """
    if runs_kernels(offs.device):
        from halo_tensor.kernels.experts import rows as kernels

        return kernels.group_tiles(offs, rows)
    return reference.group_tiles(offs, rows)


@fake("group_tiles")
def _(offs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    experts = offs.shape[0]
    return offs.new_empty([reference.tile_count(rows, experts), 4]), offs.new_empty([experts + 2])


@op("grouped_mm")
def grouped_mm(
    a: Tensor,
    b: Tensor,
    tiles: Tensor,
    starts: Tensor,
    a_scale: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: Tensor | None = None,
) -> Tensor:
    """Multiply rows of a with their expert's matrix: :func:`halo_tensor.reference.experts.grouped_mm`.

    Args:
        a: codes [rows, k].
        b: codes [experts, n, k].
        tiles, starts: of :func:`group_tiles`.
        a_scale, b_scale: float32 [rows], and float32 [experts, n] or None.
        bias, weight: [experts, n] and float32 [rows], or None.
        column_rotation: the rotation to undo on the result.
        dtype: of the result.
        gain: float32 [n], or None.

    Returns:
        [rows, n]; zeros in rows of no expert.
    """
    if runs_kernels(a.device):
        from halo_tensor.kernels.experts import products

        return products.grouped_mm(a, b, tiles, starts, a_scale, b_scale, bias, weight, column_rotation, dtype, gain)
    return reference.grouped_mm(a, b, tiles, a_scale, b_scale, bias, weight, column_rotation, dtype, gain)


@fake("grouped_mm")
def _(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(a.shape[1] == b.shape[2], lambda: f"grouped_mm: {list(a.shape)} with {list(b.shape)} transposed")
    return a.new_empty([a.shape[0], b.shape[1]], dtype=dtype)


@op("grouped_grad")
def grouped_grad(
    a_t: Tensor,
    b_t: Tensor,
    starts: Tensor,
    a_scale: Tensor,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: Tensor | None = None,
) -> Tensor:
    """Multiply along each expert's tokens: :func:`halo_tensor.reference.experts.grouped_grad`.

    Args:
        a_t, b_t: transposed codes [n, TILE · tiles] and [k, TILE · tiles]; see :func:`quantize_groups_t`, :func:`turn_codes`.
        starts: of :func:`group_tiles`.
        a_scale: float32 [experts, n].
        column_rotation: the rotation to undo on the result.
        dtype: of the result.
        gain: float32 [k], or None.

    Returns:
        [experts, n, k]; exact zeros for an expert without tokens.
    """
    if runs_kernels(a_t.device):
        from halo_tensor.kernels.experts import products

        return products.grouped_grad(a_t, b_t, starts, a_scale, column_rotation, dtype, gain)
    return reference.grouped_grad(a_t, b_t, starts, a_scale, column_rotation, dtype, gain)


@fake("grouped_grad")
def _(a_t: Tensor, b_t: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    return a_t.new_empty([starts.shape[0] - 2, a_t.shape[0], b_t.shape[0]], dtype=dtype)


@op("gather_codes")
def gather_codes(codes: Tensor, scales: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of codes [·, c] and of scales [·] that ``index`` (int32 [rows]) names."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.experts import rows as kernels

        return kernels.gather_codes(codes, scales, index)
    at = index.long()
    return codes[at], scales[at]


@fake("gather_codes")
def _(codes: Tensor, scales: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return codes.new_empty([index.shape[0], codes.shape[1]]), scales.new_empty([index.shape[0]])


@op("turn_codes")
def turn_codes(codes: Tensor, index: Tensor | None, tiles: Tensor) -> Tensor:
    """Transpose codes for a product along tokens: :func:`halo_tensor.reference.experts.turn_codes`.

    Args:
        codes: [·, c].
        index: int32 [rows], which row of ``codes`` each row is; None if they are its rows.
        tiles: of :func:`group_tiles`.

    Returns:
        [c, TILE · tiles]. Kernels leave tiles that are not needed as they are.
    """
    if runs_kernels(codes.device):
        from halo_tensor.kernels.experts import rows as kernels

        return kernels.turn_codes(codes, index, tiles)
    return reference.turn_codes(codes, index, tiles)


@fake("turn_codes")
def _(codes: Tensor, tiles: Tensor) -> Tensor:
    return codes.new_empty([codes.shape[1], TILE * tiles.shape[0]])


@op("turn_stack")
def turn_stack(codes: Tensor) -> Tensor:
    """Return the codes of weights, or a gradient, [experts, n, k], transposed in memory: [experts, k, n]."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.experts import rows as kernels

        return kernels.turn_stack(codes)
    return codes.transpose(1, 2).contiguous()


@fake("turn_stack")
def _(codes: Tensor) -> Tensor:
    return codes.new_empty([codes.shape[0], codes.shape[2], codes.shape[1]])


@op("turn_stack_", mutates=("turned",))
def turn_stack_(codes: Tensor, turned: Tensor) -> None:
    """Write :func:`turn_stack` of ``codes`` to ``turned``."""
    if runs_kernels(codes.device):
        from halo_tensor.kernels.experts import rows as kernels

        kernels.turn_stack(codes, turned)
        return
    turned.copy_(codes.transpose(1, 2))


@op("quantize_groups")
def quantize_groups(x: Tensor, index: Tensor | None, fold: Tensor, tiles: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Quantise the rows of E for grad_input: :func:`halo_tensor.reference.experts.quantize_groups`.

    Args:
        x: [·, c].
        index: int32 [rows], or None.
        fold: float32 [experts, c].
        tiles: of :func:`group_tiles`.
        format: of the codes.

    Returns:
        Codes [rows, c] and float32 scales [rows]. Kernels leave rows of no expert as they are.
    """
    if runs_kernels(x.device):
        from halo_tensor.kernels.experts import quantizers

        return quantizers.quantize_groups(x, index, fold, tiles, format)
    return reference.quantize_groups(x, index, fold, tiles, format)


@fake("quantize_groups")
def _(x: Tensor, index: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if index is None else index.shape[0]
    return x.new_empty([rows, x.shape[1]], dtype=code_dtype(format)), x.new_empty([rows], dtype=torch.float32)


@op("quantize_groups_t")
def quantize_groups_t(
    x: Tensor, index: Tensor | None, weight: Tensor | None, fold: Tensor, tiles: Tensor, starts: Tensor, summed: bool,
    format: Format,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantise the columns of E for grad_weight: :func:`halo_tensor.reference.experts.quantize_groups_t`.

    Args:
        x: [·, c].
        index: int32 [rows], or None.
        weight: float32 [rows], multiplies rows of x first; or None.
        fold: float32 [rows].
        tiles, starts: of :func:`group_tiles`.
        summed: whether to return the sums of columns too, which gradients of biases are.
        format: of the codes.

    Returns:
        Transposed codes [c, TILE · tiles], float32 scales [experts, c], and the sums, float32 [experts, c], or [0].
    """
    if runs_kernels(x.device):
        from halo_tensor.kernels.experts import quantizers

        return quantizers.quantize_groups_t(x, index, weight, fold, tiles, starts, summed, format)
    codes_t, scales, sums = reference.quantize_groups_t(x, index, weight, fold, tiles, starts, format)
    return codes_t, scales, sums if summed else sums.new_empty(0)


@fake("quantize_groups_t")
def _(x: Tensor, tiles: Tensor, starts: Tensor, summed: bool, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    experts, columns = starts.shape[0] - 2, x.shape[1]
    return (
        x.new_empty([columns, TILE * tiles.shape[0]], dtype=code_dtype(format)),
        x.new_empty([experts, columns], dtype=torch.float32),
        x.new_empty([experts, columns] if summed else [0], dtype=torch.float32),
    )


@op("quantize_gated")
def quantize_gated(
    h: Tensor, gate: Gate, column_rotation: Rotation | None, format: Format, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the gate of h [rows, 2f], and quantise the result with a scale per row, without writing it to memory.

    Args:
        h: gate and up, see :class:`~halo_tensor.recipe.Gate`.
        gate: the function; its result is rounded to the dtype of h.
        column_rotation, format: of the result's codes.
        gain: float32 [f], powers of two that multiply columns before they are rotated; or None.

    Returns:
        Codes [rows, f] and float32 scales [rows].
    """
    if runs_kernels(h.device):
        from halo_tensor.kernels.experts import quantizers

        return quantizers.quantize_gated(h, gate, column_rotation, format, gain)
    activated = reference.activate(h, gate)
    codes, scales = dense_reference.rotate_quantize(activated, None, column_rotation, format, "row", gain=gain)
    return codes.contiguous(), scales


@fake("quantize_gated")
def _(h: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    return (
        h.new_empty([h.shape[0], h.shape[1] // 2], dtype=code_dtype(format)),
        h.new_empty([h.shape[0]], dtype=torch.float32),
    )


@op("quantize_gated_grad")
def quantize_gated_grad(
    h: Tensor, grad: Tensor, weight: Tensor | None, gate: Gate, fold: Tensor, tiles: Tensor, kept: bool, format: Format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradient of h, and do :func:`quantize_groups` with it.

    Args:
        h: [rows, 2f], of which a = weight · gate(h).
        grad: of a, [rows, f].
        weight: float32 [rows], or None.
        gate: the function.
        fold: float32 [experts, 2f].
        tiles: of :func:`group_tiles`.
        kept: whether to return the gradient too.
        format: of the codes.

    Returns:
        Codes [rows, 2f], float32 scales [rows], the gradient of ``weight``, float32 [rows], and that of h, [rows, 2f] of its
        dtype, or [0]. Kernels leave rows of no expert as they are, but for the gradient of ``weight``, which is 0.
    """
    if runs_kernels(h.device):
        from halo_tensor.kernels.experts import quantizers

        return quantizers.quantize_gated_grad(h, grad, weight, gate, fold, tiles, kept, format)
    grad_h, dots = reference.activate_backward(h, grad, weight, gate)
    codes, scales = reference.quantize_groups(grad_h, None, fold, tiles, format)
    return codes, scales, dots, grad_h.to(h.dtype) if kept else h.new_empty(0)


@fake("quantize_gated_grad")
def _(h: Tensor, kept: bool, format: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = h.shape[0]
    return (
        h.new_empty(h.shape, dtype=code_dtype(format)),
        h.new_empty([rows], dtype=torch.float32),
        h.new_empty([rows], dtype=torch.float32),
        h.new_empty(h.shape if kept else [0]),
    )


@op("combine")
def combine(y: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return for each token the sum of the rows of y that ``position`` (int32 [tokens, top_k]) names, added in that order."""
    if runs_kernels(y.device):
        from halo_tensor.kernels.experts import rows as kernels

        return kernels.combine(y, position, dtype)
    return reference.combine(y, position, dtype)


@fake("combine")
def _(y: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    return y.new_empty([position.shape[0], y.shape[1]], dtype=dtype)


@register_flop_formula(torch.ops.halo.grouped_mm)
def _count_grouped_mm(a_shape: Sequence[int], b_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Count two operations per multiply-accumulate of every row."""
    return 2 * a_shape[0] * b_shape[1] * a_shape[1]


@register_flop_formula(torch.ops.halo.grouped_grad)
def _count_grouped_grad(
    a_t_shape: Sequence[int], b_t_shape: Sequence[int], starts_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count two operations per multiply-accumulate of every row; the gaps between groups are bounded, not known."""
    columns = a_t_shape[1] - TILE * (starts_shape[0] - 1)
    return 2 * a_t_shape[0] * b_t_shape[0] * max(columns, 0)
