"""Stand-ins for tensors, on which a function runs to record its allocations and launches.

Such a function decides which kernels to launch from shapes, strides and dtypes. It allocates with ``new_empty`` and others,
and calls launches, which record themselves (:meth:`StandIn.record`). Anything else that it asks of a tensor raises
:class:`Unsupported`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


class Unsupported(Exception):
    """A function needs something of a tensor that a stand-in does not have."""


@dataclass(eq=False)
class Memory:
    """The memory of stand-ins: that of a given tensor, or one that will be allocated.

    Attributes:
        fill: the value to fill new memory with, or None.
        given: whether the memory is an argument's.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: float | None = None
    given: bool = False

    def nbytes(self) -> int:
        """Return how many bytes it spans."""
        if 0 in self.shape:
            return 0
        spanned = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return spanned * self.dtype.itemsize


class StandIn:
    """The part of a tensor's interface that such functions use.

    Attributes:
        memory_type: the class of the memory that it allocates.
        recording: the launches and their arguments, one list for all stand-ins of a call.
        producer: what computes the elements of the tensor in a kernel, if anything does (see
            :mod:`halo_tensor.compiler.producers`).
    """

    memory_type: type[Any] = Memory
    producer: tuple[Any, list[Any]] | None = None

    def __init__(
        self,
        recording: list[tuple],
        memory: Any,
        shape: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        offset: int = 0,
    ):
        self.recording, self.memory, self.offset = recording, memory, offset
        self.shape = torch.Size(memory.shape if shape is None else shape)
        self.strides = tuple(memory.stride if stride is None else stride)
        self.dtype, self.device = dtype or memory.dtype, memory.device

    @classmethod
    def of_tensor(cls, recording: list[tuple], x: torch.Tensor) -> "StandIn":
        """Return the stand-in for a given tensor."""
        return cls(recording, cls.memory_type(tuple(x.shape), x.stride(), x.dtype, x.device, given=True))

    def __getattr__(self, name: str) -> NoReturn:
        raise Unsupported(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        raise Unsupported(function)

    def __mul__(self, other: Any) -> NoReturn:
        raise Unsupported("mul")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def data_ptr(self) -> int:
        return 0  # a multiple of 16; each launch checks the real pointer

    def is_contiguous(self) -> bool:
        return self.strides == contiguous_strides(self.shape)

    def t(self) -> "StandIn":
        return self._seen_as(self.shape[::-1], self.strides[::-1])

    def view(self, *shape: Any) -> "StandIn":
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            if shape[0].itemsize != self.dtype.itemsize:
                raise Unsupported("view")
            return self._seen_as(self.shape, self.strides, shape[0])
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> "StandIn":
        if not all(isinstance(n, int) for n in shape) or not self.is_contiguous():
            raise Unsupported("reshape")
        rest = -torch.Size(shape).numel()
        whole = tuple(self.numel() // rest if n == -1 else n for n in shape)
        return self._seen_as(whole, contiguous_strides(whole))

    def as_strided(self, shape: Sequence[int], stride: Sequence[int]) -> "StandIn":
        return self._seen_as(shape, stride)

    def _seen_as(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None = None) -> "StandIn":
        return type(self)(self.recording, self.memory, shape, stride, dtype or self.dtype, self.offset)

    def __getitem__(self, part: slice) -> "StandIn":
        if not isinstance(part, slice) or self.ndim != 1:
            raise Unsupported("index")
        start, stop, _ = part.indices(self.shape[0])
        return type(self)(self.recording, self.memory, [stop - start], self.strides, self.dtype, self.offset + start)

    def new_empty_strided(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None = None, fill: float | None = None
    ) -> "StandIn":
        memory = self.memory_type(tuple(shape), tuple(stride), dtype or self.dtype, self.device, fill)
        return type(self)(self.recording, memory)

    def new_empty(self, shape: int | Sequence[int], dtype: torch.dtype | None = None, fill: float | None = None) -> "StandIn":
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.new_empty_strided(shape, contiguous_strides(shape), dtype, fill)

    def new_zeros(self, shape: int | Sequence[int], dtype: torch.dtype | None = None) -> "StandIn":
        return self.new_empty(shape, dtype, 0)

    def new_ones(self, shape: int | Sequence[int], dtype: torch.dtype | None = None) -> "StandIn":
        return self.new_empty(shape, dtype, 1)

    def record(self, launch: Any, arguments: tuple) -> None:
        """Note a launch with its arguments. ``launch`` calls this where it would launch on tensors."""
        self.recording.append((launch, arguments))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(torch.empty(shape, device="meta").stride())
