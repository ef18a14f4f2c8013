"""Private names of PyTorch and torchao that have no public twin. Tested with torch 2.11 to 2.15 and torchao 0.17 and 0.18.

Unlike the fast paths (:mod:`halo_tensor.fences.fast_paths`), the library cannot do without most of these.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes as hidden_from_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

#: Messages that ``import torchao`` logs: (logger, how they begin, what else they contain). None of them concerns this library,
#: which calls none of torchao's C++ extensions and never exports its enums.
_MESSAGES = (
    # torchao 0.17 and 0.18, where an extension was built for another Python or CUDA, or the machine has no GPU
    ("torchao", "Failed to load ", "_C"),
    # torch 2.13 and later, about an enum that torchao 0.18 registers
    ("torch.utils._pytree", "", "is an Enum subclass and is now natively supported by torch.compile"),
)


@contextmanager
def _without_messages() -> Iterator[None]:
    """Drops the known messages, and only these, while the block runs. Nobody's warning filters or log levels are touched."""

    def filter_of(begin: str, contained: str) -> Callable[[logging.LogRecord], bool]:
        def keep(record: logging.LogRecord) -> bool:
            message = record.getMessage()
            return not (message.startswith(begin) and contained in message)

        return keep

    filters = [(logging.getLogger(name), filter_of(*text)) for name, *text in _MESSAGES]
    for logger, filter in filters:
        logger.addFilter(filter)
    try:
        yield
    finally:
        for logger, filter in filters:
            logger.removeFilter(filter)


with _without_messages():
    from torchao.core.config import ALLOWED_AO_MODULES
    from torchao.utils import TorchAOBaseTensor

#: Both take less than a microsecond; the public functions take several, in every launch.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
_KEYS = torch._C._TorchDispatchModeKey  # private, as of torch 2.11–2.15
_TRACING_MODES = (_KEYS.FAKE, _KEYS.FUNCTIONAL, _KEYS.PROXY)


def is_symbolic() -> bool:
    """Whether ops are traced: values do not exist, or stand for those of a later run. Code must not depend on them, nor keep
    the tensors. True in FakeTensorMode and make_fx and while torch.compile traces; false in modes that only watch ops run."""
    return is_recorded() and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)


def is_recorded() -> bool:
    """Whether any dispatch mode is active: it may count ops, or match them with those of another run (FLOP counters, selective
    checkpointing, tracing), so every call must issue all of its ops, and take no result from another call."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a function transform of torch.func is active, or torch.jit traces: tensors then stand for others."""
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


def multiply_integers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of two int8 matrices on a CPU, exact in int32."""
    if hasattr(torch, "_int_mm"):
        return torch._int_mm(a, b)
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)


def is_compiled() -> bool:
    """Whether AOTAutograd traces a graph, not only somebody's fake tensor mode."""
    return torch._guards.TracingContext.try_get() is not None


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """The shard itself; ``to_local`` gives a view of it."""
    return tensor._local_tensor


def set_local_tensor(tensor: DTensor, shard: torch.Tensor) -> None:
    tensor._local_tensor = shard


def preserved_version(tensors: torch.Tensor | tuple[torch.Tensor, ...]) -> AbstractContextManager:
    """Writes to ``tensors`` in this context are unseen by autograd."""
    return torch.autograd._unsafe_preserve_version_counter(tensors)


__all__ = [
    "ALLOWED_AO_MODULES",
    "TorchAOBaseTensor",
    "current_device",
    "current_raw_stream",
    "hidden_from_modes",
    "is_compiled",
    "is_recorded",
    "is_symbolic",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "local_tensor",
    "multiply_integers",
    "preserved_version",
    "return_and_correct_aliasing",
    "set_local_tensor",
    "tree_map_only",
]
