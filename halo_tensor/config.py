"""What a user asks for: configs for ``quantize_``, validated when they are made."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
from torchao.quantization import register_quantize_module_handler

from halo_tensor import recipe as recipes
from halo_tensor.fences.pytorch import ALLOWED_AO_MODULES
from halo_tensor.kernels.device import check_device, check_scales
from halo_tensor.layers import kinds as layers
from halo_tensor.recipe import Format, Recipe, Rotation
from halo_tensor.weight.tensor import HaloWeight

LEVELS = (0, 1, 2)
GRANULARITIES = ("row", "tensor")
#: dtype -> format. Plain "fp6" depends on the level: rotated operands suit a nearly uniform grid, others a wide range.
DTYPES: dict[str, Format | None] = {
    "int8": recipes.INT8,
    "fp8": recipes.FP8_E4M3,
    "fp6": None,
    "fp6_e2m3": recipes.FP6_E2M3,
    "fp6_e3m2": recipes.FP6_E3M2,
    "bf16": None,
}
#: of the files that ``LayerConfigs.save`` writes
_FILE_VERSION = 1
#: bits of HOT's products -> format
BITS = {4: recipes.INT4, 8: recipes.INT8}


@dataclass(frozen=True, kw_only=True)
class LinearConfig(AOBaseConfig):
    """What every config of this library has: a recipe, and which layers are left alone.

    Attributes:
        skip: a regular expression; layers in whose qualified name it is found are left alone. Output embeddings and layers
            with tied weights always are (pass ``filter_fn`` to :func:`~halo_tensor.quantize_` to decide otherwise).
        min_features: layers with fewer input or output features gain nothing and are left alone.
        frozen: hold weights of ``nn.Linear`` as codes only, without a high-precision copy: half of bf16's memory or less, and
            such a weight cannot be trained. A ``Conv1D`` keeps its weight as it is. None freezes the weights that do not
            require a gradient when they are converted.
        keep_codes: hold a trained ``nn.Linear``'s codes beside it, a byte an element, and quantise it whenever it is written
            to. False quantises it in every forward instead, one that recomputes included, and holds nothing. Not for FSDP,
            which sends codes, nor for ``balance_``, whose s is the codes'.
        adapters: convert PEFT's adapters too, of whatever rank.
    """

    skip: str = "lm_head"
    min_features: int = 128
    frozen: bool | None = None
    keep_codes: bool = True
    adapters: bool = False

    def __post_init__(self):
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
        _one_of("frozen", self.frozen, (True, False, None))
        _one_of("keep_codes", self.keep_codes, (True, False))
        _one_of("adapters", self.adapters, (True, False))
        if self.frozen and not self.keep_codes:
            raise ValueError("frozen=True holds weights as codes only: keep_codes=False is for weights that are trained")

    @property
    def recipe(self) -> Recipe:
        raise NotImplementedError(f"{type(self).__name__} has no recipe; use halo_config, hot_config or recipe_config")


@dataclass(frozen=True)
class HaloConfig(LinearConfig):
    """HALO with a level, a dtype and a granularity. Made by :func:`halo_config`, which explains the fields."""

    level: int = 1
    dtype: str = "int8"
    granularity: str = field(default="row", kw_only=True)
    block_size: int | None = field(default=128, kw_only=True)
    seed: int | None = field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _one_of("level", self.level, LEVELS)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        _one_of("granularity", self.granularity, GRANULARITIES)
        block = self.block_size
        if block is not None and (not isinstance(block, int) or block < 16 or block & (block - 1)):
            raise ValueError(f"block_size must be a power of two of at least 16, or None for the full width; got {block!r}")
        _integer_or_none("seed", self.seed)
        Rotation(block, self.seed)  # checks the seed's range

    @property
    def recipe(self) -> Recipe:
        return _halo(self.level, self.dtype, self.granularity, self.block_size, self.seed)


@dataclass(frozen=True)
class HotConfig(LinearConfig):
    """HOT with a rank, a block, bits and scales. Made by :func:`hot_config`, which explains the fields."""

    rank: int | None = 8
    block_size: int = field(default=16, kw_only=True)
    grad_input_bits: int = field(default=4, kw_only=True)
    grad_weight_bits: int = field(default=8, kw_only=True)
    scale: str = field(default="tensor", kw_only=True)
    granularity: str = field(default="tensor", kw_only=True)
    rounding: str = field(default="stochastic", kw_only=True)
    seed: int | None = field(default=None, kw_only=True)
    min_features: int = field(default=64, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _one_of("block_size", self.block_size, (16, 32, 64, 128, 256))
        _one_of("grad_input_bits", self.grad_input_bits, tuple(BITS))
        _one_of("grad_weight_bits", self.grad_weight_bits, tuple(BITS))
        _one_of("scale", self.scale, ("tensor", "tokens"))
        _one_of("granularity", self.granularity, GRANULARITIES)
        _integer_or_none("rank", self.rank)
        _integer_or_none("seed", self.seed)
        if self.rank is not None and self.seed is not None:
            raise ValueError("a seed signs whole blocks (rank=None); a low rank takes seed=None")
        self.recipe  # noqa: B018  checks the rank, the seed and the rounding

    @property
    def recipe(self) -> Recipe:
        return _hot(
            self.rank, self.block_size, self.grad_input_bits, self.grad_weight_bits, self.scale, self.granularity,
            self.rounding, self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class RecipeConfig(LinearConfig):
    """A recipe of ``halo_tensor.recipe.RECIPES``, by name. Made by :func:`recipe_config`."""

    name: str = "switchback"

    def __post_init__(self):
        super().__post_init__()
        _one_of("recipe", self.name, tuple(recipes.RECIPES))

    @property
    def recipe(self) -> Recipe:
        return recipes.RECIPES[self.name]


@dataclass(frozen=True)
class LayerConfigs(AOBaseConfig):
    """A config for each layer, by qualified name: what :func:`~halo_tensor.calibrate` chooses and ``quantize_`` takes. Layers
    that it does not name are left alone. ``measured``: the figures that the choice rests on.
    """

    layers: dict[str, LinearConfig]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        configs = {name: config_to_dict(config) for name, config in self.layers.items()}
        record = {"version": _FILE_VERSION, "layers": configs, "measured": self.measured}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LayerConfigs":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such JSON, is of a version that is not known, or a field is unknown, missing or wrong;
                the message names the file, the layer and the field.
        """
        try:
            record = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON, which LayerConfigs.save writes: {error}") from None
        _check_fields(record, str(path), {"layers"}, {"version", "layers", "measured"})
        if (version := record.get("version", 1)) != _FILE_VERSION:  # 0.1.0 wrote none
            raise ValueError(
                f"{path} is of version {version!r}, and this halo_tensor reads version {_FILE_VERSION}: read it with the one "
                "that wrote it, or calibrate again"
            )
        for key in ("layers", "measured"):
            if not isinstance(record.get(key, {}), dict):
                raise ValueError(f"{path}: {key!r} must be an object with a value for each layer")
        layers = {name: _from_record(config, f"{path}, layer {name!r}") for name, config in record["layers"].items()}
        return cls(layers, record.get("measured", {}))

    def __str__(self) -> str:
        counts = Counter(self.layers.values())
        return "\n".join(
            [f"configs of {len(self.layers)} layers", *(f"  {n} × {config}" for config, n in counts.most_common())]
        )


