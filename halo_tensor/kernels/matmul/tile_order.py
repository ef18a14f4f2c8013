"""The order in which programs compute the tiles of a product, for kernels in Triton and in Gluon."""

import triton
import triton.language as tl


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr, PAST: tl.constexpr = False):
    """Return row and column of the ``tile``-th of ``tiles_m`` by ``tiles_n`` tiles.

    The order goes through groups of GROUP rows of tiles, so that tiles that share operand rows are computed at about the same
    time and find them in L2. PAST: ``tile`` may be beyond the last one, and its place is then beyond the matrix.
    """
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    if PAST:
        height = max(height, 1)  # it is a divisor
    return group * GROUP + (tile % (GROUP * tiles_n)) % height, (tile % (GROUP * tiles_n)) // height
