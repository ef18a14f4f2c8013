"""Whether ranks have converted a layer alike. Codes do not show it, since those of one format look like those of another."""

import hashlib
from collections.abc import Sequence

import torch

from halo_tensor.weight.tensor import HaloWeight


def description(weight: HaloWeight, size: Sequence[int]) -> str:
    """Describe how a weight, [out, in] as a whole, is converted."""
    text = f"{weight.recipe}, {list(size)}, {weight.dtype}, {'frozen' if weight.master is None else 'trained'}"
    if weight.gain is None:
        return text
    # Ranks may have balanced on different batches.
    return f"{text}, balanced as {hashlib.sha256(str(weight.gain.tolist()).encode()).hexdigest()[:8]}"


def digest(text: str, device_type: str) -> torch.Tensor:
    """Return a number that tells texts apart, int64 [1], for ranks to compare."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.tensor([number], device=device_type)
