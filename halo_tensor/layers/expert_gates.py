"""Which :class:`~halo_tensor.recipe.Gate` a module of experts computes, found by calling its own function on known numbers."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from halo_tensor.recipe import Gate
from halo_tensor.reference.experts import activate

#: Configs' numbers of which a gate may be made have one of these in their names.
_NAMES = ("alpha", "limit", "clamp", "beta")
#: Numbers on both sides of every clamp that is likely, also of one that no attribute tells of.
_PROBES = (0.0, 0.1, 0.5, 1.0, 1.7, 2.5, 4.0, 6.5, 9.0, 15.0, 40.0, 150.0, 1000.0)


def gate_of(module: Any) -> Gate | None:
    """Return the gate that ``module._apply_gate`` computes; None if it is no such gate, or the module has none.

    Products then call the module's own function, and nothing is fused with it.
    """
    if not module.has_gate:
        return None
    numbers = tuple(sorted({float(n) for n in _numbers(module)}))
    h = _probe(numbers)
    actual = _apply(module, h)
    return None if actual is None else _matching(h, actual, numbers)


def _numbers(module: Any) -> Iterator[float]:
    """Yield the numbers of which a gate may be made: alphas and limits."""
    for holder in (module, module.config):
        for name, value in vars(holder).items():
            if type(value) in (int, float) and any(word in name.lower() for word in _NAMES):
                yield value


@lru_cache
def _probe(numbers: tuple[float, ...]) -> torch.Tensor:
    """Return float64 [rows, 16], in which numbers below, between and above all limits meet each other."""
    sizes = [*_PROBES, *(abs(n) * f for n in numbers for f in (0.9, 1.1))]
    values = torch.tensor([s * n for n in sizes for s in (1.0, -1.0)], dtype=torch.float64, device="cpu")
    rows = torch.stack([values.roll(-shift) for shift in range(16)], 1)
    return torch.cat([rows, rows.flip(0)])


@torch.inference_mode(False)
@torch.no_grad()
def _apply(module: Any, h: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.autocast("cpu", enabled=False):
            a = module._apply_gate(h.clone())
    except Exception:  # the code is not known: it may need what only a forward has
        return None
    return a if isinstance(a, torch.Tensor) and a.shape == (h.shape[0], h.shape[1] // 2) else None


def _matching(h: torch.Tensor, actual: torch.Tensor, numbers: tuple[float, ...]) -> Gate | None:
    positive = [n for n in numbers if n > 0]
    for interleaved, shift, limit, alpha in product((False, True), (0.0, 1.0), (None, *positive), (1.0, *numbers)):
        gate = Gate(alpha, limit, shift, interleaved)
        if torch.allclose(activate(h, gate), actual.to(h.dtype), rtol=1e-5, atol=1e-6):
            return gate
    return None
