"""The candidates of a report, and the layers that each of them converts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from halo_tensor.analysis import roofline
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.calibration.candidates import CANDIDATES
from halo_tensor.config import Balanced, LinearConfig
from halo_tensor.convert import CHOICE, Conversion, layer_filter, survey
from halo_tensor.kernels.device import check_device, check_scales, runs, runs_scales
from halo_tensor.layers.experts import is_experts
from halo_tensor.layers.kinds import features, is_grouped_experts, misfit
from halo_tensor.recipe import DIMENSIONS, PRODUCTS, Rotation

Candidate = LinearConfig | Balanced


@dataclass(frozen=True)
class Candidates:
    """The candidates of one report.

    Attributes:
        configs: name -> config.
        balanced: the names of those that ``balance_`` follows.
    """

    configs: dict[str, LinearConfig]
    balanced: set[str]

    def has_kernels(self, name: str) -> bool:
        """Whether a GPU runs a candidate. MXFP8 and NVFP4 run on a CPU only, for accuracy studies."""
        return runs_scales(self.configs[name].recipe.granularities, torch.device("cuda"))

    @property
    def rotation(self) -> Rotation:
        """The rotation for which outliers are reported: the first one of any candidate, or the default one."""
        operands = [side for c in self.configs.values() for p in PRODUCTS for side in vars(getattr(c.recipe, p)).values()]
        return next((r for o in operands for d in DIMENSIONS if (r := o.rotation(d)) is not None), Rotation())


def candidates_for(
    given: Mapping[str, Candidate] | Iterable[Candidate] | None, model: nn.Module, ceilings: Ceilings
) -> Candidates:
    """Name and check the candidates that the caller gave, or take the default ones.

    Raises:
        TypeError: a candidate is no config.
        RuntimeError: the device or the GPU of ``ceilings`` cannot run a candidate that was given.
        ValueError: there is no candidate, or one is to be balanced and quantises no output.
    """
    device = next(model.parameters()).device
    if given is None:
        able = {name: config for name, config in CANDIDATES.items() if runs(config.recipe.formats, device)}
        named: dict[str, Candidate] = {name: c for name, c in able.items() if roofline.gains(c.recipe, ceilings)}
    else:
        named = dict(given) if isinstance(given, Mapping) else {str(config): config for config in given}
    configs = {name: c.config if isinstance(c, Balanced) else c for name, c in named.items()}
    for config in configs.values():
        if not isinstance(config, LinearConfig):
            raise TypeError(f"a candidate is a config of halo_config or recipe_config, or Balanced(config); got {config!r}")
        check_scales(config.recipe.granularities, device)
        check_device(config.recipe.formats, device)
        if lacking := roofline.lacking(config.recipe, ceilings):
            raise RuntimeError(f"{ceilings.a_name} cannot multiply {', '.join(sorted(lacking))}: leave out {config!r}")
    if not configs:
        raise ValueError(f"there is no candidate recipe to measure on {device} that {ceilings.a_name} runs faster than bf16")
    balanced = {name for name, c in named.items() if isinstance(c, Balanced)}
    if useless := [name for name in balanced if configs[name].recipe.output.left.format is None]:
        raise ValueError(f"{useless[0]} quantises no output, so there is nothing to balance: pass the config itself")
    return Candidates(configs, balanced)


def accepted_layers(
    model: nn.Module, configs: dict[str, LinearConfig], filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[str, list[str]], Conversion]:
    """Find the layers that ``quantize_`` would convert.

    Returns:
        candidate -> names of its linear layers and of its experts; and a Conversion with those of all candidates, and the
        others with reasons.

    Raises:
        ValueError: no candidate converts any layer.
    """
    accepted: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    known = [(name, m) for name, m in model.named_modules() if features(m) and not isinstance(m, nn.Conv2d)]
    known += [(name, m) for name, m in model.named_modules() if is_experts(m)]
    for candidate, config in configs.items():
        accept = filter_fn or layer_filter(model, config)
        fit = [(name, m) for name, m in known if not (is_experts(m) and misfit(m, config.recipe))]
        accepted[candidate] = [name for name, module in fit if accept(module, name)]
        reasons |= {name: reason for name, m in known if is_experts(m) and (reason := misfit(m, config.recipe))}
        reasons |= getattr(accept, "reasons", {})
    taken = {name for names in accepted.values() for name in names}
    if not taken:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(reasons.items())[:8]) or ": filter_fn took none"
        raise ValueError(f"no layer of this {type(model).__name__} is eligible{why}")
    reasons |= {name: CHOICE for name, _ in known if name not in taken | reasons.keys()}
    reasons |= {name: "report does not measure convolutions" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    grouped = [name for name, m in model.named_modules() if is_grouped_experts(m)]
    reasons |= dict.fromkeys(grouped, "report does not measure torchtitan's experts")
    skipped = {name: reason for name, reason in reasons.items() if name not in taken}
    covered = survey(model, None, [name for name, _ in known if name in taken], skipped, configs.values())
    return accepted, covered
