"""Hadamard matrices, the signs of a rotation, and the block that fits a width.

Everything here is a deterministic function of integers, so that every rank, machine and kernel agrees on it.
"""

from dataclasses import replace
from functools import lru_cache
from math import isqrt

import torch

from halo_tensor.recipe import Operand, Rotation

SMALLEST_BLOCK = 16
#: A block up to this edge is one dense factor (one tensor-core product in a kernel); a wider one splits into two.
LARGEST_FACTOR = 256


def signs(n: int, seed: int | None) -> torch.Tensor:
    """``n`` random signs as an int64 tensor of ±1: bit 0 of a 32-bit integer hash of the index and the seed, so that a kernel
    can compute them where it needs them. All +1 if ``seed`` is None."""
    if seed is None:
        return torch.ones(n, dtype=torch.int64)
    mask = 0xFFFFFFFF
    h = (torch.arange(n, dtype=torch.int64) * 0x9E3779B1 + (seed * 0x85EBCA6B & mask)) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & mask
    return 1 - 2 * ((h ^ (h >> 16)) & 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _paley_prime(n: int) -> int | None:
    """The prime of Paley's construction I (n = q + 1, q ≡ 3 mod 4) or II (n = 2(q + 1), q ≡ 1 mod 4), if n has one."""
    for q, residue in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and q % 4 == residue and _is_prime(q):
            return q
    return None


def _paley(n: int, q: int) -> torch.Tensor:
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)])
    index = torch.arange(q)
    jacobsthal = residue[(index[:, None] - index) % q]
    core = torch.ones(q + 1, q + 1, dtype=torch.int64)
    core[0, 0] = 0
    core[1:, 1:] = jacobsthal
    identity = torch.eye(q + 1, dtype=torch.int64)
    if n == q + 1:
        core[1:, 0] = -1
        return core + identity
    return torch.kron(core, torch.tensor([[1, 1], [1, -1]])) + torch.kron(identity, torch.tensor([[1, -1], [-1, -1]]))


@lru_cache
def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` can build a matrix of order ``n``: a power of two, or a Paley order times one."""
    return n in (1, 2) or _paley_prime(n) is not None or (n % 2 == 0 and has_hadamard(n // 2))


@lru_cache
def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix of order ``n`` (int64, ±1, H Hᵀ = n I): Sylvester's for powers of two, else Paley's
    (1933), doubled as often as it takes.

    Raises ValueError where neither construction gives the order.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if n % 2 == 0 and has_hadamard(n // 2):
        return torch.kron(hadamard(n // 2), torch.tensor([[1, 1], [1, -1]]))
    q = _paley_prime(n)
    if q is None:
        raise ValueError(f"no Hadamard matrix of order {n} by Sylvester's or Paley's construction")
    return _paley(n, q)


@lru_cache
def sequency_order(n: int) -> torch.Tensor:
    """The columns of ``hadamard(n)``, from the fewest changes of sign to the most: [n], int64. For powers of two (Walsh's
    order) each number from 0 to n − 1 occurs once."""
    h = hadamard(n)
    return (h[1:] != h[:-1]).sum(0).argsort(stable=True)


def factors(block: int) -> tuple[int, int] | None:
    """``(a, b)`` with a·b = block and H_block = H_a ⊗ H_b: (1, block) for powers of two up to 256, else b a power of two of at
    most 128 and a of at most 256; None if there is no such pair."""
    power = block & -block
    if power == block and block <= LARGEST_FACTOR:
        return 1, block
    b = min(power, LARGEST_FACTOR // 2)
    while b > 1 and not has_hadamard(block // b):  # leave the odd part enough twos to have a matrix
        b //= 2
    a = block // b
    return (a, b) if a <= LARGEST_FACTOR and has_hadamard(a) else None


@lru_cache(maxsize=256)
def _one(rotation: Rotation) -> Rotation:
    """Of equal ones always the same, as compiled code sees most quickly."""
    return rotation


def fit(rotation: Rotation | None, width: int) -> Rotation | None:
    """``rotation`` on a dimension of ``width``, its block made the largest that divides it.

    None if there is nothing to rotate, or no power of two of at least 16 divides the width.
    """
    if rotation is None:
        return None
    if rotation.block is None and factors(width):
        return _one(replace(rotation, block=width))
    if rotation.block is not None and width % rotation.block == 0:
        return rotation
    power = width & -width  # the largest power of two that divides it
    block = min(power, rotation.block or LARGEST_FACTOR)
    if block < SMALLEST_BLOCK:
        return None
    return _one(replace(rotation, block=block, rank=rotation.rank and max(1, rotation.rank * block // rotation.edge)))


def carried(operand: Operand, dimension: str, size: int) -> Rotation | None:
    """The rotation of an operand's dimension of ``size`` as a layer carries it: tokens are padded to whole blocks, features
    take the block that divides them."""
    rotation = operand.rotation(dimension)
    return rotation if dimension == "tokens" else fit(rotation, size)


# Constants of a rotation as float32 on a device, kept while they are in use. Their elements are ±power(n): a power of two, so
# that a kernel which multiplies bf16 by one is exact, and about 1/√n, so that sums are no larger than the rotated values and
# do not overflow before them. What is left of the factor 1/√block, `norm`, is applied to the result.


def power(n: int) -> float:
    """The largest power of two that is at most 1/√n, where n is a power of two; at least half of that for other n."""
    return 2.0 ** -(((n - 1).bit_length() + 1) // 2)


def norm(rotation: Rotation) -> float:
    """The factor that a product with the constants of a rotation still needs, to be scaled by 1/√block in all."""
    a, b = factors(rotation.edge) or (rotation.edge, 1)
    return rotation.edge**-0.5 / (power(a) * power(b))


@lru_cache(maxsize=256)
def hadamard_factor(n: int, device: torch.device) -> torch.Tensor:
    """H_n · power(n)."""
    return hadamard(n).to(device=device, dtype=torch.float32) * power(n)


@lru_cache(maxsize=256)
def rotation_signs(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """The signs of one block, [block]."""
    return signs(rotation.edge, rotation.seed).to(device=device, dtype=torch.float32)


@lru_cache(maxsize=256)
def signed_hadamard(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """D·H·power(block) of one block, [block, block], or the columns [block, rank] that a rank keeps; for blocks of a single
    factor."""
    matrix = signs(rotation.edge, rotation.seed)[:, None] * hadamard(rotation.edge)
    if rotation.rank is not None:
        matrix = matrix[:, sequency_order(rotation.edge)[: rotation.rank]]
    return matrix.to(device=device, dtype=torch.float32) * power(rotation.edge)


def product_width(columns: int) -> int:
    """What a kernel's product of so many columns is wide: a power of two, at least 16."""
    return max(16, 1 << (columns - 1).bit_length())


@lru_cache(maxsize=256)
def block_diagonal(rotation: Rotation, edge: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> torch.Tensor:
    """I ⊗ (D·H·power(block)), [edge, edge], or its transpose: what a kernel multiplies a tile with that is wider than a block.
    Of a rank, the columns that it keeps, with columns of zeros up to a power of two that is at least 16."""
    blocks = edge // rotation.edge
    matrix = torch.block_diag(*[signed_hadamard(rotation, torch.device("cpu"))] * blocks)
    matrix = torch.nn.functional.pad(matrix, (0, product_width(matrix.shape[1]) - matrix.shape[1]))
    return (matrix.t() if transposed else matrix).to(device=device, dtype=dtype).contiguous()
