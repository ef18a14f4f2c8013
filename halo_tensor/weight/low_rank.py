"""A converted weight of experts plus a product of low rank, which is not added up: LoRA on experts.

PEFT (tested with 0.21.2) computes W + s · L R by ``torch.baddbmm(W, L, R, alpha=s)`` in every forward, and puts the sum in the
place of the parameter while the experts run. The sum would be dense, and as large as the weight. With a converted weight,
``baddbmm`` returns a :class:`LowRankSum` instead. Converted experts multiply with its parts, and any other function that
is given one sees the dense sum.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from halo_tensor.fences.pytorch import is_symbolic, tree_map_only
from halo_tensor.weight.handlers import implements
from halo_tensor.weight.tensor import HaloWeight


class LowRankSum(torch.Tensor):
    """weight + scale · left @ right, of which only the parts are held.

    Attributes:
        weight: converted, [experts, a, b].
        left: [experts, a, r].
        right: [experts, r, b].
        scale: a number.
    """

    weight: HaloWeight
    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @staticmethod
    def __new__(
        cls: type["LowRankSum"], weight: HaloWeight, left: torch.Tensor, right: torch.Tensor, scale: float
    ) -> "LowRankSum":
        """Make a sum of these parts, which keep their places in autograd's graph."""
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.weight, made.left, made.right, made.scale = weight, left, right, scale
        return made

    def follow(self) -> None:
        """Bring the codes of the weight up to date."""
        self.weight.follow()

    def dense(self) -> torch.Tensor:
        """Return the sum. Its gradient reaches the weight and both factors."""
        dense = self.weight + 0.0 if self.weight.requires_grad else self.weight.dequantize()
        return torch.baddbmm(dense, self.left, self.right, alpha=self.scale)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__" or func in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


#: Methods that look at the shape and the like only.
_READS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.element_size}


@implements(torch.baddbmm)
def _add_low_rank(
    func: Any,
    input: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the parts of a sum with the weight of experts."""
    is_stack = isinstance(input, HaloWeight) and input.ndim == 3 and input.base is None and not input.recipe.is_identity
    plain = out is None and beta == 1 and not is_symbolic() and not isinstance(batch1, HaloWeight)
    if is_stack and plain and not isinstance(batch2, HaloWeight):
        return LowRankSum(input, batch1, batch2, alpha)  # type: ignore[arg-type]
    return func(input, batch1, batch2, beta=beta, alpha=alpha, **({} if out is None else {"out": out}))
