"""Beneath Triton's launcher: the C function with which it launches, without the Python around it.

That is no interface of Triton's: it is used where it is known, in Triton 3.6, 3.7 and 3.8 on CUDA, and elsewhere their
launcher itself.
"""

import inspect
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import torch
import triton
from triton import knobs

# As many encoded descriptors as a launch remembers; a model meets few pointers, since allocations recur.
_REMEMBERED = 512
_VERSION = triton.__version__.rpartition(".")[0]


def launcher_of(
    compiled: Any, grid: tuple[int, ...], descriptors: Callable, described: int, rest: tuple
) -> Callable[[tuple, list[int], int], None]:
    """A function of tensors, their pointers and a stream that launches ``compiled`` on the current device.

    Args:
        descriptors: of tensors, the descriptors of the first ``described`` of them.
        rest: the arguments behind the tensors, constants included.
    """
    launcher = compiled[grid]

    def launch(tensors, pointers, stream):
        launcher(*descriptors(tensors), *pointers[described:], *rest, stream=stream)

    try:
        bare, head = _bare(compiled, described)
        encode = _encoder(compiled, described)
        _ = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
    except (AttributeError, ImportError, KeyError, TypeError):  # another Triton
        return launch

    spread = _VERSION == "3.6"  # the kernel's arguments one by one, instead of in a tuple
    remembered: dict[tuple, tuple] = {}

    def launch_bare(tensors, pointers, stream):
        if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return launch(tensors, pointers, stream)
        encoded: Any = ()
        if described:
            key = tuple(pointers[:described])
            encoded = remembered.get(key)
            if encoded is None:
                if len(remembered) >= _REMEMBERED:
                    remembered.clear()
                encoded = remembered[key] = encode(descriptors(tensors))
        arguments = (*encoded, *pointers[described:], *rest)
        if spread:
            bare(*grid, stream, *head, *arguments)
        else:
            bare(*grid, stream, *head, arguments)

    return launch_bare


def _bare(compiled: Any, described: int) -> tuple[Callable, tuple]:
    """Triton's C function, and its arguments between the stream and the kernel's own. Raises what :func:`launcher_of` catches
    where these are not known."""
    launcher = compiled.run
    if _VERSION not in ("3.6", "3.7", "3.8") or compiled.metadata.target.backend != "cuda":
        raise TypeError("whose arguments are not known")
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        raise TypeError("this kernel wants memory for each launch")
    how = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    no_hooks, no_scratch = (None, None, None), (None, None)
    head: tuple
    if _VERSION == "3.6":
        bare = launcher.launch
        if described:  # behind a function that encodes descriptors anew for every launch
            bare = inspect.getclosurevars(bare).nonlocals["launcher"]
        head = (*how, *no_scratch, compiled.packed_metadata, *no_hooks)
    else:
        bare = triton.runtime.driver.active.utils.launch
        head = (*how, compiled.packed_metadata, *no_hooks, *no_scratch, launcher.arg_annotations, launcher.kernel_signature)
    if not isinstance(bare, BuiltinFunctionType):
        raise TypeError("not a function of C")
    return bare, head


def _encoder(compiled: Any, described: int) -> Callable[[list], tuple]:
    """How descriptors become arguments of the C function, with which no tensor is kept alive."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    metas = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * described  # none where there is no TMA
    unused = () if _VERSION in ("3.6", "3.7") else (None,)

    def encode(descriptors):
        encoded = [a for d, meta in zip(descriptors, metas, strict=True) for a in make_tensordesc_arg(d, meta, *unused)]
        # Without TMA a descriptor is its tensor: its address will do.
        return tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in encoded)

    return encode
