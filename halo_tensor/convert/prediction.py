"""The speed that the model of time predicts for the layers of a conversion, compared with bf16's."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from halo_tensor.analysis import cost, expert_roofline, gpus, roofline
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.analysis.cost import Shape
from halo_tensor.analysis.expert_roofline import ExpertShape
from halo_tensor.kernels.device import runs_scales
from halo_tensor.layers import kinds as layers
from halo_tensor.layers.experts import is_experts, top_k_of
from halo_tensor.recipe import PRODUCTS, Recipe

#: Tokens of a step for which ``quantize_`` predicts by default: a full batch, as 4 sequences of 2048.
TOKENS = 8192
#: Names of layers that are called with one input.
SHARING = (
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("to_q", "to_k", "to_v")),
    *(("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1")),
)
#: How many widths a text lists.
SHOWN = 8


@dataclass
class Prediction:
    """The predicted speed of converted layers, × bf16. ``print`` shows it by width, the slowest first.

    It is the speed of forward and backward in compiled code, where launches cost the CPU nothing, as in CUDA graphs. Layers
    that share their input, as q, k and v do, share the time in which it is quantised; they are known by their names.
    Experts of mixtures are taken to share the rows evenly, tokens · top_k / experts each, where top_k is what the module or
    its config says, or else 1. :mod:`halo_tensor.analysis.roofline` is the model, and for experts
    :mod:`halo_tensor.analysis.expert_roofline`.

    Args:
        tokens: rows of a linear layer's input in a step; output positions of a convolution.
        ceilings: the rates of the GPU; None if there is no prediction.
        why_not: why there is none, or none for some layers, as a sentence without its full stop.
        seconds: qualified name of a layer -> predicted seconds of a step in bf16, and as converted.
        sides: qualified name of a layer -> its widths, as text.

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.Linear(4096, 128)).to("meta")
        >>> predicted = quantize_(model, halo_config(1, "int8"), gpu="H200", min_gain=1.0).predicted
        >>> list(predicted.gains), predicted.gain > 1.2
        (['0'], True)
    """

    tokens: int
    ceilings: Ceilings | None = None
    why_not: str = ""
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    sides: dict[str, str] = field(default_factory=dict)

    @property
    def gains(self) -> dict[str, float]:
        """Qualified name of a layer -> predicted speed, × bf16."""
        return {name: high / low for name, (high, low) in self.seconds.items()}

    @property
    def gain(self) -> float | None:
        """The predicted speed of all layers together, × bf16; None without a prediction."""
        if not self.seconds:
            return None
        return sum(high for high, _ in self.seconds.values()) / sum(low for _, low in self.seconds.values())

    @property
    def slower(self) -> list[str]:
        """The layers that are predicted to be slower than in bf16."""
        return [name for name, gain in self.gains.items() if gain < 1]

    @property
    def where(self) -> str:
        """The GPU and the number of tokens, in words."""
        return f"on {self.ceilings.a_name} with {self.tokens} tokens" if self.ceilings else ""

    def __str__(self) -> str:
        if self.ceilings is None:
            return f"no speed is predicted: {self.why_not}. gpu='H200', for example, names a GPU"
        if self.gain is None:
            return f"no speed is predicted: {self.why_not}" if self.why_not else ""
        rates = "" if self.ceilings.measured else " (by published rates; not measured there)"
        head = f"predicted speed of these layers, compiled, {self.where}{rates}: {self.gain:.2f}× bf16"
        return "\n".join([head, *self.by_width(self.seconds)])

    def by_width(self, names: Iterable[str]) -> list[str]:
        """Return a line for each width and gain of these layers, the slowest first."""
        gains, kinds = self.gains, dict[tuple[str, str], list[str]]()
        for name in sorted(names, key=gains.__getitem__):
            kinds.setdefault((self.sides[name], f"{gains[name]:.2f}×"), []).append(name)
        lines = [f"  {gain} {sides}: {together(of)}" for (sides, gain), of in kinds.items()]
        more = len(lines) - SHOWN
        return lines if more <= 0 else [*lines[:SHOWN], f"  and {more} more widths, which are faster"]


def kind_of(name: str) -> str:
    """Return a layer's name without its numbers: layers.3.mlp.up -> layers.*.mlp.up."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model"


