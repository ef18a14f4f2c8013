"""Does fine-tuning with a recipe give as good a model? Text-to-SQL, several seeds, on a model as shipped and with outliers.

    python bench/study.py --data chats.jsonl --budget-seconds 520      # repeated, it goes on where it stopped
    python bench/study.py --data chats.jsonl --smoke                   # every code path, on any machine

The outlier model computes the same function: 6 channels of what every norm gives out are × 32, and the columns of the linears
that read them ÷ 32 (a power of two, so that bf16 weights lose nothing). Large models have such channels by themselves.
Results are written after every run.
"""

import argparse
import json
import statistics
import sys
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import results
import torch
from common import fail, load_model
from contenders import convert
from data import batches, encode, pack, read_chats
from evaluation import answers, exact_match, mean_loss, sql
from torch import nn

from halo_tensor import environment

MODELS = ("as shipped", "with outliers")
MAIN = ("bf16", "halo1-int8", "halo2-int8", "halo0-fp8")
OTHERS = (
    "torchao-tensorwise",
    "torchao-rowwise",
    "halo0-int8",
    "halo1-fp8",
    "halo2-fp8",
    "halo0-fp6",
    "halo1-fp6",
    "halo2-fp6",
)
OUTLIERS, FACTOR = 6, 32
SETTINGS = ("model", "data", "dtype", "steps", "batch", "length", "lr", "prompts", "new_tokens", "compile")
NOTES = (
    "{steps} steps of {batch}×{length} packed tokens ({examples} conversations; answers only are learnt), AdamW, learning "
    "rate {lr:g} with warm-up and linear decay; weights and activations in {dtype}, with float32 copies of the weights in "
    "the optimiser, for every recipe. A seed is an order of the data; ± is the standard deviation over seeds. Gradient "
    "cosine: of all linears but lm_head, before training, with the gradient in float32. Validation loss and exact match "
    "(greedy answers to {prompts} held-out prompts, as normalised strings): of the trained weights, exported and run in "
    "{dtype}; change: against bf16 with the same seed. By recipe: the loss of the same weights run by the recipe. tokens/s: "
    "of the median step, optimiser included{compiled}; a model this small is bound by launching, so this is no measure of "
    "speed."
)


@torch.no_grad()
def inject_outliers(model: nn.Module) -> None:
    """Scale channels of what the norms of every block give out, and undo it in the columns of what reads them."""
    width = model.config.hidden_size
    channels = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:OUTLIERS].to(model.device)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            norm.weight[channels] *= FACTOR
            for linear in linears:
                linear.weight[:, channels] /= FACTOR


