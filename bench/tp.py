"""Time tensor- and sequence-parallel training steps of Llama-3-8B-shaped blocks: bf16 with torch's styles, and this library.

    torchrun --standalone --nproc-per-node 2 bench/tp.py
    torchrun --standalone --nproc-per-node 2 bench/tp.py --contenders bf16 halo1-int8 --blocks 4

Weights (bf16) and data are random. Every rank has its part of each weight and of the tokens between layers. The optimiser is
fused AdamW, and every block is compiled by itself. The contenders run one after another in one process.
"""

import argparse

import ranks
import results
import torch
import torch.distributed as dist
from contenders import convert
from fsdp import COMPILED, EAGER, Blocks
from ranks import timed
from steps import BACKEND
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloPrepareInput, HaloRowwiseParallel

GRADIENTS = "-int8-gradients"  #: suffix of a contender's name: gathered_grad="int8"
WITH_GRADIENTS = "halo1-int8" + GRADIENTS
DEFAULT = ["bf16", "halo1-int8", WITH_GRADIENTS]
NOTES = (
    "A step: forward, backward and fused AdamW, of all ranks on the same sequences. Tokens between layers are split among "
    "ranks. ms: median of the steps, of the slowest rank. Issue: what the CPU takes to issue one step to idle GPUs. Peak: of "
    "one rank's allocations. Gathered, scattered: the bytes of the results of a step's all-gathers on one rank, and of the "
    "arguments of its reduce-scatters, counted where they are called. Loss: of the first step, mean of (y · e). "
)


class Parts(Blocks):
    """Blocks whose input is this rank's part of the tokens."""

    def forward(self, x):
        positions = torch.arange(x.shape[1] * dist.get_world_size(), device=x.device)[None]
        embeddings = self.rope(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=embeddings)
        return x


class Sent(TorchDispatchMode):
    """Count the bytes of all-gathers and of reduce-scatters."""

    gathered = scattered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t not in (torch.Tensor, nn.Parameter, FakeTensor) for t in types):
            return (
                NotImplemented  # the subclass runs ops on its inner tensors, which arrive here again; DTensor asks fake ones
            )
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and func._opname == "all_gather_into_tensor":
            self.gathered += out.nbytes
        elif func.namespace == "_c10d_functional" and func._opname == "reduce_scatter_tensor":
            self.scattered += args[0].nbytes
        return out


def plan_of(name: str) -> dict:
    """Return the styles of the modules of a block."""
    part, whole = Shard(1), Replicate()
    plan: dict = {}
    colwise = [f"self_attn.{n}_proj" for n in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    rowwise = ["self_attn.o_proj", "mlp.down_proj"]
    if name == "bf16":
        names = {"hidden_states": part}, {"hidden_states": whole}
        plan["self_attn"] = PrepareModuleInput(input_kwarg_layouts=names[0], desired_input_kwarg_layouts=names[1])
        plan["mlp"] = PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,))
        plan |= {n: ColwiseParallel() for n in colwise} | {n: RowwiseParallel(output_layouts=part) for n in rowwise}
        return plan
    gathered_grad = "int8" if name.endswith(GRADIENTS) else "dense"
    plan["self_attn"] = plan["mlp"] = HaloPrepareInput(input_layouts=part)
    rows = HaloRowwiseParallel(output_layouts=part, gathered_grad=gathered_grad)
    return plan | {n: HaloColwiseParallel() for n in colwise} | dict.fromkeys(rowwise, rows)


def sum_gradients(norms: list[nn.Parameter]) -> None:
    """Sum the gradients of norms, each of which saw a part of the tokens, over ranks."""
    flat = torch.cat([norm.grad for norm in norms])
    dist.all_reduce(flat)
    for norm, grad in zip(norms, flat.split([norm.numel() for norm in norms]), strict=True):
        norm.grad.copy_(grad)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Return the columns of a contender without those that compare it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (world,))
    torch.manual_seed(0)
    with device:
        model = Parts(args.blocks, args.hidden, args.intermediate).bfloat16()
    convert(model, name.removesuffix(GRADIENTS))
    for layer in model.layers:
        parallelize_module(layer, mesh, plan_of(name))
        if not args.eager:
            layer.compile(fullgraph=True, backend=BACKEND)
    norms, split = ([p for n, p in model.named_parameters() if ("norm" in n) == chosen] for chosen in (True, False))
    optimizer = torch.optim.AdamW([{"params": split}, {"params": norms}], lr=1e-5, fused=True)  # one op takes no mixture
    shape = 2, args.batch, args.length, args.hidden
    x, e = torch.randn(shape, device=device, dtype=torch.bfloat16).chunk(world, 2)[rank]
    losses = []

    def step() -> None:
        y = model(x)
        losses.append((y.detach().float() * e).mean())
        y.backward(e)
        sum_gradients(norms)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(args.warmup):
        step()
    with torch.compiler.set_stance("force_eager"), Sent() as sent:  # compiled code ignores dispatch modes
        step()
    step()
    ms, issue, peak = timed(step, args.steps, device)
    loss = losses[0].clone()
    dist.all_reduce(loss)
    return {
        "ms": round(ms, 2),
        "issue ms": round(issue, 1),
        "peak GiB": f"{peak:.2f}" if peak else None,
        "gathered MiB": f"{sent.gathered / 2**20:.2f}",
        "scattered MiB": f"{sent.scattered / 2**20:.2f}",
        "loss": f"{loss.item() / world:.5f}",
    }


def row_of(name: str, args: argparse.Namespace, device: torch.device, rows: list[dict]) -> dict:
    """Return the row of a contender. It is compared with the row of bf16 in ``rows``, if there is one."""
    columns = measure(name, args, device)
    ms = columns.pop("ms")
    bf16 = next((row for row in rows if row["contender"] == "bf16"), None)
    share = float(columns["gathered MiB"]) / float(bf16["gathered MiB"]) if bf16 else None
    row = {"contender": name, "ms": ms, "× bf16": results.speedup(ranks.reference(rows, name, ms), ms)}
    return row | columns | {"gathered, × bf16": share and f"{share:.3f}"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ranks.parser_of(__doc__.splitlines()[0], DEFAULT, warmup=4, more=(WITH_GRADIENTS,))
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    results.add_arguments(parser, "tp")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(ranks.TINY, hidden=1024, intermediate=512)
    return args


def main() -> None:
    args = parse_args()
    with ranks.process_group("tp.py", args.tiny) as device:
        title = ranks.title("Tensor and sequence parallelism", args, "in all")
        notes = NOTES + (EAGER if args.eager else COMPILED)
        ranks.take_turns(args, title, notes, DEFAULT, lambda name, rows: row_of(name, args, device, rows))


if __name__ == "__main__":
    main()
