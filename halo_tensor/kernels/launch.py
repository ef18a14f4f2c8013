"""Launch Triton kernels at little cost: kernels are compiled without sizes, and each launch brings its own.

Triton's own dispatch looks at every argument of every call, which takes longer than the smaller kernels run. A launch here
only looks at pointers. Neither plans nor compiled kernels depend on a number of tokens: see :class:`Planned`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton import JITFunction, OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from halo_tensor.fences import triton_launch
from halo_tensor.fences.fast_paths import AHEAD, LAUNCHER, PRECOMPILED, Refusal
from halo_tensor.fences.pytorch import current_device, current_raw_stream
from halo_tensor.kernels import ahead

_DATA_PTR = torch.Tensor.data_ptr
#: Triton's default until 3.9. Version 3.10 changes the default, and 3.9 warns of kernels that do not set the option.
_DEFAULTS = {"enable_fp_fusion": True}
#: Added to the kind of an integer that takes 64 bits.
_WIDE = 64
#: For this many numbers a plan remembers the sizes.
_REMEMBERED = 1024


class Sizes(NamedTuple):
    """The numbers that differ between launches of one kernel. :meth:`Launch.sizes` makes them.

    Attributes:
        grid: the numbers of programs.
        integers: the kernel's.
        extents: rows, columns and row stride of each matrix that is read through a descriptor.
        kinds: what the kernel is compiled for, of each integer: see :meth:`Launch.sizes`.
    """

    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    extents: tuple[tuple[int, int, int], ...]
    kinds: tuple[int, ...]


def describe(base: torch.Tensor, extent: tuple[int, int, int], block: tuple[int, int], gluon: bool = False) -> Any:
    """Return a descriptor with which a kernel reads blocks of ``base``, by TMA where the GPU has it.

    TMA reads from multiples of 16 bytes only. Compiled graphs may pass other pointers; then the descriptor is of a copy.

    Args:
        extent: rows, columns and row stride.
        block: the shape of a block.
        gluon: whether the kernel is written in Gluon, and so needs the layout of blocks in shared memory.
    """
    rows, columns, stride = extent
    if base.data_ptr() % 16:
        base = torch.empty_strided((rows, columns), (stride, 1), dtype=base.dtype, device=base.device).copy_(base)
    if gluon:
        from halo_tensor.fences.gluon import descriptor

        return descriptor(base, extent, block)
    return TensorDescriptor(base, [rows, columns], [stride, 1], [*block])


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own function takes microseconds."""
    return -(-a // b)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have; on a CPU, for Triton's interpreter, those of an RTX 4090."""
    if device.type != "cuda":
        return 99 * 1024
    return triton_launch.shared_memory(torch.cuda.current_device() if device.index is None else device.index)


class Launch:
    """A kernel with its compile-time constants, for tensors of some dtypes on one device.

    Calling it with :class:`Sizes` and tensors launches it. It is compiled once for each of ``kinds`` of its integers.

    Args:
        kernel: its signature must list tensors, then integers, then constants. Integers with names in capitals are sizes, and
            may be numbers of tokens; the others are strides.
        constants: may also hold Triton's options (num_warps, num_stages, enable_fp_fusion).
        blocks: the shapes of blocks of the first tensors, which are read through descriptors.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], blocks: tuple[tuple[int, int], ...] = ()):
        self.kernel, self.constants, self.blocks = kernel, constants, blocks
        self._compiles = isinstance(kernel, JITFunction)  # or it is Triton's interpreter's
        self._gluon = self._compiles and kernel.is_gluon()
        self._parameters = [p for p in kernel.params if not p.is_constexpr] if self._compiles else []
        self._runs: dict[tuple[int, ...], triton_launch.Run] = {}

    def sizes(self, grid: tuple[int, ...], integers: tuple[int, ...], extents: tuple[tuple[int, int, int], ...] = ()) -> Sizes:
        """Return the sizes that a call takes.

        ``kinds`` says what the kernel is compiled for: 16 for an integer that is a multiple of 16, so that whole vectors are
        loaded and stored; 1 for a stride of 1; 0 for other integers, and for those that the kernel lists in
        ``do_not_specialize``. So there are two kinds of numbers of tokens, and 1 is of the same kind as any other odd number.
        """
        x, y, z = (*grid, 1, 1)[:3]
        return Sizes((x, y, z), integers, extents, tuple(map(_kind, integers, self._parameters[-len(integers) :])))

    def sized(self, *args: Any) -> "SizedLaunch":
        """Return a launch with the :meth:`sizes` of these arguments."""
        return SizedLaunch(self, self.sizes(*args))

    def __call__(self, sizes: Sizes, *tensors: Any) -> None:
        if 0 in sizes.grid:
            return
        first = tensors[0]
        if not isinstance(first, torch.Tensor):  # a stand-in for one, in a graph that is being compiled
            return first.record(SizedLaunch(self, sizes), tensors)
        index = first.get_device()
        if index >= 0 and index != current_device():
            with torch.cuda.device(index):
                return self._launch(sizes, tensors, index)
        return self._launch(sizes, tensors, index)

    def _launch(self, sizes: Sizes, tensors: tuple, index: int) -> None:
        pointers = [*map(_DATA_PTR, tensors)]  # of a tensor, Triton would ask the driver whether the GPU can reach it
        # A compiled kernel may count on pointers at multiples of 16 bytes. So do all that PyTorch allocates; a view may not.
        if reduce(or_, pointers) & 15 or not self._compiles:
            return self._by_triton(sizes, tensors)
        stream = current_raw_stream(index)
        run = self._runs.get(sizes.kinds)
        if run is None:
            return self._launch_first(sizes, tensors, pointers, index, stream)
        run(sizes, tensors, pointers, stream)

    def _launch_first(self, sizes: Sizes, tensors: tuple, pointers: list[int], index: int, stream: int) -> None:
        """Launch for the first time with these kinds of integers, and decide how later launches are made."""
        how = PRECOMPILED.attempt(self._precompiled, sizes, tensors, index)
        launch = (how and PRECOMPILED.attempt(triton_launch.through_triton, *how)) or self._by_triton

        def launched_bare(*how: Any) -> triton_launch.Run:
            run = triton_launch.bare(launch, *how)
            run(sizes, tensors, pointers, stream)  # arguments that the C function does not take it refuses before it launches
            return run

        bare = how and LAUNCHER.attempt(launched_bare, *how)
        if bare is None:
            launch(sizes, tensors, pointers, stream)
        self._runs[sizes.kinds] = bare or launch

    def _precompiled(self, sizes: Sizes, tensors: tuple, index: int) -> tuple:
        """Return the arguments of :func:`triton_launch.through_triton`, the first of which is the compiled kernel."""
        compiled = self._compile(tensors, sizes, index)
        names = self.kernel.arg_names[len(tensors) + len(sizes.integers) :]
        dtypes = tuple(t.dtype for t in tensors[: len(self.blocks)])
        return compiled, self._descriptors, dtypes, tuple(self.constants[name] for name in names)

    def bound(self, sizes: Sizes) -> triton_launch.Bound | None:
        """Return this launch with its sizes as a call of Triton's C function, for pointers at multiples of 16. None before the
        first launch with such sizes, and where that function does not launch it."""
        run = self._runs.get(sizes.kinds)
        return run.bound(sizes) if isinstance(run, triton_launch.Bare) else None

    @property
    def compiles(self) -> bool:
        """Whether the kernel is compiled before it is launched: neither Triton's interpreter nor its own dispatch runs it."""
        return self._compiles and PRECOMPILED.why_off() is None

    def compile(self, device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: Sizes) -> None:
        """Compile for tensors of these dtypes, which lie at multiples of 16 bytes, before there are any."""
        # On the CPU, since a thread that compiles must not allocate while another one captures a CUDA graph.
        tensors = tuple(torch.empty(16, dtype=dtype, device="cpu") for dtype in dtypes)
        index = current_device() if device.index is None else device.index
        with nullcontext() if index == current_device() else torch.cuda.device(index):
            self._compile(tensors, sizes, index)

    def _descriptors(self, sizes: Sizes, tensors: tuple) -> list:
        """Return a descriptor of each of the first tensors, one for each of ``blocks``."""
        described = zip(tensors, sizes.extents, self.blocks, strict=False)
        return [describe(*tensor, self._gluon) for tensor in described]

    def _described(self, sizes: Sizes, tensors: tuple) -> list:
        return [*self._descriptors(sizes, tensors), *tensors[len(self.blocks) :]]

    def _by_triton(self, sizes: Sizes, tensors: tuple, pointers: list[int] | None = None, stream: int = 0) -> None:
        """Launch by Triton's own dispatch."""
        arguments = *self._described(sizes, tensors), *sizes.integers
        while True:
            constants = self.constants
            try:
                return self.kernel[sizes.grid](*arguments, **_DEFAULTS | constants)
            except OutOfResources as error:
                if error.name != "shared memory":
                    raise
                self.constants = self._with_less(constants, error.required, error.limit, torch.cuda.get_device_name())

    def _compile(self, tensors: tuple, sizes: Sizes, index: int) -> Any:
        """Return the kernel compiled for such tensors. Threads that want the same one do not compile it twice."""
        what = id(self.kernel), repr(self.constants), self.blocks, tuple(t.dtype for t in tensors), sizes.kinds, index
        return ahead.one_at_a_time(what, partial(self._warmed_up, self._described(sizes, tensors), sizes, index))

    def _warmed_up(self, arguments: list, sizes: Sizes, index: int) -> Any:
        available = triton_launch.shared_memory(index)
        # A size of 1, which Triton would make a constant, is to be any other odd number.
        integers = [17 if n == 1 and kind == 0 else n for n, kind in zip(sizes.integers, sizes.kinds, strict=True)]
        while True:
            constants = self.constants  # which another thread may change
            compiled = self.kernel.warmup(*arguments, *integers, grid=sizes.grid, **_DEFAULTS | constants)
            if compiled.metadata.shared <= available:
                return compiled
            self.constants = self._with_less(constants, compiled.metadata.shared, available, torch.cuda.get_device_name(index))

    def _with_less(self, constants: dict[str, Any], needed: int, available: int, device: str) -> dict[str, Any]:
        """Return constants with one pipeline stage less. Launch tables are for bf16 on an H100, which has more memory."""
        stages = "STAGES" if "STAGES" in constants else "num_stages"
        if constants.get(stages, 1) == 1:
            raise Refusal(
                f"{device} gives a kernel {available} bytes of shared memory, and {self.kernel.fn.__name__} needs {needed} "
                "for rows this wide: take a smaller block_size, or weights in bfloat16"
            )
        return constants | {stages: constants[stages] - 1}


def _kind(integer: int, parameter: Any) -> int:
    """Return what a kernel is compiled for, of one integer: see :meth:`Launch.sizes`."""
    wide = _WIDE if integer >= 2**31 else 0
    if parameter.do_not_specialize:
        return wide
    if integer == 1 and not parameter.name.isupper():
        return 1
    return 16 + wide if integer % 16 == 0 else wide


class SizedLaunch:
    """A launch together with its sizes. Compiled graphs call it with tensors only."""

    def __init__(self, launch: Launch, sizes: Sizes):
        self.launch, self.sizes = launch, sizes

    @property
    def constants(self) -> dict[str, Any]:
        return self.launch.constants

    def __call__(self, *tensors: Any) -> None:
        self.launch(self.sizes, *tensors)

    def ahead(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> "SizedLaunch":
        """Return this launch, and compile its kernel in another thread: see :meth:`Launch.compile`."""
        if self.launch.compiles and AHEAD.why_off() is None:
            ahead.start(partial(self.launch.compile, device, dtypes, self.sizes))
        return self

    def bound(self) -> triton_launch.Bound | None:
        """Return :meth:`Launch.bound` with these sizes."""
        return self.launch.bound(self.sizes)

    @property
    def module(self) -> str:
        """The module that :meth:`source` needs."""
        return self.launch.kernel.fn.__module__

    def source(self) -> str:
        """Return an expression that makes this launch again, in code that imports :attr:`module`."""
        function, (grid, integers, extents, _) = self.launch.kernel.fn, self.sizes
        kernel = f"{function.__module__}.{function.__name__}"
        return f"Launch({kernel}, {self.launch.constants}, {self.launch.blocks}).sized({grid}, {integers}, {extents})"


class Variant(NamedTuple):
    """The launch for one class of sizes.

    Attributes:
        launch: a :class:`Launch`, or what is called like one.
        sizes: of the numbers of a :class:`Planned`, the arguments of :meth:`Launch.sizes`.
        matrices: the tensors that the kernel takes last; None for one that it does not read.
    """

    launch: Any
    sizes: Callable[..., tuple]
    matrices: tuple[torch.Tensor | None, ...] = ()


class Planned:
    """The launches of one kernel for any sizes. Numbers of tokens are arguments, and only their class is planned for.

    A call takes ``numbers``, then the tensors of the kernel without the matrices of its variant. None stands for a tensor that
    the kernel does not read.

    Args:
        prepare: makes the variant of a class of sizes, when the first launch of that class is made.
        classify: returns the class of ``numbers``; without it, all are of one class.
    """

    def __init__(self, prepare: Callable[[Any], Variant], classify: Callable[..., Any] | None = None):
        self._prepare, self._classify = prepare, classify
        self.variants: dict[Any, Variant] = {}
        # What follows from numbers by arithmetic, since they recur. Nothing is compiled for them.
        self._remembered: dict[tuple[int, ...], tuple[Any, Any, tuple]] = {}

    def __call__(self, numbers: tuple[int, ...], *tensors: Any) -> None:
        launch, sizes, matrices = self._remembered.get(numbers) or self._remember(numbers)
        first = tensors[0]
        launch(sizes, *[first if t is None else t for t in (*tensors, *matrices)])  # any pointer for what is not there

    def variant(self, numbers: tuple[int, ...]) -> Variant:
        """Return the launch for these numbers."""
        size = None if self._classify is None else self._classify(*numbers)
        if size not in self.variants:
            new = self._prepare(size)
            alike = (v for v in self.variants.values() if _alike(v.launch, new.launch))
            self.variants[size] = next(alike, new)
        return self.variants[size]

    def _remember(self, numbers: tuple[int, ...]) -> tuple[Any, Any, tuple]:
        launch, sizes, matrices = self.variant(numbers)
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        found = self._remembered[numbers] = launch, launch.sizes(*sizes(*numbers)), matrices
        return found


def _alike(a: Any, b: Any) -> bool:
    """Whether two classes of sizes have the same launch."""
    return isinstance(a, Launch) and isinstance(b, Launch) and a.kernel is b.kernel and a.constants == b.constants
