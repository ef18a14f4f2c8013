"""Launches of the quantisers of experts. :mod:`halo_tensor.reference.experts` defines what they compute."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from halo_tensor.kernels.experts import column_kernels, row_kernels
from halo_tensor.kernels.launch import Launch, Planned, Variant, cdiv
from halo_tensor.kernels.quantize import plan as quantizer
from halo_tensor.kernels.quantize.codes import format_options
from halo_tensor.kernels.quantize.whole_rows import LARGEST_ROW
from halo_tensor.kernels.rotate import norm, product_dtype
from halo_tensor.recipe import Format, Gate, Rotation
from halo_tensor.reference import experts as reference
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.experts import TILE
from halo_tensor.reference.hadamard import block_diagonal
from halo_tensor.reference.ops import LONGEST_SUM


class Rows(NamedTuple):
    """How a program takes rows: in pieces of ``width`` columns, ``rows`` at a time, ``steps`` times, with so many warps."""

    width: int
    rows: int
    steps: int
    warps: int


class Columns(NamedTuple):
    """How a program takes columns: ``columns`` of them, ``rows`` at a time, with so many warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


#: Of ``group_columns``.
COLUMNS = Columns(64, 128, 4, 1)
#: The most float32 values of a row's gradients that a thread holds.
HELD = 96


