"""Values of converted weights outside of PyTorch's ops: NumPy, lists, DLPack, storages, shared memory.

These are methods of :class:`~halo_tensor.weight.tensor.HaloWeight`, not handlers: PyTorch's own methods (``__array__``, for
example) call them with ``__torch_function__`` disabled.
"""

from typing import Any, NoReturn

import torch

from halo_tensor.weight.attachments import keep_hooks
from halo_tensor.weight.tensor import HaloWeight


def _numpy(weight: HaloWeight, *, force: bool = False) -> Any:
    """Return a copy of the dense weight as an array. It is a copy, since writes to shared memory would not be noticed."""
    return weight.dequantize().detach().clone().requires_grad_(weight.requires_grad).numpy(force=force)


def _tolist(weight: HaloWeight) -> list[Any]:
    """Return the dense weight as nested lists."""
    return weight.dequantize().tolist()


def _dlpack(weight: HaloWeight, **options: Any) -> NoReturn:
    """Raise BufferError: there is no memory to export."""
    raise BufferError("a converted weight has no memory of its own for DLPack: export weight.dequantize()")


def _storage(weight: HaloWeight) -> NoReturn:
    """Raise RuntimeError: there is no memory to return. safetensors asks for it."""
    raise RuntimeError("a converted weight has no memory of its own: save model.state_dict(), or weight.dequantize()")


def _share_memory(weight: HaloWeight) -> HaloWeight:
    """Move the master, codes and scales to shared memory, in place."""
    for tensor in [weight.master, *(part for operand in weight.operands for part in operand.parts)]:
        if tensor is not None:
            tensor.share_memory_()
    keep_hooks(torch.Tensor.share_memory_, weight, weight)
    return weight


_METHODS = {
    "numpy": _numpy,
    "tolist": _tolist,
    "__dlpack__": _dlpack,
    "storage": _storage,
    "share_memory_": _share_memory,
}
for _name, _method in _METHODS.items():
    setattr(HaloWeight, _name, _method)
