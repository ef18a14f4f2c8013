"""TRL: SFT, DPO or GRPO in low precision. A reference model is converted in the same way.

    python examples/hosts/with_trl.py dpo --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --halo int8

Each line of the data has "prompt" and "completion" for sft; "prompt", "chosen" and "rejected" for dpo; "prompt" for grpo.
"""

import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, TrlParser

from halo_tensor.transformers import HaloArguments

TRAINERS = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}


@dataclass
class Script:
    model: str
    data: str


def short(completions: list[str], **_) -> list[float]:
    """The reward of grpo: put yours here."""
    return [-float(len(text)) for text in completions]


def main(words: list[str] | None = None) -> Trainer:
    method, *words = sys.argv[1:] if words is None else words
    config, trainer_class = TRAINERS[method]
    script, training, halo = TrlParser((Script, config, HaloArguments)).parse_args_and_config(words)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(script.model),
        **({"reward_funcs": short} if method == "grpo" else {}),
        args=training,
        train_dataset=load_dataset("json", data_files=script.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(script.model),
        callbacks=halo.callbacks(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()
