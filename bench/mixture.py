"""Train a small mixture of experts on real text, with experts in high precision and in 8 bits or less.

    python bench/mixture.py                     # a minute on a GPU, an hour on two cores
    python bench/mixture.py --steps 20 --seeds 1 --recipes "int8 HALO-1" --name mixture_try

A transformer of random initialisation learns to predict the bytes of Python's documentation. Only its experts follow the
recipe: attention, routers and embeddings stay in high precision. The seed of a run determines the initialisation and the order
of the data, and is the same for all recipes. Two records are written: the losses, and how much each product of the experts is
like that of high precision, with the weights, tokens and gradients of the trained model of the first seed. Results are
written after every seed.
"""

import argparse
import math
import pydoc_data.topics
import statistics
import time

import results
import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor import HaloWeight
from halo_tensor.products.experts import experts
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, INT8, Recipe, halo

HIGH = "high precision (float32)"
RECIPES = {
    "int8 HALO-1": halo(1, INT8),
    "int8 HALO-0": halo(0, INT8),
    "fp8 HALO-0": halo(0, FP8_E4M3),
    "fp8 HALO-1": halo(1, FP8_E4M3),
    "fp6_e2m3 HALO-1": halo(1, FP6_E2M3),
}
WIDTH, HEADS, LAYERS, EXPERTS, TOP_K, HIDDEN = 128, 4, 2, 8, 2, 128
BALANCE = 0.01  # of the loss that keeps routers from choosing few experts
VALIDATION = 0.1  # of the text


class Mixture(nn.Module):
    """Routed experts: SwiGLU with WIDTH -> HIDDEN -> WIDTH features."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * HIDDEN**-0.5)
        self.seen: tuple[torch.Tensor, ...] | None = None  # what the last forward gave to the experts, if recorded
        self.records = False

    def convert(self, recipe: Recipe) -> None:
        for name in ("gate_up", "down"):
            setattr(self, name, nn.Parameter(HaloWeight.from_hp(getattr(self, name).detach(), recipe)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        probabilities = self.router(tokens).softmax(1)
        weights, index = probabilities.topk(TOP_K)
        weights = weights / weights.sum(1, keepdim=True)
        self.load = F.one_hot(index, EXPERTS).float().sum((0, 1)) / index.numel()
        self.balance = EXPERTS * (self.load * probabilities.mean(0)).sum()
        if self.records:
            self.seen = tokens, index, weights
        if isinstance(self.gate_up, HaloWeight):
            y = experts(tokens, index, weights, self.gate_up, self.down)
        else:
            y = exact(tokens, index, weights, self.gate_up, self.down)
        if self.records:
            y.retain_grad()
            self.result = y
        return y.view(x.shape)


def exact(tokens, index, weights, gate_up, down) -> torch.Tensor:
    """Return what the experts compute, in the dtype of the weights."""
    out = torch.zeros_like(tokens)
    for expert in range(len(gate_up)):
        row, place = torch.where(index == expert)
        gate, up = (tokens[row] @ gate_up[expert].t()).chunk(2, 1)
        y = (F.silu(gate) * up) @ down[expert].t()
        out = out.index_add(0, row, y * weights[row, place, None])
    return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mixture = Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mixture(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of the next bytes, and the loss of unequal loads."""
        x = self.embedding(ids[:, :-1]) + self.place.weight[: ids.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())
        return loss, sum(block.mixture.balance for block in self.blocks) / LAYERS


