"""Repeat the allocations and launches of a recording, by a Python function that is written for it.

A loop over launches, which looks up what each of them takes, costs as much time as the launches. So a :class:`Program` writes
out its calls, one after the other, as in this function of a quantiser of rows::

    def repeat(x0, x1):                                 # the arguments
        if v0() != v1: return None                      # another device is the current one
        p0 = x0.data_ptr()
        if (p0) & 15: return None                       # the caller then runs what was recorded
        x2 = v2(v3, v4, v5)                             # the results: codes and scales
        x3 = v2(v6, v7, v8)
        p2 = x2.data_ptr()
        p3 = x3.data_ptr()
        if v9(): v10((x0, x1, x2, x3, None, v11))       # hooks of Triton observe launches, so Triton makes them
        else:
            stream = v12(v1)
            v13(*v14, stream, *v15, p0, p2, p3, v16, *v17)     # Triton's C function, one line for each launch
        return x2, x3

Where quantisers need small zeroed memory, it is a part of a larger one that was filled before
(:mod:`halo_tensor.kernels.zeros`), and the launch that would fill it is left out. Such a recording is not repeated while a
CUDA graph is captured, or hooks observe launches: its function runs.

The variables v hold numbers, objects and constants. They belong to a function around this one, so recordings that differ in
sizes only share its code.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from halo_tensor.fences.pytorch import allocator, current_device, current_raw_stream, is_capturing
from halo_tensor.fences.triton_launch import is_observed
from halo_tensor.kernels import zeros
from halo_tensor.kernels.launch import SizedLaunch

#: How often a program is written anew: a kernel can be launched by a C function after its first launch.
_WRITTEN = 3


class Argument(NamedTuple):
    """A tensor that a launch takes.

    Attributes:
        storage: the number of the tensor that it lies in, see :class:`Program`.
        offset: its first byte there.
        shape, stride, dtype: how the launch sees it.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, storage: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        if storage.dtype == torch.uint8:  # the temporary matrices
            return storage[self.offset :].view(self.dtype).as_strided(self.shape, self.stride)
        first = storage.storage_offset() + self.offset // storage.dtype.itemsize
        return storage.as_strided(self.shape, self.stride, first).view(self.dtype)


class Step(NamedTuple):
    """A launch of a program.

    Attributes:
        launch: a launch that is called with tensors only.
        arguments: these tensors.
        bound: the launch as a call of a C function with pointers; None if it needs tensors.
    """

    launch: Any
    arguments: tuple[Argument, ...]
    bound: Any = None

    def run(self, storages: Sequence[Any]) -> None:
        """Launch with tensors."""
        self.launch(*[argument.of(storages[argument.storage]) for argument in self.arguments])


