"""accelerate: quantize_ before prepare. One script for one GPU, DDP and FSDP2.

accelerate launch --num-processes 8 examples/hosts/with_accelerate.py --model meta-llama/Llama-3.1-8B --fsdp
"""

import argparse

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM

from halo_tensor import halo_config, quantize_


def main(words: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--fsdp", action="store_true", help="shard parameters with FSDP2")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", help="folder for the state after half of the steps")
    parser.add_argument("--resume", help="folder that --save wrote")
    args = parser.parse_args(words)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap") if args.fsdp else None
    accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=args.accumulate)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    quantize_(model, halo_config(level=1, dtype="int8"))  # before the optimizer and prepare
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randint(100, (256, 64), generator=torch.Generator().manual_seed(0))  # put your data here
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=4))
    done = 0
    if args.resume:
        accelerator.load_state(args.resume)
        done = args.steps // 2
        loader = accelerator.skip_first_batches(loader, done * args.accumulate)

    losses, batches = [], iter(loader)
    for step in range(done, args.steps):
        for _ in range(args.accumulate):
            batch = next(batches)
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if args.save and step + 1 == args.steps // 2:
            accelerator.save_state(args.save)
    return losses


if __name__ == "__main__":
    print(main())
