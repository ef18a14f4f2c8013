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

    Row i has hash(hash(i ⊕ hash(low ⊕ STEP)) ⊕ high), for the low and the high 32 bits of the seed. Its columns c to c + 3,
    for c a multiple of 4, are the bytes of the hash of that number plus c·STEP, so that one hash serves four elements.

    Args:
        seed: int64 [1].
        rows, columns: the shape of the matrix that is rounded.
    """
    row, column = (torch.arange(n, device=seed.device) for n in (rows, columns))
    low, high = seed & _WORD, (seed >> 32) & _WORD
    of_rows = _mix(_mix(row ^ _mix(low ^ STEP)) ^ high)
    hashes = _mix((of_rows[:, None] + (column & -4) * STEP) & _WORD)
    return (hashes >> 8 * (column & 3) & 0xFF).to(torch.float32) * 2.0**-8
