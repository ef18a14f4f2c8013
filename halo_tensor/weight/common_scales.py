"""Per-tensor scales of sharded weights, on which all ranks must agree.

The scale of a whole matrix is that of its largest element, which one rank holds. Every rank quantises its rows with it.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from halo_tensor import ops
from halo_tensor.recipe import TENSOR, UNIT
from halo_tensor.reference import ops as reference
from halo_tensor.weight.sharded_parameters import shard_of
from halo_tensor.weight.tensor import HaloWeight


def precompute_scales(model: torch.nn.Module) -> None:
    """Agree on the per-tensor scales of all sharded weights, in one all-reduce for each mesh.

    Every rank calls it after ``optimizer.step()``. Without it, each weight costs a small all-reduce before it is gathered.
    Weights with other scales need none, and a model without per-tensor scales is left as it is.

    Args:
        model: converted by ``quantize_``, and then sharded by ``fully_shard`` (FSDP2).

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, quantize_
        >>> from halo_tensor.fsdp import precompute_scales
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128))
        >>> report = quantize_(model, halo_config(level=1, dtype="fp8", granularity="tensor"))
        >>> # fully_shard(model) where several ranks train it
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.randn(16, 128)).sum().backward()
        >>> optimizer.step()
        >>> precompute_scales(model)
    """
    weights: dict[tuple[DeviceMesh, int], list[HaloWeight]] = {}
    for parameter in model.parameters():
        shard = shard_of(parameter)
        if shard is not None and shard.needs_common_scale and shard.scale is not None:
            assert isinstance(parameter, DTensor)
            dimension = next(i for i, p in enumerate(parameter.placements) if p.is_shard())
            weights.setdefault((parameter.device_mesh, dimension), []).append(shard)
    for (mesh, dimension), shards in weights.items():
        share_scales(shards, mesh, dimension)


@torch.no_grad()
def share_scales(shards: list[HaloWeight], mesh: DeviceMesh, dimension: int = 0) -> None:
    """Quantise shards with the largest of all ranks' scales.

    Args:
        shards: all with per-tensor scales.
        mesh: of all ranks.
        dimension: of the mesh along which the shards were cut.
    """
    scales = torch.stack([_scale(shard) for shard in shards])
    device = scales.device  # a shard may be offloaded
    scales = scales.to(mesh.device_type).nan_to_num_(nan=torch.inf, posinf=torch.inf)  # a maximum may lose NaN, but no ∞
    dist.all_reduce(scales, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    for shard, scale in zip(shards, scales.to(device).unbind(), strict=True):
        _quantize(shard, scale)


def _scale(shard: HaloWeight) -> torch.Tensor:
    assert shard.scale is not None
    return shard.scale


def _quantize(shard: HaloWeight, scale: torch.Tensor) -> None:
    """Quantise a shard with a given scale, float32 []."""
    operand = shard.operand
    assert operand is not None and operand.codes is not None and operand.scale is not None and operand.format is not None
    if shard.master is None:  # frozen: there are only codes, which are rotated already
        matrix, rotation, gain = reference.dequantize(operand.any_codes(), operand.scale, TENSOR), None, None
    else:
        matrix, rotation, gain = shard.master, operand.column_rotation, operand.gain
    if matrix.shape[0]:
        fold = (1.0 / scale).repeat(matrix.shape[0])
        codes = ops.rotate_quantize(matrix, None, rotation, operand.format, UNIT, fold_rows=fold, gain=gain)[0]
        assert codes is not None
        if operand.is_packed:
            ops.pack_rows_(codes, operand.format, operand.codes)
        else:
            operand.codes.copy_(codes)
    operand.scale.copy_(scale)
    torch.autograd.graph.increment_version([operand.codes, operand.scale])
    shard.codes_state.mark_common_scale(operand)
