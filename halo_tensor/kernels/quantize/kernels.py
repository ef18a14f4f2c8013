"""Triton kernels that rotate and quantise. :mod:`halo_tensor.kernels.quantize.plan` chooses among them.

All are limited by memory. There are three kinds:

* ``whole_rows``: a program holds whole rows, so that one read gives the scale and the codes of a row. It rotates by a product
  on tensor cores with ± a power of two, exact in any dtype. ``whole_rows_of_many`` serves many matrices in one launch.
* ``amax_tiles``, then ``cast_tiles``: two reads, for scales per column or per tensor, for rotations of rows, and for the two
  differently folded copies of a gradient that backward needs.
* ``transpose_codes``: for codes that are needed in both orders. No kernel stores a transposed copy from the result of a
  ``tl.dot``, or one fp8 code twice: Triton 3.6 silently miscompiles both on Hopper (docs/notes/quantisers.md). For the second,
  see https://github.com/triton-lang/triton/issues/11111: the cause is in ptxas 12.9, which Triton 3.8 has too.
"""

import triton
import triton.language as tl

from halo_tensor.kernels.quantize.rounding import (
    FOLD_LIFT,
    maximum,
    noise,
    noise_streams,
    packed_words,
    round_by,
    round_to_code,
    scale_from,
    unlifted,
)


@triton.jit
def product(a, b):
    """Return a b, where the elements of one matrix are 0 or ± a power of two, so that products are exact.

    If only the other matrix is float32, each of its elements is multiplied as a sum of three bf16 numbers. The result differs
    from a product in float32 by the order of the sum only.
    """
    if a.dtype == tl.float32 and b.dtype != tl.float32:
        high, middle, low = _three_parts(a)
        matrix = b.to(tl.bfloat16)
        y = tl.dot(low, matrix)
        y = tl.dot(middle, matrix, y)
        y = tl.dot(high, matrix, y)
    elif a.dtype != tl.float32 and b.dtype == tl.float32:
        high, middle, low = _three_parts(b)
        matrix = a.to(tl.bfloat16)
        y = tl.dot(matrix, low)
        y = tl.dot(matrix, middle, y)
        y = tl.dot(matrix, high, y)
    else:
        y = tl.dot(a, b)
    return y


@triton.jit
def _three_parts(x):
    """Return three bf16 matrices, of 8 bits each, whose sum is a float32 matrix. NaN and Inf give NaN."""
    high = x.to(tl.bfloat16)
    x = x - high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def load_vector(pointer, index, count):
    """Load elements of a vector, and zeros beyond ``count``."""
    return tl.load(pointer + index, mask=index < count, other=0.0)


@triton.jit
def _by_column(gain, columns, K, dtype: tl.constexpr):
    """Load a gain that multiplies numbers of ``dtype``: in bfloat16, which has all powers of two of float32, or in float32."""
    by_column = load_vector(gain, columns, K)
    return by_column.to(dtype) if dtype == tl.bfloat16 else by_column


@triton.jit(do_not_specialize=["M"])
def whole_rows(
    x, x1, x2, gain, fold, codes, scales, matrix, left_matrix, signs,
    M, K, stride_row, stride_column, stride_codes,
    ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    GAIN: tl.constexpr, ROTATE: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    NORM: tl.constexpr, INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, PRODUCER: tl.constexpr,
):  # fmt: skip
    """Quantise x [M, K] with a scale per row. A program takes STEPS times ROWS rows, each as CHUNKS pieces of WIDTH columns.

    GAIN: x is multiplied with gain [K] first. The result is rotated in the dtype of x, which is exact for powers of two.
    ROTATE: pieces are multiplied with matrix [WIDTH, WIDTH] from the right.
    FULL: the whole row (ROWS = 1) is multiplied with signs [K] before, and with left_matrix [CHUNKS, CHUNKS] from the left
    after; see hadamard.factors.
    PRODUCER: None, or a function that computes x from the tensors x, x1, x2; see halo_tensor/compiler/producers.py.
    """
    first = tl.program_id(0) * (ROWS * STEPS)
    _whole_rows(
        x, x1, x2, gain, fold, codes, scales, matrix, left_matrix, signs,
        first, M, K, stride_row, stride_column, stride_codes,
        ROWS, STEPS, CHUNKS, WIDTH, STAGES, GAIN, ROTATE, FULL, FOLD, CODE, MANTISSA, MIN_EXPONENT, MAX, NORM, INVERSE_MAX,
        STEP, PRODUCER, False,
    )  # fmt: skip


