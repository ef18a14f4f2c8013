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
        pack: Hook = (lambda part: part) if outer is None else outer[0]
        self.codes, self.scales = map(pack, ops.compress(contiguous, bits))

    def unpack(self) -> torch.Tensor:
        """Return the tensor, but for rounding, with the strides that it had if it had no gaps."""
        unpack: Hook = (lambda part: part) if self.outer is None else self.outer[1]
        codes, scales = unpack(self.codes), unpack(self.scales)
        x = ops.decompress(codes, scales, self.shape, self.dtype)
        return x if self.order is None else x.permute(inverse(self.order))


class Kept:
    """A tensor that is saved as it is. PyTorch counts no writes to tensors that pass through hooks, so this class does."""

    def __init__(self, x: torch.Tensor, outer: tuple[Hook, Hook] | None = None):
        self.version = None if x.is_inference() else x._version
        self.outer = outer
        # Not x itself: its gradient function would hold it, and it the function.
        self.held: Any = outer[0](x) if outer is not None else x if x.grad_fn is None else x.detach()

    def unpack(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was written to since.
        """
        if self.outer is not None:
            return self.outer[1](self.held)
        if self.version is not None and self.held._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.held.shape)} that backward needs was modified by an inplace operation: it is "
                f"at version {self.held._version}; expected version {self.version} instead. Write to it after backward"
            )
        return self.held


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
