"""Quantise many weights again, as after an optimiser's step, with one launch for all weights that are alike.

To issue a launch for each weight takes the CPU longer than the GPU needs to run them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from halo_tensor.kernels.launch import Launch, SizedLaunch, cdiv
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.quantize.codes import dense
from halo_tensor.kernels.quantize.plan import Task, rotate_quantize
from halo_tensor.kernels.quantize.whole_rows import row_constants
from halo_tensor.kernels.rotate import Matrix
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference

#: Groups that CUDA graphs read in every replay. They are kept so that their tensors are never freed.
_captured: list[list["_Group"]] = []


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
    dense_gains = [dense(gain) for gain in gains] or [None] * len(xs)
    operands = list(zip(xs, codes, scales, dense_gains, strict=True))
    weights = tuple(
        _Weight(Matrix.of(x), c.stride(0), (x.data_ptr(), c.data_ptr(), s.data_ptr(), 0 if g is None else g.data_ptr()))
        for x, c, s, g in operands
    )
    groups, single = _plan(weights, row_rotation, column_rotation, format, granularity)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.append(groups)
    for launch, like, table, matrices in groups:
        launch(xs[like], table, *(table if matrix is None else matrix for matrix in matrices))
    for index in single:
        x, code, scale, gain = operands[index]
        rotate_quantize(
            x, row_rotation, column_rotation, format, granularity, None, None, True, False, (code, scale), gain=gain
        )


# A key holds pointers, and an optimiser asks with the same ones in every step. They are valid: the caller has the tensors.
@lru_cache(maxsize=4096)
def _plan(
    weights: tuple[_Weight, ...],
    row_rotation: Rotation | None,
    column_rotation: Rotation | None,
    format: Format,
    granularity: str,
) -> tuple[list[_Group], list[int]]:
    """Return the groups, and the indices of the weights that need launches of their own."""
    alike: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        kind: tuple = (index,)
        if _can_be_grouped(weight, Task(weight.x, row_rotation, column_rotation, granularity, False)):
            kind = weight.x._replace(shape=weight.x.shape[1:]), weight.stride, weight.gained
        alike.setdefault(kind, []).append(index)
    groups = [group for group in alike.values() if len(group) > 1]
    single = [group[0] for group in alike.values() if len(group) == 1]
    return [_plan_group([weights[i] for i in group], group[0], column_rotation, format) for group in groups], single


def _can_be_grouped(weight: _Weight, task: Task) -> bool:
    """Whether the kernel of whole rows does all of the work, from pointers at multiples of 16 bytes."""
    x = weight.x
    if x.dtype == torch.float64 or (weight.gained and x.dtype == torch.float16) or any(p % 16 for p in weight.pointers):
        return False
    if not task.takes_whole_rows() or task.needs_rotation_first() or (weight.gained and not task.applies_gain()):
        return False
    return reference.padded(x.shape[1], task.column_rotation) == x.shape[1]


def _plan_group(group: list[_Weight], like: int, column_rotation: Rotation | None, format: Format) -> _Group:
    (x, stride, _), gained = group[0], group[0].gained
    rows, options, matrices = row_constants(x.shape[1], x.dtype, x.device, column_rotation, format, gained, False)
    steps = rows.steps_for(sum(weight.x.shape[0] for weight in group))
    entries, programs = [], 0
    for weight in group:
        entries.append((programs, weight.x.shape[0], *weight.pointers))
        programs += cdiv(weight.x.shape[0], rows.rows * steps)
    table = torch.tensor(entries, dtype=torch.int64).t().contiguous().to(x.device)
    constants = options | {"STEPS": steps, "ENTRIES": triton.next_power_of_2(len(group))}
    launch = Launch(kernels.whole_rows_of_many, constants)
    return _Group(launch.sized((programs,), (len(group), x.shape[1], *x.stride, stride)), like, table, matrices)
