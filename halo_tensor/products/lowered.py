"""A recipe for a layer of some widths, lowered once to launches on plain tensors.

A :class:`Lowered` is made for the widths, dtypes and device of a layer. Its functions follow the steps of the recipe
(:mod:`halo_tensor.products.steps`), and only allocate and launch. :mod:`halo_tensor.products.eager` calls them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from halo_tensor.kernels.device import check_device
from halo_tensor.products.operands import shared_operands
from halo_tensor.products.steps import Dims, Step, as_pair, folded_products, reuses_operand, steps_for
from halo_tensor.recipe import DIMENSIONS, PRODUCTS, TENSOR, E, Operand, Recipe, Scales, W, X
from halo_tensor.recipe.formats import FLOAT32
from halo_tensor.reference.codes import code_dtype
from halo_tensor.reference.hadamard import carried
from halo_tensor.reference.ops import LONGEST_SUM, rotated

BOTH = ("grad_input", "grad_weight")


class Codes(NamedTuple):
    """An operand: codes [r, c], their transpose [c, r], either of which may be None, and float32 scales."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor


class Layer(NamedTuple):
    """Everything that the launches of a layer depend on. Numbers of tokens are not part of it.

    Attributes:
        recipe: one that :func:`can_lower` accepts.
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
    balanced: bool
    row: int
    packed: bool

    def width(self, dimension: str) -> int:
        """Return the size of a dimension of features. A rotation of tokens does not depend on theirs."""
        return 0 if dimension == "tokens" else getattr(self, dimension)


def can_lower(recipe: Recipe) -> bool:
    """Whether each of X and W is quantised once for both of its products, to nearest, with one scale or one per index."""
    operands = [o for name in PRODUCTS for o in (getattr(recipe, name).left, getattr(recipe, name).right)]
    return (
        len(steps_for(recipe, X, ("output", "grad_weight"))) == 1
        and reuses_operand(recipe)
        and all(o.format is not None and _is_simple(o.granularity) and o.rounding == "nearest" for o in operands)
        and all((rotation := o.rotation(d)) is None or rotation.rank is None for o in operands for d in DIMENSIONS)
    )


def _is_simple(granularity: Scales) -> bool:
    return granularity == TENSOR or (granularity.is_vector and granularity.dtype == FLOAT32)


class Lowered:
    """The launches of a layer, as functions of plain tensors."""

    def __init__(self, layer: Layer):
        from halo_tensor.kernels.recorded import Recorded  # Triton, which a machine without a GPU may lack
        from halo_tensor.kernels.rotate import transposed

        check_device(layer.recipe.formats, layer.device)
        self.layer = layer
        self.transposed: Callable[..., torch.Tensor] = transposed
        (step,) = steps_for(layer.recipe, X, ("output", "grad_weight"))
        self.x_operand = id(_INTERNED.setdefault(step.operand, step.operand))
        (for_output,) = steps_for(layer.recipe, X, ("output",))
        self.quantize_x, self.quantize_x_for_output = (
            Recorded(partial(_quantized, _quantizer(layer, X, step, layer.x), layer.in_features))
            for step in (step, for_output)
        )
        (step,) = steps_for(layer.recipe, W, ("output",))
        self.quantize_w = _quantizer(layer, W, step, layer.weight)
        self.w_codes = _unpacked(step) if layer.packed else _as_they_are
        self.quantize_e: dict[tuple[str, ...], Callable[..., list[Codes]]] = {
            products: _gradient_quantizer(layer, products) for products in (BOTH, BOTH[:1], BOTH[1:])
        }
        self.folds = folded_products(layer.recipe, BOTH)
        dtypes = {"output": layer.output, "grad_input": layer.x, "grad_weight": layer.weight}
        self.products = {name: _product(layer, name, dtype) for name, dtype in dtypes.items()}
        self.output, self.evaluate = Recorded(self._output), Recorded(self._evaluate)
        self.backward = Recorded(self._backward)

    def quantized_x(
        self, x: torch.Tensor, shape: torch.Size, gain: torch.Tensor | None, trains_w: bool
    ) -> Sequence[torch.Tensor | None]:
        """Return what X brings to its products, for grad_weight too if ``trains_w``, as :class:`Codes` lists it. Layers that
        follow each other and read the same X quantise it once.

        Args:
            x: [..., in], of this ``shape``.
            gain: float32 [in], with which columns are multiplied first.
        """
        quantize = self.quantize_x if trains_w else self.quantize_x_for_output
        if x.is_leaf:  # of which nothing is shared
            return quantize((shape, x.stride()), x, gain)
        shared = shared_operands(x)
        key = self.x_operand, id(gain)
        found, _ = shared.get(key) or _NOTHING
        if found is None or (trains_w and found[1] is None):
            found = quantize((shape, x.stride()), x, gain)
            shared[key] = found, gain  # which so keeps its id
        return found

    def _output(
        self,
        x_shape: torch.Size,
        x_rows: torch.Tensor,
        x_scale: torch.Tensor,
        w_rows: torch.Tensor,
        w_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:
        """Return Y for X of ``x_shape``."""
        shape = (*x_shape[:-1], self.layer.out_features)
        return (self.products["output"](x_rows, self.w_codes(w_rows), x_scale, w_scale, None, bias, x_rows.shape[0], shape),)

    def _evaluate(
        self,
        numbers: tuple,
        x: torch.Tensor,
        gain: torch.Tensor | None,
        w_rows: torch.Tensor,
        w_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:
        """Return Y for X, whose shape and strides are ``numbers``, and keep nothing."""
        rows, _, scale = self.quantize_x_for_output.function(numbers, x, gain)
        return self._output(numbers[0], rows, scale, w_rows, w_scale, bias)

    def _backward(
        self,
        numbers: tuple,
        e: torch.Tensor,
        x_columns: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        w_rows: torch.Tensor | None,
        w_scale: torch.Tensor | None,
        gain: torch.Tensor | None,
        undo_gain: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return E_X and G [out, in], None where the codes of the other operand are.

        Args:
            numbers: the shape of X, then what the tensors' strides depend on.
            e: [..., out]. The other tensors are what forward multiplied with.
        """
        layer = self.layer
        e = e if e.ndim == 2 else e.reshape(-1, layer.out_features)
        scales = dict(zip(BOTH, (w_scale, x_scale), strict=True))
        products = tuple(name for name, codes in zip(BOTH, (w_rows, x_columns), strict=True) if codes is not None)
        folds = [scales[name] if name in self.folds else None for name in products]
        left = dict(zip(products, self.quantize_e[products](e, *folds), strict=True))
        grad_x = grad_w = None
        if w_rows is not None:
            a, scale = left["grad_input"], None if "grad_input" in self.folds else w_scale
            operands = a.rows, self.transposed(self.w_codes(w_rows)), a.scale, scale, undo_gain
            grad_x = self.products["grad_input"](*operands, None, e.shape[0], numbers[0])
        if x_columns is not None:
            a, scale = left["grad_weight"], None if "grad_weight" in self.folds else x_scale
            shape = layer.out_features, layer.in_features
            grad_w = self.products["grad_weight"](a.columns, x_columns, a.scale, scale, gain, None, shape[0], shape)
        return grad_x, grad_w


