"""Any other op on a converted weight: it sees the dense value, and the codes follow its writes.

:mod:`halo_tensor.weight.tensor` handles ``F.linear``; :mod:`halo_tensor.weight.copies` and :mod:`halo_tensor.weight.shard_ops`
handle ops whose result is a weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from halo_tensor.fences.pytorch import (
    is_recorded,
    is_symbolic,
    is_transformed,
    list_updates,
    preserved_version,
    tree_map_only,
)
from halo_tensor.weight.copies import plain_view
from halo_tensor.weight.handlers import implements
from halo_tensor.weight.product_warnings import PRODUCTS, name_of, warn_of_product, watch_graph
from halo_tensor.weight.requantize import defer, requantize_all
from halo_tensor.weight.tensor import HaloWeight, dense_value

#: Namespaces whose schemas name every argument that an op writes to.
_DECLARING = {"aten", "halo", "prim", "prims"}
_COLLECTIVES = {"c10d", "_c10d_functional"}
#: Ops of other namespaces that only read tensors. An op that sends may end only when another rank receives, so nothing waits
#: for it.
_READING = {
    "_c10d_functional::isend",
    "c10d::barrier",
    "c10d::check_for_nan",
    "c10d::monitored_barrier_",
    "c10d::send",
}


@implements(None)
def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op on the dense values of weights, and bring those that it writes to up to date.

    Returns:
        The result of the op. Weights that it wrote to stand in place of their dense values, and a view of a weight is a weight
        with the identity recipe.
    """
    out = _run_on_dense_values(op, args, kwargs)
    return tree_map_only(torch.Tensor, lambda view: plain_view(args[0], view), out) if op.is_view else out


