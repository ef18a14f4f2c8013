"""Records which kernels are launched, and switches off backends of products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from halo_tensor.fences.fast_paths import FAST_PATHS
from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.products import eager, eager_backward


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the names of all kernels will be added that are launched from now on."""
    names, call = [], Launch.__call__

    def noting(self, sizes, *tensors):
        if isinstance(tensors[0], torch.Tensor):  # and no stand-in, on which a launch is recorded
            names.append(self.kernel.fn.__name__)
        call(self, sizes, *tensors)

    monkeypatch.setattr(Launch, "__call__", noting)
    monkeypatch.setattr(Launch, "bound", lambda self, sizes: None)  # programs then call launches with tensors
    eager._lowered.clear()
    eager_backward._lowered.clear()
    return names


@contextmanager
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Yield a function that switches fast paths off by their names. Products are planned anew after it, and after the block."""

    def switch_off(*names: str) -> None:
        for name in names:
            monkeypatch.setattr(FAST_PATHS[name], "disabled", True)
        product.plan.cache_clear()

    yield switch_off
    product.plan.cache_clear()
