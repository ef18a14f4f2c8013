"""DistributedDataParallel, compiled, with a Hugging Face model.

torchrun --standalone --nproc-per-node 2 examples/hosts/with_ddp.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from halo_tensor import halo_config, quantize_


def main(words: list[str] | None = None) -> tuple[DistributedDataParallel, list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--bucket", type=float, default=25, help="MB of gradients that are sent together")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)

    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    quantize_(model, halo_config(level=1, dtype="int8"))  # before DDP, torch.compile and the optimizer
    ddp = DistributedDataParallel(model, bucket_cap_mb=args.bucket)
    compiled = torch.compile(ddp, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(args.steps):
        ids = torch.randint(100, (2, 32), generator=generator).to(device)  # put your data here
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return ddp, losses


if __name__ == "__main__":
    print(main()[1])
    dist.destroy_process_group()
