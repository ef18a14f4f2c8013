"""The ops with which FSDP2 cuts a converted weight into shards of rows.

:mod:`halo_tensor.weight.fsdp_hooks` has what FSDP2 sends of a shard. Any other op sees the dense weight.
"""

import warnings
from typing import Any

import torch

from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.products.steps import reuses_operand
from halo_tensor.weight.copies import alias, plain_view, renewed
from halo_tensor.weight.handlers import implements
from halo_tensor.weight.refusals import named
from halo_tensor.weight.roles import ShardRole
from halo_tensor.weight.sent_rows import can_be_sent_in_rows, put_in_rows
from halo_tensor.weight.tensor import HaloWeight

aten = torch.ops.aten


def _rows(weight: HaloWeight, start: int, stop: int, role: ShardRole) -> HaloWeight:
    """Return rows ``start`` to ``stop`` of a weight whose codes are in step, as a weight on the same memory: those experts of
    a weight of experts.
    """
    start, stop = min(start, weight.shape[0]), min(stop, weight.shape[0])
    master = None if weight.master is None else weight.master[start:stop]
    operand = weight.operand
    if isinstance(operand, ExpertsOperand):
        operand = operand.experts_of(start, stop)
    elif operand is not None:
        assert operand.codes is not None
        granularity, scale = operand.granularity, operand.scale
        # A chunk that begins inside of a block takes the scale of that block. It is no shard: see _check_shardable.
        first = start - start % (granularity.length("rows") or 1)
        scale = None if scale is None else granularity.cut(scale, "rows", first, stop)
        size = torch.Size((stop - start, weight.shape[1]))
        operand = operand._with(size=size, codes=operand.codes[start:stop], scale=scale)
    rows = HaloWeight(master, operand, weight.recipe)
    rows.shard_role = role
    rows.mark_in_step()
    return rows


@implements(aten.split.Tensor)
def _split(op: Any, weight: HaloWeight, size: int, dim: int = 0) -> Any:
    """Cut a whole weight, as ``torch.chunk`` does. Chunks along rows hold their codes, which are copied to a shard."""
    if weight.operand is None or weight.shard_role is not ShardRole.WHOLE:
        return NotImplemented
    dim %= weight.ndim
    if dim == 1 and weight.ndim == 3 and not weight.in_features_first:
        if weight.master is not None:
            return NotImplemented  # plain views; a shard quantises its rows to the same codes when one is copied to it
        chunks = [_rows_of_each(weight, start, start + size) for start in range(0, max(weight.shape[1], 1), size)]
    elif dim:
        if not torch.is_grad_enabled():  # as when FSDP shards
            warnings.warn(_warning_of_plain_parts(weight, dim), stacklevel=4)
        chunks = [plain_view(weight, columns) for columns in weight.dequantize().split(size, dim)]
    else:
        weight.follow()
        starts = range(0, max(weight.shape[0], 1), size)
        chunks = [_rows(weight, start, start + size, ShardRole.CHUNK) for start in starts]
    for chunk in chunks:
        chunk.base, chunk.shard_role = weight, ShardRole.CHUNK
    return chunks


def _rows_of_each(weight: HaloWeight, start: int, stop: int) -> HaloWeight:
    """Return rows of each expert's matrix of a frozen weight."""
    assert isinstance(weight.operand, ExpertsOperand)
    return HaloWeight(None, weight.operand.rows_of_each(start, min(stop, weight.shape[1])), weight.recipe)


def _warning_of_plain_parts(weight: HaloWeight, dim: int) -> str:
    what = f"of a converted weight of {list(weight.shape)} are plain tensors: if shard_placement_fn asked for them,"
    if weight.ndim == 2:
        return f"columns {what} this layer now trains in high precision. Shard it along dim 0"
    along = "dim 0, experts" if weight.in_features_first else "dim 0, experts, or dim 1, out_features"
    return f"parts along dim {dim} {what} the products of these experts will raise an error. Shard it along {along}"


@implements(aten.new_zeros.default)
def _new_zeros(op: Any, weight: HaloWeight, size: list[int], **options: Any) -> Any:
    """Make a padded shard, to be filled."""
    changed = any(options.get(name) is not None for name in ("dtype", "device"))
    if not _is_size_of_shard(weight, size) or weight.is_gathered or changed:
        return NotImplemented
    if not weight.recipe.output.right.is_plain:
        _check_shardable(weight, size[0])
    padded = renewed(weight, torch.zeros(size, dtype=weight.dtype, device=weight.device), ShardRole.PADDED)
    if padded.operand is not None:
        padded.operand = padded.operand.packed()  # as it is sent
        shared_out = size[0] < weight.shape[0] and weight.shape[0] % max(size[0], 1) == 0
        if shared_out and can_be_sent_in_rows(padded.operand):
            put_in_rows(padded.operand)
    return padded


def _is_size_of_shard(weight: HaloWeight, size: list[int]) -> bool:
    """Whether a weight can be cut into shards of this size: of some of its rows, or of some experts or rows of each expert."""
    own = list(weight.shape)
    if len(size) != len(own):
        return False
    inside = len(own) == 3 and not weight.in_features_first and weight.operand is not None
    return size[1:] == own[1:] or (inside and size[::2] == own[::2])


def _check_shardable(weight: HaloWeight, rows: int) -> None:
    """Raise ValueError if the codes of a weight cannot be cut into shards of ``rows`` rows."""
    obstacle = None
    if weight.operand is None:
        obstacle = (
            "it holds no codes, which are what FSDP sends; convert it with keep_codes=True and memory='speed', the defaults. "
            "activations='int8' goes with them"
        )
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
        raise ValueError(f"a weight of {named(weight.shape)} cannot be sharded: {obstacle}")


@implements(aten.slice.Tensor)
def _slice(op: Any, padded: HaloWeight, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    """Return a shard without its padding.

    FSDP fills the result of one call and keeps that of another: both must share one state, which knows of a common scale.
    """
    dim %= padded.ndim
    length = padded.shape[dim] if stop is None else min(stop, padded.shape[dim])
    takes_all = dim and length == padded.shape[dim]  # rows of each expert are never padded
    if padded.shard_role is not ShardRole.PADDED or (dim and not takes_all) or start or step != 1:
        return NotImplemented
    rows = padded.shape[0] if dim else length
    if padded.unpadded is None or padded.unpadded.shape[0] != rows:
        padded.unpadded = _rows(padded, 0, rows, ShardRole.SHARD)
    return alias(padded.unpadded)


@implements(aten.as_strided.default)
def _as_strided(op: Any, weight: HaloWeight, size: list[int], stride: list[int], offset: int | None = None) -> Any:
    if (tuple(size), tuple(stride), offset or 0) != (tuple(weight.shape), weight.stride(), weight.storage_offset()):
        return NotImplemented
    return alias(weight)
