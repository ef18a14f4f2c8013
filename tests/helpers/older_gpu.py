"""Runs the library on the present GPU as it would run on an older one.

The driver of a newer NVIDIA GPU assembles PTX for an older target. So the kernels of an A100 (8.0), an RTX 3090 (8.6) or an
RTX 4090 (8.9) can be tested for correctness, and compared with other code for the same target, on an H100.
"""

import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from halo_tensor.fences import triton_launch
from halo_tensor.products import eager, eager_backward

#: compute capability -> bytes of shared memory that a program may use
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024}


def forget_plans() -> None:
    """Drop plans and kernels that were made for another GPU."""
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("halo_tensor.kernels")]
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, _lru_cache_wrapper):
            value.cache_clear()
    eager._lowered.clear()
    eager_backward._lowered.clear()
    for function in gc.get_objects():
        if issubclass(type(function), JITFunction):  # isinstance would follow a weak reference, which may be dead
            function.device_caches.clear()


@contextmanager
def running_as(capability: int) -> Iterator[None]:
    """Compile kernels for ``capability`` (80, 86 or 89), and plan as for such a GPU with this one's number of multiprocessors.

    Tested with Triton 3.6 to 3.8.

    Raises:
        RuntimeError: the present GPU is older than that.
    """
    if torch.cuda.get_device_capability() < divmod(capability, 10):
        raise RuntimeError(f"{torch.cuda.get_device_name()} does not run code for sm_{capability}")

    def ptx_as_binary(self, src, metadata, options, capability):
        return src.encode() + b"\0"  # the driver takes PTX where it takes a cubin

    with ExitStack() as stack:
        # In a separate cache, because its cubin files hold PTX.
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        patch = stack.enter_context
        patch(triton.knobs.cache.scope())
        triton.knobs.cache.dir = cache
        patch(mock.patch.object(CUDABackend, "make_cubin", ptx_as_binary))
        patch(mock.patch.object(driver.active, "get_current_target", return_value=GPUTarget("cuda", capability, 32)))
        patch(mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)))
        patch(mock.patch.object(triton_launch, "shared_memory", return_value=SHARED[capability]))
        forget_plans()
        try:
            yield
        finally:
            forget_plans()
