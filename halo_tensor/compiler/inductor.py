"""Lowerings: a compiled graph launches kernels itself, without the dispatcher.

An op costs the CPU a dispatch, the Python that decides what to launch, and allocations: 70–90 µs alone, and three times that
in a model whose other code fills the CPU's caches. That is longer than small kernels run. Where shapes are known, all of this
can be decided when the graph is compiled. So the lowering of an op runs its body on stand-ins for tensors. Each allocation
becomes a buffer of the graph, which Inductor plans and reuses, and each launch a line of generated code. An op stays an op if
shapes are dynamic, if its body computes with tensors, or if anything else goes wrong here.

Private API: ``torch._inductor.ir`` (ExternKernel, NoneLayout, MutationOutput), ``lowering`` (register_lowering,
fallback_handler, add_needs_realized_inputs), ``graph.SubgraphLowering``, ``virtualized.V.graph`` (register_operation,
add_tensor_constant, cpp_wrapper and its collections of operations and buffers) and the wrapper's ``add_import_once`` and
``writeline``. Tested with torch 2.11 to 2.15 (:data:`halo_tensor.fences.fast_paths.INDUCTOR`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.graph import SubgraphLowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

from halo_tensor.compiler.stand_ins import StandIn
from halo_tensor.fences.fast_paths import INDUCTOR, PRODUCERS
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.kernels.stand_ins import Unsupported
from halo_tensor.ops.register import body_of

#: False writes a quantiser's input to memory before the quantiser reads it, for comparisons. It is not part of the key of
#: cached graphs.
FUSE_PRODUCERS = True


class _Call(ir.ExternKernel):
    """A line of generated code: one launch, which writes to buffers that exist already."""

    def __init__(self, launch: Any, arguments: tuple):
        self.launch, self.dtypes = launch, tuple(argument.dtype for argument in arguments)
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
        """Return the argument as source code, with {i} in place of the name of input i."""
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

    def codegen(self, wrapper: Any) -> None:
        try:
            self._write(wrapper)
        except Exception as error:  # it is too late to keep the op
            raise RuntimeError(
                f"halo_tensor cannot write its launches into the code that torch {torch.__version__} generates: set the "
                "environment variable HALO_DISABLE=inductor"
            ) from error

    def _write(self, wrapper: Any) -> None:
        names = [x.codegen_reference() for x in self.tensors]
        source = self.launch.source()
        # One object for each dtype and device: a launch loads its kernel once, for the first tensors that it gets.
        dtypes = [x.get_dtype() for x in self.tensors]
        name = f"halo_{sha256(repr((source, dtypes, self.device)).encode()).hexdigest()[:12]}"
        producer, definitions = self.launch.constants.get("PRODUCER"), []
        if producer is not None:  # the kernel can be compiled as soon as its function is defined
            definitions, source = [producer.definition()], f"{source}.ahead(torch.{self.device!r}, {self.dtypes})"
        for line in (*_IMPORTS, f"import {self.launch.module}", *definitions, f"{name} = {source}"):
            wrapper.add_import_once(line)
        wrapper.writeline(f"{name}({', '.join(template.format(*names) for template in self.templates)})")

    def get_outputs(self) -> list:
        return list(self.mutation_outputs)

    def get_device(self) -> Any:
        return self.device

    def should_allocate(self) -> bool:
        return False

    def get_unbacked_symbol_defs(self) -> OrderedSet:
        return OrderedSet()


#: What generated code imports besides the modules of its kernels: what functions of producers call.
_IMPORTS = (
    "import torch",
    "import triton",
    "import triton.language as tl",
    "from halo_tensor.kernels.launch import Launch",
    "from halo_tensor.kernels.quantize.fast_math import fast_exp, libdevice, reciprocal, tanh",
)


def _producer(inputs: list[StandIn]) -> tuple[Any, list[StandIn]] | None:
    """Return the function that computes the elements of ``inputs``, and stand-ins for what it reads; None if there is none."""
    producers = PRODUCERS.load("halo_tensor.compiler.producers")
    if producers is None or (found := PRODUCERS.attempt(producers.producer, [x.memory.box for x in inputs])) is None:
        return None
    function, boxes = found
    try:
        return function, [StandIn.of(inputs[0].recording, box) for box in boxes]
    except Unsupported:
        return None


def _launches(body: Callable, produced: int, args: tuple) -> Any:
    """Add the launches of ``body(*args)`` to the graph.

    Returns:
        The buffers that they write, as the op returns them; None, and nothing is added, if the op must stay an op.
    """
    recording: list[tuple] = []
    try:
        first = [StandIn.of(recording, box) for box in args[: max(produced, 1)]]
        first[0].producer = _producer(first) if produced and FUSE_PRODUCERS else None
        rest = [StandIn.of(recording, a) if isinstance(a, ir.IRNode) else a for a in args[len(first) :]]
        with _disable_current_modes():  # bodies make the matrices of rotations, which must be real
            made = body(*first, *rest)
    except Unsupported:
        return None
    if any((x.shape, x.strides) != (x.memory.shape, x.memory.stride) for x in (made if isinstance(made, tuple) else (made,))):
        return None  # a view: sizes were symbols when the op was traced
    constant = any(isinstance(x, torch.Tensor) for _, arguments in recording for x in arguments)
    # Inductor loads constants of the root graph only: https://github.com/pytorch/pytorch/issues/185482 (torch 2.11 to 2.15).
    if constant and isinstance(V.graph, SubgraphLowering):
        return None
    with _all_or_none():
        for launch, arguments in recording:
            _Call(launch, arguments)
        boxes = tuple(x.memory.realized() for x in (made if isinstance(made, tuple) else (made,)))
    return boxes if isinstance(made, tuple) else boxes[0]


@contextmanager
def _all_or_none() -> Iterator[None]:
    """If the block raises, remove what it added to the graph, so that the op itself can be put there."""
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


def _lower(name: str, produced: int = 0) -> None:
    """Register the lowering of an op.

    Args:
        name: of the op.
        produced: how many tensors, from the first argument on, its kernels can compute instead of reading them.
    """
    op, body = getattr(torch.ops.halo, name).default, body_of(name)
    as_op = lowering.fallback_handler(op)
    # Inductor then writes a computed argument to memory at once. Otherwise its other readers, such as the sum of a gradient,
    # would compute it again.
    lowering.add_needs_realized_inputs(op)

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lowered(*args: Any) -> Any:
        if V.graph.cpp_wrapper or not runs_kernels(args[0].get_device()):
            return as_op(*args)
        buffers = INDUCTOR.attempt(_launches, body, produced, args)
        return as_op(*args) if buffers is None else buffers


#: Of some ops, how many tensors their kernels can compute.
_PRODUCED = {"rotate_quantize": 1, "quantize_pairs": 2}
#: The ops that compiled graphs lower to launches.
_LOWERED = (
    "rotate_quantize",
    "quantize_both",
    "quantize_pair",
    "quantize_pairs",
    "scaled_mm",
    "rotate",
    "unrotate",
    "combine",
    "gather_codes",
    "group_tiles",
    "grouped_grad",
    "grouped_mm",
    "quantize_gated",
    "quantize_gated_grad",
    "quantize_groups",
    "quantize_groups_t",
    "turn_codes",
    "turn_stack",
    "compress",
    "decompress",
    "dequantize_t",
    "pack_mask",
    "unpack_mask",
    "pack_nibbles",
    "unpack_nibbles",
)
for _name in _LOWERED:
    _lower(_name, _PRODUCED.get(_name, 0))
