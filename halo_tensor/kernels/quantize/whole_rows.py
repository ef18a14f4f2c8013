"""Launch the kernel whose programs hold whole rows: it rotates, scales and quantises in one read."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from halo_tensor.kernels.device import PRODUCER_INPUTS, has_wgmma
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv, shared_memory
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.quantize.codes import format_options
from halo_tensor.kernels.rotate import TILE, Matrix, norm, product_dtype
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import aligned, code_dtype
from halo_tensor.reference.hadamard import block_diagonal, factors, hadamard_factor, rotation_signs

#: The most elements of a row that a program holds in registers.
LARGEST_ROW = 32768
#: Up to this many rows each has a program of its own, because there are more multiprocessors. Triton's interpreter runs
#: programs one after the other.
FEW = {"cuda": 64, "cpu": 8}
#: With so many rows, of one matrix or of many weights, programs that take 32 or more of them keep every GPU busy.
MANY = 32768
#: The elements that a program holds at a time of so many rows, unless a row has more.
_TILE = 8192


def quantize_rows(
    x: torch.Tensor,
    column_rotation: Rotation | None,
    format: Format,
    gain: torch.Tensor | None,
    fold_columns: torch.Tensor | None,
    into: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes [m, k] of x R_column diag(fold_columns) and their scales [m].

    Args:
        x: matrix [m, k] of whole blocks.
        gain: float32 [k], which multiplies the columns of x before the rotation.
        into: the codes and scales to overwrite.
    """
    function: Any = None
    inputs: list[Any] = [x]
    if column_rotation is None or column_rotation.edge <= TILE:  # larger matrices leave no shared memory for its inputs
        # In a compiled graph, the stand-in for x may have a producer, whose inputs the kernel reads instead of x.
        function, inputs = getattr(x, "producer", None) or (None, [x])
    inputs = [*inputs, *[None] * (PRODUCER_INPUTS - len(inputs))]
    quantize = row_quantizer(
        x.shape[1], x.dtype, x.device, column_rotation, format, gain is not None, fold_columns is not None, function
    )
    return quantize(x, gain, fold_columns, into, inputs)


def holds_row(x: torch.Tensor | Matrix, column_rotation: Rotation | None, gained: bool = False) -> bool:
    """Whether a program has room for a whole row of x and its rotation, and for a gain of the columns if ``gained``."""
    k = reference.padded(x.shape[1], column_rotation)
    if k > LARGEST_ROW:
        return False
    if column_rotation is None or x.device.type != "cuda":
        return True
    return _holds_rotated_row(k, x.dtype, x.device, column_rotation, gained)


# Cached because eager ops ask in every call.
@lru_cache(maxsize=4096)
def _holds_rotated_row(k: int, dtype: torch.dtype, device: torch.device, column_rotation: Rotation, gained: bool) -> bool:
    """:func:`holds_row` for rows of ``k`` elements on a GPU."""
    a, b = factors(column_rotation.edge) or (1, column_rotation.edge)
    if not has_wgmma(device) and (dtype == torch.float32 or a > 1):
        return False  # it would spill registers
    # Numbers in bfloat16: the one or two matrices of the rotation, and an operand for each. Float32 rows are cut into parts.
    operands = max(b, TILE) ** 2 + triton.next_power_of_2(k)
    if a > 1:
        operands += max(triton.next_power_of_2(a), 16) ** 2 + triton.next_power_of_2(k)
    if gained and not has_wgmma(device):
        operands += triton.next_power_of_2(k)
    return 2 * operands <= shared_memory(device)


