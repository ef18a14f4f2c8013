"""What a recipe costs, counted from its definition, and what a model saves for backward, measured.

Counts are of the method, not of a device: a GPU without int4 units multiplies int4 values as int8, which the bits counted here
do not show.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log2, prod

import torch
from torch import nn

from halo_tensor.fences.pytorch import is_traceable_wrapper_subclass
from halo_tensor.layers import kinds as layers
from halo_tensor.recipe import PRODUCTS, Operand, Recipe, Rotation, X
from halo_tensor.reference.hadamard import carried
from halo_tensor.reference.ops import rotated


@dataclass(frozen=True)
class Shape:
    """A layer at work, one group of it if it is a convolution: its ``tokens`` are output positions, its ``in_features`` C·k·k.
    ``saved`` is the matrix as which X is kept: [tokens, in_features], or [input positions, C] of a k×k convolution. ``first``
    is False of a linear layer whose X another one before it has saved already."""

    tokens: int
    in_features: int
    out_features: int
    groups: int
    saved: tuple[int, int]
    first: bool = True


def shapes(model: nn.Module, *args, **kwargs) -> dict[str, Shape]:
    """The shape of every layer that some recipe can govern in ``model(*args, **kwargs)``, by name. Runs the forward
    once, as it is (a BatchNorm in training mode takes note); of a layer that is called several times the last call counts."""
    found: dict[str, Shape] = {}
    seen: dict[int, torch.Tensor] = {}

    def record(name: str):
        def hook(module, inputs, named, output):
            sides, x = layers.features(module), layers.input_of(inputs, named)
            assert sides is not None
            if isinstance(module, nn.Conv2d):
                tokens, window = output.numel() // output.shape[-3], prod(module.kernel_size)
                saved = (tokens if window == 1 else x.numel() // x.shape[-3], sides[0])
                found[name] = Shape(tokens, sides[0] * window, sides[1], module.groups, saved)
            else:
                tokens = x.numel() // sides[0]
                found[name] = Shape(tokens, *sides, 1, (tokens, sides[0]), id(x) not in seen)
                seen[id(x)] = x

        return hook

    hooks = [
        m.register_forward_hook(record(name), with_kwargs=True) for name, m in model.named_modules() if layers.features(m)
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _width(dimension: str, size: int, operand: Operand) -> int:
    return rotated(size, carried(operand, dimension, size))


def saved_bytes(recipe: Recipe, shape: Shape, high: int = 16) -> int:
    """Bytes of X that one call of a layer keeps for grad_weight: codes, a byte each whatever their bits, and scales.
    ``high``: bits of high precision."""
    operand, (rows, columns) = recipe.grad_weight.right, shape.saved
    rows, columns = _width("tokens", rows, operand), _width("in_features", columns, operand)
    if operand.format is None:
        return shape.groups * rows * columns * high // 8
    return shape.groups * (rows * columns + operand.granularity.on(X).bytes(rows, columns))


def bit_operations(recipe: Recipe, shape: Shape, high: int = 16) -> dict[str, int]:
    """Bit operations of each product and of all ``transforms`` of one call of a layer.

    A product of a- and b-bit operands over m, n and k costs m·n·k·a·b: one multiply-accumulate of a- and b-bit numbers is
    a·b one-bit products (van Baalen et al. 2020, arXiv 2005.07093, section 3). A Hadamard block of b elements is log₂ b
    additions per element by the fast transform, each of ``high`` one-bit adders; projecting to a rank needs the same butterfly
    at most. Scaling to a format is one ``high``·``high`` product per element. Backward's transforms of X, W and E are counted
    once per operand, the undoing of a rotation too.
    """
    sizes = {"tokens": shape.tokens, "in_features": shape.in_features, "out_features": shape.out_features}
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


def _butterfly(rotation: Rotation | None) -> int:
    return 0 if rotation is None else int(log2(rotation.edge))


class Saved:
    """Bytes that autograd saves, each storage once, parameters left out: of all, and of the layers that were named."""

    total: int = 0
    layers: int = 0


@contextmanager
def measure_saved(model: nn.Module, names: Iterable[str] = ()) -> Iterator[Saved]:
    """Measures what the forward in the block saves for backward, in ``model`` and inside of its layers ``names``; complete
    when the block is left. A storage that a layer and something else save counts for both."""
    saved, inside = Saved(), [0]
    everywhere: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice
    within: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        everywhere[storage.data_ptr()] = storage
        if inside[0]:
            within[storage.data_ptr()] = storage
        return t

    def enter(*_):
        inside[0] += 1

    def leave(*_):
        inside[0] -= 1

    chosen = [model.get_submodule(name) for name in names]
    hooks = [h for m in chosen for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()
        parameters = {s.data_ptr() for p in model.parameters() for s in _storages(p)}  # of subclasses, the inner
        for kept, counter in ((everywhere, "total"), (within, "layers")):
            setattr(saved, counter, sum(s.nbytes() for at, s in kept.items() if at not in parameters))


def _storages(tensor: torch.Tensor) -> set[torch.UntypedStorage]:
    """The storages of a tensor, or of all tensors that a subclass holds."""
    if not is_traceable_wrapper_subclass(tensor):
        return {tensor.untyped_storage()}
    names, _ = tensor.__tensor_flatten__()
    return {storage for name in names for storage in _storages(getattr(tensor, name))}


__all__ = ["Saved", "Shape", "bit_operations", "measure_saved", "saved_bytes", "shapes"]
