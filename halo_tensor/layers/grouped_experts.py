"""torchtitan's experts of mixtures, ``GroupedExperts``: how they are converted, run and restored.

torchtitan (tested with 0.3.0) sorts the rows of tokens by expert before it calls them. A converted module multiplies its own
parameters. Its class's forward casts them first, which makes a plain tensor of a weight that is not in bf16.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor

from halo_tensor import ops
from halo_tensor.layers import expert_stacks
from halo_tensor.layers.hooks import update_hooks
from halo_tensor.layers.linear import replace_parameter, restore_weight
from halo_tensor.layers.linear_subclasses import subclass_of
from halo_tensor.products.experts import experts_of_rows
from halo_tensor.products.grouped import check_rows, product_in_graph
from halo_tensor.products.routing import Routing
from halo_tensor.recipe import Gate, Recipe
from halo_tensor.weight.sharded_parameters import shard_of
from halo_tensor.weight.tensor import HaloWeight

_COMMON, _GPT_OSS = "torchtitan.models.common.moe", "torchtitan.models.gpt_oss.moe"


class _Served(NamedTuple):
    """A class of experts whose forward is known.

    Attributes:
        module: where the class is.
        name: of the class.
        stacks: the names of its parameters [experts, out, in].
        run: (module, rows, routing) -> the result of its forward.
    """

    module: str
    name: str
    stacks: tuple[str, ...]
    run: Callable[[Any, torch.Tensor, Routing], torch.Tensor]


def _swiglu(module: Any, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    for weight in (module.w1_EFD, module.w3_EFD):
        check_rows(x, weight, routing.offs, None, False)
    gate = product_in_graph(x, module.w1_EFD, None, None, False, *routing)
    up = product_in_graph(x, module.w3_EFD, None, None, False, *routing)
    return product_in_graph(F.silu(gate) * up, module.w2_EDF, None, None, False, *routing)


def _gpt_oss(module: Any, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    weights = module.mlp1_weight_EGD, module.mlp2_weight_EDF
    check_rows(x, weights[0], routing.offs, module.mlp1_bias_EG, False)
    gate = Gate(1.702, module.swiglu_limit, 1.0, interleaved=True)
    biases = {"gate_up_bias": module.mlp1_bias_EG, "down_bias": module.mlp2_bias_ED}
    return experts_of_rows(x, None, *weights, routing, gate, **biases)


_SERVED = (
    _Served(_COMMON, "GroupedExperts", ("w1_EFD", "w3_EFD", "w2_EDF"), _swiglu),
    _Served(_GPT_OSS, "GptOssGroupedExperts", ("mlp1_weight_EGD", "mlp2_weight_EDF"), _gpt_oss),
)


def _class(module: str, name: str) -> Any:
    """Return a class of torchtitan, if its module was imported; otherwise a class of which nothing is an instance."""
    return getattr(sys.modules.get(module), name, type(None))


def is_experts(module: Any) -> bool:
    """Whether a module is one of torchtitan's experts. A converted one is."""
    return isinstance(module, _class(_COMMON, "GroupedExperts"))


def _own_class(module: Any) -> Any:
    """Return the class that a module had before it was converted."""
    kind: Any = type(module)
    return getattr(kind, "_own_class", kind)


def _served(own: Any) -> _Served | None:
    """Return what is known of a class of experts; None if its forward or its product is another."""
    product = _class(_COMMON, "GroupedExperts")._grouped_mm
    for served in _SERVED:
        known = _class(served.module, served.name)
        if issubclass(own, known) and own.forward is known.forward and own._grouped_mm is product:
            return served
    return None


def stack_names(module: Any) -> tuple[str, ...]:
    """Return the names of the parameters [experts, out, in]."""
    served = _served(_own_class(module))
    if served is not None:
        return served.stacks
    return tuple(name for name, p in module._parameters.items() if p is not None and p.ndim == 3)


def stacks(module: Any) -> list[Any]:
    """Return the parameters that a module holds under those names; None for one that is parametrised."""
    return [module._parameters.get(name) for name in stack_names(module)]


def sides(module: Any) -> list[tuple[int, int]]:
    """Return (in, out) features of an expert's products."""
    return [(w.shape[2], w.shape[1]) for w in stacks(module) if w is not None and w.ndim == 3]


