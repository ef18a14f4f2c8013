"""In a compiled graph, launches without a dispatcher.

Called as an op, a kernel costs the CPU a dispatch, the Python that decides what to launch, and allocations: 70–90 µs, and
three times that in a model, whose other code pushes it out of the caches. That is longer than smaller kernels run. But where
shapes are known, all of it is known when the graph is compiled. So each op is lowered by running its launcher on stand-ins
for tensors: what it allocates becomes buffers of the graph, planned and reused by Inductor, and each launch a line of the
generated code. An op with dynamic shapes, or whose launcher computes with tensors on the way, stays an op.

This is written against Inductor's internals as of torch 2.11–2.15 (:data:`halo_tensor.fences.fast_paths.INDUCTOR`). Whatever
goes wrong while an op is lowered, it stays an op.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.graph import SubgraphLowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

from halo_tensor.fences.fast_paths import INDUCTOR, PRODUCERS
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops import implementations

#: For comparison: without it, what the quantiser reads is always written first. Cached graphs know nothing of it.
FUSE_PRODUCERS = True


class _Unsupported(Exception):
    """A launcher asked a stand-in for what it cannot give."""


@dataclass(eq=False)
class _Memory:
    """What a stand-in stands for: a buffer of the graph, or one to be allocated, filled with ``fill`` or not."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: float | None = None
    box: Any = None
    given: bool = False

    def realized(self) -> Any:
        if self.box is None:
            size, dtype, device = [*self.shape], self.dtype, self.device
            if self.fill is None:
                self.box = lowering.empty_strided(size, [*self.stride], dtype=dtype, device=device)
            else:
                self.box = lowering.full(size, self.fill, dtype=dtype, device=device)
                self.box.realize()
        return self.box


class _StandIn:
    """As much of a tensor as launchers look at. ``recording`` is what all stand-ins of one launcher have in common: the
    launches, each with its arguments. ``producer``, of an op's first: the function that gives its elements, and the second's
    if the op takes two that are computed, and stand-ins for what it reads; a launcher that calls it leaves the buffers without
    a reader, and Inductor drops them."""

    producer: tuple[Any, list["_StandIn"]] | None = None

    def __init__(self, recording: list[tuple], memory: _Memory, shape=None, stride=None, dtype=None, offset: int = 0):
        self.recording, self.memory, self.offset = recording, memory, offset
        self.shape = torch.Size(memory.shape if shape is None else shape)
        self.strides = tuple(memory.stride if stride is None else stride)
        self.dtype, self.device = dtype or memory.dtype, memory.device

    @classmethod
    def of(cls, recording: list[tuple], box: Any) -> "_StandIn":
        box = ir.ExternKernel.realize_input(box)
        box.freeze_layout()
        layout = box.get_layout()
        if not all(isinstance(n, (int, sympy.Integer)) for n in (*layout.size, *layout.stride)):
            raise _Unsupported("a dynamic shape")
        shape, stride = (tuple(map(int, sizes)) for sizes in (layout.size, layout.stride))
        return cls(recording, _Memory(shape, stride, layout.dtype, layout.device, box=box, given=True))

    def __getattr__(self, name: str):
        raise _Unsupported(name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise _Unsupported(function)

    def __mul__(self, other):
        raise _Unsupported("mul")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None):
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def data_ptr(self) -> int:
        return 0  # aligned; each launch looks at the real pointer

    def is_contiguous(self) -> bool:
        return self.strides == _contiguous(self.shape)

    def t(self) -> "_StandIn":
        return _StandIn(self.recording, self.memory, self.shape[::-1], self.strides[::-1], self.dtype, self.offset)

    def view(self, dtype: torch.dtype) -> "_StandIn":
        if not isinstance(dtype, torch.dtype) or dtype.itemsize != self.dtype.itemsize:
            raise _Unsupported("view")
        return _StandIn(self.recording, self.memory, self.shape, self.strides, dtype, self.offset)

    def __getitem__(self, part: slice) -> "_StandIn":
        if not isinstance(part, slice) or self.ndim != 1:
            raise _Unsupported("index")
        start, stop, _ = part.indices(self.shape[0])
        return _StandIn(self.recording, self.memory, [stop - start], self.strides, self.dtype, self.offset + start)

    def new_empty_strided(self, shape, stride, dtype: torch.dtype | None = None, fill: float | None = None) -> "_StandIn":
        memory = _Memory(tuple(shape), tuple(stride), dtype or self.dtype, self.device, fill)
        return _StandIn(self.recording, memory)

    def new_empty(self, shape, dtype: torch.dtype | None = None, fill: float | None = None) -> "_StandIn":
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.new_empty_strided(shape, _contiguous(shape), dtype, fill)

    def new_zeros(self, shape, dtype: torch.dtype | None = None) -> "_StandIn":
        return self.new_empty(shape, dtype, 0)

    def new_ones(self, shape, dtype: torch.dtype | None = None) -> "_StandIn":
        return self.new_empty(shape, dtype, 1)

    def record(self, launch, arguments: tuple) -> None:
        """Called by ``launch``, where it would launch on a tensor."""
        self.recording.append((launch, arguments))


