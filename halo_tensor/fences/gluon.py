"""The names of Gluon that :mod:`halo_tensor.kernels.matmul.sm90` uses. Tested with Triton 3.6 to 3.9.

Gluon is experimental, and names change. ``tma.async_copy_global_to_shared`` became ``async_load`` in Triton 3.8
(https://github.com/triton-lang/triton/pull/10083), and in 3.9 the old name is an error
(https://github.com/triton-lang/triton/pull/11112).
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_CODES = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}


@lru_cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([*block], _CODES[dtype])


def descriptor(base: torch.Tensor, extent: tuple[int, int, int], block: tuple[int, int]) -> TensorDescriptor:
    """Return a descriptor for Gluon's kernels, which also has the layout of a tile in shared memory. ``extent``: rows, columns
    and row stride."""
    rows, columns, stride = extent
    return TensorDescriptor(base, [rows, columns], [stride, 1], [*block], _layout(block, base.dtype))


__all__ = [
    "TensorDescriptor",
    "async_load",
    "descriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
