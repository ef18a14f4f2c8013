"""Teach ``torch.compile`` the ops.

Everything here uses private names of PyTorch. Each module is a fast path that can be switched off, and falls back if it cannot
be prepared (:mod:`halo_tensor.fences.fast_paths`).
"""

from types import ModuleType

import torch

from halo_tensor.fences.fast_paths import INDUCTOR, JOINT_GRAPH, SAVED, disabled
from halo_tensor.fences.pytorch import is_compiled
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.register import WHEN_TRACED
from halo_tensor.version import fingerprint


def prepare(device: torch.device) -> None:
    """Register the lowerings of the ops with Inductor and install the passes over graphs.

    It is called whenever an op is traced, and not on import: importing Inductor takes seconds. The thread that compiles calls
    it, for every graph, since torch's configuration belongs to a thread and may have been replaced.
    """
    if runs_kernels(device):
        _tag_caches()
        INDUCTOR.load("halo_tensor.compiler.inductor")
    if JOINT_GRAPH.attempt(is_compiled) and (joint_graph := JOINT_GRAPH.load("halo_tensor.compiler.joint_graph")):
        JOINT_GRAPH.attempt(joint_graph.install)


def loaded_partition() -> ModuleType | None:
    """Return :mod:`halo_tensor.compiler.partition` while a graph is compiled, else None."""
    return SAVED.load("halo_tensor.compiler.partition") if is_compiled() else None


def _tag_caches() -> None:
    """Add the sources of this library, and the paths that are off, to the key of graphs that are cached on disk.

    Generated code contains launches of kernels, but the key has only names of custom ops:
    https://github.com/pytorch/pytorch/issues/144344 (torch 2.11 to 2.15).
    """
    tag = " ".join(("", f"halo_tensor:{fingerprint()}", *disabled()))
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


WHEN_TRACED.append(prepare)
