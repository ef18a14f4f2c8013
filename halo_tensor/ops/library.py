"""The ops as ``torch.ops.halo.*``: opaque to the compiler, functional, with fake implementations.

A rotation crosses the dispatcher as an ``int[]``: empty for none, else [block, seed], with seed −1 for no signs, or
[block, seed, rank]. The
functions of this module are the typed face of the ops; nothing else calls ``torch.ops.halo``.

A GPU runs the Triton kernels; every other device runs the reference, and so do block scales, which exist for comparison.
"""

import os
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch.utils.flop_counter import register_flop_formula

from halo_tensor.ops import formats, packing, reference
from halo_tensor.ops.formats import code_dtype
from halo_tensor.recipe import FORMATS, Format, Rotation

_library = torch.library.Library("halo", "DEF")
#: Triton's interpreter runs the kernels on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
for _schema in (
    "rotate_quantize(Tensor x, int[] left, int[] right, str format, str scale, Tensor? fold_rows, Tensor? fold_columns, "
    "bool rows, bool columns, Tensor? seed) -> (Tensor codes, Tensor codes_t, Tensor scales)",
    "rotate_quantize_(Tensor x, int[] left, int[] right, str format, str scale, Tensor(a!) codes, Tensor(b!) scales) -> ()",
    "quantize_pair(Tensor x, int[] left, str format, Tensor? fold_columns, Tensor? fold_rows) "
    "-> (Tensor codes, Tensor codes_t, Tensor row_scales, Tensor column_scales)",
    "scaled_mm(Tensor a, Tensor b_t, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int[] left, int[] right, "
    "SymInt[] shape, ScalarType dtype) -> Tensor",
    "rotate(Tensor x, int[] left, int[] right) -> Tensor",
    "unrotate(Tensor x, int[] left, int[] right, SymInt[] shape) -> Tensor",
    "pack_rows(Tensor codes, str format) -> Tensor",
    "unpack_rows(Tensor packed, str format) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.needs_exact_strides,))


def runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


@cache
def fingerprint() -> str:
    """Of the sources of the ops: what was compiled with others must not be taken from a cache."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _encode(rotation: Rotation | None) -> list[int]:
    if rotation is None:
        return []
    code = [rotation.edge, -1 if rotation.seed is None else rotation.seed]
    return code if rotation.rank is None else [*code, rotation.rank]


def _decode(code: list[int]) -> Rotation | None:
    return Rotation(code[0], None if code[1] < 0 else code[1], *code[2:]) if code else None


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
    rounding: str = "nearest",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """:func:`~halo_tensor.ops.reference.rotate_quantize` with a choice of layouts: the codes [r, c] if ``rows``, their
    transpose [c, r] if ``columns``, else None in their place; then the scales. On a GPU rows of codes begin at
    multiples of 16 bytes; a CPU's products read either order at the same speed: there the transpose is a view of row-major
    memory. Stochastic rounding draws from torch's generator of x's device: on a GPU the kernels' seed, elsewhere all the
    noise, and the codes are contiguous there."""
    seed = None
    if rounding == "stochastic":
        if scale == "block" or not runs_kernels(x.device):
            return _round_stochastically(x, left, right, format, scale, fold_rows, fold_columns, rows, columns)
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    codes, codes_t, scales = torch.ops.halo.rotate_quantize(
        x, _encode(left), _encode(right), format.name, scale, fold_rows, fold_columns, rows, columns, seed
    )
    return codes if rows else None, codes_t if columns else None, scales


def _round_stochastically(x, left, right, format, scale, fold_rows, fold_columns, rows, columns):
    """In PyTorch's ops, so that a compiler sees the noise, draws it where it is used, and never stores it."""
    # In float32, as the op: rounded to x's dtype before it is rounded up or down, the mean would not be exact.
    y = x if left is None and right is None else rotate(x.to(torch.float32), left, right)
    noise = torch.rand(y.shape, dtype=torch.float32, device=y.device)
    codes, scales = reference.rotate_quantize(y, None, None, format, scale, fold_rows, fold_columns, noise)
    return codes.contiguous() if rows else None, codes.t().contiguous() if columns else None, scales


def rotate_quantize_(
    x: torch.Tensor,
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    scale: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """:func:`rotate_quantize` again, in place of the row-major codes and the scales that it gave for a matrix like x."""
    torch.ops.halo.rotate_quantize_(x, _encode(left), _encode(right), format.name, scale, codes, scales)


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
    return torch.ops.halo.quantize_pair(x, _encode(left), format.name, fold_columns, fold_rows)


def scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype) -> torch.Tensor:
    """:func:`~halo_tensor.ops.reference.scaled_mm` on the fastest unit that the device has.

    Raises RuntimeError, naming the device and what it can run, if it has none.
    """
    return torch.ops.halo.scaled_mm(a, b_t, a_scale, b_scale, bias, _encode(left), _encode(right), shape, dtype)


def rotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None) -> torch.Tensor:
    """Rᵀ_left x R_right, zero-padded to whole blocks, in the dtype of ``x``."""
    return torch.ops.halo.rotate(x, _encode(left), _encode(right))


