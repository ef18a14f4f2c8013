"""Private names of PyTorch and torchao for which there is no public name.

The library needs most of them, unlike the fast paths (:mod:`halo_tensor.fences.fast_paths`). Tested with torch 2.11 to 2.15,
torchao 0.17 and 0.18.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes as hidden_from_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

#: Messages that ``import torchao`` logs: (logger, beginning, another part). They do not concern this library, which neither
#: calls torchao's C++ extensions nor exports its enums.
_MESSAGES = (
    # torchao 0.17 and 0.18, if an extension was built for another version of torch or CUDA, or there is no GPU:
    # https://github.com/pytorch/ao/issues/2919
    ("torchao", "Failed to load ", "_C"),
    # torch 2.13 and later, for enums that torchao 0.18 registers: https://github.com/pytorch/ao/issues/4848
    ("torch.utils._pytree", "", "is an Enum subclass and is now natively supported by torch.compile"),
)


@contextmanager
def _without_messages() -> Iterator[None]:
    """Drop these messages and no others while the block runs. Warning filters and log levels stay as they are."""

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

#: What ``F.grouped_mm`` calls (torch 2.11 to 2.15), and what older code calls itself.
GROUPED_MM: Callable[..., torch.Tensor] = torch._grouped_mm
#: Every launch calls these two. Each takes less than a microsecond, and its public twin several.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)
#: Inductor's generated code allocates by it, several times faster than by its public twin.
_empty_strided_cuda = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)
_KEYS = torch._C._TorchDispatchModeKey
_TRACING_MODES = (_KEYS.FAKE, _KEYS.FUNCTIONAL, _KEYS.PROXY)


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """Return a function of shape, stride and dtype that allocates on a device. If it is a GPU, it must be the current one."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return _empty_strided_cuda
    return lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device)


def is_symbolic() -> bool:
    """Whether ops are traced, so that tensors have no values, or values that stand for those of later runs.

    Code must then neither depend on values nor keep tensors. It is true in FakeTensorMode and make_fx and while torch.compile
    traces, and false in modes that only observe ops.
    """
    return is_recorded() and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)


def is_recorded() -> bool:
    """Whether any dispatch mode is active: a FLOP counter, selective checkpointing, tracing.

    A mode may count ops or match them with those of another run. So every call must issue all of its ops, and use no result of
    an earlier call.
    """
    return torch._C._len_torch_dispatch_stack() > 0


class _Observed(threading.local):
    modes = 0


_observed = _Observed()


@contextmanager
def observed() -> Iterator[None]:
    """A block in which one more dispatch mode is active that only looks at results, so that calls may still share them."""
    _observed.modes += 1
    try:
        yield
    finally:
        _observed.modes -= 1


def must_repeat() -> bool:
    """Whether a dispatch mode is active that must see every op, see :func:`is_recorded`."""
    return torch._C._len_torch_dispatch_stack() > _observed.modes


