"""``calibrate``: choose a config for each layer from its operands in a few training batches.

Without ``level`` it applies HOT's layer-wise quantiser selection (LQS), and can choose HOT's rank. With ``level="auto"`` it
chooses HALO's level and number format.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.analysis import gpus
from halo_tensor.analysis.capture import hooked
from halo_tensor.analysis.trial_run import untouched
from halo_tensor.calibration.candidates import fastest_first
from halo_tensor.calibration.selection import CosineSelection, Measurement, QuantizerSelection, Selection
from halo_tensor.config import Balanced, HotConfig, LayerConfigs, LinearConfig, hot_config
from halo_tensor.convert import layer_filter
from halo_tensor.layers import kinds as layers


def calibrate(
    model: nn.Module,
    batches: Iterable,
    config: HotConfig | None = None,
    *,
    level: str | None = None,
    target: float = 0.999,
    candidates: Sequence[LinearConfig] | None = None,
    gpu: str | None = None,
    energy: float | None = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> LayerConfigs:
    """Run forward and backward on training batches and choose a config for each layer, experts of mixtures included.

    The model is left as it was: weights, gradients, buffers and random state.

    Args:
        model: a model in high precision, in training mode if that is how it will be trained.
        batches: a few training batches.
        config: HOT's config. Its ``grad_output_granularity`` is chosen for each layer (default: ``hot_config()``).
        level: None for HOT, which experts cannot follow. "auto" chooses from ``candidates``: each layer gets the first config
            under which output, E_X and G all have a cosine of at least ``target`` with those in high precision, or else the
            config with the best one. Experts are measured as one layer, with the tokens that the router sends to them.
        target: the least cosine for ``level="auto"``. It is measured on each layer alone. The errors of layers add up, so the
            cosine of the whole model's gradient is lower.
        candidates: configs in the order in which they are tried. The default is HALO-1 and HALO-2 in int8 and HALO-0 in fp8:
            those that ``gpu`` runs faster than bf16, ordered by the model of time that ``report`` uses.
        gpu: the GPU that orders the default candidates, "RTX 4090" for example. The default is the model's GPU, as for
            :func:`~halo_tensor.report`.
        energy: also chooses HOT's rank: the smallest even rank that keeps this part of ‖G‖², or the whole block if none does.
        loss: ``(model, batch) -> scalar``. The default is ``model(**batch).loss`` for a dict, or the cross entropy of
            ``model(batch[0])`` with the labels ``batch[1]``.
        filter_fn: ``(module, qualified name) -> bool``, which layers to measure, as for :func:`~halo_tensor.quantize_`.

    Returns:
        configs for ``quantize_``, with what was measured. They can be saved as JSON.

    Raises:
        ValueError: no layer that the config converts got a gradient; a layer is converted already; arguments for HOT and for
            ``level="auto"`` are mixed; or ``gpu`` is not known.
        TypeError: ``config`` is not HOT's, or a candidate is ``Balanced``. Call ``balance_`` after ``quantize_`` instead.

    Example:
        >>> import torch
        >>> from halo_tensor import calibrate, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
        >>> batches = [(torch.randn(64, 128), torch.randint(128, (64,)))]
        >>> configs = calibrate(model, batches, level="auto", gpu="H100")
        >>> quantize_(model, configs).converted
        ['0', '2']
    """
    _check_choice(level, config, candidates, gpu, energy)
    if level == "auto" and candidates is None:
        device = next(model.parameters()).device
        candidates = fastest_first(device, gpus.modelled(gpu, device))
    selection = _selection(level, config, candidates or (), target, energy)
    accept = filter_fn or layer_filter(model, selection.eligible)
    chosen = {name: m for name, m in model.named_modules() if layers.widths(m) and accept(m, name)}
    unmeasured = [name for name, m in chosen.items() if layers.is_grouped_experts(m)]
    chosen = {name: m for name, m in chosen.items() if name not in unmeasured}
    if converted := [name for name, m in chosen.items() if layers.recipe_of(m) is not None]:
        raise ValueError(f"calibrate measures gradients of high precision, and {converted[0]} is converted: dequantize_ first")

    if unfit := {name: reason for name, m in chosen.items() if (reason := selection.why_not(m))}:
        chosen = {name: m for name, m in chosen.items() if name not in unfit}
        lines = "".join(f"\n  {name or 'the model'}: {reason}" for name, reason in unfit.items())
        warnings.warn(f"{len(unfit)} layers can follow no candidate and will be left in high precision:{lines}", stacklevel=2)

    with _observed(chosen, selection) as means, untouched(model, evaluating=False):
        for batch in batches:
            (loss or _default_loss)(model, batch).backward()
    if not means.sums:
        raise ValueError("no layer that this config converts got a gradient from these batches")
    if idle := [name for name in chosen if name not in means.sums]:
        warnings.warn(
            f"{len(idle)} layers got no gradient from these batches and will be left in high precision: {', '.join(idle)}",
            stacklevel=2,
        )
    if unmeasured:
        warnings.warn(
            f"calibrate does not measure torchtitan's experts, and {len(unmeasured)} layers of them will be left in high "
            f"precision: to convert {unmeasured[0]}, for example, name it in .layers of what it returns, with a config",
            stacklevel=2,
        )
    measured = {name: means.of(name) for name in chosen if name in means.sums}
    return LayerConfigs({name: selection.choose(m) for name, m in measured.items()}, measured)


def _check_choice(
    level: str | None,
    config: HotConfig | None,
    candidates: Sequence[LinearConfig] | None,
    gpu: str | None,
    energy: float | None,
) -> None:
    """Raise ValueError or TypeError if arguments of the two kinds of choice are mixed."""
    if level not in (None, "auto"):
        raise ValueError(f"level must be 'auto', or None for HOT; got {level!r}")
    if gpu is not None and (level is None or candidates is not None):
        raise ValueError("gpu orders the default candidates of level='auto': pass it without candidates, and with that level")
    if any(isinstance(candidate, Balanced) for candidate in candidates or ()):
        raise TypeError(
            "calibrate measures layers one by one, and layers are balanced together: call balance_ after quantize_"
        )
    if config is not None and not isinstance(config, HotConfig):
        raise TypeError(
            f"config must be a HotConfig of hot_config(); level='auto' chooses HALO's level and dtype. Got {config!r:.100}"
        )
    if level == "auto" and (config is not None or energy is not None):
        raise ValueError("level='auto' chooses among candidates: config and energy need level=None, which chooses for HOT")
    if energy is not None and config is not None and config.seed is not None:
        raise ValueError("energy chooses a low rank, which takes no signs: pass a config with seed=None")


def _selection(
    level: str | None, config: HotConfig | None, candidates: Sequence[LinearConfig], target: float, energy: float | None
) -> Selection:
    if level is None:
        return QuantizerSelection(config or hot_config(), energy)
    if not candidates:
        raise ValueError("level='auto' needs at least one candidate")
    return CosineSelection(candidates, target)


class _Means:
    """Means of the measurements of each layer over its backward calls."""

    def __init__(self) -> None:
        self.sums: dict[str, Measurement] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, measured: Measurement) -> None:
        before = self.sums.get(name, {})
        self.sums[name] = {key: before.get(key, 0.0) + value for key, value in measured.items()}
        self.counts[name] = self.counts.get(name, 0) + 1

    def of(self, name: str) -> Measurement:
        return {key: value / self.counts[name] for key, value in self.sums[name].items()}


@contextmanager
def _observed(modules: Mapping[str, nn.Module], selection: Selection) -> Iterator[_Means]:
    """Measure ``modules`` in every backward inside the block."""
    means = _Means()

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            def measure(e: torch.Tensor) -> None:
                x, *rest = (t.detach() for t in layers.inputs_of(module, args, kwargs))
                with torch.autocast(x.device.type, enabled=False):
                    means.add(name, selection.measure(module, x, e, *rest))

            if output.requires_grad:
                output.register_hook(measure)

        return hook

    with hooked(modules, hook_of):
        yield means


def _default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)
