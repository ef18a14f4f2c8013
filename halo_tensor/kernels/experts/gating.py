"""The gate between the two products of an expert and its derivative, as functions of quantisers.

:class:`halo_tensor.recipe.Gate` has the formula. All compute in float32.
"""

import triton
import triton.language as tl

from halo_tensor.kernels.quantize.fast_math import fast_exp, reciprocal


@triton.jit
def load_halves(h, row, first, F, inside, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load gate and up of h [·, 2F], WIDTH columns of each from column ``first`` on, in float32.

    row: int64 [R, 1], the start of each row in elements. inside: the mask [R, WIDTH].
    """
    column = first + tl.arange(0, WIDTH)[None, :]
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
        # The mask of both halves: rows are inside or not, and columns up to 2F.
        rows = tl.max(inside.to(tl.int32), 1)[:, None] > 0
        x = tl.load(h + row + both, mask=rows & (both < 2 * F), other=0.0)
        gate, up = tl.split(tl.reshape(x, (inside.shape[0], WIDTH, 2)))
    else:
        gate = tl.load(h + row + column, mask=inside, other=0.0)
        up = tl.load(h + row + F + column, mask=inside, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_halves(x, row, first, gate, up, F, inside, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store gate and up where :func:`load_halves` would load them from x [·, 2F]."""
    column = first + tl.arange(0, WIDTH)[None, :]
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
        rows = tl.max(inside.to(tl.int32), 1)[:, None] > 0
        tl.store(x + row + both, tl.interleave(gate, up).to(x.dtype.element_ty), mask=rows & (both < 2 * F))
    else:
        tl.store(x + row + column, gate.to(x.dtype.element_ty), mask=inside)
        tl.store(x + row + F + column, up.to(x.dtype.element_ty), mask=inside)


@triton.jit
def gated(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """Return (up + SHIFT) · gate · sigmoid(ALPHA · gate). LIMIT: 0 clamps nothing."""
    if LIMIT > 0:
        gate, up = _clamped(gate, up, LIMIT)
    s = reciprocal(1.0 + fast_exp(-ALPHA * gate))
    return (up + SHIFT) * (gate * s)


@triton.jit
def gated_backward(gate, up, grad, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """Return the gradients of gate and of up, for one of 1 at the result times ``grad``, and the result."""
    in_gate, in_up = gate, up
    if LIMIT > 0:
        gate, up = _clamped(gate, up, LIMIT)
    s = reciprocal(1.0 + fast_exp(-ALPHA * gate))
    glu = gate * s
    d_gate = grad * (up + SHIFT) * (s * (1.0 + ALPHA * gate * (1.0 - s)))
    d_up = grad * glu
    if LIMIT > 0:
        # A NaN passes: it compares false.
        d_gate = tl.where(in_gate > LIMIT, 0.0, d_gate)
        d_up = tl.where(tl.abs(in_up) > LIMIT, 0.0, d_up)
    return d_gate, d_up, (up + SHIFT) * glu


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr):
    # Comparisons keep a NaN.
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up
