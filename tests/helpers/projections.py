"""Projections on Walsh functions of low sequency, and rounding to integers, in float64."""

import torch

from halo_tensor.reference.hadamard import hadamard


def walsh(block: int, rank: int | None = None) -> torch.Tensor:
    """Return the orthonormal Walsh functions of lowest sequency as columns: [block, rank], float64. Sequency is found by counting
    changes of sign."""
    h = hadamard(block).double()
    changes = (h[:, 1:] != h[:, :-1]).sum(1)
    return h[changes.argsort()][:rank].t() / block**0.5


def project(x: torch.Tensor, block: int, rank: int | None = None) -> torch.Tensor:
    """Project blocks of rows of x, padded with zeros, on the Walsh functions: [⌈m/block⌉·rank, n], float64."""
    x = torch.cat([x.double(), x.new_zeros(-len(x) % block, x.shape[1]).double()])
    return (walsh(block, rank).t() @ x.view(len(x) // block, block, x.shape[1])).flatten(0, 1)


def rounded(x: torch.Tensor, largest: int, dim: int | None = None) -> torch.Tensor:
    """Round x to integers up to ``largest`` times a scale: one scale for all, or one for each vector along ``dim``."""
    scale = (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)) / largest
    return (x / scale).round() * scale
