"""Tensors that are saved as codes."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor import ops
from halo_tensor.activations.layout import in_memory_order, inverse

Hook = Callable[[Any], Any]


class Packed:
    """A tensor that is saved as codes.

    Attributes:
        codes, scales: what :func:`halo_tensor.ops.compress` returned, after ``outer`` has packed them.
        outer: the hooks on saved tensors around ours, pack and unpack, or None.
    """

    def __init__(self, x: torch.Tensor, bits: int, outer: tuple[Hook, Hook] | None = None):
        contiguous, self.order = in_memory_order(x)
        self.shape, self.dtype, self.outer = contiguous.shape, x.dtype, outer
        codes, scales = ops.compress(contiguous, bits)
        self.codes, self.scales = (codes, scales) if outer is None else (outer[0](codes), outer[0](scales))

    def unpack(self) -> torch.Tensor:
        """Return the tensor, but for rounding, with the strides that it had if it had no gaps."""
        codes, scales = self.codes, self.scales
        if self.outer is not None:
            codes, scales = self.outer[1](codes), self.outer[1](scales)
        x = ops.decompress(codes, scales, self.shape, self.dtype)
        return x if self.order is None else x.permute(inverse(self.order))


class Kept:
    """A tensor that is saved as it is. PyTorch counts no writes to tensors that pass through hooks, so this class does."""

    def __init__(self, x: torch.Tensor, outer: tuple[Hook, Hook] | None = None):
        # Not x itself: its gradient function would hold it, and it the function.
        self.tensor = x if x.grad_fn is None else x.detach()
        self.version = None if x.is_inference() else x._version
        self.held, self.outer = None, outer
        if outer is not None:
            self.held, self.tensor = outer[0](x), None

    def unpack(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was written to since.
        """
        if self.outer is not None:
            return self.outer[1](self.held)
        assert self.tensor is not None
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that backward needs was modified by an inplace operation: it is "
                f"at version {self.tensor._version}; expected version {self.version} instead. Write to it after backward"
            )
        return self.tensor


class Pool:
    """Codes of tensors that are alive, so that a tensor which several ops save is compressed once."""

    def __init__(self) -> None:
        #: tensor -> its version, bits, and a weak reference to its codes
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def pack(self, x: torch.Tensor, bits: int) -> Packed:
        """Return ``x`` as codes."""
        state = x._version, bits
        seen, found = self._packed.get(x, (None, lambda: None))
        packed = found()
        if packed is None or seen != state:
            packed = Packed(x, bits)
            self._packed[x] = state, ref(packed)
        return packed
