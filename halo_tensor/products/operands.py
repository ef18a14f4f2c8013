"""Making the operands of the three products of X, W and E, as a recipe says, and sharing them between products and layers."""

import threading
from dataclasses import replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.fences.pytorch import current_raw_stream, is_recorded
from halo_tensor.operand.gains import Gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.recipe import PRODUCTS, E, Operand, Recipe, W
from halo_tensor.reference import hadamard


class _OperandCache(threading.local):
    """Operands made of the most recent matrix of this thread, so that layers which read the same X quantise it once.

    q, k and v, and gate and up, are called one after another with the same tensor; the later ones reuse the first one's codes.
    Only one matrix is remembered: checkpointing keeps inputs alive, and their codes would stay alive with them.
    """

    def __init__(self) -> None:
        #: matrix -> (its version and CUDA stream, {(operand, id of its gain): HadamardQuantTensor}). An entry dies with its
        #: matrix.
        self.operands: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_cache = _OperandCache()


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
    wanted: dict[tuple, list[str]] = {}
    for product in products:
        key = (recipe.operand(product, dims), folds.get(product))
        wanted.setdefault(key, []).append(product)
    if pair := _as_pair(dims, wanted):
        return list(HadamardQuantTensor.pair_from_hp(matrix, *pair))
    shared = _shared_operands(owner)
    made: dict[str, torch.Tensor] = {}
    for (operand, fold), served in wanted.items():
        contracted = {PRODUCTS[product][2] for product in served}
        own = None if operand.format is None else gains
        name = (operand, None if own is None else id(own[0]))  # an operand that is shared keeps its gain, and so the id, alive
        tensor = shared.get(name) if fold is None else None
        if tensor is None or not _serves(tensor, dims, contracted):
            tensor = _quantize(matrix, dims, operand, contracted, fold, own)
            if fold is None and not operand.is_plain:
                shared[name] = tensor
        made |= dict.fromkeys(served, tensor)
    return [made[product] for product in products]


def weight_operand(master: torch.Tensor, recipe: Recipe, gains: Gains | None = None) -> HadamardQuantTensor | None:
    """Return what a weight [out, in] brings to ``output``, in rows; None if the recipe keeps it in high precision."""
    (operand,) = quantize_operands(master, W, recipe, ["output"], gains=gains)
    return operand if isinstance(operand, HadamardQuantTensor) else None


def reuses_operand(recipe: Recipe) -> bool:
    """Whether grad_input multiplies with the same operand of W as output."""
    return recipe.grad_input.right == recipe.output.right


def _as_pair(dims: tuple[str, str], wanted: dict[tuple, list[str]]) -> tuple | None:
    """Return the arguments of ``pair_from_hp`` if that makes what is wanted: rows of E with a scale for each, perhaps with
    rotated tokens, for grad_input, and columns with a scale for each for grad_weight."""
    if dims != E or list(wanted.values()) != [["grad_input"], ["grad_weight"]]:
        return None
    (a, fold_columns), (b, fold_rows) = wanted
    if not (a.granularity.is_per(dims[0]) and b.granularity.is_per(dims[1])):
        return None
    alike = b == replace(a, granularity=b.granularity, tokens=None)
    if a.format is None or a.out_features is not None or not alike or a.rounding != "nearest":
        return None
    return a.format, a.tokens, fold_columns, fold_rows


def _serves(tensor: HadamardQuantTensor, dims: tuple[str, str], contracted: set[str]) -> bool:
    """Whether an operand holds the layouts for products that contract these dimensions."""
    return (dims[1] not in contracted or tensor.codes is not None) and (
        dims[0] not in contracted or tensor.codes_t is not None
    )


def _is_shared(owner: torch.Tensor) -> bool:
    """Whether operands of ``owner`` can be reused in another call."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # every replay of a graph must quantise anew
        return False
    # Other code may write to a leaf without changing its version: receiving ranks, NumPy, x.data, the replay of a graph.
    return type(owner) is torch.Tensor and owner.grad_fn is not None and not is_recorded()


def _shared_operands(owner: torch.Tensor | None) -> dict:
    """Return the operands that were made of ``owner``, to look up and to add to. Nothing is shared while a dispatch mode is
    active (tracing, selective checkpointing), which must see every op."""
    if owner is None or not _is_shared(owner):
        return {}
    stream = current_raw_stream(owner.get_device()) if owner.is_cuda else None
    now = owner._version, stream
    seen, operands = _cache.operands.get(owner, (None, {}))
    if seen != now:
        operands = {}
        _cache.operands.clear()
        _cache.operands[owner] = (now, operands)
    return operands


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
