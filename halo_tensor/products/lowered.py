"""A recipe for a layer of some widths, lowered once to launches on plain tensors.

A :class:`Lowered` is made for the widths, dtypes and device of a layer; a :class:`LoweredBackward` for one whose forward is
plain, as HOT's is. Their functions follow the steps of the recipe (:mod:`halo_tensor.products.steps`), and only allocate and
launch. :mod:`halo_tensor.products.eager` and :mod:`halo_tensor.products.eager_backward` call them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch

from halo_tensor.kernels.device import check_device
from halo_tensor.ops.quantizers import draw_seed
from halo_tensor.products.gradients import BOTH, Gradients
from halo_tensor.products.launches import InputQuantizer, Layer, is_simple, product, quantizer, restored_columns
from halo_tensor.products.steps import Step, reuses_operand, steps_for
from halo_tensor.recipe import DIMENSIONS, PRODUCTS, Recipe, W, X


def can_lower(recipe: Recipe) -> bool:
    """Whether each of X and W is quantised once for both of its products, to nearest, with one scale or one per index."""
    operands = [o for name in PRODUCTS for o in (getattr(recipe, name).left, getattr(recipe, name).right)]
    return (
        len(steps_for(recipe, X, ("output", "grad_weight"))) == 1
        and reuses_operand(recipe)
        and all(o.format is not None and is_simple(o.granularity) and o.rounding == "nearest" for o in operands)
        and all((rotation := o.rotation(d)) is None or rotation.rank is None for o in operands for d in DIMENSIONS)
    )


def can_lower_backward(recipe: Recipe) -> bool:
    """Whether the forward is plain, and all operands of backward are quantised with one scale or one per index, X and W to
    nearest."""
    sides = [getattr(recipe, name) for name in BOTH]
    return (
        recipe.has_plain_output
        and all(o.format is not None and is_simple(o.granularity) for side in sides for o in (side.left, side.right))
        and all(side.right.rounding == "nearest" for side in sides)
    )


class Lowered:
    """The launches of a layer, as functions of plain tensors.

    Args:
        layer: with a recipe that :func:`can_lower` accepts.
    """

    def __init__(self, layer: Layer):
        from halo_tensor.kernels.recorded import Recorded  # Triton, which a machine without a GPU may lack
        from halo_tensor.kernels.rotate import transposed

        check_device(layer.recipe.formats, layer.device)
        self.layer = layer
        self.transposed: Callable[..., torch.Tensor] = transposed
        self.quantize_x = InputQuantizer(layer, ("output", "grad_weight"))
        self.quantize_x_for_output = InputQuantizer(layer, ("output",))
        (step,) = steps_for(layer.recipe, W, ("output",))
        self.quantize_w = quantizer(layer, W, step, layer.weight)
        self.w_codes = _unpacked(step) if layer.packed else _as_they_are
        self.product = product(layer, "output", layer.output)
        self.gradients = Gradients(layer)
        self.output, self.evaluate = Recorded(self._output), Recorded(self._evaluate)
        self.backward = Recorded(self._backward)

    def quantized_x(
        self, x: torch.Tensor, shape: torch.Size, gain: torch.Tensor | None, trains_w: bool
    ) -> Sequence[torch.Tensor | None]:
        """Return what X [..., in] of this ``shape`` brings to its products, for grad_weight too if ``trains_w``: see
        :class:`~halo_tensor.products.launches.InputQuantizer`."""
        return (self.quantize_x if trains_w else self.quantize_x_for_output)(x, shape, gain)

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
        return (self.product(x_rows, self.w_codes(w_rows), x_scale, w_scale, None, bias, x_rows.shape[0], shape),)

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
        rows, _, scale = self.quantize_x_for_output.quantize.function(numbers, x, gain)
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
        w_columns = None if w_rows is None else self.transposed(self.w_codes(w_rows))
        return self.gradients(numbers[0], e, x_columns, x_scale, w_columns, w_scale, (), gain, undo_gain)


class LoweredBackward:
    """The launches of a layer whose forward is plain, as functions of plain tensors: X's quantiser for grad_weight, and
    backward.

    Args:
        layer: with a recipe that :func:`can_lower_backward` accepts.
    """

    def __init__(self, layer: Layer):
        from halo_tensor.kernels.recorded import Recorded

        check_device(layer.recipe.formats, layer.device)
        self.layer = layer
        self.quantize_x = InputQuantizer(layer, ("grad_weight",))
        (step,) = steps_for(layer.recipe, W, ("grad_input",))
        self.quantize_w = quantizer(layer, W, step, layer.weight)
        self.gradients = Gradients(layer)
        self.recorded = Recorded(self._backward)

    def backward(
        self,
        shape: torch.Size,
        e: torch.Tensor,
        x_columns: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        w_columns: torch.Tensor | None,
        w_scale: torch.Tensor | None,
        w: torch.Tensor | None,
    ) -> Sequence[torch.Tensor | None]:
        """Return E_X of ``shape`` and G [out, in]; None for a product whose other operand is not given.

        Seeds of stochastic rounding are drawn in each call, as the operand path draws them.

        Args:
            e: [..., out].
            x_columns, x_scale: what X brings to grad_weight, or None.
            w_columns, w_scale: what W brings to grad_input, or None.
            w: W itself [out, in], to be quantised; or None.
        """
        like_w = w if w_columns is None else w_columns
        if like_w is None and x_columns is None:
            return None, None
        choice = BOTH if like_w is not None and x_columns is not None else BOTH[:1] if x_columns is None else BOTH[1:]
        seeds = [draw_seed(e.device) for _ in range(self.gradients.draws[choice])]
        strides = e.stride(), None if x_columns is None else x_columns.stride(), None if like_w is None else like_w.stride()
        return self.recorded((shape, strides, w is None), e, x_columns, x_scale, w_columns, w_scale, w, *seeds)

    def _backward(
        self,
        numbers: tuple,
        e: torch.Tensor,
        x_columns: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        w_columns: torch.Tensor | None,
        w_scale: torch.Tensor | None,
        w: torch.Tensor | None,
        *seeds: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Do :meth:`backward`. ``numbers``: the shape of X, then what the tensors' strides depend on."""
        if w is not None:
            _, w_columns, w_scale = self.quantize_w(w)
        if x_columns is not None:
            x_columns = restored_columns(x_columns, self.layer.recipe.grad_weight.right, prod(numbers[0][:-1]))
        return self.gradients(numbers[0], e, x_columns, x_scale, w_columns, w_scale, seeds)


def _as_they_are(codes: torch.Tensor) -> torch.Tensor:
    return codes


def _unpacked(step: Step) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that unpacks fp6 codes. What forward saves stays packed."""
    from halo_tensor.kernels.quantize.packing import unpack_rows

    assert step.operand.format is not None
    return partial(unpack_rows, format=step.operand.format)
