"""What torch.compile does with the ops. Everything here is written against private names of PyTorch, and is a fast path that
can be switched off (:mod:`halo_tensor.fences.fast_paths`)."""

import torch

from halo_tensor.fences.fast_paths import INDUCTOR, JOINT_GRAPH, disabled
from halo_tensor.fences.pytorch import is_compiled
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops import implementations
from halo_tensor.version import fingerprint


def prepare(device: torch.device) -> None:
    """Teach Inductor the ops, and install the passes over graphs. It is called when an op is traced, and not before: importing
    Inductor takes seconds."""
    if runs_kernels(device):
        _tag_caches()
        INDUCTOR.load("halo_tensor.compiler.inductor")
    if JOINT_GRAPH.attempt(is_compiled) and (joint_graph := JOINT_GRAPH.load("halo_tensor.compiler.joint_graph")):
        JOINT_GRAPH.attempt(joint_graph.install)


def _tag_caches() -> None:
    """Graphs are cached on disk, with the launches of these sources. To be called in the thread that compiles: torch's
    configuration is each thread's own."""
    tag = " ".join(("", f"halo_tensor:{fingerprint()}", *disabled()))
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


implementations.WHEN_TRACED.append(prepare)
