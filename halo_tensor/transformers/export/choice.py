"""Which layers of a model are exported as codes, and why others are not."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from halo_tensor.convert import ties
from halo_tensor.layers import kinds, model_parts
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.operands import weight_operand
from halo_tensor.recipe import FP8_E4M3, INT8, TENSOR, Recipe
from halo_tensor.weight.tensor import HaloWeight

#: The formats for which compressed-tensors and vLLM have a W8A8 scheme.
FORMATS = (INT8, FP8_E4M3)
#: Layers of one parent that vLLM merges into one. It needs all of them in one scheme.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
UNCONVERTED = "it was not converted"
PLAIN = "its forward product is in high precision"


@dataclass
class Choice:
    """What is exported of the linear layers of a model.

    Attributes:
        codes: name -> row codes and scales of the weight of a layer that is exported as codes.
        ignored: name -> reason, of all other linear layers. They are exported in high precision.
        lost: those among ``ignored`` whose forward product was quantised when they were trained.
    """

    codes: dict[str, HadamardQuantTensor] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def leave(self, name: str, reason: str) -> None:
        """Export a layer in high precision that would have been exported as codes."""
        self.codes.pop(name, None)
        self.ignored[name] = reason
        self.lost.append(name)


def choose(model: nn.Module) -> Choice:
    """Choose among the layers of a model.

    Raises:
        ValueError: no layer can be exported as codes, or a weight or a recipe has no place in compressed-tensors.
    """
    _check_model(model)
    choice, refused = Choice(), {}
    tied = ties.tied_parameters(model)
    for name, module in model.named_modules():
        if kinds.features(module) is None:
            continue
        recipe = kinds.recipe_of(module)
        if recipe is None or recipe.is_identity:
            choice.ignored[name] = UNCONVERTED
        elif recipe.output.left.format is None:
            choice.ignored[name] = PLAIN
        elif (reason := misfit(recipe)) is not None:
            refused[name] = reason
        elif not isinstance(module, nn.Linear):
            choice.leave(name, f"compressed-tensors does not know a {type(module).__name__}")
        elif id(module.weight) in tied:
            choice.leave(name, "its weight is tied to another layer's")
        else:
            choice.codes[name] = _codes_of(module.weight)
    of_linears = {id(module._parameters.get("weight")) for module in model.modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, HaloWeight) and id(parameter) not in of_linears:
            choice.leave(name, "experts have no codes with rotations in servers")
    if refused:
        raise ValueError(f"these layers cannot be exported as W8A8:\n{_lines(refused)}")
    leave_partners(choice)
    check_any(model, choice)
    return choice


def misfit(recipe: Recipe) -> str | None:
    """Why a quantised forward product is none that compressed-tensors describes; None if it is one."""
    x, w = recipe.output.left, recipe.output.right
    if w.format not in FORMATS or x.format != w.format:
        return (
            f"its products are in {w.format}, and W8A8 is {' or '.join(map(str, FORMATS))}: train in one of those, or call "
            "dequantize_(model) and save_pretrained for a plain checkpoint"
        )
    if not all(o.granularity == TENSOR or o.granularity.is_per(side) for o, side in ((x, "tokens"), (w, "out_features"))):
        return (
            f"it has scales per {x.granularity} of X and per {w.granularity} of W: only those of granularity='row' or 'tensor'"
        )
    if x.tokens or w.out_features or (w.in_features and w.in_features.rank):
        return "only a rotation of in_features, of full rank, can be described"
    return None


def leave_partners(choice: Choice) -> None:
    """Leave a layer in high precision if vLLM merges it with one that is, or that is rotated or quantised in another way."""
    for name in list(choice.codes):
        parent, _, leaf = name.rpartition(".")
        for names in (names for names in MERGED if leaf in names):
            partners = [f"{parent}.{partner}" for partner in names]
            known = [p for p in partners if p in choice.codes or p in choice.ignored]
            schemes = {_scheme(choice.codes[p]) if p in choice.codes else None for p in known}
            if len(schemes) > 1 and name in choice.codes:
                choice.leave(name, f"vLLM merges it with {', '.join(p for p in known if p != name)}, which differ")
                return leave_partners(choice)


def check_any(model: nn.Module, choice: Choice) -> None:
    """Raise ValueError if nothing is exported as codes."""
    if not choice.codes:
        why = f":\n{_lines(choice.ignored)}" if choice.ignored else ""
        raise ValueError(
            f"no layer of this {type(model).__name__} can be exported as codes: call quantize_(model, config) first{why}"
        )


def _check_model(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if sharded := [name for name, p in parameters.items() if isinstance(p, DTensor)]:
        raise ValueError(
            f"{sharded[0]} is sharded. Gather the model first, by get_model_state_dict of torch.distributed.checkpoint with "
            "full_state_dict=True on all ranks; on one rank load that into a model that was converted and balanced in the "
            "same way, and export this one (examples/hosts/with_fsdp2.py)"
        )
    if meta := [name for name, p in parameters.items() if p.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device and has no values: load the model's weights first")
    if model_parts.adapters(model):
        raise ValueError("the model has adapters: export what merge_and_unload() returns")


def _codes_of(weight: Any) -> HadamardQuantTensor:
    """The codes of a converted weight: those that it holds, brought up to date, or those that its next forward would make."""
    operand = weight.operand
    if operand is None:
        operand = weight_operand(weight.dequantize().detach(), weight.recipe, None)
    else:
        weight.follow()
    assert operand is not None
    return operand


def _scheme(codes: HadamardQuantTensor) -> tuple:
    return codes.format, codes.column_rotation


def _lines(reasons: dict[str, str]) -> str:
    """A line for each reason, with the first names that have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "\n".join(f"  {listed(own, most=3)}: {reason}" for reason, own in names.items())


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names as text, the first ones of a long list."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stacks(model: nn.Module) -> list[str]:
    """Return what a server must also leave in high precision: the names of modules with other matrices than those of linear
    layers and embeddings, as routers, and a pattern for experts, since their names in the checkpoint differ.
    """
    names = []
    for name, module in model.named_modules():
        ranks = [p.ndim for p in module._parameters.values() if p is not None]
        if name and ranks and max(ranks) > 1 and kinds.features(module) is None and not isinstance(module, nn.Embedding):
            names += [f"re:.*\\.{name.rpartition('.')[2]}(\\..*)?$"] if max(ranks) > 2 else [name]
    return list(dict.fromkeys(names))