def row_quantizer(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    column_rotation: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a function of a matrix [rows, k] that returns its codes and scales, by one launch.

    Its arguments are the matrix, the gain, the fold of columns, the codes and scales to overwrite, and the tensors that
    ``producer`` reads; all but the first may be None. Everything that does not depend on the number of rows is decided here.

    Args:
        gained, folded: whether a gain, and whether a fold of columns, is given.
        producer: a Triton function that computes the matrix from other tensors, see
            :mod:`halo_tensor.compiler.producers`.
    """
    planned = plan_whole_rows(k, dtype, device, column_rotation, format, gained, folded, producer)
    code, stride = code_dtype(format), aligned(k)
    nothing = (None,) * (PRODUCER_INPUTS - 1)

    def quantize(
        x: torch.Tensor,
        gain: torch.Tensor | None = None,
        fold_columns: torch.Tensor | None = None,
        into: tuple[torch.Tensor, torch.Tensor] | None = None,
        inputs: list[torch.Tensor | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m = x.shape[0]
        if into is None:
            codes, scales = x.new_empty_strided((m, k), (stride, 1), dtype=code), x.new_empty(m, dtype=torch.float32)
        else:
            codes, scales = into
        numbers = (m, *x.stride(), codes.stride(0))
        planned(numbers, *(inputs or (x, *nothing)), gain, fold_columns, codes, scales)
        return codes, scales

    return quantize


@lru_cache(maxsize=4096)
def plan_whole_rows(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    column_rotation: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> Planned:
    """Return the launches for rows of ``k`` numbers of ``dtype``. The other arguments are those of :func:`row_quantizer`.

    A call takes (rows, strides of x, row stride of the codes), then x or what ``producer`` reads, PRODUCER_INPUTS tensors in
    all, the gain, the fold of columns, the codes and the scales.
    """
    launch, constants, matrices = row_constants(k, dtype, device, column_rotation, format, gained, folded, producer)
    few, chunks, width = FEW[device.type], constants["CHUNKS"], constants["WIDTH"]

    def prepare(chosen: RowLaunch) -> Variant:
        options = {"ROWS": chosen.rows, "STEPS": chosen.steps, "STAGES": chosen.stages, "num_warps": chosen.warps}

        def sizes(m: int, stride_row: int, stride_column: int, stride_codes: int) -> tuple:
            return (cdiv(m, chosen.rows * chosen.steps),), (m, k, stride_row, stride_column, stride_codes)

        return Variant(Launch(kernels.whole_rows, constants | options), sizes, matrices)

    def classify(m: int, *strides: int) -> RowLaunch:
        return launch.for_few(chunks, width) if m <= few else launch.for_rows(m, chunks * width)

    return Planned(prepare, classify)


def row_constants(
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    column_rotation: Rotation | None,
    format: Format,
    gained: bool,
    folded: bool,
    producer: Any = None,
) -> tuple["RowLaunch", dict[str, Any], tuple[torch.Tensor | None, ...]]:
    """Return how rows are launched, the kernel's constants except STEPS, and its matrices: the rotation's one or two, and
    its signs."""
    a, b = (column_rotation and factors(column_rotation.edge)) or (1, 0)
    full = column_rotation is not None and a > 1
    matrix = left_matrix = signs = None
    if column_rotation is not None and full:
        width, chunks = b, max(triton.next_power_of_2(a), 16)
        matrix = hadamard_factor(b, device).to(product_dtype(dtype, device))
        left_matrix = _padded_factor(a, chunks, device)
        signs = rotation_signs(column_rotation, device)
    else:
        width = b if b > TILE else min(TILE, max(triton.next_power_of_2(k), 16))
        chunks = triton.next_power_of_2(max(cdiv(k, width), 1))
        if column_rotation is not None:
            matrix = block_diagonal(column_rotation, width, product_dtype(dtype, device), device, transposed=False)
    rotated = column_rotation is not None
    launch = _row_launch(chunks * width, chunks, full or width > TILE, rotated, producer is not None)
    constants = {
        "ROWS": launch.rows, "CHUNKS": chunks, "WIDTH": width, "STAGES": launch.stages,
        "GAIN": gained, "ROTATE": rotated, "FULL": full, "FOLD": folded, "NORM": norm(column_rotation),
        "num_warps": launch.warps, "PRODUCER": producer, **format_options(format, device),
    }  # fmt: skip
    return launch, constants, (matrix, left_matrix, signs)


@lru_cache
def _padded_factor(n: int, edge: int, device: torch.device) -> torch.Tensor:
    """Return [edge, edge] zeros with H_nᵀ in the first corner."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.nn.functional.pad(hadamard_factor(n, device).t(), (0, edge - n, 0, edge - n)).to(dtype).contiguous()


class RowLaunch(NamedTuple):
    """How a program goes through rows.

    Attributes:
        rows: how many it holds at a time.
        steps: how many times it takes that many rows; 0 if the number of rows decides.
        warps, stages: Triton's launch options.
    """

    rows: int
    steps: int
    warps: int
    stages: int

    def for_rows(self, m: int, row: int) -> "RowLaunch":
        """Return the launch for ``m`` rows of ``row`` elements, more than a few. Many numbers of rows share a launch.

        A program takes at most 16 rows in all, and less where 256 programs would not get work otherwise. Of MANY rows it takes
        more, and so loads the rotation less often, as measured on an H200 (docs/notes/quantisers.md).
        """
        if self.steps:
            return self
        if m < MANY:
            return self._replace(steps=1 << max(min(16, m // 256) // self.rows, 1).bit_length() - 1)
        rows = max(min(self.rows, _TILE // row), 1)
        steps = max(64 if m >= 2 * MANY else 32, min(16 * _TILE // row, 128)) // rows
        return self._replace(rows=rows, steps=steps, warps=4 if rows * row <= _TILE else self.warps)

    def for_few(self, chunks: int, width: int) -> "RowLaunch":
        """Return the launch for few rows of ``chunks`` pieces of ``width`` elements.

        A program takes one row, or as many as have 16 pieces, which is the height of a product (docs/notes/quantisers.md).
        """
        if self.rows == 1:
            return self._replace(steps=1, stages=1)
        rows = max(1, 16 // chunks)
        return RowLaunch(rows, 1, 4 if rows * chunks * width <= 4096 else 8, 1)


def _row_launch(row: int, chunks: int, large: bool, rotated: bool, produced: bool) -> RowLaunch:
    """Return the launch for rows padded to ``row`` elements, by measurements on one H100 (docs/notes/quantisers.md).

    Args:
        chunks: pieces of a row.
        large: whether the rotation's matrices leave no shared memory for pipelining.
        rotated: whether rows are rotated.
        produced: whether rows are computed from tensors that are read. Other programs hide that better than a pipeline.
    """
    if large:
        return RowLaunch(1, 16, 8 if row <= 16384 else 16, 1)
    rows = max(1, (8192 if row <= 4096 or (rotated and produced) else 16384) // row)
    while rows > 1 and rows * chunks > 512:  # many narrow pieces
        rows //= 2
    tile = rows * row
    warps = 4 if tile <= 8192 else 8 if tile <= 16384 else 16
    if not rotated or produced:
        return RowLaunch(rows, 1, 16 if produced and not rotated and tile > 8192 else warps, 1)
    return RowLaunch(rows, 0, warps, 3 if tile <= 16384 else 2)
