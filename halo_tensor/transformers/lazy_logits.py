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

    A product or a quotient with a number, a tanh, ``float()``, ``to(dtype)`` and ``contiguous()`` give LazyLogits again.
    Shape, dtype and device are known. Any other use computes the logits and goes on with the tensor.

    Args:
        hidden: hidden states [..., D].
        width: V.
        product: computes the tensor [..., V] of hidden states. The function is kept, so that it must not hold weights that
            are freed.
        head: the state of the head whose logits these are.
        dtype: of the logits.
        form: what the model did with the product.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        width: int,
        product: Callable[[torch.Tensor], torch.Tensor],
        head: Any,
        dtype: torch.dtype,
        form: Form = PLAIN,
    ):
        self._hidden, self._width, self._product, self._head = hidden, width, product, head
        self._form, self.dtype = form, dtype
        self._tensor: torch.Tensor | None = None

    def _with(self, form: Form, dtype: torch.dtype) -> "LazyLogits":
        return LazyLogits(self._hidden, self._width, self._product, self._head, dtype, form)

    def compute(self) -> torch.Tensor:
        """Return the logits as a tensor. They are computed once."""
        if self._tensor is None:
            self._head.note_read()
            y, form = self._product(self._hidden).to(self.dtype), self._form
            if form.softcap:
                y = torch.tanh(y * (form.scale / form.softcap)) * form.softcap
            elif form.scale != 1:
                y = y * form.scale
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

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self._hidden.ndim

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def float(self) -> "LazyLogits":
        """Return these logits in float32."""
        return self._with(self._form, torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return these logits in another dtype, or on the device where they are; or do what ``Tensor.to`` does."""
        if kwargs or len(args) != 1:
            return self.compute().to(*args, **kwargs)
        (target,) = args
        if isinstance(target, torch.dtype):
            return self._with(self._form, target)
        return self if self._lies_on(target) else self.compute().to(target)

    def _lies_on(self, target: Any) -> bool:
        """Whether a device, or what names one, is that of the hidden states."""
        if not isinstance(target, torch.device | str | int):
            return False
        device = torch.device(target)
        return device.type == self.device.type and device.index in (None, self.device.index)

    def contiguous(self) -> "LazyLogits":
        """Return these logits, which are contiguous when they are computed."""
        return self

    def tanh(self) -> Any:
        """Return the hyperbolic tangent."""
        form = self._form.tanh()
        return self.compute().tanh() if form is None else self._with(form, self.dtype)

    def _times(self, factor: Any) -> "LazyLogits | None":
        form = self._form.times(factor) if isinstance(factor, int | float) else None
        return None if form is None else self._with(form, self.dtype)

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
