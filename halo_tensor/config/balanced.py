"""A config that is followed by a balance."""

from dataclasses import dataclass

from halo_tensor.config.base import LinearConfig


@dataclass(frozen=True)
class Balanced:
    """A candidate of :func:`~halo_tensor.report`: a config, followed by :func:`~halo_tensor.balance_`.

    Use it with int8. Balanced fp8 has a better gradient, but did not train better (docs/notes/accuracy.md).

    Args:
        config: what :func:`~halo_tensor.quantize_` takes before the balance.

    Example:
        >>> import torch
        >>> from halo_tensor import Balanced, halo_config, report
        >>> int8 = halo_config(1, "int8")
        >>> candidates = {"plain": int8, "balanced": Balanced(int8)}
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(128, 128)), torch.randn(32, 128)
        >>> found = report(model, x, candidates=candidates, loss_fn=lambda model, x: model(x).square().mean())
        >>> [candidate.name for candidate in found.candidates]
        ['plain', 'balanced']
    """

    config: LinearConfig
