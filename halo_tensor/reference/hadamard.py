"""Hadamard matrices, the signs of a rotation, and the block that fits a width.

Everything here is a deterministic function of integers, so that all ranks, machines and kernels agree.
"""

from dataclasses import replace
from functools import lru_cache
from math import isqrt

import torch

from halo_tensor.recipe import Operand, Rotation

SMALLEST_BLOCK = 16
#: A block up to this edge is one dense factor, one tensor-core product in a kernel. A wider one is split into two factors.
LARGEST_FACTOR = 256


def signs(n: int, seed: int | None) -> torch.Tensor:
    """Return ``n`` random signs as an int64 tensor of ±1; all +1 if ``seed`` is None.

    A sign is bit 0 of a 32-bit integer hash of its index and the seed, which a kernel can compute where it needs the sign.
    """
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
    """Return the prime of Paley's construction I (n = q + 1, q ≡ 3 mod 4) or II (n = 2(q + 1), q ≡ 1 mod 4), or None."""
    for q, residue in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and q % 4 == residue and _is_prime(q):
            return q
    return None


def _paley(n: int, q: int) -> torch.Tensor:
    """Return Paley's Hadamard matrix of order ``n`` from the prime ``q``."""
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
    """Return a Hadamard matrix of order ``n`` (int64, ±1, H Hᵀ = n I): Sylvester's for powers of two, else Paley's (1933),
    doubled as often as necessary.

    Raises:
        ValueError: neither construction gives the order.
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
    """Return the indices of the columns of ``hadamard(n)``, from the fewest changes of sign to the most: [n], int64. For
    powers of two (Walsh's order) each number of changes from 0 to n − 1 occurs once."""
    h = hadamard(n)
    return (h[1:] != h[:-1]).sum(0).argsort(stable=True)


def factors(block: int) -> tuple[int, int] | None:
    """Return ``(a, b)`` with a·b = block and H_block = H_a ⊗ H_b.

    It is (1, block) for powers of two up to 256. Else b is a power of two of at most 128, and a is at most 256. None if there
    is no such pair.
    """
    power = block & -block
    if power == block and block <= LARGEST_FACTOR:
        return 1, block
    b = min(power, LARGEST_FACTOR // 2)
    while b > 1 and not has_hadamard(block // b):  # leave the odd part enough twos to have a matrix
        b //= 2
    a = block // b
    return (a, b) if a <= LARGEST_FACTOR and has_hadamard(a) else None


@lru_cache(maxsize=256)
def _interned(rotation: Rotation) -> Rotation:
    """Return one object for all equal rotations: compiled code compares rotations in every call, and finds identity first."""
    return rotation


def fit(rotation: Rotation | None, width: int) -> Rotation | None:
    """Return ``rotation`` for a dimension of ``width``, with the largest block that divides the width.

    Returns None if there is nothing to rotate, or no power of two of at least 16 divides the width.
    """
    if rotation is None:
        return None
    if rotation.block is None and factors(width):
        return _interned(replace(rotation, block=width))
    if rotation.block is not None and width % rotation.block == 0:
        return rotation
    power = width & -width  # the largest power of two that divides it
    block = min(power, rotation.block or LARGEST_FACTOR)
    if block < SMALLEST_BLOCK:
        return None
    return _interned(replace(rotation, block=block, rank=rotation.rank and max(1, rotation.rank * block // rotation.edge)))


def carried(operand: Operand, dimension: str, size: int) -> Rotation | None:
    """Return the rotation of an operand's dimension of ``size`` in a layer. Tokens are padded to whole blocks; features get a
    block that divides them."""
    rotation = operand.rotation(dimension)
    return rotation if dimension == "tokens" else fit(rotation, size)


# Constants of a rotation as float32 on a device, in caches. Their elements are ±power(n), a power of two, so that a kernel's
# product of bf16 with one is exact. power(n) is about 1/√n, so that sums are no larger than the rotated values and do not
# overflow before them. The rest of the factor 1/√block, `norm`, multiplies the result.


def power(n: int) -> float:
    """Return the largest power of two that is at most 1/√n for a power of two n; at least half of that for other n."""
    return 2.0 ** -(((n - 1).bit_length() + 1) // 2)


def norm(rotation: Rotation) -> float:
    """Return the factor that a product with the constants of a rotation needs, for a total factor of 1/√block."""
    a, b = factors(rotation.edge) or (rotation.edge, 1)
    return rotation.edge**-0.5 / (power(a) * power(b))


@lru_cache(maxsize=256)
def hadamard_factor(n: int, device: torch.device) -> torch.Tensor:
    """Return H_n · power(n)."""
    return hadamard(n).to(device=device, dtype=torch.float32) * power(n)


@lru_cache(maxsize=256)
def rotation_signs(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Return the signs of one block, [block]."""
    return signs(rotation.edge, rotation.seed).to(device=device, dtype=torch.float32)


@lru_cache(maxsize=256)
def signed_hadamard(rotation: Rotation, device: torch.device) -> torch.Tensor:
    """Return D·H·power(block) of one block with a single factor: [block, block], or the columns [block, rank] that a rank
    keeps."""
    matrix = signs(rotation.edge, rotation.seed)[:, None] * hadamard(rotation.edge)
    if rotation.rank is not None:
        matrix = matrix[:, sequency_order(rotation.edge)[: rotation.rank]]
    return matrix.to(device=device, dtype=torch.float32) * power(rotation.edge)


def product_width(columns: int) -> int:
    """Return the width of a kernel's product for a matrix of so many columns: a power of two, at least 16."""
    return max(16, 1 << (columns - 1).bit_length())


@lru_cache(maxsize=256)
def block_diagonal(rotation: Rotation, edge: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> torch.Tensor:
    """Return I ⊗ (D·H·power(block)), [edge, edge], or its transpose, for a kernel's tile that is wider than a block. With a
    rank it has the columns that the rank keeps, and zeros up to :func:`product_width`."""
    blocks = edge // rotation.edge
    matrix = torch.block_diag(*[signed_hadamard(rotation, torch.device("cpu"))] * blocks)
    matrix = torch.nn.functional.pad(matrix, (0, product_width(matrix.shape[1]) - matrix.shape[1]))
    return (matrix.t() if transposed else matrix).to(device=device, dtype=dtype).contiguous()
