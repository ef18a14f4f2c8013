"""What a user writes to switch the library on in a host: "int8", a recipe's name, a file, or a mapping of options.

Every host reads its flag with :meth:`Switch.of`, so one text means the same in Trainer, Axolotl, Lightning and torchtitan.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from halo_tensor.config import HaloConfig, LayerConfigs, LinearConfig, RecipeConfig
from halo_tensor.config.halo import DTYPES
from halo_tensor.convert import Conversion, quantize_
from halo_tensor.layers import kinds
from halo_tensor.recipe import RECIPES
from halo_tensor.weight.sharded_parameters import is_sharded
from halo_tensor.weight.tensor import HaloWeight

#: Formats that want no rotation; the others want level 1 (docs/choosing-a-recipe.md).
FLOATING = ("fp8", "fp6_e3m2")
#: Keys of a mapping that are no field of a config.
OWN_KEYS = ("recipe", "layers", "balance", "report")


@dataclass(frozen=True)
class Switch:
    """What a host is asked to do with a model.

    Args:
        config: for :func:`~halo_tensor.quantize_`.
        balance: how many batches of training data the model is balanced on; 0 for no balance.
        report: whether the candidates are measured on the first batch.
    """

    config: LinearConfig | LayerConfigs
    balance: int = 0
    report: bool = False

    def __post_init__(self) -> None:
        if type(self.balance) is not int or self.balance < 0:
            raise ValueError(f"balance is a number of batches, or 0 for no balance; got {self.balance!r}")
        if type(self.report) is not bool:
            raise ValueError(f"report must be True or False; got {self.report!r}")

    @classmethod
    def of(cls, value: Any = None, /, **options: Any) -> "Switch":
        """Return what a user means.

        Args:
            value: a dtype of :class:`~halo_tensor.HaloConfig` ("int8"), a name that :class:`~halo_tensor.RecipeConfig` knows
                ("hot_llm"), the path of a file that ``LayerConfigs.save`` wrote, a JSON object, a mapping, or a config.
            **options: further keys of the mapping: ``dtype``, ``level`` and other fields of ``HaloConfig``; or ``recipe`` and
                fields of ``RecipeConfig``; or ``layers``, the path of a file; and ``balance`` and ``report``. Without
                ``level``, fp8 and fp6_e3m2 are not rotated (level 0), and the other formats get level 1.

        Raises:
            ValueError: a key or a value is not known. The message lists the valid ones.
        """
        if isinstance(value, Switch):
            if options:
                raise ValueError(f"a Switch is complete; got {', '.join(options)} besides it")
            return value
        keys = _keys_of(value)
        if twice := keys.keys() & options.keys():
            raise ValueError(f"{min(twice)!r} is given twice: {keys[min(twice)]!r} and {options[min(twice)]!r}")
        keys |= options
        own = {name: keys.pop(name) for name in ("balance", "report") if name in keys}
        return cls(_config_of(keys), **own)

    def convert(self, model: nn.Module) -> Conversion:
        """Convert a plain model in place.

        Raises:
            ValueError: no layer was converted, some are converted already, or an optimizer holds parameters of the model.
        """
        if count := converted_weights(model):
            raise ValueError(
                f"{count} layers of this {type(model).__name__} are converted already: call quantize_, or switch the library "
                "on here, not both"
            )
        if (holder := _optimizer_of(model)) is not None:
            raise ValueError(
                f"the conversion replaces weights, and an {type(holder).__name__} holds the old ones, which it would go on "
                "updating: make the optimizer after the model was converted"
            )
        return quantize_(model, self.config)


def converted_weights(model: nn.Module) -> int:
    """Return how many layers of a model are converted, those that FSDP has sharded included."""
    sharded = sum(is_sharded(parameter) for parameter in model.parameters())
    return sharded + sum(
        isinstance(m._parameters.get("weight"), HaloWeight) or kinds.recipe_of(m) is not None for m in model.modules()
    )


def _optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """Return an optimizer that holds a parameter of the model, if there is one."""
    own = {id(parameter) for parameter in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):  # isinstance would ask proxies for their class
            groups = found.__dict__.get("param_groups", [])
            if any(id(parameter) in own for group in groups for parameter in group["params"]):
                return found
    return None


def _keys_of(value: Any) -> dict[str, Any]:
    """The keys that a value stands for."""
    if value is None:
        return {}
    if isinstance(value, LinearConfig | LayerConfigs):
        return {"config": value}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            return _json_object(value)
        if value.endswith(".json"):
            return {"layers": value}
        if value in DTYPES:
            return {"dtype": value}
        if value in RECIPES:
            return {"recipe": value}
    raise ValueError(
        f"halo must be a dtype ({', '.join(DTYPES)}), a recipe ({', '.join(RECIPES)}), the path of a .json file of "
        f"LayerConfigs, a mapping of options, or a config; got {value!r}"
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"halo is no JSON object ({error}); got {text!r}") from None
    assert isinstance(found, dict)
    return found


def _config_of(keys: dict[str, Any]) -> LinearConfig | LayerConfigs:
    """The config that keys other than balance and report describe."""
    named = [name for name in ("config", "recipe", "layers") if name in keys]
    if len(named) > 1:
        raise ValueError(f"{named[0]!r} and {named[1]!r} both choose a method: give one of them")
    if named:
        value, kind = keys.pop(named[0]), named[0]
        if kind != "recipe":
            if keys:
                raise ValueError(
                    f"a {'config' if kind == 'config' else 'file of LayerConfigs'} is complete; got {min(keys)!r} too"
                )
            return value if kind == "config" else LayerConfigs.load(value)
        _check_keys(keys, RecipeConfig, {"name"})
        return RecipeConfig(value, **keys)
    _check_keys(keys, HaloConfig, set())
    if "dtype" in keys and keys["dtype"] in FLOATING:
        keys.setdefault("level", 0)
    return HaloConfig(**keys)


def _check_keys(keys: dict[str, Any], method: type[LinearConfig], without: set[str]) -> None:
    known = sorted({f.name for f in fields(method)} - without | set(OWN_KEYS))
    if unknown := sorted(keys.keys() - known):
        raise ValueError(f"halo has no key {unknown[0]!r}; its keys are {', '.join(known)}")