class Study:
    """The models, the data, and what has been measured on them so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.runs, self.started = args, [], time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.plain, self.tokenizer = load_model(args.model, getattr(torch, args.dtype), self.device)
        if args.smoke:
            del self.plain.model.layers[3:]
            self.plain.config.num_hidden_layers = 3
        self.plain.requires_grad_(False)
        self.states = {MODELS[0]: deepcopy(self.plain.state_dict())}
        inject_outliers(self.plain)
        self.states[MODELS[1]] = deepcopy(self.plain.state_dict())
        chats = read_chats(args.data)
        self.valid = chats[-args.prompts :]
        self.train = [encode(self.tokenizer, chat) for chat in chats[: -args.prompts]]
        self.pad = self.tokenizer.pad_token_id or 0
        self.valid_rows = pack([encode(self.tokenizer, chat) for chat in self.valid], args.length, self.pad)
        self.probe = self._on_device(next(batches(self.train, args.batch, args.length, self.pad, seed=0)))
        self.models: dict[str, nn.Module] = {}
        self.exact: dict[str, dict[str, torch.Tensor]] = {}

    def _on_device(self, rows: dict) -> dict:
        return {name: values.to(self.device) for name, values in rows.items()}

    def model(self, recipe: str) -> nn.Module:
        """Kept, so that it is compiled once: runs load their weights into it."""
        if recipe not in self.models:
            model = deepcopy(self.plain).requires_grad_(True)
            convert(model, recipe)
            if self.args.compile:
                for block in model.model.layers:
                    block.compile(fullgraph=True, dynamic=False)
            self.models[recipe] = model
        return self.models[recipe]

    def gradient(self, model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**self.probe, use_cache=False).loss.backward()
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if "_proj" in name}
        model.zero_grad()
        return gradients

    def cosine(self, which: str, model: nn.Module) -> float:
        if which not in self.exact:
            self.plain.load_state_dict(self.states[which])
            self.exact[which] = self.gradient(deepcopy(self.plain).float().requires_grad_(True))
        pairs = [(g.double(), self.exact[which][name].double()) for name, g in self.gradient(model).items()]
        dots = [sum((a * b).sum() for a, b in [(pair[i], pair[j]) for pair in pairs]) for i, j in ((0, 1), (0, 0), (1, 1))]
        return (dots[0] / (dots[1] * dots[2]).sqrt()).item()

    def run(self, which: str, recipe: str, seed: int) -> dict:
        start = time.perf_counter()
        model = self.model(recipe)
        model.load_state_dict(self.states[which])
        run = {"model": which, "recipe": recipe, "seed": seed, "cosine": self.cosine(which, model)}
        run |= self.fit(model, seed)
        run["by recipe"] = self.loss_by_recipe(model)
        run |= self.evaluate(model.state_dict())
        return run | {"seconds": time.perf_counter() - start}

    def fit(self, model: nn.Module, seed: int) -> dict:
        args = self.args
        parameters = [p for p in model.parameters() if p.requires_grad]
        copies = [p.detach().to(torch.float32, copy=True) for p in map(_dense, parameters)]
        optimizer = torch.optim.AdamW(copies, lr=args.lr, weight_decay=0.0, fused=True)
        warmup = max(args.steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warmup, (args.steps - i) / max(args.steps - warmup, 1))
        )
        losses, stamps = [], [self._stamp()]
        data = batches(self.train, args.batch, args.length, self.pad, seed)
        for _ in range(args.steps):
            loss = model(**self._on_device(next(data)), use_cache=False).loss
            loss.backward()
            for copy, p in zip(copies, parameters, strict=True):
                copy.grad = p.grad.float()
            model.zero_grad()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, copies)
            losses.append(loss.detach())
            stamps.append(self._stamp())
        curve = torch.stack(losses).tolist()  # waits for the device
        seconds = statistics.median(_elapsed(a, b) for a, b in pairwise(stamps))
        last = curve[-max(args.steps // 10, 1) :]
        return {"train": sum(last) / len(last), "tokens/s": args.batch * args.length / seconds}

    def _stamp(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def loss_by_recipe(self, model: nn.Module) -> float:
        """With gradients on, and as many rows at once as in training: the graph that is compiled already."""
        rows, total, count = self.valid_rows, 0.0, 0
        for i in range(0, len(rows["input_ids"]), self.args.batch):
            part = {name: values[i : i + self.args.batch] for name, values in rows.items()}
            missing = self.args.batch - len(part["labels"])
            padding = {name: values[:1].expand(missing, -1) for name, values in rows.items()}
            padding["labels"] = torch.full_like(padding["labels"], -100)
            learnt = int((part["labels"] != -100).sum())
            whole = {name: torch.cat([part[name], padding[name]]) for name in rows}
            total += model(**self._on_device(whole), use_cache=False).loss.item() * learnt
            count += learnt
        return total / count

    def evaluate(self, state: dict) -> dict:
        self.plain.load_state_dict(state)
        self.plain.eval()
        loss = mean_loss(self.plain, self.valid_rows, self.args.batch)
        written = answers(self.plain, self.tokenizer, self.valid, len(self.valid), self.args.new_tokens)
        return {"validation": loss, "exact": exact_match(written, self.valid, sql), "example": written[0]}


def _dense(p: torch.Tensor) -> torch.Tensor:
    return p.dequantize() if hasattr(p, "master") else p


def _elapsed(a, b) -> float:
    """Seconds."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def spread(values: list[float], format: str) -> str:
    mean = format.format(statistics.mean(values))
    return f"{mean} ± {format.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean


def table(runs: list[dict]) -> list[dict]:
    rows = []
    reference = {(run["model"], run["seed"]): run for run in runs if run["recipe"] == "bf16"}
    for which in MODELS:
        for recipe in ("untrained", *MAIN, *OTHERS):
            group = [run for run in runs if (run["model"], run["recipe"]) == (which, recipe)]
            if not group:
                continue
            pairs = [(run, reference[which, run["seed"]]) for run in group if (which, run["seed"]) in reference]
            trained = recipe != "untrained"
            changes = [run["validation"] / other["validation"] - 1 for run, other in pairs]
            speeds = [run["tokens/s"] / other["tokens/s"] for run, other in pairs if trained]
            rows.append(
                {
                    "model": which,
                    "recipe": recipe,
                    "seeds": len(group),
                    "gradient cosine": f"{group[0]['cosine']:.4f}" if trained else None,
                    "validation loss": spread([run["validation"] for run in group], "{:.4f}"),
                    "change": spread(changes, "{:+.2%}") if changes and trained and recipe != "bf16" else None,
                    "by recipe": spread([run["by recipe"] for run in group], "{:.4f}") if trained else None,
                    "exact match": spread([run["exact"] for run in group], "{:.1%}"),
                    "tokens/s": round(statistics.median(run["tokens/s"] for run in group)) if trained else None,
                    "× bf16": f"{statistics.median(speeds):.2f}" if speeds else None,
                }
            )
    return rows


