"""Time the experts of one layer: this library against ``torch._grouped_mm`` in bf16 and torchao's fp8 grouped product.

    python bench/experts.py                      # three models' layers, forward and backward, compiled
    python bench/experts.py --rows               # the same without routing: products of sorted rows and the gate between them
    python bench/experts.py --written            # with quantising the weights, as after an optimiser's write
    python bench/experts.py --products           # each product alone, with its share of the dense product's rate
    python bench/experts.py --sweep qwen         # launch shapes of quantisers and of products, for one model

All contenders run in one process on the same random data, with random routing. Times are medians. Without --written,
weights of this library hold their codes, which a training step makes once.
"""

import argparse
import itertools
import sys
from typing import NamedTuple

import results
import torch
from contenders import requantize
from torch import nn
from triton.testing import do_bench

from halo_tensor import HaloWeight, ops
from halo_tensor.kernels.experts import products, quantizers
from halo_tensor.products.experts import Routing, experts, experts_of_rows, route
from halo_tensor.recipe import FP8_E4M3, INT8, Gate, Rotation, halo
from halo_tensor.reference.experts import TILE, activate
from halo_tensor.reference.hadamard import fit


class Model(NamedTuple):
    """The sizes of a layer: experts, top_k, in_features and the width between the two products; and its gate."""

    experts: int
    top_k: int
    d: int
    f: int
    gate: Gate = Gate()

    def operations(self, tokens: int) -> int:
        """Of forward and backward, two for each multiply-accumulate."""
        return 3 * 2 * tokens * self.top_k * 3 * self.d * self.f


MODELS = {
    "qwen": Model(128, 8, 2048, 768),  # Qwen3-30B-A3B
    "gpt-oss": Model(32, 4, 2880, 2880, Gate(1.702, 7.0, 1.0, interleaved=True)),
    "mixtral": Model(8, 2, 4096, 14336),
}
RECIPES = {"halo1-int8": halo(1, INT8), "halo0-int8": halo(0, INT8), "halo1-fp8": halo(1, FP8_E4M3)}
CONTENDERS = ["bf16", "torchao-fp8", *RECIPES, "bf16, frozen", "halo1-int8, frozen"]