@triton.jit
def whole_rows_of_many(
    like, table, matrix, left_matrix, signs,
    COUNT, K, stride_row, stride_column, stride_codes,
    ENTRIES: tl.constexpr, PACK: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    GAIN: tl.constexpr, ROTATE: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    NORM: tl.constexpr, INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, PRODUCER: tl.constexpr,
):  # fmt: skip
    """Do :func:`whole_rows` for COUNT matrices [·, K] of the dtype of ``like`` in one launch.

    table: int64 [6, COUNT]. Its rows are the first program of each matrix, its number of rows, and the addresses of x, codes,
    scales and gain, at multiples of 16 bytes. ENTRIES: a power of two, at least COUNT.
    PACK: codes are of six bits, and are stored as halo_tensor.reference.packing packs them. K is a multiple of 16, and
    stride_codes one of 4.
    """
    program = tl.program_id(0)
    entry = tl.arange(0, ENTRIES)
    starts = tl.load(table + entry, mask=entry < COUNT, other=2**62)
    mine = table + tl.sum((starts <= program).to(tl.int32), 0) - 1
    first = (program - tl.load(mine).to(tl.int32)) * (ROWS * STEPS)
    rows = tl.load(mine + COUNT).to(tl.int32)
    x = tl.multiple_of(tl.load(mine + 2 * COUNT).to(tl.pointer_type(like.dtype.element_ty)), 16)
    codes = tl.multiple_of(tl.load(mine + 3 * COUNT).to(tl.pointer_type(tl.int32 if PACK else CODE)), 16)
    scales = tl.multiple_of(tl.load(mine + 4 * COUNT).to(tl.pointer_type(tl.float32)), 16)
    gain = tl.multiple_of(tl.load(mine + 5 * COUNT).to(tl.pointer_type(tl.float32)), 16)
    _whole_rows(
        x, x, x, gain, scales, codes, scales, matrix, left_matrix, signs,
        first, rows, K, stride_row, stride_column, stride_codes,
        ROWS, STEPS, CHUNKS, WIDTH, STAGES, GAIN, ROTATE, FULL, FOLD, CODE, MANTISSA, MIN_EXPONENT, MAX, NORM, INVERSE_MAX,
        STEP, PRODUCER, PACK,
    )  # fmt: skip


