"""Many weights quantised again, as after an optimiser's step: one launch for all that are alike, since to issue one for each
takes the CPU longer than it takes a GPU to run them."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from halo_tensor.kernels.launch import Launch, SizedLaunch, cdiv
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.quantize import plan as single
from halo_tensor.kernels.rotate import Matrix
from halo_tensor.recipe import Format, Rotation
from halo_tensor.reference import ops as reference

#: What CUDA graphs read in every replay, and so must not be freed.
_captured: list[list["_Group"]] = []


class _Weight(NamedTuple):
    """What launches need to know of a weight. Pointers: of x, codes, scales and gain, 0 for none."""

    x: Matrix
    stride: int  # of its codes' rows
    pointers: tuple[int, int, int, int]

    @property
    def gained(self) -> bool:
        return self.pointers[3] != 0


class _Group(NamedTuple):
    """A launch, and its tensors: the index of one of the matrices, a table of where all are, the rotation's constants."""

    launch: SizedLaunch
    like: int
    table: torch.Tensor
    matrices: tuple


def requantize_(
    xs: list[torch.Tensor],
    left: Rotation | None,
    right: Rotation | None,
    format: Format,
    scale: str,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    gains: list[torch.Tensor],
) -> None:
    """See :func:`halo_tensor.ops.requantize_`."""
    given = [single.dense(gain) for gain in gains] or [None] * len(xs)
    operands = list(zip(xs, codes, scales, given, strict=True))
    weights = tuple(
        _Weight(Matrix.of(x), c.stride(0), (x.data_ptr(), c.data_ptr(), s.data_ptr(), 0 if g is None else g.data_ptr()))
        for x, c, s, g in operands
    )
    groups, alone = _plan(weights, left, right, format, scale)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.append(groups)
    for launch, like, table, matrices in groups:
        launch(xs[like], table, *(table if matrix is None else matrix for matrix in matrices))
    for index in alone:
        x, *into, gain = operands[index]
        single.rotate_quantize(x, left, right, format, scale, None, None, True, False, (into[0], into[1]), gain=gain)


# A table holds pointers, and who asks for it has tensors that lie there. An optimiser asks for the same in every step.
@lru_cache(maxsize=4096)
def _plan(
    weights: tuple[_Weight, ...], left: Rotation | None, right: Rotation | None, format: Format, scale: str
) -> tuple[list[_Group], list[int]]:
    """The groups, and the indices of weights that want launches of their own."""
    alike: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        kind: tuple = (index,)
        if _may_have_company(weight, left, right, scale):
            kind = weight.x._replace(shape=weight.x.shape[1:]), weight.stride, weight.gained
        alike.setdefault(kind, []).append(index)
    groups = [group for group in alike.values() if len(group) > 1]
    alone = [group[0] for group in alike.values() if len(group) == 1]
    return [_plan_group([weights[i] for i in group], group[0], right, format) for group in groups], alone


def _may_have_company(weight: _Weight, left: Rotation | None, right: Rotation | None, scale: str) -> bool:
    """Whether whole_rows does all there is to do, with pointers at multiples of 16 bytes."""
    x, how = weight.x, (left, right, scale, False)
    if x.dtype == torch.float64 or (weight.gained and x.dtype == torch.float16) or any(p % 16 for p in weight.pointers):
        return False
    if not single.takes_whole_rows(x, *how) or single.needs_rotating_first(x, *how):
        return False
    if weight.gained and not single.gains_on_the_way(x, *how):
        return False
    return reference.padded(x.shape[1], right) == x.shape[1]


def _plan_group(group: list[_Weight], like: int, right: Rotation | None, format: Format) -> _Group:
    (x, stride, _), gained = group[0], group[0].gained
    how, options, matrices = single.row_constants(x.shape[1], x.dtype, x.device, right, format, gained, False)
    steps = how.steps_for(sum(weight.x.shape[0] for weight in group))
    entries, programs = [], 0
    for weight in group:
        entries.append((programs, weight.x.shape[0], *weight.pointers))
        programs += cdiv(weight.x.shape[0], how.rows * steps)
    table = torch.tensor(entries, dtype=torch.int64).t().contiguous().to(x.device)
    constants = options | {"STEPS": steps, "ENTRIES": triton.next_power_of_2(len(group))}
    launch = Launch(kernels.whole_rows_of_many, constants)
    return _Group(launch.sized((programs,), (len(group), x.shape[1], *x.stride, stride)), like, table, matrices)
