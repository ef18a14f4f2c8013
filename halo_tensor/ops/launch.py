"""Launching Triton kernels at little cost: everything but the tensors is decided, and compiled, once per shape.

Triton's own dispatch looks at every argument of every call, which takes longer than the smaller kernels run.
"""

from typing import Any

import torch
from triton.runtime.jit import JITFunction


class Launch:
    """A kernel with its grid, its integers and its compile-time constants.

    The kernel's signature must list tensors, then integers, then constants; ``constants`` may also hold Triton's options
    (num_warps, num_stages, enable_fp_fusion). Calling it with the tensors launches it on their device.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], integers: tuple[int, ...], constants: dict[str, Any]):
        self.kernel, self.integers, self.constants = kernel, integers, constants
        self.grid = (*grid, 1, 1)[:3]
        self._compiled: Any = None
        self._values: tuple = ()

    def __call__(self, *tensors: Any) -> None:
        if 0 in self.grid:
            return
        device = _base(tensors[0]).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(tensors)
        return self._launch(tensors)

    def _launch(self, tensors: tuple) -> None:
        # A compiled kernel may count on pointers at multiples of 16 bytes. So do all that PyTorch allocates; a view may not.
        aligned = all(_base(t).data_ptr() % 16 == 0 for t in tensors)
        if not (aligned and isinstance(self.kernel, JITFunction)):  # or Triton's interpreter
            self.kernel[self.grid](*tensors, *self.integers, **self.constants)
            return
        if self._compiled is None:
            self._compiled = self.kernel.warmup(*tensors, *self.integers, grid=self.grid, **self.constants)
            names = self.kernel.arg_names[len(tensors) + len(self.integers) :]
            self._values = tuple(self.constants[name] for name in names)
        self._compiled[self.grid](*tensors, *self.integers, *self._values)


def _base(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "base", tensor)  # of a tensor descriptor
