"""Values of converted weights outside of PyTorch's ops: NumPy, lists, DLPack, storages, shared memory."""

from typing import Any

import torch

from halo_tensor.weight.attachments import keep_hooks
from halo_tensor.weight.handlers import implements
from halo_tensor.weight.tensor import HaloWeight


@implements(torch.Tensor.numpy)
def _numpy(func: Any, weight: HaloWeight, *, force: bool = False) -> Any:
    """Return a copy, since writes to shared memory would not be noticed."""
    return weight.dequantize().detach().clone().requires_grad_(weight.requires_grad).numpy(force=force)


@implements(torch.Tensor.tolist)
def _tolist(func: Any, weight: HaloWeight) -> Any:
    return weight.dequantize().tolist()


@implements(torch.Tensor.__dlpack__)
def _dlpack(func: Any, weight: HaloWeight, *args: Any, **options: Any) -> None:
    raise BufferError("a converted weight has no memory of its own for DLPack: export weight.dequantize()")


@implements(torch.Tensor.storage)
def _storage(func: Any, weight: HaloWeight) -> None:
    """Refuse; safetensors asks for it."""
    raise RuntimeError("a converted weight has no memory of its own: save model.state_dict(), or weight.dequantize()")


@implements(torch.Tensor.share_memory_)
def _share_memory(func: Any, weight: HaloWeight) -> HaloWeight:
    for tensor in [weight.master] if weight.operand is None else [weight.master, *weight.operand.parts]:
        if tensor is not None:
            tensor.share_memory_()
    keep_hooks(func, weight, weight)
    return weight
