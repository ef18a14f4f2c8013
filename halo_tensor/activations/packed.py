"""Tensors that are saved as codes."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.activations.launches import compress, decompress, pack_mask, unpack_mask, without_gaps

Hook = Callable[[Any], Any]


class Packed:
    """A tensor that is saved as codes.

    Args:
        x: the tensor.
        bits: of a code.
        outer: the hooks on saved tensors around ours, pack and unpack, or None.
        rectified: whether a ReLU made it. Backward then asks which elements are zero, and rounded codes do not say that. So a
            mask is saved, too, and zeros come back as zeros, other elements as positive numbers.

    Attributes:
        codes, scales: what :func:`halo_tensor.ops.compress` returned, after ``outer`` has packed them.
        mask: that of a rectified tensor, or None.
    """

    def __init__(self, x: torch.Tensor, bits: int, outer: tuple[Hook, Hook] | None = None, rectified: bool = False):
        x = without_gaps(x)
        self.shape, self.strides, self.dtype, self.outer = x.shape, x.stride(), x.dtype, outer
        codes, scales = compress(x, bits)
        self.codes, self.scales = _packed_by(outer, codes), _packed_by(outer, scales)
        self.mask = _packed_by(outer, pack_mask(x)) if rectified else None

    def unpack(self) -> torch.Tensor:
        """Return the tensor, but for rounding, with the strides that it had if it had no gaps."""
        codes, scales = _unpacked_by(self.outer, self.codes), _unpacked_by(self.outer, self.scales)
        x = decompress(codes, scales, self.shape, self.strides, self.dtype)
        if self.mask is None:
            return x
        positive = unpack_mask(_unpacked_by(self.outer, self.mask), self.shape, self.strides, torch.bool)
        return torch.where(positive, x.clamp_min(torch.finfo(x.dtype).tiny), 0)


class Mask:
    """A tensor of which one bit an element is saved: whether it is not ≤ 0. It comes back as ones and zeros."""

    def __init__(self, x: torch.Tensor, outer: tuple[Hook, Hook] | None = None):
        x = without_gaps(x)
        self.shape, self.strides, self.dtype, self.outer = x.shape, x.stride(), x.dtype, outer
        self.held = _packed_by(outer, pack_mask(x))

    def unpack(self) -> torch.Tensor:
        """Return ones and zeros, with the strides that the tensor had if it had no gaps."""
        return unpack_mask(_unpacked_by(self.outer, self.held), self.shape, self.strides, self.dtype)


class Narrow:
    """Integers that are saved in fewer bits, which hold them all."""

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, outer: tuple[Hook, Hook] | None = None):
        self.dtype, self.outer = x.dtype, outer
        self.held = _packed_by(outer, x.to(dtype))

    def unpack(self) -> torch.Tensor:
        """Return the integers."""
        return _unpacked_by(self.outer, self.held).to(self.dtype)


def _packed_by(outer: tuple[Hook, Hook] | None, x: torch.Tensor) -> Any:
    return x if outer is None else outer[0](x)


def _unpacked_by(outer: tuple[Hook, Hook] | None, held: Any) -> torch.Tensor:
    return held if outer is None else outer[1](held)


class Kept:
    """A tensor that is saved as it is. PyTorch counts no writes to tensors that pass through hooks, so this class does."""

    __slots__ = "held", "outer", "version"

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

    def pack(self, x: torch.Tensor, bits: int, rectified: bool = False) -> Packed:
        """Return ``x`` as codes."""
        state = x._version, bits, rectified
        seen, found = self._packed.get(x, (None, lambda: None))
        packed = found()
        if packed is None or seen != state:
            packed = Packed(x, bits, rectified=rectified)
            self._packed[x] = state, ref(packed)
        return packed
