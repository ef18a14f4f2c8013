"""The table of handlers of ops and functions on converted weights, which the modules of this package fill in.

:class:`~halo_tensor.weight.tensor.HaloWeight` looks its answers up here, so that modules with handlers import the class, and
not the other way round.
"""

from collections.abc import Callable
from types import MethodWrapperType
from typing import Any, TypeVar

import torch

H = TypeVar("H", bound=Callable[..., Any])

#: op of aten, or function of torch -> handler(op, *args, **kwargs)
_handlers: dict[Any, Callable[..., Any]] = {}
#: Called with (func, args, kwargs, result) where a function of torch returned tensors; the value replaces the result.
RESULT_HOOKS: list[Callable[[Callable, tuple, dict[str, Any], Any], Any]] = []
#: Types of results that RESULT_HOOKS look at. The function that reads or sets an attribute is a MethodWrapperType: what it
#: returns is a view, which is a weight, or was not computed from one. Optimisers and FSDP2 read several attributes of each
#: weight in every step.
_MAY_BE_WEIGHTS = (torch.Tensor, list, tuple)


def implements(*ops: Any) -> Callable[[H], H]:
    """Register a function as the handler of some ops of aten or functions of torch.

    It is called as ``handler(op, *args, **kwargs)``. The handler of None is called for every op of aten that has no handler,
    or whose handler returned NotImplemented.
    """

    def register(handler: H) -> H:
        _handlers.update(dict.fromkeys(ops, handler))
        return handler

    return register


def run_op(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an op of aten, some of whose arguments are converted weights."""
    out = _handlers[op](op, *args, **kwargs) if op in _handlers else NotImplemented
    return _handlers[None](op, *args, **kwargs) if out is NotImplemented else out


def run_function(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an ordinary function of torch on converted weights, eagerly, with ``__torch_function__`` disabled."""
    if type(func) is MethodWrapperType and len(args) == 1:  # reads an attribute
        return func(*args)
    if func in _handlers and not isinstance(func, torch._ops.OpOverload):  # an op comes to run_op, beneath autograd
        return _handlers[func](func, *args, **kwargs)
    out = func(*args, **kwargs)
    if not isinstance(out, _MAY_BE_WEIGHTS) or type(func) is MethodWrapperType:
        return out
    for hook in RESULT_HOOKS:
        out = hook(func, args, kwargs, out)
    return out


# A test of torch.compiler.is_compiling() would not do: Dynamo would compile calls of __torch_function__ that eager code makes
# between two graphs, and its code for weight.grad would call itself without end (torch 2.13).
@torch.compiler.substitute_in_graph(run_function)
def _run_function_in_graph(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)
