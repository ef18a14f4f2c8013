"""Launching Triton kernels at little cost: everything but the tensors is decided, and compiled, once per shape.

Triton's own dispatch looks at every argument of every call, which takes longer than the smaller kernels run. What is left
here is to look at pointers.
"""

from contextlib import nullcontext
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton import JITFunction, OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from halo_tensor.fences import triton_launch
from halo_tensor.fences.fast_paths import LAUNCHER, PRECOMPILED, Refusal
from halo_tensor.fences.pytorch import current_device, current_raw_stream

_DATA_PTR = torch.Tensor.data_ptr
#: Triton's default until 3.9, which 3.10 turns round; 3.9 warns of a kernel that does not say.
_DEFAULTS = {"enable_fp_fusion": True}


class Tiles(NamedTuple):
    """How a kernel reads a matrix through a descriptor, which is TMA where the GPU has it: in blocks of a shape."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    block: tuple[int, int]

    def of(self, base: torch.Tensor, gluon: bool = False) -> Any:
        """Of a copy if TMA cannot read ``base`` where it lies: in a compiled graph nothing is known of pointers. ``gluon``:
        for a kernel that says itself how tiles lie in shared memory."""
        if base.data_ptr() % 16:
            base = torch.empty_strided(self.shape, self.strides, dtype=base.dtype, device=base.device).copy_(base)
        if gluon:
            from halo_tensor.fences.gluon import descriptor

            return descriptor(base, *self)
        return TensorDescriptor(base, [*self.shape], [*self.strides], [*self.block])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; on a CPU, where Triton's interpreter runs it, those of an RTX 4090."""
    if device.type != "cuda":
        return 99 * 1024
    return triton_launch.shared_memory(torch.cuda.current_device() if device.index is None else device.index)


class Launch:
    """A kernel with its grid, its integers and its compile-time constants.

    The kernel's signature must list tensors, then integers, then constants; ``constants`` may also hold Triton's options
    (num_warps, num_stages, enable_fp_fusion). The first tensors are read through descriptors, one for each of ``tiles``.
    Calling it with the tensors launches it on their device.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: tuple[int, ...],
        constants: dict[str, Any],
        tiles: tuple[Tiles, ...] = (),
    ):
        self.kernel, self.integers, self.constants = kernel, integers, constants
        self.tiles = tuple(Tiles(*tile) for tile in tiles)
        self.grid = (*grid, 1, 1)[:3]
        self._gluon = isinstance(kernel, JITFunction) and kernel.is_gluon()
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        if 0 in self.grid:
            return
        first = tensors[0]
        if not isinstance(first, torch.Tensor):  # a stand-in for one, in a graph that is being compiled
            return first.record(self, tensors)
        index = first.get_device()
        if index >= 0 and index != current_device():
            with torch.cuda.device(index):
                return self._launch(tensors, index)
        return self._launch(tensors, index)

    def source(self) -> str:
        """An expression that makes this launch again, where the modules of kernels are imported."""
        function = self.kernel.fn
        tiles = tuple(tuple(tile) for tile in self.tiles)
        return f"Launch({function.__module__}.{function.__name__}, {self.grid}, {self.integers}, {self.constants}, {tiles})"

    def _launch(self, tensors: tuple, index: int) -> None:
        pointers = [*map(_DATA_PTR, tensors)]  # of a tensor, Triton would ask the driver whether the GPU can reach it
        # A compiled kernel may count on pointers at multiples of 16 bytes. So do all that PyTorch allocates; a view may not.
        if reduce(or_, pointers) & 15 or not isinstance(self.kernel, JITFunction):  # or Triton's interpreter
            return self._launch_any(self._described(tensors))
        stream = current_raw_stream(index)
        if self._run is None:
            return self._launch_first(tensors, pointers, index, stream)
        self._run(tensors, pointers, stream)

    def _launch_first(self, tensors: tuple, pointers: list[int], index: int, stream: int) -> None:
        """The first launch, which decides how the others are made."""
        how = PRECOMPILED.attempt(self._precompiled, tensors, index)
        launch = (how and PRECOMPILED.attempt(triton_launch.through_triton, *how)) or self._by_triton

        def launched_bare(*how: Any) -> triton_launch.Run:
            run = triton_launch.bare(launch, *how)
            run(tensors, pointers, stream)  # arguments that the C function does not take it refuses before it launches
            return run

        bare = how and LAUNCHER.attempt(launched_bare, *how)
        if bare is None:
            launch(tensors, pointers, stream)
        self._run = bare or launch

    def _precompiled(self, tensors: tuple, index: int) -> tuple:
        """The compiled kernel, and what else :func:`triton_launch.through_triton` wants."""
        compiled = self._compile(self._described(tensors), index)
        names = self.kernel.arg_names[len(tensors) + len(self.integers) :]
        rest = (*self.integers, *(self.constants[name] for name in names))
        return compiled, self.grid, self._descriptors, len(self.tiles), rest

    def _by_triton(self, tensors: tuple, pointers: list[int], stream: int) -> None:
        """A launch by Triton's own dispatch."""
        self._launch_any(self._described(tensors))

    def compile(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
        """Compile for tensors of these dtypes, which lie at multiples of 16 bytes, before there are any."""
        tensors = tuple(torch.empty(16, dtype=dtype, device=device) for dtype in dtypes)
        index = tensors[0].get_device()
        with nullcontext() if index == current_device() else torch.cuda.device(index):
            self._compile(self._described(tensors), index)

    def _descriptors(self, tensors: tuple) -> list:
        """Of the first tensors, one for each of ``tiles``."""
        return [tile.of(tensor, self._gluon) for tile, tensor in zip(self.tiles, tensors, strict=False)]

    def _described(self, tensors: tuple) -> list:
        return [*self._descriptors(tensors), *tensors[len(self.tiles) :]]

    def _launch_any(self, arguments: list) -> None:
        while True:
            constants = self.constants
            try:
                return self.kernel[self.grid](*arguments, *self.integers, **_DEFAULTS | constants)
            except OutOfResources as error:
                if error.name != "shared memory":
                    raise
                self.constants = self._with_less(constants, error.required, error.limit, torch.cuda.get_device_name())

    def _compile(self, arguments: list, index: int) -> Any:
        available = triton_launch.shared_memory(index)
        while True:
            constants = self.constants  # which another thread may change
            compiled = self.kernel.warmup(*arguments, *self.integers, grid=self.grid, **_DEFAULTS | constants)
            if compiled.metadata.shared <= available:
                return compiled
            self.constants = self._with_less(constants, compiled.metadata.shared, available, torch.cuda.get_device_name(index))

    def _with_less(self, constants: dict[str, Any], needed: int, available: int, device: str) -> dict[str, Any]:
        """As many pipeline stages as there is shared memory for: launch tables were made on an H100, for bf16."""
        stages = "STAGES" if "STAGES" in constants else "num_stages"
        if constants.get(stages, 1) == 1:
            raise Refusal(
                f"{device} gives a kernel {available} bytes of shared memory, and {self.kernel.fn.__name__} needs {needed} "
                "for rows this wide: take a smaller block_size, or weights in bfloat16"
            )
        return constants | {stages: constants[stages] - 1}
