"""The backward of a layer as functions of plain tensors that only allocate and launch: E's quantisers and both products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from halo_tensor.products.launches import Codes, Layer, product, quantizer
from halo_tensor.products.steps import as_both, as_pair, folded_products, steps_for
from halo_tensor.recipe import E
from halo_tensor.reference.hadamard import carried

BOTH = ("grad_input", "grad_weight")


class GradientQuantizer:
    """The quantiser of E for ``products`` of backward, as a function of plain tensors.

    Attributes:
        draws: how many seeds a call takes: one for each operand that is rounded stochastically.
    """

    def __init__(self, layer: Layer, products: tuple[str, ...]):
        self._layer, self._products = layer, products
        self._steps = steps_for(layer.recipe, E, products, folded_products(layer.recipe, products))
        self.draws = sum(step.operand.rounding == "stochastic" for step in self._steps)
        self._quantize = self._by_pair() or self._by_both() or self._by_steps()

    def __call__(
        self, e: torch.Tensor, folds: Sequence[torch.Tensor | None], seeds: Sequence[torch.Tensor] = ()
    ) -> dict[str, Codes]:
        """Return E's operand for each product.

        Args:
            e: [tokens, out].
            folds: for each product the scale of the other operand that is folded in, or None.
            seeds: int64 [1] each.
        """
        return dict(zip(self._products, self._quantize(e, folds, seeds), strict=True))

    def _by_pair(self) -> Callable[..., list[Codes]] | None:
        from halo_tensor.kernels.quantize import plan

        pair, layer = as_pair(E, self._steps), self._layer
        if pair is None:
            return None
        folded = [step.folded for step in self._steps]
        quantize_pair = plan.pair_quantizer(layer.output, layer.device, pair.tokens, pair.format, *folded)

        def by_pair(e: torch.Tensor, folds: Sequence, seeds: Sequence) -> list[Codes]:
            rows, columns, row_scales, column_scales = quantize_pair(e, *folds)
            return [Codes(rows, None, row_scales), Codes(None, columns, column_scales)]

        return by_pair

    def _by_both(self) -> Callable[..., list[Codes]] | None:
        from halo_tensor.kernels.quantize import plan

        both, layer = as_both(E, self._steps), self._layer
        if both is None:
            return None
        first, second = both
        assert first.format is not None and second.format is not None
        columns, rows = carried(first, E[1], layer.width(E[1])), carried(second, E[0], layer.width(E[0]))
        how = columns, first.format, first.granularity.on(E).name, rows, second.format, second.granularity.on(E).name
        quantize_both = plan.both_quantizer(layer.output, layer.device, *how, self.draws > 0)

        def by_both(e: torch.Tensor, folds: Sequence, seeds: Sequence) -> list[Codes]:
            rows, columns, row_scales, column_scales = quantize_both(e, seeds[0] if seeds else None)
            return [Codes(rows, None, row_scales), Codes(None, columns, column_scales)]

        return by_both

    def _by_steps(self) -> Callable[..., list[Codes]]:
        quantizers = [(step, quantizer(self._layer, E, step, self._layer.output)) for step in self._steps]

        def by_steps(e: torch.Tensor, folds: Sequence, seeds: Sequence) -> list[Codes]:
            fold_for, left = dict(zip(self._products, folds, strict=True)), iter(seeds)
            made: dict[str, Codes] = {}
            for step, quantize in quantizers:
                noise = (None, next(left)) if step.operand.rounding == "stochastic" else ()
                made |= dict.fromkeys(step.products, quantize(e, fold_for[step.products[0]], *noise))
            return [made[name] for name in self._products]

        return by_steps


class Gradients:
    """The launches of backward, after what X and W bring to it is quantised.

    Attributes:
        draws: for each choice of products, how many seeds a call takes.
    """

    def __init__(self, layer: Layer):
        self._layer = layer
        choices: tuple[tuple[str, ...], ...] = BOTH, BOTH[:1], BOTH[1:]
        self._quantizers = {products: GradientQuantizer(layer, products) for products in choices}
        self._folded = folded_products(layer.recipe, BOTH)
        self._grad_input = product(layer, "grad_input", layer.x)
        self._grad_weight = product(layer, "grad_weight", layer.weight)
        self.draws = {products: quantize.draws for products, quantize in self._quantizers.items()}

    def __call__(
        self,
        shape: torch.Size,
        e: torch.Tensor,
        x_columns: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        w_columns: torch.Tensor | None,
        w_scale: torch.Tensor | None,
        seeds: Sequence[torch.Tensor] = (),
        gain: torch.Tensor | None = None,
        undo_gain: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return E_X of ``shape`` and G [out, in], None where the codes of the other operand are.

        Args:
            e: [..., out].
            x_columns, w_columns: transposed codes [in, tokens'] and [in, out']; one of them may be None.
            x_scale, w_scale: their scales.
            seeds: as many as ``draws`` says.
            gain, undo_gain: of the weight.
        """
        layer = self._layer
        e = e if e.ndim == 2 else e.reshape(-1, layer.out_features)
        right = dict(zip(BOTH, ((w_columns, w_scale), (x_columns, x_scale)), strict=True))
        products = tuple(name for name, (codes, _) in right.items() if codes is not None)
        folds = [right[name][1] if name in self._folded else None for name in products]
        left = self._quantizers[products](e, folds, seeds)
        scale_of = {name: None if name in self._folded else scale for name, (_, scale) in right.items()}
        grad_x = grad_w = None
        if w_columns is not None:
            a: Any = left["grad_input"]
            operands = a.rows, w_columns, a.scale, scale_of["grad_input"], undo_gain
            grad_x = self._grad_input(*operands, None, e.shape[0], shape)
        if x_columns is not None:
            a = left["grad_weight"]
            operands = a.columns, x_columns, a.scale, scale_of["grad_weight"], gain
            grad_w = self._grad_weight(*operands, None, layer.out_features, (layer.out_features, layer.in_features))
        return grad_x, grad_w
