"""Launching Triton kernels at little cost: everything but the tensors is decided, and compiled, once per shape.

Triton's own dispatch looks at every argument of every call, which takes longer than the smaller kernels run.
"""

from typing import Any

import torch
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """In a compiled graph, where nothing was known of the pointer: of a copy if TMA cannot read ``base`` where it lies."""
    if base.data_ptr() % 16:
        base = torch.empty_strided(shape, strides, dtype=base.dtype, device=base.device).copy_(base)
    return TensorDescriptor(base, shape, strides, block)


class Launch:
    """A kernel with its grid, its integers and its compile-time constants.

    The kernel's signature must list tensors, then integers, then constants; ``constants`` may also hold Triton's options
    (num_warps, num_stages, enable_fp_fusion). Calling it with the tensors launches it on their device.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], integers: tuple[int, ...], constants: dict[str, Any]):
        self.kernel, self.integers, self.constants = kernel, integers, constants
        self.grid = (*grid, 1, 1)[:3]
        self._run: Any = None
        self._rest: tuple = ()

    def __call__(self, *tensors: Any) -> None:
        if 0 in self.grid:
            return
        first = tensors[0].base if isinstance(tensors[0], TensorDescriptor) else tensors[0]
        if not isinstance(first, torch.Tensor):  # a stand-in for one, in a graph that is being compiled
            return first.record(self, tensors)
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(tensors, device)
        return self._launch(tensors, device)

    def source(self) -> str:
        """An expression that makes this launch again, where the modules of kernels are imported."""
        function = self.kernel.fn
        return f"Launch({function.__module__}.{function.__name__}, {self.grid}, {self.integers}, {self.constants})"

    def _launch(self, tensors: tuple, device: torch.device) -> None:
        arguments, bits = [], 0
        for tensor in tensors:
            if not isinstance(tensor, TensorDescriptor):
                tensor = tensor.data_ptr()  # of a tensor, Triton would ask the driver whether the GPU can reach it
                bits |= tensor
            arguments.append(tensor)
        # A compiled kernel may count on pointers at multiples of 16 bytes. So do all that PyTorch allocates; a view may not.
        aligned = bits & 15 == 0
        if not (aligned and isinstance(self.kernel, JITFunction)):  # or Triton's interpreter
            self.kernel[self.grid](*tensors, *self.integers, **self.constants)
            return
        if self._run is None:
            compiled = self._compile(tensors, device)
            names = self.kernel.arg_names[len(tensors) + len(self.integers) :]
            self._rest = (*self.integers, *(self.constants[name] for name in names))
            self._run = compiled[self.grid]
        self._run(*arguments, *self._rest, stream=torch._C._cuda_getCurrentRawStream(device.index))

    def _compile(self, tensors: tuple, device: torch.device) -> Any:
        """With as many pipeline stages as there is shared memory for: launch tables were made on an H100, for bf16."""
        stages = "STAGES" if "STAGES" in self.constants else "num_stages"
        available = max_shared_mem(device.index)
        while True:
            compiled = self.kernel.warmup(*tensors, *self.integers, grid=self.grid, **self.constants)
            if compiled.metadata.shared <= available:
                return compiled
            if self.constants.get(stages, 1) == 1:
                raise RuntimeError(
                    f"{torch.cuda.get_device_name(device)} gives a kernel {available} bytes of shared memory, and "
                    f"{self.kernel.fn.__name__} needs {compiled.metadata.shared} for rows this wide: take a smaller "
                    "block_size, or weights in bfloat16"
                )
            self.constants = self.constants | {stages: self.constants[stages] - 1}
