"""Triton kernels that quantise rows of experts with a scale each."""

import triton
import triton.language as tl

from halo_tensor.kernels.experts.gating import gated, gated_backward, load_halves, store_halves
from halo_tensor.kernels.experts.rows import load_tile
from halo_tensor.kernels.quantize.kernels import load_vector, product
from halo_tensor.kernels.quantize.rounding import FOLD_LIFT, maximum, round_to_code, scale_from, unlifted


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def group_rows(
    x, index, fold, tiles, codes, scales, stride_row, C,
    INDEXED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    T: tl.constexpr, CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    INVERSE_MAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Quantise STEPS times ROWS rows of a tile, times fold [experts, C], as CHUNKS pieces of WIDTH columns.

    With more than one piece, a row is read twice, the second time from a cache.
    """
    PARTS: tl.constexpr = T // (ROWS * STEPS)
    expert, first, end = load_tile(tiles, tl.program_id(0) // PARTS)
    first += (tl.program_id(0) % PARTS) * (ROWS * STEPS)
    if expert >= 0 and first < end:
        fold += expert.to(tl.int64) * C
        column = tl.arange(0, WIDTH)
        if CHUNKS == 1:
            by_column = load_vector(fold, column, C) * FOLD_LIFT
        for step in range(STEPS):
            row = first + step * ROWS + tl.arange(0, ROWS)
            at = row
            if INDEXED:
                at = tl.load(index + row, mask=row < end, other=0)
            source = x + at.to(tl.int64)[:, None] * stride_row
            amax = tl.zeros((ROWS,), tl.float32)
            if CHUNKS == 1:
                inside = (row < end)[:, None] & (column < C)[None, :]
                y = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32) * by_column[None, :]
                amax = tl.reduce(tl.abs(y), 1, maximum)
            else:
                for chunk in range(CHUNKS):
                    columns = chunk * WIDTH + column
                    inside = (row < end)[:, None] & (columns < C)[None, :]
                    y = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                    y = y * (load_vector(fold, columns, C) * FOLD_LIFT)[None, :]
                    amax = maximum(amax, tl.reduce(tl.abs(y), 1, maximum))
            scale = scale_from(amax, INVERSE_MAX)
            inverse = _inverse(scale)
            target = codes + row.to(tl.int64)[:, None] * C
            if CHUNKS == 1:
                q = round_to_code(y * inverse[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
                tl.store(target + column[None, :], q, mask=inside)
            else:
                for chunk in range(CHUNKS):
                    columns = chunk * WIDTH + column
                    inside = (row < end)[:, None] & (columns < C)[None, :]
                    y = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                    y = y * (load_vector(fold, columns, C) * FOLD_LIFT)[None, :]
                    q = round_to_code(y * inverse[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
                    tl.store(target + columns[None, :], q, mask=inside)
            tl.store(scales + row, unlifted(scale, STEP, True), mask=row < end)


@triton.jit(do_not_specialize=["M"])
def gated_rows(
    h, gain, codes, scales, matrix, M, F,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, GAIN: tl.constexpr, ROTATE: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    INVERSE_MAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS rows of the gate of h [M, 2F], each as CHUNKS pieces of WIDTH columns.

    ROTATE: pieces are multiplied with matrix [WIDTH, WIDTH] from the right.
    """
    piece = tl.arange(0, ROWS * CHUNKS)
    row = tl.program_id(0) * ROWS + piece // CHUNKS
    first = (piece % CHUNKS)[:, None] * WIDTH
    inner = tl.arange(0, WIDTH)
    columns = first + inner[None, :]
    inside = (row < M)[:, None] & (columns < F)
    at_row = row.to(tl.int64)[:, None]
    gate, up = load_halves(h, at_row * 2 * F, first, F, inside, WIDTH, INTERLEAVED)
    y = tl.where(inside, gated(gate, up, ALPHA, LIMIT, SHIFT), 0.0).to(h.dtype.element_ty)
    if GAIN:
        y = (y.to(tl.float32) * load_vector(gain, columns, F)).to(h.dtype.element_ty)
    if ROTATE:
        turn = tl.load(matrix + inner[:, None] * WIDTH + inner[None, :])
        y = product(y if h.dtype.element_ty == tl.float32 else y.to(turn.dtype), turn)
        y = y.to(tl.float32) * NORM
    y = y.to(tl.float32)
    amax = tl.reduce(tl.abs(y), 1, maximum)
    amax = tl.reduce(tl.reshape(amax, (ROWS, CHUNKS)), 1, maximum)
    scale = scale_from(amax, INVERSE_MAX)
    inverse = _inverse(scale)
    inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, CHUNKS)), (ROWS * CHUNKS,))
    q = round_to_code(y * inverse[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
    tl.store(codes + at_row * F + columns, q, mask=inside)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(scales + rows, unlifted(scale, STEP, False), mask=rows < M)


@triton.jit
def _load_gradients(
    h, grad, row, first, by_row, F, inside,
    WIDTH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return the gradients of gate and up, and the sums of grad times the gate's result, of WIDTH columns."""
    gate, up = load_halves(h, row * 2 * F, first, F, inside, WIDTH, INTERLEAVED)
    g = tl.load(grad + row * F + first + tl.arange(0, WIDTH)[None, :], mask=inside, other=0.0).to(tl.float32)
    d_gate, d_up, result = gated_backward(gate, up, g * by_row[:, None], ALPHA, LIMIT, SHIFT)
    return tl.where(inside, d_gate, 0.0), tl.where(inside, d_up, 0.0), tl.sum(g * result, 1)


@triton.jit
def _folded(fold, first, d_gate, d_up, F, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return both gradients times fold [2F]."""
    column = first + tl.arange(0, WIDTH)
    if INTERLEAVED:
        both = tl.load(fold + 2 * first + tl.arange(0, 2 * WIDTH), mask=2 * first + tl.arange(0, 2 * WIDTH) < 2 * F, other=0.0)
        fold_gate, fold_up = tl.split(tl.reshape(both, (WIDTH, 2)))
    else:
        fold_gate = load_vector(fold, column, F)
        fold_up = load_vector(fold + F, column, F)
    return d_gate * (fold_gate * FOLD_LIFT)[None, :], d_up * (fold_up * FOLD_LIFT)[None, :]


@triton.jit
def _store_gradients(
    codes, row, first, d_gate, d_up, inverse, F, inside, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        y = tl.interleave(d_gate, d_up) * inverse[:, None]
        q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
        both = 2 * first + tl.arange(0, 2 * WIDTH)
        rows = tl.max(inside.to(tl.int32), 1) > 0
        tl.store(codes + row * 2 * F + both[None, :], q, mask=rows[:, None] & (both < 2 * F)[None, :])
    else:
        column = first + tl.arange(0, WIDTH)
        target = codes + row * 2 * F + column[None, :]
        tl.store(target, round_to_code(d_gate * inverse[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP), mask=inside)
        tl.store(target + F, round_to_code(d_up * inverse[:, None], CODE, MANTISSA, MIN_EXPONENT, MAX, STEP), mask=inside)


@triton.jit
def gated_grad_rows(
    h, grad, weight, fold, tiles, codes, scales, dots, grad_h, F,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, KEPT: tl.constexpr, T: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, INTERLEAVED: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    INVERSE_MAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Quantise the gradient of h [·, 2F] in STEPS times ROWS rows of a tile, times fold [experts, 2F].

    dots gets the sums of grad times the gate's result, and 0 for rows of no expert.
    HELD: registers hold all pieces of a row, from the search for its magnitude on. Otherwise they are computed again.
    KEPT: grad_h [·, 2F] gets the gradient, before it is folded.
    """
    PARTS: tl.constexpr = T // (ROWS * STEPS)
    expert, first, end = load_tile(tiles, tl.program_id(0) // PARTS)
    first += (tl.program_id(0) % PARTS) * (ROWS * STEPS)
    if expert < 0:
        row = first + tl.arange(0, ROWS * STEPS)
        tl.store(dots + row, tl.zeros((ROWS * STEPS,), tl.float32), mask=row < end)
    elif first < end:
        fold += expert.to(tl.int64) * 2 * F
        for step in range(STEPS):
            row = first + step * ROWS + tl.arange(0, ROWS)
            at = row.to(tl.int64)[:, None]
            by_row = tl.full((ROWS,), 1.0, tl.float32)
            if WEIGHTED:
                by_row = tl.load(weight + row, mask=row < end, other=0.0)
            amax = tl.zeros((ROWS,), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            pieces = ()
            for chunk in tl.static_range(CHUNKS):
                first_column = chunk * WIDTH
                inside = (row < end)[:, None] & (first_column + tl.arange(0, WIDTH) < F)[None, :]
                d_gate, d_up, part = _load_gradients(
                    h, grad, at, first_column, by_row, F, inside, WIDTH, ALPHA, LIMIT, SHIFT, INTERLEAVED
                )
                total += part
                if KEPT:
                    store_halves(grad_h, at * 2 * F, first_column, d_gate, d_up, F, inside, WIDTH, INTERLEAVED)
                d_gate, d_up = _folded(fold, first_column, d_gate, d_up, F, WIDTH, INTERLEAVED)
                amax = maximum(amax, tl.reduce(maximum(tl.abs(d_gate), tl.abs(d_up)), 1, maximum))
                if HELD:
                    pieces += (d_gate, d_up)  # type: ignore[assignment]
            scale = scale_from(amax, INVERSE_MAX)
            inverse = _inverse(scale)
            for chunk in tl.static_range(CHUNKS):
                first_column = chunk * WIDTH
                inside = (row < end)[:, None] & (first_column + tl.arange(0, WIDTH) < F)[None, :]
                if HELD:
                    d_gate, d_up = pieces[2 * chunk], pieces[2 * chunk + 1]
                else:
                    d_gate, d_up, part = _load_gradients(
                        h, grad, at, first_column, by_row, F, inside, WIDTH, ALPHA, LIMIT, SHIFT, INTERLEAVED
                    )
                    d_gate, d_up = _folded(fold, first_column, d_gate, d_up, F, WIDTH, INTERLEAVED)
                _store_gradients(
                    codes, at, first_column, d_gate, d_up, inverse, F, inside, WIDTH, INTERLEAVED,
                    CODE, MANTISSA, MIN_EXPONENT, MAX, STEP,
                )  # fmt: skip
            tl.store(scales + row, unlifted(scale, STEP, True), mask=row < end)
            tl.store(dots + row, total, mask=row < end)