def _contiguous(shape) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


class _Call(ir.ExternKernel):
    """One line of generated code: a launch, which writes to buffers that are there."""

    def __init__(self, launch, arguments: tuple):
        self.launch = launch
        self.templates: list[str] = []
        self.boxes: list[Any] = []
        written: list[Any] = []
        for argument in arguments:
            self.templates.append(self._template(argument, written))
        self.tensors = inputs = [self.unwrap_storage_for_input(self.realize_input(box)) for box in self.boxes]
        self.device = inputs[0].get_device()
        super().__init__(None, ir.NoneLayout(device=self.device), inputs)
        self.mutation_outputs = [ir.MutationOutput(ir.NoneLayout(device=self.device), box, self) for box in written]
        V.graph.register_operation(self)

    def _template(self, argument: Any, written: list) -> str:
        """The argument as source, with {i} where the name of input i belongs."""
        if isinstance(argument, torch.Tensor):  # the matrix of a rotation
            self.boxes.append(V.graph.add_tensor_constant(argument))
            return f"{{{len(self.boxes) - 1}}}"
        memory = argument.memory
        self.boxes.append(memory.realized())
        if not (memory.given or any(memory.box is box for box in written)):
            written.append(memory.box)
        source = f"{{{len(self.boxes) - 1}}}"
        if argument.offset or argument.shape.numel() < torch.Size(memory.shape).numel():
            source += f"[{argument.offset}:{argument.offset + argument.shape.numel()}]"
        return source if argument.dtype == memory.dtype else f"{source}.view({argument.dtype})"

    def codegen(self, wrapper) -> None:
        try:
            self._write(wrapper)
        except Exception as error:  # too late to be an op after all
            raise RuntimeError(
                f"halo_tensor cannot write its launches into the code that torch {torch.__version__} generates: set the "
                "environment variable HALO_DISABLE=inductor"
            ) from error

    def _write(self, wrapper) -> None:
        names = [x.codegen_reference() for x in self.tensors]
        source = self.launch.source()
        # One for each dtype and device: a launch loads its kernel once, for the tensors that it meets first.
        dtypes = [x.get_dtype() for x in self.tensors]
        name = f"halo_{sha256(repr((source, dtypes, self.device)).encode()).hexdigest()[:12]}"
        producer = self.launch.constants.get("PRODUCER")
        definitions = [] if producer is None else [producer.definition()]
        for line in (*_IMPORTS, *definitions, f"{name} = {source}"):
            wrapper.add_import_once(line)
        wrapper.writeline(f"{name}({', '.join(template.format(*names) for template in self.templates)})")

    def get_outputs(self) -> list:
        return list(self.mutation_outputs)

    def get_device(self):
        return self.device

    def should_allocate(self) -> bool:
        return False

    def get_unbacked_symbol_defs(self):
        return OrderedSet()


