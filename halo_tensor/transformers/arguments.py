"""``HaloArguments``: ``--halo int8`` on the command line of a training script."""

from dataclasses import dataclass, field

from halo_tensor.switch import Switch
from halo_tensor.transformers.callback import HaloCallback


@dataclass
class HaloArguments:
    """Arguments of a training script, for transformers' and TRL's parsers, next to ``TrainingArguments``.

    Args:
        halo: what to train in: a dtype ("int8"), the name of a recipe ("hot_llm"), the path of a .json file of
            ``LayerConfigs``, or a JSON object of options, ``{"level": 2, "dtype": "int8", "skip": "lm_head|gate"}`` for
            example. None trains in high precision.
        halo_level: the level of HALO, if ``halo`` is a dtype.
        halo_balance: how many batches of training data to balance the model on.
        halo_report: whether to measure the candidates on the first batch.

    Raises:
        ValueError: a value is not valid, or an option is given without ``halo``.

    Example:
        >>> from transformers import HfArgumentParser
        >>> from halo_tensor.transformers import HaloArguments
        >>> (arguments,) = HfArgumentParser(HaloArguments).parse_args_into_dataclasses(["--halo", "int8", "--halo_level", "2"])
        >>> [callback.switch.config for callback in arguments.callbacks()]  # Trainer(..., callbacks=arguments.callbacks())
        [HaloConfig(level=2, dtype='int8', granularity='row', block_size=128, seed=0)]
        >>> HaloArguments().callbacks()
        []
    """

    halo: str | None = field(
        default=None, metadata={"help": "Low precision: int8, fp8, fp6, a recipe, a .json of LayerConfigs, or a JSON object"}
    )
    halo_level: int | None = field(
        default=None, metadata={"help": "HALO's level: 0, 1 or 2 (by default what suits the dtype)"}
    )
    halo_balance: int | None = field(default=None, metadata={"help": "Balance the model on so many batches of training data"})
    halo_report: bool = field(default=False, metadata={"help": "Measure the candidate recipes on the first batch"})

    def __post_init__(self) -> None:
        self.switch()

    def switch(self) -> Switch | None:
        """Return what these arguments ask for; None if ``halo`` is not given."""
        given = {"level": self.halo_level, "balance": self.halo_balance, "report": self.halo_report or None}
        options = {name: value for name, value in given.items() if value is not None}
        if self.halo is None:
            if options:
                raise ValueError(f"--halo_{min(options)} needs --halo, for example --halo int8")
            return None
        return Switch.of(self.halo, **options)

    def callbacks(self) -> list[HaloCallback]:
        """Return what a trainer takes as ``callbacks``: one callback, or none without ``halo``."""
        switch = self.switch()
        return [] if switch is None else [HaloCallback(switch)]
