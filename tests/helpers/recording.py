"""Records which ops of the library ran, and what autograd saved."""

from contextlib import contextmanager

import torch
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HadamardQuantTensor, HaloWeight


class OpLog(TorchDispatchMode):
    """Records the names of this library's ops that run, each with the dtype of its codes or the name of its format."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (HadamardQuantTensor, HaloWeight)) for t in types):
            return NotImplemented  # the subclass handles the op, and calls others on its inner tensors
        if func.namespace == "halo":
            dtype = args[0].dtype if "mm" in func._opname else args[3] if "quantize" in func._opname else None
            self.calls.append((func._opname, dtype))
        return func(*args, **(kwargs or {}))

    def products(self):
        return [dtype for name, dtype in self.calls if name == "scaled_mm"]


@contextmanager
def saved_bytes():
    """Yield a function that returns how many bytes autograd has saved so far. Each storage counts once; those of the model's
    parameters do not count."""
    storages = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def total(model: torch.nn.Module) -> int:
        parameters = {
            s._cdata for p in model.parameters() for s in get_untyped_storages(p)
        }  # with subclasses, those of the inner tensors
        return sum(s.nbytes() for key, s in storages.items() if key not in parameters)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total
