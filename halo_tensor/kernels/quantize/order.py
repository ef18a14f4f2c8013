"""Products whose codes are stored from the registers that hold them.

A matrix unit gives a thread pairs of neighbouring columns, eight columns apart, of rows that are eight rows apart. To store 16
bytes of a row, threads would have to exchange codes. So each 64 columns of a product are computed in another order, in which
those of a thread become neighbours, and rows are stored in the order in which Triton's stores take them. Nothing relies on it:
where threads hold other elements, Triton exchanges codes.
"""

import triton
import triton.language as tl


@triton.jit
def load_shuffled(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a contiguous [ROWS, COLUMNS] matrix with its columns in the order in which a product computes them."""
    PART: tl.constexpr = min(COLUMNS, 64)
    i = tl.arange(0, COLUMNS)
    columns = i // PART * PART + i // 2 % 4 * (PART // 4) + i // 8 % (PART // 8) * 2 + i % 2
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :])


@triton.jit
def in_parts(y, SHUFFLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Return a tile [ROWS, COLUMNS] as [ROWS, parts, columns of a part], with rows in the order of :func:`row_order`.

    SHUFFLED: whether it is a product with a matrix of :func:`load_shuffled`.
    """
    PART: tl.constexpr = min(COLUMNS, 64)
    PARTS: tl.constexpr = COLUMNS // PART
    if SHUFFLED:
        DOWN: tl.constexpr = min(WARPS, ROWS // 16)
        y = tl.reshape(y, (ROWS // (16 * DOWN), DOWN, 2, 8, PARTS, PART // 8, 4, 2))
        y = tl.permute(y, (0, 2, 1, 3, 4, 6, 5, 7))
    return tl.reshape(y, (ROWS, PARTS, PART))


@triton.jit
def row_order(SHUFFLED: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    i = tl.arange(0, ROWS)
    if SHUFFLED:
        DOWN: tl.constexpr = min(WARPS, ROWS // 16)
        i = i // (16 * DOWN) * (16 * DOWN) + i // 8 % DOWN * 16 + i // (8 * DOWN) % 2 * 8 + i % 8
    return i


@triton.jit
def column_order(COLUMNS: tl.constexpr):
    """Return the columns of :func:`in_parts`, [1, parts, columns of a part]. They are in order, but Triton is shown no longer
    runs than a thread holds, so that it stores them so."""
    PART: tl.constexpr = min(COLUMNS, 64)
    i = tl.arange(0, PART)
    if PART < 64:
        i = i // (PART // 4) * (PART // 4) + i % (PART // 4)
    return tl.arange(0, COLUMNS // PART)[None, :, None] * PART + i[None, None, :]
