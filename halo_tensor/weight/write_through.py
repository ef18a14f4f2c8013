"""What an op that knows nothing of converted weights does with one: it sees the dense value, and where it writes, the codes
follow.

The weight itself, :class:`~halo_tensor.weight.tensor.HaloWeight`, answers what is its own affair: ``F.linear``, copies of it,
and shards.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from halo_tensor.fences.fast_paths import DERIVED
from halo_tensor.fences.pytorch import is_compiled, is_symbolic, preserved_version
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.weight.fsdp import Shardable, keep_common_scale
from halo_tensor.weight.sharding import check_whole

aten = torch.ops.aten
#: Namespaces whose schemas name every argument that an op writes to.
_DECLARING = {"aten", "halo", "prim", "prims"}
_COLLECTIVES = {"c10d", "_c10d_functional"}
#: Ops of others that only read tensors. One that sends may end only when another rank receives, so nothing waits for it.
_READING = {
    "_c10d_functional::isend",
    "c10d::barrier",
    "c10d::check_for_nan",
    "c10d::monitored_barrier_",
    "c10d::send",
}
#: Names of functions and of aten ops, without underscores at their ends, that contract a weight with an input.
PRODUCTS = {
    *("mm", "addmm", "bmm", "addbmm", "baddbmm", "mv", "addmv", "matmul", "rmatmul", "linear", "bilinear", "trilinear"),
    *("einsum", "tensordot", "inner", "multi_dot", "chain_matmul", "conv1d", "conv2d", "conv3d", "convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "grouped_mm", "scaled_mm", "scaled_grouped_mm"),
    *("addmm_activation", "multi_head_attention_forward", "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell"),
}


def run(func, args, kwargs):
    """``func`` on the dense values of weights. Those that it writes to are brought up to date, and returned in place of their
    values. Not every schema tells of writes: any weight that an op of an unknown namespace takes may have been written."""
    if is_symbolic():
        watch_graph()
    values = [*args, *kwargs.values()]
    weights: dict[int, Any] = {id(t): t for t in _tensors(values) if isinstance(t, Shardable)}
    if func.namespace == "aten" and name_of(func.overloadpacket) in PRODUCTS:
        for weight in weights.values():
            check_whole(weight)
            _warn_of_product(func, weight)
    dense = {key: weight.dequantize() for key, weight in weights.items()}
    plain = [_replaced(value, dense) for value in values]
    # In the order of the arguments, which is the same in every step of an optimiser.
    declared = _given(_declared(func), args, kwargs, weights)
    suspected = _given(_suspected(func, is_symbolic()), args, kwargs, weights)
    written = declared | suspected
    before = {key: dense[key].clone() for key in written if _is_frozen(weights[key])}
    out = func(*plain[: len(args)], **dict(zip(kwargs, plain[len(args) :], strict=True)))
    if written and func.namespace in _COLLECTIVES:
        _wait(func, out, [dense[key] for key in written])
    # DDP, for one, sends every weight to itself: frozen codes would be rounded a second time.
    changed = [key for key in written if key not in before or not torch.equal(before[key], dense[key])]
    # Autograd takes an op for what its schema says: it need not hear of writes that may not have happened.
    counted = written if func.namespace == "c10d" else declared
    _bring_up_to_date([(weights[key], dense[key]) for key in changed if key in counted])
    if suspected:
        _bring_up_to_date([(weights[key], dense[key]) for key in changed if key not in counted], counted=False)
    owner = {id(dense[key]): weights[key] for key in counted}  # an in-place op returns what it wrote to
    return _replaced(out, owner)


def _wait(func, out, written: list[torch.Tensor]) -> None:
    """Until a collective has written: it may return at once."""
    for returned in out if isinstance(out, tuple) else (out,):
        if isinstance(returned, torch.ScriptObject):  # a Work
            returned.wait()  # type: ignore[attr-defined]
    if func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
        for tensor in written:
            torch.ops._c10d_functional.wait_tensor(tensor)


def _bring_up_to_date(written: list[tuple[Any, torch.Tensor]], counted: bool = True) -> None:
    """After an op wrote to the dense values of weights, an optimiser's to all. ``counted`` tells autograd."""
    # Of several views of one, once.
    whole = {id(_whole(w)): (_whole(w), dense if w.base is None else w.base.master) for w, dense in written}
    if counted:  # it counts versions above __torch_dispatch__, and has only seen the wrappers
        masters = [weight.master for weight, _ in [*whole.values(), *written]]
        torch.autograd.graph.increment_version(list({id(m): m for m in masters if m is not None}.values()))
    coded = [(weight, dense) for weight, dense in whole.values() if weight.operand is not None and dense is not None]
    parts = () if counted else tuple(part for weight, _ in coded for part in weight.operand.parts)
    with preserved_version(parts):
        HadamardQuantTensor.requantize_all_([weight.operand for weight, _ in coded], [dense for _, dense in coded])
    for weight, _ in coded:
        weight.in_step()
    if any(dense is None for _, dense in whole.values()):
        raise RuntimeError("a frozen weight cannot be written through a view of it; write the whole weight")