def data(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on, and those to validate on."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    first = int(len(ids) * (1 - VALIDATION))
    return ids[:first], ids[first:]


def batch(ids: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(ids) - length - 1, (count,), generator=generator).to(ids.device)
    return ids[starts[:, None] + torch.arange(length + 1, device=ids.device)]


@torch.no_grad()
def validate(model: Model, ids: torch.Tensor, length: int) -> float:
    rows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    losses = [(model(part)[0].item(), len(part)) for part in rows[:256].split(64)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def train(recipe: Recipe | None, seed: int, args: argparse.Namespace, ids: tuple) -> tuple[Model, float, float]:
    """Return the trained model, its loss on the validation bytes, and the least share of tokens that an expert got last."""
    torch.manual_seed(seed)
    model = Model(args.length).to(ids[0].device)
    for block in model.blocks if recipe else []:
        block.mixture.convert(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    warm_up = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        loss, balance = model(batch(ids[0], args.batch, args.length, generator))
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    load = min(block.mixture.load.min().item() for block in model.blocks)
    return model, validate(model, ids[1], args.length), load


def fidelity(model: Model, names: list[str], ids: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """Return the cosine of each product of the experts of a trained model with that of float64, the lowest of all layers."""
    for block in model.blocks:
        block.mixture.records = True
    loss, _ = model(batch(ids, args.batch, args.length, torch.Generator().manual_seed(1000)))
    loss.backward()
    products = ("output", "grad_input", "grad of routing weights", "grad_weight, gate_up", "grad_weight, down")
    rows = []
    for name in names:
        found = [cosines(block.mixture, RECIPES[name]) for block in model.blocks]
        lowest = [f"{min(values):.5f}" for values in zip(*found, strict=True)]
        rows.append({"experts": name} | dict(zip(products, lowest, strict=True)))
    return rows


def cosines(mixture: Mixture, recipe: Recipe) -> list[float]:
    """Return the cosines of the output and of all gradients of experts with those of float64 for their last tokens."""
    x, index, weights = mixture.seen
    given, e = [x, weights, mixture.gate_up, mixture.down], mixture.result.grad
    expected = gradients(lambda x, *rest: exact(x, index, *rest), [t.double() for t in given], e.double())
    actual = gradients(lambda x, *rest: experts(x, index, *rest, recipe=recipe), given, e)
    pairs = zip(actual, expected, strict=True)
    return [F.cosine_similarity(a.double().flatten(), b.flatten(), 0).item() for a, b in pairs]


def gradients(f, given: list[torch.Tensor], e: torch.Tensor) -> list[torch.Tensor]:
    given = [t.detach().requires_grad_() for t in given]
    y = f(*given)
    return [y.detach(), *torch.autograd.grad(y, given, e)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--recipes", nargs="+", default=["int8 HALO-1", "fp8 HALO-0"], choices=list(RECIPES), metavar="RECIPE")
    results.add_arguments(parser, "mixture")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = data(device)
    losses: dict[str, list[float]] = {name: [] for name in (HIGH, *args.recipes)}
    loads: dict[str, list[float]] = {name: [] for name in losses}
    for seed in range(args.seeds):
        for name in losses:
            began = time.perf_counter()
            model, loss, load = train(RECIPES.get(name), seed, args, ids)
            losses[name].append(loss)
            loads[name].append(load)
            print(f"seed {seed}, {name}: {loss:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
            if seed == 0 and name == HIGH:
                write_products(fidelity(model, list(RECIPES), ids[1], args), args)
        write_losses(losses, loads, args)


WHAT = f"{LAYERS} layers, width {WIDTH}, {EXPERTS} experts of {HIDDEN}, top {TOP_K}"


def write_losses(losses: dict[str, list[float]], loads: dict[str, list[float]], args: argparse.Namespace) -> None:
    seeds = len(losses[HIGH])
    several = seeds > 1
    rows = []
    for name, values in losses.items():
        beyond = [a - b for a, b in zip(values, losses[HIGH], strict=True)]
        rows.append(
            {
                "experts": name,
                "loss, mean": f"{statistics.mean(values):.4f}",
                "standard deviation over seeds": f"{statistics.stdev(values):.4f}" if several else "-",
                "minus high precision, mean": f"{statistics.mean(beyond):+.4f}",
                "its standard error": f"{statistics.stdev(beyond) / seeds**0.5:.4f}" if several else "-",
                "least share of an expert": f"{min(loads[name]):.3f}",
            }
        )
    results.write(
        args.name,
        f"A mixture trained on the bytes of Python's documentation: {WHAT}",
        rows,
        f"{seeds} seeds, {args.steps} steps of {args.batch} rows of {args.length} bytes, AdamW. The loss is that of the next "
        "byte on text that was not trained on, in nats. Each difference is between runs of one seed, which determines the "
        f"initialisation and the batches. An even share of an expert is {1 / EXPERTS}. Only experts follow the recipe; their "
        "masters are float32.",
        args.folder,
        quiet=seeds < args.seeds,
        losses=losses,
    )


def write_products(rows: list[dict], args: argparse.Namespace) -> None:
    results.write(
        f"{args.name}_products",
        f"Products of trained experts, cosine with float64: {WHAT}",
        rows,
        f"The model of seed 0 that was trained in high precision for {args.steps} steps, a batch of {args.batch} rows of "
        f"{args.length} bytes; the lower value of its {LAYERS} layers. X, W, E and the routing are the same for all.",
        args.folder,
    )


if __name__ == "__main__":
    main()