def misfit(module: Any, recipe: Recipe) -> str | None:
    """Return why experts cannot follow ``recipe``; None if they can."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if reason := class_misfit(_own_class(module)):
        return reason
    return next((reason for name in stack_names(module) if (reason := expert_stacks.why_not(module, name, recipe))), None)


def class_misfit(own: Any) -> str | None:
    """Return why experts of a class cannot be converted; None if they can."""
    return None if _served(own) else f"it is a {own.__name__}, whose forward may be its own"


def recipe_of(module: Any) -> Recipe | None:
    """Return the recipe that converted experts follow; None for others."""
    weight = next(iter(stacks(module)), None)
    return weight.recipe if isinstance(weight, HaloWeight) else None


def convert(module: Any, recipe: Recipe, frozen: bool | None, keep_codes: bool = True) -> None:
    """Make experts follow ``recipe``, in place; see :func:`halo_tensor.layers.experts.convert`."""
    for name, old in zip(stack_names(module), stacks(module), strict=True):
        made = expert_stacks.quantised(old, recipe, frozen, keep_codes)
        replace_parameter(module, name, nn.Parameter(made, requires_grad=old.requires_grad))
    update_hooks(module)
    module.__class__ = _converted_class(_own_class(module))


def restore(module: Any) -> None:
    """Undo :func:`convert`, in place."""
    restore_weight(module)
    module.__class__ = _own_class(module)


def _forward(self: Any, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    """Run converted experts. The names of arguments are torchtitan's, which wraps forwards by name.

    Args:
        self: the experts.
        x_RD: [rows, d], sorted by expert. Rows after the last expert's are not computed.
        num_tokens_per_expert_E: [experts], how many rows each expert has.

    Returns:
        [rows, d], of the dtype of ``x_RD``. As in torchtitan, products and the gate are in bf16 whatever that is.
    """
    if not _check_converted(self):
        return self._own_class.forward(self, x_RD, num_tokens_per_expert_E)
    offs = torch.cumsum(num_tokens_per_expert_E, 0, dtype=torch.int32)
    routing = Routing(offs, *ops.group_tiles(offs, x_RD.shape[0]))
    with torch.autocast(x_RD.device.type, torch.bfloat16):
        served = _served(self._own_class)
        assert served is not None
        return served.run(self, x_RD.bfloat16(), routing).to(x_RD.dtype)


def _check_converted(module: Any) -> bool:
    """Whether the parameters are converted. Warns if they are not.

    Raises:
        ValueError: they are DTensors, as of expert or tensor parallelism.
    """
    held = stacks(module)
    if all(isinstance(w, HaloWeight) for w in held):
        return True
    if any(isinstance(w, DTensor) and shard_of(w) is not None for w in held):
        raise ValueError(
            f"the parameters of converted experts ({type(module).__name__}) are DTensors in their forward, which are not "
            "multiplied: shard converted experts with fully_shard (FSDP2) only"
        )
    if not is_compiling():
        warnings.warn(
            f"{type(module).__name__} runs in high precision, since a weight was replaced by a plain one or is parametrised: "
            "call quantize_ again, or dequantize_ if that is meant",
            stacklevel=4,
        )
    return False


def _parallelize(self: Any, parallel_dims: Any) -> None:
    refuse_dtensors(self, parallel_dims)
    self._own_class.parallelize(self, parallel_dims)


def refuse_dtensors(module: Any, parallel_dims: Any) -> None:
    """Refuse what makes DTensors of converted parameters, of which torchtitan's products would be in high precision.

    Args:
        module: a converted layer of torchtitan.
        parallel_dims: torchtitan's ``ParallelDims``.

    Raises:
        ValueError: tensor parallelism, expert parallelism of experts, or the SPMD backend ``full_dtensor``.
    """
    options = {
        "tensor_parallel_degree 1": parallel_dims.tp > 1,
        "expert_parallel_degree 1": parallel_dims.ep > 1 and is_experts(module),
        "spmd_backend default": parallel_dims.spmd_backend == "full_dtensor",
    }
    if wrong := [f"--parallelism.{option}" for option, is_wrong in options.items() if is_wrong]:
        name = "halo_experts" if is_experts(module) else "halo_linear"
        raise ValueError(
            f"a converted {type(module).__name__} is sharded by FSDP2 only: set {' and '.join(wrong)}, or leave such layers "
            f"in high precision, without the override halo_tensor.torchtitan.{name}"
        )


def _extra_repr(module: Any) -> str:
    return expert_stacks.describe(module._own_class.extra_repr(module), next(iter(stacks(module)), None), sides(module))


@cache
def _converted_class(own: Any) -> Any:
    """Make a subclass of a class of experts with the forward of converted ones."""
    members = {"forward": _forward, "parallelize": _parallelize, "extra_repr": _extra_repr, "_own_class": own}
    return subclass_of(own, members, _rebuild)


def _rebuild(own: type) -> nn.Module:
    return nn.Module.__new__(_converted_class(own))
