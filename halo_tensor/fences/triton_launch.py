"""Private names of Triton that launches use. Tested with Triton 3.6 to 3.9, on CUDA.

The most important one is the C function by which Triton launches a kernel. Calling it directly leaves out the Python around
it. Its arguments are positional and differ between versions, so under untested versions Triton's own launcher is called
(:data:`halo_tensor.fences.fast_paths.LAUNCHER`).
"""

import inspect
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import torch
import triton

# How many encoded descriptors a launch remembers. A model uses few pointers, since allocations recur.
_REMEMBERED = 512
_VERSION = triton.__version__.rpartition(".")[0]

#: Of the sizes (see halo_tensor.kernels.launch), the tensors, their pointers and a stream.
Run = Callable[[Any, tuple, list[int], int], None]


def shared_memory(index: int) -> int:
    """Return how many bytes of shared memory a program may have on a device."""
    from triton.compiler.compiler import max_shared_mem

    return max_shared_mem(index)


def through_triton(compiled: Any, descriptors: Callable, described: int, constants: tuple) -> Run:
    """A function that launches ``compiled`` on the current device.

    Args:
        descriptors: of sizes and tensors, the descriptors of the first ``described`` of them.
        constants: the arguments behind the integers.
    """

    def launch(sizes: Any, tensors: tuple, pointers: list[int], stream: int) -> None:
        arguments = *descriptors(sizes, tensors), *pointers[described:], *sizes.integers, *constants
        compiled[sizes.grid](*arguments, stream=stream)

    return launch


def bare(launch: Run, compiled: Any, descriptors: Callable, described: int, constants: tuple) -> Run:
    """Return a launch by the C function beneath Triton's launcher.

    If that function is not enough, ``launch`` is returned, which :func:`through_triton` made of the same arguments.
    """
    from triton import knobs

    if not _is_enough(compiled):
        return launch
    function, head = _bare(compiled, described)
    encoders = _encoders(compiled, described)
    hooks = knobs.runtime
    _ = hooks.launch_enter_hook.calls, hooks.launch_exit_hook.calls
    spread = _VERSION == "3.6"  # the kernel's arguments one by one, instead of in a tuple
    # For each descriptor: pointers and extents recur, and one of two operands is often a weight, whose pointer stays.
    remembered: list[dict[tuple, tuple]] = [{} for _ in range(described)]

    def encoded_anew(index: int, key: tuple, sizes: Any, tensors: tuple) -> tuple:
        if len(remembered[index]) >= _REMEMBERED:
            remembered[index].clear()
        found = remembered[index][key] = encoders[index](descriptors(sizes, tensors)[index])
        return found

    def launch_bare(sizes: Any, tensors: tuple, pointers: list[int], stream: int) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            return launch(sizes, tensors, pointers, stream)
        encoded: tuple = ()
        for index, extent in enumerate(sizes.extents):
            key = pointers[index], extent
            encoded += remembered[index].get(key) or encoded_anew(index, key, sizes, tensors)
        arguments = (*encoded, *pointers[described:], *sizes.integers, *constants)
        if spread:
            function(*sizes.grid, stream, *head, *arguments)
        else:
            function(*sizes.grid, stream, *head, arguments)

    return launch_bare


def _is_enough(compiled: Any) -> bool:
    """Whether the C function can launch the kernel: it runs on CUDA, and needs no memory for each launch."""
    if compiled.metadata.target.backend != "cuda":
        return False
    launcher = compiled.run
    return not (launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False))


def _bare(compiled: Any, described: int) -> tuple[Callable, tuple]:
    """Return Triton's C function and its arguments between the stream and the kernel's own."""
    launcher = compiled.run
    how = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    no_hooks, no_scratch = (None, None, None), (None, None)
    head: tuple
    if _VERSION == "3.6":
        function = launcher.launch
        if described:  # it is wrapped by a function that encodes descriptors anew for every launch
            function = inspect.getclosurevars(function).nonlocals["launcher"]
        head = (*how, *no_scratch, compiled.packed_metadata, *no_hooks)
    else:
        function = triton.runtime.driver.active.utils.launch
        head = (*how, compiled.packed_metadata, *no_hooks, *no_scratch, launcher.arg_annotations, launcher.kernel_signature)
    if not isinstance(function, BuiltinFunctionType):
        raise TypeError("Triton's launcher is not a C function")
    return function, head


def _encoders(compiled: Any, described: int) -> list[Callable[[Any], tuple]]:
    """Return a function for each descriptor that turns it into arguments of the C function. These keep no tensor alive."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    metas = getattr(compiled.metadata, "tensordesc_meta", None) or [None] * described  # there is none without TMA
    unused = () if _VERSION in ("3.6", "3.7") else (None,)

    def encoder(meta: Any) -> Callable[[Any], tuple]:
        def encode(descriptor: Any) -> tuple:
            encoded = make_tensordesc_arg(descriptor, meta, *unused)
            # Without TMA the argument is the tensor, whose address is passed.
            return tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in encoded)

        return encode

    return [encoder(meta) for meta in metas]