@implements(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(func: Any, weight: HaloWeight, value: torch.Tensor) -> None:
    """Run ``weight.data = value``."""
    if isinstance(value, HaloWeight) and value.operand is weight.operand and value.master is weight.master:
        return  # the end of ``weight.data += …``, which has written already
    value = dense_value(value)
    if (value.shape, value.dtype, value.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"a converted weight's data can only be replaced by a tensor like it, {list(weight.shape)} {weight.dtype} on "
            f"{weight.device}; got {list(value.shape)} {value.dtype} on {value.device}. Use module.to(...) to convert it, "
            "and dequantize_(model) before changing its shape"
        )
    if weight.master is not None:
        weight.master = value.detach()
    weight.requantize(value.detach())


@implements(*list_updates())
def _update_list(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an optimiser's update of a list of weights and plain tensors, on their dense values.

    :func:`run` would do the same, but the dispatcher converts lists of hundreds of tensors twice before it arrives there.
    """
    held = _weights_in(args[0]) if args else []
    others = [value for value in (*args[1:], *kwargs.values()) if _weights_in(value)]
    plain = not (torch.is_grad_enabled() or is_recorded() or is_transformed() or others)
    if not plain or any(weight.whole.master is None for weight in held):
        return func(*args, **kwargs)
    dense = {id(weight): weight.dequantize() for weight in held}
    out = func(_replaced(args[0], dense), *args[1:], **kwargs)
    _bring_up_to_date([(weight, dense[id(weight)]) for weight in held])
    return _replaced(out, {id(dense[id(weight)]): weight for weight in held}) if out is not None else None


def _run_on_dense_values(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an op with dense values in place of weights.

    Not every schema declares what an op writes to. An op of a namespace that is not known may write to any weight that it
    takes, so weights are compared before and after it.
    """
    if is_symbolic():
        watch_graph()
    names, given = [*range(len(args)), *kwargs], [*args, *kwargs.values()]
    held = {name: found for name, value in zip(names, given, strict=True) if (found := _weights_in(value))}
    weights = {id(w): w for found in held.values() for w in found}
    if op.namespace == "aten" and name_of(op.overloadpacket) in PRODUCTS:
        for weight in weights.values():
            weight.check_whole()
            _warn_of_product(op, weight)
    dense = {key: weight.dequantize() for key, weight in weights.items()}
    plain = [_replaced(value, dense) if name in held else value for name, value in zip(names, given, strict=True)]
    # Both keep the order of the arguments, which is the same in every step of an optimiser.
    declared = _held_by(_declared(op), held)
    suspected = _held_by(_suspected(op, is_symbolic()), held)
    written = declared | suspected
    before = {key: dense[key].clone() for key in written if weights[key].whole.master is None and _has_values(weights[key])}
    out = op(*plain[: len(args)], **dict(zip(kwargs, plain[len(args) :], strict=True)))
    if written and op.namespace in _COLLECTIVES:
        _wait(op, out, [dense[key] for key in written])
    # DDP sends every weight to itself: frozen codes that have not changed must not be rounded a second time.
    changed = [key for key in written if not (key in before and torch.equal(before[key], dense[key]))] if before else written
    # Autograd knows of writes only what a schema declares. It need not hear of writes that may not have happened.
    counted = written if op.namespace == "c10d" else declared
    _bring_up_to_date([(weights[key], dense[key]) for key in changed if key in counted])
    if suspected:
        _bring_up_to_date([(weights[key], dense[key]) for key in changed if key not in counted], counted=False)
    if out is None:
        return None
    owner = {id(dense[key]): weights[key] for key in counted}  # an in-place op returns what it wrote to
    return _replaced(out, owner)


def _wait(op: Any, out: Any, written: list[torch.Tensor]) -> None:
    """Wait until a collective has written: it may return before."""
    for returned in out if isinstance(out, tuple) else (out,):
        if isinstance(returned, torch.ScriptObject):  # a Work
            returned.wait()  # type: ignore[attr-defined]
    if op.namespace == "_c10d_functional" and op is not torch.ops._c10d_functional.wait_tensor.default:
        for tensor in written:
            torch.ops._c10d_functional.wait_tensor(tensor)


def _bring_up_to_date(written: list[tuple[HaloWeight, torch.Tensor]], counted: bool = True) -> None:
    """Bring the codes of weights up to date, all together, after an op wrote to their dense values.

    Args:
        written: weights and their dense values. Several may be views of one weight.
        counted: tell autograd of the writes.
    """
    whole: dict[int, tuple[HaloWeight, torch.Tensor | None]] = {}
    masters: dict[int, torch.Tensor | None] = {}
    for weight, dense in written:
        masters[id(weight.master)] = weight.master
        if (base := weight.base) is None:
            whole[id(weight)] = weight, dense
        else:
            whole[id(base)] = base, base.master
            masters[id(base.master)] = base.master
    if counted:  # autograd counts versions above __torch_dispatch__, and has only seen the wrappers
        torch.autograd.graph.increment_version([master for master in masters.values() if master is not None])
    coded = [(w, dense) for w, dense in whole.values() if w.holds_codes and dense is not None]
    if not (counted and defer(w for w, _ in coded)):
        parts = () if counted else tuple(part for w, _ in coded for operand in w.operands for part in operand.parts)
        with preserved_version(parts):
            requantize_all(coded)
    if any(dense is None for _, dense in whole.values()):
        raise RuntimeError("a frozen weight cannot be written through a view of it; write the whole weight")


def _has_values(weight: HaloWeight) -> bool:
    """Whether the values of a weight can be compared."""
    return not (is_symbolic() or weight.is_meta)


def _warn_of_product(op: Any, weight: HaloWeight) -> None:
    whole = weight.whole
    if not whole.recipe.is_identity:
        part = "" if weight is whole else f"a view {list(weight.shape)} of "
        warn_of_product(str(op), f"{part}a converted weight {list(whole.shape)}")


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments of an op, which are values and lists of values.

    An optimiser's step has hundreds: a general walk over trees would take longer than its kernels.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _replaced(value: Any, by_id: Mapping[int, torch.Tensor]) -> Any:
    """Return ``value``, a tensor or a list, with tensors replaced by those that ``by_id`` has for them."""
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    if type(value) not in (list, tuple):
        return value
    return type(value)([_replaced(v, by_id) if type(v) in (list, tuple) else by_id.get(id(v), v) for v in value])


def _weights_in(value: Any) -> list[HaloWeight]:
    """Return the weights in an argument of an op: a value, or a list of values.

    The lists of an optimiser's step have hundreds of tensors, so types are looked at before values.
    """
    if not isinstance(value, list | tuple):
        return [value] if isinstance(value, HaloWeight) else []
    if not any(issubclass(kind, (HaloWeight, list, tuple)) for kind in set(map(type, value))):
        return []
    return [weight for v in value for weight in ((v,) if isinstance(v, HaloWeight) else _weights_in(v))]


def _held_by(arguments: Iterable[tuple[int, str]], held: Mapping[int | str, list[HaloWeight]]) -> dict[int, None]:
    """Return the ids of the weights that these arguments hold, in their order.

    Args:
        arguments: place and name of each.
        held: the place of an argument that was passed by its place, or the name of one that was passed by its name -> its
            weights.
    """
    return dict.fromkeys(id(w) for i, name in arguments for w in held.get(i, held.get(name, ())))


def _is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@cache
def _declared(op: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of each argument that an op writes to by its schema."""
    return tuple((i, argument.name) for i, argument in enumerate(op._schema.arguments) if _is_written(argument))


@cache
def _suspected(op: Any, symbolic: bool) -> tuple[tuple[int, str], ...]:
    """Return place and name of each argument that an op may write to although its schema does not declare it.

    c10d's schemas declare no write, and those of other libraries may not. While a graph is traced, schemas are believed, as
    the compiler believes them.
    """
    if op.namespace in _DECLARING or op._schema.name in _READING or (symbolic and op.namespace != "c10d"):
        return ()
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if not (_is_written(argument) or (op.namespace in _COLLECTIVES and argument.name.startswith("input")))
    )
