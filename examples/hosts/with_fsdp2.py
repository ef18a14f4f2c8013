"""FSDP2, and a checkpoint for vLLM at the end.

torchrun --standalone --nproc-per-node 2 examples/hosts/with_fsdp2.py --model HuggingFaceTB/SmolLM2-135M --export served
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from halo_tensor import halo_config, quantize_
from halo_tensor.transformers import export_compressed_tensors


def converted(name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name)
    quantize_(model, halo_config(level=1, dtype="int8"))
    return model


def main(words: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--export", help="folder for a compressed-tensors checkpoint")
    args = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)

    model = converted(args.model).to(device)  # before fully_shard and the optimizer
    for layer in [*model.model.layers, model]:
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(args.steps):
        ids = torch.randint(100, (2, 32), generator=generator).to(device)  # put your data here
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if args.export:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:  # others get an empty dict
            (whole := converted(args.model)).load_state_dict(state)
            export_compressed_tensors(whole, args.export)
    return losses


if __name__ == "__main__":
    print(main())
    dist.destroy_process_group()
