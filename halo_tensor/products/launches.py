"""The parts of a layer as functions of plain tensors that only allocate and launch: its quantisers and its products.

They are made once for the widths, dtypes and device of a layer, and follow the steps of its recipe
(:mod:`halo_tensor.products.steps`). :mod:`halo_tensor.products.lowered` puts them together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from halo_tensor.products.operands import shared_operands
from halo_tensor.products.steps import Dims, Step, steps_for
from halo_tensor.recipe import PRODUCTS, TENSOR, Operand, Recipe, Scales, X
from halo_tensor.recipe.formats import FLOAT32
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.hadamard import carried
from halo_tensor.reference.nibbles import can_pack
from halo_tensor.reference.ops import LONGEST_SUM, rotated


class Codes(NamedTuple):
    """An operand: codes [r, c], their transpose [c, r], either of which may be None, and float32 scales."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor


class Layer(NamedTuple):
    """Everything that the launches of a layer depend on. Numbers of tokens are not part of it.

    Attributes:
        recipe: of its three products.
        out_features, in_features: the widths.
        x, weight, output: the dtypes of X, of the weight and its gradient, and of the output and its gradient.
        bias: the dtype of the bias, or None.
        device: where all tensors are.
        balanced: whether the weight is.
        row: the stride of the rows of W's codes, which FSDP2 gathers with scales between them; 0 without codes.
        packed: whether these are packed fp6 codes.
    """

    recipe: Recipe
    out_features: int
    in_features: int
    x: torch.dtype
    weight: torch.dtype
    output: torch.dtype
    bias: torch.dtype | None
    device: torch.device
    balanced: bool = False
    row: int = 0
    packed: bool = False

    def width(self, dimension: str) -> int:
        """Return the size of a dimension of features. A rotation of tokens does not depend on theirs."""
        return 0 if dimension == "tokens" else getattr(self, dimension)


def is_simple(granularity: Scales) -> bool:
    """Whether there is one scale, or one float32 scale for each index of a dimension."""
    return granularity == TENSOR or (granularity.is_vector and granularity.dtype == FLOAT32)


class InputQuantizer:
    """The quantiser of a layer's X for some of its products, which ask for the same operand. Its launches are recorded. For
    grad_weight alone, codes are returned as forward saves them (:func:`saved_columns`)."""

    def __init__(self, layer: Layer, products: tuple[str, ...]):
        from halo_tensor.kernels.recorded import Recorded  # Triton, which a machine without a GPU may lack

        (step,) = steps_for(layer.recipe, X, products)
        operand = _INTERNED.setdefault(step.operand, step.operand)
        packs = products == ("grad_weight",) and can_pack(operand.format)
        self._operand = id(operand), packs
        self._layouts = [i for i, dimension in enumerate(reversed(X)) if dimension in step.contracted]
        #: A function of (shape, strides), x and a gain, which is called without a look at what other layers have made.
        quantize = partial(_quantized, quantizer(layer, X, step, layer.x), layer.in_features)
        self.quantize = Recorded(partial(_saved, quantize, operand) if packs else quantize)

    def __call__(self, x: torch.Tensor, shape: torch.Size, gain: torch.Tensor | None = None) -> Sequence[torch.Tensor | None]:
        """Return what X brings to the products, as :class:`Codes` lists it. Layers that follow each other and read the same X
        quantise it once.

        Args:
            x: [..., in], of this ``shape``.
            gain: float32 [in], with which columns are multiplied first.
        """
        if x.is_leaf:  # of which nothing is shared
            return self.quantize((shape, x.stride()), x, gain)
        shared = shared_operands(x)
        key = *self._operand, id(gain)
        found, _ = shared.get(key) or _NOTHING
        if found is None or any(found[i] is None for i in self._layouts):
            found = self.quantize((shape, x.stride()), x, gain)
            shared[key] = found, gain  # which so keeps its id
        return found


_NOTHING = None, None
#: An operand -> the first one that equals it, so that equal ones are known by their id.
_INTERNED: dict[Operand, Operand] = {}


def _quantized(
    quantize: Callable[..., Codes], width: int, numbers: tuple, x: torch.Tensor, gain: torch.Tensor | None
) -> Codes:
    """Return the codes of x [..., width], whose shape and strides are ``numbers``."""
    return quantize(x if x.ndim == 2 else x.reshape(-1, width), None, gain)


def _saved(quantize: Callable[..., Codes], operand: Operand, *arguments: Any) -> Codes:
    """Return what ``quantize`` returns, with columns as forward saves them."""
    codes = quantize(*arguments)
    assert codes.columns is not None
    return codes._replace(columns=saved_columns(codes.columns, operand))


def saved_columns(codes_t: torch.Tensor, operand: Operand) -> torch.Tensor:
    """Return transposed codes of X as forward saves them: those of INT4 in half a byte each.

    Args:
        codes_t: int8 or fp8 [in_features, tokens after their rotation].
        operand: what X brings to grad_weight.
    """
    if not can_pack(operand.format):
        return codes_t
    from halo_tensor.kernels.quantize.nibbles import pack_nibbles

    return pack_nibbles(codes_t)


