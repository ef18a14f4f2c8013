"""``torch.autograd.grad`` and ``backward`` of converted weights.

Autograd calls ``__torch_function__`` if it is given a weight, and all of backward then runs with ``__torch_function__``
disabled. A backward that recomputes (activation checkpointing) would recompute in high precision. So weights are replaced by
their edges in the graph.
"""

from typing import Any

import torch


def grad(kind: type[torch.Tensor], outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Run ``torch.autograd.grad`` with edges in place of tensors of class ``kind``."""
    return torch.autograd.grad(_edges(kind, outputs), _edges(kind, inputs), *args, **kwargs)


def backward(
    kind: type[torch.Tensor],
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Run ``torch.autograd.backward`` with edges in place of tensors of class ``kind``."""
    inputs = None if inputs is None else _edges(kind, inputs)
    torch.autograd.backward(_edges(kind, tensors), grad_tensors, retain_graph, create_graph, inputs=inputs)


def _edges(kind: type[torch.Tensor], tensors: Any) -> list[Any]:
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
    return [torch.autograd.graph.get_gradient_edge(t) if isinstance(t, kind) else t for t in tensors]
