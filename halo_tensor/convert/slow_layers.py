"""Leaving layers in high precision that are predicted to gain too little: ``min_gain`` of ``quantize_``."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torchao.quantization import FqnToConfig

from halo_tensor.analysis.gpus import GPUS
from halo_tensor.config import LinearConfig
from halo_tensor.convert.filter import SLOW
from halo_tensor.convert.prediction import Predictor, is_frozen, sharing_of, together
from halo_tensor.layers import kinds as layers
from halo_tensor.layers.experts import is_experts
from halo_tensor.weight.sharded_parameters import is_sharded


class SlowLayers:
    """The layers below ``min_gain``. None are, if it is None.

    Attributes:
        reasons: qualified name -> why the layer is left in high precision. It is complete after the conversion.

    Args:
        predictor: predicts the layers.
        min_gain: speed, × bf16, or None.

    Raises:
        ValueError: ``min_gain`` is no number of at least 0, or there is no prediction.
    """

    def __init__(self, predictor: Predictor, min_gain: float | None):
        self.reasons: dict[str, str] = {}
        self._predictor, self._min_gain, self._where = predictor, min_gain, predictor.where
        if min_gain is None:
            return
        if isinstance(min_gain, bool) or not isinstance(min_gain, int | float) or not min_gain >= 0:
            raise ValueError(f"min_gain must be a speed, × bf16, as 1.0; got {min_gain!r}")
        if min_gain and predictor.ceilings is None:
            raise self._impossible(predictor.why_not)

    def choose(self, asked: Mapping[str, tuple[Any, Any]]) -> None:
        """Find the slow layers among those that would be converted. If one is left out, those that share its input pay more
        for it, and are judged anew.

        Args:
            asked: qualified name -> layer and config.
        """
        if not self._min_gain:
            return
        judged = {name: (module, config) for name, (module, config) in asked.items() if _is_judged(module, config)}
        for _, config in judged.values():
            if obstacle := self._predictor.obstacle(config.recipe):
                raise self._impossible(obstacle)
        slow: dict[str, float] = {}
        while judged:
            sharing = sharing_of({name: (module, config.recipe) for name, (module, config) in judged.items()})
            slow = {name: gain for name in judged if (gain := self._gain(*judged[name], sharing[name])) < self._min_gain}
            if not slow:
                return
            for name, gain in slow.items():
                self.reasons[name] = f"{SLOW}{gain:.2f}× bf16's speed {self._where}, below min_gain={self._min_gain:g}"
                del judged[name]

    def _gain(self, module: Any, config: LinearConfig, sharing: int) -> float:
        frozen = is_frozen(module) if config.frozen is None else config.frozen
        high, low = self._predictor.seconds(module, config.recipe, frozen, sharing)
        return high / low

    def _impossible(self, why: str) -> ValueError:
        return ValueError(
            f"min_gain={self._min_gain:g} needs a prediction. {why}: name the GPU on which the model will be trained, "
            f"gpu='H200' for example. Known are {', '.join(GPUS)}"
        )

    def left_out_of(self, config: FqnToConfig, model: nn.Module) -> FqnToConfig:
        """Choose among the layers that ``config`` names, and return it with None for the slow ones."""
        self.choose({name: (m, _config_of(config, m, name)) for name, m in model.named_modules()})
        if not self.reasons:
            return config
        left = {key: None for name in self.reasons for key in (name, _weight(name))}
        return FqnToConfig(OrderedDict({**config.fqn_to_config, **left}))

    def restore(self, model: nn.Module) -> None:
        """Make slow layers plain that an earlier conversion has converted."""
        for name in self.reasons:
            restore_layer(name, model.get_submodule(name))

    def warn_if_all(self, model: nn.Module) -> None:
        """Warn that nothing was converted."""
        warnings.warn(
            f"no layer of this {type(model).__name__} reaches min_gain={self._min_gain:g} {self._where}, so that it "
            f"stays in high precision: {together(self.reasons)}",
            stacklevel=5,
        )


def _is_judged(module: Any, config: object) -> bool:
    """Whether the layer can be converted. If not, an error or a reason says why."""
    if not isinstance(config, LinearConfig):
        return False
    has_weight = layers.features(module) is not None and module._parameters.get("weight") is not None
    return (has_weight or is_experts(module)) and not layers.misfit(module, config.recipe) and not layers.is_empty(module)


def restore_layer(name: str, module: nn.Module) -> None:
    """Make a layer plain again, if it is converted.

    Raises:
        ValueError: FSDP or tensor parallelism has sharded it.
    """
    held = layers.weights(module).values()
    if any(is_sharded(w) or (layers.recipe_of(module) and isinstance(w, DTensor)) for w in held):
        raise ValueError(
            f"{name} is sharded by FSDP or tensor parallelism, whose parameters cannot be replaced. torch's "
            "get_model_state_dict gives plain tensors, which load into a plain model"
        )
    if layers.recipe_of(module) is not None:
        layers.restore(module)


def _weight(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _config_of(config: FqnToConfig, module: nn.Module, name: str) -> object:
    """Return the config that torchao gives to a layer: of the weight's or the layer's name, else of the first pattern."""
    configs = config.fqn_to_config
    for key in (_weight(name), name):
        if key in configs:
            return configs[key]
    for key in (_weight(name), name):
        for pattern, of in configs.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], key):
                return of
    return configs.get("_default") if isinstance(module, nn.Linear) else None
