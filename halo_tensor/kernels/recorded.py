"""Functions whose allocations and launches are recorded once and then repeated.

A function of tensors that only allocates and launches kernels does the same for all tensors of the same shapes and strides.
The Python that decides on it takes longer than the launches. So :class:`Recorded` runs the function on stand-ins once for each
shape, and later calls repeat the recording (:class:`Program`): one allocation for each result, one for all temporary matrices,
and one call of Triton's C function for each launch. :mod:`halo_tensor.kernels.repeating` writes that as a Python function.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from halo_tensor.kernels.launch import Launch, cdiv
from halo_tensor.kernels.quantize import kernels
from halo_tensor.kernels.repeating import Argument, Program
from halo_tensor.kernels.stand_ins import Memory, StandIn, Unsupported

#: For this many shapes a function remembers what it launches.
_REMEMBERED = 1024
#: Temporary matrices begin at multiples of this many bytes.
_ALIGNMENT = 256
#: How many elements a program of the kernel that fills memory writes.
_FILLED = 2048


class Recorded:
    """A function of numbers and tensors, whose launches are recorded for all numbers that recur.

    The first call with some numbers runs the function, the second one records it, and later ones repeat the recording. A
    function that does anything else with tensors than allocate and launch is called every time.

    Args:
        function: takes the numbers, and tensors or None. It returns a tuple of new tensors or None. What it launches must
            depend on the numbers only, which must determine shapes, strides and dtypes of the tensors.
    """

    def __init__(self, function: Callable[..., tuple]):
        self.function = function
        #: Numbers -> the program; None after the first call; False if there is none.
        self.programs: dict[Any, Program | bool | None] = {}

    def __call__(self, numbers: Any, *tensors: torch.Tensor | None) -> Sequence[Any]:
        """Return what the function returns."""
        program: Any = self.programs.get(numbers) or self._next(numbers, tensors)
        if program:
            made = program.repeat(*tensors)
            if made is not None:
                return made
        return self.function(numbers, *tensors)

    def _next(self, numbers: Any, tensors: tuple) -> "Program | bool | None":
        """Record a call with numbers that were seen once, and remember those that were not."""
        if numbers not in self.programs:
            if len(self.programs) >= _REMEMBERED:
                self.programs.clear()
            self.programs[numbers] = None
        elif self.programs[numbers] is None:
            self.programs[numbers] = record(partial(self.function, numbers), tensors) or False
        return self.programs[numbers]


def record(function: Callable[..., tuple], tensors: tuple) -> Program | None:
    """Return what ``function`` allocates and launches for such tensors; None if it does anything else."""
    recording: list[tuple[Any, tuple]] = []
    given = [None if t is None else StandIn.of_tensor(recording, t) for t in tensors]
    try:
        made = function(*given)
        results = [None if x is None else _whole(x) for x in made]
        storages: list[Any] = [None if x is None else x.memory for x in given] + [memory for memory in results if memory]
        temporaries = [m for m in _new_memory(recording, []) if all(m is not storage for storage in storages)]
        zeroed = [m for m in temporaries if m.fill == 0]
        filled = [m for m in _new_memory(recording, results) if m.fill is not None and all(m is not z for z in zeroed)]
        fills = [_fill(memory, recording) for memory in filled]
    except Unsupported:
        return None
    device = next(x.device for x in given if x is not None)
    temporary = len(storages)
    offsets: dict[int, int] = {}
    temporary_bytes, zeroed_bytes, constants = 0, 0, []
    for memory in (*zeroed, *(m for m in temporaries if m.fill != 0)):
        offsets[id(memory)] = temporary_bytes
        temporary_bytes += cdiv(memory.nbytes(), _ALIGNMENT) * _ALIGNMENT
        zeroed_bytes = temporary_bytes if memory.fill == 0 else zeroed_bytes
    if zeroed:  # they lie side by side, so that one launch fills them
        zeros = Memory((zeroed_bytes // 4,), (1,), torch.int32, device, 0)
        offsets[id(zeros)] = 0
        fills.insert(0, _fill(zeros, recording))
    recording = fills + recording

    def argument(x: Any) -> Argument:
        if isinstance(x, torch.Tensor):
            constants.append(x)
            return Argument(temporary + len(constants), 0, tuple(x.shape), x.stride(), x.dtype)
        offset = x.offset * x.memory.dtype.itemsize
        if (start := offsets.get(id(x.memory))) is not None:
            return Argument(temporary, start + offset, tuple(x.shape), x.strides, x.dtype)
        storage = next(i for i, memory in enumerate(storages) if memory is x.memory)
        return Argument(storage, offset, tuple(x.shape), x.strides, x.dtype)

    launches = [(launch, tuple(map(argument, arguments))) for launch, arguments in recording]
    own = [a.offset for _, arguments in launches for a in arguments if a.storage >= len(tensors)]
    if any(offset % 16 for offset in own) or any(constant.data_ptr() % 16 for constant in constants):
        return None  # kernels count on pointers at multiples of 16 bytes, as new memory has them
    made_of = [None if memory is None else (memory.shape, memory.stride, memory.dtype) for memory in results]
    return Program(device, len(tensors), made_of, temporary_bytes, constants, launches, zeroed_bytes)


def _whole(x: Any) -> Memory:
    """Return the memory of a result, which must be new, and all of it the result."""
    memory = x.memory
    if memory.given or (x.shape, x.strides, x.dtype, x.offset) != (memory.shape, memory.stride, memory.dtype, 0):
        raise Unsupported("a view as a result")
    return memory


def _new_memory(recording: list[tuple[Any, tuple]], results: Sequence[Memory | None]) -> list[Memory]:
    """Return the memory that launches read or write and that of results, without that of given tensors."""
    used = [x.memory for _, arguments in recording for x in arguments if isinstance(x, StandIn)]
    found = {id(memory): memory for memory in (*used, *results) if memory is not None}
    return [memory for memory in found.values() if not memory.given]


def _fill(memory: Memory, recording: list[tuple]) -> tuple[Any, tuple]:
    """Return the launch that fills new memory with its value."""
    if memory.dtype.itemsize != 4:
        raise Unsupported("filled memory of this dtype")
    launch, count = _fill_launch(memory.device, memory.dtype, memory.fill), memory.nbytes() // 4
    return launch.sized((cdiv(count, _FILLED),), (count,)), (StandIn(recording, memory),)


@lru_cache
def _fill_launch(device: torch.device, dtype: torch.dtype, value: float) -> Launch:
    return Launch(kernels.fill, {"VALUE": value, "WIDTH": _FILLED, "num_warps": 4})
