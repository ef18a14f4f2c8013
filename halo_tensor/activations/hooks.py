"""Compress what eager code saves for backward, by hooks on saved tensors.

The hooks are active while the forward of a block runs, for example of a decoder layer: see :func:`watch`. Compiled code passes
them by (:mod:`halo_tensor.compiler.partition`).
"""

from collections.abc import Iterable, Iterator
from operator import methodcaller
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from halo_tensor.activations import choice
from halo_tensor.activations.choice import bits_of, is_mask, is_rectified, narrow_dtype
from halo_tensor.activations.packed import Kept, Mask, Narrow, Packed, Pool
from halo_tensor.activations.relu import HaloReLU
from halo_tensor.activations.state import state
from halo_tensor.fences.pytorch import (
    hook_forward,
    is_transformed,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    top_saved_tensors_hooks,
    unhook_forward,
)
from halo_tensor.recipe import Activations

#: The keys of the hooks of blocks, norms and max-poolings.
_KEYS = _BLOCK, _NORM, _POOLING = tuple(f"halo_tensor.{kind}" for kind in ("block", "norm", "pooling"))
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class _Hooks:
    """The hooks on saved tensors of one forward of a block."""

    def __init__(self, activations: Activations, outer: Any):
        self.activations, self.outer, self.pool = activations, outer, Pool()

    def pack(self, x: torch.Tensor) -> Packed | Kept | Mask | Narrow:
        """Return what is saved of ``x``."""
        if x.numel() < choice.FEWEST_ELEMENTS:  # as most are, such as the statistics of norms
            return Kept(x, self.outer)
        plane = state.planes[-1] if state.planes else None
        if is_mask(x, state.relus > 0, self.activations):
            return Mask(x, self.outer)
        if dtype := narrow_dtype(x, plane):
            return Narrow(x, dtype, self.outer)
        bits = bits_of(x, self.activations, state.norms > 0)
        if bits is None:
            return Kept(x, self.outer)
        rectified = plane is None and is_rectified(x)  # max pooling does not read the values of its input
        # Hooks around ours may match the tensors of two runs, so they are given every one.
        return self.pool.pack(x, bits, rectified) if self.outer is None else Packed(x, bits, self.outer, rectified)

    #: Returns the tensor of what :meth:`pack` returned.
    unpack = staticmethod(methodcaller("unpack"))


class Enter:
    """A hook before the forward of a block: from here on, what is saved is compressed.

    Args:
        activations: the bits of each kind of tensor.
    """

    def __init__(self, activations: Activations):
        self.activations = activations

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if is_compiling():
            return
        outer = top_saved_tensors_hooks()
        owner = getattr(outer and outer[0], "__self__", None)
        # Checkpointing saves nothing that is worth to be compressed, and matches the tensors of two runs.
        checkpointed = outer is not None and getattr(outer[0], "__module__", "") == "torch.utils.checkpoint"
        able = torch.is_grad_enabled() and not is_transformed()  # torch.func refuses hooks on saved tensors
        pushes = able and not isinstance(owner, _Hooks) and not checkpointed
        state.entered.append(pushes)
        if pushes:
            hooks = _Hooks(self.activations, outer)
            push_saved_tensors_hooks(hooks.pack, hooks.unpack)


def leave(module: nn.Module, args: tuple, output: Any) -> None:
    """Undo :class:`Enter` after the forward of a block, also if that has failed."""
    if not is_compiling() and state.entered and state.entered.pop():
        pop_saved_tensors_hooks()


def enter_norm(module: nn.Module, args: tuple) -> None:
    """Note that a norm runs."""
    if not is_compiling():
        state.norms += 1


def leave_norm(module: nn.Module, args: tuple, output: Any) -> None:
    """Note that a norm has run."""
    if not is_compiling():
        state.norms -= 1


def enter_pooling(module: nn.Module, args: tuple) -> None:
    """Note that a max pooling runs."""
    if not is_compiling():
        state.planes.append(args[0].shape[-1] * args[0].shape[-2] if args and args[0].ndim > 1 else None)


def leave_pooling(module: nn.Module, args: tuple, output: Any) -> None:
    """Note that a max pooling has run."""
    if not is_compiling() and state.planes:
        state.planes.pop()


def watch(model: nn.Module, layers: Iterable[tuple[str, Activations | None]]) -> list[str]:
    """Install the hooks of the blocks that contain these layers, in place of hooks that were installed before. Their ReLUs
    become :class:`~halo_tensor.activations.relu.HaloReLU`.

    A block is the outermost module around a layer that stands in a ModuleList, a Sequential or a ModuleDict. A layer that is
    in none, or whose recipe says so, has the whole model as its block.

    Args:
        model: whose modules get hooks.
        layers: names of converted layers, each with what its recipe says.

    Returns:
        The names of the blocks.
    """
    for module in model.modules():
        for key in _KEYS:
            unhook_forward(module, key)
        if type(module) is HaloReLU:
            module.__class__ = nn.ReLU  # type: ignore[assignment]
    blocks: dict[str, Activations] = {}
    for name, activations in layers:
        if activations is not None:
            blocks.setdefault("" if activations.whole else block_of(model, name), activations)
    for name, activations in blocks.items():
        block = model.get_submodule(name)
        hook_forward(block, _BLOCK, Enter(activations), leave)
        for module in block.modules():
            for key, enter, leave_it in _hooks_of(module, activations):
                hook_forward(module, key, enter, leave_it)
            if type(module) is nn.ReLU:
                module.__class__ = HaloReLU
    return list(blocks)


def _hooks_of(module: nn.Module, activations: Activations) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys of hooks, and the hooks before and after the forward of a module in a block."""
    if activations.norms != activations.inner and _is_norm(module):
        yield _NORM, enter_norm, leave_norm
    if activations.whole and type(module) is nn.MaxPool2d:
        yield _POOLING, enter_pooling, leave_pooling


def block_of(model: nn.Module, layer: str) -> str:
    """Return the name of the block around a layer; "" for the whole model."""
    parent, path = model, layer.split(".")
    for depth, name in enumerate(path[:-1]):
        child = parent.get_submodule(name)
        if isinstance(parent, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            return ".".join(path[: depth + 1])
        parent = child
    return ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
