"""The ops with which FSDP2 cuts a converted weight into shards of rows; what it then sends of them is in
:mod:`halo_tensor.weight.fsdp`. Any other op sees the dense weight.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from halo_tensor.fences.pytorch import is_symbolic
from halo_tensor.products.operands import reuses_operand

aten = torch.ops.aten


def _rows(weight: Any, start: int, stop: int, fsdp: str | None) -> Any:
    """Some rows of a weight, whose codes are in step: a weight on the same memory."""
    start, stop = min(start, weight.shape[0]), min(stop, weight.shape[0])
    master = None if weight.master is None else weight.master[start:stop]
    operand = weight.operand
    if operand is not None:
        scale = None if operand.scale is None else operand.granularity.cut(operand.scale, "rows", start, stop)
        size = torch.Size((stop - start, weight.shape[1]))
        operand = operand._with(size=size, codes=operand.codes[start:stop], scale=scale)
    rows = type(weight)(master, operand, weight.recipe)
    rows.fsdp = fsdp
    rows.in_step()
    return rows


def _split(weight, size, dim=0):
    """``torch.chunk`` of a whole weight: chunks along rows bring their codes along, to be copied to a shard."""
    if weight.operand is None or weight.fsdp is not None:
        return NotImplemented
    if dim % 2:
        if not torch.is_grad_enabled():  # as when FSDP shards
            warnings.warn(
                f"columns of a converted weight of {list(weight.shape)} are plain tensors: if shard_placement_fn asked for "
                "them, this layer now trains in high precision. Shard it along dim 0",
                stacklevel=3,
            )
        chunks = [weight._view(columns) for columns in weight.dequantize().split(size, dim)]
    else:
        weight.follow()
        chunks = [_rows(weight, start, start + size, None) for start in range(0, max(weight.shape[0], 1), size)]
    for chunk in chunks:
        chunk.base, chunk.fsdp = weight, "chunk"
    return chunks


def check_whole(weight: Any) -> None:
    """Refuse to multiply with a part of a weight, which no recipe is for: tensor parallelism does, through DTensor. It cuts
    the detached weight; a chunk of the parameter itself was cut by other code, and is a view like any other. So is a chunk
    that a graph cuts while it is traced: shards were cut before, and come into a graph without their base."""
    if weight.fsdp == "chunk" and (isinstance(weight.base, torch.nn.Parameter) or (weight.base is not None and is_symbolic())):
        return
    if weight.fsdp not in (None, "gathered"):
        raise ValueError(
            f"a product with a part, {list(weight.shape)}, of a converted weight, as in tensor parallelism or sharded by "
            "columns, is not supported: leave the layer out of parallelize_module or of quantize_ (skip, filter_fn)"
        )


def _new_zeros(weight, size, **options):
    """A shard to be filled."""
    changed = any(options.get(name) is not None for name in ("dtype", "device"))
    if len(size) != 2 or size[1] != weight.shape[1] or weight.fsdp == "gathered" or changed:
        return NotImplemented
    if not weight.recipe.output.right.is_plain:
        _check_shardable(weight, size[0])
    zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    padded = weight.renewed(zeros)
    if padded.operand is not None:
        padded.operand = padded.operand.packed()  # as it is sent
    padded.fsdp = "padded"
    return padded


def _check_shardable(weight, rows: int) -> None:
    obstacle = None
    if weight.operand is None:
        obstacle = "it holds no codes, which are what FSDP sends; convert it with keep_codes=True"
    elif weight.operand.row_rotation is not None:
        obstacle = "its recipe rotates out_features, which no shard of rows has whole"
    elif not reuses_operand(weight.recipe):
        obstacle = "in grad_input its recipe quantises it otherwise than in output, and only the latter's codes are gathered"
    elif weight.operand.granularity.two_levels:
        obstacle = "its scales share one float32, on which all ranks would have to agree"
    elif rows % (weight.operand.granularity.length("rows") or 1) and rows != weight.shape[0]:
        length = weight.operand.granularity.length("rows")
        obstacle = f"{rows} rows per rank are not whole blocks of {length}, each of which has one scale"
    if obstacle:
        raise ValueError(f"a weight of {list(weight.shape)} [out, in] cannot be sharded: {obstacle}")


def _slice(padded, dim=0, start=None, stop=None, step=1):
    """A shard without its padding. FSDP fills one and keeps another: both must have the same codes object, by which a common
    scale is known."""
    if padded.fsdp != "padded" or dim % 2 or start or step != 1:
        return NotImplemented
    rows = padded.shape[0] if stop is None else min(stop, padded.shape[0])
    if padded.rows is None or padded.rows.shape[0] != rows:
        padded.rows = _rows(padded, 0, rows, "shard")
    return padded.rows._alias()


def _as_strided(weight, size, stride, offset=None):
    if (tuple(size), tuple(stride), offset or 0) != (tuple(weight.shape), weight.stride(), weight.storage_offset()):
        return NotImplemented
    return weight._alias()


#: Called with the arguments of the op; NotImplemented leaves it to what weights do otherwise.
OPS: dict[Any, Callable] = {
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.slice.Tensor: _slice,
    aten.as_strided.default: _as_strided,
}
