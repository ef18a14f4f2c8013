"""Logits that are computed only if something other than the loss reads them."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class Form(NamedTuple):
    """What a model does with the product of its head: ``softcap * tanh(scale * product / softcap)``, or ``scale * product``.

    Attributes:
        scale: a factor of the product.
        softcap: 0 for no tanh.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def times(self, factor: float) -> "Form | None":
        """Return the form of a multiple, or None if there is none."""
        if not self.softcap:
            return Form(self.scale * factor)
        # c tanh(s x / c) times f is c' tanh(s' x / c') for c' = f c and s' = f s.
        return Form(self.scale * factor, self.softcap * factor) if factor > 0 else None

    def tanh(self) -> "Form | None":
        """Return the form of the hyperbolic tangent, or None if there is none."""
        return None if self.softcap else Form(self.scale, 1.0)


PLAIN = Form()


class LazyLogits:
    """What stands for the logits [..., V] of a head until they are read.

    A product or a quotient with a number, a tanh, ``float()`` and ``contiguous()`` give LazyLogits again. Any other use
    computes the logits and goes on with the tensor.

    Args:
        hidden: hidden states [..., D].
        width: V.
        product: computes the tensor [..., V] of hidden states. The function is kept, so that it must not hold weights that
            are freed.
        head: the module whose logits these are.
        form: what the model did with the product.
        dtype: of the logits; None for the one of the product.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        width: int,
        product: Callable[[torch.Tensor], torch.Tensor],
        head: Any,
        form: Form = PLAIN,
        dtype: torch.dtype | None = None,
    ):
        self._hidden, self._width, self._product, self._head = hidden, width, product, head
        self._form, self._dtype = form, dtype
        self._tensor: torch.Tensor | None = None

    def _with(self, form: Form, dtype: torch.dtype | None) -> "LazyLogits":
        return LazyLogits(self._hidden, self._width, self._product, self._head, form, dtype)

    def compute(self) -> torch.Tensor:
        """Return the logits as a tensor. They are computed once."""
        if self._tensor is None:
            self._head.note_read()
            y = self._product(self._hidden)
            y = y if self._dtype is None else y.to(self._dtype)
            y = y * self._form.scale if not self._form.softcap else _capped(y, self._form)
            self._tensor = y
        return self._tensor

    @property
    def shape(self) -> torch.Size:
        """The shape [..., V]."""
        return torch.Size((*self._hidden.shape[:-1], self._width))

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        """The device of the hidden states."""
        return self._hidden.device

    def float(self) -> "LazyLogits":
        """Return these logits in float32."""
        return self._with(self._form, torch.float32)

    def contiguous(self) -> "LazyLogits":
        """Return these logits, which are contiguous when they are computed."""
        return self

    def tanh(self) -> Any:
        """Return the hyperbolic tangent."""
        form = self._form.tanh()
        return self.compute().tanh() if form is None else self._with(form, self._dtype)

    def _times(self, factor: Any) -> "LazyLogits | None":
        form = self._form.times(factor) if isinstance(factor, int | float) else None
        return None if form is None else self._with(form, self._dtype)

    def __mul__(self, other: Any) -> Any:
        lazy = self._times(other)
        return self.compute() * other if lazy is None else lazy

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        lazy = self._times(1 / other) if isinstance(other, int | float) and other else None
        return self.compute() / other if lazy is None else lazy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for methods that a tensor has, and that would copy the tensor
            raise AttributeError(name)
        return getattr(self.compute(), name)

    def __repr__(self) -> str:
        state = "not computed" if self._tensor is None else "computed"
        return f"LazyLogits({list(self.shape)}, {state})"

    def __reduce__(self) -> Any:
        return _itself, (self.compute(),)

    def __radd__(self, other: Any) -> Any:
        return other + self.compute()

    def __rsub__(self, other: Any) -> Any:
        return other - self.compute()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(self.compute())

    def __array__(self, *given: Any, **named: Any) -> Any:
        return self.compute().__array__(*given, **named)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.tanh, torch.Tensor.tanh) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.compute, (args, kwargs or {}))
        return func(*args, **kwargs)


def _capped(y: torch.Tensor, form: Form) -> torch.Tensor:
    return torch.tanh(y * (form.scale / form.softcap)) * form.softcap


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _computing(name: str) -> Callable:
    function = getattr(operator, name)

    def method(self: LazyLogits, *others: Any) -> Any:
        others = tuple(other.compute() if isinstance(other, LazyLogits) else other for other in others)
        return function(self.compute(), *others)

    return method


for _name in ("add", "sub", "neg", "pow", "matmul", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "abs"):
    setattr(LazyLogits, f"__{_name}__", _computing(_name))
