"""Examine a model of transformers: what is converted, how it trains, and what it exports.

``tests/helpers/architectures.py`` has the models.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HaloWeight, dequantize_, halo_config, quantize_
from halo_tensor.convert import Conversion
from halo_tensor.layers.model_parts import output_embeddings
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog

CONFIG = halo_config(1, "int8", min_features=16)
STEPS = 3


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        model: the name of the class in transformers.
        kind: the kind of architecture, by which the tables group it.
        inputs: a function that makes a batch for the model.
        config: options of a small configuration.
    """

    model: str
    kind: str
    inputs: Callable[[nn.Module], dict[str, Any]]
    config: dict[str, Any]

    def build(self) -> nn.Module:
        kind = getattr(transformers, self.model)
        torch.manual_seed(0)
        model = kind(kind.config_class(**self.config)).float().train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # statistics of two samples are too noisy to compare
        return model


@dataclass
class Outcome:
    """Measurements of one architecture.

    Attributes:
        report: the report of the conversion; None if it was refused.
        refused: the message of the error, if the conversion was refused.
        warned: the messages of the conversion's warnings.
        share: the converted share of the parameters that multiply activations in a forward.
        called: the number of calls of converted layers in a forward.
        products: the number of quantised products in a forward.
        trained: the number of quantised products in the first training step, forward and backward.
        losses: a pair for each step: the converted model's, and that of its twin.
        cosine: between the gradients of the first step, all parameters taken together.
        exported: whether a plain model with the converted one's state dict and the dequantised model have equal outputs.
        noise: the relative distance of the converted model's outputs from these.
    """

    report: Conversion | None = None
    refused: str = ""
    warned: list[str] = field(default_factory=list)
    share: float = 0.0
    called: int = 0
    products: int = 0
    trained: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    cosine: float = 1.0
    exported: bool = False
    noise: float = 0.0

    @property
    def held(self) -> bool:
        """Whether every call of a converted layer multiplied in int8, forward and backward, and the export is exact."""
        return self.products == self.called > 0 and self.trained >= 2 * self.called and self.exported

    @property
    def difference(self) -> float:
        """The largest difference between losses, relative to the first loss."""
        return max(abs(a - b) for a, b in self.losses) / self.losses[0][1]


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "_grouped_mm", "convolution"}


class _Multiplied(TorchDispatchMode):
    """Finds the parameters that matrix products and convolutions read, by the address of their memory."""

    def __init__(self, model: nn.Module):
        super().__init__()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads = {id(p) for m in output_embeddings(model) for p in m.parameters()}
        self.owners = {
            p.untyped_storage().data_ptr(): name
            for name, p in model.named_parameters()
            if p.ndim > 1 and id(p) not in embeddings | heads
        }
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in _PRODUCTS:
            storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            self.found |= {self.owners[s] for s in storages if s in self.owners}
        return func(*args, **(kwargs or {}))


def multiplied(model: nn.Module, batch: dict[str, Any]) -> dict[str, int]:
    """Return the number of elements of each parameter, without embeddings, that a forward multiplies activations by."""
    with torch.no_grad(), _Multiplied(model) as mode:
        _forward(model, batch)
    computed = [n for n, p in model.named_parameters() if "parametrizations" in n and p.ndim > 1]  # weight norm's
    return {name: model.get_parameter(name).numel() for name in [*mode.found, *computed]}


def _forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    torch.manual_seed(1)  # the same dropout everywhere
    return model(**batch)


def _main(output: Any) -> torch.Tensor:
    """Return the output that depends on most of the model."""
    names = ("logits", "logits_per_image", "reconstruction", "reconstructed_pixel_values", "last_hidden_state", "audio_values")
    for name in names:
        if isinstance(tensor := getattr(output, name, None), torch.Tensor) and tensor.is_floating_point():
            return tensor
    return next(t for t in output.values() if isinstance(t, torch.Tensor) and t.is_floating_point())


def _loss(output: Any) -> torch.Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss.mean()
    y = _main(output)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return F.mse_loss(y, target)


def _train(model: nn.Module, batch: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Return the losses, and the gradients and the number of int8 products of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, first, products = [], {}, 0
    for step in range(STEPS):
        optimizer.zero_grad()
        with OpLog() if step == 0 else nullcontext() as log:
            loss = _loss(_forward(model, batch))
            loss.backward()
        if log is not None:
            products = _products(log)
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first, products


def _products(log: OpLog) -> int:
    """Return the number of int8 products: one for each product of a linear layer, and for each pair of those of experts."""
    grouped = [name for name, _ in log.calls if name in ("grouped_mm", "grouped_grad")]
    return log.products().count(torch.int8) + len(grouped) // 2


def examine(case: Case) -> Outcome:
    """Convert a model, train it and its unconverted twin, export it and load the export into a plain model."""
    twin = case.build()
    batch = case.inputs(twin)
    model, found = copy.deepcopy(twin), Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found.report = quantize_(model, CONFIG)
        except ValueError as error:
            found.refused = str(error)
    found.warned = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    sizes = multiplied(twin, batch)
    converted = {n for n, p in model.named_parameters() if isinstance(p, HaloWeight)}
    converted |= {f"{n}.weight" for n in (found.report.converted if found.report else ())}
    found.share = sum(n for name, n in sizes.items() if name in converted) / (sum(sizes.values()) or 1)
    if found.report is None:
        return found

    hooks, calls = [], []
    for name in found.report.converted:
        hooks.append(model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1)))
    with torch.no_grad(), OpLog() as log:
        _forward(model, batch)
    for hook in hooks:
        hook.remove()
    found.called, found.products = len(calls), _products(log)

    ours, gradients, found.trained = _train(model, batch)
    plain, expected, none = _train(twin, batch)
    assert gradients.keys() == expected.keys() and none == 0
    found.losses = list(zip(ours, plain, strict=True))
    a, b = (torch.cat([g[name].flatten() for name in sorted(g)]).double() for g in (gradients, expected))
    found.cosine = (a @ b / (a.norm() * b.norm())).item()

    state = model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    for m in (model, twin):
        m.eval()
    twin.load_state_dict(state)
    with torch.no_grad():
        quantised = _main(_forward(model, batch))
        dequantize_(model)
        outputs = [_main(_forward(m, batch)) for m in (model, twin)]
    found.exported = torch.equal(*outputs) and all(type(p) is nn.Parameter for p in model.parameters())
    found.noise = relative_error(quantised, outputs[0])
    return found


def main_reason(report: Conversion) -> str:
    """Return the reason that leaves out the most parameters."""
    elements: dict[str, int] = {}
    for name, reason in report.skipped.items():
        elements[reason] = elements.get(reason, 0) + report.sizes.get(name, 0)
    return max(elements, key=lambda reason: elements[reason])