def group_rows(c: int) -> Rows:
    """Return how ``group_rows`` takes rows of ``c``: whole, or in pieces of a width that leaves few columns empty."""
    width = triton.next_power_of_2(c)
    if width > 8192:
        width = min((8192, 4096), key=lambda piece: cdiv(c, piece) * piece)
    rows = max(4096 // width, 2 if width <= 4096 else 1)
    return Rows(width, min(rows, 16), max(8 // rows, 1), 4 if width <= 4096 else 8)


def gated_rows(f: int) -> tuple[int, int]:
    """Return how many rows of ``f`` a program of ``gated_rows`` takes, and its warps."""
    width = max(triton.next_power_of_2(f), TILE)
    return max(8192 // width, 1), 4 if width <= 4096 else 8 if width <= 16384 else 16


def gated_grad_rows(f: int) -> Rows:
    """Return how ``gated_grad_rows`` takes rows of ``f``."""
    if f <= 1024:
        return Rows(256, 4, 4, 4)
    return Rows(1024, 2, 4, 8) if f <= 4096 else Rows(4096, 1, 8, 16)


def _gate_options(gate: Gate) -> dict[str, Any]:
    """Return the constants of a gate."""
    return {"ALPHA": gate.alpha, "LIMIT": gate.limit or 0.0, "SHIFT": gate.shift, "INTERLEAVED": gate.interleaved}


def _row_options(shape: Rows, width: int) -> tuple[dict[str, int], int]:
    """Return the constants of a kernel that takes rows of ``width``, and how many programs a tile has."""
    constants = {
        "WIDTH": shape.width, "CHUNKS": cdiv(width, shape.width), "ROWS": shape.rows, "STEPS": shape.steps, "T": TILE,
        "num_warps": shape.warps,
    }  # fmt: skip
    return constants, TILE // (shape.rows * shape.steps)


def quantize_groups(
    x: torch.Tensor, index: torch.Tensor | None, fold: torch.Tensor, tiles: torch.Tensor, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do :func:`halo_tensor.reference.experts.quantize_groups`, without writing rows of no expert."""
    rows, c = x.shape[0] if index is None else index.shape[0], x.shape[1]
    codes, scales = x.new_empty((rows, c), dtype=code_dtype(format)), x.new_empty(rows, dtype=torch.float32)
    planned = _plan_rows(c, x.dtype, x.device, format, index is not None)
    planned((tiles.shape[0], x.stride(0), c), x, index, fold, tiles, codes, scales)
    return codes, scales


@lru_cache(maxsize=4096)
def _plan_rows(c: int, dtype: torch.dtype, device: torch.device, format: Format, indexed: bool) -> Planned:
    options, parts = _row_options(group_rows(c), c)
    launch = Launch(row_kernels.group_rows, {"INDEXED": indexed, **options, **format_options(format, device)})
    return Planned(lambda _: Variant(launch, lambda tiles, stride, c: ((tiles * parts,), (stride, c))))


def quantize_groups_t(
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    fold: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    summed: bool,
    format: Format,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do :func:`halo_tensor.reference.experts.quantize_groups_t`, without writing tiles that are not needed."""
    experts, c, width = starts.shape[0] - 2, x.shape[1], TILE * tiles.shape[0]
    codes_t = x.new_empty((c, width), dtype=code_dtype(format))
    scales = x.new_empty((experts, c), dtype=torch.float32)
    sums = x.new_empty((experts, c) if summed else (0,), dtype=torch.float32)
    planned = _plan_columns(x.dtype, x.device, format, index is not None, weight is not None, summed)
    numbers = (x.stride(0), width, c, experts)
    planned(numbers, x, index, weight, fold, tiles, starts, codes_t, scales, sums)
    return codes_t, scales, sums


@lru_cache(maxsize=4096)
def _plan_columns(
    dtype: torch.dtype, device: torch.device, format: Format, indexed: bool, weighted: bool, summed: bool
) -> Planned:
    bm, bc, warps, stages = COLUMNS
    constants = {
        "INDEXED": indexed, "WEIGHTED": weighted, "T": TILE, "BM": bm, "BC": bc, "STAGES": stages, "SUMS": summed,
        "LONGEST": LONGEST_SUM, "num_warps": warps, **format_options(format, device),
    }  # fmt: skip
    launch = Launch(column_kernels.group_columns, constants)

    def sizes(stride: int, stride_t: int, c: int, experts: int) -> tuple:
        return (cdiv(c, bc), experts), (stride, stride_t, c)

    return Planned(lambda _: Variant(launch, sizes))


def quantize_gated(
    h: torch.Tensor, gate: Gate, column_rotation: Rotation | None, format: Format, gain: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the gate of h [rows, 2f] with a scale per row."""
    rows, f = h.shape[0], h.shape[1] // 2
    if f > LARGEST_ROW or (column_rotation is not None and TILE % column_rotation.edge):
        a = reference.activate(h, gate)
        codes, _, scales = quantizer.rotate_quantize(
            a, None, column_rotation, format, "row", None, None, True, False, gain=gain
        )
        return codes, scales  # type: ignore[return-value]
    codes, scales = h.new_empty((rows, f), dtype=code_dtype(format)), h.new_empty(rows, dtype=torch.float32)
    planned = _plan_gated(f, h.dtype, h.device, gate, column_rotation, format, gain is not None)
    planned((rows, f), h, gain, codes, scales)
    return codes, scales


@lru_cache(maxsize=4096)
def _plan_gated(
    f: int,
    dtype: torch.dtype,
    device: torch.device,
    gate: Gate,
    column_rotation: Rotation | None,
    format: Format,
    gained: bool,
) -> Planned:
    matrix = None
    if column_rotation is not None:
        matrix = block_diagonal(column_rotation, TILE, product_dtype(dtype, device), device, transposed=False)
    count, warps = gated_rows(f)
    constants = {
        "ROWS": count, "CHUNKS": triton.next_power_of_2(cdiv(f, TILE)), "WIDTH": TILE, "GAIN": gained,
        "ROTATE": matrix is not None, "NORM": norm(column_rotation), "num_warps": warps, **_gate_options(gate),
        **format_options(format, device),
    }  # fmt: skip
    launch = Launch(row_kernels.gated_rows, constants)
    return Planned(lambda _: Variant(launch, lambda rows, f: ((cdiv(rows, count),), (rows, f)), (matrix,)))


def quantize_gated_grad(
    h: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    gate: Gate,
    fold: torch.Tensor,
    tiles: torch.Tensor,
    kept: bool,
    format: Format,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do :func:`halo_tensor.ops.quantize_gated_grad`, without writing rows of no expert."""
    rows, f = grad.shape
    codes = h.new_empty((rows, 2 * f), dtype=code_dtype(format))
    scales, dots = (h.new_empty(rows, dtype=torch.float32) for _ in range(2))
    grad_h = h.new_empty(h.shape if kept else 0)
    planned = _plan_gated_grad(f, h.dtype, grad.dtype, h.device, gate, format, weight is not None, kept)
    planned((tiles.shape[0], f), h, grad, weight, fold, tiles, codes, scales, dots, grad_h)
    return codes, scales, dots, grad_h


@lru_cache(maxsize=4096)
def _plan_gated_grad(
    f: int, dtype: torch.dtype, grad: torch.dtype, device: torch.device, gate: Gate, format: Format, weighted: bool, kept: bool
) -> Planned:
    options, parts = _row_options(gated_grad_rows(f), f)
    held = 2 * options["ROWS"] * options["WIDTH"] * options["CHUNKS"] <= HELD * 32 * options["num_warps"]
    flags = {"WEIGHTED": weighted, "HELD": held, "KEPT": kept}
    constants = {**flags, **options, **_gate_options(gate), **format_options(format, device)}
    launch = Launch(row_kernels.gated_grad_rows, constants)
    return Planned(lambda _: Variant(launch, lambda tiles, f: ((tiles * parts,), (f,))))
