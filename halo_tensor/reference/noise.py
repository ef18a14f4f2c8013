"""The random numbers of stochastic rounding: a hash of a seed and of an element's position.

Kernels compute the same numbers (:func:`halo_tensor.kernels.quantize.rounding.noise`). So an element gets the same number in
every layout, by every choice of tiles and on every device, and nothing is drawn or stored for it.
"""

import torch

#: A hash of 32 bits: (shift, multiplier) twice, and a shift, from https://github.com/skeeto/hash-prospector. Both multipliers
#: are below 2³¹, so that int64 holds every product.
STEPS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
LAST_SHIFT = 15
#: An odd number. The numbers of a row that are hashed differ by multiples of it.
STEP = 0x9E3779B9
_WORD = 2**32 - 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Return the hash of 32-bit numbers, int64."""
    for shift, multiplier in STEPS:
        x = ((x ^ (x >> shift)) * multiplier) & _WORD
    return x ^ (x >> LAST_SHIFT)


def uniform(seed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return float32 [rows, columns], uniform in [0, 1), in steps of 2⁻⁸.

    Row i has hash(hash(i ⊕ hash(low ⊕ STEP)) ⊕ high), for the low and the high 32 bits of the seed. Columns c, c + 1, c + 8 and c + 9 of a
    row share a hash of 32 bits, that of the row's plus a multiple of STEP, and each takes a byte of it. A thread of a kernel
    holds these four columns of a product on matrix units.

    Args:
        seed: int64 [1].
        rows, columns: the shape of the matrix that is rounded.
    """
    row, column = (torch.arange(n, device=seed.device) for n in (rows, columns))
    low, high = seed & _WORD, (seed >> 32) & _WORD
    of_rows = _mix(_mix(row ^ _mix(low ^ STEP)) ^ high)
    groups = (column >> 4 << 2) | (column >> 1 & 3)
    byte = (column & 1) | (column >> 2 & 2)
    hashes = _mix((of_rows[:, None] + groups * STEP) & _WORD)
    return (hashes >> 8 * byte & 0xFF).to(torch.float32) * 2.0**-8
