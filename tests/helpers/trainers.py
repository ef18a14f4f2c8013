"""transformers' Trainer on a small Llama."""

from pathlib import Path

import pytest
import torch

from tests.helpers.recording import OpLog
from tests.helpers.small_models import save_small_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoTokenizer, Trainer, TrainingArguments  # noqa: E402


def save_chat_model(folder: Path) -> Path:
    """Save a small Llama with its tokenizer, which has a chat template, and return the folder."""
    save_small_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "~", "pad_token": "~"})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}~{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


class Rows(torch.utils.data.Dataset):
    """Sequences to learn by heart."""

    def __init__(self, count: int):
        self.ids = torch.randint(16, (count, 64), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(output, **options) -> dict:
    return {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": 0,
    } | options


def trainer(model, output, callbacks=(), **options) -> Trainer:
    args = TrainingArguments(**arguments(output, **options))
    return Trainer(model, args, train_dataset=Rows(32), eval_dataset=Rows(8), callbacks=list(callbacks))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def products(log: OpLog) -> int:
    return log.products().count(torch.int8)
