"""Errors for uses that converted weights do not support. Each says what to do instead."""

from collections.abc import Sequence
from typing import Any, NoReturn


def named(shape: Sequence[int]) -> str:
    """Return the shape of a weight as text, with the names of its dimensions."""
    return f"{list(shape)} {'[out, in]' if len(shape) == 2 else 'of experts'}"


def refuse_fsdp1(shape: Sequence[int]) -> NoReturn:
    """Refuse FSDP1, which flattens parameters: the layer would run in high precision."""
    raise RuntimeError(
        f"FullyShardedDataParallel (FSDP1) makes a converted weight {list(shape)} plain, and its layer would run in high "
        "precision: shard with fully_shard (FSDP2), from torch.distributed.fsdp, after quantize_"
    )


def refuse_part(shape: Sequence[int]) -> NoReturn:
    """Refuse a product with a part of a weight, which torch's tensor parallelism would make: no recipe describes it."""
    raise ValueError(
        f"a product with a part, {list(shape)}, of a converted weight, as in torch's ColwiseParallel and RowwiseParallel or "
        "sharded by columns, is not supported: use HaloColwiseParallel and HaloRowwiseParallel of "
        "halo_tensor.tensor_parallel, or leave the layer out of parallelize_module or of quantize_ (skip, filter_fn)"
    )


def refuse_dtensor(shape: Sequence[int], local: Any) -> NoReturn:
    """Refuse a DTensor as a weight in a forward: DTensor's own product of its local tensor is in high precision.

    Args:
        shape: of the layer.
        local: its local tensor, if that is a converted weight; else None.
    """
    if local is not None and local.shard_role.is_part:
        refuse_part(local.shape)
    raise ValueError(
        f"the weight of a converted layer {list(shape)} is a DTensor in its forward, as distribute_tensor and torch's tensor "
        "parallelism make it, and would be multiplied in high precision: shard with fully_shard (FSDP2), and split with "
        "HaloColwiseParallel and HaloRowwiseParallel of halo_tensor.tensor_parallel"
    )


def refuse_accelerate() -> NoReturn:
    """Refuse accelerate, which calls the class of a parameter with a plain tensor that takes the parameter's place."""
    raise TypeError(
        'accelerate\'s offloading (cpu_offload, disk_offload, a device_map with "cpu" or "disk") and its loading of '
        "checkpoints (load_checkpoint_and_dispatch) put plain tensors in place of converted weights: keep every converted "
        "layer on a GPU, and load a checkpoint before quantize_ or with model.load_state_dict"
    )


def refuse_export() -> NoReturn:
    """Refuse torch.export, which does not support these tensor subclasses."""
    raise RuntimeError("torch.export knows no converted weights: call dequantize_(model) first")