class _Bf16(nn.Module):
    """A layer as transformers computes it by ``torch._grouped_mm``, or with another grouped product."""

    def __init__(self, model: Model, gate_up: torch.Tensor, down: torch.Tensor, grouped_mm):
        super().__init__()
        self.model, self.grouped_mm = model, grouped_mm
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    def of_rows(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        h = self.grouped_mm(x, self.gate_up.transpose(1, 2), offs)
        return self.grouped_mm(activate(h, self.model.gate), self.down.transpose(1, 2), offs)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        by_expert, order = index.flatten().sort()
        token = order // index.shape[1]
        offs = torch.searchsorted(by_expert, torch.arange(self.model.experts, device=x.device), right=True, out_int32=True)
        y = self.of_rows(x[token], offs) * weights.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return y[back].view(*index.shape, -1).sum(1).to(x.dtype)


class _Halo(nn.Module):
    def __init__(self, model: Model, gate_up: torch.Tensor, down: torch.Tensor, recipe, frozen: bool):
        super().__init__()
        self.model = model
        self.gate_up, self.down = (
            nn.Parameter(HaloWeight.from_hp(w, recipe, frozen=frozen), requires_grad=not frozen) for w in (gate_up, down)
        )

    def of_rows(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        routing = Routing(offs, *ops.group_tiles(offs, x.shape[0]))
        return experts_of_rows(x, None, self.gate_up, self.down, routing, self.model.gate)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return experts(x, index, weights, self.gate_up, self.down, self.model.gate)


def _grouped_mm(x, w, offs):
    return torch._grouped_mm(x, w, offs=offs, out_dtype=x.dtype)


def _torchao(x, w, offs):
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

    return _to_fp8_rowwise_then_scaled_grouped_mm(x, w, offs, x.dtype)


def layer(name: str, model: Model, device: str, dtype: torch.dtype) -> nn.Module:
    """Return a contender's layer, with the same weights for all."""
    torch.manual_seed(0)
    gate_up = torch.randn(model.experts, 2 * model.f, model.d, device=device, dtype=dtype) * model.d**-0.5
    down = torch.randn(model.experts, model.d, model.f, device=device, dtype=dtype) * model.f**-0.5
    if name in ("bf16", "torchao-fp8", "bf16, frozen"):
        plain = _Bf16(model, gate_up, down, _torchao if name == "torchao-fp8" else _grouped_mm)
        return plain.requires_grad_("frozen" not in name)
    return _Halo(model, gate_up, down, RECIPES[name.partition(",")[0]], "frozen" in name)


def step_of(name: str, model: Model, args: argparse.Namespace, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
    """Return a function that runs forward and backward of a contender."""
    torch._dynamo.reset()
    module = layer(name, model, device, dtype)
    tokens, rows = args.tokens, args.tokens * model.top_k
    index = torch.rand(tokens, model.experts, device=device).topk(model.top_k, 1).indices
    x = torch.randn(rows if args.rows else tokens, model.d, device=device, dtype=dtype, requires_grad=True)
    inputs = (x, route(index, model.experts).offs) if args.rows else (x, index, torch.rand(tokens, model.top_k, device=device))
    f = module.of_rows if args.rows else module
    f = torch.compile(f, fullgraph=name != "torchao-fp8") if args.compile else f
    e = torch.randn(x.shape, device=device, dtype=dtype)

    def step():
        x.grad = None
        module.zero_grad()
        if args.written:
            requantize(module)
        f(*inputs).backward(e)

    step.bytes = sum(_bytes(p) for p in module.parameters())
    return step


def _bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a weight, without codes that can be made again."""
    if not isinstance(parameter, HaloWeight):
        return parameter.nbytes
    return sum(t.nbytes for t in (parameter.master, *parameter.operand.parts) if t is not None)


def measure_layers(args: argparse.Namespace) -> None:
    kind = "products of sorted rows with the gate between them" if args.rows else "with routing"
    title = f"The experts of one layer, {kind}, forward + backward, {args.tokens} tokens"
    title += ", weights quantised in every step" * args.written
    rows: list[dict] = []
    why_not = {(m, c): results.ENDED for m in args.models for c in args.contenders}
    for name, contender in itertools.product(args.models, args.contenders):
        model = MODELS[name]
        try:
            step = step_of(contender, model, args)
            step()
            torch.cuda.synchronize()
            time = do_bench(step, warmup=25, rep=args.reps, return_mode="median")
        except Exception as error:
            print(f"{name} {contender}: {error!r:.300}", flush=True)
            why_not[name, contender] = results.reason(error)
            continue
        like = "bf16, frozen" if "frozen" in contender else "bf16"
        known = {r["contender"]: r["ms"] for r in rows if r["model"] == name} | {contender: time}
        rows.append(
            {
                "model": name,
                "contender": contender,
                "ms": round(time, 3),
                "× bf16": results.speedup(known.get(like), time),
                "TFLOP/s": round(model.operations(args.tokens) / time / 1e9 * (2 / 3 if "frozen" in contender else 1)),
                "weights MiB": round(step.bytes / 2**20),
            }
        )
        print(rows[-1], flush=True)
        results.write(
            args.name, title, rows, "", args.folder, quiet=True, panels=["model"], expected=CONTENDERS, why_not=why_not
        )  # fmt: skip


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def product_calls(model: Model, tokens: int):
    """Yield (matrix, operations, product -> function): int8 products of gate_up and of down, the dense and the bf16 ones."""
    routing = route(torch.rand(tokens, model.experts, device="cuda").topk(model.top_k, 1).indices, model.experts)
    for matrix, (n, k) in {"gate_up": (2 * model.f, model.d), "down": (model.d, model.f)}.items():
        yield matrix, 2 * tokens * model.top_k * n * k, _calls_of(model.experts, tokens * model.top_k, n, k, routing)


def _calls_of(count: int, rows: int, n: int, k: int, routing: Routing) -> dict:
    tiles, starts, rotation, width = routing.tiles, routing.starts, fit(Rotation(), k), TILE * routing.tiles.shape[0]
    a, e, w, turned = _codes(rows, k), _codes(rows, n), _codes(count, n, k), _codes(count, k, n)
    e_t, a_t = _codes(n, width), _codes(k, width)
    by_row, by_column = torch.rand(rows, device="cuda"), torch.rand(count, n, device="cuda")
    wide, dtype = (a.to(torch.bfloat16), w.to(torch.bfloat16).transpose(1, 2)), torch.bfloat16
    return {
        "dense": lambda: ops.scaled_mm(a, w[0], by_row, by_column[0], None, None, None, [rows, n], dtype),
        "bf16 output": lambda: _grouped_mm(*wide, routing.offs),
        "output": lambda: ops.grouped_mm(a, w, tiles, starts, by_row, by_column, None, None, None, dtype),
        "grad_input": lambda: ops.grouped_mm(e, turned, tiles, starts, by_row, None, None, None, rotation, dtype),
        "grad_weight": lambda: ops.grouped_grad(e_t, a_t, starts, by_column, rotation, dtype),
    }


def measure_products(args: argparse.Namespace) -> None:
    title = f"Grouped int8 products, {args.tokens} tokens"
    rows: list[dict] = []
    for name in args.models:
        for matrix, operations, calls in product_calls(MODELS[name], args.tokens):
            times = {product: do_bench(f, rep=args.reps, return_mode="median") for product, f in calls.items()}
            for product, time in times.items():
                rows.append(
                    {
                        "model": name,
                        "matrix": matrix,
                        "product": product,
                        "ms": round(time, 3),
                        "TFLOP/s": round(operations / time / 1e9),
                        "of the dense rate": round(times["dense"] / time, 2),
                    }
                )
                print(rows[-1], flush=True)
            results.write(args.name, title, rows, "", args.folder, quiet=True)


#: Launch shapes to try: a function or constant of halo_tensor/kernels/experts/quantizers.py -> values.
QUANTIZERS = {
    "group_rows": lambda w: [quantizers.Rows(w, *c) for c in itertools.product((1, 2, 4), (1, 4), (4, 8))],
    "gated_rows": lambda w: [(r, n) for r in (1, 2, 4, 8) for n in (4, 8, 16) if 2048 <= r * w <= 16384],
    "gated_grad_rows": lambda w: [
        quantizers.Rows(min(w, p), r, 8 // r, n)
        for p, r, n in itertools.product((256, 1024, 2048), (1, 2, 4), (4, 8, 16)) if r * min(w, p) <= 4096
    ],
    "COLUMNS": lambda w: [quantizers.Columns(*c) for c in itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3))],
}  # fmt: skip


def sweep(name: str, tokens: int) -> None:
    """Print the time of each launch shape of the quantisers and of the products in Gluon."""
    model = MODELS[name]
    rows, d, f = tokens * model.top_k, model.d, model.f
    routing = route(torch.rand(tokens, model.experts, device="cuda").topk(model.top_k, 1).indices, model.experts)
    x, h, g = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((tokens, d), (rows, 2 * f), (rows, f)))
    by_row, fold, wide_fold = (torch.rand(s, device="cuda") for s in ((rows,), (model.experts, d), (model.experts, 2 * f)))
    tiles, starts, rotation = routing.tiles, routing.starts, fit(Rotation(), f)
    calls = {
        "group_rows": (d, lambda: ops.quantize_groups(x, routing.source, fold, tiles, INT8)),
        "gated_rows": (f, lambda: ops.quantize_gated(h, model.gate, rotation, INT8, None)),
        "gated_grad_rows": (
            f,
            lambda: ops.quantize_gated_grad(h, g, by_row, model.gate, wide_fold, tiles, True, INT8),
        ),
        "COLUMNS": (
            d,
            lambda: ops.quantize_groups_t(x, routing.source, by_row, by_row, tiles, starts, False, INT8),
        ),
    }  # fmt: skip
    for attribute, (width, call) in calls.items():
        usual = getattr(quantizers, attribute)
        for shape in QUANTIZERS[attribute](max(1 << (width - 1).bit_length(), TILE)):
            setattr(quantizers, attribute, shape if isinstance(usual, tuple) else lambda _, shape=shape: shape)
            _try(f"{name} {attribute} {tuple(shape)}", quantizers, call)
        setattr(quantizers, attribute, usual)
        _try(f"{name} {attribute} as it is", quantizers, call)
    from halo_tensor.kernels.experts import sm90

    sizes = [(256, 128, 4, 8, 1), (128, 128, 3, 4, 2), (128, 64, 4, 4, 2)]
    for (columns, *rest), group in itertools.product(sizes, (4, 8, 16)):
        sm90.ROWS = sm90.TOKENS = sm90.SHORT_ROWS = sm90.Config(columns, *rest, group)
        for matrix, _, products_of in product_calls(model, tokens):
            # A rotation is undone in tiles of 256 columns.
            for product in ("output", "grad_input", "grad_weight") if columns == 256 else ("output",):
                _try(f"{name} {matrix} {product} {(columns, *rest, group)}", products, products_of[product])


def _try(label: str, module, call) -> None:
    for function in vars(module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    try:
        print(f"{label}: {do_bench(call, warmup=5, rep=20, return_mode='median'):.3f} ms", flush=True)
    except Exception as error:
        print(f"{label}: {error!r:.200}", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--rows", action="store_true", help="leave routing out")
    parser.add_argument("--written", action="store_true", help="quantise the weights in every step")
    parser.add_argument("--products", action="store_true", help="each product alone")
    parser.add_argument("--sweep", choices=list(MODELS), help="launch shapes, for one model")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--reps", type=int, default=200, help="milliseconds of repetitions")
    results.add_arguments(parser, "experts")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/experts.py needs a CUDA device")
    if args.sweep:
        sweep(args.sweep, args.tokens)
    elif args.products:
        measure_products(args)
    else:
        measure_layers(args)


if __name__ == "__main__":
    main()
