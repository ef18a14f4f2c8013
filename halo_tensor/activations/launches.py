"""Compress saved tensors, and pack masks, in the order in which their elements lie in memory.

In eager code each of these is one launch, recorded once for each size (:mod:`halo_tensor.kernels.recorded`): the dispatcher
and the Python that plans a launch take the CPU longer than the GPU needs for a tensor of a small layer. What a dispatch mode
must see, and every device without kernels, takes ops.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from halo_tensor import ops
from halo_tensor.activations.layout import in_memory_order, inverse, memory_order
from halo_tensor.fences.pytorch import is_watched
from halo_tensor.kernels.device import runs_kernels

_CHANNELS_LAST = torch.channels_last


def without_gaps(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` if its elements fill their memory without gaps, in any order of dimensions, else a contiguous copy."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=_CHANNELS_LAST)):
        return x
    return x if memory_order(x.shape, x.stride()) is not None else x.contiguous()


def compress(x: torch.Tensor, bits: int) -> Sequence[torch.Tensor]:
    """Return :func:`halo_tensor.ops.compress` of the elements of ``x`` in the order of its memory, which has no gaps."""
    if launches_on(x):
        return _launches().compress((x.numel(), bits, x.dtype, x.get_device()), x)
    return ops.compress(in_memory_order(x)[0], bits)


def decompress(
    codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the tensor of this shape and strides that :func:`compress` got, but for rounding."""
    if launches_on(codes):
        numbers = shape, strides, dtype, codes.shape[1], codes.get_device()
        return _launches().decompress(numbers, codes, scales)[0]
    order = _order(shape, strides)
    return ops.decompress(codes, scales, [shape[d] for d in order], dtype).permute(inverse(order))


def pack_mask(x: torch.Tensor) -> torch.Tensor:
    """Return :func:`halo_tensor.ops.pack_mask` of the elements of ``x`` in the order of its memory, which has no gaps."""
    if launches_on(x):
        return _launches().pack_mask((x.numel(), x.dtype, x.get_device()), x)[0]
    return ops.pack_mask(in_memory_order(x)[0])


def unpack_mask(mask: torch.Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return ones and zeros of ``dtype``, with the shape and strides of the tensor that :func:`pack_mask` got."""
    if launches_on(mask):
        return _launches().unpack_mask((shape, strides, dtype, mask.get_device()), mask)[0]
    order = _order(shape, strides)
    return ops.unpack_mask(mask, [shape[d] for d in order], dtype).permute(inverse(order))


def relu(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the larger of 0 and each element of ``x``, for which :func:`launches_on` is true and which has no gaps, and its
    :func:`pack_mask`."""
    return _launches().relu((x.shape, x.stride(), x.dtype, x.get_device()), x)


def masked(e: torch.Tensor, mask: torch.Tensor, shape: torch.Size, strides: tuple[int, ...]) -> torch.Tensor:
    """Return the gradient of :func:`relu`: ``e``, with zeros where its result was zero.

    Args:
        e: the gradient of the result, with any strides.
        mask: of the result.
        shape, strides: of the result.
    """
    if e.stride() != strides:
        e = e.new_empty_strided(shape, strides).copy_(e)
    return _launches().masked((shape, strides, e.dtype, e.get_device()), e, mask)[0]


def launches_on(x: torch.Tensor) -> bool:
    """Whether there are launches for a tensor, and nothing must see ops."""
    return runs_kernels(x.device) and x.numel() > 0 and not is_watched()


def _order(shape: torch.Size, strides: tuple[int, ...]) -> list[int]:
    order = memory_order(shape, strides)
    assert order is not None  # without_gaps has seen to it
    return order


class _Launches:
    """The launches. Their numbers hold the device, too."""

    def __init__(self) -> None:
        from halo_tensor.kernels.quantize import blocks, masks
        from halo_tensor.kernels.recorded import Recorded  # Triton, which a machine without a GPU may lack

        def compress(numbers: tuple, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            count, bits, *_ = numbers
            return blocks.compress(x.as_strided((count,), (1,)), bits)

        def decompress(numbers: tuple, codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor]:
            return (blocks.decompress_into(codes, scales, _empty(codes, *numbers[:3])),)

        def pack_mask(numbers: tuple, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (masks.pack_mask(x.as_strided((numbers[0],), (1,))),)

        def unpack_mask(numbers: tuple, mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (masks.unpack_mask_into(mask, _empty(mask, *numbers[:3])),)

        self.relu = Recorded(lambda numbers, x: masks.relu(x))
        self.masked = Recorded(lambda numbers, e, mask: (masks.masked(e, mask),))
        self.compress, self.decompress = Recorded(compress), Recorded(decompress)
        self.pack_mask, self.unpack_mask = Recorded(pack_mask), Recorded(unpack_mask)


def _empty(like: Any, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Any:
    return like.new_empty_strided(shape, strides, dtype=dtype)


@cache
def _launches() -> _Launches:
    return _Launches()
