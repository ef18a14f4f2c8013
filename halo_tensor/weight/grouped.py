"""``F.grouped_mm`` of a converted weight of experts, as torchtitan and torchao call it.

The function takes [experts, in, out]: ``w.transpose(-2, -1)`` of a weight [experts, out, in], or a weight that was converted
with ``in_features_first``. The first is a view, which follows no recipe, so the weight beneath it is multiplied with.
"""

from typing import Any

import torch
from torch.compiler import is_compiling

from halo_tensor.fences.pytorch import GROUPED_MM
from halo_tensor.products.grouped import grouped_linear
from halo_tensor.weight.handlers import run_function


def _grouped_mm(
    func: Any,
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    weight = None if bias is not None or mat_a.ndim != 2 else _stack_of(mat_b)
    if weight is None or offs is None:
        with torch._C.DisableTorchFunctionSubclass():
            return run_function(func, (mat_a, mat_b, offs, bias, out_dtype), {})
    weight.check_whole()
    if weight.master is not None and not is_compiling():
        weight.follow()
    if not mat_b.requires_grad:
        weight = weight.detach()
    y = grouped_linear(mat_a, weight, offs, in_features_first=weight.in_features_first)
    return y.to(out_dtype or mat_a.dtype)


def _stack_of(mat_b: Any) -> Any:
    """Return the converted weight whose matrices [in, out] ``mat_b`` [experts, in, out] holds; None if it holds others."""
    weight = getattr(mat_b, "whole", None)
    if weight is None or weight.ndim != 3 or mat_b.ndim != 3 or weight.recipe.is_identity:
        return None
    if weight is mat_b:
        return weight if weight.in_features_first else None
    turned = (weight.shape[0], weight.shape[2], weight.shape[1]), (weight.stride(0), weight.stride(2), weight.stride(1))
    is_turned = (tuple(mat_b.shape), mat_b.stride()) == turned and mat_b.storage_offset() == weight.storage_offset()
    return weight if is_turned and not weight.in_features_first else None


def grouped_mm(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute ``F.grouped_mm`` with a converted weight as its recipe says, and with other views of weights as PyTorch does."""
    return _grouped_mm(GROUPED_MM, *args, **kwargs)


# Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, so the view knows its weight there.
grouped_in_graph = torch.compiler.allow_in_graph(grouped_mm)
