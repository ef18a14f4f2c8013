"""What X, W and E bring to the three products, as a recipe says, and what of it is shared."""

import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.fences.pytorch import current_raw_stream, is_recorded
from halo_tensor.operand.gains import Gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.steps import as_pair, steps_for
from halo_tensor.recipe import Operand, Recipe, W
from halo_tensor.reference import hadamard


class _Shared(threading.local):
    """What the last matrix was quantised to, in each thread: q, k and v follow each other, and so do gate and up. Of more, the
    codes would live as long as the matrices, which checkpointing keeps."""

    def __init__(self) -> None:
        # matrix -> (its version and stream, {(operand, id of its gain): HadamardQuantTensor}). An entry dies with its matrix.
        self.operands: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_shared = _Shared()


def quantize_operands(
    matrix: torch.Tensor,
    dims: tuple[str, str],
    recipe: Recipe,
    products: list[str],
    folds: dict[str, torch.Tensor | None] | None = None,
    owner: torch.Tensor | None = None,
    gains: Gains | None = None,
) -> list[torch.Tensor]:
    """What ``matrix``, one of X, W and E by its ``dims``, brings to each of ``products``: a HadamardQuantTensor in the layout
    that the product reads, or the matrix itself where the recipe keeps it in high precision.

    Products that want the same operand are served by one quantisation, and so are calls that follow with the same ``owner``,
    the result of a differentiable operation that ``matrix`` is a view of. ``folds`` gives, per product, another operand's
    scale along the contracted dimension, to be multiplied in first. ``gains`` are those of in_features, of X or W, for every
    operand that is quantised.
    """
    folds = folds or {}
    steps = steps_for(recipe, dims, tuple(products), tuple(name for name in products if folds.get(name) is not None))
    if pair := as_pair(dims, steps):
        fold_columns, fold_rows = (folds.get(product) for product in products)
        return list(HadamardQuantTensor.pair_from_hp(matrix, pair.format, pair.tokens, fold_columns, fold_rows))
    shared = shared_operands(owner)
    made: dict[str, torch.Tensor] = {}
    for step in steps:
        own = None if step.operand.format is None else gains
        name = (step.operand, None if own is None else id(own[0]))  # the id stays the gain's own: what is shared keeps it
        tensor = None if step.folded else shared.get(name)
        if tensor is None or not _serves(tensor, dims, step.contracted):
            tensor = _quantize(matrix, dims, step.operand, step.contracted, folds.get(step.products[0]), own)
            if not step.folded and not step.operand.is_plain:
                shared[name] = tensor
        made |= dict.fromkeys(step.products, tensor)
    return [made[product] for product in products]


def weight_operand(master: torch.Tensor, recipe: Recipe, gains: Gains | None = None) -> HadamardQuantTensor | None:
    """What a weight [out, in] brings to ``output``, in rows; None where the recipe leaves it as it is."""
    (operand,) = quantize_operands(master, W, recipe, ["output"], gains=gains)
    return operand if isinstance(operand, HadamardQuantTensor) else None


def _serves(tensor: HadamardQuantTensor, dims: tuple[str, str], contracted: set[str]) -> bool:
    """Whether an operand holds the layouts for products that contract these dimensions."""
    return (dims[1] not in contracted or tensor.codes is not None) and (
        dims[0] not in contracted or tensor.codes_t is not None
    )


def _is_shared(owner: torch.Tensor) -> bool:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # a graph must quantise anew in every replay
        return False
    # A leaf may be a buffer that others write to without a trace: receiving ranks, NumPy, x.data, the replay of a graph.
    return type(owner) is torch.Tensor and owner.grad_fn is not None and not is_recorded()


def shared_operands(owner: torch.Tensor | None) -> dict:
    """The operands already made of ``owner``, to look up and to add to. Nothing is shared while a dispatch mode is active
    (tracing, selective checkpointing): a mode must see every op."""
    if owner is None or not _is_shared(owner):
        return {}
    stream = current_raw_stream(owner.get_device()) if owner.is_cuda else None
    now = owner._version, stream
    seen, operands = _shared.operands.get(owner, (None, {}))
    if seen != now:
        operands = {}
        _shared.operands.clear()
        _shared.operands[owner] = (now, operands)
    return operands


def _quantize(
    matrix, dims, operand: Operand, contracted: set[str], fold: torch.Tensor | None, gains: Gains | None
) -> torch.Tensor:
    if operand.is_plain:
        return matrix
    # A feature dimension that no block divides stays un-rotated, and quantize_ has said so.
    left, right = (hadamard.carried(operand, d, width) for d, width in zip(dims, matrix.shape, strict=True))
    return HadamardQuantTensor.from_hp(
        matrix,
        operand.format,
        {dims[0]: "row", dims[1]: "column"}.get(operand.scale, operand.scale),
        left=left,
        right=right,
        fold_rows=fold if dims[0] in contracted else None,
        fold_columns=fold if dims[1] in contracted else None,
        rows=dims[1] in contracted,
        columns=dims[0] in contracted,
        rounding=operand.rounding,
        gains=gains,
    )
