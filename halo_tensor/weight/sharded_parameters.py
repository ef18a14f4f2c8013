"""Parameters that FSDP2 has sharded: DTensors whose local tensor is a converted weight."""

import torch
from torch.distributed.tensor import DTensor

from halo_tensor.fences.pytorch import local_tensor, set_local_tensor
from halo_tensor.weight.tensor import HaloWeight


def shard_of(parameter: torch.Tensor | None) -> HaloWeight | None:
    """Return the shard of a DTensor itself (``to_local`` gives a view of it); None if the tensor is no sharded weight."""
    shard = local_tensor(parameter) if isinstance(parameter, DTensor) else None
    return shard if isinstance(shard, HaloWeight) else None


def is_sharded(parameter: torch.Tensor | None) -> bool:
    """Whether this parameter is a converted weight that FSDP2 has sharded."""
    return shard_of(parameter) is not None


def with_shard(parameter: torch.Tensor, shard: torch.Tensor) -> DTensor:
    """Return a DTensor like ``parameter``, with ``shard`` as its local tensor."""
    assert isinstance(parameter, DTensor)
    whole = DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    set_local_tensor(whole, shard)  # from_local makes a view of it, and a view of a converted weight has no codes
    return whole


def lend(parameter: torch.Tensor) -> DTensor:
    """Return the dense value of a sharded weight, for a state dict.

    It is always the same DTensor: its version tells of ops on it, which the version of its local tensor does not.
    """
    shard = shard_of(parameter)
    assert shard is not None
    if shard.master is None or shard.operand is None:
        return with_shard(parameter, shard.dequantize())
    lent = shard.codes_state.lent_dtensor
    if lent is None or local_tensor(lent) is not shard.master:
        shard.follow()
        with torch.inference_mode(False):  # an inference tensor has no version
            lent = shard.codes_state.lent_dtensor = with_shard(parameter, shard.master)
        shard.mark_in_step()
    shard.lend()
    return lent
