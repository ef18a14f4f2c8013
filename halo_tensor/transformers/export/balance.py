"""A balance, folded into what comes before the balanced layers, since servers know no gains of columns.

A balanced layer multiplies columns of X by powers of two u before it rotates and quantises them. If X is the output of a norm
that only layers with this u read, u goes into the norm's weight. X of ``down_proj`` is act(gate) · up, so u goes into the rows
of ``up_proj``, and X of ``o_proj`` is a mean of rows of values, so u goes into the rows of ``v_proj``, if each query head has
its own. A row's scale takes the factor, so that codes stay as they are.

All of this is exact, since u are powers of two. So it is checked by running the model on some tokens: the output with folded
gains must be the same, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from halo_tensor.analysis.capture import hooked
from halo_tensor.analysis.trial_run import untouched
from halo_tensor.transformers.export.choice import Choice
from halo_tensor.weight.tensor import HaloWeight

#: A layer -> the layer of the same parent whose rows are the columns of its X, up to factors that do not mix them.
ROWS_OF = {"down_proj": "up_proj", "o_proj": "v_proj"}
NOT_FOLDED = "its balance cannot be folded into what comes before it"


def fold(model: PreTrainedModel, choice: Choice) -> dict[str, torch.Tensor]:
    """Find where the gains of balanced layers go, and leave layers in high precision whose gains go nowhere.

    Args:
        model: with codes up to date. It runs on a few tokens and is left as it was.
        choice: layers to export.

    Returns:
        the qualified name of a module -> factors of the elements of its norm's weight, or of its rows: float32, on the model's
        device.
    """
    balanced = {name: operand.undo_gain for name, operand in choice.codes.items() if operand.undo_gain is not None}
    if not balanced:
        return {}
    factors: dict[str, torch.Tensor] = {}
    for name, source in _sources(model, balanced).items():
        if source is None:
            choice.leave(name, NOT_FOLDED)
        else:
            factors[source] = balanced[name]
    if factors and not _is_exact(model, choice, factors):
        for name in [name for name in balanced if name in choice.codes]:
            choice.leave(name, NOT_FOLDED)
        return {}
    return factors


def apply(factors: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Multiply tensors of a checkpoint, in its dict, by what :func:`fold` returned."""
    for name, factor in factors.items():
        weight = f"{name}.weight_scale" if f"{name}.weight_scale" in state else f"{name}.weight"
        for key in (weight, f"{name}.bias"):
            if key in state:
                state[key] = _scaled(state[key], factor)


def _scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the elements of a vector, or the rows of a matrix."""
    return (tensor * (factor if tensor.ndim == 1 else factor[:, None])).to(tensor.dtype)


def _sources(model: PreTrainedModel, balanced: Mapping[str, torch.Tensor]) -> dict[str, str | None]:
    """Return, for each balanced layer, the name of the module that can take its gain; None if there is none."""
    modules = dict(model.named_modules())
    readers = _readers_of_norms(model)
    found: dict[str, str | None] = {}
    for name, gain in balanced.items():
        norm = next((norm for norm, names in readers.items() if name in names), None)
        parent, _, leaf = name.rpartition(".")
        rows = f"{parent}.{ROWS_OF[leaf]}" if leaf in ROWS_OF else ""
        found[name] = None
        if norm is not None:
            if all(other in balanced and torch.equal(balanced[other], gain) for other in readers[norm]):
                found[name] = norm
        elif isinstance(layer := modules.get(rows), nn.Linear) and layer.out_features == len(gain) and _takes_rows(layer):
            found[name] = rows
    return found


def _takes_rows(layer: nn.Linear) -> bool:
    """Whether the rows of a layer's weight can be multiplied: a converted one has to hold codes with a scale for each row."""
    weight: Any = layer.weight
    return not isinstance(weight, HaloWeight) or (weight.scale is not None and weight.scale.ndim == 1)


def _readers_of_norms(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the name of each module whose only parameters are vectors -> names of the linear layers that read its output."""
    norms: dict[str, nn.Module] = {}
    linears: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = list(module.parameters())
        if isinstance(module, nn.Linear):
            linears[name] = module
        elif own and all(p.ndim == 1 for p in own) and "weight" in module._parameters:
            norms[name] = module
    outputs: dict[int, tuple[str, Any]] = {}  # by id; what is held here cannot be freed, so ids stay unique
    readers: dict[str, list[str]] = {}

    def wrote(name: str) -> Callable:
        return lambda module, args, output: outputs.update({id(output): (name, output)})

    def read(name: str) -> Callable:
        def observe(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            norm, _ = outputs.get(id(args[0] if args else None), (None, None))
            if norm is not None:
                readers.setdefault(norm, []).append(name)

        return observe

    with ExitStack() as stack:
        stack.enter_context(hooked(linears, read, before=True))
        for name, module in norms.items():
            stack.enter_context(module.register_forward_hook(wrote(name)))
        _output(model)
    return readers


def _is_exact(model: PreTrainedModel, choice: Choice, factors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model computes the same with these factors in place of gains."""
    expected = _output(model)
    with _folded(model, choice, factors) as is_reversible:
        return is_reversible and torch.equal(_output(model), expected)


@contextmanager
def _folded(model: PreTrainedModel, choice: Choice, factors: Mapping[str, torch.Tensor]) -> Iterator[bool]:
    """Fold inside the block; yields whether no factor overflows or underflows."""
    operands = [operand for operand in choice.codes.values() if operand.gains is not None]
    gains = [operand.gains for operand in operands]
    tensors = [t for name in factors for t in _parts(model.get_submodule(name))]
    before = [t.detach().clone() for t in tensors]
    is_reversible = True
    try:
        for name, factor in factors.items():
            for tensor in _parts(model.get_submodule(name)):
                scaled = _scaled(tensor, factor)
                is_reversible &= torch.equal(_scaled(scaled, 1 / factor), tensor)
                tensor.data.copy_(scaled)
        for operand in operands:
            operand.gains = None
        yield is_reversible
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
        for operand, pair in zip(operands, gains, strict=True):
            operand.gains = pair


def _parts(module: nn.Module) -> list[torch.Tensor]:
    """The tensors that a factor multiplies: of a converted weight its scales, since codes and the master stay as they are."""
    weight: Any = module.weight
    parts: list[Any] = [weight.scale if isinstance(weight, HaloWeight) else weight, getattr(module, "bias", None)]
    return [part for part in parts if part is not None]


def _output(model: PreTrainedModel) -> torch.Tensor:
    with untouched(model), torch.no_grad():
        inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
        return model(**inputs)[0]
