"""Quantise many weights again, as after an optimiser's step, with one launch for all weights that are alike.

To issue a launch for each weight takes the CPU longer than the GPU needs to run them. Weights stay where they are from step to
step, so a table of their addresses is kept on the GPU, and found by these addresses. Transposed codes, which two passes over a
matrix make, have no such launch: the passes over each weight are recorded once for each shape.
"""

from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton

from halo_tensor.kernels.launch import Launch, SizedLaunch, cdiv
from halo_tensor.kernels.quantize import kernels, packing
from halo_tensor.kernels.quantize.codes import dense
from halo_tensor.kernels.quantize.plan import Task, rotate_quantize
from halo_tensor.kernels.quantize.whole_rows import row_constants
from halo_tensor.kernels.recorded import Recorded
from halo_tensor.kernels.rotate import Matrix
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import code_dtype

_DATA_PTR = torch.Tensor.data_ptr
#: The most plans that are remembered.
_REMEMBERED = 1024


class _Weight(NamedTuple):
    """A weight, as launches see it.

    Attributes:
        x: its shape, strides, dtype and device.
        stride: the row stride of its codes.
        pointers: the addresses of x, codes, scales and gain; 0 for no gain.
    """

    x: Matrix
    stride: int
    pointers: tuple[int, int, int, int]

    @property
    def gained(self) -> bool:
        """Whether it has a gain."""
        return self.pointers[3] != 0


class _Group(NamedTuple):
    """One launch for weights that are alike.

    Attributes:
        launch: the launch.
        like: the index of one of the weights, whose dtype is that of all.
        table: int64 [6, weights], see :func:`halo_tensor.kernels.quantize.kernels.whole_rows_of_many`.
        matrices: the constants of the rotation.
    """

    launch: SizedLaunch
    like: int
    table: torch.Tensor
    matrices: tuple[torch.Tensor | None, ...]


class _Plan(NamedTuple):
    """The launches for many weights.

    Attributes:
        groups: of weights that share a launch.
        single: the indices of the weights that need launches of their own.
    """

    groups: list[_Group]
    single: list[int]


#: Plans by everything that they depend on, addresses included. Those are valid, since the caller has the tensors.
_plans: dict[tuple, _Plan] = {}
#: Groups that CUDA graphs read in every replay. They are kept so that their tensors are never freed.
_captured: list[list[_Group]] = []


def requantize_(
    xs: list[torch.Tensor],
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    gains: list[torch.Tensor],
) -> None:
    """Quantise each matrix again in place of its codes and scales, as :func:`halo_tensor.ops.requantize_` does."""
    dense_gains: list[Any] = [dense(gain) for gain in gains]
    pointers = tuple(map(_DATA_PTR, chain(xs, codes, scales, dense_gains)))
    layouts = tuple([(x.shape, x.stride(), x.dtype, c.stride()) for x, c in zip(xs, codes, strict=True)])
    how = row_rotation, column_rotation, format, granularity, xs[0].device, codes[0].dtype
    key = pointers, layouts, how
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _REMEMBERED:
            _plans.clear()
        plan = _plans[key] = _plan(xs, *how[:4], codes, scales, dense_gains)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.append(plan.groups)
    for launch, like, table, matrices in plan.groups:
        launch(xs[like], table, *(table if matrix is None else matrix for matrix in matrices))
    for i in plan.single:
        target, packed = codes[i], None
        if target.dtype is torch.uint8:
            target, packed = target.new_empty((xs[i].shape[0], target.shape[1] // 3 * 4), dtype=code_dtype(format)), target
        rotate_quantize(
            xs[i], row_rotation, column_rotation, format, granularity, None, None, True, False, (target, scales[i]),
            gain=dense_gains[i] if gains else None,
        )  # fmt: skip
        if packed is not None:
            packing.pack_rows_(target, format, packed)


def requantize_transposed_(
    xs: list[torch.Tensor],
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> None:
    """Quantise each matrix again in place of its transposed codes and its scales."""
    requantize = _requantizer(row_rotation, column_rotation, format, granularity)
    for x, code, scale in zip(xs, codes, scales, strict=True):
        requantize((x.shape, x.stride(), x.dtype, x.device, code.stride()), x, code, scale)


@lru_cache(maxsize=256)
def _requantizer(
    row_rotation: Rotation | None, column_rotation: Rotation | None, format: Format, granularity: str
) -> Recorded:
    """Return a function of (whatever the launches depend on, x, transposed codes, scales) that overwrites the last two."""

    def requantize(numbers: tuple, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> tuple[()]:
        into = codes, scales
        rotate_quantize(x, row_rotation, column_rotation, format, granularity, None, None, False, True, into)
        return ()

    return Recorded(requantize)


def _plan(
    xs: list[torch.Tensor],
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    gains: list[Any],
) -> _Plan:
    """Return the launches for these weights. The arguments are those of :func:`requantize_`."""
    weights = [
        _Weight(Matrix.of(x), c.stride(0), (x.data_ptr(), c.data_ptr(), s.data_ptr(), 0 if g is None else g.data_ptr()))
        for x, c, s, g in zip(xs, codes, scales, gains or [None] * len(xs), strict=True)
    ]
    packed = codes[0].dtype is torch.uint8
    alike: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        kind: tuple = (index,)
        if _can_be_grouped(weight, Task(weight.x, row_rotation, column_rotation, granularity, False), packed):
            kind = weight.x._replace(shape=weight.x.shape[1:]), weight.stride, weight.gained
        alike.setdefault(kind, []).append(index)
    groups = [
        _plan_group([weights[i] for i in group], group[0], column_rotation, format, packed)
        for group in alike.values() if len(group) > 1
    ]  # fmt: skip
    return _Plan(groups, [group[0] for group in alike.values() if len(group) == 1])


def _can_be_grouped(weight: _Weight, task: Task, packed: bool) -> bool:
    """Whether the kernel of whole rows does all of the work, from pointers at multiples of 16 bytes."""
    x = weight.x
    if x.dtype == torch.float64 or (weight.gained and x.dtype == torch.float16) or any(p % 16 for p in weight.pointers):
        return False
    if not task.takes_whole_rows() or task.needs_rotation_first() or (weight.gained and not task.applies_gain()):
        return False
    if packed and weight.stride % 4:
        return False
    return reference.padded(x.shape[1], task.column_rotation) == x.shape[1]


def _plan_group(group: list[_Weight], like: int, column_rotation: Rotation | None, format: Format, packed: bool) -> _Group:
    (x, stride, _), gained = group[0], group[0].gained
    launch, options, matrices = row_constants(x.shape[1], x.dtype, x.device, column_rotation, format, gained, False)
    rows = sum(weight.x.shape[0] for weight in group)
    launch = launch.for_rows(rows, options["CHUNKS"] * options["WIDTH"])
    entries, programs = [], 0
    for weight in group:
        entries.append((programs, weight.x.shape[0], *weight.pointers))
        programs += cdiv(weight.x.shape[0], launch.rows * launch.steps)
    table = torch.tensor(entries, dtype=torch.int64).t().contiguous().to(x.device)
    shape = {"ROWS": launch.rows, "STEPS": launch.steps, "num_warps": launch.warps}
    constants = options | shape | {"ENTRIES": triton.next_power_of_2(len(group)), "PACK": packed}
    sized = Launch(kernels.whole_rows_of_many, constants).sized((programs,), (len(group), x.shape[1], *x.stride, stride))
    return _Group(sized, like, table, matrices)
