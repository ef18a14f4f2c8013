"""The ops as ``torch.ops.halo.*``: opaque to the compiler, functional, with fake implementations.

The functions of this module are the typed face of the ops; nothing else calls ``torch.ops.halo``. A GPU runs the Triton
kernels; every other device runs the reference, and so do block scales, which exist for comparison.
"""

import torch

from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops import implementations  # noqa: F401 (registers them)
from halo_tensor.ops.schemas import encode
from halo_tensor.recipe import Format, Rotation, Scales
from halo_tensor.reference import ops as reference


def rotate_quantize(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    granularity: Scales | str,
    *,
    fold_rows: torch.Tensor | None = None,
    fold_columns: torch.Tensor | None = None,
    rows: bool = True,
    columns: bool = False,
    rounding: str = "nearest",
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """:func:`~halo_tensor.reference.ops.rotate_quantize` with a choice of layouts: the codes [r, c] if ``rows``, their
    transpose [c, r] if ``columns``, else None in their place; then the scales. On a GPU rows of codes begin at
    multiples of 16 bytes; a CPU's products read either order at the same speed: there the transpose is a view of row-major
    memory. Stochastic rounding draws from torch's generator of x's device: on a GPU the kernels' seed, elsewhere all the
    noise, and the codes are contiguous there."""
    seed = None
    if rounding == "stochastic":
        if Scales.of(granularity).is_blocked or not runs_kernels(x.device):
            return _round_stochastically(x, left, right, format, granularity, fold_rows, fold_columns, rows, columns, gain)
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    codes, codes_t, scales = torch.ops.halo.rotate_quantize(
        x, encode(left), encode(right), format.name, str(granularity), fold_rows, fold_columns, rows, columns, seed, gain
    )
    return codes if rows else None, codes_t if columns else None, scales


def _round_stochastically(x, left, right, format, granularity, fold_rows, fold_columns, rows, columns, gain):
    """In PyTorch's ops, so that a compiler sees the noise, draws it where it is used, and never stores it."""
    # In float32, as the op: rounded to x's dtype before it is rounded up or down, the mean would not be exact.
    y = x if gain is None else x.to(torch.float32) * gain
    y = y if left is None and right is None else rotate(y.to(torch.float32), left, right)
    noise = torch.rand(y.shape, dtype=torch.float32, device=y.device)
    codes, scales = reference.rotate_quantize(y, None, None, format, granularity, fold_rows, fold_columns, noise)
    return codes.contiguous() if rows else None, codes.t().contiguous() if columns else None, scales


def rotate_quantize_(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    granularity: Scales | str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    gain: torch.Tensor | None = None,
) -> None:
    """:func:`rotate_quantize` again, in place of the row-major codes and the scales that it gave for a matrix like x."""
    torch.ops.halo.rotate_quantize_(x, encode(left), encode(right), format.name, str(granularity), codes, scales, gain)


def requantize_(
    xs: list[torch.Tensor],
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    granularity: Scales | str,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    gains: list[torch.Tensor],
) -> None:
    """:func:`rotate_quantize_` of many matrices, of any shapes, on one device. ``gains``: one for each, or none at all. Not
    for code that is compiled."""
    torch.ops.halo.requantize_(xs, encode(left), encode(right), format.name, str(granularity), codes, scales, gains)


def quantize_pair(
    x: torch.Tensor,
    left: Rotation | None,
    format: Format,
    fold_columns: torch.Tensor | None,
    fold_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two operands that backward makes of one gradient x [r, c], from two reads of it instead of four:

    codes [r', c] of Rᵀ_left x diag(fold_columns) with scales per row, and transposed codes [c, r] of diag(fold_rows) x with
    scales per column. Returns (codes, codes_t, row scales [r'], column scales [c]).
    """
    return torch.ops.halo.quantize_pair(x, encode(left), format.name, fold_columns, fold_rows)


def scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype, gain=None) -> torch.Tensor:
    """:func:`~halo_tensor.reference.ops.scaled_mm` on the fastest unit that the device has.

    Raises RuntimeError, naming the device and what it can run, if it has none.
    """
    return torch.ops.halo.scaled_mm(a, b_t, a_scale, b_scale, bias, encode(left), encode(right), shape, dtype, gain)


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None) -> torch.Tensor:
    """Rᵀ_left x R_right, zero-padded to whole blocks, in the dtype of ``x``."""
    return torch.ops.halo.rotate(x, encode(left), encode(right))


def unrotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape) -> torch.Tensor:
    """The inverse of :func:`rotate`, of the given ``shape``, in the dtype of ``x``."""
    return torch.ops.halo.unrotate(x, encode(left), encode(right), shape)


def pack_rows_(codes: torch.Tensor, format: Format, packed: torch.Tensor) -> None:
    """:func:`~halo_tensor.reference.packing.pack_rows` to ``packed``, as one op, for code that is not compiled; in a graph,
    what is written in pointwise ops can be fused, and repeated instead of saved."""
    torch.ops.halo.pack_rows_(codes, format.name, packed)


def unpack_rows(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """:func:`~halo_tensor.reference.packing.unpack_rows`, likewise."""
    return torch.ops.halo.unpack_rows(packed, format.name)