def draw(name: str, runs: list[dict], folder: Path) -> None:
    """One row of panels per model: a dot is a seed, a line their mean, and the dashed one that of bf16."""
    try:
        import matplotlib
    except ImportError:
        print(f"{name}.png is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recipes = [recipe for recipe in (*MAIN, *OTHERS) if any(run["recipe"] == recipe for run in runs)]
    panels = {
        "cosine": "1 − cosine of the gradient with the exact one",
        "validation": "validation loss",
        "exact": "exact match",
    }
    figure, grid = plt.subplots(
        2, 3, figsize=(13, 2.4 + 0.45 * len(recipes)), sharey=True, squeeze=False, layout="constrained"
    )
    for line, which in zip(grid, MODELS, strict=True):
        for axes, (key, label) in zip(line, panels.items(), strict=True):
            for y, recipe in enumerate(recipes):
                values = [run[key] for run in runs if (run["model"], run["recipe"]) == (which, recipe)]
                values = [max(1 - value, 1e-6) for value in values] if key == "cosine" else values
                if not values:
                    continue
                color = "#0b7285" if recipe.startswith("halo") else "#868e96"
                mean = statistics.mean(values)
                axes.plot(values, [y] * len(values), "o", color=color, alpha=0.55, markersize=6)
                axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
                if recipe == "bf16":
                    axes.axvline(mean, color="#343a40", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            if key == "cosine":
                axes.set_xscale("log")
            axes.set_yticks(range(len(recipes)), recipes, fontsize=9)
            axes.set_title(f"{which}: {label}", fontsize=10)
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right", "left"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    figure.supxlabel(f"a dot is a seed, the dashed line bf16\n{environment().line()}", fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=150)
    plt.close(figure)


def queue(recipes: list[str], seeds: int) -> list[tuple[str, str, int]]:
    """(model, recipe, seed): all seeds of what matters most, then one seed of the rest, then the rest."""
    first = [(which, recipe, seed) for recipe in MAIN for which in MODELS for seed in range(seeds)]
    rest = [(which, recipe, seed) for seed in range(seeds) for recipe in OTHERS for which in MODELS]
    return [task for task in first + rest if task[1] in recipes]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=".jsonl with messages in every line; the last ones are for validation")
    parser.add_argument("--model", help="path (.gguf too) or hub name of a Llama (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", help="of the weights")
    parser.add_argument("--only", nargs="+", default=[*MAIN, *OTHERS], choices=[*MAIN, *OTHERS], metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="rows of packed conversations")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=100, help="conversations for validation")
    parser.add_argument("--new-tokens", type=int, default=64, help="that an answer may have")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run that may end after this")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--smoke", action="store_true", help="tiny: 2 steps, 1 seed, 3 blocks; results go to outputs/")
    parser.add_argument("--name", default="study", help="of the result files")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps, args.batch, args.length, args.prompts, args.new_tokens = 1, 2, 2, 128, 3, 4
    return args


def main() -> None:
    args = parse_args()
    folder = Path("outputs") if args.smoke else results.FOLDER
    settings = {name: getattr(args, name) for name in SETTINGS}
    path, runs, failed = folder / f"{args.name}.json", [], 0
    if args.smoke:
        path.unlink(missing_ok=True)
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            fail(f"{path} has other settings, {record['settings']}: remove it, or pass another --name")
        runs = record["runs"]

    # Every recipe of a model compiles the same code anew.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    study = Study(args)
    notes = NOTES.format(examples=len(study.train), compiled=", each block compiled" if args.compile else "", **settings)
    print(f"ready after {time.perf_counter() - study.started:.0f} s", flush=True)

    def record(run: dict) -> None:
        runs.append(run)
        title = f"Fine-tuning {args.model or 'SmolLM2-135M-Instruct'} on {args.data}"
        results.write(args.name, title, table(runs), notes, folder, quiet=True, settings=settings, runs=runs)
        print(json.dumps(run, ensure_ascii=False), flush=True)

    done = {(run["model"], run["recipe"], run["seed"]) for run in runs}
    for which in MODELS:
        if (which, "untrained", 0) not in done:
            record({"model": which, "recipe": "untrained", "seed": 0} | study.evaluate(study.states[which]))
    longest = {True: 25.0, False: 8.0}  # seconds of a run, the first of its recipe or not
    for task in (task for task in queue(args.only, args.seeds) if task not in done):
        new = task[1] not in study.models
        if time.perf_counter() - study.started + longest[new] > args.budget_seconds:
            print(f"stopped before {task}: the budget of {args.budget_seconds:.0f} s is spent")
            break
        try:
            record(study.run(*task))
            longest[new] = max(longest[new], runs[-1]["seconds"]) if new else runs[-1]["seconds"] * 1.5
        except Exception as error:
            print(f"{task} failed: {error!r:.500}", file=sys.stderr, flush=True)
            failed += 1
    draw(args.name, runs, folder)
    print((folder / f"{args.name}.md").read_text())
    if failed:
        fail(f"{failed} runs failed")


if __name__ == "__main__":
    main()
