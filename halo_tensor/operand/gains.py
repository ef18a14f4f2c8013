"""Gains: powers of two that an operand's columns are multiplied with before they are rotated and quantised.

X Wᵀ = (X / s)(W s)ᵀ for any s [in_features], so a gain along a contracted dimension cancels, as a rotation does, if the other
operand carries its inverse; along a surviving one it is undone on the result. Gains are passed in pairs, (gain, 1 / gain),
that are never written to: two operands fit if they hold the same tensors, which nothing has to be read for.
"""

import warnings

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.fences.pytorch import is_recorded, is_symbolic

Gains = tuple[torch.Tensor, torch.Tensor]
#: gain -> {device: the same there}, so that layers that share gains still do after they have been moved.
_moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def of_exponents(exponents: torch.Tensor) -> Gains:
    """2**exponents and 2**-exponents as float32, exactly, on the device of ``exponents``, whole numbers of any dtype."""
    ones = torch.ones_like(exponents, dtype=torch.float64)
    # A last bit that a device's pow may get wrong in float64 is rounded away.
    return torch.ldexp(ones, exponents.int()).float(), torch.ldexp(ones, -exponents.int()).float()


def moved(gains: Gains | None, device: torch.device) -> Gains | None:
    """The same gains on ``device``. The meta device has no values, so those of a weight that goes there stay where they are,
    and follow it when it comes back."""
    if gains is None or device.type == "meta" or gains[0].device == device:
        return gains
    if gains[0].is_meta:
        warnings.warn("a balance that was loaded to the meta device has no values: call balance_ again", stacklevel=2)
        return None
    if is_recorded():  # not to be remembered: a fake tensor, or an op that a mode must see
        return gains[0].to(device), gains[1].to(device)
    copies = _moved.setdefault(gains[0], {})
    if device not in copies:
        copies[device] = gains[0].to(device), gains[1].to(device)
    return copies[device]


def fit(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors, one operand's gain and the inverse of the other's, are the same."""
    if a is None or b is None:
        return a is b
    # Tracing makes new objects of one tensor, and has no values to compare.
    return a is b or is_symbolic() or (a.device == b.device and torch.equal(a, b))