@dataclass(frozen=True)
class Balanced:
    """A candidate of :func:`~halo_tensor.report`: ``config``, followed by :func:`~halo_tensor.balance_`. It is made for int8;
    balanced fp8 has a better gradient, and did not train better (docs/notes/accuracy.md)."""

    config: LinearConfig


def halo_config(
    level: int = 1,
    dtype: str = "int8",
    *,
    granularity: str = "row",
    block_size: int | None = 128,
    seed: int | None = 0,
    skip: str = "lm_head",
    min_features: int = 128,
    frozen: bool | None = None,
    keep_codes: bool = True,
) -> HaloConfig:
    """HALO (arXiv 2501.02625) as a config for ``quantize_``.

    Args:
        level: 0 no rotation; 1 rotates in_features of X and W; 2 also the tokens of E. Uniform grids (int8, fp6_e2m3) want
            level 1 or 2, floating ones (fp8, fp6_e3m2) want level 0.
        dtype: "int8", "fp8" (e4m3), "fp6_e2m3", "fp6_e3m2", "fp6" (e3m2 at level 0, else e2m3), or "bf16": no quantisation
            at all, for comparison.
        granularity: "row", one scale per token and per output feature, every operand quantised once; or "tensor", the
            paper's one scale per operand.
        block_size: edge of the rotation's blocks, a power of two (the largest that divides a layer's width is used if it is
            smaller); None rotates the full width.
        seed: of the rotation's random signs; None for none.
        skip, min_features: which layers are left alone; frozen: whether weights are held as codes only (None: those that do
            not require a gradient); keep_codes: whether trained weights hold codes too; see :class:`LinearConfig`.

    Raises:
        ValueError: an unknown level, dtype, granularity, block size or seed; the message lists the valid ones.
    """
    return HaloConfig(
        level, dtype, granularity=granularity, block_size=block_size, seed=seed, skip=skip, min_features=min_features,
        frozen=frozen, keep_codes=keep_codes,
    )  # fmt: skip