class Program:
    """What a function allocates and launches. :func:`halo_tensor.kernels.recorded.record` makes it.

    Args:
        device: where all tensors are.
        given: the number of the function's arguments.
        results: shape, stride and dtype of each tensor that the function returns; None where it returns None.
        temporary_bytes: the size of all temporary matrices together.
        constants: tensors that are the same in every call.
        launches: each with its arguments. They lie in the function's arguments, then in its results without None, in the
            temporary matrices, and in the constants.
        zeroed_bytes: the first bytes of the temporary matrices, which the first launch fills with zeros.

    Attributes:
        repeat: takes the function's arguments, and returns its results; or None, and does nothing, if the arguments do not lie
            as launches need.
    """

    def __init__(
        self,
        device: torch.device,
        given: int,
        results: Sequence[tuple | None],
        temporary_bytes: int,
        constants: Sequence[torch.Tensor],
        launches: Sequence[tuple[Any, tuple[Argument, ...]]],
        zeroed_bytes: int = 0,
    ):
        self.device, self.given, self.results = device, given, results
        self.temporary_bytes, self.constants, self.zeroed_bytes = temporary_bytes, constants, zeroed_bytes
        self.steps = [Step(*launch) for launch in launches]
        self.repeat: Callable[..., Sequence[Any] | None] = self._repeat_and_write
        self._written = 0

    def _repeat_and_write(self, *tensors: torch.Tensor | None) -> Sequence[Any] | None:
        """Do what :attr:`repeat` does, in one of the first calls."""
        self.steps = [
            step._replace(bound=step.launch.bound()) if step.bound is None and isinstance(step.launch, SizedLaunch) else step
            for step in self.steps
        ]
        function = self._function()
        self._written += 1
        if self._written == _WRITTEN or all(step.bound for step in self.steps):
            self.repeat = function
        return function(*tensors)

    def _launch_all(self, storages: Sequence[Any]) -> None:
        """Launch with tensors, as hooks of Triton observe."""
        for step in self.steps:
            step.run(storages)

    def _function(self) -> Callable[..., Sequence[Any] | None]:
        """Return the function that repeats the recording."""
        source = _Source()
        body, name = source.body, source.name
        on_gpu = self.device.index is not None  # tensors on a GPU have an index
        takes_zeros = on_gpu and 0 < self.zeroed_bytes <= zeros.LARGEST and all(step.bound for step in self.steps)
        steps = self.steps[1:] if takes_zeros else self.steps
        made = [result for result in self.results if result is not None]
        temporary = self.given + len(made)
        allocates = self.temporary_bytes > (self.zeroed_bytes if takes_zeros else 0)
        made += [((self.temporary_bytes,), (1,), torch.uint8)] if allocates else []
        storages = [f"x{i}" for i in range(self.given + len(made))]
        storages += [] if allocates else ["None"]
        pointers = [f"p{i}" for i in range(len(storages))] + [name(constant.data_ptr()) for constant in self.constants]
        storages += [name(constant) for constant in self.constants]

        def in_zeros(argument: Argument) -> bool:
            return takes_zeros and argument.storage == temporary and argument.offset < self.zeroed_bytes

        def pointer(argument: Argument) -> str:
            start = "zeros" if in_zeros(argument) else pointers[argument.storage]
            return start + (f" + {name(argument.offset)}" if argument.offset else "")

        used = {argument.storage for step in steps for argument in step.arguments if not in_zeros(argument)}
        if on_gpu:
            index = name(self.device.index)
            body.append(f"if {name(current_device)}() != {index}: return None")
        given = {pointer(a): None for step in steps for a in step.arguments if a.storage < self.given}
        body += [f"p{i} = x{i}.data_ptr()" for i in range(self.given) if i in used]
        body += [f"if ({' | '.join(given)}) & 15: return None"] if given else []
        if takes_zeros:
            body.append(f"if {name(is_capturing)}() or {name(is_observed)}(): return None")
        empty = name(allocator(self.device))
        for i, how in enumerate(made, self.given):
            body.append(f"x{i} = {empty}({', '.join(map(name, how))})")
            body += [f"p{i} = x{i}.data_ptr()"] if i in used else []
        launching, everything = _Source.lines(body), f"({', '.join(storages)},)"
        if not takes_zeros:
            body.append(f"if {name(is_observed)}(): {name(self._launch_all)}({everything})")
            body.append("else:")
            launching = _Source.lines(body, "    ")
        if on_gpu:
            launching(f"stream = {name(current_raw_stream)}({index})")
        if takes_zeros:
            launching(f"memory, zeros = {name(zeros.take)}({name(self.device)}, stream, {name(self.zeroed_bytes)})")
        for step in steps:
            if step.bound is None:
                launching(f"{name(step.run)}({everything})")
            else:
                launching(step.bound.source([pointer(a) for a in step.arguments], "stream", name))
        if not steps:
            launching("pass")
        rest = iter(range(self.given, len(storages)))
        returned = ["None" if result is None else f"x{next(rest)}" for result in self.results]
        body.append(f"return ({' '.join(f'{result},' for result in returned)})")
        return source.function([f"x{i}" for i in range(self.given)])


class _Source:
    """The source of a function, and the objects that it names.

    Attributes:
        body: its lines.
        objects: by the names of their variables.
    """

    def __init__(self) -> None:
        self.body: list[str] = []
        self.objects: dict[str, Any] = {}

    @staticmethod
    def lines(body: list[str], indent: str = "") -> Callable[[str], None]:
        """Return a function that adds a line."""
        return lambda line: body.append(indent + line)

    def name(self, value: Any) -> str:
        """Return the variable that holds an object."""
        name = f"v{len(self.objects)}"
        self.objects[name] = value
        return name

    def function(self, parameters: Sequence[str]) -> Callable[..., Any]:
        """Return the function."""
        lines = [f"def write({', '.join(self.objects)}):", f"    def repeat({', '.join(parameters)}):"]
        lines += [*(f"        {line}" for line in self.body), "    return repeat"]
        return _compiled("\n".join(lines))(**self.objects)


@lru_cache(maxsize=4096)
def _compiled(source: str) -> Callable[..., Callable]:
    """Return the function ``write`` that ``source`` defines."""
    defined: dict[str, Any] = {}
    exec(compile(source, "<a recording of halo_tensor>", "exec"), defined)
    return defined["write"]
