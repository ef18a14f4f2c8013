"""The linear layer's three products, as a recipe says.

Forward quantises X and meets W as codes, which :class:`~halo_tensor.weight.HaloWeight` holds; backward quantises E and
multiplies it with the same operands again. Of X, only the codes that grad_weight reads are saved; of W, references.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor import multiply  # noqa: F401  defines torch.mm of two operands
from halo_tensor.gains import Gains
from halo_tensor.internals import current_raw_stream
from halo_tensor.ops import hadamard
from halo_tensor.ops.schemas import is_recorded
from halo_tensor.recipe import PRODUCTS, E, Operand, Recipe, W, X
from halo_tensor.tensor import HadamardQuantTensor


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
        name = (operand, None if own is None else id(own[0]))  # the id stays the gain's own: what is shared keeps it
        tensor = shared.get(name) if fold is None else None
        if tensor is None or not _serves(tensor, dims, contracted):
            tensor = _quantize(matrix, dims, operand, contracted, fold, own)
            if fold is None and not operand.is_plain:
                shared[name] = tensor
        made |= dict.fromkeys(served, tensor)
    return [made[product] for product in products]


def weight_operand(master: torch.Tensor, recipe: Recipe, gains: Gains | None = None) -> HadamardQuantTensor | None:
    """What a weight [out, in] brings to ``output``, in rows; None where the recipe leaves it as it is."""
    (operand,) = quantize_operands(master, W, recipe, ["output"], gains=gains)
    return operand if isinstance(operand, HadamardQuantTensor) else None


def reuses_operand(recipe: Recipe) -> bool:
    """Whether grad_input multiplies with the operand of W that output did."""
    return recipe.grad_input.right == recipe.output.right


def _as_pair(dims: tuple[str, str], wanted: dict[tuple, list[str]]) -> tuple | None:
    """The arguments of ``pair_from_hp`` if it makes what is wanted: of E, row-scaled rows, perhaps with rotated tokens,
    for grad_input, and column-scaled columns for grad_weight."""
    if dims != E or list(wanted.values()) != [["grad_input"], ["grad_weight"]]:
        return None
    (a, fold_columns), (b, fold_rows) = wanted
    plain_b = replace(a, scale=dims[1], tokens=None)
    if a.format is None or a.scale != dims[0] or a.out_features is not None or b != plain_b or a.rounding != "nearest":
        return None
    return a.format, a.tokens, fold_columns, fold_rows


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


def _shared_operands(owner: torch.Tensor | None) -> dict:
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


def _multiply(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(a, HadamardQuantTensor) != isinstance(b, HadamardQuantTensor):
        a, b = (t if isinstance(t, HadamardQuantTensor) else HadamardQuantTensor.plain(t) for t in (a, b))
    elif not isinstance(a, HadamardQuantTensor):
        a, b = a.to(dtype), b.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options: Any = {} if a.dtype == b.dtype == dtype else {"out_dtype": dtype}
    return torch.mm(a, b, **options) if bias is None else torch.addmm(bias, a, b, **options)


def multiply_backward(
    recipe: Recipe,
    e: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """E_X [tokens, in] of ``x_dtype`` and G [out, in] of ``w_dtype``; None where ``w`` or ``x`` is.

    Args:
        e: E [tokens, out]. x: what X brings to grad_weight. w: the operand of W that output used, if grad_input uses it too,
            else W itself.
    """
    right, folds = {}, {}
    if w is not None:
        right["grad_input"] = w if reuses_operand(recipe) else quantize_operands(w, W, recipe, ["grad_input"])[0]
    if x is not None:
        right["grad_weight"] = x
    for product, operand in right.items():
        along = getattr(recipe, product).right.scale
        if along == PRODUCTS[product][2] and isinstance(operand, HadamardQuantTensor):
            folds[product], right[product] = operand.scale, operand.without_scale()
    left = dict(zip(right, quantize_operands(e, E, recipe, list(right), folds), strict=True))
    grad_x = None if w is None else _multiply(left["grad_input"], right["grad_input"], x_dtype)
    grad_w = None if x is None else _multiply(left["grad_weight"].t(), right["grad_weight"], w_dtype)
    return grad_x, grad_w


def take_apart(operand: torch.Tensor | None) -> tuple[list[torch.Tensor], Callable]:
    """The tensors to save for an operand, and the function that puts them together again. Inner tensors are saved, not the
    subclass: hooks on saved tensors (offloading, counting) see what is really kept."""
    if operand is None:
        return [], lambda tensors: None
    if not isinstance(operand, HadamardQuantTensor):
        return [operand], lambda tensors: tensors[0]
    names, attributes = operand.__tensor_flatten__()
    size, stride = operand.size(), operand.stride()

    def put_together(tensors):
        inner = dict(zip(names, tensors, strict=True))
        return HadamardQuantTensor.__tensor_unflatten__(inner, attributes, size, stride)

    return [getattr(operand, name) for name in names], put_together


def backward_of_rounding(backward: Callable) -> Callable:
    """For the backward of an autograd function: it refuses second derivatives, and autocast does not reach it."""

    @wraps(backward)
    def run(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("a converted layer has no second derivatives: rounding has none. dequantize_ the model")
        with torch.autocast(grad_output.device.type, enabled=False):
            return backward(ctx, grad_output)

    return run


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, recipe, dtype, trains, gain):
        master, operand = getattr(weight, "master", weight), getattr(weight, "operand", None)
        if operand is None and not recipe.output.right.is_plain:  # a weight that holds no codes
            operand = weight_operand(master, recipe)
        w = master if operand is None else operand
        wants_x, wants_w = (trains and needed for needed in ctx.needs_input_grad[:2])
        products = ["output", "grad_weight"] if wants_w else ["output"]
        # What W was multiplied with X is divided by, and the other way round.
        gains = getattr(operand, "gains", None)
        gains = gains and (gains[1] if gain is None else gain, gains[0])
        x_operands = quantize_operands(x.reshape(-1, x.shape[-1]), X, recipe, products, owner=x, gains=gains)
        y = _multiply(x_operands[0], w.t(), dtype, bias)

        x_saved = x_operands[1] if wants_w else None
        if isinstance(x_saved, HadamardQuantTensor):
            x_saved = x_saved.only("columns")
        w_saved = (w if reuses_operand(recipe) else master) if wants_x else None
        x_tensors, ctx.put_x_together = take_apart(x_saved)
        w_tensors, ctx.put_w_together = take_apart(w_saved)
        ctx.save_for_backward(*x_tensors, *w_tensors)
        ctx.x_count = len(x_tensors)
        ctx.recipe, ctx.x_shape, ctx.x_dtype, ctx.w_dtype = recipe, x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # What a function returns as a view, autograd lets nobody write to; ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    @backward_of_rounding
    def backward(ctx, grad_output):
        recipe, saved = ctx.recipe, ctx.saved_tensors
        x, w = ctx.put_x_together(saved[: ctx.x_count]), ctx.put_w_together(saved[ctx.x_count :])
        e = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x, grad_w = multiply_backward(recipe, e, x, w, ctx.x_dtype, ctx.w_dtype)
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        grad_bias = e.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None, None, None


def product_dtype(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    """What a layer computes in: autocast's dtype, or the one that all three have.

    Raises ValueError if they differ outside autocast.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"{name}: input {x.dtype}, weight {weight.dtype} and bias {None if bias is None else bias.dtype} must be of one "
            "dtype; convert the model or the input with .to(dtype), or use torch.autocast"
        )
    return x.dtype


