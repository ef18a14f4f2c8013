"""Functions whose allocations and launches are recorded once and then repeated.

A function of tensors that only allocates and launches kernels does the same for all tensors of the same shapes and strides.
The Python that decides on it takes longer than the launches. So :class:`Recorded` runs the function on stand-ins once for each
shape, and later calls repeat the recording (:class:`Program`): one allocation for each result, one for all temporary matrices,
and one call of Triton's C function for each launch.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch

from halo_tensor.fences.pytorch import allocator, current_device, current_raw_stream
from halo_tensor.fences.triton_launch import is_observed
from halo_tensor.kernels.launch import Launch, SizedLaunch, cdiv
from halo_tensor.kernels.quantize import kernels
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
        program = self.programs.get(numbers) or self._next(numbers, tensors)
        made = program.run(tensors) if isinstance(program, Program) else None
        return self.function(numbers, *tensors) if made is None else made

    def _next(self, numbers: Any, tensors: tuple) -> "Program | bool | None":
        """Record a call with numbers that were seen once, and remember those that were not."""
        if numbers not in self.programs:
            if len(self.programs) >= _REMEMBERED:
                self.programs.clear()
            self.programs[numbers] = None
        elif self.programs[numbers] is None:
            self.programs[numbers] = record(partial(self.function, numbers), tensors) or False
        return self.programs[numbers]


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
        pick: takes their pointers from all pointers of a call.
        bound: the launch as a function of pointers and a stream; None if it needs tensors.
    """

    launch: Any
    arguments: tuple[Argument, ...]
    pick: Callable[[Sequence[int]], Sequence[int]]
    bound: Callable[[Sequence[int], int], None] | None


class Program:
    """What a function allocates and launches. :func:`record` makes it.

    Args:
        device: where all tensors are.
        results: shape, stride and dtype of each tensor that the function returns; None where it returns None.
        temporary_bytes: the size of all temporary matrices together.
        constants: tensors that are the same in every call.
        launches: each with its arguments. They lie in the function's arguments, then in its results without None, in the
            temporary matrices, and in the constants.
    """

    def __init__(
        self,
        device: torch.device,
        results: Sequence[tuple | None],
        temporary_bytes: int,
        constants: Sequence[torch.Tensor],
        launches: Sequence[tuple[Any, tuple[Argument, ...]]],
    ):
        self.device, self.results, self.temporary_bytes, self.constants = device, results, temporary_bytes, constants
        self._index = -1 if device.index is None else device.index  # tensors on a GPU have an index
        self._empty = allocator(device)
        self._made = [result for result in results if result is not None]
        places: dict[tuple[int, int], int] = {}
        self.steps: list[Step] = []
        for launch, arguments in launches:
            at = [places.setdefault((a.storage, a.offset), len(places)) for a in arguments]
            self.steps.append(Step(launch, arguments, _pick(at), None))
        self._places = tuple(places)
        self._binds = 3  # a kernel may be launched by a C function after its first launch

    def run(self, tensors: tuple) -> Sequence[torch.Tensor | None] | None:
        """Return the results for these arguments; None, and nothing is done, if they do not lie as launches need."""
        on_gpu = self._index >= 0
        if on_gpu and self._index != current_device():
            return None
        empty = self._empty
        made = [empty(*how) for how in self._made]
        temporary = empty((self.temporary_bytes,), (1,), torch.uint8) if self.temporary_bytes else None
        storages = (*tensors, *made, temporary, *self.constants)
        firsts = [0 if t is None else t.data_ptr() for t in storages]
        pointers = [firsts[storage] + offset for storage, offset in self._places]
        if reduce(or_, pointers, 0) & 15:
            return None
        if self._binds:
            self._bind()
        stream, observed = current_raw_stream(self._index) if on_gpu else 0, is_observed()
        for launch, arguments, pick, bound in self.steps:
            if bound is None or observed:
                launch(*[argument.of(storages[argument.storage]) for argument in arguments])
            else:
                bound(pick(pointers), stream)
        return made if len(made) == len(self.results) else _with_none(made, self.results)

    def _bind(self) -> None:
        self._binds -= 1
        self.steps = [
            step._replace(bound=step.launch.bound()) if step.bound is None and isinstance(step.launch, SizedLaunch) else step
            for step in self.steps
        ]


def _pick(at: list[int]) -> Callable[[Sequence[int]], Sequence[int]]:
    return itemgetter(*at) if len(at) > 1 else lambda pointers: (pointers[at[0]],)


def _with_none(made: Sequence[torch.Tensor], results: Sequence[tuple | None]) -> list[torch.Tensor | None]:
    rest = iter(made)
    return [None if result is None else next(rest) for result in results]


def record(function: Callable[..., tuple], tensors: tuple) -> Program | None:
    """Return what ``function`` allocates and launches for such tensors; None if it does anything else."""
    recording: list[tuple[Any, tuple]] = []
    given = [None if t is None else StandIn.of_tensor(recording, t) for t in tensors]
    try:
        made = function(*given)
        results = [None if x is None else _whole(x) for x in made]
        fills = [_fill(memory, recording) for memory in _new_memory(recording, results) if memory.fill is not None]
    except Unsupported:
        return None
    recording = fills + recording
    storages: list[Any] = [None if x is None else x.memory for x in given] + [memory for memory in results if memory]
    temporary = len(storages)
    offsets: dict[int, int] = {}
    temporary_bytes, constants = 0, []
    for memory in _new_memory(recording, []):
        if all(memory is not storage for storage in storages):
            offsets[id(memory)] = temporary_bytes
            temporary_bytes += cdiv(memory.nbytes(), _ALIGNMENT) * _ALIGNMENT

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
    device = next(x.device for x in given if x is not None)
    made_of = [None if memory is None else (memory.shape, memory.stride, memory.dtype) for memory in results]
    return Program(device, made_of, temporary_bytes, constants, launches)


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
