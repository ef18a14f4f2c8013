"""``HaloCallback``: switches the library on in transformers' ``Trainer`` and in TRL's trainers."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from halo_tensor.calibration.balance import balance_over
from halo_tensor.calibration.balance_state import balance_of, set_balance
from halo_tensor.convert import Conversion
from halo_tensor.diagnostics.reports.api import Report, report
from halo_tensor.switch import Switch, converted_weights
from halo_tensor.trainers import NO_DEEPSPEED
from halo_tensor.transformers.batches import first_batches, inputs_of

logger = logging.getLogger("halo_tensor")
#: The file in a checkpoint that holds the balance, which state dicts do not contain.
BALANCE_FILE = "halo_balance.pt"


class HaloCallback(TrainerCallback):
    """Converts the model of a ``Trainer`` before its optimiser exists and before anything wraps or shards the model.

    ``Trainer(model, args, callbacks=[HaloCallback(level=1, dtype="int8")])`` is all that a script needs. It works with
    transformers' ``Trainer`` and TRL's ``SFTTrainer``, ``DPOTrainer`` and ``GRPOTrainer``, whose reference models are
    converted and balanced in the same way. Adapters (``peft_config``) stay in high precision, and their base is held as codes.

    What was converted goes to the trainer's loggers as ``halo/layers`` and ``halo/share``. Checkpoints are plain; one of a
    balanced model has a file ``halo_balance.pt`` besides, which a resumed run reads, so that it continues exactly.

    Args:
        value: a dtype ("int8"), the name of a recipe ("hot_llm"), the path of a file that ``LayerConfigs.save`` wrote, a JSON
            object, a mapping of options, or a config of :func:`~halo_tensor.halo_config` or others.
        balance: how many batches of training data to balance the model on, or these batches themselves, as mappings of tensors
            for the model's forward. The data are taken from the trainer's own dataloader, and all ranks take those of the
            first one.
        report: whether to call :func:`~halo_tensor.report` on the first batch. Its result is written to ``halo_report.html``
            in ``output_dir``, and its cosines go to the loggers.
        **options: ``level``, ``dtype`` and other fields of :class:`~halo_tensor.HaloConfig`, or ``recipe``. Without ``level``,
            fp8 is not rotated (level 0), and int8 gets level 1.

    Attributes:
        conversion: which layers were converted, and why others were not; None before the trainer is made.
        balance: log₂ of the gains of each balanced layer, qualified name -> int8 [in_features]; empty before training begins.
        report: the :class:`~halo_tensor.Report`, if one was asked for and training has begun.

    Raises:
        ValueError: an option is not valid. Later: no layer was converted; the model is converted already; an optimiser was
            made before; DeepSpeed is used; or the model that is trained is not the one that was converted (``model_init``).

    Example:
        >>> from halo_tensor.transformers import HaloCallback
        >>> HaloCallback(level=1, dtype="int8").switch.config
        HaloConfig(level=1, dtype='int8', granularity='row', block_size=128, seed=0)
        >>> HaloCallback("fp8", balance=2).switch
        Switch(config=HaloConfig(level=0, dtype='fp8', granularity='row', block_size=128, seed=0), balance=2, report=False)
    """

    def __init__(
        self,
        value: Any = None,
        *,
        balance: int | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        report: bool | None = None,
        **options: Any,
    ):
        self.batches: list[Mapping[str, Any]] | None = None
        if balance is not None and not isinstance(balance, int):
            self.batches = [balance] if isinstance(balance, Mapping) else list(balance)
            balance = len(self.batches)
        given = {"balance": balance, "report": report}
        self.switch = Switch.of(value, **options, **{name: v for name, v in given.items() if v is not None})
        self.conversion: Conversion | None = None
        self.balance: dict[str, torch.Tensor] = {}
        self.report: Report | None = None
        self._trainer: Any = None
        self._is_logged = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Convert the model. The trainer calls this at the end of its ``__init__``."""
        if getattr(args, "deepspeed", None):
            raise ValueError(NO_DEEPSPEED)
        self.conversion = self.switch.convert(kwargs["model"])

    def halo_before_training(self, trainer: Any, resumed: str | bool | None) -> None:
        """Balance the model, and convert a reference model. ``Trainer.train`` calls this before it does anything else."""
        self._trainer = trainer
        if self.conversion is None:
            return  # on_train_begin refuses
        reference = getattr(trainer, "ref_model", None)
        if reference is not None and not converted_weights(reference):
            self.switch.convert(reference)
        folder = get_last_checkpoint(trainer.args.output_dir) if resumed is True else resumed or None
        saved = Path(folder) / BALANCE_FILE if folder else None
        if self.switch.balance and not self.balance:
            if saved is not None and saved.exists():
                set_balance(trainer.model, torch.load(saved, weights_only=True))
            else:
                self._balance(trainer, trainer.model)
            self.balance = balance_of(trainer.model)
            if reference is not None and _are_alike(reference, trainer.model):
                set_balance(reference, self.balance)
            elif reference is not None:
                self._balance(trainer, reference)
        if self.switch.report and self.report is None:
            self._report(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse to train a model that is not converted."""
        if self.conversion is None:
            raise ValueError(
                "HaloCallback has converted nothing, since it was added to a trainer that exists: pass it in "
                "Trainer(..., callbacks=[HaloCallback(...)])"
            )
        if not converted_weights(kwargs["model"]):
            raise ValueError(
                "the model that this trainer is about to train is not the one that HaloCallback converted, but a new one, as "
                "model_init makes: call quantize_(model, config) in model_init instead of HaloCallback"
            )
        self._is_logged = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the conversion before the first step: in ``on_train_begin`` the trainer's progress bar does not exist yet."""
        if self._is_logged or self.conversion is None:
            return
        self._is_logged = True
        logs: dict[str, float] = {"halo/layers": len(self.conversion.converted), "halo/share": self.conversion.share}
        if self.switch.balance:
            logs["halo/balanced"] = len(self.balance)
        if self.report is not None:
            logs |= {f"halo/cosine/{candidate.name}": candidate.cosine for candidate in self.report.candidates}
        self._trainer.log(logs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the balance into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.balance and state.is_world_process_zero and folder.is_dir():
            torch.save(self.balance, folder / BALANCE_FILE)

    def _balance(self, trainer: Any, model: nn.Module) -> None:
        batches = self.batches or first_batches(trainer, self.switch.balance)
        balance_over(model, [((), inputs_of(model, batch)) for batch in batches])

    def _report(self, trainer: Any) -> None:
        """Measure on the first process alone; nothing is wrapped yet, so the others need not take part."""
        batch = (self.batches or first_batches(trainer, 1))[0]
        if not trainer.is_world_process_zero():
            return
        inputs = inputs_of(trainer.model, batch)
        inputs.setdefault("labels", inputs.get("input_ids"))
        self.report = report(trainer.model, inputs)
        Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.report.to_html(Path(trainer.args.output_dir) / "halo_report.html")
        logger.info("%s", self.report)


def _are_alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters, so that one can be balanced as the other is."""
    shapes = [{name: parameter.shape for name, parameter in m.named_parameters()} for m in (model, other)]
    return shapes[0] == shapes[1]
