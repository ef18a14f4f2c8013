"""torchtitan: overrides that make the linear layers and the experts of its models follow a recipe.

    --override.imports 'halo_tensor.torchtitan.halo_linear={"level": 1, "dtype": "int8"}'
    --override.imports 'halo_tensor.torchtitan.halo_experts={"level": 1, "dtype": "int8"}'

Both are given as two words after one ``--override.imports``.

torchtitan hands over the config of one layer at a time, without its name. So layers are chosen by the globs of the override:
all ``Linear`` but output embeddings (``lm_head``) and gates of routers. Another choice is an override of your own::

    @override(target=Linear.Config, fqns=["*layers.[0-9].feed_forward.*"])
    def feed_forward(cfg, **options):
        return halo_linear(cfg, **options)

Experts need no padding of groups. Tested with torchtitan 0.3.0 (``override``, ``derive``, ``Linear.Config`` and
``GroupedExperts.Config`` are its public names).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torchtitan.config.override import derive, override
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.tools.logging import logger

from halo_tensor.config import LinearConfig
from halo_tensor.convert.filter import ALIGNMENT
from halo_tensor.layers import grouped_experts, kinds
from halo_tensor.layers.grouped_experts import refuse_dtensors
from halo_tensor.recipe import why_not_grouped
from halo_tensor.switch import Switch

#: Ends of the names of layers that stay in high precision.
LEFT_ALONE = (".gate", "lm_head")


def globs_but(*endings: str) -> list[str]:
    """Return globs that together match every name but those with one of these endings. No two end with the same character."""
    last = "".join(ending[-1] for ending in endings)
    found = [f"*[!{last}]"]
    for ending in endings:
        found += [f"*[!{ending[i - 1]}]{ending[i:]}" for i in range(len(ending) - 1, 0, -1)]
        found += [ending[i:] for i in range(1, len(ending))]
    return found


class HaloLinear(Linear):
    """torchtitan's ``Linear``, whose weight follows a recipe. ``halo_linear`` makes its configs."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        """The fields of ``Linear.Config``, and what :func:`~halo_tensor.quantize_` takes."""

        halo: LinearConfig

    def __init__(self, config: Config):
        super().__init__(config)
        kinds.convert(self, config.halo.recipe, frozen=False, keep_codes=config.halo.holds_codes)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Do what torchtitan's module does; ValueError if its weight would become a DTensor."""
        refuse_dtensors(self, parallel_dims)
        super().parallelize(parallel_dims)


@override(target=Linear.Config, fqns=globs_but(*LEFT_ALONE), description="Linear layers in low precision (halo_tensor)")
def halo_linear(cfg: Linear.Config, /, **options: Any) -> Linear.Config:
    """Return the config of a layer that follows a recipe; torchtitan calls this for each layer that the override claims.

    Args:
        cfg: of a ``Linear``. One of a subclass, whose forward may be its own, and one with features that 8-bit matrix units
            cannot address are returned as they are, and a warning says why.
        **options: ``dtype``, ``level`` and other fields of :class:`~halo_tensor.HaloConfig`, or ``recipe``, a name that
            :class:`~halo_tensor.RecipeConfig` knows. Without ``level``, fp8 is not rotated and int8 gets level 1.

    Raises:
        ValueError: an option is not known or not valid.

    Example:
        >>> from halo_tensor.torchtitan import halo_linear
        >>> from torchtitan.models.common import Linear
        >>> layer = halo_linear(Linear.Config(in_features=128, out_features=256), dtype="int8").build()
        >>> layer.weight.codes.dtype
        torch.int8
    """
    config = _config_of("halo_linear", options)
    if (reason := _why_not(cfg, config)) is not None:
        logger.warning(f"halo_tensor leaves a {type(cfg).__qualname__} {[cfg.out_features, cfg.in_features]} alone: {reason}")
        return cfg
    return derive(cfg, HaloLinear.Config, halo=config)


