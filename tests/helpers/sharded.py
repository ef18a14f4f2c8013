"""A small model, its shards by FSDP2, training them, and what collectives bring."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
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


def alone(model: nn.Module, steps: Iterable[Sequence], loss_of: Callable[[nn.Module, Any], torch.Tensor]) -> list[float]:
    """Losses of a single process that does the ranks' work one after the other. Only rank 0 does it.

    Args:
        model: which AdamW trains.
        steps: for each step, the batch of each rank.
        loss_of: the loss of a model on a batch.
    """
    if dist.get_rank():
        return []
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for batches in steps:
        optimizer.zero_grad()
        each = [loss_of(model, batch) for batch in batches]
        for loss in each:
            loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= len(batches)
        optimizer.step()
        losses.append(sum(loss.item() for loss in each) / len(batches))
    return losses


def together(
    model: nn.Module,
    steps: Iterable[Sequence],
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    after_step: Callable[[nn.Module], object] = lambda model: None,
) -> list[float]:
    """As :func:`alone`, of a sharded model: each rank takes its batch. The losses are the mean of all ranks'."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for batches in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batches[dist.get_rank()])
        loss.backward()
        optimizer.step()
        after_step(model)
        losses.append(loss.item())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    return [sum(each) / len(everyone) for each in zip(*everyone, strict=True)]


def broadcast(value):
    """What rank 0 passes, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


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