def refuse_tracing() -> None:
    """TorchScript cannot hold a Python autograd function: saving what it traced crashes."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace knows no converted layers: call dequantize_(model) first")


def linear(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    recipe: Recipe | None = None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.linear(x, weight, bias)`` by the recipe of ``weight``, a HaloWeight [out, in]; or by ``recipe``, of any weight,
    which is quantised in every call if the recipe's output quantises it.

    Args:
        x: [..., in], of the weight's dtype; bias: [out], one number, or None. Under autocast the result has its dtype, while
            X and W are quantised from the precision they come in.
        gain: the ``undo_gain`` of ``weight`` once more, if it has one, as an input of its own: a compiler knows of inputs, but
            not of tensors inside of subclasses, that they are the same one, and then quantises X once for all who share it.

    Raises:
        ValueError: the shapes do not fit, the devices differ, or the dtypes do outside autocast; or W is held as codes
            only and is to be trained.
        RuntimeError: inside ``torch.jit.trace``.
    """
    refuse_tracing()
    if recipe is None and weight.master is None and weight.requires_grad and weight.fsdp != "gathered":
        if weight.grad_fn is not None:  # SHiRA adds its adapter to a clone
            raise ValueError(
                "linear: something trainable was added to this weight, which was frozen when it was converted and is held "
                "as codes only: the sum would be rounded to codes in every forward, and small changes lost. Convert its layer "
                "with frozen=False in the config, which keeps the high-precision weight, or leave it out (skip, filter_fn)"
            )
        raise ValueError(
            "linear: this weight was frozen when it was converted and is held as codes only, so it cannot be trained. Call "
            "dequantize_(model), then requires_grad_(True), then quantize_(model, ...)"
        )
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: an input of shape {list(x.shape)} does not fit a weight of {list(weight.shape)} [out, in]")
    if bias is not None and bias.numel() == 1:
        bias = bias.expand(weight.shape[:1])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: a bias of shape {list(bias.shape)} does not fit a weight of {list(weight.shape)} [out, in]")
    if devices := {str(t.device) for t in (weight, bias) if t is not None and t.device != x.device}:
        raise ValueError(f"linear: the input is on {x.device} and the layer on {', '.join(sorted(devices))}; move one of them")
    dtype = product_dtype("linear", x, weight, bias)
    device = "cpu" if x.device.type == "meta" else x.device.type  # autocast knows no meta tensors
    with torch.autocast(device, enabled=False):
        return _Linear.apply(x, weight, bias, recipe or weight.recipe, dtype, torch.is_grad_enabled(), gain)
