"""Reference models of TRL's trainers, which are to be quantised as the model in training is.

``DPOTrainer``, ``GRPOTrainer``, ``KTOTrainer`` and ``RLOOTrainer`` that are given no reference model load one from the path
that ``model.config`` names, and so in high precision, whatever ``quantize_`` made of the model (TRL 1.16; a neighbour of this:
https://github.com/huggingface/trl/pull/6312). They offer no hook between this and the training, so ``Trainer.train``, which
all of them inherit, is wrapped once a model has been converted.
"""

import sys
import warnings
from functools import wraps
from typing import Any

from torch import nn

from halo_tensor.weight.fsdp import is_sharded
from halo_tensor.weight.tensor import HaloWeight


def watch_trainers() -> None:
    """Let transformers' ``Trainer``, if it has been imported, warn of a reference model in high precision."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or getattr(trainer.train, "warns_of_references", False):
        return
    train = trainer.train

    @wraps(train)
    def watched(self, *args, **kwargs):
        _warn_of_reference(self.model, getattr(self, "ref_model", None))
        return train(self, *args, **kwargs)

    watched.warns_of_references = True  # type: ignore[attr-defined]
    trainer.train = watched


def _warn_of_reference(model: nn.Module, reference: nn.Module | None) -> None:
    if reference is not None and _count(model) and not _count(reference):
        warnings.warn(
            f"{_count(model)} layers of the model are converted and none of its reference model, which computes in high "
            "precision: the two differ before the first step. Convert it before training, quantize_(trainer.ref_model, "
            "config), or pass the trainer ref_model=copy.deepcopy(model)",
            stacklevel=3,
        )


def _count(model: nn.Module) -> int:
    """How many converted weights a model has."""
    return sum(isinstance(parameter, HaloWeight) or is_sharded(parameter) for parameter in model.parameters())
