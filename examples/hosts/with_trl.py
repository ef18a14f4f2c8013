"""TRL: preference training (DPO) in low precision. The reference model is converted in the same way.

    python examples/hosts/with_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --halo int8

Each line of the data has "prompt", "chosen" and "rejected".
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, TrlParser

from halo_tensor.transformers import HaloArguments


@dataclass
class Script:
    model: str
    data: str


def main(words: list[str] | None = None) -> DPOTrainer:
    script, training, halo = TrlParser((Script, DPOConfig, HaloArguments)).parse_args_and_config(words)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(script.model),
        args=training,
        train_dataset=load_dataset("json", data_files=script.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(script.model),
        callbacks=halo.callbacks(),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
