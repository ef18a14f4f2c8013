"""X of layers whose out_features are split among ranks, such as q, k and v.

With sequence parallelism every rank has X of some tokens. A row's codes, scale and rotation concern that row alone, so each
rank quantises its own rows, and the ranks send each other codes and scales: half the bytes of bf16. Layers that read the same
X share one all-gather, and the sum of their gradients one reduce-scatter.
"""

from collections.abc import Callable, Collection
from typing import Any, Self

import torch

from halo_tensor.fences.collectives import Ranks
from halo_tensor.fences.pytorch import is_symbolic
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.operand.gains import Gains
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products.collectives import copied, filled, gather, placeholder
from halo_tensor.products.operands import quantize_operands
from halo_tensor.products.steps import steps_for
from halo_tensor.recipe import Recipe, X

#: Functions that read no values.
_READS = {
    "shape", "size", "dim", "ndim", "numel", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse",
    "grad_fn", "is_leaf", "is_floating_point", "is_complex", "element_size", "nbytes", "itemsize", "__len__",
}  # fmt: skip


def gathers_codes(recipe: Recipe) -> bool:
    """Whether the codes of X can be made by the ranks that have its rows: one quantisation serves both products with X, with
    a scale for each token, and tokens are not rotated."""
    steps = steps_for(recipe, X, ("output", "grad_weight"))
    operand = steps[0].operand
    return len(steps) == 1 and operand.format is not None and operand.granularity.is_per("tokens") and operand.tokens is None


class SharedInput(torch.Tensor):
    """X [..., in] with all tokens, as it enters layers whose out_features are split among ranks.

    Layers with a :class:`~halo_tensor.tensor_parallel.HaloColwiseParallel` style take its codes. Any other function gets the
    dense value, which is gathered when it is first used.

    Attributes:
        plain: a tensor of its shape, to which gradients flow: X itself, or a placeholder without values if tokens are split.
        part: this rank's tokens, if they are split; else None.
        token_dim: the dimension of the tokens that are split.
        ranks: among which out_features, and perhaps tokens, are split.
        operands: recipe's operand and gain -> the gathered codes.
    """

    plain: torch.Tensor
    part: torch.Tensor | None
    token_dim: int
    ranks: Ranks
    operands: dict[tuple, HadamardQuantTensor]
    _dense: torch.Tensor | None = None

    @classmethod
    def of(cls, x: torch.Tensor, dim: int | None, ranks: Ranks) -> Self:
        """Make one of X: of a rank's tokens if ``dim``, their dimension, is given."""
        plain = copied(x, ranks) if dim is None else placeholder(x, dim, ranks)
        made = plain.as_subclass(cls)
        made.plain, made.part, made.token_dim, made.ranks = plain, None if dim is None else x, dim or 0, ranks
        made.operands = {}
        return made

    @property
    def dense(self) -> torch.Tensor:
        """X with all tokens, in its own dtype."""
        if self.part is None:
            return self.plain
        if self._dense is None:
            (value,) = gather([self.part.detach()], self.token_dim, self.ranks)
            self._dense = filled(self.plain, value)
        return self._dense

    def codes(self, recipe: Recipe, gains: Gains | None, trains: bool) -> HadamardQuantTensor | None:
        """Return what X brings to the products of a recipe; None if it is to be made of the dense value.

        Args:
            gains: of in_features of X.
            trains: whether grad_weight will read it too.
        """
        if self.part is None or not gathers_codes(recipe):
            return None
        key = steps_for(recipe, X, ("output",))[0].operand, None if gains is None else id(gains[0])
        operand = self.operands.get(key)
        if operand is None:
            operand = self.operands[key] = gathered(self.part, recipe, gains, self.token_dim, self.ranks)
        if trains and operand.codes_t is None:
            operand = self.operands[key] = with_columns(operand)
        return operand

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():
            if name in _READS:
                return func(*args, **(kwargs or {}))
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda x: x.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


@torch.no_grad()
def gathered(part: torch.Tensor, recipe: Recipe, gains: Gains | None, dim: int, ranks: Ranks) -> HadamardQuantTensor:
    """Quantise this rank's tokens, and return the codes of all tokens as an operand in rows.

    Args:
        part: [..., in], of which ``dim`` is the dimension of the tokens that are split.
        recipe: one that :func:`gathers_codes` accepts.
        gains: of in_features.
        dim: see ``part``.
        ranks: among which they are split.
    """
    part = part.detach()
    (operand,) = quantize_operands(part.reshape(-1, part.shape[-1]), X, recipe, ["output"], gains=gains)
    assert isinstance(operand, HadamardQuantTensor) and operand.scale is not None
    codes = operand.any_codes()
    width = codes.shape[1]
    codes, scale = gather([codes.reshape(*part.shape[:-1], width), operand.scale.view(part.shape[:-1])], dim, ranks)
    codes = codes.reshape(-1, width)
    return operand._with(size=torch.Size((codes.shape[0], operand.shape[1])), codes=codes, scale=scale.reshape(-1))


def with_columns(operand: HadamardQuantTensor) -> HadamardQuantTensor:
    """Return an operand in rows with columns too."""
    codes = operand.codes
    assert codes is not None
    if runs_kernels(codes.device) and not is_symbolic():
        from halo_tensor.kernels.rotate import transposed

        return operand._with(codes_t=transposed(codes))
    return operand._with(codes_t=codes.t().contiguous() if runs_kernels(codes.device) else codes.t())