def hot_config(
    rank: int | None = 8,
    *,
    block_size: int = 16,
    grad_input_bits: int = 4,
    grad_weight_bits: int = 8,
    scale: str = "tensor",
    granularity: str = "tensor",
    rounding: str = "stochastic",
    seed: int | None = None,
    adapters: bool = False,
    skip: str = "lm_head",
    min_features: int = 64,
    frozen: bool | None = None,
) -> HotConfig:
    """HOT (arXiv 2503.21261) as a config for ``quantize_``: the forward stays as it is, the backward runs in few bits, and of
    each layer's input only ``rank``/``block_size`` is saved, in ``grad_weight_bits``. It converts ``nn.Conv2d`` and
    transformers' ``Conv1D`` too. Made for vision models, whose tokens are redundant. On a language model its gradient is
    useless (bench/results/accuracy_hot.md): take ``recipe_config("hot_llm")`` there.

    Args:
        rank: how many of the ``block_size`` sequencies of each block of tokens grad_weight keeps; None for all.
        block_size: of both products' rotations: 16, 32, 64, 128 or 256.
        grad_input_bits, grad_weight_bits: 4 or 8. INT4 values are multiplied as INT8, exactly: Hopper has no INT4 units, so 4
            bits are no faster there.
        scale: of E in grad_input, "tensor" or "tokens". :func:`~halo_tensor.calibrate` chooses layer by layer.
        granularity: of all other operands, "tensor" as published, or "row": along the dimension that the product keeps.
        rounding: of E in grad_input, "stochastic" or "nearest".
        seed: of the signs of whole blocks (``rank=None``).
        adapters, skip, min_features, frozen: see :class:`LinearConfig`.

    Raises:
        ValueError: a value that is not among the valid ones, which the message lists.
    """
    return HotConfig(
        rank, block_size=block_size, grad_input_bits=grad_input_bits, grad_weight_bits=grad_weight_bits, scale=scale,
        granularity=granularity, rounding=rounding, seed=seed, adapters=adapters, skip=skip, min_features=min_features,
        frozen=frozen,
    )  # fmt: skip


