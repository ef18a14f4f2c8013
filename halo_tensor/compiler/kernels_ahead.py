"""Compile the kernels of a graph while PyTorch still compiles the rest of it.

A graph's kernels would be compiled one after the other, at their first launches. Here the bodies of its ops run on stand-ins
as soon as the graph of forward and backward was traced, and threads compile what they launch.

Private API: ``hint`` of a symbolic size's node. Tested with torch 2.11 to 2.13.
"""

from functools import partial
from typing import Any

import torch
from torch import fx

from halo_tensor.kernels import ahead
from halo_tensor.kernels.launch import SizedLaunch
from halo_tensor.kernels.stand_ins import Memory, StandIn
from halo_tensor.ops.register import body_of

#: The ops whose bodies do nothing but launch.
_OPS = {
    getattr(torch.ops.halo, name).default: name
    for name in ("rotate_quantize", "quantize_both", "quantize_pair", "quantize_pairs", "scaled_mm", "rotate", "unrotate")
}


def start(nodes: list[fx.Node]) -> None:
    """Start to compile the kernels that the ops of this library among ``nodes`` launch."""
    for name, arguments in dict.fromkeys(_call(node) for node in nodes if node.target in _OPS):
        ahead.start(partial(_compile, name, arguments))


def _call(node: fx.Node) -> tuple[str, tuple]:
    """Return the name of an op and its arguments, with a description of each tensor in place of it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return _OPS[node.target], tuple(map(_described, node.args))


def _described(x: Any) -> Any:
    if isinstance(x, fx.Node):
        x = x.meta["val"]
    if isinstance(x, torch.Tensor):
        return tuple(map(_number, x.shape)), tuple(map(_number, x.stride())), x.dtype, x.device
    return tuple(map(_described, x)) if isinstance(x, list | tuple) else _number(x)


def _number(n: Any) -> Any:
    """Return the number that a symbol has in the batch that is traced. It chooses a kernel, and adds no guard."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


def _compile(name: str, arguments: tuple) -> None:
    """Run the body of an op on stand-ins, and have other threads compile what it launches."""
    recording: list[tuple] = []
    body_of(name)(*(_stand_in(recording, x) for x in arguments))
    for launch, tensors in recording:
        if isinstance(launch, SizedLaunch):
            launch.ahead(tensors[0].device, tuple(x.dtype for x in tensors))


def _stand_in(recording: list[tuple], x: Any) -> Any:
    if isinstance(x, tuple) and len(x) == 4 and isinstance(x[3], torch.device):
        return StandIn(recording, Memory(*x, given=True))
    return x
