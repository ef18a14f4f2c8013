"""X of layers whose out_features are split among ranks, such as q, k and v.

With sequence parallelism every rank has X of some tokens. A row's codes, scale and rotation concern that row alone, so each
rank quantises its own rows, and the ranks send each other codes and scales: half the bytes of bf16. Layers that read the same
X share one all-gather, and the sum of their gradients one reduce-scatter.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor import ops
from halo_tensor.fences.collectives import Ranks
from halo_tensor.fences.pytorch import is_symbolic, tree_map_only
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


@dataclass(eq=False)
class SharedInput:
    """X [..., in] with all tokens, as it enters layers whose out_features are split among ranks.

    Attributes:
        plain: a tensor of its shape, to which gradients flow: X itself, or a placeholder without values if tokens are split.
        part: this rank's tokens, if they are split; else None.
        dim: the dimension of the tokens that are split.
        ranks: among which out_features, and perhaps tokens, are split.
        operands: a recipe's operand and gain -> the gathered codes.
        value: X with all tokens in its own dtype, without gradients, if something has read it.
    """

    plain: torch.Tensor
    part: torch.Tensor | None
    dim: int
    ranks: Ranks
    operands: dict[tuple, HadamardQuantTensor] = field(default_factory=dict)
    value: torch.Tensor | None = None

    @classmethod
    def of(cls, x: torch.Tensor, dim: int | None, ranks: Ranks) -> "SharedInput":
        """Make one of X: of a rank's tokens if ``dim``, their dimension, is given."""
        return cls(copied(x, ranks), None, 0, ranks) if dim is None else cls(placeholder(x, dim, ranks), x, dim, ranks)

    @property
    def dense(self) -> torch.Tensor:
        """X with all tokens, in its own dtype."""
        if self.part is None:
            return self.plain
        if self.value is None:
            self.value = ops.gather_tokens(self.part.detach(), self.dim, self.ranks.name, self.ranks.size)
        return filled(self.plain, self.value)

    def codes(self, recipe: Recipe, gains: Gains | None, trains: bool) -> HadamardQuantTensor | None:
        """Return what X brings to the products of a recipe; None if it is to be made of the dense value.

        Args:
            recipe: of a layer that reads X.
            gains: of in_features of X.
            trains: whether grad_weight will read it too.
        """
        if self.part is None or not gathers_codes(recipe):
            return None
        key = steps_for(recipe, X, ("output",))[0].operand, None if gains is None else id(gains[0])
        operand = self.operands.get(key)
        if operand is None:
            operand = self.operands[key] = gathered(self.part, recipe, gains, self.dim, self.ranks)
        if trains and operand.codes_t is None:
            operand = self.operands[key] = with_columns(operand)
        return operand


class PreparedInput(torch.Tensor):
    """A :class:`SharedInput` as a tensor of its shape, which a model passes on to its layers.

    Layers with a :class:`~halo_tensor.tensor_parallel.HaloColwiseParallel` style take its codes. Any other function gets the
    dense value, which is gathered when it is first used.
    """

    shared: SharedInput

    @classmethod
    def of(cls, shared: SharedInput) -> "PreparedInput":
        """Make the tensor that stands for a SharedInput."""
        made = shared.plain.as_subclass(cls)
        made.shared = shared
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]
        if name in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda x: x.shared.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **options: Any) -> str:  # which reads no values: other ranks may not print
        return f"PreparedInput({list(self.shape)}, {self.dtype}, tokens {'whole' if self.shared.part is None else 'split'})"


#: While a graph is traced: the ``dense`` of a SharedInput -> its other attributes.
_traced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.compiler.allow_in_graph
def prepare_in_graph(x: torch.Tensor, dim: int, name: str, size: int, rank: int) -> torch.Tensor:
    """Return what stands for ``SharedInput.of(x, dim, Ranks(name, size, rank))`` in a graph: its ``dense``.

    Dynamo puts the call into its graph, where :func:`shared_input` finds the rest. The op that gathers the dense value is
    dropped, unless something else reads it: another function, or a layer in another graph.

    Args:
        x: X.
        dim: the dimension of tokens that are split, or -1.
        name: of the ranks, as ``size`` and ``rank``.
        size: see there.
        rank: see there.
    """
    made = SharedInput.of(x, None if dim == -1 else dim, Ranks(name, size, rank))
    dense, plain = made.dense, None if made.part is None else made.plain  # a value must not hold its key
    _traced[dense] = plain, made.part, made.dim, made.ranks, made.operands
    return dense


def shared_input(x: torch.Tensor) -> SharedInput | None:
    """Return the SharedInput that a tensor stands for, or None."""
    if isinstance(x, PreparedInput):
        return x.shared
    if (found := _traced.get(x)) is None:
        return None
    plain, part, dim, ranks, operands = found
    if plain is None:
        return SharedInput(x, part, dim, ranks, operands)
    return SharedInput(plain, part, dim, ranks, operands, x.detach())


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
