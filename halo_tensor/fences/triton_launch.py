"""Private names of Triton that launches use. Tested with Triton 3.6 to 3.9, on CUDA.

The most important one is the C function by which Triton launches a kernel. Calling it directly leaves out the Python around
it. Its arguments are positional and differ between versions, so under untested versions Triton's own launcher is called
(:data:`halo_tensor.fences.fast_paths.LAUNCHER`).
"""

import inspect
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
import triton

# How many extents a launch remembers, and how many encoded descriptors of each. A model uses few pointers, since allocations
# recur: the weights of one shape, or the inputs of one length.
_EXTENTS, _REMEMBERED = 128, 512
_VERSION = triton.__version__.rpartition(".")[0]

#: A function of sizes (see halo_tensor.kernels.launch), tensors, their pointers and a stream.
Run = Callable[[Any, tuple, list[int], int], None]


def shared_memory(index: int) -> int:
    """Return how many bytes of shared memory a program may have on a device."""
    from triton.compiler.compiler import max_shared_mem

    return max_shared_mem(index)


class Address(NamedTuple):
    """An address and a dtype. A descriptor reads these two of its base, which may then be this instead of a tensor."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


def is_observed() -> bool:
    """Whether Triton's hooks want to know of launches."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def through_triton(compiled: Any, descriptors: Callable, dtypes: tuple[torch.dtype, ...], constants: tuple) -> Run:
    """A function that launches ``compiled`` on the current device.

    Args:
        descriptors: of sizes and tensors, the descriptors of the first ones.
        dtypes: the dtypes of the tensors that are read through descriptors.
        constants: the arguments behind the integers.
    """

    def launch(sizes: Any, tensors: tuple, pointers: list[int], stream: int) -> None:
        arguments = *descriptors(sizes, tensors), *pointers[len(dtypes) :], *sizes.integers, *constants
        compiled[sizes.grid](*arguments, stream=stream)

    return launch


class Bare:
    """A launch by the C function beneath Triton's launcher.

    Args:
        launch: made by :func:`through_triton` of the same other arguments. It launches while hooks observe launches.
    """

    def __init__(self, launch: Run, compiled: Any, descriptors: Callable, dtypes: tuple[torch.dtype, ...], constants: tuple):
        self._launch, self._descriptors, self._dtypes, self._constants = launch, descriptors, dtypes, constants
        self._function, self._head = _bare(compiled, len(dtypes))
        self._encoders = _encoders(compiled, len(dtypes))
        # For each descriptor: extent -> encoded ones. One of two operands is often a weight, whose pointer stays.
        self._encoded: list[dict[tuple, Encoded]] = [{} for _ in dtypes]
        self._spread = _VERSION == "3.6"  # the kernel's arguments one by one, instead of in a tuple

    def __call__(self, sizes: Any, tensors: tuple, pointers: list[int], stream: int) -> None:
        if is_observed():
            return self._launch(sizes, tensors, pointers, stream)
        arguments: list[Any] = []
        for index, extent in enumerate(sizes.extents):
            arguments += (self._encoded[index].get(extent) or self._encode(index, sizes))[pointers[index]]
        arguments += (*pointers[len(sizes.extents) :], *sizes.integers, *self._constants)
        self._function(*sizes.grid, stream, *self._head, *(arguments if self._spread else (tuple(arguments),)))

    def bound(self, sizes: Any) -> "Bound":
        """Return the launch with these sizes."""
        encoded = [self._encode(index, sizes) for index in range(len(sizes.extents))]
        return Bound(self._function, sizes.grid, self._head, encoded, (*sizes.integers, *self._constants), self._spread)

    def _encode(self, index: int, sizes: Any) -> "Encoded":
        """Return the descriptors of one of the first tensors with these sizes."""
        remembered, extent, encoder = self._encoded[index], sizes.extents[index], self._encoders[index]
        if extent not in remembered:
            if len(remembered) >= _EXTENTS:
                remembered.clear()

            def encode(pointer: int) -> tuple:
                addresses = tuple(Address(pointer, dtype) for dtype in self._dtypes)
                return encoder(self._descriptors(sizes, addresses)[index])

            remembered[extent] = Encoded(encode)
        return remembered[extent]


class Encoded(dict[int, tuple]):
    """Pointer -> the arguments of the C function that describe a matrix there. They are encoded when they are first read."""

    def __init__(self, encode: Callable[[int], tuple]):
        super().__init__()
        self._encode = encode

    def __bool__(self) -> bool:
        return True

    def __missing__(self, pointer: int) -> tuple:
        if len(self) >= _REMEMBERED:
            self.clear()
        found = self[pointer] = self._encode(pointer)
        return found


class Bound(NamedTuple):
    """A launch with its sizes, as a call of the C function.

    Attributes:
        function: the C function.
        grid, head: its arguments before and after the stream.
        encoded: the descriptors of the kernel's first tensors.
        tail: the arguments behind the pointers.
        spread: whether the kernel's arguments are passed one by one, and not in a tuple.
    """

    function: Callable
    grid: tuple[int, int, int]
    head: tuple
    encoded: list[Encoded]
    tail: tuple
    spread: bool

    def source(self, pointers: Sequence[str], stream: str, name: Callable[[Any], str]) -> str:
        """Return the call as Python source.

        Args:
            pointers: expressions of the pointers to the kernel's tensors.
            stream: an expression.
            name: returns the name by which the source knows an object.
        """
        described = [f"*{name(encoded)}[{pointer}]" for encoded, pointer in zip(self.encoded, pointers, strict=False)]
        arguments = ", ".join([*described, *pointers[len(described) :], f"*{name(self.tail)}"])
        arguments = arguments if self.spread else f"({arguments})"
        return f"{name(self.function)}(*{name(self.grid)}, {stream}, *{name(self.head)}, {arguments})"


def bare(launch: Run, compiled: Any, *how: Any) -> Run:
    """Return a :class:`Bare` launch, or ``launch`` if the C function is not enough."""
    return Bare(launch, compiled, *how) if _is_enough(compiled) else launch


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
            # Without TMA, Triton returns a tensor in place of a descriptor. The C function takes its address.
            return tuple(a.data_ptr() if isinstance(a, (torch.Tensor, Address)) else a for a in encoded)

        return encode

    return [encoder(meta) for meta in metas]
