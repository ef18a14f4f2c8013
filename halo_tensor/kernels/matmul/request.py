"""What is asked of a product's kernel, and by what it is planned."""

from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.rotate import Matrix
from halo_tensor.recipe import Rotation


class Request(NamedTuple):
    """out [rows, n] = R_left (diag(a_scale) a b_tᵀ diag(b_scale)) Rᵀ_right diag(gain) + bias.

    a [m, k] and b_t [n, k] are codes.

    Attributes:
        a_scale, b_scale: 0 none, 1 one number, 2 a vector.
        gain: whether there is one.
        bias: its dtype, or None.
        left, right: the rotations that the epilogue undoes.
        dtype: of out.
    """

    a: Matrix
    b_t: Matrix
    rows: int
    a_scale: int
    b_scale: int
    gain: bool
    bias: torch.dtype | None
    left: Rotation | None
    right: Rotation | None
    dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int]:
        """m, n and k."""
        (m, k), n = self.a.shape, self.b_t.shape[0]
        return m, n, k

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def integer(self) -> bool:
        return self.a.dtype == torch.int8

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that all kernels of products have."""
        return {
            "A_SCALE": self.a_scale, "B_SCALE": self.b_scale, "GAIN": self.gain, "BIASED": self.bias is not None,
            "INTEGER": self.integer,
        }  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
