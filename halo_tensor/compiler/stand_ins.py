"""Stand-ins for tensors, on which the body of an op runs while Inductor compiles a graph.

The body decides which kernels to launch, from shapes, strides and dtypes. It allocates results with ``new_empty`` and others,
and calls launches, which record themselves (:meth:`StandIn.record`). Anything else that it asks of a tensor raises
:class:`Unsupported`.

Private API: ``torch._inductor.ir`` (ExternKernel, FixedLayout) and ``torch._inductor.lowering`` (empty_strided, full). Tested
with torch 2.11 to 2.15.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy
import torch
from torch._inductor import ir, lowering


class Unsupported(Exception):
    """A body needs something of a tensor that a stand-in does not have."""


@dataclass(eq=False)
class Memory:
    """The memory of stand-ins: a buffer of the graph, or one that will be allocated.

    Attributes:
        fill: the value to fill a new buffer with, or None.
        box: Inductor's representation of the buffer; None until :meth:`realized` allocates it.
        given: whether the buffer is an argument of the op.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: float | None = None
    box: Any = None
    given: bool = False

    def realized(self) -> Any:
        """Return the buffer, allocated."""
        if self.box is None:
            size, dtype, device = [*self.shape], self.dtype, self.device
            if self.fill is None:
                self.box = lowering.empty_strided(size, [*self.stride], dtype=dtype, device=device)
            else:
                self.box = lowering.full(size, self.fill, dtype=dtype, device=device)
                self.box.realize()
        return self.box


class StandIn:
    """The part of a tensor's interface that bodies of ops use.

    Attributes:
        recording: the launches and their arguments, one list for all stand-ins of an op.
        producer: of the first tensor of an op: the function that computes its elements (and those of the second tensor, if the
            op takes two), and stand-ins for what that function reads; None if there is none. If the body passes the function
            to a launch instead of the tensor, nothing reads the tensor's buffer, and Inductor drops it.
    """

    producer: tuple[Any, list["StandIn"]] | None = None

    def __init__(
        self,
        recording: list[tuple],
        memory: Memory,
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
    def of(cls, recording: list[tuple], box: Any) -> "StandIn":
        """Return the stand-in for an argument of the op, with its strides settled."""
        box = ir.ExternKernel.realize_input(box)
        box.freeze_layout()
        layout = box.get_layout()
        if not all(isinstance(n, (int, sympy.Integer)) for n in (*layout.size, *layout.stride)):
            raise Unsupported("a dynamic shape")
        shape, stride = (tuple(map(int, sizes)) for sizes in (layout.size, layout.stride))
        return cls(recording, Memory(shape, stride, layout.dtype, layout.device, box=box, given=True))

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
        return StandIn(self.recording, self.memory, self.shape[::-1], self.strides[::-1], self.dtype, self.offset)

    def view(self, dtype: torch.dtype) -> "StandIn":
        if not isinstance(dtype, torch.dtype) or dtype.itemsize != self.dtype.itemsize:
            raise Unsupported("view")
        return StandIn(self.recording, self.memory, self.shape, self.strides, dtype, self.offset)

    def __getitem__(self, part: slice) -> "StandIn":
        if not isinstance(part, slice) or self.ndim != 1:
            raise Unsupported("index")
        start, stop, _ = part.indices(self.shape[0])
        return StandIn(self.recording, self.memory, [stop - start], self.strides, self.dtype, self.offset + start)

    def new_empty_strided(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None = None, fill: float | None = None
    ) -> "StandIn":
        memory = Memory(tuple(shape), tuple(stride), dtype or self.dtype, self.device, fill)
        return StandIn(self.recording, memory)

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
