"""Producers: Triton functions that compute the elements of a quantiser's input, so that it is never written to memory.

In a compiled graph, X is often the result of elementwise operations (SwiGLU) that nothing else reads, and so are the two
gradients E of its backward. Inductor would write them in one kernel, and the quantiser would read them in the next. Instead,
Inductor's description of its kernel is run once with names in place of values. That gives the source of a function of row and
column, which the quantiser calls.

A producer computes in float32 and rounds to the dtype of the matrix, as Inductor's kernel does. But quantisers have no fused
multiply-adds and a faster exp (:mod:`halo_tensor.kernels.quantize.fast_math`), so a value near the middle between two numbers
of that dtype may be rounded to the other one.

Private API: ``torch._inductor.ir`` (ComputedBuffer, Pointwise, TensorBox, StorageBox), ``ops_handler.DefaultHandler`` and the
names of its operations, ``virtualized.V`` (set_ops_handler, graph.sizevars, graph.operations, graph.try_get_buffer). Tested
with torch 2.11 to 2.15 (:data:`halo_tensor.fences.fast_paths.PRODUCERS`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.virtualized import V

from halo_tensor.kernels.device import INTERPRETED, PRODUCER_INPUTS

_ROW, _COLUMN = sympy.symbols("row column", integer=True, nonnegative=True)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: How many matrices a producer of one or two matrices may read for it to pay. A producer of one saves writing the matrix once
#: and reading it once; a producer of two saves writing both, and reading each twice. In exchange, every pass of the quantiser
#: reads what the producer reads. Inductor's kernel may read it too, if it computes something else as well.
_MOST_MATRICES = {1: 2, 2: 3}
_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.squeeze.dim, _aten.unsqueeze.default)
_OPERATIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "truediv": "({} / {})", "neg": "-{}",
    "exp": "fast_exp({})", "rsqrt": "libdevice.rsqrt({})", "sqrt": "tl.sqrt_rn({})", "erf": "libdevice.erf({})",
    "tanh": "tanh({})",
}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A Triton function. Generated code contains its definition, and the constants of a launch its name."""

    source: str

    @property
    def name(self) -> str:
        return f"halo_producer_{sha256(self.source.encode()).hexdigest()[:12]}"

    def __repr__(self) -> str:
        return self.name

    def definition(self) -> str:
        return f"@triton.jit\ndef {self.name}{self.source}\n"


class _Unknown(Exception):
    """:class:`_Writer` cannot express an operation, an index or a dtype."""


class _Writer(DefaultHandler):
    """A handler of Inductor's operations that writes source code. Values are names of variables.

    Attributes:
        ranges: the symbols for row and column, with the number of rows and of columns.
        lines: expression -> the variable that holds it.
        tensors: names of the tensors that the function reads.
        matrices: those of which it reads every element.
    """

    def __init__(self, rows: int, columns: int):
        self.ranges = {_ROW: rows, _COLUMN: columns}
        self.lines: dict[str, str] = {}
        self.tensors: list[str] = []
        self.matrices: set[str] = set()

    def _default(self, name: str, args: tuple, kwargs: dict) -> str:
        if name not in _OPERATIONS or kwargs:
            raise _Unknown(name)
        if not any(x in self.lines.values() for x in args):
            raise _Unknown("of constants")
        return self._variable(_OPERATIONS[name].format(*args))

    def _variable(self, expression: str) -> str:
        return self.lines.setdefault(expression, f"t{len(self.lines)}")

    def sigmoid(self, x: str) -> str:
        negative = self._default("neg", (x,), {})
        return self.truediv("1.0", self._default("add", (self._default("exp", (negative,), {}), "1.0"), {}))

    def reciprocal(self, x: str) -> str:
        return self.truediv("1.0", x)

    def mul(self, a: str, b: str) -> str:
        return a if b == "1.0" else self._default("mul", (a, b), {})  # some versions of Inductor end a sigmoid like this

    def truediv(self, a: str, b: str) -> str:
        """Divide, by a reciprocal if b is 1 + exp(…), so that silu and its derivative share one sigmoid.

        The reciprocal of any other b may be too small for float32.
        """
        expressions = {name: expression for expression, name in self.lines.items()}
        exp, _, one = expressions.get(b, "").partition(" + ")
        if one != "1.0" or not expressions.get(exp, "").startswith("fast_exp("):
            return self._default("truediv", (a, b), {})
        inverse = self._variable(f"reciprocal({b})")
        return inverse if a == "1.0" else self._variable(f"{a} * {inverse}")

    def constant(self, value: float, dtype: torch.dtype) -> str:
        if not dtype.is_floating_point or value - value != 0:
            raise _Unknown(f"constant {value}")
        return repr(float(value)) if value >= 0 else f"({float(value)!r})"

    def index_expr(self, value: sympy.Expr, dtype: torch.dtype) -> str:
        if not sympy.sympify(value).is_Integer:
            raise _Unknown(value)
        return self.constant(int(value), dtype)

    def to_dtype(self, x: str, dtype: torch.dtype, src_dtype: Any = None, use_compute_types: bool = True) -> str:
        if dtype == torch.float32 or (use_compute_types and dtype in (torch.bfloat16, torch.float16)):
            return x
        if dtype not in (torch.bfloat16, torch.float16):
            raise _Unknown(dtype)
        return self._variable(f"{_rounded(x, dtype)}.to(tl.float32)")

    def load(self, name: str, index: sympy.Expr) -> str:
        dtype = V.graph.get_dtype(name)
        if dtype not in _DTYPES:
            raise _Unknown(dtype)
        index = sympy.expand(V.graph.sizevars.simplify_with_ranges(index, self.ranges))
        by_row, by_column, start = index.coeff(_ROW), index.coeff(_COLUMN), index.subs({_ROW: 0, _COLUMN: 0})
        if index != by_row * _ROW + by_column * _COLUMN + start or not all(n.is_Integer for n in (by_row, by_column, start)):
            raise _Unknown(index)
        if by_column != 1:
            # Either columns are not adjacent, and reading whole rows is slow. Or there is a value per row, as in the last step
            # of a norm: the kernel that computes the norm's statistics reads x as well, so there is little to gain.
            raise _Unknown(index)
        if name not in self.tensors:
            self.tensors.append(name)
        if by_row != 0:
            self.matrices.add(name)
        at = [f"x{self.tensors.index(name)}", "column"]
        at += [f"row * {by_row}"] if by_row != 0 else []
        at += [str(start)] if start != 0 else []
        return self._variable(f"tl.load({' + '.join(at)}, mask=inside, other=0.0).to(tl.float32)")

    def function(self, results: list[str], dtype: torch.dtype) -> Function:
        tensors = ", ".join(f"x{i}" for i in range(PRODUCER_INPUTS))
        lines = [f"{name} = {expression}" for expression, name in self.lines.items()]
        # Elements outside of the matrix must be zero, and operations on zeros may give something else.
        lines += [f"y{i} = tl.where(inside, {result}, 0.0)" for i, result in enumerate(results)]
        lines += [f"return {', '.join(_rounded(f'y{i}', dtype) for i in range(len(results)))}"]
        return Function(f"({tensors}, row, column, inside):\n    " + "\n    ".join(lines))


