"""The hooks that FSDP2 calls before and after each all-gather: a converted weight is sent as its codes.

``fully_shard`` cuts a parameter into shards of rows, one per rank, and gathers them where a block needs the whole weight. A
row's rotation and scale concern that row alone, so every rank quantises its own rows when the optimiser writes to them, and
codes are sent: 1 byte per element, fp6 ¾ of one, and one float32 scale per row. Both lie in one tensor
(:mod:`halo_tensor.weight.sent_rows`), since FSDP2 handles each tensor that a weight sends by several ops in every gather. The
result is the operand that the products multiply with: no code is copied or cast, and nothing is quantised again.

Exceptions:

- Scales of blocks, which are no vector, are sent as a second tensor.
- Per-tensor scales are the one thing that ranks must agree on: see :mod:`halo_tensor.weight.common_scales`.
- Where the number of ranks does not divide out_features, FSDP accepts only tensors of a padded shard's size. Row scales are
  then sent in a small all-gather of their own, and fp6 as whole bytes. The same is true of experts that are cut into rows of
  each expert (``Shard(1)``), whose codes FSDP puts together again.
- An operand that a recipe leaves in high precision is gathered in high precision.
"""

import inspect
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from halo_tensor.fences.pytorch import local_tensor, preserved_version
from halo_tensor.operand.experts import ExpertsOperand
from halo_tensor.operand.gains import moved
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import TENSOR
from halo_tensor.weight.agreement import description, digest
from halo_tensor.weight.common_scales import share_scales
from halo_tensor.weight.refusals import named, refuse_fsdp1
from halo_tensor.weight.roles import ShardRole
from halo_tensor.weight.sent_rows import alias, can_be_sent_in_rows, codes_in, put_in_rows, rows_of, scales_in, send_scales
from halo_tensor.weight.tensor import HaloWeight

#: The tensors that a rank sends, and what the hook after the all-gather needs to know besides them.
Sent = tuple[tuple[torch.Tensor, ...], dict[str, Any]]

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
#: Layers whose recipe was found to be the same on every rank.
_agreed: WeakSet[torch.nn.Module] = WeakSet()


