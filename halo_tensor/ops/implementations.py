"""What the ops do: on any device the reference, on a GPU the kernels, under tracing nothing."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from halo_tensor.kernels.device import INTERPRETED, runs_kernels
from halo_tensor.ops.schemas import decode, library
from halo_tensor.recipe import FORMATS, Scales
from halo_tensor.reference import codes as formats
from halo_tensor.reference import ops as reference
from halo_tensor.reference import packing
from halo_tensor.reference.codes import code_dtype

# On any device: the reference.


def _rotate_quantize(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None, gain=None):
    assert seed is None, "the reference rounds by noise, not by a seed: see library.rotate_quantize"
    codes, scales = reference.rotate_quantize(
        x, decode(left), decode(right), FORMATS[format], scale, fold_rows, fold_columns, gain=gain
    )
    codes, nothing = codes.contiguous(), codes.new_empty(0)
    if runs_kernels(x.device):
        return codes if rows else nothing, codes.t().contiguous() if columns else nothing, scales
    transposed = (codes.clone() if rows else codes).t()  # outputs of an op may not share memory
    return codes if rows else nothing, transposed if columns else nothing, scales


def _rotate_quantize_(x, left, right, format, scale, codes, scales, gain=None):
    new_codes, new_scales = reference.rotate_quantize(x, decode(left), decode(right), FORMATS[format], scale, gain=gain)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def _requantize_(xs, left, right, format, scale, codes, scales, gains):
    for x, code, scale_of_x, gain in zip(xs, codes, scales, gains or [None] * len(xs), strict=True):
        _rotate_quantize_(x, left, right, format, scale, code, scale_of_x, gain)


def _quantize_pair(x, left, format, fold_columns, fold_rows):
    codes, _, row_scales = _rotate_quantize(x, left, [], format, "row", None, fold_columns, True, False)
    _, codes_t, column_scales = _rotate_quantize(x, [], [], format, "column", fold_rows, None, False, True)
    return codes, codes_t, row_scales, column_scales


def _quantize_pairs(a, b, format, columns_a, rows_a, columns_b, rows_b):
    return (*_quantize_pair(a, [], format, columns_a, rows_a), *_quantize_pair(b, [], format, columns_b, rows_b))


def _scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype, gain=None):
    return reference.scaled_mm(a, b_t, a_scale, b_scale, bias, decode(left), decode(right), shape, dtype, gain).contiguous()


def _rotate(x, left, right):
    return reference.rotate(x, decode(left), decode(right)).to(x.dtype, copy=True).contiguous()


def _unrotate(x, left, right, shape):
    return reference.unrotate(x, decode(left), decode(right), shape).to(x.dtype, copy=True).contiguous()


def _pack_rows_(codes, format, packed):
    packed.copy_(packing.pack_rows(codes, FORMATS[format]))


def _unpack_rows(packed, format):
    return packing.unpack_rows(packed, FORMATS[format])


for _op in (
    _rotate_quantize, _rotate_quantize_, _requantize_, _quantize_pair, _quantize_pairs, _scaled_mm, _rotate, _unrotate,
    _pack_rows_, _unpack_rows,
):  # fmt: skip
    library.impl(_op.__name__[1:], _op, "CompositeExplicitAutograd")


# On a GPU: the kernels. Triton is imported when the first of them runs.


def _rotate_quantize_cuda(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None, gain=None):
    from halo_tensor.kernels.quantize import plan as launch

    if Scales.of(scale).is_blocked:  # no kernel
        return _rotate_quantize(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, None, gain)
    codes, codes_t, scales = launch.rotate_quantize(
        x, decode(left), decode(right), FORMATS[format], scale, fold_rows, fold_columns, rows, columns, None, seed, gain
    )
    dtype = code_dtype(FORMATS[format])
    codes, codes_t = (scales.new_empty(0, dtype=dtype) if c is None else c for c in (codes, codes_t))
    return codes, codes_t, scales


def _rotate_quantize__cuda(x, left, right, format, scale, codes, scales, gain=None):
    from halo_tensor.kernels.quantize import plan as launch

    if Scales.of(scale).is_blocked:  # no kernel
        return _rotate_quantize_(x, left, right, format, scale, codes, scales, gain)
    rotations, into = (decode(left), decode(right)), (codes, scales)
    launch.rotate_quantize(x, *rotations, FORMATS[format], scale, None, None, True, False, into, gain=gain)


def _requantize__cuda(xs, left, right, format, scale, *operands):
    from halo_tensor.kernels.quantize import many as launch

    if Scales.of(scale).is_blocked:  # no kernel
        return _requantize_(xs, left, right, format, scale, *operands)
    launch.requantize_(xs, decode(left), decode(right), FORMATS[format], scale, *operands)


def _quantize_pair_cuda(x, left, format, fold_columns, fold_rows):
    from halo_tensor.kernels.quantize import plan as launch

    return launch.quantize_pair(x, decode(left), FORMATS[format], fold_columns, fold_rows)


def _quantize_pairs_cuda(a, b, format, *folds):
    from halo_tensor.kernels.quantize import two_gradients as launch

    return launch.quantize_pairs(a, b, FORMATS[format], *folds)


def _scaled_mm_cuda(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype, gain=None):
    from halo_tensor.kernels.matmul import plan as launch

    if a_scale is not None and a_scale.ndim == 2:
        return _scaled_mm(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype, gain)
    return launch.scaled_mm(a, b_t, a_scale, b_scale, bias, decode(left), decode(right), shape, dtype, gain)


def _rotate_cuda(x, left, right):
    from halo_tensor.kernels import rotate as launch

    return launch.rotate(x, decode(left), decode(right), x.dtype)


def _unrotate_cuda(x, left, right, shape):
    from halo_tensor.kernels import rotate as launch

    return launch.unrotate(x, decode(left), decode(right), shape, x.dtype)


def _pack_rows__cuda(codes, format, packed):
    from halo_tensor.kernels.quantize import packing as packing_kernels

    packing_kernels.pack_rows_(codes, FORMATS[format], packed)


def _unpack_rows_cuda(packed, format):
    from halo_tensor.kernels.quantize import packing as packing_kernels

    return packing_kernels.unpack_rows(packed, FORMATS[format])


for _op in (
    _rotate_quantize_cuda, _rotate_quantize__cuda, _requantize__cuda, _quantize_pair_cuda, _quantize_pairs_cuda,
    _scaled_mm_cuda, _rotate_cuda, _unrotate_cuda, _pack_rows__cuda, _unpack_rows_cuda,
):  # fmt: skip
    for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        library.impl(_op.__name__[1:].removesuffix("_cuda"), _op, _key)


# Under tracing: shapes, dtypes and strides.


#: Called with the device of an op whenever one is traced. :mod:`halo_tensor.compiler` adds what prepares a compiler.
WHEN_TRACED: list[Callable[[torch.device], None]] = []


def _register_fake(op: str):
    def register(function):
        def fake(x, *args):
            for prepare in WHEN_TRACED:
                prepare((x if isinstance(x, torch.Tensor) else x[0]).device)
            return function(x, *args)

        torch.library.register_fake(f"halo::{op}", fake, lib=library)
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
def _(x, left, right, format, scale, fold_rows, fold_columns, rows, columns, seed=None, gain=None):
    r, c = reference.rotated(x.shape[0], decode(left)), reference.rotated(x.shape[1], decode(right))
    granularity = Scales.of(scale)
    pad = not granularity.is_blocked
    nothing = x.new_empty([0], dtype=code_dtype(FORMATS[format]))
    return (
        _code_matrix(x, r, c, format, pad=pad) if rows else nothing,
        _code_matrix(x, c, r, format, transposed=True, pad=pad) if columns else nothing,
        x.new_empty(granularity.shape(r, c), dtype=torch.float32),
    )


@_register_fake("rotate_quantize_")
@_register_fake("requantize_")
@_register_fake("pack_rows_")
def _(*args):
    """They write to their arguments."""


@_register_fake("quantize_pair")
def _fake_pair(x, left, format, fold_columns, fold_rows):
    (r, c), r_padded = x.shape, reference.rotated(x.shape[0], decode(left))
    return (
        _code_matrix(x, r_padded, c, format),
        _code_matrix(x, c, r, format, transposed=True),
        x.new_empty([r_padded], dtype=torch.float32),
        x.new_empty([c], dtype=torch.float32),
    )


@_register_fake("quantize_pairs")
def _(a, b, format, columns_a, rows_a, columns_b, rows_b):
    return (*_fake_pair(a, [], format, columns_a, rows_a), *_fake_pair(b, [], format, columns_b, rows_b))


@_register_fake("scaled_mm")
def _(a, b_t, a_scale, b_scale, bias, left, right, shape, dtype, gain=None):
    torch._check(a.shape[1] == b_t.shape[1], lambda: f"scaled_mm: {list(a.shape)} with {list(b_t.shape)} transposed")
    return a.new_empty(shape, dtype=dtype)


@_register_fake("rotate")
def _(x, left, right):
    return x.new_empty(reference.rotated(x.shape[0], decode(left)), reference.rotated(x.shape[1], decode(right)))


@_register_fake("unrotate")
def _(x, left, right, shape):
    return x.new_empty(shape)


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


torch.library.register_autograd("halo::rotate", _unrotate_gradient, setup_context=_remember, lib=library)
torch.library.register_autograd("halo::unrotate", _rotate_gradient, setup_context=_remember, lib=library)


@register_flop_formula(torch.ops.halo.scaled_mm)
def _flops(a_shape, b_t_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations per multiply-accumulate, as for aten.mm; undoing a rotation is not counted."""
    return 2 * a_shape[0] * b_t_shape[0] * a_shape[1]
