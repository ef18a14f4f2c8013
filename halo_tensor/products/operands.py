"""Making the operands of the three products of X, W and E, as a recipe says, and sharing them between products and layers."""

import threading
import weakref
from collections.abc import Callable

import torch

from halo_tensor.fences.pytorch import current_raw_stream, is_capturing, must_repeat
from halo_tensor.operand.gains import Gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.steps import as_both, as_pair, holds_for_grad_input, steps_for
from halo_tensor.recipe import Operand, Recipe, W
from halo_tensor.reference import hadamard


class _Shared:
    """Operands made of the most recent matrix of a thread, so that layers which read the same X quantise it once.

    q, k and v, and gate and up, are called one after another with the same tensor; the later ones reuse the first one's codes.
    Only one matrix is remembered: checkpointing keeps inputs alive, and their codes would stay alive with them.

    Attributes:
        owner: returns the matrix, or None after it died.
        state: its version and CUDA stream.
        operands: (operand, id of its gain) -> HadamardQuantTensor. They die with the matrix.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self, _: object = None) -> None:
        self.owner: Callable[[], torch.Tensor | None] = lambda: None
        self.state: tuple = ()
        self.operands: dict = {}

    def of(self, owner: torch.Tensor, state: tuple) -> dict:
        """Return the operands of ``owner``, which is in this state."""
        if self.owner() is not owner or self.state != state:
            self.owner, self.state, self.operands = weakref.ref(owner, self.forget), state, {}
        return self.operands


class _Thread(threading.local):
    def __init__(self) -> None:
        self.shared = _Shared()


_thread = _Thread()


def quantize_operands(
    matrix: torch.Tensor,
    dims: tuple[str, str],
    recipe: Recipe,
    products: list[str],
    folds: dict[str, torch.Tensor | None] | None = None,
    owner: torch.Tensor | None = None,
    gains: Gains | None = None,
) -> list[torch.Tensor]:
    """Return what ``matrix`` brings to each of ``products``.

    Products that want the same operand are served by one quantisation, and so are later calls with the same ``owner``.

    Args:
        matrix: X, W or E, a matrix over ``dims``.
        dims: its dimensions, ``recipe.X``, ``W`` or ``E``.
        recipe: what it carries in each product.
        products: the names of the products.
        folds: for each product another operand's scale along the contracted dimension, to be multiplied in first.
        owner: the result of a differentiable operation that ``matrix`` is a view of. None shares nothing.
        gains: of in_features of X or W, for every operand that is quantised.

    Returns:
        For each product a HadamardQuantTensor in the layout that the product reads, or the matrix itself if the recipe keeps
        it in high precision.
    """
    folds = folds or {}
    steps = steps_for(recipe, dims, tuple(products), tuple(name for name in products if folds.get(name) is not None))
    if pair := as_pair(dims, steps):
        fold_columns, fold_rows = (folds.get(product) for product in products)
        return list(HadamardQuantTensor.pair_from_hp(matrix, pair.format, pair.tokens, fold_columns, fold_rows))
    if both := as_both(dims, steps):
        first, second = both
        assert first.format is not None and second.format is not None
        return list(
            HadamardQuantTensor.both_from_hp(
                matrix,
                (first.format, second.format),
                (first.granularity.on(dims), second.granularity.on(dims)),
                column_rotation=hadamard.carried(first, dims[1], matrix.shape[1]),
                row_rotation=hadamard.carried(second, dims[0], matrix.shape[0]),
                rounding=first.rounding,
            )
        )
    shared = shared_operands(owner)
    made: dict[str, torch.Tensor] = {}
    for step in steps:
        own = None if step.operand.format is None else gains
        # A shared operand keeps its gain, and so the id, alive.
        name = (step.operand, None if own is None else id(own[0]))
        tensor = None if step.folded else shared.get(name)
        if tensor is None or not _serves(tensor, dims, step.contracted):
            tensor = _quantize(matrix, dims, step.operand, step.contracted, folds.get(step.products[0]), own)
            if not step.folded and not step.operand.is_plain:
                shared[name] = tensor
        made |= dict.fromkeys(step.products, tensor)
    return [made[product] for product in products]


def weight_operand(master: torch.Tensor, recipe: Recipe, gains: Gains | None = None) -> HadamardQuantTensor | None:
    """Return what a weight [out, in] brings to ``output``, in rows; None if the recipe keeps it in high precision."""
    (operand,) = quantize_operands(master, W, recipe, ["output"], gains=gains)
    return operand if isinstance(operand, HadamardQuantTensor) else None


def grad_input_operand(master: torch.Tensor, recipe: Recipe) -> HadamardQuantTensor | None:
    """Return what a weight [out, in] brings to ``grad_input`` alone, in columns; None if it cannot hold that."""
    if not holds_for_grad_input(recipe):
        return None
    (operand,) = quantize_operands(master, W, recipe, ["grad_input"])
    assert isinstance(operand, HadamardQuantTensor)  # it has a format
    return operand


def _serves(tensor: HadamardQuantTensor, dims: tuple[str, str], contracted: set[str]) -> bool:
    """Whether an operand holds the layouts for products that contract these dimensions."""
    return (dims[1] not in contracted or tensor.codes is not None) and (
        dims[0] not in contracted or tensor.codes_t is not None
    )


def _is_captured(x: torch.Tensor) -> bool:
    return x.is_cuda and is_capturing()


def shared_operands(owner: torch.Tensor | None) -> dict:
    """Return the operands that were made of ``owner``, to look up and to add to. Nothing is shared while a dispatch mode is
    active (tracing, selective checkpointing), which must see every op."""
    # Other code may write to a leaf without changing its version: receiving ranks, NumPy, x.data, the replay of a graph.
    if owner is None or type(owner) is not torch.Tensor or owner.is_leaf or must_repeat():
        return {}
    if _is_captured(owner):  # every replay of a CUDA graph must quantise anew
        return {}
    stream = current_raw_stream(owner.get_device()) if owner.is_cuda else None
    return _thread.shared.of(owner, (owner._version, stream))


def _quantize(
    matrix: torch.Tensor,
    dims: tuple[str, str],
    operand: Operand,
    contracted: set[str],
    fold: torch.Tensor | None,
    gains: Gains | None,
) -> torch.Tensor:
    """Return ``matrix`` as an operand of products that contract these dimensions."""
    if operand.is_plain:
        return matrix
    # A feature dimension that no block divides is not rotated; quantize_ has reported it.
    row_rotation, column_rotation = (
        hadamard.carried(operand, dimension, width) for dimension, width in zip(dims, matrix.shape, strict=True)
    )
    return HadamardQuantTensor.from_hp(
        matrix,
        operand.format,
        operand.granularity.on(dims),
        row_rotation=row_rotation,
        column_rotation=column_rotation,
        fold_rows=fold if dims[0] in contracted else None,
        fold_columns=fold if dims[1] in contracted else None,
        rows=dims[1] in contracted,
        columns=dims[0] in contracted,
        rounding=operand.rounding,
        gains=gains,
    )
