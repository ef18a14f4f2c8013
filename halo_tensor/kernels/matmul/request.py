"""A request for a product of quantised operands, which backends answer."""

from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.launch import cdiv
from halo_tensor.recipe import Rotation


class SizeClass(NamedTuple):
    """The class of a product's sizes, by which its kernel and its tile are chosen.

    A size of the result or of the contraction may be a number of tokens, which changes from batch to batch, so that plans are
    made for classes only.

    Attributes:
        few: 16, 32 or 64 if the result has at most as many rows; 0 for more than 64.
        tiles: whether there is an output tile of 128×128 for every multiprocessor.
        wide_tiles: how many multiprocessors have a tile of 128×256: 0 for less than 70 %, 1 for less than all, 2 for all.
        vendor: whether the vendor's library is faster at this size.
    """

    few: int
    tiles: bool
    wide_tiles: int
    vendor: bool = False


def size_class(m: int, n: int, multiprocessors: int) -> SizeClass:
    """Return the class of a result [m, n] on a GPU with this number of multiprocessors."""
    tiles, wide = cdiv(m, 128) * cdiv(n, 128), cdiv(m, 128) * cdiv(n, 256)
    wide_tiles = 2 if wide >= multiprocessors else 1 if wide >= 0.7 * multiprocessors else 0
    few = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 0
    return SizeClass(few, tiles >= multiprocessors, wide_tiles)


class Request(NamedTuple):
    """A product of codes a [m, k] and b_t [n, k]:

        out [rows, n] = R_row (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_column diag(gain) + bias

    A request stands for all m, k and rows of one class.

    Attributes:
        device: where the operands are.
        a, b: the dtypes of the codes.
        n: the columns of ``out``.
        a_scale, b_scale: the kind of each scale: 0 for none, 1 for one number, 2 for a vector.
        gain: whether there is a gain.
        bias: the dtype of the bias, or None.
        row_rotation, column_rotation: the rotations that the epilogue undoes.
        dtype: the dtype of ``out``.
        size: the class of m, k and rows.
    """

    device: torch.device
    a: torch.dtype
    b: torch.dtype
    n: int
    a_scale: int
    b_scale: int
    gain: bool
    bias: torch.dtype | None
    row_rotation: Rotation | None
    column_rotation: Rotation | None
    dtype: torch.dtype
    size: SizeClass

    @property
    def integer(self) -> bool:
        """Whether the codes are int8."""
        return self.a == torch.int8

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that all kernels of products share."""
        return {
            "A_SCALE": self.a_scale, "B_SCALE": self.b_scale, "GAIN": self.gain, "BIASED": self.bias is not None,
            "INTEGER": self.integer,
        }  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 4 for a CPU, where the interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
