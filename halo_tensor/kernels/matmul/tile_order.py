"""In which order a product's tiles are computed: shared by its kernels, Triton's and Gluon's."""

import triton
import triton.language as tl


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr, PAST: tl.constexpr = False):
    """Row and column of the ``tile``-th of ``tiles_m`` by ``tiles_n``. Tiles that share operand rows follow each other, in
    groups of GROUP rows of tiles, so that they meet in L2. PAST: a tile may also be past the last one, and is then nowhere."""
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    if PAST:
        height = max(height, 1)  # something to divide by
    return group * GROUP + (tile % (GROUP * tiles_n)) % height, (tile % (GROUP * tiles_n)) // height
