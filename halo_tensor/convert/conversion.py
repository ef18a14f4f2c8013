"""The result of a conversion, layer by layer, and the warnings about it."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from halo_tensor.config import LinearConfig
from halo_tensor.convert.filter import CHOICE, SKIPPED, SLOW
from halo_tensor.convert.prediction import Prediction
from halo_tensor.layers import kinds as layers
from halo_tensor.layers import model_parts
from halo_tensor.recipe import PRODUCTS
from halo_tensor.reference.hadamard import fit

#: A conversion that leaves more than this part of the linear layers' parameters in high precision gives a warning.
LEAST_SHARE = 0.5


@dataclass
class Conversion:
    """The result of :func:`~halo_tensor.quantize_`. ``print`` shows it with the reasons why layers were left alone.

    Args:
        config: what the converted layers follow.
        converted: qualified names of converted layers.
        skipped: qualified name -> reason, of layers that were left alone, and of parameters that are matrices outside of
            layers.
        sizes: qualified name -> number of parameters that multiply activations, of all of these, including 3-D stacks of
            experts. Input and output embeddings and adapters are not counted.
        predicted: the predicted speed of the converted layers, and of which GPU.
        only_saving: names of the converted layers that compute in high precision, and only save their input in few bits:
            convolutions, as ``quantized_convolutions`` of the config says.

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 128), torch.nn.Linear(128, 10))
        >>> conversion = quantize_(model, halo_config(1, "int8"))
        >>> conversion.converted, conversion.skipped
        (['0', '1'], {'2': 'fewer than min_features=128 features on a side'})
        >>> f"{conversion.share:.2f}"
        '0.98'
    """

    config: object
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    predicted: Prediction | None = None
    only_saving: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        layers = len(self.converted) + len(self.skipped)
        share = f", with {percent(self.share)} of the linear layers' parameters" if self.sizes else ""
        head = f"{len(self.converted)} of {layers} layers follow {self.config}{share}"
        predicted = str(self.predicted) if self.predicted and self.converted else ""
        return "\n".join(part for part in (head, self._saving, self.reasons, predicted) if part)

    @property
    def _saving(self) -> str:
        """The layers that compute in high precision, in a line."""
        if not self.only_saving:
            return ""
        return (
            f"  in high precision: the products of {_listed(self.only_saving)}, which save their input in few bits "
            "(quantized_convolutions='all' computes gradients of all convolutions in few bits)"
        )

    @property
    def share(self) -> float:
        """The part of the parameters counted in ``sizes`` that is converted; 1 if there are none."""
        return self._elements(self.converted) / (sum(self.sizes.values()) or 1) if self.sizes else 1.0

    @property
    def reasons(self) -> str:
        """Why layers were left alone, a line for each reason."""
        lines = []
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            elements = self._elements(names)
            share = f" ({percent(elements / sum(self.sizes.values()))} of the parameters)" if elements else ""
            lines.append(f"  left alone: {_listed(names)}: {reason}{share}")
        return "\n".join(lines)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.sizes.get(name, 0) for name in names)

    @property
    def is_partial(self) -> bool:
        """Whether less than half is converted, not counting what the caller left out, as by ``skip`` or ``min_gain``."""
        left_out = [n for n, reason in self.skipped.items() if reason == CHOICE or reason.startswith((SKIPPED, SLOW))]
        candidates = sum(self.sizes.values()) - self._elements(left_out)
        return self._elements(self.converted) < LEAST_SHARE * candidates


def _listed(names: list[str]) -> str:
    """Return the first names as text, and how many more there are."""
    shown = ", ".join(name or "the model" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def percent(share: float) -> str:
    """Return a share as text in percent: a whole number, or two decimals near 0 and 100."""
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.01 <= share < 0.995 else f"{100 * share:.2f} %"


def survey(
    model: nn.Module,
    config: object,
    converted: list[str],
    skipped: dict[str, str],
    filtered: Iterable[object] | None = None,
) -> Conversion:
    """Return a Conversion with the sizes, and with the matrices outside of layers among the skipped.

    Args:
        model: the model that was or will be converted.
        config: what the converted layers follow.
        converted: names of the converted layers.
        skipped: name -> reason of the other layers.
        filtered: the configs whose ``min_features`` and ``adapters`` say what is counted; by default ``config``.
    """
    configs = [c for c in filtered or [config] if isinstance(c, LinearConfig)]
    least = min((c.min_features for c in configs), default=LinearConfig.min_features)
    sizes, others = model_parts.matrices(model, least, any(c.adapters for c in configs))
    return Conversion(config, converted, skipped | others, sizes)


def warn_of_share(model: nn.Module, conversion: Conversion, stacklevel: int = 4) -> None:
    """Warn once, with the reasons, if more than half of the linear layers' parameters are left alone."""
    if conversion.is_partial:
        warnings.warn(
            f"only {percent(conversion.share)} of the parameters in the linear layers of this {type(model).__name__} follow "
            f"the config, and the rest stays in high precision:\n{conversion.reasons}",
            stacklevel=stacklevel,
        )


def warn_of_unrotated(model: nn.Module, conversion: Conversion) -> None:
    """Warn once of all layers with a feature dimension that the recipe rotates and no block fits."""
    unrotated = []
    for name in conversion.converted:
        module = model.get_submodule(name)
        recipe = layers.recipe_of(module)
        assert recipe
        operands = [o for p in PRODUCTS for o in (getattr(recipe, p).left, getattr(recipe, p).right)]
        for in_features, out_features in layers.widths(module):
            for dimension, width in (("out_features", out_features), ("in_features", in_features)):
                wanted = {o.rotation(dimension) for o in operands} - {None}
                if any(fit(rotation, width) is None for rotation in wanted):
                    unrotated.append(f"{name or 'the model'} ({dimension} {width})")
    if unrotated:
        warnings.warn(
            f"left un-rotated, since no block of at least 16 divides the width: {', '.join(unrotated)}", stacklevel=4
        )
