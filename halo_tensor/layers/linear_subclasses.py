"""Subclasses of ``nn.Linear`` whose own forward computes only ``F.linear``, as Falcon's ``x @ self.weight.T`` does.

A forward is tested by running it on a copy of the module with a small weight of integers. A forward that returns the result
of its one call of ``F.linear`` is kept, since a converted weight catches that call. Any other forward must give F.linear's
numbers exactly, with one product, transposes and additions; the module then gets nn.Linear's forward.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"F.linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm"}
#: Functions that a forward may also call, since they change no number: they read attributes, and take views.
_READS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda"}
_VIEWS = {"T", "mT", "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "contiguous"}
_ADDS = {"add", "__add__", "__radd__"}


class _Calls(TorchFunctionMode):
    """Records every torch function that is called, as (name, arguments, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list, Any]] = []

    def __torch_function__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = "F.linear" if func is F.linear else getattr(func, "__name__", repr(func))
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
        self.calls.append((name, [*args, *(kwargs or {}).values()], out))
        return out


def adds_nothing(module: nn.Linear) -> bool:
    """Whether the forward of a layer computes ``F.linear(x, weight, bias)`` and no more."""
    return type(module).forward is nn.Linear.forward or _product(module) is not None


def follow_linear(module: nn.Linear) -> None:
    """Make a layer call F.linear, in place, if its forward computes the same in another way."""
    if type(module).forward is not nn.Linear.forward and _product(module) == "matmul":
        kind: Any = type(module)
        module.__class__ = _following(kind)


def own_class(module: nn.Module) -> None:
    """Undo :func:`follow_linear`."""
    if own := type(module).__dict__.get("_own_class"):
        module.__class__ = own


@cache
def _following(own: Any) -> Any:
    """Make a subclass of ``own`` with nn.Linear's forward."""
    return with_forward(own, nn.Linear.forward, _rebuild)


def _rebuild(own: type) -> nn.Module:
    return nn.Module.__new__(_following(own))


def with_forward(own: Any, forward: Callable, rebuild: Callable[[type], nn.Module]) -> Any:
    """Make a :func:`subclass_of` ``own`` with another forward, and with ``own`` as its attribute ``_own_class``."""
    return subclass_of(own, {"forward": forward, "_own_class": own}, rebuild)


def subclass_of(own: Any, members: dict[str, Any], rebuild: Callable[[type], nn.Module], mixin: type | None = None) -> Any:
    """Make a subclass that has the names and the documentation of a class of modules.

    Args:
        own: the class.
        members: of the subclass.
        rebuild: own -> a module of the subclass without a state. Copies and pickles call it, since they cannot find the class
            by name.
        mixin: another base class, whose methods come before those of ``own``.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return rebuild, (own,), self.__getstate__()

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,) if mixin is None else (mixin, own), members | {"__reduce_ex__": __reduce_ex__} | names)


def _product(module: nn.Linear) -> str | None:
    """Return how a forward multiplies: "F.linear" if it returns the result of that; "matmul" if it computes the same in
    another way; None if it does anything else.
    """
    if "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__:
        return None
    found = {_try(module, shape, training) for shape in ((2, 4), (2, 3, 4)) for training in (True, False)}
    return found.pop() if len(found) == 1 else None


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
@torch.random.fork_rng(devices=[])
def _try(module: nn.Linear, shape: tuple[int, ...], training: bool) -> str | None:
    """Run a forward on a copy of ``module``, on x of ``shape``, and return what :func:`_product` does."""

    def integers(*shape: int) -> torch.Tensor:
        n = torch.Size(shape).numel()
        return (torch.arange(n, dtype=torch.float64, device="cpu") * 5 % 13 - 6).reshape(shape)

    weight = nn.Parameter(integers(3, shape[-1]))
    bias = None if module.bias is None else nn.Parameter(integers(3))
    x, before = integers(*shape).requires_grad_(), integers(*shape)
    expected = F.linear(x, weight, bias)
    probe: Any = nn.Module.__new__(type(module))
    own = {"weight": weight, "bias": bias}
    state = {"_parameters": dict(module._parameters) | own, "in_features": shape[-1], "out_features": 3, "training": training}
    probe.__dict__ = module.__dict__ | state
    state = dict(probe.__dict__)
    try:
        with _Calls() as log:
            y = type(module).forward(probe, x)
    except Exception:  # the code is not known; if it raises, it is no plain linear layer
        return None
    if type(y) is not torch.Tensor or not torch.equal(x, before) or _has_own_backward(y):
        return None
    uses = [(name, args, out) for name, args, out in log.calls if name not in _READS and _holds(args, weight)]
    if len(uses) == 1 and uses[0][0] == "F.linear" and len(uses[0][1]) > 1 and uses[0][1][1] is weight and uses[0][2] is y:
        return "F.linear"
    names = [name for name, _, _ in log.calls]
    plain = _READS | _VIEWS | _ADDS | _PRODUCTS
    extra = module._modules or module._buffers or module._parameters.keys() - own.keys()
    changed = probe.__dict__.keys() != state.keys() or any(probe.__dict__[key] is not state[key] for key in state)
    if extra or changed or not plain.issuperset(names) or sum(name in _PRODUCTS for name in names) != 1:
        return None
    return "matmul" if y.shape == expected.shape and torch.equal(y, expected) else None


def _holds(args: list[Any], tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is among arguments, or in a list among them."""
    return any(a is tensor or (isinstance(a, list | tuple) and _holds(list(a), tensor)) for a in args)


def _has_own_backward(y: torch.Tensor) -> bool:
    """Whether an autograd function written in Python took part in ``y``: its backward would multiply in high precision."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