@triton.jit
def _whole_rows(
    x, x1, x2, gain, fold, codes, scales, matrix, left_matrix, signs,
    first, M, K, stride_row, stride_column, stride_codes,
    ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    GAIN: tl.constexpr, ROTATE: tl.constexpr, FULL: tl.constexpr, FOLD: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    NORM: tl.constexpr, INVERSE_MAX: tl.constexpr, STEP: tl.constexpr, PRODUCER: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Do the work of one program of :func:`whole_rows`, from row ``first`` on."""
    piece = tl.arange(0, ROWS * CHUNKS)
    inner = tl.arange(0, WIDTH)
    columns = (piece % CHUNKS)[:, None] * WIDTH + inner[None, :]
    if ROTATE:
        h = tl.load(matrix + inner[:, None] * WIDTH + inner[None, :])
    if FULL:
        outer = tl.arange(0, CHUNKS)
        h_left = tl.load(left_matrix + outer[:, None] * CHUNKS + outer[None, :])
    # A gain that is loaded in the loop takes shared memory in every stage of the pipeline, so it is loaded once where
    # registers have room for it. Beside pieces wider than 16 bits it spills, and FULL has no pipeline.
    ONCE: tl.constexpr = GAIN and ROTATE and not FULL and x.dtype.element_ty.primitive_bitwidth == 16
    WIDE: tl.constexpr = x.dtype.element_ty == tl.float32
    if ONCE:
        by_column = _by_column(gain, columns, K, h.dtype)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = first + step * ROWS + piece // CHUNKS
        inside = (row < M)[:, None] & (columns < K)
        at_row = row.to(tl.int64)[:, None]
        if PRODUCER is None:
            y = tl.load(x + at_row * stride_row + columns.to(tl.int64) * stride_column, mask=inside, other=0.0)
        else:
            y = PRODUCER(x, x1, x2, at_row, columns, inside)
        if GAIN:
            if not ONCE:
                by_column = _by_column(gain, columns, K, tl.float32)
            y = y.to(by_column.dtype) * by_column
        if FULL:
            y = y.to(tl.float32) * load_vector(signs, columns, K)
        if ROTATE:
            y = product(y if WIDE else y.to(h.dtype), h)
        if FULL:
            high = y.to(h_left.dtype)  # two bf16 numbers hold 16 bits of a sum, and two products cost little
            y = tl.dot(h_left, high) + tl.dot(h_left, (y - high.to(tl.float32)).to(h_left.dtype))
        y = y.to(tl.float32)
        if ROTATE:
            y = y * NORM
        if FOLD:
            y = y * (load_vector(fold, columns, K) * FOLD_LIFT)
        amax = tl.reduce(tl.abs(y), 1, maximum)
        amax = tl.reduce(tl.reshape(amax, (ROWS, CHUNKS)), 1, maximum)
        scale = scale_from(amax, INVERSE_MAX)
        inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, CHUNKS)), (ROWS * CHUNKS,))
        y = y * inverse[:, None]
        if PACK:
            sixteen = (piece % CHUNKS)[:, None] * (WIDTH // 16) + tl.arange(0, WIDTH // 16)[None, :]
            there = (row < M)[:, None] & (sixteen * 16 < K)
            low, middle, high = packed_words(y, MANTISSA, MIN_EXPONENT, ROWS * CHUNKS, WIDTH)
            at = codes + at_row * (stride_codes // 4) + sixteen * 3
            tl.store(at, low, mask=there)
            tl.store(at + 1, middle, mask=there)
            tl.store(at + 2, high, mask=there)
        else:
            q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
            tl.store(codes + at_row * stride_codes + columns, q, mask=inside)
        rows = first + step * ROWS + tl.arange(0, ROWS)
        tl.store(scales + rows, unlifted(scale, STEP, FOLD), mask=rows < M)


@triton.jit
def load_square(pointer, T: tl.constexpr):
    """Load a contiguous [T, T] matrix."""
    return load_matrix(pointer, T, T)


@triton.jit
def load_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a contiguous [ROWS, COLUMNS] matrix."""
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _rotated_tile(x_tile, h_left, h_right, NORM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Return h_left · x · h_right of a [T, T] tile in float32: [T, T], or [T, WIDTH] if h_right has a low rank."""
    WIDE: tl.constexpr = x_tile.dtype == tl.float32
    y = x_tile
    if RIGHT:
        y = product(y if WIDE else y.to(h_right.dtype), h_right)
    if LEFT:
        y = product(h_left, y if WIDE or RIGHT else y.to(h_left.dtype))
    y = y.to(tl.float32)
    if LEFT or RIGHT:
        y = y * NORM
    return y


@triton.jit
def _columns_out(tile, COUNT, WIDTH: tl.constexpr, KEPT: tl.constexpr):
    """Return the indices of a tile's rotated columns in the result, and the mask of those that exist."""
    index = tl.arange(0, WIDTH)
    columns = tile * KEPT + index
    inside = columns < COUNT
    if KEPT < WIDTH:
        inside &= index < KEPT
    return columns, inside


@triton.jit
def amax_tiles(
    x, fold_columns, fold_rows, row_amax, column_amax, left, right,
    M, K, COLUMNS_OUT, stride_row, stride_column,
    T: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, FOLD_COLUMNS: tl.constexpr, FOLD_ROWS: tl.constexpr,
    ALONG_ROWS: tl.constexpr, ALONG_COLUMNS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Find the largest magnitudes of x [M, K]. A program takes T rows by TILES·T columns.

    row_amax, column_amax: zeroed int32, which get float bits. They have the order of non-negative floats, with NaN above all.
    RIGHT: right is [T, WIDTH]. Its first KEPT columns are those of a rotation or those that a rank keeps; the others are zero.
    The rotated matrix has COLUMNS_OUT columns, KEPT from each tile. Without RIGHT, WIDTH = KEPT = T.
    ALONG_ROWS: magnitudes of the rotated matrix times fold_columns, 2 for one per row, 1 for one of all, 0 for none.
    ALONG_COLUMNS: magnitudes of x times fold_rows, 2 for one per column, 1 for one of all, 0 for none.
    """
    rows = tl.program_id(0) * T + tl.arange(0, T)
    most = tl.zeros((T,), tl.float32)
    h_left = load_square(left, T) if LEFT and ALONG_ROWS else left
    h_right = load_matrix(right, T, WIDTH) if RIGHT and ALONG_ROWS else right
    if FOLD_ROWS:
        by_row = load_vector(fold_rows, rows, M) * FOLD_LIFT
    for i in tl.range(0, TILES, num_stages=STAGES):
        tile_column = tl.program_id(1) * TILES + i
        columns = tile_column * T + tl.arange(0, T)
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
        x_tile = tl.load(x + at, mask=inside, other=0.0)
        if ALONG_ROWS:
            y = _rotated_tile(x_tile, h_left, h_right, NORM, LEFT, RIGHT)
            if FOLD_COLUMNS:
                out, kept = _columns_out(tile_column, COLUMNS_OUT, WIDTH, KEPT)
                y = y * (tl.load(fold_columns + out, mask=kept, other=0.0) * FOLD_LIFT)[None, :]
            most = maximum(most, tl.reduce(tl.abs(y), 1, maximum))
        if ALONG_COLUMNS:
            y = x_tile.to(tl.float32)
            if FOLD_ROWS:
                y = y * by_row[:, None]
            down = tl.reduce(tl.abs(y), 0, maximum)
            if ALONG_COLUMNS == 2:
                tl.atomic_max(column_amax + columns, down.to(tl.int32, bitcast=True), mask=columns < K, sem="relaxed")
            else:
                tl.atomic_max(column_amax, tl.reduce(down, 0, maximum).to(tl.int32, bitcast=True), sem="relaxed")
    if ALONG_ROWS == 2:
        tl.atomic_max(row_amax + rows, most.to(tl.int32, bitcast=True), sem="relaxed")
    if ALONG_ROWS == 1:
        # Reduced as a matrix: for sm_100, Triton 3.6 cannot compile the reduction of a vector that was reduced from a product.
        all_rows = tl.reduce(tl.reshape(most, (1, T)), 1, maximum)
        tl.atomic_max(row_amax + tl.arange(0, 1), all_rows.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def scale_of(amax, index, count, INVERSE_MAX: tl.constexpr, ALONG: tl.constexpr, T: tl.constexpr):
    """Return the lifted scales of T rows or columns. ALONG: 2 for one each, 1 for one scale of all, 0 for ones."""
    if ALONG == 2:
        return scale_from(tl.load(amax + index, mask=index < count, other=0).to(tl.float32, bitcast=True), INVERSE_MAX)
    if ALONG == 1:
        return scale_from(tl.zeros((T,), tl.float32) + tl.load(amax).to(tl.float32, bitcast=True), INVERSE_MAX)
    return tl.full((T,), 1.0, tl.float32)


@triton.jit
def write_scale(scales, scale, index, count, other_tile, ALONG: tl.constexpr):
    """Store scales from one program only: the one of the first tile along the other dimension (``other_tile`` 0).

    ALONG: 2 stores T scales; 1 stores one, from the tile of index 0.
    """
    if other_tile == 0:
        if ALONG == 2:
            tl.store(scales + index, scale, mask=index < count)
        else:
            tl.store(scales + index, scale, mask=index == 0)


@triton.jit
def _noise_at(seed, rows, columns, SWAPPED: tl.constexpr):
    """Return the noise of elements at some rows and columns of a matrix, or of its transpose if SWAPPED."""
    if SWAPPED:
        return noise(noise_streams(seed, columns)[None, :], 0, rows[:, None])
    return noise(noise_streams(seed, rows)[:, None], 0, columns[None, :])


@triton.jit
def cast_tiles(
    x, fold_columns, fold_rows, row_amax, column_amax, seed, codes, codes_t, row_scales, column_scales, left, right,
    M, K, ROWS_OUT, COLUMNS_OUT, stride_row, stride_column, stride_codes, stride_codes_t,
    T: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, FOLD_COLUMNS: tl.constexpr, FOLD_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_SCALE: tl.constexpr, COLUMN_SCALE: tl.constexpr, NOISY: tl.constexpr,
    CODE: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr,
    NORM: tl.constexpr, INVERSE_MAX: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store codes and scales from the magnitudes and on the tiles of :func:`amax_tiles`.

    ROWS: codes [ROWS_OUT, COLUMNS_OUT] of the rotated matrix times fold_columns. ROW_SCALE: 2 for a scale per row, 1 for one
    scale, 0 for none.
    COLUMNS: codes_t [K, M] of x times fold_rows. COLUMN_SCALE: 2 for a scale per column, 1 for one scale, 0 for none.
    NOISY: 1 rounds stochastically, by the int64 at ``seed``, with the same noise in both orders; 2 likewise, where x is the
    transpose of the matrix that is quantised; 0 rounds to nearest.
    """
    one = tl.full((T,), 1.0, tl.float32)
    tile_row = tl.num_programs(0) - 1 - tl.program_id(0)  # in reverse order, because amax_tiles has left the last tiles in L2
    rows = tile_row * T + tl.arange(0, T)
    h_left = load_square(left, T) if LEFT and ROWS else left
    h_right = load_matrix(right, T, WIDTH) if RIGHT and ROWS else right
    if FOLD_ROWS:
        by_row = load_vector(fold_rows, rows, M) * FOLD_LIFT
    if ROWS:
        row_scale = scale_of(row_amax, rows, ROWS_OUT, INVERSE_MAX, ROW_SCALE, T)
        row_inverse = tl.div_rn(one, row_scale)
    for i in tl.range(0, TILES, num_stages=STAGES):
        tile_column = (tl.num_programs(1) - 1 - tl.program_id(1)) * TILES + i
        columns = tile_column * T + tl.arange(0, T)
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
        x_tile = tl.load(x + at, mask=inside, other=0.0)
        if ROWS:
            y = _rotated_tile(x_tile, h_left, h_right, NORM, LEFT, RIGHT)
            out, kept = _columns_out(tile_column, COLUMNS_OUT, WIDTH, KEPT)
            if FOLD_COLUMNS:
                y = y * (tl.load(fold_columns + out, mask=kept, other=0.0) * FOLD_LIFT)[None, :]
            if ROW_SCALE > 0:
                y = y * row_inverse[:, None]
                write_scale(row_scales, unlifted(row_scale, STEP, FOLD_COLUMNS), rows, ROWS_OUT, tile_column, ROW_SCALE)
            if NOISY:
                q = round_by(_noise_at(seed, rows, out, NOISY == 2), y, CODE, MANTISSA, MIN_EXPONENT, MAX)
            else:
                q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
            target = codes + rows.to(tl.int64)[:, None] * stride_codes + out[None, :]
            tl.store(target, q, mask=(rows < ROWS_OUT)[:, None] & kept[None, :])
        if COLUMNS:
            y = x_tile.to(tl.float32)
            if FOLD_ROWS:
                y = y * by_row[:, None]
            if COLUMN_SCALE > 0:
                scale = scale_of(column_amax, columns, K, INVERSE_MAX, COLUMN_SCALE, T)
                y = y * tl.div_rn(one, scale)[None, :]
                write_scale(column_scales, unlifted(scale, STEP, FOLD_ROWS), columns, K, tile_row, COLUMN_SCALE)
            if NOISY:
                q = round_by(_noise_at(seed, rows, columns, NOISY == 2), y, CODE, MANTISSA, MIN_EXPONENT, MAX)
            else:
                q = round_to_code(y, CODE, MANTISSA, MIN_EXPONENT, MAX, STEP)
            target = codes_t + columns.to(tl.int64)[:, None] * stride_codes_t + rows[None, :]
            tl.store(target, tl.trans(q), mask=tl.trans(inside))


@triton.jit
def transpose_codes(codes, codes_t, M, K, stride_codes, stride_codes_t, T: tl.constexpr):
    """Transpose codes [M, K], as bytes, to codes_t [K, M]. A program takes a [T, T] tile."""
    rows = tl.program_id(0) * T + tl.arange(0, T)
    columns = tl.program_id(1) * T + tl.arange(0, T)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    tile = tl.load(codes + rows.to(tl.int64)[:, None] * stride_codes + columns[None, :], mask=inside, other=0)
    target = codes_t + columns.to(tl.int64)[:, None] * stride_codes_t + rows[None, :]
    tl.store(target, tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def rotate_tiles(
    x, out, left, right, M, K, ROWS_OUT, stride_row, stride_column, stride_out,
    T: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store left · x · right · NORM of x [M, K] to out [ROWS_OUT, K]. A program takes a [T, T] tile."""
    rows = tl.program_id(0) * T + tl.arange(0, T)
    columns = tl.program_id(1) * T + tl.arange(0, T)
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    x_tile = tl.load(x + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)
    h_left = load_square(left, T) if LEFT else left
    h_right = load_square(right, T) if RIGHT else right
    y = _rotated_tile(x_tile, h_left, h_right, NORM, LEFT, RIGHT)
    out_at = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=(rows < ROWS_OUT)[:, None] & (columns < K)[None, :])


@triton.jit
def fill(out, N, VALUE: tl.constexpr, WIDTH: tl.constexpr):
    """Store VALUE to all N elements of ``out``."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + index, tl.full((WIDTH,), VALUE, out.dtype.element_ty), mask=index < N)
