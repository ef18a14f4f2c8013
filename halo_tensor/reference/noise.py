"""The random numbers of stochastic rounding: a hash of a seed and of an element's position.

Kernels compute the same numbers (:func:`halo_tensor.kernels.quantize.rounding.noise`). So an element gets the same number in
every layout, by every choice of tiles and on every device, and nothing is drawn or stored for it.
"""

import torch

#: A hash of 32 bits: (shift, multiplier) twice, and a shift, from https://github.com/skeeto/hash-prospector. Both multipliers
#: are below 2³¹, so that int64 holds every product.
STEPS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
LAST_SHIFT = 15
#: Any number. It makes the hash of columns another one than that of rows.
COLUMNS = 0x9E3779B9
_WORD = 2**32 - 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Return the hash of 32-bit numbers, int64."""
    for shift, multiplier in STEPS:
        x = ((x ^ (x >> shift)) * multiplier) & _WORD
    return x ^ (x >> LAST_SHIFT)


def uniform(seed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return float32 [rows, columns], uniform in [0, 1), in steps of 2⁻²³.

    The number of element (i, j) is the hash of hash(i ⊕ low) ⊕ hash(hash(j ⊕ high) ⊕ COLUMNS), for the low and the high 32
    bits of the seed.

    Args:
        seed: int64 [1].
        rows, columns: the shape of the matrix that is rounded.
    """
    low, high = seed & _WORD, (seed >> 32) & _WORD
    of_rows, of_columns = (_mix(torch.arange(n, device=seed.device) ^ part) for n, part in ((rows, low), (columns, high)))
    return (_mix(of_rows[:, None] ^ _mix(of_columns ^ COLUMNS)) >> 9).to(torch.float32) * 2.0**-23
