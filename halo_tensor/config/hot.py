"""The config of HOT."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from halo_tensor import recipe as recipes
from halo_tensor.config.base import GRANULARITIES, RotatedConfig, integer_or_none, one_of
from halo_tensor.recipe import Recipe

#: bits of a product's operands -> format
BITS = {4: recipes.INT4, 8: recipes.INT8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
ROUNDINGS = ("stochastic", "nearest")


@dataclass(frozen=True, repr=False)
class HotConfig(RotatedConfig):
    """HOT (arXiv 2503.21261): the forward stays as it is, and the backward runs in few bits.

    Of each layer's input only the part ``rank``/``block_size`` is saved for backward, in ``grad_weight_bits``. HOT converts
    transformers' ``Conv1D`` too, and ``nn.Conv2d``, which saves its input in few bits and computes in high precision unless
    ``quantized_convolutions`` says otherwise. It is made for vision models, whose tokens are redundant. On a language
    model its gradient is useless (bench/results/accuracy_hot.md): use ``recipe_config("hot_llm")`` there.

    ``hot_config`` is another name of this class. It has the fields of
    :class:`LinearConfig` too: ``skip``, ``min_features``, ``frozen``, ``memory``, ``keep_codes``,
    ``activations`` and ``adapters``.

    Args:
        rank: how many of the ``block_size`` sequencies of each block of tokens grad_weight keeps, from 1 to ``block_size``;
            None for all.
        block_size: edge of the blocks of both products' rotations: 16, 32, 64, 128 or 256.
        grad_input_bits: of the operands of grad_input: 4 or 8. INT4 values are multiplied as INT8, exactly. Hopper has no INT4
            units, so 4 bits are no faster there.
        grad_weight_bits: of the operands of grad_weight: 4 or 8.
        saved_bits: of X in grad_weight, which is what forward saves: 4, with a scale for each in_feature; None for
            ``grad_weight_bits`` and ``granularity``. ``hot_config(rank=None, saved_bits=4)`` saves as many bytes as the
            default, and loses much less of G where neighbouring tokens are not alike.
        grad_output_granularity: scales of E in grad_input: "tensor" (one), or "row" (one per token).
            :func:`~halo_tensor.calibrate` chooses between the two for each layer.
        granularity: scales of all other operands: "tensor" (one, as published), or "row" (one per index of the dimension
            that the product keeps).
        rounding: how E is rounded in grad_input: "stochastic" or "nearest".
        seed: seed of the random signs of whole blocks (``rank=None``); None for no signs. A low rank takes no signs.
        quantized_convolutions: which convolutions compute their backward products in few bits: "none", "pointwise" (those of
            1×1, which are linear layers) or, as published, "all". The others save their input in few bits, and compute their
            gradients in high precision, which is faster on a GPU and more accurate.

    Raises:
        ValueError: a field or a value is not valid. The message lists the valid ones.

    Example:
        >>> import torch
        >>> from halo_tensor import hot_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> quantize_(model, hot_config(grad_output_granularity="row")).converted
        ['0', '2']
    """

    renamed: ClassVar[dict[str, str]] = {"scale": "grad_output_granularity"}

    rank: int | None = 8
    block_size: int = field(default=16, kw_only=True)
    grad_input_bits: int = field(default=4, kw_only=True)
    grad_weight_bits: int = field(default=8, kw_only=True)
    saved_bits: int | None = field(default=None, kw_only=True)
    grad_output_granularity: str = field(default="tensor", kw_only=True)
    granularity: str = field(default="tensor", kw_only=True)
    rounding: str = field(default="stochastic", kw_only=True)
    seed: int | None = field(default=None, kw_only=True)
    quantized_convolutions: str = field(default="none", kw_only=True)
    min_features: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("block_size", self.block_size, BLOCK_SIZES)
        one_of("grad_input_bits", self.grad_input_bits, tuple(BITS))
        one_of("grad_weight_bits", self.grad_weight_bits, tuple(BITS))
        one_of("saved_bits", self.saved_bits, (None, 4))
        one_of("grad_output_granularity", self.grad_output_granularity, GRANULARITIES)
        one_of("rounding", self.rounding, ROUNDINGS)
        one_of("quantized_convolutions", self.quantized_convolutions, recipes.CONVOLUTIONS)
        integer_or_none("rank", self.rank)
        if self.rank is not None and not 1 <= self.rank <= self.block_size:
            raise ValueError(f"rank must be from 1 to block_size={self.block_size}, or None for all; got {self.rank}")
        if self.rank is not None and self.seed is not None:
            raise ValueError("a seed signs whole blocks (rank=None); a low rank takes seed=None")

    @property
    def recipe(self) -> Recipe:
        """The method as data. Configs that differ only in which layers they convert share one object."""
        recipe = _recipe(
            self.rank, self.block_size, self.grad_input_bits, self.grad_weight_bits, self.saved_bits,
            self.grad_output_granularity, self.granularity, self.rounding, self.seed, self.quantized_convolutions,
        )  # fmt: skip
        return self.saving(recipe)

    @classmethod
    def present_fields(cls, written: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that an older version wrote. 0.1.0 called one scale per token ``scale="tokens"``."""
        rows = {"scale": "row"} if written.get("scale") == "tokens" else {}
        return super().present_fields(written | rows)


@lru_cache
def _recipe(
    rank: int | None,
    block: int,
    grad_input_bits: int,
    grad_weight_bits: int,
    saved_bits: int | None,
    grad_output_granularity: str,
    granularity: str,
    rounding: str,
    seed: int | None,
    quantized_convolutions: str,
) -> Recipe:
    """Cached, so that all layers of a model hold one recipe object, and comparing recipes is free."""
    scale = "tokens" if grad_output_granularity == "row" else "tensor"
    return recipes.hot(
        rank, block, grad_input=BITS[grad_input_bits], grad_weight=BITS[grad_weight_bits],
        saved=None if saved_bits is None else BITS[saved_bits], scale=scale, granularity=granularity, rounding=rounding,
        seed=seed, quantized_convolutions=quantized_convolutions,
    )  # fmt: skip


hot_config = HotConfig
"""HOT as a config for `quantize_`. Another name of `HotConfig`, which explains the fields."""
