"""Which of the tensors that autograd saves are compressed."""

from typing import Any

import torch

from halo_tensor.fences.pytorch import is_traceable_wrapper_subclass
from halo_tensor.recipe import Activations

#: A smaller tensor is saved as it is: to compress it costs more time than its memory is worth.
FEWEST_ELEMENTS = 2**13
#: A matrix with shorter rows, or images of fewer pixels, hold statistics, one for each token, on which all elements of a row
#: depend.
SHORTEST_ROW = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Functions of autograd through which a tensor is followed to the one that made its values.
_PASSED = {
    f"{name}Backward0"
    for name in (
        "Alias", "Clone", "Expand", "NativeDropout", "Permute", "ReshapeAlias", "Slice", "Split", "Squeeze", "T", "ToCopy",
        "Transpose", "UnsafeView", "Unsqueeze", "View",
    )
}  # fmt: skip
#: Functions whose results are saved as they are. Probabilities and logits span decades, which a uniform grid cannot hold
#: (docs/memory.md); parameters are alive in any case.
_AS_THEY_ARE = {
    "AccumulateGrad", "SafeSoftmaxBackward0", "SoftmaxBackward0",
    "LogSoftmaxBackward0", "ExpBackward0", "LogBackward0", "LogsumexpBackward0",
    "MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0",
}  # fmt: skip


def has_size(x: torch.Tensor) -> bool:
    """Whether a tensor is large enough, and of a dtype that is compressed."""
    if x.dtype not in DTYPES or x.ndim < 2 or x.numel() < FEWEST_ELEMENTS:
        return False
    if x.shape[-1] >= SHORTEST_ROW:
        return True
    return x.ndim == 4 and min(x.shape[-2:]) > 1 and x.shape[-1] * x.shape[-2] >= SHORTEST_ROW


def is_mask(x: torch.Tensor, in_relu: bool, activations: Activations) -> bool:
    """Whether one bit is saved of each element, since it says all that backward needs.

    Args:
        x: what autograd saves.
        in_relu: whether an ``nn.ReLU`` saves it.
        activations: the bits of each kind of tensor.
    """
    if is_traceable_wrapper_subclass(x) or x.numel() < FEWEST_ELEMENTS:
        return False
    if x.dtype == torch.bool:
        return activations.whole
    return in_relu and activations.inner is not None and x.dtype in DTYPES and x.grad_fn is not None


def narrow_dtype(x: torch.Tensor, plane: int | None) -> torch.dtype | None:
    """Return the dtype that holds the positions that a max pooling saves; None if ``x`` is something else.

    Args:
        x: what autograd saves.
        plane: the number of positions, if a max pooling saves it.
    """
    if plane is None or x.dtype != torch.int64 or x.numel() < FEWEST_ELEMENTS:
        return None
    return torch.int16 if plane <= 2**15 else torch.int32 if plane <= 2**31 else None


def bits_of(x: torch.Tensor, activations: Activations, in_norm: bool) -> int | None:
    """Return the bits in which a tensor is saved; None to save it as it is.

    Args:
        x: what autograd saves.
        activations: the bits of each kind of tensor.
        in_norm: whether a norm saves it.
    """
    # A tensor without a function was not computed from anything that is trained, or inside of another function.
    if x.grad_fn is None or not has_size(x) or is_traceable_wrapper_subclass(x):
        return None
    if _source(x.grad_fn) in _AS_THEY_ARE:
        return None
    return activations.norms if in_norm else activations.attention if _has_heads(x) else activations.inner


def is_rectified(x: torch.Tensor) -> bool:
    """Whether a ReLU made the values of a tensor."""
    return x.grad_fn is not None and _source(x.grad_fn) in ("ReluBackward0", "_ReLUBackward")


def _has_heads(x: torch.Tensor) -> bool:
    """Whether a tensor has a dimension of heads, or is a view [batch·heads, tokens, features] of one that has."""
    return x.ndim == 4 or len(getattr(x.grad_fn, "_saved_self_sym_sizes", ())) == 4


def _source(function: Any) -> str:
    """Return the name of the function that made a tensor's values."""
    while (name := function.name()) in _PASSED:
        function = function.next_functions[0][0]
        if function is None:
            return name
    return name if "AccumulateGrad" not in name else "AccumulateGrad"