class _PreAllGather:
    """The object that ``HaloWeight.fsdp_pre_all_gather`` returns; FSDP2 calls it before each all-gather.

    FSDP2 calls ``inspect.signature(hook)`` before every call. For a bound method that costs more than the hook itself, so this
    class carries a precomputed ``__signature__``.
    """

    __slots__ = ("shard",)
    __signature__: inspect.Signature

    def __init__(self, shard: HaloWeight) -> None:
        self.shard = shard

    def __call__(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: torch.nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> Sent:
        """Return what this rank sends of its rows.

        Raises:
            ValueError: another rank converted this layer with another config, or as frozen.
        """
        shard = self.shard
        state, operand = shard.codes_state, shard.operand
        if state.sent is None:
            _check_agreement(shard, mesh, outer_size, module)
        shard.follow()
        ranks = mesh.size()
        if operand is None:
            assert shard.master is not None
            rows = -(-outer_size[0] // ranks)
            return (_pad(shard.master, rows).to(mp_policy.param_dtype or shard.dtype),), {"size": outer_size}
        if operand.scale is not None and operand.granularity == TENSOR and not state.has_common_scale(operand):
            share_scales([shard], mesh)
        is_even = outer_size[0] % ranks == 0 and not _is_cut_inside(operand, outer_size)
        if state.sent is None and ranks > 1 and is_even and can_be_sent_in_rows(operand):
            state.sent, state.scales_in_rows = _rows_to_send(operand, outer_size)
        if state.sent is not None:
            if not state.sends_scales:
                send_scales([shard])
            return state.sent
        sent = _to_send(operand, mesh, outer_size, is_even)
        # Kept only if no copy was made: copies would take memory for as long as the shard lives, and become out of date.
        codes = cast(torch.Tensor, operand.codes)
        if sent[0][0].data_ptr() == codes.data_ptr() and is_even:
            state.sent = sent
        return sent


_PreAllGather.__signature__ = inspect.signature(_PreAllGather(cast(Any, None)))


def _rows_to_send(operand: HadamardQuantTensor, outer_size: torch.Size) -> tuple[Sent, torch.Tensor]:
    """Return the rows in which codes and scales lie, to be sent, and the scales in them."""
    put_in_rows(operand)  # they are already, unless the shard was copied or loaded
    rows, codes = rows_of(operand), cast(torch.Tensor, operand.codes)
    metadata = {"size": outer_size, "dtype": codes.dtype, "width": codes.shape[1]}
    return ((rows,), metadata), scales_in(rows, codes.shape[1])


def _is_cut_inside(operand: HadamardQuantTensor, outer_size: torch.Size) -> bool:
    """Whether a shard has some rows of each expert's matrix."""
    return operand.shape[1:] != outer_size[1:]


def _matrix_rows(operand: HadamardQuantTensor, size: torch.Size) -> int:
    """Return how many rows of codes a weight of this size has."""
    if not isinstance(operand, ExpertsOperand):
        return size[0]
    return size[0] * size[2 if operand.in_features_first else 1]


def _to_send(operand: HadamardQuantTensor, mesh: DeviceMesh, outer_size: torch.Size, even: bool) -> Sent:
    ranks, inside = mesh.size(), _is_cut_inside(operand, outer_size)
    operand = operand if even else operand.unpacked()
    padded = operand.shape if inside else torch.Size((-(-outer_size[0] // ranks), *operand.shape[1:]))
    rows = _matrix_rows(operand, padded)
    codes, scale = _pad(cast(torch.Tensor, operand.codes), rows).contiguous(), operand.scale
    metadata: dict[str, Any] = {"size": outer_size, "dtype": codes.dtype, "scale": scale}
    dtype = torch.uint8 if codes.itemsize == 1 else codes.dtype  # gloo sends no fp8
    sent = [alias(codes, dtype, codes.shape, codes.stride())]
    if operand.ndim == 3 and not even:
        sent = [sent[0].view(padded)]  # the size that FSDP looks for
    if scale is not None and operand.granularity.block:
        scale = _pad(scale, operand.granularity.shape(rows, codes.shape[1])[0])
        if even and ranks > 1:
            sent, metadata["scale"] = [*sent, scale], None
        elif inside and ranks > 1:
            of_ranks = _all_gather(scale, mesh).view(ranks, padded[0], -1)
            metadata["scale"] = of_ranks.transpose(0, 1).flatten()
        elif ranks > 1:
            rows = _matrix_rows(operand, outer_size)
            metadata["scale"] = operand.granularity.cut(_all_gather(scale, mesh), "rows", 0, rows)
        # A lone rank has all scales; FSDP takes only the first tensor that it sends.
    return tuple(sent), metadata


def _post_all_gather(
    shard: HaloWeight,
    outputs: tuple[torch.Tensor, ...],
    metadata: dict[str, Any],
    param_dtype: torch.dtype,
    *,
    out: HaloWeight | None = None,
) -> tuple[HaloWeight, tuple[()]] | None:
    """Make the whole weight from what all ranks sent; FSDP2 calls it as ``HaloWeight.fsdp_post_all_gather``.

    The first call returns a new weight of ``param_dtype``, whose gradients have this dtype, and the tensors to be freed with
    it. Later calls bring ``out`` up to date in place, since autograd has saved its codes.
    """
    size, operand = metadata["size"], shard.operand
    if isinstance(out, DTensor):  # of a part for tensor parallelism
        out = cast(HaloWeight, local_tensor(out))
    if operand is None:
        return None if out is not None else (_gathered(shard, outputs[0][: size[0]], None), ())
    width = metadata.get("width")  # if codes and scales lie in rows
    if out is not None:  # its codes are views of the outputs, and so up to date already
        _bring_scales_up_to_date(shard, out, metadata["scale"] if width is None else out.codes_state.scales_in_rows)
        return None
    if width is None:
        codes = outputs[0].view(metadata["dtype"])
        if codes.ndim == 3:
            codes = codes.view(-1, cast(ExpertsOperand, operand).features[1])
        codes, scale = codes[: _matrix_rows(operand, size)], metadata["scale"]
        scale = outputs[1] if len(outputs) > 1 else None if scale is None else scale.clone()
        return _gathered_operand(shard, size, param_dtype, codes, scale), ()
    scales = scales_in(outputs[0], width)
    codes = codes_in(outputs[0], width, metadata["dtype"])
    weight = _gathered_operand(shard, size, param_dtype, codes, scales.clone(memory_format=torch.contiguous_format))
    weight.codes_state.scales_in_rows = scales
    return weight, ()


def _bring_scales_up_to_date(shard: HaloWeight, gathered: HaloWeight, scale: torch.Tensor | None) -> None:
    """Copy the scales that ranks have sent, float32 [out] or [], to those of a weight that was gathered before.

    In backward a weight is gathered again to be what it was in forward. Its scales, unlike its codes, were not freed.
    """
    if scale is None:
        return
    in_backward = torch._C._current_graph_task_id() != -1
    if not (in_backward and shard.codes_state.has_sent_scales):
        assert gathered.scale is not None
        _overwrite(gathered.scale, scale)
    shard.codes_state.has_sent_scales = shard.codes_state.sends_scales


def _gathered_operand(
    shard: HaloWeight, size: torch.Size, param_dtype: torch.dtype, codes: torch.Tensor, scale: torch.Tensor | None
) -> HaloWeight:
    """Return the gathered weight of these codes and scales."""
    operand = cast(HadamardQuantTensor, shard.operand)
    operand = operand._with(size=size, dtype=param_dtype, codes=codes, scale=scale)
    operand.gains = moved(operand.gains, codes.device)  # shards may be offloaded
    return _gathered(shard, None, operand)


def _gathered(shard: HaloWeight, master: torch.Tensor | None, operand: HadamardQuantTensor | None) -> HaloWeight:
    weight = HaloWeight(master, operand, shard.recipe)
    # A frozen weight has no master anywhere. It is WHOLE, so F.linear raises an error if it is to be trained.
    weight.shard_role = ShardRole.WHOLE if shard.master is None else ShardRole.GATHERED
    return weight


def _check_agreement(weight: HaloWeight, mesh: DeviceMesh, outer_size: torch.Size, module: torch.nn.Module) -> None:
    """Raise ValueError if ranks have converted a layer differently. It is checked once, when the layer is first gathered."""
    if module in _agreed:
        return
    here = description(weight, outer_size)
    digests = _all_gather(digest(here, mesh.device_type), mesh).tolist()
    if len(set(digests)) > 1:
        others = [rank for rank, other in enumerate(digests) if other != digest]
        raise ValueError(
            f"a weight of {named(outer_size)} is converted differently on ranks {others} of its mesh than on rank "
            f"{mesh.get_local_rank()}: call quantize_ with the same config on every rank, and balance_ with the same batch. "
            f"Here it is: {here}"
        )
    _agreed.add(module)


def _all_gather(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the tensors of all ranks, concatenated."""
    out = tensor.new_empty(mesh.size() * tensor.shape[0], *tensor.shape[1:])
    _ALL_GATHER(out, tensor.contiguous(), group=mesh.get_group())
    return out


def _overwrite(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write in place, unseen by autograd: a weight gathered again for backward is the one that forward saved."""
    with preserved_version(tensor):
        tensor.copy_(value)


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _refuse_fsdp1(weight: HaloWeight, value: bool) -> None:
    refuse_fsdp1(weight.shape)


#: Attributes of a parameter that FSDP looks up by name.
_LOOKED_UP: dict[str, Any] = {
    "fsdp_pre_all_gather": property(_PreAllGather),
    "fsdp_post_all_gather": _post_all_gather,
    # FSDP1 sets it on parameters that it takes apart and keeps (use_orig_params=True; torch 2.11 to 2.15).
    "_fsdp_flattened": property(lambda weight: False, _refuse_fsdp1),
}
for _name, _attribute in _LOOKED_UP.items():
    setattr(HaloWeight, _name, _attribute)
