"""What is asked of a product's kernel, and by what it is planned."""

from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.launch import cdiv
from halo_tensor.recipe import Rotation


class SizeClass(NamedTuple):
    """All that a product's kernel and its tile are chosen by, of the size of its result and of its contraction.

    Either of the two may be a number of tokens, which changes from batch to batch: nothing else about it is planned for.

    Attributes:
        thin: whether there are at most 64 rows.
        tiles: whether there is an output tile of 128×128 for every multiprocessor.
        wide_tiles: how many of them have a tile of 128×256: 0 fewer than 0.7, 1 fewer than all, 2 all.
        vendor: whether the size is one at which the vendor's library is faster.
    """

    thin: bool
    tiles: bool
    wide_tiles: int
    vendor: bool = False


def size_class(m: int, n: int, multiprocessors: int) -> SizeClass:
    """Of a result [m, n]."""
    tiles, wide = cdiv(m, 128) * cdiv(n, 128), cdiv(m, 128) * cdiv(n, 256)
    wide_tiles = 2 if wide >= multiprocessors else 1 if wide >= 0.7 * multiprocessors else 0
    return SizeClass(m <= 64, tiles >= multiprocessors, wide_tiles)


class Request(NamedTuple):
    """out [rows, n] = R_left (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_right diag(gain) + bias.

    a [m, k] and b_t [n, k] are codes. m, k and rows are no part of it, but for their ``size``.

    Attributes:
        device, a, b: the device, and the dtypes of the codes.
        a_scale, b_scale: 0 none, 1 one number, 2 a vector.
        gain: whether there is one.
        bias: its dtype, or None.
        left, right: the rotations that the epilogue undoes.
        dtype: of out.
        size: the class of the sizes that it is for.
    """

    device: torch.device
    a: torch.dtype
    b: torch.dtype
    n: int
    a_scale: int
    b_scale: int
    gain: bool
    bias: torch.dtype | None
    left: Rotation | None
    right: Rotation | None
    dtype: torch.dtype
    size: SizeClass

    @property
    def integer(self) -> bool:
        return self.a == torch.int8

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that all kernels of products have."""
        return {
            "A_SCALE": self.a_scale, "B_SCALE": self.b_scale, "GAIN": self.gain, "BIASED": self.bias is not None,
            "INTEGER": self.integer,
        }  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
