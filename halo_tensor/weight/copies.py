"""Weights made of other weights: aliases, views, copies and conversions."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from halo_tensor.fences.pytorch import return_and_correct_aliasing
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import Recipe
from halo_tensor.weight.attachments import OWN, keep_hooks, user_attributes
from halo_tensor.weight.handlers import RESULT_HOOKS, implements
from halo_tensor.weight.roles import ShardRole
from halo_tensor.weight.tensor import HaloWeight, inference_mode_of

aten = torch.ops.aten


def alias(weight: HaloWeight) -> HaloWeight:
    """Return a weight that shares master, operand and state with ``weight``.

    The master is the very same tensor, not a view, so its version tells of every write, also of one through ``.data``.
    """
    with inference_mode_of(weight):
        made = HaloWeight(weight.master, weight.operand, weight.recipe)
    made.codes_state, made.base, made.shard_role = weight.codes_state, weight.base, weight.shard_role
    made.grad_input_operand = weight.grad_input_operand
    return _with_attributes(made, weight)


def plain_view(weight: HaloWeight, view: torch.Tensor) -> HaloWeight:
    """Return a weight with the identity recipe for ``view``, a view of the dense value of ``weight``."""
    with inference_mode_of(weight):
        made = HaloWeight(view, None, Recipe())
    made.base = weight.whole
    made.shard_role = ShardRole.WHOLE if weight.is_gathered else weight.shard_role
    return made


def renewed(weight: HaloWeight, dense: torch.Tensor, role: ShardRole | None = None) -> HaloWeight:
    """Return a weight like ``weight``, of the dense value ``dense``, of its shape.

    Args:
        role: of the new weight, by default that of ``weight``. The dense value of a part may have another shape.
    """
    role = weight.shard_role if role is None else role
    made = HaloWeight.from_hp(
        dense, weight.recipe, frozen=weight.master is None, gains=weight.gains, keep_codes=weight.holds_codes,
        in_features_first=weight.in_features_first, multiplied=not role.is_part,
    )  # fmt: skip
    if weight.operand is not None and weight.operand.is_packed:
        made.operand = cast(HadamardQuantTensor, made.operand).packed()
    made.shard_role = role
    return _with_attributes(made, weight)


def _with_attributes(weight: HaloWeight, like: HaloWeight) -> HaloWeight:
    """Return ``weight`` with the attributes that users have set on ``like``: ``module.to`` replaces a converted parameter."""
    if not like.__dict__.keys() <= OWN:
        weight.__dict__.update(user_attributes(like))
    return weight


def _carry_hooks(func: Callable, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    """Let hooks on a parameter outlive ``module.to(...)``."""
    if isinstance(out, HaloWeight):
        keep_hooks(func, args[0] if args else None, out)
    return out


RESULT_HOOKS.append(_carry_hooks)


@implements(aten.detach.default, aten.alias.default)
def _alias(op: Any, weight: HaloWeight, *args: Any, **kwargs: Any) -> HaloWeight:
    return return_and_correct_aliasing(op, (weight, *args), kwargs, alias(weight))


@implements(aten.view.default)
def _view_alike(op: Any, weight: HaloWeight, size: Sequence[int]) -> Any:
    """Return a view of the same shape, which follows the recipe: ``DTensor.from_local`` makes one of its tensor."""
    return alias(weight) if tuple(size) == tuple(weight.shape) else NotImplemented


@implements(aten.clone.default, aten.empty_like.default, aten._to_copy.default, aten._pin_memory.default)
def _copied(op: Any, weight: HaloWeight, *args: Any, **kwargs: Any) -> Any:
    """Copy a weight; ``Module.to_empty`` calls empty_like. A copy of an integer dtype is no weight."""
    if not (kwargs.get("dtype") or weight.dtype).is_floating_point:
        return NotImplemented
    if weight.master is not None:
        made = renewed(weight, op(weight.master, *args, **kwargs))
    else:  # codes are copied as they are
        made = HaloWeight(None, op(weight.operand, *args, **kwargs), weight.recipe)
        made.shard_role = weight.shard_role
        made = _with_attributes(made, weight)
    return return_and_correct_aliasing(op, (weight, *args), kwargs, made)


@implements(aten.copy_.default)
def _copy(op: Any, target: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy a weight to one like it, with its codes. A compiled optimiser ends so: its new weights are quantised already."""
    if not (isinstance(target, HaloWeight) and isinstance(source, HaloWeight) and _are_alike(target, source)):
        return NotImplemented
    source.follow()
    pairs = [] if target.master is None else [(target.master, cast(torch.Tensor, source.master))]
    if target.grad_input_operand is not None:
        pairs += zip(target.grad_input_operand.parts, cast(Any, source.grad_input_operand).parts, strict=True)
    if target.operand is not None:
        assert source.operand is not None
        operand = source.operand.packed() if target.operand.is_packed else source.operand.unpacked()
        pairs += [
            (to, from_)
            for to, from_ in zip(target.operand.all_parts, operand.all_parts, strict=True)
            if to is not None and from_ is not None  # a shard has no codes in the order of grad_input
        ]
    for to, from_ in pairs:
        to.copy_(from_)
    torch.autograd.graph.increment_version([to for to, _ in pairs])
    if target.turned_stack is not None and source.turned_stack is None:
        cast(HadamardQuantTensor, target.operand).after_requantize()
    target.mark_in_step()
    # Every rank must come to the same answer, so padding, which only some ranks need, must not lose a common scale.
    if target.operand is not None and source.operand is not None and source.codes_state.has_common_scale(source.operand):
        target.codes_state.mark_common_scale(target.operand)
    return target


def _are_alike(a: HaloWeight, b: HaloWeight) -> bool:
    """Whether the codes of one are what the codes of the other would be."""
    if a.base is not None:
        return False
    same = (a.recipe, a.dtype, a.shape) == (b.recipe, b.dtype, b.shape)
    same = same and (a.master is None, a.operand is None) == (b.master is None, b.operand is None)
    same = same and (a.grad_input_operand is None) == (b.grad_input_operand is None)
    return same and a.gain is b.gain  # else the dense value is copied, which is slower and always right
