"""Runs of one model on one batch: once exactly, and once under each candidate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn

from halo_tensor.analysis import trial_run
from halo_tensor.analysis.capture import Operands, captured
from halo_tensor.analysis.fidelity import cosine
from halo_tensor.analysis.trial_run import LossFn
from halo_tensor.calibration import balance
from halo_tensor.config import LinearConfig
from halo_tensor.diagnostics.reports.data import CandidateReport
from halo_tensor.layers import kinds
from halo_tensor.layers.experts import is_experts
from halo_tensor.recipe import Recipe


@contextmanager
def comparing(model: nn.Module, batch: Any, loss_fn: LossFn | None, names: Iterable[str]) -> Iterator["Comparison"]:
    """Yield a comparison of ``model``, whose linear layers and experts ``names`` are converted. The model is restored when
    the block is left.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    layers = {name: m for name, m in modules.items() if not is_experts(m)}
    experts = {name: m for name, m in modules.items() if is_experts(m)}
    with (
        trial_run.untouched(model),
        trial_run.swapped(model, dense := trial_run.dense_parameters(model)),
        trial_run.calling_linear(layers.values()),
    ):
        yield Comparison(model, batch, loss_fn, layers, dense, experts)


class Comparison:
    """The exact run of a model, and runs that are compared with it.

    Attributes:
        layers: name -> module, the linear layers that are converted.
        experts: name -> module, the experts that are converted.
        weights: name -> dense weight, [out, in].
        gradient_of: which parameters' gradient is compared, in words.
        loss: the exact loss.
        operands: name -> the operands that reached the layer in the exact run.
    """

    loss: torch.Tensor
    operands: dict[str, Operands]

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn | None,
        layers: dict[str, Any],
        dense: dict[str, nn.Parameter],
        experts: dict[str, Any],
    ):
        self.layers, self.experts = layers, experts
        self._model, self._batch, self._loss_fn, self._dense = model, batch, loss_fn, dense
        # The weight of a Conv1D is [in, out].
        self._transposed = {name for name, module in layers.items() if not isinstance(module, nn.Linear)}
        self.weights = {name: _as_rows(dense[weight_name(name)], name in self._transposed) for name in layers}
        self._trained = {name: p for name, p in dense.items() if p.requires_grad}
        converted = {weight_name(name) for name in layers} | {
            f"{x}.{leaf}" for x, module in experts.items() for leaf in kinds.weights(module)
        }
        converted &= self._trained.keys()
        self._compared = converted or self._trained.keys()
        self.gradient_of = (
            "the converted weights" if converted else "all trainable parameters (no converted weight is trained)"
        )

    def run_exactly(self, tokens: int, balancing: bool) -> None:
        """Run the model in its own dtype. ``tokens`` rows of each layer's operands are kept.

        Raises:
            ValueError: the loss or a gradient is not finite, or the batch reaches none of the layers.
        """
        with captured(self.layers | self.experts, tokens) as self.operands:
            with balance.observed(self.layers if balancing else {}) as self._statistics:
                self.loss = trial_run.loss_of(self._model, self._batch, self._loss_fn)
            # Gradients of all trained parameters, so that backward reaches every layer that it reaches in training.
            exact = trial_run.gradients(self.loss, self._trained)
            if not all(t.isfinite().all() for t in (self.loss, *exact.values())):
                raise ValueError(
                    f"the loss is {self.loss.item()}, or a gradient is not finite: halo_tensor.find_nonfinite(model) names "
                    "where that begins"
                )
        if not self.operands:
            raise ValueError("the batch reaches none of the eligible layers")
        self._exact = {name: gradient for name, gradient in exact.items() if name in self._compared}

    def convert(
        self, recipes: dict[str, Recipe], balancing: bool, earlier: dict[str, nn.Parameter] | None = None
    ) -> dict[str, nn.Parameter]:
        """Convert the weights of linear layers to their recipes. Tied weights stay tied.

        Args:
            recipes: name of a layer -> recipe. Experts are not converted here, but for the length of a run.
            balancing: give the weights the gains that ``balance_`` would give them.
            earlier: what an earlier call returned. It is emptied, and codes in it may be used again.

        Returns:
            qualified name of the weight -> converted weight, [out, in].
        """
        earlier = {} if earlier is None else earlier
        quantized = [x for x in self._statistics.squares if x in recipes and recipes[x].output.left.format is not None]
        quantized = [x for x in quantized if x not in self._transposed]  # balance_ leaves a Conv1D alone
        to_balance = {x: self.weights[x] for x in quantized} if balancing else {}
        gains = balance.gains_of(to_balance, self._statistics) if to_balance else {}
        made: dict[tuple[nn.Parameter, Recipe], nn.Parameter] = {}
        linear = {x: recipe for x, recipe in recipes.items() if x in self.layers}
        for x, recipe in linear.items():
            key = self.weights[x], recipe
            if key not in made:
                made[key] = trial_run.converted(self.weights[x], recipe, gains.get(x), earlier.pop(weight_name(x), None))
        return {weight_name(x): made[self.weights[x], recipe] for x, recipe in linear.items()}

    def run(
        self,
        name: str,
        config: LinearConfig | None,
        recipes: dict[str, Recipe],
        weights: dict[str, nn.Parameter],
        balancing: bool,
    ) -> CandidateReport:
        """Run the model with converted ``weights``, and compare its loss and gradient with the exact ones.

        Args:
            name: of the candidate.
            config: of the candidate.
            recipes: name of a linear layer or of experts -> recipe.
            weights: what :meth:`convert` returned for these recipes.
            balancing: whether the weights were balanced.
        """
        held_by_modules = {weight_name(x) for x in self._transposed}  # a Conv1D converts its own weight
        weights = {key: weight for key, weight in weights.items() if key not in held_by_modules}
        following = {self.layers[x]: r for x, r in recipes.items() if x in self._transposed and not r.is_identity}
        experts = {self.experts[x]: recipe for x, recipe in recipes.items() if x in self.experts and not recipe.is_identity}
        with trial_run.swapped(self._model, weights), trial_run.following(following), trial_run.following_experts(experts):
            loss = trial_run.loss_of(self._model, self._batch, self._loss_fn)
            held = {f"{x}.{leaf}": w for x, m in self.experts.items() for leaf, w in kinds.weights(m).items()}
            found = trial_run.gradients(loss, {key: (self._dense | weights | held)[key] for key in self._exact})
        change = (loss - self.loss).item()
        return CandidateReport(name, config, cosine(found, self._exact), change if isfinite(change) else None, 1.0, balancing)


def weight_name(layer: str) -> str:
    """Return the qualified name of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"


def _as_rows(weight: nn.Parameter, transposed: bool) -> nn.Parameter:
    """Return a layer's weight as [out, in]."""
    return nn.Parameter(weight.detach().t(), weight.requires_grad) if transposed else weight