def _whole(weight: Any) -> Any:
    """The weight that this one is a view of, or itself."""
    return weight if weight.base is None else weight.base


def _is_frozen(weight: Any) -> bool:
    """Whether codes are all there is, and values that can be compared."""
    return _whole(weight).master is None and not (is_symbolic() or weight.is_meta)


def _warn_of_product(func, weight: Any) -> None:
    whole = _whole(weight)
    if not whole.recipe.is_identity:
        part = "" if weight is whole else f"a view {list(weight.shape)} of "
        warn_of_product(str(func), f"{part}a converted weight {list(whole.shape)}")


def warn_of_product(name: str, what: str, stacklevel: int = 2) -> None:
    """Say that a product with (a part of, or a value computed from) a converted weight is not quantised."""
    if torch._C._current_graph_task_id() != -1:  # in backward, whose forward has said so
        return
    warnings.warn(message_of_product(name, what), stacklevel=stacklevel + 1)


def message_of_product(name: str, what: str) -> str:
    return (
        f"{name} with {what} runs in high precision, since it is not called as F.linear(x, weight): leave its layer out with "
        "skip or filter_fn, or dequantize() the weight"
    )


def watch_graph() -> None:
    """Have the graph that is being traced searched for products with values computed from weights."""
    if DERIVED.attempt(is_compiled) and (graph := DERIVED.load("halo_tensor.weight.derived_graph")):
        DERIVED.attempt(graph.install)


def name_of(func: Any) -> str:
    """The name of a function of torch or of an aten op, without underscores at its ends."""
    return getattr(func, "__name__", "").removeprefix("linalg_").strip("_")


def are_alike(a: Any, b: Any) -> bool:
    """Whether the codes of one are what the codes of the other would be."""
    if not all(isinstance(t, Shardable) for t in (a, b)) or a.base is not None:
        return False
    same = (a.recipe, a.dtype, a.shape) == (b.recipe, b.dtype, b.shape)
    same = same and (a.master is None, a.operand is None) == (b.master is None, b.operand is None)
    return same and a.gain is b.gain  # else it is the dense value that is copied, which is slower and always right


def copy(target: Any, source: Any) -> Any:
    """Copy a weight to one like it, with its codes. A compiled optimiser ends so: its new weights are quantised already."""
    source.follow()
    pairs: list = [] if target.master is None else [(target.master, source.master)]
    if target.operand is not None:
        assert source.operand is not None
        operand = source.operand.packed() if target.operand.is_packed else source.operand.unpacked()
        pairs += zip(target.operand.parts, operand.parts, strict=True)
    for to, from_ in pairs:
        to.copy_(from_)
    torch.autograd.graph.increment_version([to for to, _ in pairs])
    target.in_step()
    if target.operand is not None:
        keep_common_scale(target.operand, source.operand)
    return target


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an op, which are values and lists of values. An optimiser's step has hundreds: a
    general walk over trees would take longer than its kernels."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _replaced(value, by_id: Mapping[int, torch.Tensor]):
    """``value``, a tensor or a list, with tensors replaced by those that ``by_id`` has for them."""
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    return type(value)([_replaced(v, by_id) for v in value]) if type(value) in (list, tuple) else value


def _given(arguments: Iterable[tuple[int, str]], args, kwargs, weights: Mapping[int, Any]) -> dict[int, None]:
    """The ids of the weights among the values of these arguments, in their order."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in arguments]
    return dict.fromkeys(id(t) for t in _tensors(values) if id(t) in weights)


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@cache
def _declared(func) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that an op writes to by its schema."""
    return tuple((i, argument.name) for i, argument in enumerate(func._schema.arguments) if _is_written(argument))


@cache
def _suspected(func, symbolic: bool) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that an op may write to although its schema does not say so: c10d's say it of none, and
    of other libraries' it is not known. While a graph is traced, schemas are believed, as the compiler believes them."""
    if func.namespace in _DECLARING or func._schema.name in _READING or (symbolic and func.namespace != "c10d"):
        return ()
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if not (_is_written(argument) or (func.namespace in _COLLECTIVES and argument.name.startswith("input")))
    )
