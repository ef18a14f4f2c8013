"""The first batches of a Trainer's training data, before it trains."""

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn


def first_batches(trainer: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the first batches of the trainer's dataloader, the same on all ranks: those of the first one.

    The random state stays as it was, so that training sees the data in the order in which it would have seen them.
    """
    with _kept_random_state():
        loader = trainer.get_train_dataloader()
        batches = [send_to_device(batch, "cpu") for batch in islice(loader, count)]
    if hasattr(loader, "end"):  # accelerate's, which counts on being read to its end
        loader.end()
    if trainer.accelerator.num_processes > 1:
        shared: Any = broadcast_object_list([batches])
        batches = shared[0]
    if len(batches) < count:
        raise ValueError(f"the training data have {len(batches)} batches, fewer than balance={count}")
    return batches


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model's forward takes of a batch, on the model's device.

    Raises:
        ValueError: it takes nothing of it.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()  # of PEFT, whose forward names no arguments
    names = inspect.signature(base.forward).parameters
    taken = {name: value for name, value in batch.items() if name in names} if isinstance(batch, Mapping) else {}
    if not any(isinstance(value, torch.Tensor) for value in taken.values()):
        keys = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"the batches of this trainer ({keys}) are nothing that {type(base).__name__}.forward takes: pass batches for it, "
            "HaloCallback(..., balance=[tokenizer(texts, return_tensors='pt'), ...])"
        )
    return send_to_device(taken, next(model.parameters()).device)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what samplers and collators draw from
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
