"""Record the operands that reach layers in one forward and backward, and register hooks for the length of a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halo_tensor.layers.kinds import inputs_of


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook_of: Callable[[str], Callable], before: bool = False) -> Iterator[None]:
    """Call a hook in every forward of ``layers`` inside the block.

    Args:
        layers: name -> module.
        hook_of: name -> hook of (module, args, kwargs, output), or of (module, args, kwargs) if ``before``.
        before: call it before the forward.
    """
    with ExitStack() as stack:
        for name, module in layers.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook_of(name), with_kwargs=True).remove)
        yield


@dataclass
class _Call:
    """The sampled rows of one call of a layer."""

    x: torch.Tensor
    tokens: int  # rows before sampling
    rest: tuple[torch.Tensor, ...] = ()
    e: torch.Tensor | None = None  # None until backward


@dataclass
class Operands:
    """The matrices that reached one layer.

    Attributes:
        tokens: rows of X in all calls.
        x: [t, in], evenly spaced rows of X.
        rest: of experts, the same rows of top_k_index and of top_k_weights, [t, top_k].
        e: [t, out], the same rows of E; None if no gradient arrived.
        needs_grad_input: whether X requires a gradient.
        x_group: a number. Layers that were called with the same tensor X have the same number.
    """

    tokens: int = 0
    x: torch.Tensor | None = None
    rest: tuple[torch.Tensor, ...] = ()
    e: torch.Tensor | None = None
    needs_grad_input: bool = False
    x_group: int = -1
    _calls: list[_Call] = field(default_factory=list)

    def gather(self, limit: int) -> None:
        """Join the rows of all calls and keep at most ``limit`` of them."""
        calls = [call for call in self._calls if call.e is not None]
        calls = calls or self._calls  # checkpointing calls a layer twice, and only the second call gets an E
        self._calls = []
        self.tokens = sum(call.tokens for call in calls)
        rows = torch.cat([call.x for call in calls])
        kept = evenly_spaced(len(rows), limit, rows.device)
        self.x = rows[kept]
        self.rest = tuple(torch.cat(parts)[kept] for parts in zip(*(call.rest for call in calls), strict=True))
        gradients = [call.e for call in calls if call.e is not None]
        self.e = torch.cat(gradients)[kept] if gradients else None


def evenly_spaced(n: int, limit: int, device: torch.device) -> torch.Tensor:
    """Return the indices of ``limit`` evenly spaced rows out of ``n``, or of all rows if there are fewer."""
    return torch.arange(min(n, limit), device=device) * n // max(min(n, limit), 1)


@contextmanager
def captured(layers: Mapping[str, nn.Module], limit: int) -> Iterator[dict[str, Operands]]:
    """Record the operands that reach ``layers`` in the forwards and backwards inside the block.

    Args:
        layers: name -> linear layer or experts.
        limit: how many rows of X and E to keep for each layer, at most.

    Yields:
        name -> operands, for the layers that were called. It is complete when the block is left.
    """
    seen: dict[str, Operands] = {}
    latest_x: torch.Tensor | None = None  # kept alive, so that no other tensor can be the same object
    group = -1

    def hook(name: str) -> Callable:
        def forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: torch.Tensor) -> None:
            nonlocal latest_x, group
            x, *rest = inputs_of(module, args, kwargs)
            if x.numel() == 0:
                return
            if x is not latest_x:
                latest_x, group = x, group + 1
            operands = seen.setdefault(name, Operands(x_group=group))
            rows = x.detach().reshape(-1, x.shape[-1])
            kept = evenly_spaced(len(rows), limit, rows.device)
            call = _Call(rows[kept], len(rows), tuple(t.detach()[kept] for t in rest))
            operands.needs_grad_input |= x.requires_grad
            operands._calls.append(call)

            def backward(e: torch.Tensor) -> None:
                call.e = e.detach().reshape(-1, e.shape[-1])[kept]

            if y.requires_grad:
                y.register_hook(backward)

        return forward

    with hooked(layers, hook):
        yield seen
    latest_x = None
    for operands in seen.values():
        operands.gather(limit)
