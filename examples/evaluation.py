"""Evaluation of a fine-tuned model: its loss on held-out chats, and how many of its greedy answers are exact."""

import re
from collections.abc import Callable

import torch
from data import IGNORED, Chat, Rows, prompt_of


@torch.no_grad()
def mean_loss(model, rows: Rows, batch: int) -> float:
    """Return the cross-entropy per learnt token of packed rows, in nats."""
    total, count = 0.0, 0
    for i in range(0, len(rows["input_ids"]), batch):
        part = {name: values[i : i + batch].to(model.device) for name, values in rows.items()}
        learnt = int((part["labels"] != IGNORED).sum())
        if learnt:
            total += model(**part, use_cache=False).loss.item() * learnt
            count += learnt
    return total / count


@torch.no_grad()
def answers(model, tokenizer, chats: list[Chat], batch: int, limit: int) -> list[str]:
    """Return the model's own last turn of every chat, generated greedily with at most ``limit`` tokens."""
    written: list[str] = []
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for i in range(0, len(chats), batch):
        prompts = [prompt_of(tokenizer, chat) for chat in chats[i : i + batch]]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        written += tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    tokenizer.padding_side = side
    return written


def sql(text: str) -> str:
    """Normalise case, spacing, quotes and the closing semicolon of a query."""
    return " ".join(text.replace('"', "'").rstrip("; \n").split()).lower()


def number(text: str) -> str | None:
    """Return what follows ####, without thousands separators and trailing zeros."""
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return None if found is None else f"{float(found[1].replace(',', '')):.15g}"


def meaning(text: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the function and the attributes of name(attribute[value], …), in any order."""
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    if found is None:
        return None
    return found[1].lower(), sorted((k, v.strip().lower()) for k, v in re.findall(r"(\w+)\s*\[(.*?)\]", found[2]))


#: data set -> (function whose value must be the same for an exact answer, how many tokens an answer may have)
EXACT: dict[str, tuple[Callable, int]] = {"sql": (sql, 128), "viggo": (meaning, 192), "gsm8k": (number, 384)}


def exact_match(written: list[str], chats: list[Chat], key: Callable) -> float:
    """Return the fraction of answers whose ``key`` is that of the chat's own last turn."""
    right = [key(answer) == key(chat[-1]["content"]) is not None for answer, chat in zip(written, chats, strict=True)]
    return sum(right) / len(right)