def _quantized(
    quantize: Callable[..., Codes], width: int, numbers: tuple, x: torch.Tensor, gain: torch.Tensor | None
) -> Codes:
    """Return the codes of x [..., width], whose shape and strides are ``numbers``."""
    return quantize(x if x.ndim == 2 else x.reshape(-1, width), None, gain)


_NOTHING = None, None
#: An operand -> the first one that equals it, so that equal ones are known by their id.
_INTERNED: dict[Operand, Operand] = {}


def _as_they_are(codes: torch.Tensor) -> torch.Tensor:
    return codes


def _unpacked(step: Step) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that unpacks fp6 codes. What forward saves stays packed."""
    from halo_tensor.kernels.quantize.packing import unpack_rows

    assert step.operand.format is not None
    return partial(unpack_rows, format=step.operand.format)


def _quantizer(layer: Layer, dims: Dims, step: Step, dtype: torch.dtype) -> Callable[..., Codes]:
    """Return a function of a matrix of ``dtype``, the scale that is folded in or None, and a gain of columns or None."""
    from halo_tensor.kernels.quantize import plan, whole_rows
    from halo_tensor.kernels.rotate import transposed

    row_rotation, column_rotation = (carried(step.operand, d, layer.width(d)) for d in dims)
    format, scale = step.operand.format, step.operand.granularity.on(dims).name
    rows, columns = dims[1] in step.contracted, dims[0] in step.contracted
    gained = layer.balanced and dims[1] == "in_features"
    assert format is not None
    k = layer.width(dims[1])
    if scale == "row" and row_rotation is None and plan.is_one_launch(k, dtype, layer.device, column_rotation, gained):
        quantize_rows = whole_rows.row_quantizer(k, dtype, layer.device, column_rotation, format, gained, step.folded)

        def by_rows(matrix: torch.Tensor, fold: torch.Tensor | None = None, gain: torch.Tensor | None = None) -> Codes:
            codes, scales = quantize_rows(matrix, gain, fold)
            return Codes(codes if rows else None, transposed(codes) if columns else None, scales)

        return by_rows

    def by_any(matrix: torch.Tensor, fold: torch.Tensor | None = None, gain: torch.Tensor | None = None) -> Codes:
        fold_rows, fold_columns = (fold, None) if columns else (None, fold)
        made = plan.rotate_quantize(
            matrix, row_rotation, column_rotation, format, scale, fold_rows, fold_columns, rows, columns,
            gain=gain if gained else None,
        )  # fmt: skip
        return Codes(*made)

    return by_any


def _gradient_quantizer(layer: Layer, products: tuple[str, ...]) -> Callable[..., list[Codes]]:
    """Return a function of E and the scale to fold in for each of ``products``, or None, that returns E's operand for each."""
    from halo_tensor.kernels.quantize import plan

    steps = steps_for(layer.recipe, E, products, folded_products(layer.recipe, products))
    if pair := as_pair(E, steps):
        quantize_pair = plan.pair_quantizer(layer.output, layer.device, pair.tokens, pair.format, *(s.folded for s in steps))

        def by_pair(e: torch.Tensor, fold_columns: torch.Tensor | None, fold_rows: torch.Tensor | None) -> list[Codes]:
            rows, columns, row_scales, column_scales = quantize_pair(e, fold_columns, fold_rows)
            return [Codes(rows, None, row_scales), Codes(None, columns, column_scales)]

        return by_pair
    quantizers = [(step.products, _quantizer(layer, E, step, layer.output)) for step in steps]

    def by_steps(e: torch.Tensor, *folds: torch.Tensor | None) -> list[Codes]:
        fold_for = dict(zip(products, folds, strict=True))
        made = {
            name: codes for served, quantize in quantizers for codes in [quantize(e, fold_for[served[0]])] for name in served
        }
        return [made[name] for name in products]

    return by_steps


def _product(layer: Layer, name: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
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
