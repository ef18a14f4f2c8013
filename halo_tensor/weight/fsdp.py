"""FSDP2 sends a converted weight as its codes.

``fully_shard`` cuts a parameter into shards of rows, one per rank, and gathers them where a block needs the whole weight. A
row's rotation and scale concern that row alone, so every rank quantises its own rows when the optimiser writes to them, and
what travels is codes: 1 byte per element, fp6 ¾ of one, and one float32 scale per row. What arrives is the operand that the
products multiply with: nothing is cast, and nothing is quantised again.

Where this is not the whole story:

- Per-tensor scales are the one thing that ranks must agree on. :func:`precompute_scales` does so for all layers at once;
  without it every weight costs a small all-reduce of its own.
- Where the ranks do not divide out_features, FSDP accepts nothing but tensors of a padded shard's size. Row scales then
  travel in a small all-gather of their own, and fp6 as whole bytes.
- An operand that a recipe leaves in high precision is gathered in high precision.
"""

import hashlib
import inspect
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.fences.pytorch import local_tensor, preserved_version, set_local_tensor
from halo_tensor.operand.gains import moved
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.ops import library as ops
from halo_tensor.recipe import TENSOR, UNIT, Recipe
from halo_tensor.reference import ops as reference

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
#: Layers whose recipe was found to be the same on every rank.
_agreed: WeakSet = WeakSet()
#: Codes of a shard -> their version when they were given a scale that all ranks share.
_common_scale: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
#: Codes of a shard -> the DTensor of its master that state dicts hold.
_lent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Shardable:
    """The part of :class:`~halo_tensor.HaloWeight` that FSDP2 meets.

    ``fsdp`` says what a weight is to it: None, a whole weight; "chunk", a part of one, to be copied; "padded", the rows of one
    rank, and zeros up to as many as rank 0 has; "shard", those rows, the parameter that the optimiser sees; "gathered", a
    whole weight whose master is in the shards, so that it has none and is trained all the same.
    """

    master: torch.Tensor | None
    operand: HadamardQuantTensor | None
    recipe: Recipe
    fsdp: str | None
    rows: Any = None  # of a padded weight: its shard
    sent: tuple | None = None  # of a shard: what it sends, if that lies where its codes are brought up to date
    shape: torch.Size
    dtype: torch.dtype
    follow: Any
    lend: Any

    @property
    def _fsdp_flattened(self) -> bool:
        """FSDP1 sets this on parameters that it takes apart and keeps (``use_orig_params=True``; torch 2.11 to 2.15)."""
        return False

    @_fsdp_flattened.setter
    def _fsdp_flattened(self, value: bool) -> None:
        refuse_fsdp1(self.shape)

    @property
    def fsdp_pre_all_gather(self) -> "_PreAllGather":
        """FSDP's hook: what this rank sends of its rows."""
        return _PreAllGather(self)

    def _to_send(self, operand, mesh, outer_size):
        ranks = mesh.size()
        rows, even = -(-outer_size[0] // ranks), outer_size[0] % ranks == 0
        operand = operand if even else operand.unpacked()
        codes, scale = _pad(operand.codes, rows).contiguous(), operand.scale
        metadata = {"rows": outer_size[0], "dtype": codes.dtype, "scale": scale}
        sent = [_alias(codes, torch.uint8 if codes.itemsize == 1 else codes.dtype)]  # gloo sends no fp8
        if scale is not None and operand.granularity.block:
            scale = _pad(scale, operand.granularity.shape(rows, codes.shape[1])[0])
            if even and ranks > 1:
                sent, metadata["scale"] = [*sent, scale], None
            elif ranks > 1:
                metadata["scale"] = operand.granularity.cut(_all_gather(scale, mesh), "rows", 0, outer_size[0])
            # Of what a lone rank sends, FSDP only takes the first tensor; it has all scales.
        return tuple(sent), metadata

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """FSDP's hook: the whole weight, made of what all ranks sent. The first time it is a new one, which stands for
        ``param_dtype`` and so gets gradients of it, and the tensors to be freed with it; later ``out`` is brought up to
        date, in place, since autograd has saved its codes."""
        rows, operand = metadata["rows"], cast(Any, self.operand)
        if operand is None:
            return None if out is not None else (self._gathered(outputs[0][:rows], None), ())
        scale = metadata["scale"]
        if out is not None:  # what it views of the outputs is up to date already
            if scale is not None:
                _overwrite(out.operand.scale, scale)
            return None
        codes = outputs[0].view(metadata["dtype"])[:rows]
        scale = outputs[1] if len(outputs) > 1 else None if scale is None else scale.clone()
        size = torch.Size((rows, self.shape[1]))
        operand = operand._with(size=size, dtype=param_dtype, codes=codes, scale=scale)
        operand.gains = moved(operand.gains, codes.device)  # shards may be offloaded
        return self._gathered(None, operand), ()

    def _gathered(self, master: torch.Tensor | None, operand: HadamardQuantTensor | None):
        weight = type(self)(master, operand, self.recipe)  # type: ignore[call-arg]
        # A frozen weight's master is nowhere: should it be asked to train, it says so.
        weight.fsdp = None if self.master is None else "gathered"
        return weight


class _PreAllGather:
    """The hook of one shard. FSDP asks for its signature whenever it calls it: a method's is made anew, which takes longer
    than the hook does; of this object it is an attribute."""

    __slots__ = ("shard",)

    def __init__(self, shard: Shardable):
        self.shard = shard

    def __call__(self, mesh, outer_size, outer_stride, module, mp_policy):
        """The tensors to be sent, and what :meth:`Shardable.fsdp_post_all_gather` needs to know besides them.

        Raises:
            ValueError: another rank converted this layer with another config, or as frozen.
        """
        shard = self.shard
        if shard.sent is None:
            _check_agreement(shard, mesh, outer_size, module)
        shard.follow()
        ranks, operand = mesh.size(), cast(Any, shard.operand)
        if operand is None:
            assert shard.master is not None
            rows = -(-outer_size[0] // ranks)
            return (_pad(shard.master, rows).to(mp_policy.param_dtype or shard.dtype),), {"rows": outer_size[0]}
        if operand.scale is not None and operand.granularity == TENSOR and not _has_common_scale(operand):
            _share_scales([shard], mesh)
        if shard.sent is not None:
            return shard.sent
        sent = shard._to_send(operand, mesh, outer_size)
        # Not copies, which would take memory for as long as the shard lives, and be of what was.
        if sent[0][0].data_ptr() == operand.codes.data_ptr() and outer_size[0] % ranks == 0:
            shard.sent = sent
        return sent


_PreAllGather.__signature__ = inspect.signature(_PreAllGather(cast(Any, None)))  # type: ignore[attr-defined]


def precompute_scales(model: torch.nn.Module) -> None:
    """Agree on the per-tensor scales of all weights of ``model`` in one all-reduce per mesh. To be called by every rank after
    ``optimizer.step()``; without it each weight costs an all-reduce before it is gathered. Weights with other scales need
    none, and a model without per-tensor scales is left as it is."""
    weights: dict[tuple[DeviceMesh, int], list[Shardable]] = {}
    parameter: Any
    for parameter in model.parameters():
        shard = local(parameter)
        operand = shard.operand if isinstance(shard, Shardable) else None
        if operand is not None and operand.scale is not None and operand.granularity == TENSOR:
            dimension = next(i for i, p in enumerate(parameter.placements) if p.is_shard())
            weights.setdefault((parameter.device_mesh, dimension), []).append(shard)
    for (mesh, dimension), shards in weights.items():
        _share_scales(shards, mesh, dimension)


def refuse_fsdp1(shape) -> None:
    raise RuntimeError(
        f"FullyShardedDataParallel (FSDP1) makes a converted weight {list(shape)} plain, and its layer would run in high "
        "precision: shard with fully_shard (FSDP2), from torch.distributed.fsdp, after quantize_"
    )


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether this parameter is a converted weight that FSDP has sharded."""
    return isinstance(local(weight), Shardable)


def map_shard(weight: torch.Tensor, convert) -> DTensor:
    """``weight``, a DTensor, with ``convert(shard)`` in place of its shard."""
    assert isinstance(weight, DTensor)
    shard = convert(local(weight))
    whole = DTensor.from_local(
        shard, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    set_local_tensor(whole, shard)  # from_local makes a view of it, and a view of a converted weight has no codes
    return whole


def lend(weight: torch.Tensor) -> DTensor:
    """The dense value of a sharded weight, for a state dict: always the same DTensor, since its version tells of ops on it,
    which its shard's version does not."""
    shard = local(weight)
    if shard.master is None or shard.operand is None:
        return map_shard(weight, type(shard).dequantize)
    lent = _lent.get(shard.operand.codes)
    if lent is None or local(lent) is not shard.master:
        shard.follow()
        with torch.inference_mode(False):  # an inference tensor has no version
            lent = _lent[shard.operand.codes] = map_shard(weight, type(shard).dequantize)
        shard.in_step()
    shard.lend()
    return lent


def lent_version(shard: Shardable) -> int | None:
    """The version of the DTensor that state dicts hold."""
    if not _lent.data or shard.operand is None:  # no state dict was taken; a look-up takes longer than all else in a hook
        return None
    lent = _lent.get(shard.operand.codes)
    return None if lent is None else lent._version


def needs_common_scale(shard: Shardable) -> bool:
    """Whether ranks must agree before this shard can be quantised, so that no rank may do so without a write."""
    return shard.fsdp == "shard" and shard.operand is not None and shard.operand.granularity == TENSOR


def local(weight: torch.Tensor) -> Any:
    """The shard of a DTensor itself: ``to_local`` gives a view of it. None for another tensor."""
    return local_tensor(weight) if isinstance(weight, DTensor) else None


# Scales that ranks agree on.


def _has_common_scale(operand: HadamardQuantTensor) -> bool:
    return operand.codes is not None and _common_scale.get(operand.codes) == operand.codes._version


def keep_common_scale(target: Any, source: Any) -> None:
    """After ``source`` was copied to ``target``. Every rank must come to the same answer, so padding, which only some ranks
    need, must not lose what was agreed."""
    if _has_common_scale(source):
        _common_scale[target.codes] = target.codes._version


@torch.no_grad()
def _share_scales(shards: list[Shardable], mesh: DeviceMesh, dimension: int = 0) -> None:
    """Quantise shards with the largest of all ranks' scales: that of the whole matrix's largest element."""
    operands: list[Any] = [shard.operand for shard in shards]
    scales = torch.stack([operand.scale for operand in operands]).to(mesh.device_type)
    scales = scales.nan_to_num_(nan=torch.inf, posinf=torch.inf)  # a maximum may lose NaN; ∞ too makes the result NaN
    dist.all_reduce(scales, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    for shard, operand, scale in zip(shards, operands, scales.to(operands[0].scale.device).unbind(), strict=True):
        if shard.master is None:  # frozen: all there is to quantise are codes, which are rotated already
            matrix, right, gain = reference.dequantize(operand.any_codes(), operand.scale, TENSOR), None, None
        else:
            matrix, right, gain = shard.master, operand.column_rotation, operand.gain
        if matrix.shape[0]:
            fold = (1.0 / scale).repeat(matrix.shape[0])
            codes: Any = ops.rotate_quantize(matrix, None, right, operand.format, UNIT, fold_rows=fold, gain=gain)[0]
            if operand.is_packed:
                ops.pack_rows_(codes, operand.format, operand.codes)
            else:
                operand.codes.copy_(codes)
        operand.scale.copy_(scale)
        torch.autograd.graph.increment_version([operand.codes, operand.scale])
        _common_scale[operand.codes] = operand.codes._version


# What the hooks are made of.


def _check_agreement(weight: Shardable, mesh: DeviceMesh, outer_size: torch.Size, module: torch.nn.Module) -> None:
    """Codes of one format look like those of another: that ranks convert a layer alike is checked once, when it is first
    gathered."""
    if module in _agreed:
        return
    here = f"{weight.recipe}, {list(outer_size)}, {weight.dtype}, {'frozen' if weight.master is None else 'trained'}"
    gain = None if weight.operand is None else weight.operand.gain
    if gain is not None:  # ranks that balanced on different batches
        here += f", balanced as {hashlib.sha256(str(gain.tolist()).encode()).hexdigest()[:8]}"
    digest = int.from_bytes(hashlib.sha256(here.encode()).digest()[:7], "big")
    digests = _all_gather(torch.tensor([digest], device=mesh.device_type), mesh).tolist()
    if len(set(digests)) > 1:
        others = [rank for rank, other in enumerate(digests) if other != digest]
        raise ValueError(
            f"a weight of {list(outer_size)} [out, in] is converted differently on ranks {others} of its mesh than on rank "
            f"{mesh.get_local_rank()}: call quantize_ with the same config on every rank, and balance_ with the same batch. "
            f"Here it is: {here}"
        )
    _agreed.add(module)


def _all_gather(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The tensors of all ranks, one after the other."""
    out = tensor.new_empty(mesh.size() * tensor.shape[0], *tensor.shape[1:])
    _ALL_GATHER(out, tensor.contiguous(), group=mesh.get_group())
    return out


def _overwrite(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """In place, unseen by autograd: a weight gathered again for backward is the one that forward saved."""
    with preserved_version(tensor):
        tensor.copy_(value)


def _alias(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same memory as another dtype, and no view: that would have a version in common."""
    storage = tensor.untyped_storage()
    return tensor.new_empty(0, dtype=dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