def together(names: Iterable[str]) -> str:
    """Name layers, those that differ in numbers only together: "layers.*.q (12 layers), head"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return ", ".join(of[0] or kind if len(of) == 1 else f"{kind} ({len(of)} layers)" for kind, of in kinds.items())


class Predictor:
    """Predicts the gain of layers on one GPU. Layers of equal widths are predicted once.

    Args:
        gpu: the name of a GPU, its ceilings, or None for the one that is at hand.
        device: where the model is.
        tokens: see :class:`Prediction`.

    Raises:
        ValueError: ``tokens`` is no positive integer, or the rates of ``gpu`` are not known.
    """

    def __init__(self, gpu: str | Ceilings | None, device: torch.device, tokens: int):
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"tokens must be a positive integer, the tokens of a training step; got {tokens!r}")
        self.tokens = tokens
        self.ceilings, self.why_not = (gpu, "") if isinstance(gpu, Ceilings) else gpus.known_ceilings(gpu, device)
        self._known: dict[tuple, tuple[float, float]] = {}

    @property
    def where(self) -> str:
        """The GPU and the number of tokens, in words."""
        return Prediction(self.tokens, self.ceilings).where

    def obstacle(self, recipe: Recipe) -> str:
        """Return why the speed of a recipe cannot be predicted, as a sentence without its full stop; "" if it can."""
        if self.ceilings is None:
            return self.why_not
        if lacking := roofline.lacking(recipe, self.ceilings):
            return f"{self.ceilings.a_name} cannot multiply {', '.join(sorted(lacking))}"
        runs = runs_scales(recipe.granularities, torch.device("cuda"))
        return "" if runs else "No kernel computes with scales of its blocks"

    def seconds(self, module: Any, recipe: Recipe, frozen: bool, sharing: int = 1) -> tuple[float, float]:
        """Return the predicted seconds of a layer in bf16 and under a ``recipe`` without an :meth:`obstacle`."""
        assert self.ceilings is not None
        key = shape_of(module, self.tokens), recipe, frozen, sharing
        if key not in self._known:
            products = [name for name in PRODUCTS if not (frozen and name == "grad_weight")]
            high, low = (seconds_of(r, key[0], products, not frozen, sharing, self.ceilings) for r in (Recipe(), recipe))
            self._known[key] = high, low
        return self._known[key]

    def of(self, model: nn.Module, names: Iterable[str]) -> Prediction:
        """Predict the converted layers of a model."""
        found = Prediction(self.tokens, self.ceilings, self.why_not)
        converted: dict[str, tuple[Any, Recipe]] = {}
        for name in names:
            module = model.get_submodule(name)
            recipe = layers.recipe_of(module)
            if layers.is_grouped_experts(module):
                continue
            obstacle = self.obstacle(recipe) if recipe is not None else ""
            found.why_not = obstacle or found.why_not
            if recipe is not None and not obstacle:
                converted[name] = module, recipe
        sharing = sharing_of(converted)
        for name, (module, recipe) in converted.items():
            found.seconds[name] = self.seconds(module, recipe, is_frozen(module), sharing[name])
            found.sides[name] = sides_of(module)
        return found


def sharing_of(converted: Mapping[str, tuple[nn.Module, Recipe]]) -> dict[str, int]:
    """Return how many layers read the input of each layer, by qualified name, as far as their names tell."""
    groups: dict[tuple, list[str]] = {}
    for name, (module, recipe) in converted.items():
        parent, _, leaf = name.removesuffix(".base_layer").rpartition(".")  # as PEFT wraps layers
        family = next((names for names in SHARING if leaf in names), name)
        groups.setdefault((parent, family, layers.widths(module)[0][0], recipe), []).append(name)
    return {name: len(names) for names in groups.values() for name in names}


def is_frozen(module: Any) -> bool:
    """Whether none of a layer's weights is trained."""
    return not any(weight.requires_grad for weight in layers.weights(module).values())


def seconds_of(
    recipe: Recipe, shape: Shape | ExpertShape, products: Collection[str], trained: bool, sharing: int, ceilings: Ceilings
) -> float:
    """Predict the time of a layer of any kind; see :func:`halo_tensor.analysis.roofline.seconds`. Only experts read the
    input of experts, and the router, which is not converted."""
    if isinstance(shape, ExpertShape):
        return expert_roofline.seconds(recipe, shape, products, trained=trained, ceilings=ceilings)
    return roofline.seconds_of(recipe, shape, products, trained=trained, sharing=sharing, ceilings=ceilings)


def shape_of(module: Any, tokens: int) -> Shape | ExpertShape:
    """Return the shape of a layer's work in a step, as far as it is known without a call."""
    if is_experts(module):
        return expert_roofline.shape_of(module, tokens)
    return cost.shape_of(module, tokens, tokens * prod(module.stride) if isinstance(module, nn.Conv2d) else tokens)


def sides_of(module: Any) -> str:
    """Return the widths of a layer as text, with the kernel of a convolution or the number of experts."""
    text = ", ".join(f"{n_in}→{n_out}" for n_in, n_out in layers.widths(module))
    if is_experts(module):
        top_k = top_k_of(module)
        return f"{module.num_experts} experts, top {top_k or f'{expert_roofline.TOP_K} (assumed)'}, of {text}"
    return f"{text}, {'×'.join(map(str, module.kernel_size))}" if isinstance(module, nn.Conv2d) else text


def warn_of_slower(prediction: Prediction, stacklevel: int = 4) -> None:
    """Warn once of the layers that are predicted to be slower than in bf16."""
    if slower := prediction.slower:
        lines = "\n".join(prediction.by_width(slower))
        warnings.warn(
            f"{len(slower)} of {len(prediction.seconds)} converted layers are predicted to be slower than in bf16 "
            f"{prediction.where}:\n{lines}\n"
            "quantize_(..., min_gain=1.0) leaves them in high precision, and min_gain=0 converts them without this warning. "
            "tokens= says how many tokens your steps have",
            stacklevel=stacklevel,
        )
