"""The ops as ``torch.ops.halo.*``: opaque to the compiler, functional, with fake implementations.

A rotation crosses the dispatcher as an ``int[]``: empty for none, else [block, seed], with seed −1 for no signs. The
functions of this module are the typed face of the ops; nothing else calls ``torch.ops.halo``.
"""

import torch

from halo_tensor.ops import reference
from halo_tensor.ops.formats import code_dtype
from halo_tensor.ops.hadamard import fit
from halo_tensor.recipe import FORMATS, Format, Rotation

_library = torch.library.Library("halo", "DEF")
_library.define(
    "rotate_quantize(Tensor x, int[] left, int[] right, str format, str scale, Tensor? fold_rows, Tensor? fold_columns, "
    "bool rows, bool columns) -> (Tensor codes, Tensor codes_t, Tensor scale)"
)
_library.define(
    "scaled_mm(Tensor a, Tensor b_t, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int[] left, int[] right, "
    "SymInt[] shape, ScalarType dtype) -> Tensor"
)
_library.define("rotate(Tensor x, int[] left, int[] right) -> Tensor")
_library.define("unrotate(Tensor x, int[] left, int[] right, SymInt[] shape) -> Tensor")


def _encode(rotation: Rotation | None) -> list[int]:
    return [] if rotation is None else [rotation.edge, -1 if rotation.seed is None else rotation.seed]


def _decode(code: list[int]) -> Rotation | None:
    return Rotation(code[0], None if code[1] < 0 else code[1]) if code else None


def rotate_quantize(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    scale: str,
    *,
    fold_rows: torch.Tensor | None = None,
    fold_columns: torch.Tensor | None = None,
    rows: bool = True,
    columns: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """:func:`~halo_tensor.ops.reference.rotate_quantize` with a choice of layouts: the codes [r, c] if ``rows``, their
    transpose [c, r] if ``columns``, else None in their place; then the scales. On a GPU both are contiguous; a CPU's matrix
    products read either order at the same speed, so there the transpose is a view of row-major memory."""
    codes, codes_t, scales = torch.ops.halo.rotate_quantize(
        x, _encode(left), _encode(right), format.name, scale, fold_rows, fold_columns, rows, columns
    )
    return codes if rows else None, codes_t if columns else None, scales


def scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype) -> torch.Tensor:
    """:func:`~halo_tensor.ops.reference.scaled_mm` on the fastest unit that the device has."""
    return torch.ops.halo.scaled_mm(a, b_t, a_scale, b_scale, bias, _encode(left), _encode(right), shape, dtype)


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None) -> torch.Tensor:
    """Rᵀ_left x R_right, zero-padded to whole blocks, in the dtype of ``x``."""
    return torch.ops.halo.rotate(x, _encode(left), _encode(right))


def unrotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape) -> torch.Tensor:
    """The inverse of :func:`rotate`, of the given ``shape``, in the dtype of ``x``."""
    return torch.ops.halo.unrotate(x, _encode(left), _encode(right), shape)


def _rotate_quantize(x, left, right, format, scale, fold_rows, fold_columns, rows, columns):
    codes, scales = reference.rotate_quantize(
        x, _decode(left), _decode(right), FORMATS[format], scale, fold_rows, fold_columns
    )
    codes, nothing = codes.contiguous(), codes.new_empty(0)
    if codes.device.type != "cpu":
        return codes if rows else nothing, codes.t().contiguous() if columns else nothing, scales
    transposed = (codes.clone() if rows else codes).t()  # outputs of an op may not share memory
    return codes if rows else nothing, transposed if columns else nothing, scales


def _scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype):
    return reference.scaled_mm(a, b_t, a_scale, b_scale, bias, _decode(left), _decode(right), shape, dtype).contiguous()


def _rotate(x, left, right):
    return reference.rotate(x, _decode(left), _decode(right)).to(x.dtype, copy=True).contiguous()


def _unrotate(x, left, right, shape):
    return reference.unrotate(x, _decode(left), _decode(right), shape).to(x.dtype, copy=True).contiguous()


for _op in (_rotate_quantize, _scaled_mm, _rotate, _unrotate):
    _library.impl(_op.__name__[1:], _op, "CompositeExplicitAutograd")


@torch.library.register_fake("halo::rotate_quantize", lib=_library)
def _(x, left, right, format, scale, fold_rows, fold_columns, rows, columns):
    r, c = reference.padded(x.shape[0], _decode(left)), reference.padded(x.shape[1], _decode(right))
    b = reference.BLOCK
    scale_shape = {"row": [r], "column": [c], "block": [-(-r // b), -(-c // b)]}.get(scale, [])
    dtype = code_dtype(FORMATS[format])
    codes = x.new_empty([r, c] if rows else [0], dtype=dtype)
    nothing = x.new_empty([0], dtype=dtype)
    transposed = x.new_empty([r, c], dtype=dtype).t() if x.device.type == "cpu" else x.new_empty([c, r], dtype=dtype)
    return codes, transposed if columns else nothing, x.new_empty(scale_shape, dtype=torch.float32)


@torch.library.register_fake("halo::scaled_mm", lib=_library)
def _(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype):
    torch._check(a.shape[1] == b_t.shape[1], lambda: f"scaled_mm: {list(a.shape)} with {list(b_t.shape)} transposed")
    return a.new_empty(shape, dtype=dtype)


@torch.library.register_fake("halo::rotate", lib=_library)
def _(x, left, right):
    return x.new_empty(reference.padded(x.shape[0], _decode(left)), reference.padded(x.shape[1], _decode(right)))


@torch.library.register_fake("halo::unrotate", lib=_library)
def _(x, left, right, shape):
    return x.new_empty(shape)


__all__ = ["fit", "rotate", "rotate_quantize", "scaled_mm", "unrotate"]