def unrotate(x: torch.Tensor, left: Rotation | None, right: Rotation | None, shape) -> torch.Tensor:
    """The inverse of :func:`rotate`, of the given ``shape``, in the dtype of ``x``."""
    return torch.ops.halo.unrotate(x, _encode(left), _encode(right), shape)


def pack_rows(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """:func:`~halo_tensor.ops.packing.pack_rows` as one op, for code that is not compiled; in a graph, what is written in
    pointwise ops can be fused, and repeated instead of saved."""
    return torch.ops.halo.pack_rows(codes, format.name)


def unpack_rows(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """The inverse of :func:`pack_rows`, likewise."""
    return torch.ops.halo.unpack_rows(packed, format.name)


# On any device: the reference.


def _rotate_quantize(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None):
    codes, scales = reference.rotate_quantize(
        x, _decode(left), _decode(right), FORMATS[format], scale, fold_rows, fold_columns
    )
    codes, nothing = codes.contiguous(), codes.new_empty(0)
    if runs_kernels(x.device):
        return codes if rows else nothing, codes.t().contiguous() if columns else nothing, scales
    transposed = (codes.clone() if rows else codes).t()  # outputs of an op may not share memory
    return codes if rows else nothing, transposed if columns else nothing, scales


def _rotate_quantize_(x, left, right, format, scale, codes, scales):
    new_codes, new_scales = reference.rotate_quantize(x, _decode(left), _decode(right), FORMATS[format], scale)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def _quantize_pair(x, left, format, fold_columns, fold_rows):
    codes, _, row_scales = _rotate_quantize(x, left, [], format, "row", None, fold_columns, True, False)
    _, codes_t, column_scales = _rotate_quantize(x, [], [], format, "column", fold_rows, None, False, True)
    return codes, codes_t, row_scales, column_scales


def _scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype):
    return reference.scaled_mm(a, b_t, a_scale, b_scale, bias, _decode(left), _decode(right), shape, dtype).contiguous()


def _rotate(x, left, right):
    return reference.rotate(x, _decode(left), _decode(right)).to(x.dtype, copy=True).contiguous()


def _unrotate(x, left, right, shape):
    return reference.unrotate(x, _decode(left), _decode(right), shape).to(x.dtype, copy=True).contiguous()


def _pack_rows(codes, format):
    return packing.pack_rows(codes, FORMATS[format])


def _unpack_rows(packed, format):
    return packing.unpack_rows(packed, FORMATS[format])


for _op in (_rotate_quantize, _rotate_quantize_, _quantize_pair, _scaled_mm, _rotate, _unrotate, _pack_rows, _unpack_rows):
    _library.impl(_op.__name__[1:], _op, "CompositeExplicitAutograd")


# On a GPU: the kernels. Triton is imported when the first of them runs.


def _rotate_quantize_cuda(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None):
    from halo_tensor.ops import rotate_quantize as launch

    if scale == "block":
        return _rotate_quantize(x, left, right, format, scale, fold_rows, fold_columns, rows, columns)
    codes, codes_t, scales = launch.rotate_quantize(
        x, _decode(left), _decode(right), FORMATS[format], scale, fold_rows, fold_columns, rows, columns, None, seed
    )
    dtype = code_dtype(FORMATS[format])
    codes, codes_t = (scales.new_empty(0, dtype=dtype) if c is None else c for c in (codes, codes_t))
    return codes, codes_t, scales


def _rotate_quantize__cuda(x, left, right, format, scale, codes, scales):
    from halo_tensor.ops import rotate_quantize as launch

    if scale == "block":
        return _rotate_quantize_(x, left, right, format, scale, codes, scales)
    into = codes, scales
    launch.rotate_quantize(x, _decode(left), _decode(right), FORMATS[format], scale, None, None, True, False, into)


def _quantize_pair_cuda(x, left, format, fold_columns, fold_rows):
    from halo_tensor.ops import rotate_quantize as launch

    return launch.quantize_pair(x, _decode(left), FORMATS[format], fold_columns, fold_rows)


def _scaled_mm_cuda(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype):
    from halo_tensor.ops import scaled_mm as launch

    if a_scale is not None and a_scale.ndim == 2:
        return _scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype)
    return launch.scaled_mm(a, b_t, a_scale, b_scale, bias, _decode(left), _decode(right), shape, dtype)


def _rotate_cuda(x, left, right):
    from halo_tensor.ops import rotate as launch

    return launch.rotate(x, _decode(left), _decode(right), x.dtype)


def _unrotate_cuda(x, left, right, shape):
    from halo_tensor.ops import rotate as launch

    return launch.unrotate(x, _decode(left), _decode(right), shape, x.dtype)


