"""Chats for fine-tuning: loading them, choosing which tokens are learnt, and packing them into rows."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import fail, messages_of, one_line, rows_of

Chat = list[dict[str, str]]  # of {"role": "user", "content": "…"}; the answer to learn comes last
Rows = dict[str, torch.Tensor]  # input_ids, labels and position_ids, each [rows, length] of int64
IGNORED = -100  # label of a token that is not learnt

# The chat template for tokenizers that have none.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token | default('') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Source:
    """A data set of the Hugging Face hub.

    It has arguments of ``load_dataset``, a function that makes a prompt and its answer from a row, and the paper's learning
    rate.
    """

    name: tuple[str, ...]
    train: str
    valid: str
    prompt: Callable[[dict], str]
    answer: Callable[[dict], str]
    lr: float
    revision: str | None = None


SOURCES = {
    "sql": Source(
        ("b-mc2/sql-create-context",),
        "train[1000:]",
        "train[:1000]",
        lambda row: (
            "Write a SQL query to answer the question based on the table schema.\n\n"
            f" context: {row['context']}\n\n question: {row['question']}"
        ),
        lambda row: row["answer"],
        lr=3e-5,
    ),
    "viggo": Source(
        ("GEM/viggo",),
        "train",
        "validation",
        lambda row: (
            "Write the meaning of this sentence as one function with its attributes, like "
            f"inform(name[Portal], rating[good]).\n\n sentence: {row['target']}"
        ),
        lambda row: row["meaning_representation"],
        lr=4e-5,
        revision="refs/convert/parquet",  # the main branch has a loading script, which datasets does not run any more
    ),
    "gsm8k": Source(
        ("openai/gsm8k", "main"), "train", "test", lambda row: row["question"], lambda row: row["answer"], lr=6e-6
    ),
}


def load_chats(name: str, limit: int | None = None) -> tuple[list[Chat], list[Chat]]:
    """Return chats to train on and chats to validate with, at most ``limit`` of each.

    ``name`` is one of ``SOURCES``, or a JSONL file with "messages" in every line. The last tenth of a file, at most 1000
    chats, is for validation.
    """
    if name not in SOURCES:
        chats = read_chats(name)
        if len(chats) < 2:
            fail(f"{name!r} has one chat: there must be one to train on and another to validate with")
        held_out = min(len(chats) // 10 + 1, 1000)
        return chats[:-held_out][:limit], chats[-held_out:][:limit]
    source = SOURCES[name]
    try:
        from datasets import load_dataset

        splits = [load_dataset(*source.name, split=s, revision=source.revision) for s in (source.train, source.valid)]
    except Exception as error:  # every library below raises its own errors
        fail(
            f"cannot load {source.name[0]} from the hub ({one_line(error)}): pip install datasets and be online, or pass "
            "--dataset with a .jsonl that has messages in every line"
        )
    return tuple(
        [
            [{"role": "user", "content": source.prompt(row)}, {"role": "assistant", "content": source.answer(row)}]
            for row in split.select(range(min(limit or len(split), len(split))))
        ]
        for split in splits
    )


def read_chats(path: str) -> list[Chat]:
    """Return the "messages" of every line of a JSONL file."""
    if not Path(path).is_file():
        fail(f"there is no file {path!r}: pass one of {', '.join(SOURCES)}, or a .jsonl with messages in every line")
    chats = []
    for where, row in rows_of(path):
        chat = messages_of(row, where)
        if chat[-1]["role"] != "assistant":
            fail(f"{where}: the last message must be the assistant's, which is learnt, not the {chat[-1]['role']}'s")
        chats.append(chat)
    if not chats:
        fail(f"{path!r} has no chats: pass a .jsonl with messages in every line")
    return chats


def render(tokenizer, chat: Chat, **options) -> str:
    template = tokenizer.chat_template or CHAT_TEMPLATE
    try:
        return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    except Exception as error:  # raised by the template for roles or an order that it does not know
        begin = chat[0]["content"][:60] if chat else ""
        fail(f"the tokenizer's chat template does not take the chat {begin!r}… ({one_line(error)})")


def prompt_of(tokenizer, chat: Chat) -> str:
    """Return what the model sees before it writes the last answer."""
    return render(tokenizer, chat[:-1], add_generation_prompt=True)


def encode(tokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of a chat.

    The assistant's turns, with their end of turn, are learnt; the rest is given. Prompts and answers are tokenised
    separately, as in generation.
    """
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn in (i for i, message in enumerate(chat) if message["role"] == "assistant"):
        prompt = render(tokenizer, chat[:turn], add_generation_prompt=True)
        whole = render(tokenizer, chat[: turn + 1])
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            fail("this tokenizer's chat template rewrites earlier turns, so what is learnt cannot be told from what is given")
        for text, learnt in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        done = whole
    return ids, labels


def learnable(examples: list[tuple[list[int], list[int]]], length: int) -> list[tuple[list[int], list[int]]]:
    """Return the examples of which something is learnt within the first ``length`` tokens.

    :func:`pack` would cut the answers of the others.
    """
    kept = [(ids, labels) for ids, labels in examples if any(label != IGNORED for label in labels[:length])]
    if not kept:
        fail(f"no answer of {len(examples)} chats begins within {length} tokens: pass a larger --length")
    return kept


def pack(examples: list[tuple[list[int], list[int]]], length: int, pad: int) -> Rows:
    """Pack examples into rows of ``length`` tokens. An example is never split, and one that is too long is cut.

    Positions start from 0 in every example. If they are passed and there is no cache, transformers restricts attention to each
    example, so that the loss is the same as without packing.
    """
    rows: list[list[tuple[list[int], list[int]]]] = []
    room: list[int] = []
    for ids, labels in examples:
        size = min(len(ids), length)
        first = max(len(rows) - 32, 0)  # older rows are nearly full
        row = next((i for i in range(first, len(rows)) if room[i] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append((ids[:size], labels[:size]))
        room[row] -= size
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row, left in zip(rows, room, strict=True):
        pieces = row + [([pad] * left, [IGNORED] * left)]
        packed["input_ids"].append([token for ids, _ in pieces for token in ids])
        packed["labels"].append([label for _, labels in pieces for label in labels])
        packed["position_ids"].append([i for ids, _ in pieces for i in range(len(ids))])
    return {name: torch.tensor(values) for name, values in packed.items()}


def batches(examples: list, batch: int, length: int, pad: int, seed: int, start: int = 0) -> Iterator[Rows]:
    """Yield batches of ``batch`` rows without end, beginning with the batch ``start``.

    Every epoch shuffles and packs the examples again. ``seed`` determines the order, so the same call yields the same batches.
    """
    step = 0
    for epoch in range(2**31):
        order = random.Random(f"{seed} {epoch}").sample(examples, len(examples))
        rows = pack(order, length, pad)
        whole = len(rows["input_ids"]) // batch
        if not whole:
            fail(f"{len(examples)} examples do not fill one batch of {batch} rows of {length} tokens")
        for i in range(whole):
            if step >= start:
                yield {name: values[i * batch : (i + 1) * batch] for name, values in rows.items()}
            step += 1


def steps_per_epoch(examples: list, batch: int, length: int) -> int:
    """Return about how many batches :func:`batches` yields in an epoch. Every epoch packs a little differently."""
    return max(len(pack(examples, length, 0)["input_ids"]) // batch, 1)
