"""What happens between the making of a transformers Trainer and its training; and a refusal of DeepSpeed.

A trainer of TRL whose reference model is not quantised as the model in training is gives a warning.

Without a reference model, ``DPOTrainer``, ``GRPOTrainer``, ``KTOTrainer`` and ``RLOOTrainer`` load one from the path in
``model.config``, in high precision, even if ``quantize_`` has converted the model (TRL 1.16; a related change is
https://github.com/huggingface/trl/pull/6312). They have no hook between this and the training, so ``Trainer.train``, which all
of them inherit, is wrapped when a model is converted. A callback of this library that has ``halo_before_training`` is called
there, with the trainer, before anything is wrapped or sharded.
"""

import sys
import warnings
from functools import wraps
from typing import Any

from torch import nn

from halo_tensor.weight.sharded_parameters import is_sharded
from halo_tensor.weight.tensor import HaloWeight

NO_DEEPSPEED = (
    "DeepSpeed replaces and flattens parameters in ways that a converted model does not survive: train it with FSDP2, which "
    "sends codes and shards optimiser states as ZeRO does, or with DDP"
)


def watch_trainers() -> None:
    """Make transformers' ``Trainer``, if it has been imported, warn of a reference model in high precision."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or getattr(trainer.train, "warns_of_references", False):
        return
    train = trainer.train

    @wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "halo_before_training"):
                callback.halo_before_training(self, resumed)
        _warn_of_reference(self.model, getattr(self, "ref_model", None))
        return train(self, *args, **kwargs)

    watched.warns_of_references = True  # type: ignore[attr-defined]
    trainer.train = watched


def watch_deepspeed() -> None:
    """Make ``deepspeed.initialize``, if deepspeed has been imported, refuse converted models.

    Its engine refers to parameters weakly and then calls ``module.to``, which must swap a parameter of a tensor subclass, so
    that PyTorch raises "Couldn't swap Linear.weight" (deepspeed 0.19.8). Its flat buffers also change weights in ways that
    count no versions, which codes cannot follow.
    """
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is None or getattr(deepspeed.initialize, "refuses_halo", False):
        return
    initialize = deepspeed.initialize

    @wraps(initialize)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, nn.Module) and _count(value) for value in (*args, *kwargs.values())):
            raise ValueError(NO_DEEPSPEED)
        return initialize(*args, **kwargs)

    refusing.refuses_halo = True  # type: ignore[attr-defined]
    deepspeed.initialize = refusing


def _warn_of_reference(model: nn.Module, reference: nn.Module | None) -> None:
    if reference is not None and _count(model) and not _count(reference):
        warnings.warn(
            f"{_count(model)} layers of the model are converted and none of its reference model, which computes in high "
            "precision: the two differ before the first step. Convert it before training, quantize_(trainer.ref_model, "
            "config), or pass the trainer ref_model=copy.deepcopy(model)",
            stacklevel=3,
        )


def _count(model: nn.Module) -> int:
    """Return how many converted weights a model has."""
    return sum(isinstance(parameter, HaloWeight) or is_sharded(parameter) for parameter in model.parameters())