def _rounded(x: str, dtype: torch.dtype) -> str:
    """Return the source that rounds a float32 to ``dtype``.

    Triton's interpreter does not support bfloat16 (https://github.com/triton-lang/triton/issues/4972, Triton 3.6 to 3.9): it
    truncates float32, and treats denormals in another way. So there the value is rounded to bfloat16's grid first.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        bits = f"{x}.to(tl.int32, bitcast=True)"
        x = f"(({bits} + 0x7FFF + (({bits} >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)"
    return f"{x}.to(tl.{str(dtype).removeprefix('torch.')})"


def producer(boxes: Sequence[Any]) -> tuple[Function, list[Any]] | None:
    """Return a function that computes the elements of matrices.

    Args:
        boxes: Inductor's values of the matrices, the first arguments of the op that is being lowered: one, or two of one shape
            and dtype.

    Returns:
        The function and the buffers that it reads; None if there is no such function, or if it does not pay.
    """
    buffers = [box.data for box in boxes if isinstance(getattr(box, "data", None), ir.ComputedBuffer)]
    if len(buffers) < len(boxes) or not all(map(_is_alone, V.graph.current_node.args[: len(boxes)])):
        return None
    sizes, dtype, device = [*buffers[0].get_size()], buffers[0].get_dtype(), buffers[0].get_device()
    if len(sizes) != 2 or dtype not in _DTYPES:
        return None
    for buffer in buffers:
        alike = [*buffer.get_size()] == sizes and buffer.get_dtype() == dtype
        if not alike or not isinstance(buffer.data, ir.Pointwise) or [*buffer.data.get_size()] != sizes:
            return None
    # What they read must not have been written to since. Inductor realises a buffer before that happens.
    if any(output.get_mutation_names() for output in _outputs_since(buffers)):
        return None
    writer = _Writer(*map(int, sizes))
    try:
        read = {name: _frozen(name) for buffer in buffers for name in buffer.get_read_names()}
        with V.set_ops_handler(writer):
            results = [str(buffer.data.inner_fn([_ROW, _COLUMN])) for buffer in buffers]
    except _Unknown:
        return None
    if len(writer.matrices) > _MOST_MATRICES[len(boxes)]:
        return None
    inputs = [read[name] for name in writer.tensors]
    # A scalar may be on the CPU. Inductor's launches read it there and pass its value; ours pass pointers.
    if not 0 < len(inputs) <= PRODUCER_INPUTS or any(box.get_device() != device for box in inputs):
        return None
    return writer.function(results, dtype), inputs


def _outputs_since(buffers: list[ir.ComputedBuffer]) -> list[Any]:
    """Return the outputs of the operations from the first one on that makes one of ``buffers``."""
    start = next(i for i, operation in enumerate(V.graph.operations) if any(operation is buffer for buffer in buffers))
    return [output for operation in V.graph.operations[start:] for output in operation.get_outputs()]


def _is_alone(x: Any) -> bool:
    """Whether only one node reads x. If others read it, it is written anyway."""
    while isinstance(x, torch.fx.Node) and x.target in _VIEWS and len(x.users) == 1:
        x = x.args[0]
    return isinstance(x, torch.fx.Node) and len(x.users) == 1


def _frozen(name: str) -> Any:
    """Return the buffer called ``name``, with its strides settled."""
    box = V.graph.try_get_buffer(name)
    if box is None:
        raise _Unknown(name)
    if not isinstance(box, ir.TensorBox):
        box = ir.TensorBox(ir.StorageBox(box))
    box.freeze_layout()
    return box
