"""The base of the configs: the fields that every method has, and the checks of their values."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

from torchao.core.config import AOBaseConfig

from halo_tensor.recipe import ACTIVATIONS, Recipe, Rotation

GRANULARITIES = ("row", "tensor")
#: memory -> (whether codes are held, how activations are saved)
MEMORY = {"speed": (True, "plain"), "balanced": (False, "plain"), "low": (False, "int8")}


@dataclass(frozen=True, kw_only=True, repr=False)
class LinearConfig(AOBaseConfig):
    """The base of :class:`HaloConfig`, :class:`HotConfig` and :class:`RecipeConfig`: which layers are converted, and how
    their weights are held.

    Configs are immutable, comparable and hashable. ``dataclasses.replace(config, skip="head")`` makes a changed one.

    Args:
        skip: a regular expression. Layers in whose qualified name it is found are left alone. Output embeddings and layers
            with tied weights are always left alone (pass ``filter_fn`` to :func:`~halo_tensor.quantize_` to decide
            otherwise).
        min_features: layers with fewer input or output features than this are left alone, since they gain nothing.
        frozen: whether weights of ``nn.Linear`` are held as codes only, without a high-precision copy. They then take at most
            half of bf16's memory and cannot be trained. The weight of a ``Conv1D`` keeps its high-precision value. None
            freezes those weights that do not require a gradient when they are converted.
        memory: the trade between speed and memory (docs/memory.md has what each costs and saves). "speed" holds codes beside
            trained weights; "balanced" holds none, as ``keep_codes=False``; "low" also saves activations in 8 bits, as
            ``activations="int8"``. The two fields change one part of that.
        keep_codes: whether the codes of a trained ``nn.Linear`` are held beside its weight, one byte an element, and renewed
            after each write to it. False quantises the weight in every forward and again in backward (under HOT in backward
            only), and neither holds nor saves codes. FSDP, which sends codes, and :func:`~halo_tensor.balance_`, which scales
            them, need True.
        activations: how tensors between converted layers are saved for backward: "plain", as they are; "int8", in rotated
            blocks of 128 integers of 8 bits; "int6", with 6 bits between the layers of an MLP, 4 for inputs of norms and 8
            for attention; "all", in 8 bits in the whole model and not only in its blocks of layers, and masks in one bit;
            "all-int4", the same with 4 bits, which is less than HOT's own error. None leaves the choice to ``memory``.
        adapters: whether PEFT's adapters are converted too, whatever their rank.

    Raises:
        ValueError: a field or a value is not valid. The message lists the valid ones.

    Example:
        >>> from halo_tensor import LinearConfig, halo_config, recipe_config
        >>> configs = [halo_config(), recipe_config("jetfire", skip="lm_head|gate")]
        >>> all(isinstance(config, LinearConfig) for config in configs)
        True
        >>> [config.skip for config in configs]
        ['lm_head', 'lm_head|gate']
    """

    #: Former name of a field -> its name now.
    renamed: ClassVar[dict[str, str]] = {}

    skip: str = "lm_head"
    min_features: int = 128
    frozen: bool | None = None
    memory: str = "speed"
    keep_codes: bool = True
    activations: str | None = None
    adapters: bool = False

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse names that are no field, before the ``__init__`` that dataclass generates sees them."""
        names = [f.name for f in sorted(fields(cls), key=lambda f: bool(f.kw_only))]
        if unknown := [name for name in given if name not in names]:
            now = [f" ({name!r} is now {cls.renamed[name]!r})" for name in unknown if name in cls.renamed]
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}{''.join(now)}; its fields are {', '.join(names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.skip, str):
            raise ValueError(f"skip must be a regular expression, as a string; got {self.skip!r}")
        try:
            re.compile(self.skip)
        except re.error as error:
            raise ValueError(
                f"skip={self.skip!r} is no regular expression ({error}); it is searched for in layers' names"
            ) from None
        if type(self.min_features) is not int:
            raise ValueError(f"min_features must be an integer; got {self.min_features!r}")
        one_of("frozen", self.frozen, (True, False, None))
        one_of("memory", self.memory, tuple(MEMORY))
        one_of("keep_codes", self.keep_codes, (True, False))
        one_of("activations", self.activations, (*ACTIVATIONS, None))
        one_of("adapters", self.adapters, (True, False))
        if self.frozen and not self.keep_codes:
            raise ValueError("frozen=True holds weights as codes only: keep_codes=False is for weights that are trained")

    def __repr__(self) -> str:
        """A call that makes this config again: the method's own fields, and those of every config that are not the default."""
        common = {f.name for f in fields(LinearConfig)}
        shown = [f for f in fields(self) if f.name not in common or getattr(self, f.name) != f.default]
        shown.sort(key=lambda f: (f.name in common, f.kw_only))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def holds_codes(self) -> bool:
        """Whether codes are held beside trained weights, as ``keep_codes`` and ``memory`` say."""
        return self.keep_codes and MEMORY[self.memory][0]

    @property
    def saved_activations(self) -> str:
        """How tensors between layers are saved, as ``activations`` or ``memory`` says."""
        return self.activations or MEMORY[self.memory][1]

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """The method as data: what each operand of the three products carries. Equal methods share one object."""

    def saving(self, recipe: Recipe) -> Recipe:
        """Return a recipe that also says how activations are saved."""
        return _saving(recipe, self.saved_activations)

    @classmethod
    def present_fields(cls, written: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that an older version wrote to a file, under the names and with the values of this version."""
        return {cls.renamed.get(name, name): value for name, value in written.items()}


@lru_cache
def _saving(recipe: Recipe, activations: str) -> Recipe:
    """Cached, so that all layers of a model hold one recipe object."""
    chosen = ACTIVATIONS[activations]
    return recipe if chosen is None or recipe.is_identity else replace(recipe, activations=chosen)


@dataclass(frozen=True, kw_only=True, repr=False)
class RotatedConfig(LinearConfig):
    """The base of methods whose rotation and granularity are chosen in the config. They say what the fields mean."""

    granularity: str = "row"
    block_size: int | None = 128
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("granularity", self.granularity, GRANULARITIES)
        integer_or_none("seed", self.seed)
        Rotation(None, self.seed)  # checks the seed's range


def one_of(field: str, value: object, valid: Sequence[object]) -> None:
    """Raise a ValueError unless ``value`` is one of ``valid``, and of the type of one of them: 8.0 and True equal integers."""
    if value not in valid or type(value) not in map(type, valid):
        raise ValueError(f"{field} must be one of {', '.join(map(repr, valid))}; got {value!r}")


def integer_or_none(field: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is an integer, and no bool, or None."""
    if type(value) not in (int, type(None)):
        raise ValueError(f"{field} must be an integer or None; got {value!r}")