def _pack_rows_cuda(codes, format):
    from halo_tensor.ops import packing_kernels

    return packing_kernels.pack_rows(codes, FORMATS[format])


def _unpack_rows_cuda(packed, format):
    from halo_tensor.ops import packing_kernels

    return packing_kernels.unpack_rows(packed, FORMATS[format])


for _op in (
    _rotate_quantize_cuda, _rotate_quantize__cuda, _quantize_pair_cuda, _scaled_mm_cuda, _rotate_cuda, _unrotate_cuda,
    _pack_rows_cuda, _unpack_rows_cuda,
):  # fmt: skip
    for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _library.impl(_op.__name__[1:].removesuffix("_cuda"), _op, _key)


# Under tracing: shapes, dtypes and strides.


def _teach_inductor() -> None:
    """Import what lowers the ops. Not before something is traced: importing Inductor takes seconds."""
    from halo_tensor.ops import inductor

    inductor.tag_caches()


def _register_fake(op: str):
    def register(function):
        def fake(x, *args):
            if runs_kernels(x.device):
                _teach_inductor()
            return function(x, *args)

        torch.library.register_fake(f"halo::{op}", fake, lib=_library)
        return function

    return register


def _code_matrix(x, rows, columns, format, transposed=False, pad=True):
    """What an op returns for codes [rows, columns]."""
    dtype = code_dtype(FORMATS[format])
    if not runs_kernels(x.device):
        return x.new_empty([columns, rows], dtype=dtype).t() if transposed else x.new_empty([rows, columns], dtype=dtype)
    stride = formats.aligned(columns) if pad else columns
    return x.new_empty_strided([rows, columns], [stride, 1], dtype=dtype)


@_register_fake("rotate_quantize")
def _(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None):
    r, c = reference.rotated(x.shape[0], _decode(left)), reference.rotated(x.shape[1], _decode(right))
    b, pad = reference.BLOCK, scale != "block"
    scale_shape = {"row": [r], "column": [c], "block": [-(-r // b), -(-c // b)]}.get(scale, [])
    nothing = x.new_empty([0], dtype=code_dtype(FORMATS[format]))
    return (
        _code_matrix(x, r, c, format, pad=pad) if rows else nothing,
        _code_matrix(x, c, r, format, transposed=True, pad=pad) if columns else nothing,
        x.new_empty(scale_shape, dtype=torch.float32),
    )


@_register_fake("rotate_quantize_")
def _(x, left, right, format, scale, codes, scales):
    return None


@_register_fake("quantize_pair")
def _(x, left, format, fold_columns, fold_rows):
    (r, c), r_padded = x.shape, reference.rotated(x.shape[0], _decode(left))
    return (
        _code_matrix(x, r_padded, c, format),
        _code_matrix(x, c, r, format, transposed=True),
        x.new_empty([r_padded], dtype=torch.float32),
        x.new_empty([c], dtype=torch.float32),
    )


@_register_fake("scaled_mm")
def _(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype):
    torch._check(a.shape[1] == b_t.shape[1], lambda: f"scaled_mm: {list(a.shape)} with {list(b_t.shape)} transposed")
    return a.new_empty(shape, dtype=dtype)


@_register_fake("rotate")
def _(x, left, right):
    return x.new_empty(reference.rotated(x.shape[0], _decode(left)), reference.rotated(x.shape[1], _decode(right)))


@_register_fake("unrotate")
def _(x, left, right, shape):
    return x.new_empty(shape)


@_register_fake("pack_rows")
def _(codes, format):
    return codes.new_empty([codes.shape[0], codes.shape[1] // 4 * 3], dtype=torch.uint8)


@_register_fake("unpack_rows")
def _(packed, format):
    return packed.new_empty([packed.shape[0], packed.shape[1] // 3 * 4], dtype=torch.float8_e4m3fn)


# Rotations are linear, so these two have gradients: each is, up to padding, the other's transpose.


def _remember(ctx, inputs, output):
    ctx.left, ctx.right = inputs[1:3]
    ctx.shape = inputs[0].shape


def _unrotate_gradient(ctx, gradient):
    return torch.ops.halo.unrotate(gradient, ctx.left, ctx.right, ctx.shape), None, None


def _rotate_gradient(ctx, gradient):
    return torch.ops.halo.rotate(gradient, ctx.left, ctx.right), None, None, None


torch.library.register_autograd("halo::rotate", _unrotate_gradient, setup_context=_remember, lib=_library)
torch.library.register_autograd("halo::unrotate", _rotate_gradient, setup_context=_remember, lib=_library)


@register_flop_formula(torch.ops.halo.scaled_mm)
def _flops(a_shape, b_t_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-accumulate, as for aten.mm; undoing a rotation is not counted."""
    return 2 * a_shape[0] * b_t_shape[0] * a_shape[1]
