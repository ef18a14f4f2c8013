"""Values computed from converted weights, watched until a product reads them.

``w * 0.5`` and ``torch.cat([w, w])`` are ordinary dense tensors, and ``F.linear`` multiplies with them in high precision. Most
such values never meet a product (penalties, norms, decay), so a warning where they are computed would be a false alarm.
Instead they get a class that behaves as ``torch.Tensor`` does and warns of a product. Only values computed with gradients
enabled get it: optimisers, averages and state dicts compute without.

:mod:`halo_tensor.weight.derived_graph` does the same in code that is compiled.
"""

import copy
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch

from halo_tensor.weight.handlers import RESULT_HOOKS
from halo_tensor.weight.product_warnings import PRODUCTS, name_of, warn_of_product, watch_graph
from halo_tensor.weight.tensor import HaloWeight
from halo_tensor.weight.write_through import tensors_in

#: Functions that rearrange a weight: their result is still one, with another shape.
_REARRANGE = {
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "row_stack", "column_stack", "dstack", "block_diag"),
    *("pad", "constant_pad_nd", "index_select", "getitem", "repeat", "repeat_interleave", "tile", "roll", "flip"),
    *("take_along_dim", "gather"),
}
_DETACH = torch.Tensor.detach


class Derived(torch.Tensor):
    """A dense value computed from a converted weight. It has memory of its own and is a plain tensor to every op. Copies and
    pickles of it are plain tensors, and ``nn.Parameter(value)`` is a plain parameter.
    """

    source: str  #: describes the weight, with its shape, for the message

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not all(issubclass(cls, t) for t in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, args, kwargs or {})

    # nn.Parameter(value) checks that detach() keeps the class, and then sets this.
    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        del self.source
        self.__class__ = torch.nn.Parameter  # type: ignore[assignment]

    def _plain(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    if name_of(func) in PRODUCTS:
        value = next(t for t in tensors_in((*args, *kwargs.values())) if isinstance(t, Derived))
        warn_of_product(func.__name__, f"a value {list(value.shape)} computed from {value.source}", stacklevel=3)
    return watch(func, args, kwargs, func(*args, **kwargs))


_watch_graph = torch.compiler.assume_constant_result(watch_graph)  # Dynamo calls it while it traces, and does not trace it


@torch.compiler.substitute_in_graph(_run)  # as in halo_tensor.weight.handlers
def _not_watched(func: Any, args: tuple, kwargs: dict) -> Any:
    _watch_graph()
    return func(*args, **kwargs)


def watch(func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
    """Return ``out``, the result of ``func``, as a :class:`Derived` if it is still a weight."""
    if func is _DETACH and args and isinstance(args[0], Derived):
        return _as_derived(out, args[0].source)
    if not torch.is_grad_enabled():
        return out
    if isinstance(out, (list, tuple)):  # a union would be made anew in every call
        return type(out)(watch(func, args, kwargs, o) for o in out) if type(out) in (list, tuple) else out
    if type(out) is not torch.Tensor:
        return out
    given = [(tensor, source_of(tensor)) for tensor in tensors_in((*args, *kwargs.values()))]
    source = source_of_result(name_of(func), given, out)
    return out if source is None else _as_derived(out, source)


RESULT_HOOKS.append(watch)


def source_of(tensor: Any) -> str | None:
    """Describe the weight that a tensor is or was computed from. None for any other tensor, and for a detached weight, which
    averages read.
    """
    if isinstance(tensor, Derived):
        return tensor.source
    if not isinstance(tensor, HaloWeight):
        return None
    whole = tensor.whole
    if whole.recipe.is_identity or not (tensor.requires_grad or isinstance(whole, torch.nn.Parameter)):
        return None
    return f"a converted weight {list(whole.shape)}"


def source_of_result(
    name: str,
    given: list[tuple[torch.Tensor, str | None]],
    out: torch.Tensor,
    are_equal: Callable[[torch.Size, torch.Size], bool] = operator.eq,
) -> str | None:
    """Describe the weight that ``out`` is computed from; None if ``out`` is not still a weight.

    Args:
        name: of the function, without underscores at its ends.
        given: its tensors, each with the description of the weight that it is or was computed from, or None.
        out: its result.
        are_equal: compares shapes, which may be symbolic.
    """
    if out.ndim < 2 or not out.is_floating_point():
        return None
    if name in PRODUCTS or name == "embedding" or name.startswith("new_") or name.endswith("_like"):
        return None
    if any(out is tensor for tensor, _ in given):  # an in-place op returns its argument
        return None
    return next((source for tensor, source in given if source and _is_weight_still(name, tensor, out, are_equal)), None)


def _is_weight_still(name: str, tensor: torch.Tensor, out: torch.Tensor, are_equal: Callable) -> bool:
    """Whether ``out`` can be multiplied with as ``tensor`` can. A sum over it, a lookup in it and its gradient cannot."""
    is_view = not isinstance(tensor, HaloWeight) and out._is_view()
    if name == "get":  # an attribute, such as grad
        return is_view
    if name == "getitem":  # w[ids] with ids of two dimensions is an embedding
        return out.ndim <= tensor.ndim
    return name in _REARRANGE or is_view or are_equal(out.shape, tensor.shape)


def _as_derived(out: torch.Tensor, source: str) -> torch.Tensor:
    out.__class__ = Derived
    out.source = source  # type: ignore[attr-defined]
    return out
