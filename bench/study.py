"""Fine-tune with each recipe and compare the models: text-to-SQL, several seeds, a model as shipped and one with outliers.

    python bench/study.py                                              # 800 chats to train on from the Hugging Face hub
    python bench/study.py --data chats.jsonl --budget-seconds 520      # call it again to continue where it stopped
    python bench/study.py --data chats.jsonl --part 0/8                # one of 8 processes that share a GPU
    python bench/study.py --join                                       # merge what they wrote
    python bench/study.py --no-compile --variants "as shipped" --name study_memory --only bf16 halo1-int8-balanced-head
    python bench/study.py --data chats.jsonl --smoke                   # every code path, on any machine
    python bench/study.py --data chats.jsonl --final 0.2.0             # on the reserved part, once for a release

The model with outliers is that of bench/outliers.py. It computes the same function; large models have such channels by
themselves. The seed of a run determines the order of the data and the random signs of the rotation. Results are written after
every run.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby, pairwise
from pathlib import Path

import results
import torch
from common import fail, load_model
from contenders import BALANCED, DRAWN, convert, draw_gains, rotated, split_head
from data import SOURCES, Chat, batches, encode, load_chats, pack, read_chats
from evaluation import answers, exact_match, mean_loss, sql
from outliers import inject_outliers
from split import RESERVED, split
from study_results import EAGER, MAIN, MODELS, NOTES, OTHERS, draw, join, key, load, write
from torch import nn

from halo_tensor import balance_
from halo_tensor.transformers import fuse_head_
from halo_tensor.weight.tensor import dense_value

HUB_CHATS = 800  # from a data set of the hub, for training and the reserved part
MOST_RUNS = 8  # runs of a group in one piece, if several processes share the work
#: Options that the runs of one record share. A record of --final belongs to one release, and refuses another commit as well.
SETTINGS = (
    "model",
    "data",
    "dtype",
    "steps",
    "batch",
    "length",
    "lr",
    "prompts",
    "new_tokens",
    "compile",
    "reserved",
    "final",
    "commit",
)


class Study:
    """The models, the data, and the exact gradients that have been computed."""

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
        self.parts = split(chats_of(args.data, args.prompts), args.prompts)
        self.valid = self.parts.reserved[: args.prompts] if args.final else self.parts.held_out
        self.train = [encode(self.tokenizer, chat) for chat in self.parts.train]
        self.pad = self.tokenizer.pad_token_id or 0
        self.valid_rows = pack([encode(self.tokenizer, chat) for chat in self.valid], args.length, self.pad)
        self.probe = self._on_device(next(batches(self.train, args.batch, args.length, self.pad, seed=0)))
        self.group: tuple | None = None
        self.converted: nn.Module | None = None  # the model of that group
        self.exact: dict[str, dict[str, torch.Tensor]] = {}

    def _on_device(self, rows: dict) -> dict:
        return {name: values.to(self.device) for name, values in rows.items()}

    def model(self, recipe: str, seed: int) -> nn.Module:
        """Return the converted model of a group of runs. It is compiled once and kept until another group's turn."""
        if self.group != group_of(recipe, seed):
            self.group = self.converted = None
            gc.collect()  # a compiled module refers to itself
            model = deepcopy(self.plain).requires_grad_(True)
            layers, head = split_head(recipe)
            convert(model, "bf16" if layers == EAGER else layers, seed)
            if head:
                fuse_head_(model)
            if self.args.compile and recipe != EAGER:
                for block in model.model.layers:
                    block.compile(fullgraph=True, dynamic=False)
            self.group, self.converted = group_of(recipe, seed), model
        return self.converted

    def gradient(self, model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**self.probe, use_cache=False).loss.backward()
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if "_proj" in name}
        model.zero_grad()
        return gradients

    def cosine(self, which: str, model: nn.Module) -> float:
        if which not in self.exact:
            self.plain.load_state_dict(self.states[which])
            exact = deepcopy(self.plain).float().requires_grad_(True).train()
            exact.gradient_checkpointing_enable({"use_reentrant": False})  # it would need the most memory
            self.exact[which] = self.gradient(exact)
        pairs = [(g.double(), self.exact[which][name].double()) for name, g in self.gradient(model).items()]
        dots = [sum((a * b).sum() for a, b in [(pair[i], pair[j]) for pair in pairs]) for i, j in ((0, 1), (0, 0), (1, 1))]
        return (dots[0] / (dots[1] * dots[2]).sqrt()).item()

    def run(self, which: str, recipe: str, seed: int) -> dict:
        start = time.perf_counter()
        model = self.model(recipe, seed)
        model.load_state_dict(self.states[which])
        run = {"model": which, "recipe": recipe, "seed": seed, "rotation seed": group_of(recipe, seed)[1]}
        if split_head(recipe)[0].endswith(BALANCED):
            self.balance(model, seed)
        if recipe.endswith(DRAWN):
            draw_gains(model, seed)
        run["cosine"] = self.cosine(which, model)
        run |= self.fit(model, seed)
        run["by recipe"] = self.loss_by_recipe(model)
        run |= self.evaluate(model.state_dict())
        if self.args.part and self.device == "cuda":
            torch.cuda.empty_cache()  # other processes may need the memory
        return run | {"seconds": time.perf_counter() - start}

    def balance(self, model: nn.Module, seed: int) -> None:
        """Balance on a batch of training data that is neither the batch of the cosine nor the first training batch."""
        args = self.args
        rows = next(batches(self.train, args.batch, args.length, self.pad, seed + 1000))
        balance_(model, **self._on_device(rows), use_cache=False)

    def fit(self, model: nn.Module, seed: int) -> dict:
        args = self.args
        parameters = [p for p in model.parameters() if p.requires_grad]
        copies = [p.detach().to(torch.float32, copy=True) for p in map(dense_value, parameters)]
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
        speed = None if args.part else args.batch * args.length / seconds  # several processes on one GPU slow each other down
        return {"train": sum(last) / len(last), "tokens/s": speed}

    def _stamp(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def loss_by_recipe(self, model: nn.Module) -> float:
        """Return the validation loss of the converted model. It runs the graph that training has compiled."""
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


def _elapsed(a, b) -> float:
    """Return the seconds between two stamps."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def group_of(recipe: str, seed: int) -> tuple[str, int | None]:
    """Return what identifies a compiled model. Random signs are constants of its code."""
    return recipe, seed if rotated(recipe) else None


def queue(recipes: list[str], seeds: int, other_seeds: int, variants: Sequence[str] = MODELS) -> list[tuple[str, str, int]]:
    """Return (model, recipe, seed) of all runs in order, group by group.

    The main recipes come first. Runs of the other rotated recipes are ordered by seed.
    """
    first = [(which, recipe, seed) for recipe in MAIN for seed in range(seeds) for which in variants]
    rest = [(which, recipe, seed) for recipe in OTHERS for seed in range(other_seeds) for which in variants]
    rest.sort(key=lambda task: group_of(*task[1:])[1] or 0)
    return [task for task in first + rest if task[1] in recipes]


def share(tasks: list[tuple], part: int, parts: int, most: int = MOST_RUNS) -> list[tuple]:
    """Return the tasks that one of ``parts`` processes does.

    The longest group goes to the process with the least work, main recipes before the others. Groups of many runs are cut into
    pieces of ``most``, each of which compiles by itself.
    """
    whole = [list(group) for _, group in groupby(tasks, lambda task: group_of(*task[1:]))]
    groups = [group[i : i + most] for group in whole for i in range(0, len(group), most)]
    loads, mine = [0] * parts, []
    for group in sorted(groups, key=lambda group: (group[0][1] not in MAIN, -_cost(group))):
        least = loads.index(min(loads))
        loads[least] += _cost(group)
        mine += group if least == part else []
    return sorted(mine, key=tasks.index)


def _cost(group: list[tuple]) -> int:
    """Estimate the time of a group on an H100, in runs of bf16. Compiling takes 2, and a run of another recipe takes 2."""
    return 2 + len(group) * (1 if group[0][1] in ("bf16", EAGER) else 2)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"a part is I/N with I below N, 0/8 for example; got {text!r}")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "study")
    sources = f"one of {', '.join(SOURCES)} (from the hub), or a .jsonl with messages in every line, the last for validation"
    parser.add_argument("--data", default="sql", help=sources)
    parser.add_argument("--model", help="path (.gguf too) or hub name of a Llama (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", help="dtype of the weights")
    parser.add_argument("--only", nargs="+", default=[*MAIN, *OTHERS], choices=[*MAIN, *OTHERS], metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=8, help=f"seeds of {', '.join(MAIN)}")
    parser.add_argument("--other-seeds", type=int, default=3, help="seeds of the other recipes")
    parser.add_argument("--variants", nargs="+", default=MODELS, choices=MODELS, help="of the model (default: both)")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="rows of packed conversations")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=100, help="conversations for validation: the last ones are held out")
    parser.add_argument("--final", metavar="RELEASE", help="evaluate on the reserved part instead, for this release and once")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that an answer may have")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run that may end after this")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--smoke", action="store_true", help="tiny: 2 steps, 1 seed, 3 blocks; results go to outputs/")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--part", type=_part, metavar="I/N", help="do the I-th (from 0) of N shares of the runs not done yet")
    several.add_argument("--join", action="store_true", help="merge what the parts wrote, and stop")
    args = parser.parse_args(argv)
    args.reserved, args.commit = RESERVED, None
    if args.final:
        args.commit, args.name = results.commit(), f"{args.name}_final_{args.final}"
        if not args.smoke and (args.commit is None or args.commit.endswith("-dirty")):
            parser.error(f"--final is for the commit of a release, and this is {args.commit or 'unknown'}: commit first")
    if args.smoke:
        args.seeds = args.other_seeds = 1
        args.steps, args.batch, args.length, args.prompts, args.new_tokens = 2, 2, 128, 3, 4
    return args


def chats_of(data: str, held_out: int) -> list[Chat]:
    """Return the chats for training and for the reserved part, followed by ``held_out`` chats."""
    if data not in SOURCES:
        return read_chats(data)
    train, valid = load_chats(data, max(HUB_CHATS, held_out))
    return train[:HUB_CHATS] + valid[:held_out]


def read(path: Path, settings: dict) -> list[dict]:
    """Return the runs in ``path``, or none if the file does not exist."""
    return load(path, settings)["runs"] if path.exists() else []


def main() -> None:
    args = parse_args()
    folder = Path("outputs") if args.smoke and args.folder == results.FOLDER else args.folder
    if args.join:
        return join(args.name, folder)
    settings, failed = {name: getattr(args, name) for name in SETTINGS}, 0
    title = f"Fine-tuning {args.model or 'SmolLM2-135M-Instruct'} on {args.data}"
    title += f", release {args.final} on the reserved part" if args.final else ""
    whole = folder / f"{args.name}.json"
    path = folder / f"{args.name}_part{args.part[0]}.json" if args.part else whole
    if args.smoke:
        for old in (whole, path):
            old.unlink(missing_ok=True)
    done = {key(run) for run in read(whole, settings)}
    tasks = [task for task in queue(args.only, args.seeds, args.other_seeds, args.variants) if task not in done]
    if args.part:  # no part writes to the whole record, so all parts compute the same shares
        tasks = share(tasks, *args.part, most=MOST_RUNS if args.compile else 1)
    runs = read(path, settings)
    done |= {key(run) for run in runs}

    # Every group compiles the same code again.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    study = Study(args)
    notes = NOTES.format(
        examples=len(study.train),
        compiled=", each block compiled" if args.compile else "",
        evaluated=f"{len(study.valid)} {'reserved' if args.final else 'held-out'} prompts",
        **settings,
    )
    about = {"settings": settings, "parts": study.parts.described()}
    print(f"ready after {time.perf_counter() - study.started:.0f} s", flush=True)

    made = results.made()
    made["command"] = re.sub(r"(--part[ =])\d+/", r"\g<1>0/", made["command"])  # all parts are recorded with one command

    def record(run: dict) -> None:
        runs.append(run | {"made": made})
        if args.part:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(results.dumps({"title": title, "notes": notes, **about, "runs": runs}))
        else:
            write(args.name, title, runs, notes, folder, **about)
        print(json.dumps(run, ensure_ascii=False), flush=True)

    for which in args.variants if not args.part or args.part[0] == 0 else ():
        if (which, "untrained", 0) not in done:
            first = {"model": which, "recipe": "untrained", "seed": 0, "rotation seed": None}
            record(first | study.evaluate(study.states[which]))
    longest = {True: 25.0, False: 8.0}  # first run of its group? -> seconds of a run
    for task in (task for task in tasks if task not in done):
        new = study.group != group_of(*task[1:])
        if time.perf_counter() - study.started + longest[new] > args.budget_seconds:
            print(f"stopped before {task}: the budget of {args.budget_seconds:.0f} s is spent")
            break
        try:
            record(study.run(*task))
            longest[new] = max(longest[new], runs[-1]["seconds"]) if new else runs[-1]["seconds"] * 1.5
        except Exception as error:
            print(f"{task} failed: {error!r:.500}", file=sys.stderr, flush=True)
            failed += 1
    if not args.part:
        draw(args.name, runs, folder)
        print((folder / f"{args.name}.md").read_text())
    if failed:
        fail(f"{failed} runs failed")


if __name__ == "__main__":
    main()
