"""torch.distributed.pipelining: each rank has a part of the layers, and converts it.

torchrun --standalone --nproc-per-node 2 examples/hosts/with_pipeline.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from halo_tensor import halo_config, quantize_

WIDTH = 128


def layer() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def layers(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [layer() for _ in range(count)]


def main(words: list[str] | None = None) -> tuple[nn.Module, list[float]]:
    parser = argparse.ArgumentParser()
    for name, default in (("--layers", 4), ("--microbatches", 4), ("--steps", 3)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, world = dist.get_rank(), dist.get_world_size()

    share = args.layers // world
    part = nn.Sequential(*layers(args.layers)[rank * share : (rank + 1) * share]).to(device)
    quantize_(part, halo_config(level=1, dtype="int8"), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3)
    schedule = Schedule1F1B(PipelineStage(part, rank, world, device), args.microbatches, loss_fn=nn.functional.mse_loss)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(args.steps):
        x, target = torch.randn(2, 16 * args.microbatches, WIDTH, generator=generator).to(device)  # put your data here
        each: list[torch.Tensor] = []
        inputs = (x,) if rank == 0 else ()
        schedule.step(*inputs, target=target if rank == world - 1 else None, losses=each)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in each) / args.microbatches)
    return part, losses


if __name__ == "__main__":
    print(main()[1])
    dist.destroy_process_group()
