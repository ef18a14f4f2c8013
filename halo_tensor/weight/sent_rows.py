"""The memory of a shard that FSDP2 sends: rows of codes, each followed by its scale, so that a weight sends one tensor.

::

    | codes | up to a multiple of 16 bytes | scale, float32 | up to a multiple of 128 bytes |

The codes of a shard, and those of the gathered weight, are views of such rows, which kernels read as they are. Kernels take no
stride for scales, so both also have their scales as a vector: a shard's are copied into the rows when they have changed, and a
gathered weight's are copied out of them.
"""

import torch

from halo_tensor.fences.pytorch import copy_all_
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import ROW
from halo_tensor.reference.codes import aligned
from halo_tensor.weight.tensor import HaloWeight

#: Rows begin at multiples of so many bytes. Products read rows at multiples of 32 bytes 1 % slower, at multiples of 16 bytes
#: 2 to 5 % (docs/notes/launching.md).
ALIGNMENT = 128


def row_bytes(width: int) -> int:
    """Return the bytes of a row with ``width`` bytes of codes and a scale."""
    return -(-(aligned(width) + 4) // ALIGNMENT) * ALIGNMENT


def can_be_sent_in_rows(operand: HadamardQuantTensor) -> bool:
    """Whether an operand has codes of one byte, and a float32 scale for each row."""
    codes, scale = operand.codes, operand.scale
    if codes is None or scale is None or operand.granularity != ROW:
        return False
    return codes.itemsize == 1 and scale.dtype == torch.float32 and type(codes) is torch.Tensor


def put_in_rows(operand: HadamardQuantTensor) -> None:
    """Move the codes of an operand into rows that can be sent, in place of its own memory."""
    codes = operand.codes
    assert codes is not None
    if _are_in_rows(codes):
        return
    rows, width = codes.shape
    memory = torch.zeros(rows, row_bytes(width), dtype=torch.uint8, device=codes.device)
    moved = alias(memory, codes.dtype, codes.shape, (memory.stride(0), 1))
    moved.copy_(codes)
    operand.codes = moved


def rows_of(operand: HadamardQuantTensor) -> torch.Tensor:
    """Return the rows, uint8 [rows, bytes], in which the codes of an operand lie after :func:`put_in_rows`."""
    codes = operand.codes
    assert codes is not None and _are_in_rows(codes)
    size = codes.shape[0], row_bytes(codes.shape[1])
    return alias(codes, torch.uint8, size, (size[1], 1))


def codes_in(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the codes in rows, [rows, width]."""
    return rows[:, :width].view(dtype)


def scales_in(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return the scales in rows, float32 [rows], a view with a stride."""
    return rows.view(torch.float32)[:, aligned(width) // 4]


def send_scales(weights: list[HaloWeight]) -> None:
    """Copy the scales of shards that were quantised since they were last sent into their rows."""
    behind = [w for w in weights if w.codes_state.scales_in_rows is not None and not w.codes_state.sends_scales]
    if not behind:
        return
    copy_all_([w.codes_state.scales_in_rows for w in behind], [w.scale for w in behind])
    for weight in behind:
        weight.codes_state.sends_scales, weight.codes_state.has_sent_scales = True, False


def alias(tensor: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Return the memory of a tensor as another one. It is no view, which would share its version with ``tensor``."""
    return tensor.new_empty(0, dtype=dtype).set_(tensor.untyped_storage(), tensor.storage_offset(), size, stride)


def _are_in_rows(codes: torch.Tensor) -> bool:
    stride = row_bytes(codes.shape[1])
    whole = codes.untyped_storage().nbytes() == codes.shape[0] * stride and codes.storage_offset() == 0
    return whole and codes.stride(1) == 1 and (codes.stride(0) == stride or codes.shape[0] == 1)