def _why_not(cfg: Linear.Config, config: LinearConfig) -> str | None:
    """Why a layer cannot follow the config, as ``layer_filter`` says; None if it can."""
    if type(cfg) is not Linear.Config:
        return "its forward may be its own"
    return _why_not_wide((cfg.in_features, cfg.out_features), config)


def _why_not_wide(sides: tuple[int, int], config: LinearConfig) -> str | None:
    if min(sides) < config.min_features:
        return f"fewer than min_features={config.min_features} features on a side"
    if any(side % ALIGNMENT for side in sides):
        return f"a width that is no multiple of {ALIGNMENT}"
    return None


@cache
def _halo_experts_class(own: Any) -> Any:
    """Make a subclass of torchtitan's experts whose parameters follow a recipe. torchtitan finds it by its Config."""

    class HaloGroupedExperts(own):
        @dataclass(kw_only=True, slots=True)
        class Config(own.Config):
            halo: LinearConfig

        def __init__(self, config: Any):
            super().__init__(config)
            kinds.convert(self, config.halo.recipe, frozen=False, keep_codes=config.halo.holds_codes)

    HaloGroupedExperts.__name__ = HaloGroupedExperts.__qualname__ = f"Halo{own.__name__}"
    HaloGroupedExperts.Config.__qualname__ = f"Halo{own.__name__}.Config"  # torchtitan logs it
    return HaloGroupedExperts


@override(target=GroupedExperts.Config, description="Experts in low precision (halo_tensor)")
def halo_experts(cfg: GroupedExperts.Config, /, **options: Any) -> GroupedExperts.Config:
    """Return the config of experts that follow a recipe; torchtitan calls this for the experts of each layer.

    Args:
        cfg: of ``GroupedExperts``, or of gpt-oss's. One of another subclass, one whose widths 8-bit matrix units cannot
            address, and any under a recipe that experts cannot follow are returned as they are, and a warning says why.
        **options: see :func:`halo_linear`.

    Raises:
        ValueError: an option is not known or not valid. The model raises it if expert or tensor parallelism would cut the
            experts.

    Example:
        >>> from halo_tensor.torchtitan import halo_experts
        >>> from torchtitan.models.common.moe import GroupedExperts
        >>> experts = halo_experts(GroupedExperts.Config(dim=128, hidden_dim=256, num_experts=4), dtype="int8").build()
        >>> experts.w1_EFD.codes.dtype
        torch.int8
    """
    config = _config_of("halo_experts", options)
    reason = _why_not_wide((cfg.dim, cfg.hidden_dim), config) or grouped_experts.class_misfit(type(cfg)._owner)
    reason = reason or why_not_grouped(config.recipe)
    if reason is not None:
        sizes = [cfg.num_experts, cfg.hidden_dim, cfg.dim]
        logger.warning(f"halo_tensor leaves a {type(cfg).__qualname__} {sizes} alone: {reason}")
        return cfg
    return derive(cfg, _halo_experts_class(type(cfg)._owner).Config, halo=config)


def _config_of(name: str, options: dict[str, Any]) -> LinearConfig:
    """Return the config that the options of the override ``name`` describe.

    Raises:
        ValueError: an option is not known, not valid, or about a whole model.
    """
    switch = Switch.of(**options)
    if switch.balance or switch.report or not isinstance(switch.config, LinearConfig):
        raise ValueError(f"{name} takes no balance, report and layers: torchtitan hands over one layer's config at a time")
    of_models = [name for name in ("skip", "frozen", "adapters", "activations") if name in options]
    if of_models or switch.config.memory == "low":
        raise ValueError(
            f"{name} takes no {of_models[0] if of_models else 'memory=low'}, which is about a whole model: an override "
            "of your own chooses layers by @override(fqns=...), as help(halo_tensor.torchtitan) shows"
        )
    return switch.config
