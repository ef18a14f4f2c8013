"""What a report holds: numbers, the recommendation, and the forms it can be written in."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchao.quantization import FqnToConfig

from halo_tensor.analysis.measure import Fidelity, Outliers
from halo_tensor.analysis.roofline import Ceilings
from halo_tensor.config import LinearConfig
from halo_tensor.diagnostics import render

HIGH_PRECISION = "high precision"


@dataclass
class LayerReport:
    """One linear layer.

    Attributes:
        tokens: the rows of its X in the batch.
        products: the names of those that training computes; a frozen layer has no grad_weight.
        sharing: how many layers read the same X.
        outliers: "X", "W", "E" -> (as it is, rotated as HALO does: X and W along in_features, E along tokens).
        fidelity: candidate -> product -> how close it comes to the exact one.
        seconds: candidate, or "high precision" -> the modelled time of its products.
        recommended: a candidate, or "high precision".
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

    def worst(self, candidate: str) -> tuple[float, str]:
        """The lowest SQNR of its products under a candidate, in dB, and that product; infinite in high precision."""
        measured = self.fidelity.get(candidate, {})
        return min(((f.sqnr, product) for product, f in measured.items()), default=(float("inf"), ""))

    def speed(self, candidate: str) -> float:
        """Modelled, × high precision; 1 under a candidate that leaves it alone."""
        return self.seconds[HIGH_PRECISION] / self.seconds.get(candidate, self.seconds[HIGH_PRECISION])


@dataclass
class CandidateReport:
    """The whole model under one recipe: the ``cosine`` of its gradient with the exact one, the change of the loss, and the
    modelled speed of the linear layers, × bf16. ``config`` is None for a mixture. ``balanced``: with ``balance_`` after it."""

    name: str
    config: LinearConfig | None
    cosine: float
    loss_change: float | None  # None: the loss was not finite
    speed: float
    balanced: bool = False


@dataclass
class Report:
    """What :func:`report` found. ``str`` gives a summary, ``to_markdown`` every layer, ``to_json`` and ``to_dict`` every
    number; ``to_html`` and ``to_png`` draw it. ``quantize_(model, report.config)`` follows the recommendation, and then, if
    ``report.balanced``, ``balance_(model, **batch)``.

    Attributes:
        loss, tokens: of the batch, in high precision. step_tokens: those that time is modelled for.
        sampled: the rows that the layers' own products were measured with, at most.
        seconds: what all this took. gradient_of: which parameters' gradient was compared.
        recommended: the name of a candidate, or None if high precision is.
        result: the model under the recommendation, with the layers that differ from it; None if high precision is recommended.
        verdict: the recommendation in words, with what it follows from.
        share: the part of the linear layers' parameters, experts' stacks included, that the measured layers hold.
        left_alone: which layers no candidate converts, and why, a line for each reason.
    """

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
    _by_name: bool = False

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
        chosen = {x.name: configs[x.recommended] for x in self.layers if x.recommended != HIGH_PRECISION}
        return FqnToConfig(chosen)

    @property
    def balanced(self) -> bool:
        """Whether the recommendation is to call ``balance_`` after ``quantize_``."""
        return self.result is not None and self.result.balanced

    def to_dict(self) -> dict[str, Any]:
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

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, also written to ``path`` if there is one."""
        return _written(json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Tables of every layer, also written to ``path`` if there is one."""
        return _written(render.markdown(self), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """A page that needs no other file, also written to ``path`` if there is one."""
        return _written(render.html(self), path)

    def to_png(self, path: str | Path) -> None:
        """Draw it. Raises ImportError if matplotlib is not installed."""
        from halo_tensor.diagnostics.draw import png

        png(self, path)

    def __str__(self) -> str:
        return render.summary(self)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text
