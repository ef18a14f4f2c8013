"""A small model, its shards by FSDP2, and what collectives bring."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from halo_tensor import HadamardQuantTensor, HaloWeight, quantize_

# Width and output features. 96 rows are shared out evenly among 2 and 3 ranks, 131 are not, 128 not among 3.
EVEN, MIXED, UNEVEN = (96, 6), (96, 131), (128, 131)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.checkpointed = False

    def forward(self, x):
        if self.checkpointed:
            return x + checkpoint(self._branch, x, use_reentrant=False)
        return x + self._branch(x)

    def _branch(self, x):
        return self.down(nn.functional.silu(self.up(self.norm(x))))


def make(config, size=EVEN, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(1)
    width, out = size
    model = nn.Sequential(Mlp(width, 2 * width), nn.Linear(width, out)).to(dtype)
    if config is not None:
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return model


def shard(model: nn.Module, **options) -> nn.Module:
    for layer in model:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


class Traffic(TorchDispatchMode):
    """Counts what collectives bring: bytes all-gathered, and calls by name."""

    def __init__(self):
        super().__init__()
        self.gathered, self.calls = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (HadamardQuantTensor, HaloWeight, DTensor)) for t in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls.append(func._opname)
            if func._opname == "_allgather_base_":
                self.gathered += args[0].nbytes
        return func(*args, **(kwargs or {}))