def restored_columns(saved: torch.Tensor, operand: Operand, tokens: int) -> torch.Tensor:
    """Return the transposed codes that :func:`saved_columns` got, of an X of ``tokens`` rows."""
    if not can_pack(operand.format):
        return saved
    from halo_tensor.kernels.quantize.nibbles import unpack_nibbles

    return unpack_nibbles(saved, rotated(tokens, operand.tokens))


def quantizer(layer: Layer, dims: Dims, step: Step, dtype: torch.dtype) -> Callable[..., Codes]:
    """Return a function of a matrix of ``dtype``, the scale that is folded in or None, a gain of columns or None, and the seed
    of stochastic rounding or None."""
    from halo_tensor.kernels.quantize import plan, whole_rows
    from halo_tensor.kernels.rotate import transposed

    row_rotation, column_rotation = (carried(step.operand, d, layer.width(d)) for d in dims)
    format, scale = step.operand.format, step.operand.granularity.on(dims).name
    rows, columns = dims[1] in step.contracted, dims[0] in step.contracted
    gained = layer.balanced and dims[1] == "in_features"
    assert format is not None
    k, nearest = layer.width(dims[1]), step.operand.rounding == "nearest"
    if (
        nearest
        and scale == "row"
        and row_rotation is None
        and plan.is_one_launch(k, dtype, layer.device, column_rotation, gained)
    ):
        quantize_rows = whole_rows.row_quantizer(k, dtype, layer.device, column_rotation, format, gained, step.folded)

        def by_rows(matrix: torch.Tensor, fold: torch.Tensor | None = None, gain: torch.Tensor | None = None) -> Codes:
            codes, scales = quantize_rows(matrix, gain, fold)
            return Codes(codes if rows else None, transposed(codes) if columns else None, scales)

        return by_rows

    by_columns = None
    if nearest and columns and not rows and column_rotation is None and not (gained or step.folded):
        by_columns = plan.columns_quantizer(dtype, layer.device, row_rotation, format, scale)

    def by_any(
        matrix: torch.Tensor,
        fold: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> Codes:
        if by_columns is not None:
            return Codes(None, *by_columns(matrix))
        fold_rows, fold_columns = (fold, None) if columns else (None, fold)
        made = plan.rotate_quantize(
            matrix, row_rotation, column_rotation, format, scale, fold_rows, fold_columns, rows, columns,
            seed=seed, gain=gain if gained else None,
        )  # fmt: skip
        return Codes(*made)

    return by_any


def product(layer: Layer, name: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return a function of (a, b_t, a_scale, b_scale, gain, bias, rows, shape) that returns the product, of ``shape`` and
    ``dtype``: ``a`` [rows, k] and ``b_t`` [n, k] are codes, b_scale is None if it was folded in."""
    from halo_tensor.kernels.matmul import plan

    left_dims, right_dims, contracted = PRODUCTS[name]
    (m_dim,), (n_dim,) = ([d for d in dims if d != contracted] for dims in (left_dims, right_dims))
    of_a, of_b = getattr(layer.recipe, name).left, getattr(layer.recipe, name).right
    n = layer.width(n_dim)
    row_rotation, column_rotation = carried(of_a, m_dim, layer.width(m_dim)), carried(of_b, n_dim, n)

    def in_any_launches(
        a: torch.Tensor, b_t: torch.Tensor, a_scale: Any, b_scale: Any, gain: Any, bias: Any, rows: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        y = plan.scaled_mm(a, b_t, a_scale, b_scale, bias, row_rotation, column_rotation, (rows, n), dtype, gain)
        if len(shape) == 2:
            return y
        return torch.ops.aten._unsafe_view.default(y, shape)  # a view may not be written to where a function returns it

    columns_fit = column_rotation is None or (plan.fits_epilogue(column_rotation) and rotated(n, column_rotation) == n)
    if row_rotation is not None or not columns_fit:
        return in_any_launches
    kinds = 1 + of_a.granularity.is_vector, 0 if of_b.granularity.is_per(contracted) else 1 + of_b.granularity.is_vector
    formats = of_a.format, of_b.format
    assert formats[0] is not None and formats[1] is not None
    codes = code_dtype(formats[0]), code_dtype(formats[1])
    gained = layer.balanced and n_dim == "in_features"
    bias_dtype = layer.bias if name == "output" else None
    planned = plan.plan(layer.device, *codes, n, *kinds, gained, bias_dtype, None, column_rotation, dtype)
    longest = LONGEST_SUM if codes[0] == torch.int8 else 2**63

    def in_one_launch(
        a: torch.Tensor, b_t: torch.Tensor, a_scale: Any, b_scale: Any, gain: Any, bias: Any, rows: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        k, stride = a.shape[1], b_t.stride(0)
        if k > longest or stride % 16:
            return in_any_launches(a, b_t, a_scale, b_scale, gain, bias, rows, shape)
        out = a.new_empty(shape, dtype=dtype)
        matrix = out if len(shape) == 2 else out.view(rows, n)
        planned((rows, k, rows, a.stride(0), stride), a, b_t, matrix, a_scale, b_scale, gain, bias)
        return out

    return in_one_launch
