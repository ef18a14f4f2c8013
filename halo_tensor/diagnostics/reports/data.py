"""The numbers of a report. This module knows nothing of how they are measured or shown."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torchao.quantization import FqnToConfig

from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.analysis.fidelity import Fidelity, Outliers
from halo_tensor.config import LinearConfig

HIGH_PRECISION = "high precision"


@dataclass
class LayerReport:
    """One linear layer, or the experts of one layer.

    Of experts, X and E are those of the module, before the router's copies and after their sum, W is the weight of the first
    product, and grad_weight is the worse one of both weights.

    Attributes:
        name: qualified name of the module.
        in_features: columns of X.
        out_features: columns of the output.
        tokens: rows of X in the batch.
        products: names of the products that training computes. A frozen layer has no grad_weight.
        sharing: how many layers read the same X.
        outliers: "X", "W" or "E" -> (of the matrix as it is, of the matrix rotated as HALO does). HALO rotates X and W along
            in_features and E along tokens.
        fidelity: candidate -> product -> how close the product is to the exact one.
        seconds: candidate, or "high precision" -> the predicted time of its products.
        recommended: a candidate, or "high precision".
        experts: their number; 0 for a linear layer.
    """

    name: str
    in_features: int
    out_features: int
    tokens: int
    products: tuple[str, ...]
    sharing: int
    outliers: dict[str, tuple[Outliers, Outliers]]
    fidelity: dict[str, dict[str, Fidelity]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recommended: str = HIGH_PRECISION
    experts: int = 0

    @property
    def sides(self) -> str:
        """The widths, and the number of experts, as text."""
        return f"{self.in_features}→{self.out_features}" + (f", {self.experts} experts" if self.experts else "")

    def worst(self, candidate: str) -> tuple[float, str]:
        """Return the lowest SQNR of the layer's products under a candidate, in dB, and the name of that product.

        The SQNR is infinite if the candidate leaves the layer in high precision.
        """
        measured = self.fidelity.get(candidate, {})
        return min(((f.sqnr, product) for product, f in measured.items()), default=(float("inf"), ""))

    def speed(self, candidate: str) -> float:
        """Return the predicted speed, × high precision. It is 1 if the candidate leaves the layer in high precision."""
        return self.seconds[HIGH_PRECISION] / self.seconds.get(candidate, self.seconds[HIGH_PRECISION])


@dataclass
class CandidateReport:
    """The whole model under one candidate.

    Attributes:
        name: the candidate.
        config: its config; None for a mixture of candidates.
        cosine: between the model's gradient under the candidate and the exact one.
        loss_change: the loss minus the exact one; None if it is not finite.
        speed: predicted, of all layers together, × high precision.
        balanced: whether ``balance_`` follows the conversion.
        has_kernels: whether a GPU can run it. If not, it is measured and not recommended.
    """

    name: str
    config: LinearConfig | None
    cosine: float
    loss_change: float | None
    speed: float
    balanced: bool = False
    has_kernels: bool = True


@dataclass
class ReportData:
    """What was measured of a model, and what is recommended. :class:`~halo_tensor.Report` documents the attributes."""

    model: str
    loss: float
    tokens: int
    step_tokens: int
    sampled: int
    layers: list[LayerReport]
    candidates: list[CandidateReport]
    min_cosine: float
    min_sqnr: float
    ceilings: Ceilings
    seconds: float
    gradient_of: str
    recommended: str | None = None
    result: CandidateReport | None = None
    verdict: str = ""
    share: float = 1.0
    left_alone: str = ""
    min_gain: float = 0.0
    _by_name: bool = False  # config names the layers, even if one recipe suits all

    @property
    def exceptions(self) -> list[LayerReport]:
        """The layers that should not follow ``recommended``."""
        return [layer for layer in self.layers if self.recommended and layer.recommended != self.recommended]

    @property
    def config(self) -> LinearConfig | FqnToConfig | None:
        """The recommendation for ``quantize_``; None if high precision is recommended."""
        configs = {c.name: c.config for c in self.candidates}
        if self.recommended is None:
            return None
        if not self.exceptions and not self._by_name:
            return configs[self.recommended]
        return FqnToConfig({x.name: configs[x.recommended] for x in self.layers if x.recommended != HIGH_PRECISION})

    @property
    def balanced(self) -> bool:
        """Whether the recommendation is to call ``balance_`` after ``quantize_``."""
        return self.result is not None and self.result.balanced

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as dictionaries, lists and strings that JSON can hold."""
        numbers = asdict(self)
        del numbers["_by_name"]
        for candidate, of in zip(numbers["candidates"], self.candidates, strict=True):
            candidate["config"] = repr(of.config)
        for layer, of_layer in zip(numbers["layers"], self.layers, strict=True):
            layer["speed"] = {name: of_layer.speed(name) for name in of_layer.fidelity}
            layer["outliers"] = {k: {"before": a, "after": b} for k, (a, b) in layer["outliers"].items()}
        numbers["balanced"] = self.balanced
        if self.result is not None:
            numbers["result"]["config"] = repr(self.config)
        return numbers