def recipe_config(
    name: str, *, skip: str = "lm_head", min_features: int = 128, frozen: bool | None = None, adapters: bool = False
) -> RecipeConfig:
    """A recipe that is not HALO's, by its name in ``halo_tensor.recipe.RECIPES`` (add your own there). The rest: see
    :class:`LinearConfig`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    return RecipeConfig(name, skip=skip, min_features=min_features, frozen=frozen, adapters=adapters)


def _from_record(record: Any, where: str) -> LinearConfig:
    """The config that torchao's ``config_to_dict`` wrote as ``record``; errors name the field and ``where`` it is."""
    _check_fields(record, where, {"_type", "_data"}, {"_type", "_version", "_data"})
    kinds = {kind.__name__: kind for kind in (HaloConfig, HotConfig, RecipeConfig)}
    kind = kinds.get(record["_type"])
    if kind is None:
        raise ValueError(f"{where}: _type must be one of {', '.join(kinds)}; got {record['_type']!r}")
    if (version := record.get("_version", 1)) != kind.version:
        raise ValueError(
            f"{where}: a {kind.__name__} of _version {version!r}, and this halo_tensor reads _version {kind.version}: read it "
            "with the one that wrote it"
        )
    # 0.1.0 wrote every field. Without dtype a file is written by hand, perhaps for 0.1.0, whose default was another.
    required = {"dtype"} if kind is HaloConfig else set()
    _check_fields(record["_data"], where, required, {f.name for f in fields(kind)} - {"version"})
    return cast(LinearConfig, config_from_dict(record))


def _check_fields(record: Any, where: str, required: set[str], known: set[str]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(sorted(known))}; got {record!r:.80}")
    if unknown := sorted(record.keys() - known):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; this halo_tensor knows {', '.join(sorted(known))}")
    if missing := sorted(required - record.keys()):
        raise ValueError(f"{where}: the field {missing[0]!r} is missing")


def _one_of(what: str, value, valid: tuple) -> None:
    if value not in valid or type(value) not in map(type, valid):  # 8.0 and True equal integers
        raise ValueError(f"{what} must be one of {', '.join(map(repr, valid))}; got {value!r}")


def _integer_or_none(what: str, value) -> None:
    if type(value) not in (int, type(None)):
        raise ValueError(f"{what} must be an integer or None; got {value!r}")


@lru_cache
def _halo(level: int, dtype: str, granularity: str, block_size: int | None, seed: int | None) -> Recipe:
    """Cached, so that all layers of a model hold one recipe object: comparing them is then free."""
    if dtype == "bf16":
        return Recipe()
    format = DTYPES[dtype] or (recipes.FP6_E2M3 if level else recipes.FP6_E3M2)
    return recipes.halo(level, format, granularity, Rotation(block_size, seed))


@lru_cache
def _hot(rank, block, grad_input_bits, grad_weight_bits, scale, granularity, rounding, seed) -> Recipe:
    return recipes.hot(
        rank, block, grad_input=BITS[grad_input_bits], grad_weight=BITS[grad_weight_bits], scale=scale,
        granularity=granularity, rounding=rounding, seed=seed,
    )  # fmt: skip


@register_quantize_module_handler(HaloConfig)
@register_quantize_module_handler(HotConfig)
@register_quantize_module_handler(RecipeConfig)
def _convert(module: torch.nn.Module, config: LinearConfig, *, parameter_name: str = "weight") -> torch.nn.Module:
    """torchao's hook: make a layer follow ``config``, in place."""
    recipe, weight = config.recipe, cast(Any, getattr(module, "weight", None))
    obstacle = layers.misfit(module, recipe) if layers.features(module) else "no layer of a kind that it knows"
    if obstacle or parameter_name != "weight":
        raise ValueError(
            f"{type(config).__name__} converts the weight of nn.Linear layers that are called through F.linear, of Conv1D, "
            f"and with a plain forward of nn.Conv2d; got {parameter_name!r} of {type(module).__name__}"
            + (f": {obstacle}" if obstacle else "")
        )
    if layers.is_empty(module):
        return module
    if (type(weight) is not torch.nn.Parameter and not isinstance(weight, HaloWeight)) or not weight.is_floating_point():
        raise ValueError(
            f"the weight of this layer is a {type(weight).__name__} of {weight.dtype}: only plain floating-point weights "
            "can be converted. Convert before any other quantisation or sharding"
        )
    check_scales(recipe.granularities, weight.device)
    check_device(recipe.formats, weight.device)
    frozen = not weight.requires_grad if config.frozen is None else config.frozen
    if frozen and weight.requires_grad:
        weight.requires_grad_(False)
    layers.convert(module, recipe, frozen, config.keep_codes)
    return module


# So that torchao's config_from_dict finds the classes.
ALLOWED_AO_MODULES.add("halo_tensor")
