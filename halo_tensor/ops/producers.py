"""What would write the quantiser's input, as a Triton function that the quantiser calls instead of reading it.

In a compiled graph, X is often the result of elementwise operations (SwiGLU) that nothing else reads. Inductor would write it
in one kernel for ours to read in the next. Its description of that kernel, run once with names for values, gives the source of
a function of row and column, and the matrix is never written. Values are computed in float32 and rounded to the dtype of the
matrix, by the operations that Inductor's own kernel would use; so codes stay the same, but for what fused multiply-adds, which
our kernels do without, leave in the last bit of a float32.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.virtualized import V
from triton.language import math as interpreted_math

from halo_tensor.ops.rotate_quantize import PRODUCER_INPUTS
from halo_tensor.ops.schemas import INTERPRETED

if INTERPRETED:
    libdevice = interpreted_math
else:
    from torch._inductor.runtime.triton_helpers import libdevice  # noqa: F401 (generated code takes it from here)

_ROW, _COLUMN = sympy.symbols("row column", integer=True, nonnegative=True)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.squeeze.dim, _aten.unsqueeze.default)
_OPERATIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "truediv": "({} / {})", "neg": "-{}",
    "exp": "libdevice.exp({})", "rsqrt": "libdevice.rsqrt({})", "sqrt": "tl.sqrt_rn({})", "sigmoid": "tl.sigmoid({})",
    "erf": "libdevice.erf({})",
}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A Triton function, of which generated code holds the source and a launch's constants the name."""

    source: str

    @property
    def name(self) -> str:
        return f"halo_producer_{sha256(self.source.encode()).hexdigest()[:12]}"

    def __repr__(self) -> str:
        return self.name

    def definition(self) -> str:
        return f"@triton.jit\ndef {self.name}{self.source}\n"


class _Unknown(Exception):
    """An operation, an index or a dtype that :class:`_Writer` has no words for."""


class _Writer(DefaultHandler):
    """Inductor's handler of operations that writes them down. Values are names of variables."""

    def __init__(self, rows: int, columns: int):
        self.ranges = {_ROW: rows, _COLUMN: columns}
        self.lines: dict[str, str] = {}  # expression -> the variable that holds it
        self.tensors: list[str] = []
        self.matrices: set[str] = set()  # tensors of which every element is read

    def _default(self, name: str, args: tuple, kwargs: dict) -> str:
        if name not in _OPERATIONS or kwargs:
            raise _Unknown(name)
        if not any(x in self.lines.values() for x in args):
            raise _Unknown("of constants")
        return self._variable(_OPERATIONS[name].format(*args))

    def _variable(self, expression: str) -> str:
        return self.lines.setdefault(expression, f"t{len(self.lines)}")

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
            # Columns that do not lie side by side: whole rows are the wrong way to read them. Or a value per row, as in the
            # last step of a norm: what makes its statistics reads x as well, so there is next to nothing to gain.
            raise _Unknown(index)
        if name not in self.tensors:
            self.tensors.append(name)
        if by_row != 0:
            self.matrices.add(name)
        at = [f"x{self.tensors.index(name)}", "column"]
        at += [f"row * {by_row}"] if by_row != 0 else []
        at += [str(start)] if start != 0 else []
        return self._variable(f"tl.load({' + '.join(at)}, mask=inside, other=0.0).to(tl.float32)")

    @property
    def pays(self) -> bool:
        """Not writing and reading the matrix saves two passes over it, in exchange for reads of what it is made of, which only
        move here where the kernel that made it is gone."""
        return len(self.matrices) <= 2

    def function(self, result: str, dtype: torch.dtype) -> Function:
        tensors = ", ".join(f"x{i}" for i in range(PRODUCER_INPUTS))
        lines = [f"{name} = {expression}" for expression, name in self.lines.items()]
        # What lies beyond the matrix must be zero, and an operation on zeros need not be.
        lines += [f"y = tl.where(inside, {result}, 0.0)", f"return {_rounded('y', dtype)}"]
        return Function(f"({tensors}, row, column, inside):\n    " + "\n    ".join(lines))


def _rounded(x: str, dtype: torch.dtype) -> str:
    """Triton's interpreter cuts a float32 off where bfloat16 ends, so there it is rounded first."""
    if INTERPRETED and dtype == torch.bfloat16:
        bits = f"{x}.to(tl.int32, bitcast=True)"
        x = f"({bits} + 0x7FFF + (({bits} >> 16) & 1)).to(tl.float32, bitcast=True)"
    return f"{x}.to(tl.{str(dtype).removeprefix('torch.')})"


def producer(box: Any) -> tuple[Function, list[Any]] | None:
    """The function that gives the elements of ``box``, the first argument of the op that is being lowered, and the buffers
    that it reads; None if there is no such function or it does not pay."""
    buffer = getattr(box, "data", None)
    if not (isinstance(buffer, ir.ComputedBuffer) and isinstance(buffer.data, ir.Pointwise)):
        return None
    if not _is_alone(V.graph.current_node):
        return None
    sizes, dtype = buffer.data.get_size(), buffer.get_dtype()
    # Nothing may have been written since to what it reads. Inductor realises a buffer before that happens, so it is the last.
    if V.graph.operations[-1] is not buffer or list(sizes) != list(buffer.get_size()) or len(sizes) != 2:
        return None
    if dtype not in _DTYPES:
        return None
    writer = _Writer(*map(int, sizes))
    try:
        boxes = {name: _frozen(name) for name in buffer.get_read_names()}
        with V.set_ops_handler(writer):
            result = str(buffer.data.inner_fn([_ROW, _COLUMN]))
    except _Unknown:
        return None
    read = [boxes[name] for name in writer.tensors]
    # A scalar may live on the CPU, whose memory Inductor's launches look into beforehand, and ours do not.
    if not writer.pays or not 0 < len(read) <= PRODUCER_INPUTS or any(b.get_device() != buffer.get_device() for b in read):
        return None
    return writer.function(result, dtype), read


def _is_alone(node: torch.fx.Node) -> bool:
    """Whether nothing but ``node`` reads its first argument: else that is written anyway."""
    x = node.args[0]
    while isinstance(x, torch.fx.Node) and x.target in _VIEWS and len(x.users) == 1:
        x = x.args[0]
    return isinstance(x, torch.fx.Node) and len(x.users) == 1


def _frozen(name: str) -> Any:
    """What generated code calls ``name``, its strides settled."""
    box = V.graph.try_get_buffer(name)
    if box is None:
        raise _Unknown(name)
    if not isinstance(box, ir.TensorBox):
        box = ir.TensorBox(ir.StorageBox(box))
    box.freeze_layout()
    return box