_IMPORTS = (
    "import torch",
    "import triton",
    "import triton.language as tl",
    "import halo_tensor.kernels.quantize.kernels, halo_tensor.kernels.matmul.plan, halo_tensor.kernels.quantize.two_gradients",
    "from halo_tensor.kernels.launch import Launch",
    "from halo_tensor.kernels.quantize.fast_math import fast_exp, libdevice, reciprocal, tanh",
)


def _producer(made: list[_StandIn]) -> tuple[Any, list[_StandIn]] | None:
    producers = PRODUCERS.load("halo_tensor.compiler.producers")
    if producers is None or (found := PRODUCERS.attempt(producers.producer, [x.memory.box for x in made])) is None:
        return None
    function, boxes = found
    try:
        return function, [_StandIn.of(made[0].recording, box) for box in boxes]
    except _Unsupported:
        return None


def _make(launcher: Callable, produced: int, args: tuple) -> Any:
    """The buffers of the graph to which the launches of ``launcher(*args)`` write; None if the call must be an op."""
    recording: list[tuple] = []
    try:
        first = [_StandIn.of(recording, box) for box in args[: max(produced, 1)]]
        first[0].producer = _producer(first) if produced and FUSE_PRODUCERS else None
        rest = [_StandIn.of(recording, a) if isinstance(a, ir.IRNode) else a for a in args[len(first) :]]
        with _disable_current_modes():  # launchers make constants, which must be real
            made = launcher(*first, *rest)
    except _Unsupported:
        return None
    constant = any(isinstance(x, torch.Tensor) for _, arguments in recording for x in arguments)
    if constant and isinstance(V.graph, SubgraphLowering):  # whose constants Inductor does not hand to the generated code
        return None
    with _all_or_none():
        for launch, arguments in recording:
            _Call(launch, arguments)
        boxes = tuple(x.memory.realized() for x in (made if isinstance(made, tuple) else (made,)))
    return boxes if isinstance(made, tuple) else boxes[0]


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Takes what the block adds to the graph out of it again if the block raises, so that the op itself can be put there."""
    graph = V.graph
    operations, buffers = len(graph.operations), len(graph.buffers)
    try:
        yield
    except Exception:
        for name in [x.get_name() for x in graph.buffers[buffers:]]:
            graph.name_to_buffer.pop(name, None)
            graph.mutated_buffers.discard(name)
        for name in [x.get_operation_name() for x in graph.operations[operations:]]:
            graph.name_to_op.pop(name, None)
        del graph.operations[operations:], graph.buffers[buffers:]
        raise


def _lower(op: torch._ops.OpOverload, launcher: Callable, produced: int = 0) -> None:
    """``produced``: how many of its arguments, from the first on, the launcher can have computed instead of read."""
    as_op = lowering.fallback_handler(op)

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lowered(*args):
        if V.graph.cpp_wrapper or not runs_kernels(args[0].get_device()):
            return as_op(*args)
        made = INDUCTOR.attempt(_make, launcher, produced, args)
        return as_op(*args) if made is None else made


_lower(torch.ops.halo.rotate_quantize.default, implementations._rotate_quantize_cuda, produced=1)
_lower(torch.ops.halo.quantize_pair.default, implementations._quantize_pair_cuda)
_lower(torch.ops.halo.quantize_pairs.default, implementations._quantize_pairs_cuda, produced=2)
_lower(torch.ops.halo.scaled_mm.default, implementations._scaled_mm_cuda)
_lower(torch.ops.halo.rotate.default, implementations._rotate_cuda)
_lower(torch.ops.halo.unrotate.default, implementations._unrotate_cuda)
