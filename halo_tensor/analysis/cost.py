"""Count the bytes and the bit operations of a recipe from its definition.

The counts describe the method, not a device. A GPU without int4 units multiplies int4 values as int8, for example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
from torch import nn

from halo_tensor.analysis.capture import hooked
from halo_tensor.layers import kinds as layers
from halo_tensor.recipe import PRODUCTS, Operand, Recipe, Rotation, X
from halo_tensor.reference.hadamard import carried
from halo_tensor.reference.nibbles import can_pack
from halo_tensor.reference.ops import rotated


@dataclass(frozen=True)
class Shape:
    """The sizes of one call of a layer, or of one group of a convolution.

    Attributes:
        tokens: rows of X; for a convolution, output positions.
        in_features: columns of X; for a convolution, C·k·k.
        out_features: columns of the output.
        groups: how many such products the layer computes; 1 for a linear layer.
        saved: the matrix that is kept of X: [tokens, in_features], or [input positions, C] for a k×k convolution.
        first: False for a linear layer whose X an earlier layer has saved already.
        is_convolution: whether it is a convolution, of any size of windows.
    """

    tokens: int
    in_features: int
    out_features: int
    groups: int
    saved: tuple[int, int]
    first: bool = True
    is_convolution: bool = False

    @property
    def is_windowed(self) -> bool:
        """Whether it is a convolution larger than 1×1."""
        return self.in_features > self.saved[1]

    @property
    def sizes(self) -> dict[str, int]:
        """Name of a dimension of X, W or E -> its size."""
        return {"tokens": self.tokens, "in_features": self.in_features, "out_features": self.out_features}


def shapes(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Shape]:
    """Run ``model(*args, **kwargs)`` once and return the shape of every layer that a recipe can convert, by name.

    The model runs in its own mode, so a BatchNorm in training mode updates its statistics. If a layer is called several
    times, its last call counts.
    """
    found: dict[str, Shape] = {}
    seen: dict[int, torch.Tensor] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], output: torch.Tensor) -> None:
            x = layers.input_of(inputs, named)
            if isinstance(module, nn.Conv2d):
                found[name] = shape_of(module, output.numel() // output.shape[-3], x.numel() // x.shape[-3])
            else:
                tokens = x.numel() // x.shape[-1]
                found[name] = shape_of(module, tokens, tokens, id(x) not in seen)
                seen[id(x)] = x

        return hook

    with hooked({name: m for name, m in model.named_modules() if layers.features(m)}, record), torch.no_grad():
        model(*args, **kwargs)
    return found


def shape_of(module: Any, tokens: int, positions: int, first: bool = True) -> Shape:
    """Return the shape of one call of a layer. Each group of a convolution is a product of its own.

    Args:
        module: a layer that a recipe can convert.
        tokens: rows of X; for a convolution, output positions.
        positions: input positions of a convolution; for a linear layer, ``tokens``.
        first: see :class:`Shape`.
    """
    sides = layers.features(module)
    assert sides is not None
    if not isinstance(module, nn.Conv2d):
        return Shape(tokens, *sides, 1, (tokens, sides[0]), first)
    window = prod(module.kernel_size)
    saved = tokens if window == 1 else positions, sides[0]
    return Shape(tokens, sides[0] * window, sides[1], module.groups, saved, first, is_convolution=True)


def _width(dimension: str, size: int, operand: Operand) -> int:
    """Return the size of a dimension after the operand's rotation, which may pad it or project it to a rank."""
    return rotated(size, carried(operand, dimension, size))


def saved_bytes(recipe: Recipe, shape: Shape, high: int = 16) -> int:
    """Return the bytes of X that one call of a layer keeps for grad_weight.

    A code of INT4 takes half a byte and any other one a byte, and each scale what its layout says.

    Args:
        recipe: the layer's recipe.
        shape: the layer's shape.
        high: bits of an element in high precision.
    """
    operand, (rows, columns), groups = recipe.grad_weight.right, shape.saved, shape.groups
    if shape.is_convolution and not recipe.quantizes_convolution(pointwise=not shape.is_windowed):
        columns, groups = groups * columns, 1  # X of all groups is one matrix
    rows, columns = _width("tokens", rows, operand), _width("in_features", columns, operand)
    if operand.format is None:
        return groups * rows * columns * high // 8
    codes = (rows + 1) // 2 * columns if can_pack(operand.format) else rows * columns
    return groups * (codes + operand.granularity.on(X).bytes(rows, columns))


def bit_operations(recipe: Recipe, shape: Shape, high: int = 16) -> dict[str, int]:
    """Count the bit operations of one call of a layer.

    A product of a-bit and b-bit operands over m, n and k costs m·n·k·a·b: a multiply-accumulate of an a-bit and a b-bit number
    is a·b one-bit products (van Baalen et al. 2020, arXiv 2005.07093, section 3). The fast transform rotates a Hadamard block
    of b elements with log₂ b additions per element, each of ``high`` one-bit adders; projecting to a rank needs no more.
    Scaling to a format is one ``high``·``high`` product per element. Every operand of X, W and E is transformed once; undoing
    the rotation of a result counts too.

    Args:
        recipe: the layer's recipe.
        shape: the layer's shape.
        high: bits of an element in high precision.

    Returns:
        "output", "grad_input", "grad_weight" and "transforms" -> one-bit operations.
    """
    if shape.is_convolution and recipe.of_convolution(pointwise=not shape.is_windowed) != recipe:
        return _bit_operations_of_saving(recipe, shape, high)
    sizes = shape.sizes
    counts, transforms = {}, 0
    transformed: set[tuple] = set()
    for name, (left_dims, right_dims, contracted) in PRODUCTS.items():
        product = getattr(recipe, name)
        left, right = product.left, product.right
        (m,) = (_width(d, sizes[d], left) for d in left_dims if d != contracted)
        (n,) = (_width(d, sizes[d], right) for d in right_dims if d != contracted)
        k = _width(contracted, sizes[contracted], left)
        counts[name] = m * n * k * (left.format.bits if left.format else high) * (right.format.bits if right.format else high)
        sides = ((left, left_dims), (right, right_dims))
        for operand, dims in sides:
            if (operand, dims) not in transformed:
                transformed.add((operand, dims))
                elements = sizes[dims[0]] * sizes[dims[1]]
                transforms += sum(_butterfly(carried(operand, d, sizes[d])) for d in dims) * elements * high
                transforms += elements * high * high if operand.format else 0
        undone = sum(_butterfly(carried(o, d, sizes[d])) for o, dims in sides for d in dims if d != contracted)
        transforms += undone * m * n * high
    return {name: shape.groups * count for name, count in counts.items()} | {"transforms": shape.groups * transforms}


def _bit_operations_of_saving(recipe: Recipe, shape: Shape, high: int) -> dict[str, int]:
    """Return what :func:`bit_operations` returns, of a convolution that computes in high precision and saves X in few bits."""
    counts = bit_operations(recipe.of_convolution(pointwise=not shape.is_windowed), shape, high)
    operand, sizes = recipe.grad_weight.right, dict(zip(X, shape.saved, strict=True))
    additions = sum(_butterfly(carried(operand, dimension, size)) for dimension, size in sizes.items())
    products = high if operand.format else 0
    counts["transforms"] += 2 * shape.groups * prod(shape.saved) * (additions + products) * high  # there and back
    return counts


def _butterfly(rotation: Rotation | None) -> int:
    """Return the additions per element of the fast transform."""
    return 0 if rotation is None else int(log2(rotation.edge))
