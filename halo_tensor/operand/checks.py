"""Checks of what an operand is made from. :meth:`HadamardQuantTensor.from_hp` documents the errors."""

import torch

from halo_tensor.operand.gains import Gains
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference.hadamard import factors


def check_matrix(x: torch.Tensor, holds_codes: bool, row_rotation: Rotation | None, column_rotation: Rotation | None) -> None:
    """Raise if ``x`` is no floating matrix, no codes are asked for, or a rotation has no Hadamard matrix."""
    if not x.is_floating_point():
        raise TypeError(f"only floating tensors can be quantised; got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"an operand is a matrix; got shape {list(x.shape)}. Flatten the leading dimensions first")
    if not holds_codes:
        raise ValueError("ask for rows, columns or both: an operand with no codes is none")
    for name, rotation in (("row_rotation", row_rotation), ("column_rotation", column_rotation)):
        if rotation is not None and (rotation.block is None or factors(rotation.block) is None):
            raise ValueError(f"{name} {rotation} has no Hadamard matrix of its block; take hadamard.fit(rotation, width)")


def check_gains(gains: Gains | None, x: torch.Tensor, format: Format | None) -> None:
    """Raise if there are gains that ``x`` cannot carry in ``format``."""
    if gains is None:
        return
    if format is None or gains[0].shape != x.shape[1:]:
        raise ValueError(f"gains {list(gains[0].shape)} do not fit the columns of {list(x.shape)}, or there is no format")
    if not x.is_meta and gains[0].device != x.device:
        raise ValueError(f"gains on {gains[0].device} for a matrix on {x.device}: take gains.moved(gains, x.device)")
