"""Tensor and sequence parallelism of a Llama-like Hugging Face model, on a mesh with FSDP2.

torchrun --standalone --nproc-per-node 4 examples/hosts/with_tensor_parallel.py --dp 2 --tp 2 --model TinyLlama/TinyLlama_v1.1
"""

import argparse

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel, parallelize_module
from transformers import AutoModelForCausalLM

from halo_tensor import halo_config, quantize_
from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloPrepareInput, HaloRowwiseParallel

PART, WHOLE = Shard(1), Replicate()  # of the tokens, dimension 1
PLAN = {
    "model.layers.0": PrepareModuleInput(input_layouts=(WHOLE,), desired_input_layouts=(PART,), use_local_output=True),
    "model.layers.*.*_layernorm": SequenceParallel(use_local_output=True),
    "model.layers.*.self_attn": HaloPrepareInput(input_layouts=PART),
    "model.layers.*.self_attn.[qkv]_proj": HaloColwiseParallel(),
    "model.layers.*.self_attn.o_proj": HaloRowwiseParallel(output_layouts=PART),
    "model.layers.*.mlp": HaloPrepareInput(input_layouts=PART),
    "model.layers.*.mlp.[gu]*_proj": HaloColwiseParallel(),  # gate and up
    "model.layers.*.mlp.down_proj": HaloRowwiseParallel(output_layouts=PART),
    "model.norm": SequenceParallel(use_local_output=True),
    "lm_head": PrepareModuleInput(input_layouts=(PART,), desired_input_layouts=(WHOLE,), use_local_output=True),
}


def main(words: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="TinyLlama/TinyLlama_v1.1")
    for name, default in (("--dp", 2), ("--tp", 2), ("--steps", 10)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (args.dp, args.tp), mesh_dim_names=("dp", "tp"))  # also sets the GPU
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    quantize_(model, halo_config(level=1, dtype="int8"))  # before parallelize_module and fully_shard
    parallelize_module(model, mesh["tp"], PLAN)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)  # of two meshes
    losses = []
    for step in range(args.steps):
        torch.manual_seed(1000 * step + mesh["dp"].get_local_rank())
        ids = torch.randint(100, (2, 32)).to(device)  # put your data here
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    print(main())
