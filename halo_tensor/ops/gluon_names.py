"""The names of Triton's Gluon that :mod:`halo_tensor.ops.hopper` uses. Tested with Triton 3.6 to 3.9.

Gluon is experimental, and renames things: ``tma.async_copy_global_to_shared`` became ``async_load`` in Triton 3.8, and in 3.9
the old name is an error.
"""

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

__all__ = [
    "TensorDescriptor",
    "async_load",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
