"""Parts of a converted weight for tensor parallelism: each rank has some rows or columns of it, and multiplies with them.

Rows bring their codes, scales and rotation whole. Columns are cut between blocks of the rotation, so that each rank's part is
rotated as it was in the whole. A part is a whole weight of its own to everything else: it has its own scales and follows the
same recipe. FSDP2 may cut it further.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from halo_tensor.fences.collectives import Ranks, all_gather
from halo_tensor.fences.pytorch import set_local_tensor
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import PRODUCTS, Recipe, W
from halo_tensor.reference.hadamard import carried
from halo_tensor.weight.agreement import description, digest
from halo_tensor.weight.tensor import HaloWeight

#: 8-bit matrix units read operands in pieces of 16 bytes.
_ALIGNMENT = 16


def obstacle(weight: HaloWeight, dim: int, ranks: int) -> str | None:
    """Return why a weight [out, in] cannot be cut along ``dim`` for so many ranks; None if it can."""
    size, name = weight.shape[dim], W[dim]
    if size % ranks:
        return f"{ranks} ranks do not divide {size} {name}"
    part = size // ranks
    for rotation, of_part in _rotations(weight.recipe, name, size, part):
        if rotation != of_part:
            return (
                f"each of {ranks} ranks would have {part} of {size} {name}, which are not whole blocks of the rotation, "
                f"{rotation.edge if rotation else 'none'}: use fewer ranks, or block_size={part & -part} in the config"
            )
    if part % _ALIGNMENT:
        return f"each of {ranks} ranks would have {part} of {size} {name}, no multiple of {_ALIGNMENT}"
    return None


def _rotations(recipe: Recipe, dimension: str, size: int, part: int) -> list[tuple]:
    """Return the rotations of a dimension, of the whole and of a part, for each operand that has the dimension."""
    operands = {
        operand
        for name, (left, right, _) in PRODUCTS.items()
        for operand, dims in ((getattr(recipe, name).left, left), (getattr(recipe, name).right, right))
        if dimension in dims
    }
    return [(carried(operand, dimension, size), carried(operand, dimension, part)) for operand in operands]


def part_of(weight: HaloWeight, dim: int, ranks: Ranks, dense: torch.Tensor | None) -> HaloWeight:
    """Return this rank's part of a weight along ``dim``, on memory of its own.

    Args:
        weight: one without :func:`obstacle`.
        dim: 0 for rows, 1 for columns.
        ranks: among which it is split.
        dense: the part of the master; None of a frozen weight, whose codes are cut.
    """
    width = weight.shape[dim] // ranks.size
    start = width * ranks.rank
    gains = weight.gains
    if gains is not None and dim == 1:
        gains = gains[0][start : start + width].clone(), gains[1][start : start + width].clone()
    if dense is not None:
        return HaloWeight.from_hp(dense, weight.recipe, gains=gains, keep_codes=weight.holds_codes)
    operand = cast(HadamardQuantTensor, weight.operand)
    granularity, scale = operand.granularity, operand.scale
    codes = operand.any_codes().narrow(dim, start, width).clone(memory_format=torch.contiguous_format)
    if scale is not None:
        scale = granularity.cut(scale, ("rows", "columns")[dim], start, start + width).clone()
    size = torch.Size((width, weight.shape[1]) if dim == 0 else (weight.shape[0], width))
    cut = operand._with(size=size, codes=codes, scale=scale)
    cut.gains = gains
    return HaloWeight(None, cut.packed() if operand.is_packed else cut, weight.recipe)


def split(weight: HaloWeight, dim: int, mesh: DeviceMesh, src_data_rank: int | None) -> torch.nn.Parameter:
    """Return the parameter that takes the place of a converted weight: a DTensor, of which this rank has a part along ``dim``.

    Args:
        weight: the same on every rank, and one without :func:`obstacle`.
        dim: 0 for rows, 1 for columns.
        mesh: of one dimension.
        src_data_rank: as in ``distribute_tensor``: the rank whose values count, or None for each rank's own.
    """
    ranks, placements = Ranks.of(mesh.get_group()), [Shard(dim)]
    _check_agreement(weight, mesh, ranks)
    dense = None
    if weight.master is not None:
        weight.follow()
        whole = distribute_tensor(weight.master.detach(), mesh, placements, src_data_rank=src_data_rank)
        dense = whole.to_local().detach().clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        part = part_of(cast(HaloWeight, weight.detach()), dim, ranks, dense)
    made = DTensor.from_local(part, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
    set_local_tensor(made, part)  # from_local makes a view of it
    return torch.nn.Parameter(made, requires_grad=weight.requires_grad)


def split_plain(tensor: torch.Tensor, placement: Placement, mesh: DeviceMesh, src: int | None) -> torch.nn.Parameter:
    """Return the parameter that takes the place of a bias: a DTensor, split or on every rank."""
    return torch.nn.Parameter(
        distribute_tensor(tensor, mesh, [placement], src_data_rank=src), requires_grad=tensor.requires_grad
    )


def local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter, through which gradients flow to it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _check_agreement(weight: HaloWeight, mesh: DeviceMesh, ranks: Ranks) -> None:
    """Raise ValueError if ranks have converted a layer differently."""
    here = description(weight, weight.shape)
    (digests,) = all_gather([digest(here, mesh.device_type)], ranks)
    if len(set(digests.tolist())) > 1:
        raise ValueError(
            f"a weight of {list(weight.shape)} [out, in] is converted differently on the ranks of this mesh: call quantize_ "
            "with the same config on every rank, and balance_ with the same batch. "
            f"On rank {dist.get_rank()} it is: {here}"
        )
