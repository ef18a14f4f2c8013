"""Measure the memory that a forward saves for backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halo_tensor.fences.pytorch import is_traceable_wrapper_subclass


class Saved:
    """Bytes that autograd saves. Each storage counts once, and storages of parameters do not count.

    Attributes:
        total: bytes saved by the whole model.
        largest: bytes of the largest storage.
        layers: bytes saved inside the named layers.
    """

    total: int = 0
    largest: int = 0
    layers: int = 0


@contextmanager
def measure_saved(model: nn.Module, names: Iterable[str] = ()) -> Iterator[Saved]:
    """Measure what the forward inside the block saves for backward.

    A storage that a named layer and something else save counts in both numbers.

    Args:
        model: the model that is called inside the block.
        names: the layers whose share is measured.

    Yields:
        the counts, which are complete when the block is left.
    """
    saved = Saved()
    depth = 0  # of calls of named layers
    # Storages are kept alive until the end, so that no address is used twice. Those on the meta device have no data pointer.
    everywhere: dict[int, torch.UntypedStorage] = {}
    within: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        everywhere[storage._cdata] = storage
        if depth:
            within[storage._cdata] = storage
        return t

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    chosen = [model.get_submodule(name) for name in names]
    hooks = [h for m in chosen for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()
        parameters = {storage._cdata for p in model.parameters() for storage in storages(p)}
        own, inner = (
            [storage.nbytes() for at, storage in kept.items() if at not in parameters] for kept in (everywhere, within)
        )
        saved.total, saved.largest, saved.layers = sum(own), max(own, default=0), sum(inner)
        for kept in (everywhere, within):  # the hooks live as long as what they packed
            kept.clear()


def storages(tensor: torch.Tensor) -> set[torch.UntypedStorage]:
    """Return the storage of a tensor, or those of all tensors that a subclass holds."""
    if not is_traceable_wrapper_subclass(tensor):
        return {tensor.untyped_storage()}
    names, _ = tensor.__tensor_flatten__()
    return {storage for name in names for storage in storages(getattr(tensor, name))}
