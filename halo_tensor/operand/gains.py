"""Gains: powers of two that multiply an operand's columns before they are rotated and quantised.

X Wᵀ = (X / s)(W s)ᵀ for any s [in_features]. So a gain along a contracted dimension cancels if the other operand carries its
inverse, and a gain along a surviving dimension is undone on the result. Gains are passed in pairs, (gain, 1 / gain), that are
never written to. Two operands match if they hold the same tensors, a test that reads no values.
"""

import warnings

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.fences.pytorch import is_recorded, is_symbolic

Gains = tuple[torch.Tensor, torch.Tensor]
#: gain -> {device: its pair on that device}, so that layers that share gains still do after they were moved.
_moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def of_exponents(exponents: torch.Tensor) -> Gains:
    """Return 2**exponents and 2**-exponents as exact float32, on the device of ``exponents``, whole numbers of any dtype."""
    ones = torch.ones_like(exponents, dtype=torch.float64)
    # Rounding to float32 removes an error in the last bit of a device's pow.
    return torch.ldexp(ones, exponents.int()).float(), torch.ldexp(ones, -exponents.int()).float()


def moved(gains: Gains | None, device: torch.device) -> Gains | None:
    """Return the gains on ``device``. The meta device has no values, so the gains of a weight that moves there stay where they
    are, and move with it when it comes back."""
    if gains is None or device.type == "meta" or gains[0].device == device:
        return gains
    if gains[0].is_meta:
        warnings.warn("a balance that was loaded to the meta device has no values: call balance_ again", stacklevel=2)
        return None
    if is_recorded():  # do not remember a fake tensor, or an op that a mode must see
        return gains[0].to(device), gains[1].to(device)
    copies = _moved.setdefault(gains[0], {})
    if device not in copies:
        copies[device] = gains[0].to(device), gains[1].to(device)
    return copies[device]


def are_inverse(undo_gain: torch.Tensor | None, gain: torch.Tensor | None) -> bool:
    """Whether the gains of two operands cancel: the inverse of one's gain and the gain of the other are the same."""
    if undo_gain is None or gain is None:
        return undo_gain is gain
    # Tracing makes new objects for one tensor, and has no values to compare.
    return undo_gain is gain or is_symbolic() or (undo_gain.device == gain.device and torch.equal(undo_gain, gain))