def partition_only() -> Callable:
    """Return a backend of ``torch.compile`` that partitions graphs as Inductor does, and then runs their ops one by one.

    Inductor's own passes are left out, since they remove what is computed on the meta device. The passes and the partitioner
    of its configuration run.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    def run(graph: Any, inputs: Any) -> Callable:
        return make_boxed_func(graph)

    def partition(graph: Any, inputs: Any, **options: Any) -> Any:
        passes: Any = config.joint_custom_post_pass  # later versions accept a list
        for each in passes if isinstance(passes, list | tuple) else [passes] if passes else []:
            each(graph.graph)
        return (config.custom_partitioner_fn or min_cut_rematerialization_partition)(graph, inputs, **options)

    return aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition, decompositions=select_decomp_table())


def is_transformed() -> bool:
    """Whether a function transform of torch.func is active, or torch.jit traces: tensors then stand for others."""
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


_dispatch_modes = torch._C._len_torch_dispatch_stack
_level_of_transforms = torch._C._functorch.maybe_current_level
_tracing_state = torch._C._get_tracing_state


def is_watched() -> bool:
    """Whether :func:`is_recorded` or :func:`is_transformed`."""
    return _dispatch_modes() > 0 or _level_of_transforms() is not None or _tracing_state() is not None


#: A function transform wraps tensors. When it has ended, this returns what is in the wrapper that another code has kept.
unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.unwrap_if_dead


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without the Python code around it, which takes some 3 µs. That serves function transforms,
    and functions that have a ``setup_context``."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on devices of a type; None outside of autocast."""
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def multiply_integers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in int32, exactly, of int8 matrices a [m, k] and b [k, n].

    On a CPU without an instruction for integers, ``_int_mm`` takes twenty times as long as a product in float64.
    """
    if not hasattr(torch, "_int_mm") or (a.device.type == "cpu" and not _multiplies_integers()):
        return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)
    return _multiply_padded(a, b) if a.device.type == "cuda" else torch._int_mm(a, b)


@cache
def _multiplies_integers() -> bool:
    """Whether this CPU has an instruction that multiplies 8-bit integers (VNNI)."""
    return getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


def _multiply_padded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply with zeros around a and b, since on a GPU ``_int_mm`` takes m > 16 and multiples of 8 as k and n only."""
    (m, k), n = a.shape, b.shape[1]
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b_t = torch.nn.functional.pad(b.t(), (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b_t.t())[:m, :n]


def is_compiled() -> bool:
    """Whether AOTAutograd traces a graph. It is false if ops only run in a fake tensor mode."""
    return tracing_context() is not None


def tracing_context() -> Any:
    """Return the context of the graph that is being compiled, or None."""
    return torch._guards.TracingContext.try_get()


def top_saved_tensors_hooks() -> tuple[Callable, Callable] | None:
    """Return the innermost hooks on saved tensors of this thread, pack and unpack; None if there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def push_saved_tensors_hooks(pack: Callable, unpack: Callable) -> None:
    """Enter ``torch.autograd.graph.saved_tensors_hooks``, which is a context manager only."""
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def pop_saved_tensors_hooks() -> None:
    """Leave the innermost ``torch.autograd.graph.saved_tensors_hooks``."""
    torch._C._autograd._pop_saved_tensors_default_hooks()


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """Return the shard itself, where ``to_local`` returns a view of it."""
    return tensor._local_tensor


def set_local_tensor(tensor: DTensor, shard: torch.Tensor) -> None:
    """Replace the shard of a DTensor."""
    tensor._local_tensor = shard


def let_optimizers_use_foreach(kind: type[torch.Tensor]) -> None:
    """Have optimisers treat parameters of this class as plain ones where they choose an implementation themselves, as PyTorch
    does for DTensor. Otherwise one such parameter makes them loop over all."""
    from torch.optim.optimizer import _foreach_supported_types

    if kind not in _foreach_supported_types:
        _foreach_supported_types.append(kind)


def list_updates() -> list[Callable]:
    """Return the functions with which optimisers write to a list of tensors, their first argument, by one op."""
    return [f for name, f in vars(torch).items() if name.startswith(("_foreach_", "_fused_")) and name.endswith("_")]


def copy_all_(targets: list, sources: list) -> None:
    """Copy each source to its target, by one op."""
    torch._foreach_copy_(targets, sources)


def hook_forward(module: nn.Module, key: str, before: Callable, after: Callable) -> None:
    """Call ``before(module, args)`` ahead of a module's forward, and ``after(module, args, output)`` in every case after it.

    Hooks of PyTorch's own methods have another number in each module. Compiled code checks the number of a hook that is always
    called, so it would be compiled again for each of many equal layers.
    """
    unhook_forward(module, key)
    module._forward_pre_hooks[key] = before  # type: ignore[index]
    module._forward_hooks[key] = after  # type: ignore[index]
    module._forward_hooks_always_called[key] = True  # type: ignore[index]


def unhook_forward(module: nn.Module, key: str) -> None:
    """Remove the hooks of :func:`hook_forward`, if there are any."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        hooks.pop(key, None)  # type: ignore[call-overload]


def preserved_version(tensors: torch.Tensor | tuple[torch.Tensor, ...]) -> AbstractContextManager:
    """Return a context in which writes to ``tensors`` do not change their versions, so that autograd does not see them."""
    return torch.autograd._unsafe_preserve_version_counter(tensors)


__all__ = [
    "ALLOWED_AO_MODULES",
    "TorchAOBaseTensor",
    "allocator",
    "applied",
    "autocast_dtype",
    "copy_all_",
    "current_device",
    "current_raw_stream",
    "hidden_from_modes",
    "hook_forward",
    "is_capturing",
    "is_compiled",
    "is_recorded",
    "is_symbolic",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "is_watched",
    "let_optimizers_use_foreach",
    "list_updates",
    "local_tensor",
    "multiply_integers",
    "must_repeat",
    "observed",
    "partition_only",
    "pop_saved_tensors_hooks",
    "preserved_version",
    "push_saved_tensors_hooks",
    "return_and_correct_aliasing",
    "set_local_tensor",
    "top_saved_tensors_hooks",
    "tracing_context",
    "tree_map_only",
    "unhook_forward",
    "unwrap_if_dead",
]
