"""Make the codes of many weights anew: after an op that wrote to them, or at the end of an optimiser's step.

The codes of all weights that are quantised alike come from one op, and on a GPU mostly from one launch. A step of an optimiser
writes to hundreds of weights, so there is next to no Python code for each of them.

Most optimisers write to a weight several times in a step: they decay it, then they add the update. :func:`defer` notes weights
that were written inside of ``optimizer.step()``, and their codes are made once, when it ends. If the step itself reads codes,
as a closure does, :meth:`HaloWeight.follow` makes them before.
"""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from halo_tensor import ops
from halo_tensor.fences.fast_paths import FOREACH
from halo_tensor.fences.pytorch import let_optimizers_use_foreach
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import Format, Rotation, Scales
from halo_tensor.weight.sent_rows import send_scales
from halo_tensor.weight.tensor import HaloWeight


class Kind(NamedTuple):
    """How operands are quantised by one op."""

    row_rotation: Rotation | None
    column_rotation: Rotation | None
    format: Format
    granularity: Scales
    device: torch.device
    packed: bool
    stacked: bool  #: whether the weights are stacks of experts
    transposed: bool  #: whether transposed codes are held, for grad_input alone


#: A kind -> the first one that equals it, so that equal ones are known by their id.
_KINDS: dict[Kind, Kind] = {}


class _Step(threading.local):
    """What an optimiser does in this thread.

    Attributes:
        runs: whether a step has begun and not ended.
        written: the weights that it has written to, by their ids.
    """

    runs = False

    def __init__(self) -> None:
        self.written: dict[int, HaloWeight] = {}


_step = _Step()


def requantize_all(pairs: list[tuple[HaloWeight, torch.Tensor]]) -> None:
    """Make the codes of weights anew from their dense values, with one op for all that are quantised alike."""
    alike: dict[tuple[int, bool], tuple[Kind, list[HadamardQuantTensor], list[torch.Tensor]]] = {}
    for weight, dense in pairs:
        operand = weight.grad_input_operand if weight.operand is None else weight.operand  # it holds one of them
        if operand is None:
            continue
        kind = _kind_of(weight, operand)
        if kind is None:
            operand.requantize_(dense)
            continue
        key = id(kind), operand.gain is None
        found = alike.get(key)
        if found is None:
            found = alike[key] = kind, [], []
        found[1].append(operand)
        found[2].append(dense)
    for kind, operands, xs in alike.values():
        if len(operands) == 1 and not kind.transposed:
            operands[0].requantize_(xs[0])
            continue
        codes: list[Any] = [operand.codes_t if kind.transposed else operand.codes for operand in operands]
        scales: list[Any] = [operand.scale for operand in operands]
        gains: list[Any] = [] if operands[0].gain is None else [operand.gain for operand in operands]
        if kind.stacked:
            xs = [operand.as_matrix(x) for operand, x in zip(operands, xs, strict=True)]
        how = kind.row_rotation, kind.column_rotation, kind.format, kind.granularity
        ops.requantize_(xs, *how, codes, scales, gains, kind.transposed)
        written = [*codes, *scales]
        if kind.stacked:
            for operand in operands:
                operand.after_requantize()
            written = [part for operand in operands for part in operand.parts]
        torch.autograd.graph.increment_version(written)
    for weight, _ in pairs:
        weight.mark_in_step()
    send_scales([weight for weight, _ in pairs])


def _kind_of(weight: HaloWeight, operand: HadamardQuantTensor) -> Kind | None:
    """Return how an operand is quantised; None if no other can be quantised with it. It is remembered with the weight.

    Experts [experts, in, out] are copied before they are quantised, so they are taken one after another.
    """
    remembered = weight.codes_state.kind
    if remembered is not None and remembered[0] is operand:
        return remembered[1]
    transposed = operand.codes is None
    codes = operand.codes_t if transposed else operand.codes
    traced = type(codes) is not torch.Tensor  # or fake
    if codes is None or operand.format is None or operand.scale is None or traced or weight.in_features_first:
        return None
    rotations = operand.row_rotation, operand.column_rotation
    layout = operand.is_packed, operand.ndim == 3, transposed
    kind = Kind(*rotations, operand.format, operand.granularity, codes.device, *layout)
    kind = _KINDS.setdefault(kind, kind)
    weight.codes_state.kind = operand, kind
    return kind


def defer(weights: Iterable[HaloWeight]) -> bool:
    """Note that whole weights were written, if an optimiser's step is running; then their codes are made when it ends.

    Until then the version of each master tells that the codes are behind.

    Returns:
        Whether they were noted.
    """
    if not _step.runs or is_compiling():
        return False
    written = {}
    for weight in weights:
        master = weight.master
        if type(master) is not torch.Tensor or master.is_inference():
            return False
        written[id(weight)] = weight
    _step.written.update(written)
    return True


def _begin(*args: Any) -> None:
    if not is_compiling():
        _step.runs = True
        _step.written.clear()  # of a step that an error has ended; a forward brings such weights up to date


def _end(*args: Any) -> None:
    if is_compiling():
        return
    _step.runs = False
    if _step.written:
        pairs = [(w, w.master) for w in _step.written.values() if w.master is not None]
        _step.written.clear()
        with torch.no_grad():
            requantize_all(pairs)


FOREACH.attempt(let_optimizers_use_foreach, HaloWeight)
register_optimizer_step_pre_hook(_begin)
register_optimizer_step_post_hook(_end)
