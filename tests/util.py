"""What several test modules share."""

from contextlib import contextmanager
from math import sqrt

import torch
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HadamardQuantTensor, HaloWeight
from halo_tensor.recipe import Format

WIDTHS = [1, 2, 7, 16, 48, 64, 100, 128, 200, 256, 576]
WIDE = [1536, 4864, 14336, 18944]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def rounding_bound(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """The largest possible |x − codes·scale| of a matrix whose elements are at most format.max·scale, elementwise. ``scale``
    broadcasts against x."""
    if format.uniform:
        return (scale / 2).expand_as(x)
    smallest_step = scale * 2.0 ** (format.min_exponent - format.mantissa_bits)
    return torch.maximum(x.abs() * 2.0 ** -(format.mantissa_bits + 1), smallest_step / 2)


def typical_error(format: Format) -> float:
    """Of a product of two Gaussian matrices with row scales, relative (Frobenius)."""
    one = {"int8": 0.0076, "int4": 0.14, "fp4_e1m2": 0.14, "fp4_e3m0": 0.2}.get(format.name) or 2.0 ** -(
        format.mantissa_bits + 1
    ) * 0.42
    return sqrt(2) * one


class OpLog(TorchDispatchMode):
    """Records the calls of this library's ops: which product ran, and on what codes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (HadamardQuantTensor, HaloWeight)) for t in types):
            return NotImplemented  # let the subclass take it apart; its inner ops come here again
        if func.namespace == "halo":
            dtype = args[0].dtype if "mm" in func._opname else args[3] if "quantize" in func._opname else None
            self.calls.append((func._opname, dtype))
        return func(*args, **(kwargs or {}))

    def products(self):
        return [dtype for name, dtype in self.calls if name == "scaled_mm"]


@contextmanager
def saved_bytes():
    """Counts what autograd saves: yields a function that returns the bytes so far, each storage once, parameters left out."""
    storages = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def total(model: torch.nn.Module) -> int:
        parameters = {s._cdata for p in model.parameters() for s in get_untyped_storages(p)}  # of subclasses, the inner
        return sum(s.nbytes() for key, s in storages.items() if key not in parameters)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total
