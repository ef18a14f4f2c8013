"""Projections on Walsh functions of low sequency, and rounding to integers, in float64."""

import torch

from halo_tensor.reference.hadamard import hadamard


def walsh(block: int, rank: int | None = None) -> torch.Tensor:
    """[block, rank] float64: the orthonormal Walsh functions of lowest sequency, by counting their changes of sign."""
    h = hadamard(block).double()
    changes = (h[:, 1:] != h[:, :-1]).sum(1)
    return h[changes.argsort()][:rank].t() / block**0.5


def project(x: torch.Tensor, block: int, rank: int | None = None) -> torch.Tensor:
    """The blocks of rows of x, zero-padded, on those functions: [⌈m/block⌉·rank, …], float64."""
    x = torch.cat([x.double(), x.new_zeros(-len(x) % block, x.shape[1]).double()])
    return (walsh(block, rank).t() @ x.view(len(x) // block, block, x.shape[1])).flatten(0, 1)


def rounded(x: torch.Tensor, largest: int, dim: int | None = None) -> torch.Tensor:
    scale = (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)) / largest
    return (x / scale).round() * scale
